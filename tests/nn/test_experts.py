"""Mixtures of whole models: the layers, mix_models and Policy.from_models, against merged models.

The judge is an ordinary model that runs with the weighted sum of the m models' parameters.
"""

import copy
from collections.abc import Callable
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from small_models import logits_of, plain_logits, small_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from clp import Policy, Sampler, SamplingParams
from clp.data.paths import TINY
from clp.policies.loading import load_base
from clp_kernels import (
    MixedLinear,
    adapter_names,
    export_adapter,
    inject,
    load_adapters,
    mix_models,
    save_adapters,
    steer,
)
from clp_kernels.nn.experts import MixedEmbedding, MixedModule
from clp_kernels.nn.mixed_lora import steered_layers
from clp_kernels.nn.steering import SteeredLayer, Steering, all_steered

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["joy", "brief", "safe"]
IDS = torch.arange(33).view(11, 3) % 40
KINDS = ["full", "attention", "head"]


def small(model_type: str, **options: object) -> nn.Module:
    """Without a padding id, whose embedding would stay as it is."""
    return small_model(model_type, **{"vocab_size": 40, "pad_token_id": None, **options})


llama, gpt2 = partial(small, "llama"), partial(small, "gpt2")
llama_tied = partial(llama, tie_word_embeddings=True)
qwen2 = partial(small, "qwen2", tie_word_embeddings=True)
gemma3 = partial(small, "gemma3_text", pad_token_id=0)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama, "llama_tied": llama_tied, "qwen2": qwen2, "gpt2": gpt2,
}  # fmt: skip


def conditioned(model: nn.Module, conditioning: str) -> list[str]:
    """Names of the parameters that the m models may differ in, told by their names alone."""
    names = [n for n, _ in model.named_parameters()]
    if conditioning == "attention":
        return [n for n in names if ".self_attn." in n or ".attn." in n]
    if conditioning == "head":
        # A tied head goes by the name of the input embedding.
        tied = ("model.embed_tokens.weight", "transformer.wte.weight")
        return [n for n in names if n == "lm_head.weight"] or [n for n in names if n in tied]
    return names


def family(make: Callable[[], nn.Module], conditioning: str = "full", m: int = 3) -> list:
    """m float64 models that differ in the conditioned parameters, and enough to be told apart."""
    first = make().double().eval()
    for parameter in first.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    models = [first]
    for _ in range(m - 1):
        other = copy.deepcopy(first)
        for name in conditioned(other, conditioning):
            other.get_parameter(name).data += torch.randn_like(other.get_parameter(name)) * 0.3
        models.append(other)
    return models


def merged(models: list, row: Tensor, conditioning: str) -> nn.Module:
    """A plain copy of the first model with sum_i row_i theta_i; a tied head of "head" is untied."""
    model = copy.deepcopy(models[0])
    if conditioning == "head":
        head = sum(w * m.lm_head.weight.data for w, m in zip(row, models, strict=True))
        model.lm_head.weight = nn.Parameter(head)
        return model
    for name, parameter in model.named_parameters():
        if name in conditioned(model, conditioning):
            values = [m.get_parameter(name).data for m in models]
            parameter.data = sum(w * v for w, v in zip(row, values, strict=True))
    return model


def simplex(count: int, m: int = 3) -> Tensor:
    return torch.distributions.Dirichlet(torch.ones(m, dtype=torch.float64)).sample((count,))


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


# Whole models.


