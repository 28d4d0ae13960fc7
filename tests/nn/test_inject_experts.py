"""Experts as differences from a model (inject_experts), against merged models.

The judge is an ordinary model that runs with theta_ref + sum_i weights_i delta_i.
"""

import copy
import re
from functools import partial

import pytest
import torch
from small_models import logits_of, plain_logits, small_model, state
from torch import Tensor, nn

from clp_kernels import inject, inject_experts, steer
from clp_kernels.nn.experts import MixedEmbedding, MixedLinear, MixedModule
from clp_kernels.nn.inject_experts import expert_layers, expert_state, load_experts

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["joy", "brief", "safe"]
IDS = torch.arange(33).view(11, 3) % 40
SIZES = {"vocab_size": 40, "pad_token_id": None}
MODELS = {
    "llama": partial(small_model, "llama", **SIZES),
    "llama_tied": partial(small_model, "llama", tie_word_embeddings=True, **SIZES),
    "gpt2": partial(small_model, "gpt2", **SIZES),
    "gemma3": partial(small_model, "gemma3_text", vocab_size=40),
}
TARGETS = {
    "full": "full",
    "attention": "attention",
    "head": "head",
    "names": ["mlp", "lm_head", "0"],
}
OWN_NAMES = {"opt": ["fc2", "embed_tokens"], "gpt2": ["c_fc", "ln_1", "wpe"]}


def off_simplex(count: int) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64)


def with_differences(make, target, std=0.2):
    """A float64 model with random differences, and the model that it was."""
    torch.manual_seed(0)
    base = make().double().eval()
    for parameter in base.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model = copy.deepcopy(base)
    inject_experts(model, NAMES, target_modules=target)
    for layer in expert_layers(model).values():
        for parameter in layer.own_parameters():
            parameter.data.normal_(0, std)
    return model, base


def merged(model: nn.Module, base: nn.Module, row: Tensor) -> nn.Module:
    """A plain model with the parameters of one example; untied where the differences are."""
    plain = copy.deepcopy(base)
    for i, w in enumerate(row):
        for key, delta in expert_state(model, i).items():
            owner, _, name = key.rpartition(".")
            if i == 0:
                own = plain.get_submodule(owner).get_parameter(name)
                setattr(plain.get_submodule(owner), name, nn.Parameter(own.data.clone()))
            plain.get_parameter(key).data += w * delta
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*MODELS, "opt"])
def test_the_start_is_the_model_bit_for_bit_for_any_weights(name, target, dtype):
    targets = TARGETS[target]
    if target == "names" and name in OWN_NAMES:
        targets = OWN_NAMES[name]
    left_out = ["embed_positions"] if (name, target) == ("opt", "full") else []
    make = MODELS.get(name, partial(small_model, "opt", **SIZES))
    model = make().to(dtype)
    wanted = plain_logits(model, IDS)
    found = inject_experts(model, NAMES, target_modules=targets, exclude_modules=left_out)
    assert found == list(expert_layers(model))
    for weights in (off_simplex(11), torch.zeros(11, 3), torch.eye(3)[[0] * 11], None):
        assert torch.equal(logits_of(model, IDS, weights), wanted)


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3"])
def test_each_example_runs_its_own_merged_model(name, target):
    model, base = with_differences(MODELS[name], TARGETS[target])
    weights = off_simplex(11)
    got = logits_of(model, IDS, weights)
    wanted = torch.cat(
        [
            plain_logits(merged(model, base, row), ids[None])
            for row, ids in zip(weights, IDS, strict=True)
        ]
    )
    assert (wanted - plain_logits(base, IDS)).abs().max() > 1e-2
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    assert torch.equal(logits_of(model, IDS, None), plain_logits(base, IDS))


def test_gpt2_keeps_its_transposed_layers_and_positions():
    model, base = with_differences(MODELS["gpt2"], "full")
    weights = off_simplex(11)
    wanted = [
        plain_logits(merged(model, base, row), ids[None])
        for row, ids in zip(weights, IDS, strict=True)
    ]
    torch.testing.assert_close(
        logits_of(model, IDS, weights), torch.cat(wanted), rtol=0, atol=1e-10
    )


