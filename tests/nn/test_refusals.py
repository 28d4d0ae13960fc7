"""What inject, load_adapters and steer refuse: layers whose own computation would be left out, and
layers whose inputs are not one entry per example."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
import transformers
from small_models import logits_of, small_model, state
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import MarianConfig, MarianMTModel
from transformers.integrations.bitnet import AutoBitLinear
from transformers.pytorch_utils import Conv1D

from clp_kernels import MixedLinear, MixedLoRALinear, inject, inject_experts, mix_models, steer
from clp_kernels.nn.mixed_lora import steered_layers
from clp_kernels.nn.probe import check_start
from clp_kernels.nn.steering import Steering

NAMES = ["joy", "brief"]
IDS = torch.arange(12).view(4, 3) % 60
pytestmark = pytest.mark.usefixtures("one_thread")


llama, gpt2, opt = (partial(small_model, name) for name in ("llama", "gpt2", "opt"))


# A computation of its own.


class Doubled(nn.Linear):
    """A subclass as routers and quantised layers are."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledCall(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class DoubledCallImpl(nn.Linear):
    """nn.Module's call runs this."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super()._call_impl(*args, **kwargs)


class DoubledCompiled(nn.Linear):
    """nn.Module's call runs this in place of _call_impl if there is one."""

    def _compiled_call_impl(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return 2 * self._call_impl(*args, **kwargs)


class DoubledTrace(nn.Linear):
    """Only under torch.jit.trace."""

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super()._slow_forward(*args, **kwargs)


class DoubledWeight(nn.Linear):
    """Its forward reads another weight than the parameter."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return 2 * value if name == "weight" else value


class Named(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class Equalised(nn.Linear):
    """As StyleGAN's layers scale their weights; nn.Linear's own parameter is behind it."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return 2 * self._parameters["weight"]


class DoubledConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(Tensor):
    """A tensor that means something else than its numbers, as quantised weights do."""


IMPLS: dict[str, type[nn.Linear]] = {
    "a subclass with another _call_impl": DoubledCallImpl,
    "a subclass with a _compiled_call_impl": DoubledCompiled,
    "a subclass with another _slow_forward": DoubledTrace,
    "a subclass with another weight": DoubledWeight,
}


def layer_of(kind: str) -> nn.Module:
    layer: nn.Module = nn.Linear(6, 6)
    if kind == "a subclass":
        return Doubled(6, 6)
    if kind == "a subclass with another call":
        return DoubledCall(6, 6)
    if kind in IMPLS:
        return IMPLS[kind](6, 6)
    if kind == "a subclass of Conv1D":
        return DoubledConv1D(6, 6)
    if kind == "a patched forward":
        layer.forward = lambda x: x  # type: ignore[method-assign]
    elif kind == "a patched _call_impl":
        layer._call_impl = lambda x: x  # type: ignore[method-assign]
    elif kind == "a weight before the parameter":
        vars(layer)["weight"] = 2 * layer.weight.detach()
    elif kind == "a forward hook":
        layer.register_forward_hook(lambda _, args, y: 2 * y)
    elif kind == "a forward pre-hook":
        layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    elif kind == "a backward hook":
        layer.register_full_backward_hook(lambda *_: None)
    elif kind == "a backward pre-hook":
        layer.register_full_backward_pre_hook(lambda *_: None)
    elif kind == "an old weight norm":
        torch.nn.utils.spectral_norm(layer)
    elif kind == "a weight that is a property":
        layer.__class__ = Equalised
    elif kind == "a tensor subclass":
        weight = layer.weight.detach().as_subclass(Scaled)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


OWN = {
    "a subclass": "is a Doubled, which has a forward of its own",
    "a subclass with another call": "is a DoubledCall, which has a forward of its own",
    "a subclass with another _call_impl": "is a DoubledCallImpl, which has a forward of its own",
    "a subclass with a _compiled_call_impl": "is a DoubledCompiled, which has a forward of its own",
    "a subclass with another _slow_forward": "is a DoubledTrace, which has a forward of its own",
    "a subclass with another weight": "is a DoubledWeight whose weight is not its parameter weight",
    "a weight before the parameter": "is a Linear whose weight is not its parameter weight",
    "a patched _call_impl": "is a Linear with a replaced forward",
    "a subclass of Conv1D": "is a DoubledConv1D, which has a forward of its own",
    "a patched forward": "is a Linear with a replaced forward",
    "a forward hook": "is a Linear with forward hooks",
    "a forward pre-hook": "is a Linear with forward pre hooks",
    "a backward hook": "is a Linear with backward hooks",
    "a backward pre-hook": "is a Linear with backward pre hooks",
    "an old weight norm": "is a Linear with forward pre hooks",
    "a weight that is a property": "is a Equalised whose weight is a property",
    "a tensor subclass": "is a Linear whose weight is a Scaled",
}


def test_models_with_adapters_of_peft_are_refused_until_they_are_merged() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    models = [peft.get_peft_model(small_model("llama"), config) for _ in NAMES]
    with pytest.raises(ValueError, match=f"{NAMES[0]} has adapters of PEFT: merge them first"):
        mix_models(models, NAMES)
    mix_models([model.merge_and_unload() for model in models], NAMES)


@pytest.mark.parametrize("kind", OWN)
def test_a_layer_with_a_computation_of_its_own_is_refused_by_name(kind: str) -> None:
    model = nn.ModuleDict({"good": nn.Linear(6, 6), "odd": layer_of(kind)})
    before = state(model)
    with pytest.raises(ValueError, match=rf"odd {OWN[kind]}.*exclude_modules=\['odd'\]"):
        inject(model, NAMES)
    assert state(model) == before
    assert inject(model, NAMES, exclude_modules=["odd"]) == ["good"]
    with pytest.raises(ValueError, match=f"plain linear layer, got one that {OWN[kind]}"):
        MixedLoRALinear(layer_of(kind), NAMES, ranks=[2, 2], lora_alpha=[1, 1], steering=Steering())
    with pytest.raises(ValueError, match=f"plain linear layers, got one that {OWN[kind]}"):
        MixedLinear.from_layers([nn.Linear(6, 6), layer_of(kind)], NAMES)
    for place in range(2):
        models = [nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))]
        models[place][0] = layer_of(kind)
        same_class = "a tensor subclass", "a weight before the parameter"
        if kind not in same_class and "patched" not in kind and "hook" not in kind:
            # Another architecture otherwise.
            models[1 - place][0] = layer_of(kind)
        with pytest.raises(ValueError, match=rf"models must be.* 0 of \w+ {OWN[kind]}"):
            mix_models(models, NAMES)