@pytest.mark.parametrize("conditioning", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_unit_row_is_one_of_the_models(name: str, conditioning: str) -> None:
    """With a tied head under "head" the input embedding stays the first model's."""
    models = family(MODELS[name], conditioning)
    eye = torch.eye(3, dtype=torch.float64)
    tied = models[0].lm_head.weight is models[0].get_input_embeddings().weight
    wanted = [
        plain_logits(merged(models, row, conditioning) if tied else model, IDS)
        for row, model in zip(eye, models, strict=True)
    ]
    if conditioning == "full":
        wanted = [plain_logits(model, IDS) for model in models]
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2
    mixed = mix_models(models, NAMES, conditioning=conditioning)
    for row, logits in zip(eye, wanted, strict=True):
        close(logits_of(mixed, IDS, row.expand(11, 3)), logits)


@pytest.mark.parametrize("conditioning", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_example_runs_its_own_merged_model(name: str, conditioning: str) -> None:
    """In one batch and one at a time."""
    models, rows = family(MODELS[name], conditioning), simplex(11)
    wanted = [
        plain_logits(merged(models, row, conditioning), ids[None])
        for row, ids in zip(rows, IDS, strict=True)
    ]
    mixed = mix_models(models, NAMES, conditioning=conditioning)
    got = logits_of(mixed, IDS, rows)
    for b, logits in enumerate(wanted):
        close(got[b : b + 1], logits)
        close(logits_of(mixed, IDS[b : b + 1], rows[b : b + 1]), logits)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "gpt2"])
def test_any_row_is_exact_where_every_layer_is_linear_in_its_parameters(name: str) -> None:
    models, rows = family(MODELS[name]), torch.randn(11, 3, dtype=torch.float64)
    wanted = [plain_logits(merged(models, rows[b], "full"), IDS[b : b + 1]) for b in (0, 10)]
    got = logits_of(mix_models(models, NAMES), IDS, rows)
    for b, logits in zip((0, 10), wanted, strict=True):
        torch.testing.assert_close(got[b : b + 1], logits, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("norms_in_float64")
def test_norms_of_one_plus_weight_are_exact_on_rows_that_sum_to_one_alone() -> None:
    """Gemma 3, whose embedding is scaled too."""
    models, rows = family(gemma3), simplex(11)
    wanted = plain_logits(merged(models, rows[3], "full"), IDS[3:4])
    off = plain_logits(merged(models, 2 * rows[3], "full"), IDS[3:4])
    mixed = mix_models(models, NAMES)
    close(logits_of(mixed, IDS, rows)[3:4], wanted)
    assert (logits_of(mixed, IDS, 2 * rows)[3:4] - off).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_that_each_conditioning_replaces(name: str) -> None:
    linears = {"gpt2": 4}.get(name, 7)
    in_attention = {"gpt2": 2}.get(name, 4)
    norms, embeddings = 5, {"gpt2": 2}.get(name, 1)
    wanted = {
        "full": (2 * linears + 1, embeddings, norms),
        "attention": (2 * in_attention, 0, 0),
        "head": (1, 0, 0),
    }
    for conditioning, counts in wanted.items():
        mixed = mix_models(family(MODELS[name], conditioning), NAMES, conditioning=conditioning)
        layers = all_steered(mixed)
        kinds = (MixedLinear, MixedEmbedding, MixedModule)
        assert tuple(sum(isinstance(x, k) for x in layers) for k in kinds) == counts
        assert len({id(layer.steering) for layer in layers}) == 1
        assert adapter_names(mixed) == tuple(NAMES) and not steered_layers(mixed)
        assert not any(p.requires_grad for p in mixed.parameters())


def test_ties_are_kept_and_a_tied_head_is_untied_where_it_alone_is_mixed() -> None:
    full = mix_models(family(llama_tied), NAMES)
    assert full.lm_head.expert_weight is full.model.embed_tokens.expert_weight
    assert full.config.tie_word_embeddings
    mixed = mix_models(family(llama), NAMES)
    assert mixed.lm_head.expert_weight is not mixed.model.embed_tokens.expert_weight
    models = family(llama_tied, "head")
    embedding = models[0].get_input_embeddings()
    before = embedding.weight.clone()
    head = mix_models(models, NAMES, conditioning="head")
    assert head.get_input_embeddings() is embedding and torch.equal(embedding.weight, before)
    assert type(head.lm_head) is MixedLinear and not head.config.tie_word_embeddings


def test_the_first_model_is_changed_and_nothing_is_shared_with_the_others() -> None:
    models = family(gpt2)
    wanted = plain_logits(models[1], IDS)
    mixed = mix_models(models, NAMES)
    assert mixed is models[0]
    mine = {p.untyped_storage().data_ptr() for p in mixed.parameters()}
    others = [p for model in models[1:] for p in model.parameters()]
    assert not mine & {p.untyped_storage().data_ptr() for p in others}
    assert torch.equal(plain_logits(models[1], IDS), wanted)


def test_one_model_and_the_same_model_twice() -> None:
    model = llama().double().eval()
    wanted = plain_logits(model, IDS)
    twice = mix_models([model, model], ["a", "b"])
    close(logits_of(twice, IDS, torch.tensor([[0.25, 0.75]]).expand(11, 2)), wanted)
    model = llama().double().eval()
    wanted = plain_logits(model, IDS)
    alone = mix_models([model], ["a"])
    close(logits_of(alone, IDS, torch.ones(11, 1)), wanted)


def test_a_module_under_two_names_stays_one() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            self.norm = nn.LayerNorm(4)
            self.other = nn.LayerNorm(4)
            self.other.weight = self.norm.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.b(self.norm(self.a(x))))

    models = [Looped().double() for _ in range(2)]
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    wanted = models[1](x)
    mixed = mix_models(models, ["a", "b"])
    assert mixed.a is mixed.b
    assert mixed.norm.experts[1].weight is mixed.other.experts[1].weight
    with steer(mixed, [[0.0, 1.0]] * 3):
        close(mixed(x), wanted)


