"""A backend that is named serves a whole model: every layer, every gradient, the loss, the draw."""

import cases
import pytest
import torch
from small_models import small_model

import clp_kernels
from clp_kernels import inject, inject_experts, load_adapters, mix_models, registry, steer

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
WEIGHTS = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
NAMES = ["a", "b"]


def adapted(backend, model_type="llama"):
    torch.manual_seed(0)
    model = small_model(model_type)
    generator = torch.Generator().manual_seed(1)
    inject(model, NAMES, r=2, generator=generator, backend=backend)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def with_experts(backend, model_type="llama"):
    torch.manual_seed(0)
    model = small_model(model_type)
    inject_experts(model, NAMES, target_modules="attention", backend=backend)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "expert_weight" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def training_step(model, backend):
    """Loss with log-probabilities, entropy and KL under a mixed and trained head; its gradients."""
    head = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with steer(model, WEIGHTS):
        hidden = model.base_model(IDS).last_hidden_state
    found = clp_kernels.linear_logprob(
        hidden, head, IDS, weights=WEIGHTS, return_entropy=True, ref_hidden=hidden.detach() * 0.9,
        backend=backend,
    )  # fmt: skip
    loss = sum(t.sum() for t in found)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads
    return {"loss": loss.detach(), "head": head.grad, **grads}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("make", [adapted, with_experts])
def test_triton_serves_a_whole_model(make, model_type, monkeypatch):
    """In the interpreter; GPT-2 keeps its weights transposed."""
    for op in ("mixed_lora", "mixed_linear", "linear_logprob", "mix_logits", "sample"):
        cases.interpreted(op)
    ran = set()
    select = registry.select

    def selected(op, backend, *args):
        entry = select(op, backend, *args)
        ran.add((op, entry.name, entry.kernels_of))
        return entry

    wanted = training_step(make("reference", model_type), "reference")
    monkeypatch.setattr(registry, "select", selected)
    model = make("triton", model_type)
    got = training_step(model, "triton")
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        # Rounding through two layers: 1.5e-5 of the largest entry.
        bound = 1e-4 * float(wanted[name].abs().max())
        torch.testing.assert_close(value, wanted[name], atol=bound, rtol=0)
    with steer(model, WEIGHTS), torch.no_grad():
        logits = model(IDS).logits[:, -1]
    stacked = torch.stack([logits, logits.flip(0)])
    options = {"weights": WEIGHTS, "top_p": 0.9, "seed": 1, "position": 3}
    drawn = clp_kernels.sample(stacked, **options, backend="triton")
    assert torch.equal(drawn.tokens, clp_kernels.sample(stacked, **options, backend="cpu").tokens)
    clp_kernels.mix_logits(stacked.requires_grad_(), WEIGHTS, backend="triton").sum().backward()
    assert {name for _, name, _ in ran} == {"triton"}
    assert not [op for op, _, other in ran if other]  # each has kernels of its own
    layer = "mixed_lora" if make is adapted else "mixed_linear"
    wanted = {layer, f"{layer}_backward", "linear_logprob_backward", "mix_logits_backward"}
    assert wanted | {"sample"} <= {op for op, *_ in ran}


def test_what_wraps_a_model_takes_a_backend(tmp_path):
    model = adapted("reference")
    clp_kernels.save_adapters(model, tmp_path)
    loaded = small_model("llama")
    load_adapters(loaded, [tmp_path / name for name in NAMES], backend="reference")
    mixed = mix_models([small_model("gpt2") for _ in NAMES], NAMES, backend="reference")
    for one in (model, loaded, with_experts("reference"), mixed):
        found = {m.backend for m in one.modules() if hasattr(m, "backend")}
        assert found == {"reference"}


def test_a_backend_that_does_not_exist_is_refused_before_anything_changes(tmp_path):
    clp_kernels.save_adapters(adapted("auto"), tmp_path)
    model, other = small_model("llama"), small_model("llama")
    folders = [tmp_path / name for name in NAMES]
    calls = [
        lambda: inject(model, NAMES, backend="gpu"),
        lambda: load_adapters(model, folders, backend="gpu"),
        lambda: inject_experts(model, NAMES, target_modules="attention", backend="gpu"),
        lambda: mix_models([model, other], NAMES, backend="gpu"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu"):
            call()
    inject(model, NAMES)