def ternary(layer: nn.Linear) -> nn.Module:
    """transformers' BitNet layer, which quantises its weight in each forward."""
    return AutoBitLinear(6, 6, bias=True, online_quant=True)


def pruned(layer: nn.Linear) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    "make, fault",
    [
        (ternary, "is a AutoBitLinear, which has a forward of its own"),
        (pruned, "is a Linear with forward pre hooks"),
    ],
)
def test_layers_that_libraries_have_changed_are_refused_by_name(
    make: Callable[[nn.Linear], nn.Module], fault: str
) -> None:
    model = nn.ModuleDict({"good": nn.Linear(6, 6), "odd": make(nn.Linear(6, 6))})
    before = state(model)
    with pytest.raises(ValueError, match=rf"odd {fault}.*exclude_modules=\['odd'\]"):
        inject(model, NAMES)
    assert state(model) == before
    assert inject(model, NAMES, exclude_modules=["odd"]) == ["good"]


def test_hooks_of_the_models_that_are_dropped_are_refused_everywhere() -> None:
    models = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in NAMES]
    models[1][1].register_forward_hook(lambda _, args, y: 2 * y)
    with pytest.raises(ValueError, match="1 of brief is a Tanh with forward hooks"):
        mix_models(models, NAMES)
    models[1][1], models[0][1] = models[0][1], models[1][1]
    y = mix_models(models, NAMES)
    with steer(y, [[1.0, 0.0]]):
        assert torch.equal(y(torch.ones(1, 6)), 2 * y[0](torch.ones(1, 6)).tanh())


class Shifted(nn.Embedding):
    """Has the attribute that scaled embeddings have, and does something else with it."""

    embed_scale = 2.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.embed_scale


class Called(nn.Embedding):
    def _call_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super()._call_impl(*args, **kwargs)