# Gradients.


def expert_gradients(mixed: nn.Module, models: list, conditioning: str) -> dict:
    """The gradient of expert i's parameter `name`, by (name, i), in the plain model's layout."""
    found = {}
    modules = dict(models[-1].named_modules())
    for name in conditioned(models[-1], conditioning):
        # A tied head is a parameter of the head's own once it is untied.
        path = "lm_head.weight" if conditioning == "head" else name
        owner, _, kind = path.rpartition(".")
        layer = mixed.get_submodule(owner)
        for i in range(len(models)):
            if isinstance(layer, MixedModule):
                grad = layer.experts[i].get_parameter(kind).grad
            else:
                grad = layer.get_parameter(f"expert_{kind}").grad[i]
            transposed = kind == "weight" and isinstance(modules[owner], Conv1D)
            found[name, i] = grad.t() if transposed else grad
    return found


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("conditioning", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_merged_parameters(name: str, conditioning: str) -> None:
    """Of every expert parameter and of the rows, by plain autograd through sum_i w_i theta_i."""
    models, ids = family(MODELS[name], conditioning), IDS[:4]
    rows = simplex(4).requires_grad_()
    target = torch.randn(4, 3, 40, dtype=torch.float64)
    leaves = {
        (n, i): model.get_parameter(n).detach().clone().requires_grad_()
        for i, model in enumerate(models)
        for n in conditioned(model, conditioning)
    }
    plain, loss = copy.deepcopy(models[0]), torch.zeros((), dtype=torch.float64)
    names = conditioned(plain, conditioning)
    if conditioning == "head":
        plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    for b in range(4):
        values = {n: sum(rows[b, i] * leaves[n, i] for i in range(3)) for n in names}
        if conditioning == "head":
            values = {"lm_head.weight": values[names[0]]}
        logits = torch.func.functional_call(plain, values, (ids[b : b + 1],)).logits
        loss = loss + (logits[0] * target[b]).sum()
    loss.backward()
    wanted_rows, rows.grad = rows.grad, None

    mixed = mix_models(models, NAMES, conditioning=conditioning)
    for layer in all_steered(mixed):
        layer.requires_grad_(True)
    plain_models = [None, *models[1:]]
    with steer(mixed, rows):
        got = (mixed(ids).logits * target).sum()
    close(got, loss)
    got.backward()
    torch.testing.assert_close(rows.grad, wanted_rows, rtol=1e-10, atol=1e-10)
    gradients = expert_gradients(mixed, plain_models, conditioning)
    assert set(gradients) == set(leaves)
    for key, leaf in leaves.items():
        torch.testing.assert_close(gradients[key], leaf.grad, rtol=1e-10, atol=1e-10)
    frozen = [p for p in mixed.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    assert bool(frozen) == (conditioning != "full")


def test_gradient_checkpointing_recomputes_with_its_own_rows() -> None:
    models, rows = family(llama), simplex(11)
    mixed = mix_models(models, NAMES)
    layer = mixed.model.layers[0].mlp.up_proj
    layer.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        layer.zero_grad()
        if checkpointing:
            mixed.train()
            mixed.gradient_checkpointing_enable({"use_reentrant": False})
        with steer(mixed, rows):
            loss = mixed(IDS, use_cache=False).logits.square().sum()
        with steer(mixed, rows.flip(0)):
            loss.backward()
        gradients.append(layer.expert_weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


# Layers alone.


def mixed_linear_layer(bias: bool = True) -> tuple[MixedLinear, list[nn.Linear]]:
    layers = [nn.Linear(4, 6, bias=bias).double() for _ in range(3)]
    return MixedLinear.from_layers(layers, NAMES), layers


def ones() -> nn.Module:
    """One of each layer by name, to be called with its own input."""
    experts = nn.ModuleDict({
        "linear": mixed_linear_layer()[0],
        "embedding": MixedEmbedding(torch.randn(3, 7, 4).double(), NAMES),
        "norm": MixedModule([nn.LayerNorm(4).double() for _ in range(3)], NAMES),
    })  # fmt: skip
    for norm in experts["norm"].experts:
        nn.init.normal_(norm.weight)
    return experts


def inputs(*shape: int) -> dict[str, Tensor]:
    x = torch.randn(*shape, 4, dtype=torch.float64)
    return {"linear": x, "norm": x, "embedding": torch.randint(7, shape)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_mixed_linear_is_the_sum_of_its_layers(kind: type, bias: bool) -> None:
    if kind is Conv1D:
        layers = [Conv1D(6, 4).double() for _ in range(3)]
    else:
        layers = [nn.Linear(4, 6, bias=bias).double() for _ in range(3)]
    mixed, rows = MixedLinear.from_layers(layers, NAMES), torch.randn(5, 3, dtype=torch.float64)
    assert (mixed.in_features, mixed.out_features) == (4, 6)
    assert "joy, brief, safe: 4 -> 6" in repr(mixed)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    with steer(mixed, rows):
        close(mixed(x), sum(rows[:, i, None, None] * f(x) for i, f in enumerate(layers)))


@pytest.mark.parametrize("layer", ["linear", "embedding", "norm"])
def test_example_ids_name_the_row_of_each_flattened_token(layer: str) -> None:
    model, rows = ones(), torch.randn(3, 3, dtype=torch.float64)
    x, ids = inputs(7)[layer], torch.tensor([2, 0, 0, 1, 2, 1, 1])
    with steer(model, rows[ids]):
        wanted = model[layer](x[:, None])[:, 0]
    with steer(model, rows, example_ids=ids):
        close(model[layer](x), wanted)
        with pytest.raises(ValueError, match="example_ids gives weights to 7 tokens"):
            model[layer](x[:6])


@pytest.mark.parametrize("layer", ["linear", "embedding", "norm"])
def test_a_layer_refuses_to_run_without_rows_that_fit(layer: str) -> None:
    model, x = ones(), inputs(2, 3)[layer]
    with pytest.raises(RuntimeError, match=r"without weights.*steer.*weights\):`$"):
        model[layer](x)
    for batch in (1, 4):
        with (
            steer(model, torch.ones(batch, 3)),
            pytest.raises(ValueError, match=f"batch has 2 examples, weights has {batch} rows"),
        ):
            model[layer](x)


@pytest.mark.parametrize("layer", ["linear", "embedding", "norm"])
def test_a_layer_refuses_a_recomputation_with_rows_that_may_not_be_its_own(layer: str) -> None:
    model, x = ones(), inputs(2, 3)[layer]
    model.requires_grad_(True)
    rows = torch.ones(2, 3, dtype=torch.float64)
    with steer(model, rows):
        y = checkpoint(model[layer], x, use_reentrant=False)
        with pytest.raises(RuntimeError, match="recomputed in the backward"):
            y.sum().backward()


def test_positions_of_one_example_serve_every_row_and_tokens_do_not() -> None:
    table, rows = torch.randn(3, 7, 4).double(), torch.randn(5, 3, dtype=torch.float64)
    words, positions = (MixedEmbedding(table, NAMES, broadcast=b) for b in (False, True))
    ids = torch.tensor([[0, 3]])
    with steer(positions, rows):
        got = positions(ids)
    close(got, torch.einsum("bm,msd->bsd", rows, table[:, ids[0]]))
    with steer(words, rows), pytest.raises(ValueError, match="batch has 1 examples"):
        words(ids)


def test_the_padding_entry_of_an_embedding_gets_no_gradient() -> None:
    layer = MixedEmbedding(torch.randn(3, 7, 4), NAMES, padding_idx=2)
    layer.requires_grad_(True)
    with steer(layer, torch.ones(1, 3)):
        layer(torch.tensor([[2, 4]])).sum().backward()
    assert not layer.expert_weight.grad[:, 2].any() and layer.expert_weight.grad[:, 4].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_accumulated_in_float32_and_keep_the_dtype(dtype: torch.dtype) -> None:
    """1 + eps/2 - 1 is zero in `dtype`, and not before the last rounding."""
    half = torch.finfo(dtype).eps / 2
    table = torch.tensor([1.0, half, -1.0], dtype=dtype).view(3, 1, 1)
    layer = MixedEmbedding(table, NAMES)
    with steer(layer, torch.ones(1, 3)):
        got = layer(torch.tensor([[0]]))
    assert got.dtype == dtype and got.item() == half


@pytest.mark.parametrize("scale", [640**0.5, torch.tensor(640**0.5)], ids=["number", "tensor"])
def test_a_scaled_embedding_steers_between_experts_one_ulp_apart(scale: float | Tensor) -> None:
    """Gemma's: a sum that is rounded before it is scaled is one of the experts, gain 0 or 1.67."""
    torch.manual_seed(0)
    first = ((1 + torch.rand(64, 640)) / 16).bfloat16()
    table = torch.stack([first, (first.view(torch.int16) + 1).view(torch.bfloat16)])
    layer, ids = MixedEmbedding(table, NAMES[:2], scale=scale), torch.arange(64)[None]
    found = []
    for weights in ([1.0, 0.0], [0.7, 0.3]):
        with steer(layer, [weights]):
            found.append(layer(ids)[0].double())
    plain = first * (scale.bfloat16() if isinstance(scale, Tensor) else scale)
    assert torch.equal(found[0], plain.double())
    step = 0.3 * (table[1].double() - table[0].double()) * 640**0.5
    gain = ((found[1] - found[0]) * step).sum() / step.square().sum()
    assert abs(gain - 1) < 0.05


@pytest.mark.parametrize("conditioning", KINDS)
def test_autocast_gives_the_dtype_and_nearly_the_numbers_of_the_merged_model(
    conditioning: str,
) -> None:
    models = [model.float() for model in family(llama, conditioning)]
    row = simplex(1)[0].float()
    plain = merged(models, row, conditioning)
    exact = plain_logits(plain, IDS)
    mixed = mix_models(models, NAMES, conditioning=conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = plain_logits(plain, IDS)
        got = logits_of(mixed, IDS, row.expand(11, 3))
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 3 * (wanted - exact).abs().max()


# steer.


def test_steer_nests_and_one_object_is_entered_again() -> None:
    mixed = mix_models(family(gpt2), NAMES)
    a, b = simplex(11), simplex(11)
    wanted_a, wanted_b = logits_of(mixed, IDS, a), logits_of(mixed, IDS, b)
    outer, inner = steer(mixed, a), steer(mixed, b)
    with torch.no_grad():
        for _ in range(2):
            with outer:
                assert torch.equal(mixed(IDS).logits, wanted_a)
                with inner:
                    assert torch.equal(mixed(IDS).logits, wanted_b)
                    with outer:
                        assert torch.equal(mixed(IDS).logits, wanted_a)
                    assert torch.equal(mixed(IDS).logits, wanted_b)
                assert torch.equal(mixed(IDS).logits, wanted_a)
                with outer:
                    pass
                assert torch.equal(mixed(IDS).logits, wanted_a)
            with pytest.raises(RuntimeError, match="without weights"):
                mixed(IDS)


def test_steer_walks_the_modules_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = mix_models(family(llama), NAMES)
    steering = steer(mixed, simplex(11))

    for name in ("modules", "named_modules"):
        monkeypatch.setattr(nn.Module, name, Mock(side_effect=AssertionError("walked")))
    with torch.no_grad(), steering:
        mixed(IDS)


def test_there_is_no_base_model_and_bad_rows_are_refused() -> None:
    mixed = mix_models(family(llama), NAMES)
    refused = r"got None.*whole models \(joy, brief, safe\) has no base"
    with pytest.raises(ValueError, match=refused):
        steer(mixed, None)
    with pytest.raises(ValueError, match=r"weights must be finite, got nan"):
        steer(mixed, [[0.0, float("nan"), 1.0]])
    with pytest.raises(ValueError, match=r"shape \[B, 3\] for the adapters joy, brief, safe"):
        steer(mixed, torch.ones(11, 2))


def test_rows_take_the_accumulator_of_the_models() -> None:
    for dtype, acc in {torch.bfloat16: torch.float32, torch.float64: torch.float64}.items():
        mixed = mix_models([gpt2().to(dtype)], ["a"])
        assert steer(mixed, [[1]]).weights.dtype == acc


def test_generate_runs_each_example_with_its_row() -> None:
    models, rows = family(qwen2), simplex(2)

    def greedy(model: nn.Module, ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5)

    wanted = [greedy(merged(models, rows[b], "full"), IDS[b : b + 1]) for b in range(2)]
    mixed = mix_models(models, NAMES)
    with steer(mixed, rows):
        assert torch.equal(greedy(mixed, IDS[:2]), torch.cat(wanted))


def test_compiled_mixture_does_not_recompile_for_other_rows() -> None:
    mixed = mix_models(family(llama), NAMES)
    compiled = torch.compile(mixed, fullgraph=True, backend="eager")
    rows = [simplex(11), simplex(11)]
    wanted = [logits_of(mixed, IDS, row) for row in rows]
    with torch.no_grad(), steer(compiled, rows[0]):
        close(compiled(IDS, use_cache=False).logits, wanted[0])
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad(), steer(compiled, rows[1]):
        close(compiled(IDS, use_cache=False).logits, wanted[1])


# Bad input.


def changed(make: Callable[[], nn.Module], name: str, conditioning: str) -> list:
    """A family in which `name`, which is not mixed, differs in the last model."""
    models = family(make, conditioning)
    tensors = dict(models[2].named_parameters()) | dict(models[2].named_buffers())
    tensors[name].data.view(-1)[0] += 1
    return models


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3))


AB = ["a", "b"]
BAD = {
    "no models": (lambda: [], [], {}, "names must be distinct names.*got \\[\\]"),
    "duplicate names": (lambda: family(llama), ["a", "b", "a"], {}, r"distinct names.*'b', 'a'\]"),
    "bad name": (lambda: family(llama), ["a", "b", "c/d"], {}, "distinct names of letters"),
    "a number as a name": (lambda: family(llama), ["a", "b", 3], {}, "distinct names of letters"),
    "too few names": (lambda: family(llama), AB, {}, "must be 2 as the names, got 3"),
    "one model": (lambda: llama(), NAMES, {}, "must be a list of models, got LlamaFor"),
    "conditioning": (lambda: family(llama), NAMES, {"conditioning": "mlp"}, "got 'mlp'"),
    "architecture": (
        lambda: [llama(), qwen2()], AB, {},
        "the model itself of a and b is LlamaForCausalLM and Qwen2ForCausalLM",
    ),
    "activation": (
        lambda: [llama(), llama(hidden_act="gelu")], AB, {},
        r"model.layers.0.mlp.act_fn of a and b is SiLU\w* and GELU",
    ),
    "more layers": (lambda: [llama(), llama(num_hidden_layers=3)], AB, {}, "no model.layers.2"),
    "fewer layers": (lambda: [llama(), llama(num_hidden_layers=1)], AB, {}, "no model.layers.1"),
    "shape": (
        lambda: [llama(), llama(), llama(vocab_size=41)], NAMES, {},
        r"shape of model.embed_tokens.weight of joy and safe is \[40, 16\] and \[41, 16\]",
    ),
    "dtype": (
        lambda: [llama(), llama().double()], AB, {},
        "dtype of model.embed_tokens.weight of a and b is torch.float32 and torch.float64",
    ),
    "bias": (
        lambda: [llama(), llama(attention_bias=True)], AB, {},
        "no model.layers.0.self_attn.q_proj.bias",
    ),
    "tie": (lambda: [llama(), llama_tied()], AB, {}, "lm_head.weight of a and b is tied to"),
    "heads": (
        lambda: [gpt2(), gpt2(num_attention_heads=4)], AB, {},
        r"num_heads of a and b is 2 and 4",
    ),
    "epsilon": (lambda: [llama(), llama(rms_norm_eps=0.1)], AB, {}, "variance_epsilon of a and b"),
    "buffer": (
        lambda: changed(llama, "model.rotary_emb.inv_freq", "full"), NAMES, {},
        "does not mix model.rotary_emb.inv_freq.*differs between joy and safe",
    ),
    "trunk, head": (
        lambda: changed(llama, "model.layers.1.mlp.up_proj.weight", "head"), NAMES,
        {"conditioning": "head"},
        '"head" does not mix model.layers.1.mlp.up_proj.weight, .*between joy and safe',
    ),
    "embedding, head": (
        lambda: changed(llama, "model.embed_tokens.weight", "head"), NAMES,
        {"conditioning": "head"}, "does not mix model.embed_tokens.weight",
    ),
    "norm, attention": (
        lambda: changed(llama, "model.norm.weight", "attention"), NAMES,
        {"conditioning": "attention"}, "does not mix model.norm.weight",
    ),
    "mixed already": (
        lambda: [mix_models([llama()], ["z"])], ["a"], {}, "plain, a has steered layers",
    ),
    "injected": (lambda: [llama(), injected(llama())], AB, {}, "plain, b has steered layers"),
    "no head": (lambda: [nn.Sequential(nn.Linear(2, 2))], ["a"], {"conditioning": "head"},
                "linear output head, got NoneType"),
    "no attention": (lambda: [nn.Sequential(nn.Linear(2, 2))], ["a"],
                     {"conditioning": "attention"}, "Sequential has none"),
    "strange layer": (lambda: [nn.Sequential(Strange())], ["a"], {}, "norms, 0 is a Strange"),
    "a layer itself": (lambda: [nn.Linear(2, 2)], ["a"], {}, "the model itself is a Linear, which"),
    "max_norm": (lambda: [nn.Sequential(nn.Embedding(3, 2, max_norm=1.0))], ["a"], {},
                 "0 is an Embedding with max_norm, which changes its table when it runs"),
}  # fmt: skip


def injected(model: nn.Module) -> nn.Module:
    inject(model, ["x"])
    return model


@pytest.mark.parametrize("case", BAD)
def test_bad_models_are_refused_and_left_as_they_are(case: str) -> None:
    make, names, options, message = BAD[case]
    models = make()
    first = models if isinstance(models, nn.Module) else (models or [None])[0]
    before = None if first is None else (str(first), copy.deepcopy(first.state_dict()))
    with pytest.raises(ValueError, match=message):
        mix_models(models, names, **options)
    if first is not None:
        assert str(first) == before[0]
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, before[1][name])


def made(*layers: nn.Module, m: int = 2) -> MixedLinear:
    return MixedLinear.from_layers(layers, ["a", "b"][:m])


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: MixedLinear(torch.ones(2, 3, 4), None, NAMES), r"\[3, out, in\], got \[2, 3, 4\]"),
        (lambda: MixedLinear(torch.ones(3, 4), None, NAMES), r"\[3, out, in\], got \[3, 4\]"),
        (lambda: MixedLinear(torch.ones(3, 5, 4), torch.ones(3, 4), NAMES), r"\[3, 5\], got \[3,"),
        (lambda: MixedLinear(torch.ones(0, 5, 4), None, []), r"adapter_names must be distinct"),
        (lambda: made(nn.Linear(2, 2), m=2), "must be 2 as the names"),
        (lambda: made(nn.Linear(2, 2), nn.Linear(2, 3)), r"one shape.*got \[\[2, 2\], \[3, 2\]\]"),
        (lambda: made(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)), r"bias: \[True, False\]"),
        (lambda: made(nn.LayerNorm(2), m=1), "linear layers, got one that is a LayerNorm"),
        (lambda: MixedEmbedding(torch.ones(2, 5, 4), NAMES), r"\[3, V, d\], got \[2, 5, 4\]"),
        (lambda: MixedModule([nn.LayerNorm(2)], NAMES), "must be 3 modules, got 1"),
        (lambda: MixedModule([nn.Tanh()], ["a"]), "parameters, Tanh has none"),
    ],
)
def test_bad_layers_are_refused(build: Callable[[], SteeredLayer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_adapters_are_neither_written_nor_added(tmp_path) -> None:
    mixed = mix_models(family(llama), NAMES)
    with pytest.raises(ValueError, match=r"mixture of the parameters of joy, brief, safe.*save"):
        save_adapters(mixed, tmp_path / "a")
    with pytest.raises(ValueError, match=r"mixture of the parameters of joy, brief, safe.*save"):
        export_adapter(mixed, [1, 0, 0], tmp_path / "a")
    with pytest.raises(ValueError, match="adapters already"):
        inject(mixed, ["x"])
    with pytest.raises(ValueError, match="adapters already"):
        load_adapters(mixed, [tmp_path / "x"])
    assert not list(tmp_path.iterdir())


def test_a_shared_steering_is_one_object_for_all_layers() -> None:
    shared = Steering()
    a = MixedLinear(torch.randn(3, 4, 4), None, NAMES, steering=shared)
    b = MixedLinear(torch.randn(3, 4, 4), None, NAMES, steering=shared)
    with steer(a, torch.ones(2, 3)):
        assert b(torch.randn(2, 4)).shape == (2, 4)


# Policies.


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """The embedded model, and another with noise on its parameters, as folders."""
    model, tokenizer = load_base("tiny")
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return {"joy": "tiny", "brief": str(tmp_path / "other")}


def test_a_policy_of_models_samples_each_sequence_with_its_row(folders: dict[str, str]) -> None:
    policy = Policy.from_models(folders)
    assert policy.objectives == ("joy", "brief") and policy.device == torch.device("cpu")
    assert not policy.trainable_parameters() and policy.base_model == "tiny"
    params = SamplingParams(max_tokens=8, temperature=0)
    out = Sampler(policy).generate(["Once", "Once"], [[1, 0], {"brief": 1, "joy": 0}], params)
    for completion, source in zip(out, folders.values(), strict=True):
        model, tokenizer = load_base(source)
        ids = tokenizer("Once", return_tensors="pt")
        wanted = model.generate(**ids, max_new_tokens=8, do_sample=False)
        assert completion.token_ids == wanted[0, ids["input_ids"].shape[1] :].tolist()
    assert out[0].token_ids != out[1].token_ids


def test_a_policy_of_models_has_no_base_no_head_and_no_adapters(folders, tmp_path) -> None:
    policy = Policy.from_models(folders)
    with pytest.raises(ValueError, match=r"experts of this policy \(joy, brief\).*save those"):
        policy.save(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
    with pytest.raises(ValueError, match="has no base model"), policy.base():
        pass
    with pytest.raises(ValueError, match="no frozen linear output head"):
        policy.head()


def test_from_models_takes_a_conditioning_and_a_dtype(folders: dict[str, str]) -> None:
    options = {"conditioning": "attention", "dtype": torch.bfloat16}
    policy = Policy.from_models({"a": "tiny", "b": "tiny"}, **options)
    assert {type(m) for m in all_steered(policy.model)} == {MixedLinear}
    assert policy.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match='"attention" does not mix'):
        Policy.from_models(folders, conditioning="attention")


def test_from_models_refuses_other_tokenizers_and_no_models(folders, tmp_path) -> None:
    _, tokenizer = load_base("tiny")
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"of joy and brief differ, first in '<another>'"):
        Policy.from_models(folders)
    for bad in ({}, ["tiny"], str(TINY)):
        with pytest.raises(ValueError, match="must map objectives to at least one model"):
            Policy.from_models(bad)
    with pytest.raises(ValueError, match="names must be distinct names of letters"):
        Policy.from_models({"a b": "tiny"})