def test_layers_that_see_flattened_tokens_take_the_weights_of_their_examples():
    """OPT's fc1, fc2 and the norm before them."""
    model, base = with_differences(
        partial(small_model, "opt", **SIZES), ["fc1", "fc2", "final_layer_norm"]
    )
    weights = off_simplex(11)
    wanted = [
        plain_logits(merged(model, base, row), ids[None])
        for row, ids in zip(weights, IDS, strict=True)
    ]
    torch.testing.assert_close(
        logits_of(model, IDS, weights), torch.cat(wanted), rtol=0, atol=1e-10
    )
    with pytest.raises(ValueError, match="the batch has 11 examples, weights has 1 rows"):
        logits_of(model, IDS, weights[:1])


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_gradients_are_those_of_the_merged_parameters(name, target):
    model, base = with_differences(MODELS[name], TARGETS[target])
    weights = off_simplex(11)
    weights.requires_grad_(True)
    torch.manual_seed(1)
    dy = torch.randn(11, 3, 40, dtype=torch.float64)
    with steer(model, weights):
        (model(IDS).logits * dy).sum().backward()
    wanted = {i: {} for i in range(3)}
    d_weights = torch.zeros(11, 3, dtype=torch.float64)
    for b in range(11):
        plain = merged(model, base, weights[b].detach()).requires_grad_(True)
        (plain(IDS[b : b + 1]).logits * dy[b]).sum().backward()
        for i in range(3):
            for key, delta in expert_state(model, i).items():
                grad = plain.get_parameter(key).grad
                wanted[i][key] = wanted[i].get(key, 0) + weights[b, i].detach() * grad
                d_weights[b, i] += (grad * delta).sum()
    torch.testing.assert_close(weights.grad, d_weights, rtol=0, atol=1e-9)
    for layer in expert_layers(model).values():
        for parameter in layer.own_parameters():
            parameter.data = parameter.grad  # expert_state then shows gradients
    tied = base.lm_head.weight is base.get_input_embeddings().weight and target == "full"
    for i in range(3):
        for key, got in expert_state(model, i).items():
            want = wanted[i][key]
            if tied and key in ("lm_head.weight", "model.embed_tokens.weight"):
                want = wanted[i]["lm_head.weight"] + wanted[i]["model.embed_tokens.weight"]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert all(p.grad is None for p in base.parameters())


def test_only_the_differences_are_trained_and_tied_ones_are_one_parameter():
    model = MODELS["llama_tied"]()
    inject_experts(model, NAMES)
    trained = {p for p in model.parameters() if p.requires_grad}
    assert trained == {p for n in expert_layers(model).values() for p in n.own_parameters()}
    assert model.lm_head.expert_weight is model.model.embed_tokens.expert_weight
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.base_layer.weight
    kinds = {type(layer) for layer in expert_layers(model).values()}
    assert kinds == {MixedLinear, MixedEmbedding, MixedModule}
    head = MODELS["llama_tied"]()
    assert inject_experts(head, NAMES, target_modules="head") == ["lm_head"]
    assert not isinstance(head.get_input_embeddings(), MixedEmbedding)


def test_differences_stay_in_float32_beside_a_model_of_16_bits():
    """A step far below one unit in the last place of the weights changes what the model gives."""
    model = MODELS["llama"]().bfloat16()
    inject_experts(model, NAMES)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.expert_weight.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    layer.expert_weight.data.fill_(1e-5)
    x = torch.ones(3, 2, 16, dtype=torch.bfloat16)
    with steer(model, torch.eye(3)):
        y = layer.mixed(x, torch.eye(3), None)
    torch.testing.assert_close(y.float(), torch.full_like(y.float(), 16e-5), rtol=1e-2, atol=0)
    logits = logits_of(model, IDS, off_simplex(11))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("target", TARGETS)
def test_state_goes_into_another_model_bit_for_bit(target):
    model, base = with_differences(MODELS["llama_tied"], TARGETS[target])
    other = copy.deepcopy(base)
    load_experts(other, NAMES, [expert_state(model, i) for i in range(3)])
    assert list(expert_layers(other)) == list(expert_layers(model))
    weights = off_simplex(11)
    assert torch.equal(logits_of(other, IDS, weights), logits_of(model, IDS, weights))
    shared = other.lm_head, other.model.embed_tokens
    assert (getattr(shared[0], "expert_weight", 0) is getattr(shared[1], "expert_weight", 1)) == (
        target == "full"
    )


def test_names_stand_for_what_is_inside_and_can_be_left_out():
    model = MODELS["llama"]()
    names = inject_experts(
        model, NAMES, target_modules=["layers.1", "norm"], exclude_modules=["mlp"]
    )
    assert names == [
        *(f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"),
        "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "everything"}, 'must be "full", "attention", "head" or a list'),
        ({"target_modules": ["nope"]}, "target_modules: 'nope' names no module with parameters"),
        ({"target_modules": []}, "names no module with parameters, or all are excluded"),
        ({"exclude_modules": "mlp"}, "exclude_modules must be a list of names, got 'mlp'"),
        ({"exclude_modules": ["nope"]}, "exclude_modules: 'nope' names no module"),
        ({"target_modules": ["mlp"], "exclude_modules": ["mlp"]}, "or all are excluded"),
        ({"dtype": torch.int8}, "dtype must be a floating dtype"),
        ({"names": ["a", "a"]}, "names must be distinct names"),
    ],
)
def test_bad_arguments_are_refused_and_the_model_is_left_as_it_is(options, message):
    model = MODELS["llama"]()
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        inject_experts(model, **({"names": NAMES} | options))
    assert state(model) == before