def test_an_embedding_with_a_call_of_its_own_is_refused() -> None:
    refused = "is a Called, which has a forward of its own"
    with pytest.raises(ValueError, match=f"0 of joy {refused}"):
        mix_models([nn.Sequential(Called(5, 6)) for _ in NAMES], NAMES)
    with pytest.raises(ValueError, match=f"0 {refused}"):
        inject_experts(nn.Sequential(Called(5, 6), nn.Linear(6, 6)), NAMES)


def test_a_compiled_layer_is_steered() -> None:
    """It computes what it did, so that only a class's own call is refused."""
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].compile(backend="eager")
    assert inject(model, NAMES) == ["0"]


class Multiplied(nn.Embedding):
    """As Bart's."""

    embed_scale = 27.7

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_are_mixed_where_they_look_up_their_table(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="0 of joy is a Shifted, which has a forward of its own"):
        mix_models([nn.Sequential(Shifted(5, 6).to(dtype)) for _ in NAMES], NAMES)
    models = [nn.Sequential(Multiplied(5, 6).to(dtype)) for _ in NAMES]
    ids, wanted = torch.tensor([[0, 1], [4, 2]]), copy.deepcopy(models[1])
    with steer(mix_models(models, NAMES), [[0.0, 1.0]] * 2):
        assert torch.equal(models[0](ids), wanted(ids))


def test_layers_that_the_module_around_them_does_not_call_are_refused() -> None:
    """PyTorch's own attention and its encoder layer's fast path read the weights."""
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "out_proj": nn.Linear(8, 8)})
    wanted = r"a.out_proj is read by MultiheadAttention.*exclude_modules=\['a.out_proj'\]"
    with pytest.raises(ValueError, match=wanted):
        inject(attention, NAMES)
    assert inject(attention, NAMES, exclude_modules=["a.out_proj"]) == ["out_proj"]
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0.self_attn.out_proj .*'linear1', 'linear2'\]"):
        inject(encoder, NAMES)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_layers_whose_weight_the_model_reads_by_itself_are_refused(name: str) -> None:
    model = small_model(name)
    before = state(model)
    wanted = r"layers.0.mixer.dt_proj is used without a call.*exclude_modules=\['dt_proj'\]"
    with pytest.raises(ValueError, match=wanted):
        inject(model, NAMES)
    assert state(model) == before
    assert len(inject(model, NAMES, exclude_modules=["dt_proj"])) == 6


