"""mixed_lora as callers see it: its algebra, and what it refuses.

Sizes are drawn; float64 where numbers are compared, all dtypes where bits are.
"""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, F64, INF, close, lora_plain, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from clp_kernels import batch_invariant, mixed_linear, mixed_lora


class Lora(SimpleNamespace):
    """Inputs of mixed_lora for hypothesis: drawn sizes, values from a drawn seed."""

    def __call__(self, **changed: Tensor) -> Tensor:
        return mixed_lora(**{**vars(self), **changed})


@st.composite
def loras(draw: Any, dtypes: tuple[torch.dtype, ...] = (F64,)) -> Lora:
    def size(top: int) -> int:
        return draw(st.integers(1, top))

    B, T, m, r, n_in, n_out = size(5), size(4), size(4), size(5), size(9), size(9)
    dtype = draw(st.sampled_from(dtypes))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=F64).to(dtype)

    weights = rand(B, m).to(F64 if dtype == F64 else torch.float32)
    base = {"x": rand(B, T, n_in), "base_weight": rand(n_out, n_in), "bias": rand(n_out)}
    return Lora(**base, lora_A=rand(m, r, n_in), lora_B=rand(m, n_out, r), weights=weights)


@given(loras(), st.data())
def test_one_hot_row_is_the_single_adapter(case: Lora, data: Any) -> None:
    B, m = case.weights.shape
    picks = torch.tensor(data.draw(st.lists(st.integers(0, m - 1), min_size=B, max_size=B)))
    got = case(weights=F.one_hot(picks, m).double())
    for b, i in enumerate(picks.tolist()):
        merged = case.base_weight + case.lora_B[i] @ case.lora_A[i]
        close(got[b], F.linear(case.x[b], merged, case.bias))


@given(loras())
def test_linear_in_the_weights(case: Lora) -> None:
    other = torch.randn_like(case.weights)
    base = F.linear(case.x, case.base_weight, case.bias)
    mixed = case(weights=2 * case.weights - 3 * other)
    close(mixed - base, 2 * (case() - base) - 3 * (case(weights=other) - base))


@given(loras())
def test_equal_to_the_concatenated_rank_form(case: Lora) -> None:
    rows = case.weights.repeat_interleave(case.x.shape[1], 0)
    close(case(), lora_plain(**{**vars(case), "weights": rows})[0])


@given(loras(), st.randoms())
def test_order_of_adapters_does_not_matter(case: Lora, rng: random.Random) -> None:
    p = rng.sample(range(case.weights.shape[1]), case.weights.shape[1])
    close(case(weights=case.weights[:, p], lora_A=case.lora_A[p], lora_B=case.lora_B[p]), case())


@given(loras(), st.randoms())
def test_order_of_examples_does_not_matter(case: Lora, rng: random.Random) -> None:
    p = rng.sample(range(case.x.shape[0]), case.x.shape[0])
    close(case(x=case.x[p], weights=case.weights[p]), case()[p])


@given(loras())
def test_flat_tokens_are_the_padded_batch(case: Lora) -> None:
    B, T = case.x.shape[:2]
    order = torch.randperm(B * T)
    ids = torch.arange(B).repeat_interleave(T)[order]
    got = case(x=case.x.flatten(0, 1)[order], example_ids=ids)
    close(got, case().flatten(0, 1)[order])


@given(loras(), st.data())
def test_mixed_linear_of_merged_adapters_is_mixed_lora(case: Lora, data: Any) -> None:
    """On the simplex the two conditionings agree: W_i = W + B_i A_i."""
    experts = case.base_weight + case.lora_B @ case.lora_A
    weights = case.weights.softmax(-1)
    got = mixed_linear(case.x, experts, weights, bias=case.bias.expand(experts.shape[:2]))
    close(got, case(weights=weights))


@given(loras(dtypes=DTYPES), st.data())
def test_zero_row_is_the_bare_linear_to_the_bit(case: Lora, data: Any) -> None:
    """Also where an adapter holds infinity, the base gives -0.0, or the zero is negative."""
    B = case.weights.shape[0]
    zero = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)))
    weights = torch.where(zero[:, None], data.draw(st.sampled_from([0.0, -0.0])), case.weights)
    base_weight = case.base_weight.clone()
    base_weight[0] = 0
    lora_A = case.lora_A.clone()
    if data.draw(st.booleans()):
        lora_A[0, 0, 0] = INF
    for bias in (case.bias, torch.full_like(case.bias, -0.0), None):
        got = case(weights=weights, base_weight=base_weight, lora_A=lora_A, bias=bias)
        bare = F.linear(case.x, base_weight, bias)
        assert same_bits(got[zero], bare[zero])
    with batch_invariant():
        alone = case(weights=weights, lora_A=lora_A)
        nothing = case(weights=torch.zeros_like(weights))
        assert same_bits(alone[zero], nothing[zero])


@given(loras(dtypes=DTYPES))
def test_two_runs_give_the_same_bits(case: Lora) -> None:
    def run() -> list[Tensor]:
        leaves = {k: t.detach().clone().requires_grad_() for k, t in vars(case).items()}
        y = case(**leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]

    for first, second in zip(run(), run(), strict=True):
        assert same_bits(first, second)


def tensors(batch: int) -> dict[str, Tensor]:
    """Large enough for the fast path's own base product."""
    n = 160
    return {
        "x": torch.randn(batch, n), "base_weight": torch.randn(n, n), "bias": torch.randn(n),
        "lora_A": torch.randn(2, 4, n), "lora_B": torch.randn(2, n, 4),
        "weights": torch.randn(batch, 2),
    }  # fmt: skip


@pytest.mark.parametrize("scaling", [2**64, -(10**30), 10**400, -(10**400)])
@pytest.mark.parametrize("grad", [False, True])
def test_integers_of_any_size_as_scaling(scaling: int, grad: bool) -> None:
    args = [torch.ones(1, 160), torch.ones(160, 160), torch.ones(2, 4, 160), torch.ones(2, 160, 4)]
    args[2].requires_grad_(grad)
    weights = torch.ones(1, 2)
    if abs(scaling) > 10**300:
        with pytest.raises(ValueError, match=r"scaling must be finite, got -?inf"):
            mixed_lora(*args, weights, scaling=scaling)
    else:
        got = mixed_lora(*args, weights, scaling=scaling)
        assert torch.equal(got, mixed_lora(*args, weights, scaling=float(scaling)))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_tensors_without_memory_are_read_by_no_kernel(backend: str) -> None:
    """Zeros that PyTorch does not store, and a tensor whose storage was freed."""
    inputs = tensors(batch=1)
    for name, tensor in inputs.items():
        zeros = torch._efficientzerotensor(tensor.shape)
        freed = tensor.clone()
        freed.untyped_storage().resize_(0)
        wanted = mixed_lora(**(inputs | {name: torch.zeros_like(tensor)}), backend="reference")
        for missing in (zeros, freed):
            try:
                got = mixed_lora(**(inputs | {name: missing}), backend=backend)
            except (TypeError, RuntimeError):
                continue
            assert missing is zeros
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["x", "base_weight", "lora_A", "lora_B", "weights", "bias"])
def test_forward_mode_differentiation_is_refused(name: str, grad: bool) -> None:
    """There is no formula for tangents; they must not be lost, nor those of the base alone kept."""
    inputs = tensors(batch=2)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            mixed_lora(**(inputs | {name: dual}))
