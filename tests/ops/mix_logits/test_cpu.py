"""mix_logits on the CPU in C++: the reference's values and gradients within the budget of float64,
the same bits on each instruction set, in any batch and on any number of threads."""

import itertools
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases import BF16, CPU_KERNELS, DTYPES, F16, F32, INF, ISAS, MODES, NAN, MixtureInputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clp_kernels import mix_logits, registry, testing
from clp_kernels.ops.mix_logits import cpu as backend
from clp_kernels.ops.mix_logits import reference

pytestmark = CPU_KERNELS

BOTH = [True, True]
# Instruction sets of which the last only differs in products that this op has none of.
KINDS = [isa for isa in ISAS if isa != "avx512_bf16"]


outputs, expected = (
    partial(cases.mixture_results, backend),
    partial(cases.mixture_results, reference),
)


def check(args: MixtureInputs, mode: str, isa: str = "") -> None:
    """Every output within its budget of float64."""
    got, same = cases.judge_mixture(backend, reference, args, mode, isa)
    if mode == "geometric":
        assert torch.equal(got[0], same[0])
        assert torch.equal(got[1], same[1])


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest, set_threads: Any) -> Any:
    set_threads(request.param)
    return request.param


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of zeros; any NaN is like another."""
    return cases.same_bits(*(torch.where(t.isnan(), NAN, t) for t in (a, b)))


@pytest.mark.parametrize("isa", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_within_budget(mode: str, dtype: torch.dtype, isa: str) -> None:
    strides = itertools.cycle(("dense", "gaps", "expanded", "sliced"))
    kinds = itertools.cycle(testing.WEIGHT_KINDS)
    sizes = itertools.product((1, 2, 3, 5, 8), (1, 3), (1, 15, 16, 64, 65, 1000, 8229))
    for m, batch, vocab_size in sizes:
        masked = next(kinds) in ("uniform", "negative") and vocab_size > 1
        check(
            cases.mixture_inputs(
                m, batch, vocab_size, dtype, next(kinds),
                mode=mode, masked=masked, strides=next(strides),
            ),
            mode, isa,
        )  # fmt: skip


@given(
    st.sampled_from(MODES),
    st.sampled_from(DTYPES),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from(testing.WEIGHT_KINDS),
    st.sampled_from((0.01, 3.0, 12.0)),
)
def test_any_shape_and_scale(
    mode: str, dtype: torch.dtype, m: int, batch: int, vocab_size: int, kind: str, scale: float
) -> None:
    check(cases.mixture_inputs(m, batch, vocab_size, dtype, kind, mode=mode, scale=scale), mode)


@pytest.mark.parametrize("mode", MODES)
def test_large_offsets_and_extreme_weights(mode: str) -> None:
    for offset, weights in (
        (1e4, [0.2, 0.5, 0.3]),
        (-1e4, [0.2, 0.5, 0.3]),
        (0.0, [1e-30, 0.5, 0.5]),
        (0.0, [1e-30, 1e-30, 1e-30]),
        (0.0, [1e-30, 2.0, 0.0]),
        (0.0, [3e4, 1e-20, 7.0]),
        (1e4, [1e-38, 1.0, 1e-38]),
    ):
        args = cases.mixture_inputs(3, 2, 5000, kind="uniform")
        args.logits.add_(torch.tensor([offset, offset / 2, 0.0])[:, None, None])
        check(args._replace(weights=torch.tensor([weights, weights[::-1]])), mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_on_every_instruction_set_and_number_of_threads(
    mode: str, threads: int
) -> None:
    torch.manual_seed(7)
    for dtype, batch, vocab_size in ((F32, 5, 20_011), (BF16, 1, 151_936), (F16, 3, 9000)):
        args = cases.mixture_inputs(
            3, batch, vocab_size, dtype, "dirichlet", mode="probability", masked=True
        )
        torch.set_num_threads(1)
        first = outputs(args, mode, "scalar")
        torch.set_num_threads(threads)
        for isa in KINDS:
            assert all(map(same_bits, outputs(args, mode, isa), first)), isa


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab_size", [1, 40, 4100, 70_000])
def test_a_row_has_the_same_bits_in_any_batch(mode: str, vocab_size: int, threads: int) -> None:
    args = cases.mixture_inputs(3, 7, vocab_size)
    z, d_logits, d_weights = outputs(args, mode)
    for rows in ([3], [6, 0, 6], [5, 4, 3, 2, 1, 0]):
        alone = outputs(args.rows(rows), mode)
        assert same_bits(alone[0], z[rows])
        assert same_bits(alone[1], d_logits[:, rows])
        assert same_bits(alone[2], d_weights[rows])


def test_the_longest_row() -> None:
    for mode in MODES:
        check(cases.mixture_inputs(2, 1, 262_144), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", [INF, -INF, NAN, -1.0])
def test_weights_that_the_op_refuses_end_as_in_the_reference(mode: str, weight: float) -> None:
    args = cases.mixture_inputs(2, 1, 50)
    args.weights[0, 1] = weight
    for got, want in zip(outputs(args, mode), expected(args, mode), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_not_asked_for_are_empty(mode: str, dtype: torch.dtype) -> None:
    args = cases.mixture_inputs(3, 2, 5000, dtype, masked=True)
    full = backend.mix_logits_backward(*args, mode, BOTH)
    for needs in itertools.product((False, True), repeat=2):
        grads = backend.mix_logits_backward(*args, mode, list(needs))
        for grad, need, whole in zip(grads, needs, full, strict=True):
            if need:
                assert same_bits(grad, whole)
            else:
                assert (grad.shape, grad.dtype) == ((0,), dtype)  # as the op's fake has it


@pytest.mark.parametrize("mode", MODES)
def test_more_terms_than_threads_or_slices(mode: str, threads: int) -> None:
    check(cases.mixture_inputs(67, 2, 100), mode)


@pytest.mark.parametrize("mode", MODES)
def test_auto_uses_it(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for op in ("mix_logits", "mix_logits_backward"):
        entry = next(e for e in registry.BACKENDS[op] if e.name == "cpu")

        def spy(*args: Any, entry: registry.Backend = entry, op: str = op) -> Any:
            called.append(op)
            return entry.run(*args)

        spied = registry.Backend("cpu", spy, entry.why_not)
        monkeypatch.setitem(registry.BACKENDS, op, (spied, *registry.BACKENDS[op][1:]))
    args = cases.mixture_inputs(2, 3, 40)
    logits, weights = args.logits.requires_grad_(), args.weights.requires_grad_()
    mix_logits(logits, weights, mode=mode).backward(args.dz)
    assert called == ["mix_logits", "mix_logits_backward"]
    wanted = backend.mix_logits_backward(args.dz, logits.detach(), weights.detach(), mode, BOTH)
    for leaf, want in zip((logits, weights), wanted, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, want)
