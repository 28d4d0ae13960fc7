"""MixedLoRALinear, inject and steer: on small stacks and on random Llama and GPT-2 models."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from small_models import logits_of, plain_logits, small_model, state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clp_kernels import MixedLoRALinear, adapter_names, inject, steer
from clp_kernels.nn.mixed_lora import is_transposed, steered_layers
from clp_kernels.nn.steering import Steering
from clp_kernels.testing import WEIGHT_KINDS, weight_rows

NAMES = ["joy", "brief"]
IDS = torch.arange(33).view(11, 3) % 60

pytestmark = pytest.mark.usefixtures("one_thread")


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Linear(8, 4))


llama, gpt2, opt = (partial(small_model, name) for name in ("llama", "gpt2", "opt"))
MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt}  # opt's fc1 and fc2 get flattened tokens


def steered(model: nn.Module, names: list[str] = NAMES) -> nn.Module:
    """Injected, with adapters large enough to change every output."""
    inject(model, names, r=3, lora_alpha=6)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model


def merged(model: nn.Module, row: Tensor) -> nn.Module:
    """A plain copy of a steered model with W + sum_i w_i scaling_i B_i A_i in every layer."""
    model = copy.deepcopy(model)
    for name, layer in steered_layers(model).items():
        base, pairs = layer.base_layer, zip(layer.lora_B, layer.lora_A, strict=True)
        delta = sum(w * (6 / 3) * B @ A for w, (B, A) in zip(row.tolist(), pairs, strict=True))
        base.weight.data += delta.t() if is_transposed(base) else delta
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    return model


# Correct rows.


@pytest.mark.parametrize("name", MODELS)
def test_at_the_start_every_row_gives_the_base_model(name: str) -> None:
    model = MODELS[name]()
    base = plain_logits(model, IDS)
    replaced = inject(model, NAMES)
    assert len(replaced) == {"llama": 14, "gpt2": 8, "opt": 12}[name]
    for kind in WEIGHT_KINDS:
        assert torch.equal(logits_of(model, IDS, weight_rows(kind, 11, 2)), base)


@pytest.mark.parametrize("name", MODELS)
def test_zero_rows_are_the_base_model_to_the_bit(name: str) -> None:
    """Also beside rows that are not zero."""
    model = MODELS[name]()
    base = plain_logits(model, IDS)
    rows = weight_rows("zero", 11, 2)
    got = logits_of(steered(model), IDS, rows)
    assert torch.equal(got[::2].view(torch.int32), base[::2].view(torch.int32))
    assert (got[1::2] != base[1::2]).any(-1).all()


@pytest.mark.parametrize("name", MODELS)
def test_steer_to_none_is_the_base_model_to_the_bit(name: str) -> None:
    """For any batch size, inside other rows too, and the outer rows hold again afterwards."""
    model = MODELS[name]()
    base = plain_logits(model, IDS)
    steered(model)
    rows = torch.ones(11, 2)
    wanted = logits_of(model, IDS, rows)
    with torch.no_grad(), steer(model, rows):
        with steer(model, None):
            assert torch.equal(model(IDS).logits.view(torch.int32), base.view(torch.int32))
            assert model(IDS[:3]).logits.shape[0] == 3
        assert torch.equal(model(IDS).logits, wanted)
    assert not torch.equal(wanted, base)


@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_the_merged_model(name: str) -> None:
    model = steered(MODELS[name]())
    rows = weight_rows("negative", 11, 2)
    got = logits_of(model, IDS, rows)
    for b in (0, 4, 10):
        wanted = plain_logits(merged(model, rows[b]), IDS[b : b + 1])[0]
        torch.testing.assert_close(got[b], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_eleven_rows_in_one_batch_are_eleven_runs(name: str) -> None:
    """The logits to 1e-5, and the same greedy tokens from `generate`."""
    model = steered(MODELS[name]())
    t = torch.linspace(0, 1, 11)[:, None]
    rows = torch.cat([t, 1 - t], -1)
    got = logits_of(model, IDS, rows)
    greedy = partial(model.generate, do_sample=False, max_new_tokens=6)
    with steer(model, rows):
        tokens = greedy(IDS)
    for b in range(11):
        one = slice(b, b + 1)
        torch.testing.assert_close(logits_of(model, IDS[one], rows[one])[0], got[b],
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
        with steer(model, rows[one]):
            assert torch.equal(greedy(IDS[one])[0], tokens[b])
    assert len(tokens[:, 3:].unique(dim=0)) > 3


def test_generate_with_several_sequences_a_prompt() -> None:
    model, rows = steered(llama()), torch.tensor([[1.0, 0.0], [-2.0, 1.0]])
    run = partial(model.generate, IDS[:2], do_sample=True, num_return_sequences=3,
                  max_new_tokens=4, output_logits=True, return_dict_in_generate=True)  # fmt: skip
    wanted = r"6 examples, weights has 2 rows.*repeat_interleave"
    with steer(model, rows), pytest.raises(ValueError, match=wanted):
        run()
    with steer(model, rows.repeat_interleave(3, 0)):
        out = run()
    assert len(out.sequences.unique(dim=0)) > 3
    for n, sequence in enumerate(out.sequences):
        alone = logits_of(model, sequence[None], rows[n // 3][None])[0, 2:-1]
        steps = torch.stack([step[n] for step in out.logits])
        torch.testing.assert_close(steps, alone, rtol=1e-4, atol=1e-5)


def test_rows_reach_tokens_through_example_ids() -> None:
    """Flattened tokens [T, in] of unequal lengths, against the padded batch."""
    model, x = steered(stack(), ["a", "b", "c"]), torch.randn(4, 5, 6)
    rows, lengths = torch.randn(4, 3), torch.tensor([5, 0, 2, 3])
    with steer(model, rows):
        padded = model(x)
    keep = torch.arange(5)[None] < lengths[:, None]
    ids = torch.arange(4, dtype=torch.int32).repeat_interleave(lengths)
    with steer(model, rows, example_ids=ids):
        flat = model(x[keep])
    torch.testing.assert_close(flat, padded[keep])


@pytest.mark.parametrize("shape", [(1, 6), (2, 6), (9, 6), (2, 3, 6), (3, 3, 6)])
def test_example_ids_that_do_not_fit_the_tokens(shape: tuple[int, ...]) -> None:
    """A shape that would broadcast must not pass for another batch."""
    model = steered(stack())
    rows, ids = torch.randn(2, 2), torch.tensor([0, 1, 1])
    with steer(model, rows, example_ids=ids), pytest.raises(ValueError, match="example_ids"):
        model(torch.randn(shape))


# What steer refuses, and what it restores.


@pytest.mark.parametrize("name", ["stack", *MODELS])
def test_a_steered_layer_without_rows_raises(name: str) -> None:
    model = steered({"stack": stack, **MODELS}[name]())
    x = torch.randn(2, 6) if name == "stack" else IDS
    with pytest.raises(RuntimeError, match=r"without weights.*steer"):
        model(x)
    with steer(model, torch.zeros(len(x), 2)):
        model(x)
    with pytest.raises(RuntimeError, match="without weights"):
        model(x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 22])
def test_wrong_number_of_rows(rows: int, value: float, grad: bool) -> None:
    model, weights = steered(llama()), torch.full((rows, 2), value)
    wanted = rf"11 examples, weights has {rows} rows"
    with torch.set_grad_enabled(grad), steer(model, weights), \
            pytest.raises(ValueError, match=wanted):  # fmt: skip
        model(IDS)


@pytest.mark.parametrize(
    "weights, error",
    [
        (torch.zeros(2, 3), r"shape \[B, 2\] for the adapters joy, brief, got \[2, 3\]"),
        (torch.zeros(2), r"shape \[B, 2\].*got \[2\]"),
        ([[0.0, float("nan")]], "must be finite, got nan"),
        ([[0.0, float("-inf")]], "must be finite, got -inf"),
        ([[0.0, 1.0], [0.0]], "expected sequence of length 2"),
    ],
)
def test_steer_refuses(weights: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        steer(steered(stack()), weights)


@pytest.mark.parametrize("weights", [{"joy": 1.0}, [{"joy": 1.0}], [["joy", "brief"]], object()])
def test_steer_names_what_weights_must_be(weights: object) -> None:
    wanted = r"weights must be numbers \[B, 2\], .* of joy, brief, got "
    with pytest.raises((TypeError, ValueError), match=wanted):
        steer(steered(stack()), weights)


@pytest.mark.parametrize(
    "ids, error",
    [
        ([0, 1], TypeError),
        (torch.zeros(2), TypeError),
        (torch.tensor([[0, 1]]), ValueError),
        (torch.tensor([0, 2]), ValueError),
        (torch.tensor([-1, 0]), ValueError),
    ],
)
def test_steer_refuses_example_ids(ids: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="example_ids must"):
        steer(steered(stack()), torch.zeros(2, 2), example_ids=ids)


def test_rows_may_be_tensors() -> None:
    """As the sampler takes them."""
    model, x = steered(stack()), torch.randn(2, 6)
    with steer(model, torch.tensor([[0.75, 0.25], [0.5, 0.5]])):
        wanted = model(x)
    first, one = torch.tensor([0.75, 0.25]), torch.tensor(0.5)
    for rows in (
        [first, torch.tensor([0.5, 0.5])],
        (first, [0.5, one]),
        [[0.75, 0.25], (one, one)],
    ):
        with steer(model, rows):
            assert torch.equal(model(x), wanted)
    grid = np.array([[0.5, 0.5], [0.75, 0.25]], dtype=np.float32)[::-1]
    for rows in (grid, grid.astype(">f8"), list(grid), [[np.array(0.75), 0.25], (one, one)]):
        with steer(model, rows):
            assert torch.equal(model(x), wanted)
    with pytest.raises(TypeError, match=r"weights must be numbers \[B, 2\], .*equal size"):
        steer(model, [first, one])


def test_tensors_in_rows_get_their_gradients() -> None:
    model, x = steered(stack()), torch.randn(2, 6)
    whole = torch.tensor([[0.75, 0.25], [0.5, 0.5]], requires_grad=True)
    row, one = torch.tensor([0.75, 0.25], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    for weights in (whole, [row, [one, 0.5]]):
        with steer(model, weights):
            model(x).square().sum().backward()
    assert torch.equal(row.grad, whole.grad[0]) and one.grad == whole.grad[1, 0] != 0


def test_steer_needs_a_steered_layer() -> None:
    with pytest.raises(ValueError, match="no MixedLoRALinear layer"):
        steer(stack(), [[1.0]])


@pytest.mark.parametrize("grad", [False, True])
def test_rows_may_be_written_in_place(grad: bool) -> None:
    """One buffer of rows for all steps, as a captured CUDA graph needs it, also from zero."""
    model, x, rows = steered(stack()), torch.randn(3, 6), torch.zeros(3, 2)
    with torch.set_grad_enabled(grad), steer(model, rows):
        for kind in ("negative", "zero", "one_hot"):
            rows.copy_(weight_rows(kind, 3, 2))
            got = model(x)
            with steer(model, rows.clone()):
                assert torch.equal(got, model(x))


def test_steer_nests_and_restores() -> None:
    model, x = steered(stack()), torch.randn(2, 6)
    outer, inner = torch.randn(2, 2), torch.randn(2, 2)

    def run(rows: Tensor) -> Tensor:
        with steer(model, rows):
            return model(x)

    wanted_outer, wanted_inner = run(outer), run(inner)
    with steer(model, outer):
        with steer(model, inner):
            assert torch.equal(model(x), wanted_inner)
        assert torch.equal(model(x), wanted_outer)
        with pytest.raises(KeyError), steer(model, inner):
            raise KeyError
        assert torch.equal(model(x), wanted_outer)
    with pytest.raises(KeyError), steer(model, inner):
        raise KeyError
    with pytest.raises(RuntimeError, match="without weights"):
        model(x)
    assert torch.equal(run([[1, 0], [0, 1]]), run(torch.eye(2)))


def test_a_copy_is_steered_alone() -> None:
    model, x = steered(stack()), torch.randn(2, 6)
    other = copy.deepcopy(model)
    with steer(other, torch.eye(2)):
        assert other(x).isfinite().all()
        with pytest.raises(RuntimeError, match="without weights"):
            model(x)
        with steer(model, torch.zeros(2, 2)):
            assert not torch.equal(model(x), other(x))


def test_state_dict_round_trip() -> None:
    model, other, x = steered(stack()), steered(stack()), torch.randn(2, 6)
    other.load_state_dict(model.state_dict())
    rows = torch.randn(2, 2)
    with steer(model, rows), steer(other, rows):
        assert torch.equal(model(x), other(x))


# Gradients.


def test_weights_get_the_right_gradient_through_a_model() -> None:
    """Finite differences in float64 (Llama's norms round to float32, GPT-2's do not)."""
    model, direction = steered(gpt2(torch.float64)), torch.randn(2, 3, 60, dtype=torch.float64)

    def loss(rows: Tensor) -> Tensor:
        with steer(model, rows):
            return (model(IDS[:2]).logits * direction).sum()

    rows = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, rows, rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_merged_model(name: str) -> None:
    """Of the weights and of both adapter matrices, by autograd through W + sum_i w_i s B_i A_i."""
    base = MODELS[name]()
    model = steered(copy.deepcopy(base))
    rows, direction = torch.randn(2, 2, requires_grad=True), torch.randn(2, 3, 60)
    with steer(model, rows):
        (model(IDS[:2]).logits * direction).sum().backward()
    got = [rows.grad] + [p.grad for p in model.parameters() if p.requires_grad]
    loss = torch.zeros(())
    for b in range(2):
        plain = {k: p.detach() for k, p in base.named_parameters()}
        for key, layer in steered_layers(model).items():
            delta = torch.einsum("i,ior,irk->ok", 2.0 * rows[b], layer.lora_B, layer.lora_A)
            delta = delta.t() if is_transposed(layer.base_layer) else delta
            plain[f"{key}.weight"] = plain[f"{key}.weight"] + delta
        logits = torch.func.functional_call(base, plain, (IDS[b : b + 1],)).logits
        loss = loss + (logits * direction[b]).sum()
    trainable = [p for p in model.parameters() if p.requires_grad]
    for a, wanted in zip(got, torch.autograd.grad(loss, [rows, *trainable]), strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(a, wanted, rtol=0, atol=1e-4 * scale)
        assert scale > 0


def gradients(model: nn.Module, run: Callable[[], Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Runs under `rows`; the backward comes later, while another steer is active."""
    model.zero_grad()
    rows.grad = None
    with steer(model, rows):
        out = run()
    with steer(model, torch.full((5, 2), 9.0)):
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert rows.grad is not None
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "weights": rows.grad.clone()}


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of a steered layer."""
    calls: list[int] = []
    forward = MixedLoRALinear.forward

    def counted(self: MixedLoRALinear, x: Tensor) -> Tensor:
        calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(MixedLoRALinear, "forward", counted)
    return calls


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_of_transformers(
    name: str, use_reentrant: bool, recomputed: list[int]
) -> None:
    model = steered(MODELS[name]()).train()
    rows = torch.randn(4, 2, requires_grad=True)

    def run() -> Tensor:
        return model(IDS[:4], use_cache=False).logits

    wanted = gradients(model, run, rows)
    plain_calls = len(recomputed)
    with warnings.catch_warnings():
        # transformers 5.23 names it activation_checkpointing_enable; 5.17 has only this name.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    got = gradients(model, run, rows)
    assert len(recomputed) > 2.5 * plain_calls, "nothing was recomputed: the test proves nothing"
    assert got.keys() == wanted.keys()
    assert all((g != 0).any() for g in wanted.values())
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], msg=lambda m, k=key: f"{k}: {m}")
    # And again, with the backward after every steer has ended.
    with steer(model, rows):
        out = run()
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[key])


def test_checkpointing_function_is_restored() -> None:
    model = steered(llama()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = model.model.layers[0]._gradient_checkpointing_func
    with steer(model, torch.zeros(11, 2)):
        assert model.model.layers[0]._gradient_checkpointing_func is not before
        with pytest.raises(KeyError), steer(model, torch.zeros(11, 2)):
            raise KeyError
    assert model.model.layers[0]._gradient_checkpointing_func is before


def test_plain_checkpoint_is_refused_without_its_rows() -> None:
    model, x = steered(stack()), torch.randn(2, 6)
    with steer(model, torch.eye(2)):
        y = checkpoint(model, x, use_reentrant=False)
    wanted = r"weights that may not be its own.*context_fn"
    with steer(model, torch.zeros(2, 2)), pytest.raises(RuntimeError, match=wanted):
        y.sum().backward()
    with steer(model, torch.eye(2)):
        y = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="without weights"):
        y.sum().backward()


def test_plain_checkpoint_with_the_documented_context(recomputed: list[int]) -> None:
    model, x = steered(stack()), torch.randn(5, 6)
    rows = torch.randn(5, 2, requires_grad=True)
    wanted = gradients(model, lambda: model(x), rows)
    recomputed.clear()

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), steer(model, rows)

    run = partial(checkpoint, model, x, use_reentrant=False, context_fn=contexts)
    got = gradients(model, run, rows)
    assert len(recomputed) == 6
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(got[key], wanted[key])


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(adapters: torch.dtype) -> None:
    """Mixed precision: a steered layer gives autocast's dtype, and zero rows autocast's bits."""
    model = stack().to(torch.bfloat16 if adapters == torch.bfloat16 else torch.float32)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        base = model(x)
    inject(model, NAMES, dtype=adapters)
    for layer in steered_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    with torch.autocast("cpu", torch.bfloat16), steer(model, weight_rows("zero", 4, 2)):
        y = model(x)
    assert y.dtype == base.dtype == torch.bfloat16
    assert torch.equal(y[::2], base[::2])
    assert not torch.equal(y[1::2], base[1::2])
    y.float().square().sum().backward()
    for layer in steered_layers(model).values():
        assert layer.lora_A.grad is not None
        assert layer.lora_A.grad.dtype == adapters
        assert (layer.lora_A.grad != 0).any()


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel() -> None:
    model, x, rows = steered(stack()), torch.randn(3, 6), torch.randn(3, 2, requires_grad=True)
    wanted = gradients(model, lambda: model(x), rows)
    wrapped = nn.parallel.DistributedDataParallel(model)
    got = gradients(wrapped, lambda: wrapped(x), rows)
    assert {k.removeprefix("module.") for k in got} == set(wanted)
    for key, value in got.items():
        torch.testing.assert_close(value, wanted[key.removeprefix("module.")])


# torch.compile.


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_layer_does_not_recompile_for_other_weights(grad: bool) -> None:
    torch._dynamo.reset()
    model, x = steered(stack()), torch.randn(3, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def run(function: nn.Module, rows: Tensor) -> list[Tensor]:
        model.zero_grad()
        with steer(model, rows), torch.set_grad_enabled(grad):
            y = function(x)
        if not grad:
            return [y]
        y.square().sum().backward()
        return [y, *(p.grad for p in model.parameters() if p.grad is not None)]

    run(compiled, torch.randn(3, 2))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (*(weight_rows(kind, 3, 2) for kind in WEIGHT_KINDS), torch.zeros(3, 2)):
            for got, wanted in zip(run(compiled, rows), run(model, rows), strict=True):
                torch.testing.assert_close(got, wanted)


def test_compiled_model_does_not_recompile_for_other_weights() -> None:
    torch._dynamo.reset()
    model = steered(llama())
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def run(rows: Tensor) -> Tensor:
        with torch.no_grad(), steer(compiled, rows):
            return compiled(IDS, use_cache=False).logits

    run(torch.randn(11, 2))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (torch.randn(11, 2), torch.zeros(11, 2), weight_rows("zero", 11, 2)):
            torch.testing.assert_close(run(rows), logits_of(model, IDS, rows))


# inject.


class Integers(nn.Module):
    """A linear layer of integers, as 8-bit quantisers leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.lin = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.lin.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