def test_models_that_cannot_be_mixed_are_refused():
    model = MODELS["llama"]()
    model.model.norm.register_forward_hook(lambda *_: None)
    before = state(model)
    with pytest.raises(ValueError, match=r"model\.norm is a LlamaRMSNorm with forward hooks"):
        inject_experts(model, NAMES)
    assert state(model) == before
    inject_experts(model, NAMES, target_modules="attention")
    with pytest.raises(ValueError, match="has steered layers already"):
        inject_experts(model, NAMES, target_modules="head")
    opt = small_model("opt", **SIZES)
    with pytest.raises(ValueError, match=r"embed_positions is a OPTLearned.*exclude_modules"):
        inject_experts(opt, NAMES)
    injected = MODELS["llama"]()
    inject(injected, NAMES)
    with pytest.raises(ValueError, match="has steered layers already"):
        inject_experts(injected, NAMES)


class GroupNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(8)), nn.LayerNorm(8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Embedding(9, 8, max_norm=1.0)),
            "0 is an Embedding with max_norm, which changes its table when it runs: experts cannot "
            "be mixed there; exclude_modules=['0']",
        ),
        (nn.Sequential(GroupNorms()), "0 is a GroupNorms with a module inside it (inner): experts"),
        (
            nn.Sequential(nn.EmbeddingBag(9, 8)),
            "0 is an EmbeddingBag, not a linear layer, an embedding or a norm: experts",
        ),
        (
            nn.Linear(8, 8),
            "the model is a Linear, which can be replaced only inside another module: experts",
        ),
        (
            nn.LayerNorm(8),
            "the model is a LayerNorm, which can be replaced only inside another module: experts",
        ),
    ],
)
def test_the_reason_why_a_module_cannot_be_mixed_is_said(model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        inject_experts(model, ["p", "q"])


def test_modules_that_cannot_be_mixed_are_left_out_by_name():
    """The router of a mixture of experts, and its experts, which are tensors of three axes."""
    model = small_model("mixtral", num_local_experts=2, **SIZES)
    with pytest.raises(ValueError, match=r"is a Mixtral.*leaves out all such") as caught:
        inject_experts(model, NAMES)
    advised = re.search(r"exclude_modules=\['(.*)'\]", str(caught.value))[1].split("', '")
    assert inject_experts(copy.deepcopy(model), NAMES, exclude_modules=advised)
    names = inject_experts(model, NAMES, exclude_modules=["mlp"])
    assert names and not any(".mlp." in name for name in names)
    falcon = small_model("falcon", **SIZES)
    with pytest.raises(ValueError, match="is a FalconLinear") as caught:
        inject_experts(falcon, NAMES, target_modules="attention")
    assert "exclude_modules" not in str(caught.value)


def test_a_hook_on_a_base_layer_is_refused_when_weights_are_set():
    model = MODELS["llama"]()
    inject_experts(model, NAMES)
    model.model.norm.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model\.norm: its base_layer has got forward hooks"):
        steer(model, torch.eye(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s[1].pop("lm_head.weight"),
            "must have the same names, lm_head.weight is not in both",
        ),
        (lambda s: [x.update(odd=torch.zeros(1)) for x in s], "the model has no odd, of which joy"),
        (
            lambda s: s[2].update({"lm_head.weight": torch.zeros(3, 16)}),
            "lm_head.weight of safe must be floating of shape [40, 16], got torch.float32 [3, 16]",
        ),
        (
            lambda s: s[2].update({"lm_head.weight": torch.zeros(40, 16, dtype=torch.int8)}),
            "got torch.int8 [40, 16]",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused(change, message):
    model, base = with_differences(MODELS["llama"], ["lm_head", "norm"])
    states = [dict(expert_state(model, i)) for i in range(3)]
    change(states)
    before = state(base)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_experts(base, NAMES, states)
    assert state(base) == before


def test_a_state_without_a_bias_of_its_layer_is_refused():
    model, base = with_differences(MODELS["gpt2"], ["c_fc"])
    states = [dict(expert_state(model, i)) for i in range(3)]
    for one in states:
        del one["transformer.h.0.mlp.c_fc.bias"]
    with pytest.raises(
        ValueError, match=r"all parameters of a module, transformer\.h\.0\.mlp\.c_fc"
    ):
        load_experts(base, NAMES, states)