class Reads(nn.Module):
    """A layer of a network that looks at the weight of another one in some way."""

    def __init__(self, mlp: nn.Module, look: Callable[[Tensor, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.mlp, self.look = mlp, look

    def forward(self, x: Tensor) -> Tensor:
        return self.look(self.mlp(x), self.mlp.down_proj)


@pytest.mark.parametrize("tied", [False, True])
def test_to_look_at_the_kind_of_a_weight_is_not_to_read_it(tied: bool) -> None:
    def kind(y: Tensor, layer: nn.Linear) -> Tensor:
        y = y.to(layer.weight.dtype).type_as(layer.weight) + torch.zeros_like(layer.weight)[0, 0]
        return y + layer.weight.new_zeros(())

    model = llama(tie_word_embeddings=tied)
    model.model.layers[1].mlp = Reads(model.model.layers[1].mlp, kind)
    assert len(inject(model, NAMES, target_modules=["down_proj", "lm_head"])) == 3


class Transposed(nn.Module):
    """Multiplies by a view of the layer's weight that was made before."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.matrix = layer, layer.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def test_a_view_of_the_weight_is_the_weight() -> None:
    model = llama()
    model.model.layers[1].mlp.down_proj = Transposed(model.model.layers[1].mlp.down_proj)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.layer is used without a call"):
        inject(model, NAMES)


def test_a_decoder_with_a_smaller_vocabulary_of_its_own() -> None:
    sizes = {"d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
    for name in ("encoder", "decoder"):
        sizes |= {f"{name}_layers": 1, f"{name}_attention_heads": 2, f"{name}_ffn_dim": 16}
    config = MarianConfig(
        vocab_size=200, decoder_vocab_size=50, share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    assert len(inject(MarianMTModel(config), NAMES)) == 16


def test_a_layer_that_dora_reads_is_refused() -> None:
    """PEFT's DoRA takes the norm of the weight that its adapter changes."""
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match=r"q_proj.base_layer is used without a call"):
        inject(model, NAMES)


@pytest.mark.parametrize("read", [Tensor.norm, lambda w: torch.cat([w, w]).amax()])
def test_a_layer_that_is_called_and_read_is_refused(read: Callable[[Tensor], Tensor]) -> None:
    def look(y: Tensor, layer: nn.Linear) -> Tensor:
        return y + read(layer.weight)

    model = llama()
    model.model.layers[1].mlp = Reads(model.model.layers[1].mlp, look)
    with pytest.raises(ValueError, match=r"layers.1.mlp.mlp.down_proj is used without a call"):
        inject(model, NAMES)


def test_a_subclass_and_a_parametrized_layer_that_compute_the_same_are_steered() -> None:
    model, x = nn.Sequential(Named(6, 6), nn.Linear(6, 6)), torch.randn(3, 6)
    torch.nn.utils.parametrizations.weight_norm(model[1])
    with torch.no_grad():
        base = model(x)
    assert inject(model, NAMES) == ["0", "1"]
    assert parametrize.is_parametrized(model[1].base_layer)
    with torch.no_grad(), steer(model, torch.ones(3, 2)):
        assert torch.equal(model(x), base)
        model[1].base_layer.parametrizations.weight.original0 *= 2
        assert not torch.equal(model(x), base)


@pytest.mark.parametrize(
    "kind", ["a forward hook", "a forward pre-hook", "a patched forward", "a patched _call_impl"]
)
def test_what_is_put_on_a_wrapped_layer_later_is_refused_by_steer(kind: str) -> None:
    """It would run for the base model alone. On the layer around it, it runs."""
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(3, 6)
    inject(model, NAMES)
    for name, value in vars(layer_of(kind)).items():
        if name in ("forward", "_call_impl", "_forward_hooks", "_forward_pre_hooks"):
            setattr(model[0].base_layer, name, value)
    with pytest.raises(ValueError, match=r"0: its base_layer has got .*put that on this Mixed"):
        steer(model, torch.ones(3, 2))
    model = nn.Sequential(nn.Linear(6, 6))
    inject(model, NAMES)
    model[0].register_forward_hook(lambda _, args, y: 2 * y)
    with steer(model, torch.ones(3, 2)):
        assert torch.equal(model(x), 2 * model[0].base_layer(x))


def test_routers_are_named_and_can_be_left_out() -> None:
    model = small_model("phimoe", num_local_experts=4, num_experts_per_tok=2)
    wanted = r"layers.0.mlp.router is a PhimoeTopKRouter.*exclude_modules=\['router'\]"
    with pytest.raises(ValueError, match=wanted):
        inject(model, NAMES)
    assert not any("router" in n for n in inject(model, NAMES, exclude_modules=["router"]))


@pytest.mark.parametrize(
    "excluded, error",
    [
        (["q_prj"], "exclude_modules: 'q_prj' names no linear layer of the model"),
        ("q_proj", "exclude_modules must be a list of names, got 'q_proj'"),
        ([f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")], "all are excluded"),
    ],
)
def test_exclude_modules_are_names_of_targets(excluded: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        inject(llama(), NAMES, exclude_modules=excluded)


# What the layers get.


class Experts(nn.Module):
    """A mixture whose experts are linear layers and get the tokens that are routed to them."""

    def __init__(self, count: int = 4, biased: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(16, count, bias=False)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(count)])
        if biased:  # all tokens go to the first: what it gets in six tokens looks like all tokens
            nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, 16)
        chosen, y = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            here = chosen == i
            if here.any():
                y[here] = expert(flat[here])
        return y.view(x.shape)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Positions(nn.Module):
    """A layer whose input all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(16, 16), nn.Parameter(torch.randn(6, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.table)[: x.shape[1]]


def with_block(make: Callable[[], nn.Module]) -> nn.Module:
    model = llama()
    for layer in model.model.layers:
        layer.mlp = make()
    return model


@pytest.mark.parametrize(
    "make, odd",
    [
        (Experts, "experts.0"),
        (lambda: Experts(2), "experts.0"),
        (lambda: Experts(biased=True), "experts.0"),
        (SequenceFirst, "inner"),
        (Positions, "inner"),
    ],
    ids=["experts", "two experts", "one busy expert", "sequence first", "shared input"],
)
def test_layers_that_get_no_entry_per_example_are_refused_by_name(
    make: Callable[[], nn.Module], odd: str
) -> None:
    model = with_block(make).train()
    before = state(model)
    wanted = rf"model.layers.0.mlp.{odd} does not get one entry per example.*exclude_modules=\['"
    with pytest.raises(ValueError, match=wanted) as caught:
        inject(model, NAMES)
    assert state(model) == before
    excluded = eval(str(caught.value).rpartition("exclude_modules=")[2])
    replaced = inject(model, NAMES, exclude_modules=excluded)
    assert not any(odd.split(".")[0] in name for name in replaced)
    flattened = [n for n, layer in steered_layers(model).items() if layer.flattened]
    assert [n for n in replaced if "gate" in n] == [n for n in flattened if "gate" in n]


@pytest.mark.parametrize(
    "model_type, options, flattened",
    [
        ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}, {"fc1", "fc2"}),
        (
            "qwen2_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
             "shared_expert_intermediate_size": 16},
            {"shared_expert_gate", "gate_proj", "up_proj", "down_proj"},
        ),
        (
            "ernie4_5_moe",
            {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8,
             "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
            {"gate_proj", "up_proj", "down_proj"},
        ),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, set()),
        ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2, "head_dim": 8}, {"wg"}),
        (
            "jetmoe",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
            {"layer"},
        ),
        ("gpt_neox", {}, set()),
        ("llama", {}, set()),
    ],
)  # fmt: skip
def test_which_layers_see_flattened_tokens(
    model_type: str, options: dict[str, int], flattened: set[str]
) -> None:
    """And each example runs under its own weights, whichever stand beside it."""
    model = small_model(model_type, **options).double()
    inject(model, NAMES)
    layers = steered_layers(model)
    assert {n.rpartition(".")[2] for n, m in layers.items() if m.flattened} == flattened
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.3)
    rows = torch.randn(4, 2, dtype=torch.float64)
    together = logits_of(model, IDS, rows)
    for b in range(4):
        alone = logits_of(model, IDS[b : b + 1], rows[b : b + 1])
        torch.testing.assert_close(alone[0], together[b])


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 12])
def test_another_number_of_rows_is_refused_where_only_flattened_layers_are_steered(
    rows: int,
) -> None:
    """The twelve tokens of four examples divide by each of these."""
    model = opt()
    inject(model, NAMES, target_modules=["fc1", "fc2"])
    for forward in (model, model.model, lambda ids: model.model.decoder(input_ids=ids)):
        with pytest.raises(ValueError, match=f"4 examples, weights has {rows} rows"), \
                steer(model, torch.ones(rows, 2)):  # fmt: skip
            forward(IDS)
    with steer(model, torch.ones(4, 2)):
        model(IDS)
    with steer(model, None):
        model(IDS)
    with pytest.raises(RuntimeError, match="without weights"):
        model(IDS)


def test_a_copy_checks_its_own_rows() -> None:
    model = opt()
    inject(model, NAMES, target_modules=["fc1", "fc2"])
    other = copy.deepcopy(model)
    with steer(model, torch.ones(2, 2)), steer(other, torch.ones(4, 2)):
        other(IDS)


def test_compiled_flattened_layers_do_not_recompile_for_other_weights() -> None:
    torch._dynamo.reset()
    model = opt()
    inject(model, NAMES)
    for layer in steered_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def run(rows: Tensor, function: nn.Module) -> Tensor:
        with torch.no_grad(), steer(model, rows):
            return function(IDS, use_cache=False).logits

    run(torch.randn(4, 2), compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        rows = torch.randn(4, 2)
        torch.testing.assert_close(run(rows, compiled), run(rows, model))


# The start.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_the_start_is_the_base_bit_for_bit(
    make: Callable[..., nn.Module], backend: str, dtype: torch.dtype
) -> None:
    """Also where gradients are wanted, and nothing is left behind."""
    model = make(dtype)
    inject(model, NAMES)
    for layer in steered_layers(model).values():
        layer.backend = backend
    model.train()
    before = state(model)
    check_start(model)
    assert state(model) == before
    model.eval()
    with steer(model, None):
        base = model(IDS).logits
    with steer(model, torch.tensor([[0.5, -2.0]] * 4)):
        logits = model(IDS).logits
    assert logits.requires_grad
    assert torch.equal(logits, base)


def test_a_start_that_is_not_the_base_is_named() -> None:
    model = llama()
    inject(model, NAMES)
    layer = model.model.layers[1].mlp.up_proj
    layer.lora_B.data[1, 0, 0] = 1e-3
    with pytest.raises(ValueError, match=r"equal its base .*model.layers.1.mlp.up_proj differ"):
        check_start(model)


def test_a_model_that_is_not_deterministic_is_named() -> None:
    model = llama()
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda _, args, y: y + torch.rand_like(y))
    inject(model, NAMES)
    wanted = "deterministic, the outputs of model.layers.1.self_attn.q_proj differ between two"
    with pytest.raises(ValueError, match=wanted):
        check_start(model)


def test_flattened_layers_in_generation_with_a_cache() -> None:
    """A prompt of several tokens, then one a step; padded on the left, three answers a prompt."""
    model = opt()
    inject(model, NAMES)
    for layer in steered_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    rows, mask = torch.randn(2, 2), torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    ids = torch.arange(1, 11).view(2, 5) * mask
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    with steer(model, rows.repeat_interleave(3, 0)):
        together = model.generate(ids, attention_mask=mask, **options)[:, 5:]
    for b, start in enumerate((0, 2)):
        with steer(model, rows[b : b + 1].repeat_interleave(3, 0)):
            alone = model.generate(ids[b : b + 1, start:], **options)[:, 5 - start :]
        assert together[3 * b : 3 * b + 3, : alone.shape[1]].tolist() == alone.tolist()


@pytest.mark.parametrize("head", ["LongformerModel", "LongformerForMaskedLM"])
def test_an_encoder_that_puts_tokens_first_is_refused(head: str) -> None:
    """With as many tokens as examples, position t would silently take example t's weights."""
    config = transformers.LongformerConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        intermediate_size=24, max_position_embeddings=32, attention_window=4,
    )  # fmt: skip
    model = getattr(transformers, head)(config)
    with pytest.raises(ValueError, match="does not get one entry per example"):
        inject(model, ["a", "b"], r=2)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_encoders_and_classifiers_are_steered_by_example(kind: str) -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    inject(model, ["a", "b"], r=2)
    for layer in steered_layers(model).values():
        nn.init.normal_(layer.lora_B)
    ids, weights = torch.arange(12).view(4, 3), torch.rand(4, 2)

    def run(chosen: slice) -> torch.Tensor:
        with torch.no_grad(), steer(model, weights[chosen]):
            return model(ids[chosen])[0]

    whole = run(slice(None))
    for i in range(4):
        torch.testing.assert_close(whole[i : i + 1], run(slice(i, i + 1)), rtol=0, atol=1e-5)


def test_a_causal_classifier_without_padding_is_injected() -> None:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2ForSequenceClassification(config)
    assert inject(model, ["a", "b"], r=2)


@pytest.mark.parametrize("kind", ["Canine", "Lxmert", "CLIP"])
def test_a_model_that_needs_more_than_token_ids_is_injected(kind: str) -> None:
    """Nothing is known of its layers: it does not run on six tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    if kind == "CLIP":
        small = sizes | {"num_hidden_layers": 1}
        config = transformers.CLIPConfig(text_config=small, vision_config=small)
    else:
        config = getattr(transformers, f"{kind}Config")(**sizes, num_hidden_layers=1)
    model = getattr(transformers, f"{kind}Model")(config)
    assert inject(model, ["a", "b"], r=2)


def test_where_no_target_can_be_steered_nothing_is_advised():
    """As in a model that accelerate has spread: leaving out all of them leaves nothing."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        layer.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="so does every other target") as caught:
        inject(model, ["a"], r=2)
    assert "exclude_modules" not in str(caught.value)


def test_a_weight_that_is_not_dense_is_refused():
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    with pytest.raises(ValueError, match=r"0 has a weight of layout torch.sparse_coo, not a dense"):
        inject(model, NAMES)
