"""mix_logits on the CPU in C++: the reference's values and gradients within the budget of float64,
the same bits on each instruction set, in any batch and on any number of threads."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases import (
    BF16,
    CPU_KERNELS,
    F16,
    F32,
    F64,
    INF,
    ISAS,
    MODES,
    NAN,
    MixtureInputs,
    cast,
    judge_mixture,
    mixture_inputs,
    mixture_results,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clp_kernels import mix_logits, registry, testing
from clp_kernels.ops.mix_logits import cpu as backend
from clp_kernels.ops.mix_logits import reference

pytestmark = CPU_KERNELS

DTYPES = (F32, BF16, F16)
BOTH = [True, True]
# Instruction sets of which the last only differs in products that this op has none of.
KINDS = [isa for isa in ISAS if isa != "avx512_bf16"]


outputs, expected = partial(mixture_results, backend), partial(mixture_results, reference)


def check(args: MixtureInputs, mode: str, isa: str = "") -> None:
    """Every output within its budget of float64."""
    got, same = judge_mixture(backend, reference, args, mode, isa)
    if mode == "geometric":
        assert torch.equal(got[0], same[0])
        assert torch.equal(got[1], same[1])


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(2)


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
            mixture_inputs(
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
    check(mixture_inputs(m, batch, vocab_size, dtype, kind, mode=mode, scale=scale), mode)


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
        args = mixture_inputs(3, 2, 5000, kind="uniform")
        args.logits.add_(torch.tensor([offset, offset / 2, 0.0])[:, None, None])
        check(args._replace(weights=torch.tensor([weights, weights[::-1]])), mode)


def test_probabilities_below_the_smallest_float() -> None:
    """Where the mixture, or a term of it, is out of the reach of a sum of exponentials."""
    for spread in (20, 60, 100, 250):
        logits = spread * torch.randn(3, 4, 333)
        weights = torch.tensor([[0.3, 0.7, 0], [1, 0, 0], [1e-20, 1, 1], [0.5, 0.25, 0.25]])
        args = MixtureInputs(torch.rand(4, 333), logits, weights)
        for isa in KINDS:
            z, d_logits, d_weights = outputs(args, "probability", isa)
            wide = expected(cast(args, F64), "probability")
            torch.testing.assert_close(z.double(), wide[0], rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(d_logits.double(), wide[1], rtol=1e-4, atol=2e-6)
            # Of a term without weight the sum may leave float32, as the reference's does.
            torch.testing.assert_close(d_weights, wide[2].float(), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_on_every_instruction_set_and_number_of_threads(
    mode: str, threads: int
) -> None:
    torch.manual_seed(7)
    for dtype, batch, vocab_size in ((F32, 5, 20_011), (BF16, 1, 151_936), (F16, 3, 9000)):
        args = mixture_inputs(
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
    args = mixture_inputs(3, 7, vocab_size)
    z, d_logits, d_weights = outputs(args, mode)
    for rows in ([3], [6, 0, 6], [5, 4, 3, 2, 1, 0]):
        alone = outputs(args.rows(rows), mode)
        assert same_bits(alone[0], z[rows])
        assert same_bits(alone[1], d_logits[:, rows])
        assert same_bits(alone[2], d_weights[rows])


def test_the_longest_row() -> None:
    for mode in MODES:
        check(mixture_inputs(2, 1, 262_144), mode)


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_row(mode: str) -> None:
    args = mixture_inputs(3, 4, 5000)
    clean = outputs(args, mode)
    args.logits[1, 2, 4321] = NAN
    args.dz[1, 3] = NAN
    z, d_logits, d_weights = outputs(args, mode)
    others = [0, 3]
    assert torch.equal(z[others], clean[0][others])
    assert torch.equal(d_logits[:, others], clean[1][:, others])
    assert torch.equal(d_weights[others], clean[2][others])
    assert z[2].isnan().sum() == (1 if mode == "geometric" else 5000)
    for got, want in zip((z, d_logits, d_weights), expected(args, mode), strict=True):
        assert torch.equal(got.isnan(), want.isnan())


def special_rows(mode: str) -> MixtureInputs:
    """Rows with infinities and NaN, beside weights that are 0, negative (geometric) or one-hot."""
    whole = slice(None)
    holes: tuple[list[tuple[int, int | slice, float]], ...] = (
        [],
        [(0, 3, -INF), (1, 3, INF)],
        [(0, 5, INF)],
        [(1, 5, NAN)],
        [(1, whole, -INF)],
        [(0, slice(0, 20), -INF), (1, slice(10, 30), -INF), (2, slice(0, 40), -INF)],
        [(0, 1, -0.0), (1, 1, -0.0), (2, 1, -0.0)],
    )
    rows = [[0.5, 2, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [-0.0, 1, -0.0], [0, 1e-30, 2]]
    if mode == "geometric":
        rows += [[-1, 1, -2], [0, -1, 0], [1, -1e-30, 0]]
    logits = torch.randn(3, len(holes), 70)
    for b, places in enumerate(holes):
        for i, v, value in places:
            logits[i, b, v] = value
    count = len(rows)
    weights = torch.tensor(rows).repeat_interleave(len(holes), 0)
    return MixtureInputs(torch.randn(len(weights), 70), logits.repeat(1, count, 1), weights)


@pytest.mark.parametrize("isa", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needs", [BOTH, [True, False], [False, True]], ids=str)
def test_infinities_and_nan_are_where_the_reference_has_them(
    mode: str, isa: str, needs: list[bool]
) -> None:
    args = special_rows(mode)
    z, want = (f(*args[1:], mode) for f in (backend.mix_logits, reference.mix_logits))
    close = torch.testing.assert_close
    if mode == "geometric":
        assert same_bits(z, want)
    close(z, want, rtol=1e-6, atol=2e-6, equal_nan=True)
    # Where z is -inf, dz may be anything.
    args = args._replace(dz=torch.where(want == -INF, NAN, args.dz))
    grads = backend.mix_logits_backward(*args, mode, needs, isa)
    for got, near in zip(grads, reference.mix_logits_backward(*args, mode, needs), strict=True):
        close(got, near, rtol=2e-5, atol=2e-6, equal_nan=True)
    if needs[0] and mode == "probability":
        # Nothing at all reaches a masked logit of a row that has a softmax.
        masked = (args.logits == -INF) & ~grads[0].isnan()
        assert masked.any() and (grads[0][masked] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", [INF, -INF, NAN, -1.0])
def test_weights_that_the_op_refuses_end_as_in_the_reference(mode: str, weight: float) -> None:
    args = mixture_inputs(2, 1, 50)
    args.weights[0, 1] = weight
    for got, want in zip(outputs(args, mode), expected(args, mode), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_term_of_weight_zero_may_hold_anything() -> None:
    weights = torch.tensor([[0.0, 1, 0], [0, 0, 0], [-0.0, 2, 0], [0, 0.5, 0]])
    logits = torch.randn(3, 4, 1100)
    alone = logits[1:2].clone()
    logits[0], logits[2, 0], logits[2, 1:] = NAN, INF, -INF
    for mode in MODES:
        z = backend.mix_logits(logits, weights, mode)
        assert torch.equal(z, backend.mix_logits(alone, weights[:, 1:2], mode))
        assert (z[1] == (0.0 if mode == "geometric" else -INF)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_not_asked_for_are_empty(mode: str, dtype: torch.dtype) -> None:
    args = mixture_inputs(3, 2, 5000, dtype, masked=True)
    full = backend.mix_logits_backward(*args, mode, BOTH)
    for needs in itertools.product((False, True), repeat=2):
        grads = backend.mix_logits_backward(*args, mode, list(needs))
        for grad, need, whole in zip(grads, needs, full, strict=True):
            if need:
                assert same_bits(grad, whole)
            else:
                assert (grad.shape, grad.dtype) == ((0,), dtype)  # as the op's fake has it


def test_nothing_to_mix() -> None:
    for mode, (m, batch, vocab_size) in itertools.product(MODES, ((2, 0, 5), (2, 3, 0), (0, 3, 4))):
        logits, weights = torch.randn(m, batch, vocab_size), torch.rand(batch, m)
        z = backend.mix_logits(logits, weights, mode)
        nothing = 0.0 if mode == "geometric" else -INF
        assert torch.equal(z, torch.full((batch, vocab_size), nothing))
        grads = backend.mix_logits_backward(z, logits, weights, mode, BOTH)
        assert torch.equal(grads[0], torch.zeros_like(logits))
        assert torch.equal(grads[1], torch.zeros_like(weights))


@pytest.mark.parametrize("mode", MODES)
def test_more_terms_than_threads_or_slices(mode: str, threads: int) -> None:
    check(mixture_inputs(67, 2, 100), mode)


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
    args = mixture_inputs(2, 3, 40)
    logits, weights = args.logits.requires_grad_(), args.weights.requires_grad_()
    mix_logits(logits, weights, mode=mode).backward(args.dz)
    assert called == ["mix_logits", "mix_logits_backward"]
    wanted = backend.mix_logits_backward(args.dz, logits.detach(), weights.detach(), mode, BOTH)
    for leaf, want in zip((logits, weights), wanted, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, want)


def test_who_runs_it() -> None:
    logits = torch.randn(1, 2, 3)
    assert backend.why_not(logits, None) is None
    assert "float64" in str(backend.why_not(logits.double(), None))
    assert "meta" in str(backend.why_not(logits.to("meta"), None))
    with pytest.raises(ValueError, match="isa must be one of"):
        backend.mix_logits(logits, torch.ones(2, 1), "geometric", "mmx")