REFUSED = {
    "unknown target": (stack, {"target_modules": ["0", "q_proj"]}, "'q_proj' names no linear"),
    "target that is no linear": (stack, {"target_modules": ["1"]}, "'1' names no linear"),
    "part of a name": (llama, {"target_modules": ["_proj"]}, "'_proj' names no linear"),
    "no targets": (stack, {"target_modules": []}, "target_modules"),
    "a string": (stack, {"target_modules": "linear"}, "target_modules must be"),
    "no linear layer": (lambda: nn.Sequential(nn.Tanh()), {}, "target_modules"),
    "r = 0": (stack, {"r": 0}, r"r must be an integer in \[1, 4096\], got 0"),
    "r < 0": (stack, {"r": -2}, "r must be an integer in .*, got -2"),
    "r = 2.0": (stack, {"r": 2.0}, "r must be an integer in .*, got 2.0"),
    "r too large to be loaded": (stack, {"r": 4097}, "r must be an integer in .*, got 4097"),
    "alpha = 0": (stack, {"lora_alpha": 0}, r"lora_alpha must be a number in \[1e-06, 1000000\]"),
    "alpha = nan": (stack, {"lora_alpha": float("nan")}, "lora_alpha must be a number"),
    "alpha too large to be loaded": (stack, {"lora_alpha": 1_000_001}, "lora_alpha must be a numb"),
    "no adapter": (stack, {"adapters": []}, "adapters must be distinct"),
    "twice the name": (stack, {"adapters": ["a", "b", "a"]}, "adapters must be distinct"),
    "an empty name": (stack, {"adapters": ["a", ""]}, "adapters must be distinct"),
    "a name with a dot": (stack, {"adapters": ["a.b"]}, "adapters must be distinct"),
    "a name with a slash": (stack, {"adapters": ["../a"]}, "adapters must be distinct"),
    "an integer dtype": (stack, {"dtype": torch.int8}, "dtype must be a floating dtype"),
    "a third dtype": (stack, {"dtype": torch.float16}, "dtype must be float32 or"),
    "integer weights": (Integers, {}, "lin has a torch.int8 weight"),
    "injected before": (lambda: steered(stack()), {}, "model has adapters already"),
    "the model itself": (lambda: nn.Linear(4, 4), {}, "nn.Linear|itself|target_modules|module"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_inject_refuses_and_leaves_the_model(why: str) -> None:
    make, changed, error = REFUSED[why]
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=error):
        inject(model, **{"adapters": NAMES, **changed})
    assert state(model) == before


@pytest.mark.parametrize("name", ["stack", *MODELS])
def test_only_adapters_are_trainable(name: str) -> None:
    model = {"stack": stack, **MODELS}[name]()
    assert all(p.requires_grad for p in model.parameters())
    inject(model, NAMES)
    for key, p in model.named_parameters():
        assert p.requires_grad == (".lora_A" in key or ".lora_B" in key), key
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(steered_layers(model))


def test_inject_targets() -> None:
    model = llama()
    names = inject(model, NAMES, target_modules=["q_proj", "model.layers.1.mlp.down_proj"])
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert names == [*layers, "model.layers.1.mlp.down_proj"]
    assert list(steered_layers(model)) == names
    assert adapter_names(model) == tuple(NAMES)
    everything = inject(gpt2(), NAMES)
    assert not any("lm_head" in n for n in everything)
    with pytest.raises(ValueError, match="no MixedLoRALinear"):
        adapter_names(llama())


def test_a_layer_with_two_names_is_steered_under_both() -> None:
    """Or the second name would quietly compute the base model."""
    shared = nn.Linear(6, 6)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(2, 6)
    steered(model)
    assert isinstance(model[2], MixedLoRALinear)
    rows = torch.randn(2, 2)
    with steer(model, rows):
        assert torch.equal(model(x), model[0](model[0](x).tanh()))


def test_start_values() -> None:
    """PEFT's: A uniform in +-1/sqrt(in), different for each adapter, and B zero."""
    first, second = stack(), stack()
    for model in (first, second):
        inject(model, NAMES, r=5, generator=torch.Generator().manual_seed(3))
    for a, b in zip(*(steered_layers(m).values() for m in (first, second)), strict=True):
        assert torch.equal(a.lora_A, b.lora_A)
        bound = a.lora_A.shape[-1] ** -0.5
        assert 0.8 * bound < a.lora_A.abs().max() <= bound
        assert not torch.equal(a.lora_A[0], a.lora_A[1])
        assert (a.lora_B == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_seed_gives_the_same_start_in_every_dtype(dtype: torch.dtype) -> None:
    first, second = stack(), stack().to(dtype)
    for model, asked in ((first, torch.float32), (second, dtype)):
        inject(model, NAMES, r=5, dtype=asked, generator=torch.Generator().manual_seed(3))
    for a, b in zip(*(steered_layers(m).values() for m in (first, second)), strict=True):
        assert b.lora_A.dtype == dtype and torch.equal(a.lora_A.to(dtype), b.lora_A)


@pytest.mark.parametrize("base, asked, wanted", [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float32, torch.float64),
])  # fmt: skip
def test_dtype_of_the_adapters(base: torch.dtype, asked: torch.dtype, wanted: torch.dtype) -> None:
    model, x = stack().to(base), torch.randn(2, 6).to(base)
    inject(model, NAMES, dtype=asked)
    for layer in steered_layers(model).values():
        nn.init.normal_(layer.lora_B)
        assert layer.lora_A.dtype == layer.lora_B.dtype == wanted
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.5]], requires_grad=True)
    with steer(model, rows):
        y = model(x)
    assert y.dtype == base
    y.square().sum().backward()
    assert rows.grad is not None
    assert (rows.grad != 0).all()


def test_adapters_of_different_rank() -> None:
    """Ranks are zero-padded to the largest; rank 0 stands for an adapter without this module."""
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    sizes = {"ranks": [1, 4, 0], "lora_alpha": [2.0, 2.0, 2.0]}
    layer = MixedLoRALinear(base, ["a", "b", "c"], **sizes, steering=Steering())
    layer.reset_parameters()
    assert (layer.lora_A[0, 1:] == 0).all()
    assert (layer.lora_A[2] == 0).all()
    assert layer.scaling.tolist() == [2.0, 0.5, 0.0]
    nn.init.normal_(layer.lora_B)
    with steer(layer, torch.eye(3)):
        y = layer(x)
    for b, scaling in enumerate((2.0, 0.5)):
        delta = scaling * layer.lora_B[b] @ layer.lora_A[b]
        torch.testing.assert_close(y[b], base(x[b]) + delta @ x[b])
    torch.testing.assert_close(y[2], base(x[2]))


def test_print_names_the_adapters() -> None:
    assert "joy: r=3, brief: r=3" in repr(steered(stack()))
