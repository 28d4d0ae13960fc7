"""mix_logits in C++ on each instruction set, and in Triton's interpreter: special numbers."""

import itertools
from typing import Any

import cases
import pytest
import torch
from cases import CPU_KERNELS, F64, INF, ISAS, MODES, NAN, MixtureInputs

from clp_kernels.ops.mix_logits import cpu, reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
BOTH = [True, True]


@pytest.fixture(params=[*(pytest.param(isa, marks=CPU_KERNELS) for isa in ISAS), "triton"])
def way(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    """The module, and the instruction set if its functions take one."""
    if request.param == "triton":
        return (cases.interpreted("mix_logits"),)
    return cpu, request.param


def test_probabilities_below_the_smallest_float(way: tuple[Any, ...]) -> None:
    """Where the mixture, or a term of it, is out of the reach of a sum of exponentials."""
    backend, *isa = way
    rows = torch.tensor([[0.3, 0.7, 0], [1, 0, 0], [1e-20, 1, 1], [0.5, 0.25, 0.25]])
    spread = [spread * torch.randn(3, 4, 333) for spread in (20, 60, 100, 250)]
    far = torch.tensor([[[0.0, -200.0, -300.0]], [[-500.0, 0.0, -250.0]]])
    for args in (
        *(MixtureInputs(torch.rand(4, 333), logits, rows) for logits in spread),
        MixtureInputs(torch.ones(1, 3), far, rows[:1, :2]),
    ):
        z, d_logits, d_weights = cases.mixture_results(backend, args, "probability", *isa)
        wide = cases.mixture_results(reference, cases.cast(args, F64), "probability")
        torch.testing.assert_close(z.double(), wide[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(d_logits.double(), wide[1], rtol=1e-4, atol=2e-6)
        # Of a term without weight the sum may leave float32, as the reference's does.
        torch.testing.assert_close(d_weights, wide[2].float(), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_row(mode: str, way: tuple[Any, ...]) -> None:
    backend, *isa = way
    args = cases.mixture_inputs(3, 4, 5000)
    clean = cases.mixture_results(backend, args, mode, *isa)
    args.logits[1, 2, 4321] = NAN
    args.dz[1, 3] = NAN
    z, d_logits, d_weights = cases.mixture_results(backend, args, mode, *isa)
    others = [0, 3]
    assert torch.equal(z[others], clean[0][others])
    assert torch.equal(d_logits[:, others], clean[1][:, others])
    assert torch.equal(d_weights[others], clean[2][others])
    assert z[2].isnan().sum() == (1 if mode == "geometric" else 5000)
    wanted = cases.mixture_results(reference, args, mode)
    for got, want in zip((z, d_logits, d_weights), wanted, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    assert d_weights[1].isnan().all()


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needs", [BOTH, [True, False], [False, True]], ids=str)
def test_infinities_and_nan_are_where_the_reference_has_them(
    mode: str, way: tuple[Any, ...], needs: list[bool]
) -> None:
    backend, *isa = way
    args = special_rows(mode)
    z, want = backend.mix_logits(*args[1:], mode, *isa), reference.mix_logits(*args[1:], mode)
    close = torch.testing.assert_close
    if mode == "geometric":
        assert cases.same_bits(*(torch.where(t.isnan(), NAN, t) for t in (z, want)))
    close(z, want, rtol=1e-6, atol=2e-6 if isa else 1e-6, equal_nan=True)
    # Where z is -inf, dz may be anything.
    args = args._replace(dz=torch.where(want == -INF, NAN, args.dz))
    grads = backend.mix_logits_backward(*args, mode, needs, *isa)
    for got, near in zip(grads, reference.mix_logits_backward(*args, mode, needs), strict=True):
        rtol, atol = (2e-5, 2e-6) if isa else (1e-5, 1e-5)
        close(got, near, rtol=rtol, atol=atol, equal_nan=True)
    if needs == BOTH:  # of a row that several sources mask in part
        assert grads[0][:, 5].isfinite().all() and grads[1][5].isfinite().all()
    if needs[0] and mode == "probability":
        # Nothing at all reaches a masked logit of a row that has a softmax.
        masked = (args.logits == -INF) & ~grads[0].isnan()
        assert masked.any() and (grads[0][masked] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_term_of_weight_zero_may_hold_anything(mode: str, way: tuple[Any, ...]) -> None:
    backend, *isa = way
    second = 2 if mode == "probability" else -2
    weights = torch.tensor([[0.0, 1, 0], [0, 0, 0], [-0.0, second, 0], [0, 0.5, 0]])
    logits = torch.randn(3, 4, 1100)
    alone = logits[1:2].clone()
    logits[0], logits[2, 0], logits[2, 1:] = NAN, INF, -INF
    z = backend.mix_logits(logits, weights, mode, *isa)
    assert torch.equal(z, backend.mix_logits(alone, weights[:, 1:2], mode, *isa))
    assert (z[1] == (0.0 if mode == "geometric" else -INF)).all()


def test_nothing_to_mix(way: tuple[Any, ...]) -> None:
    backend, *isa = way
    for mode, (m, batch, vocab_size) in itertools.product(MODES, ((2, 0, 5), (2, 3, 0), (0, 3, 4))):
        logits, weights = torch.randn(m, batch, vocab_size), torch.rand(batch, m)
        z = backend.mix_logits(logits, weights, mode, *isa)
        nothing = 0.0 if mode == "geometric" else -INF
        assert torch.equal(z, torch.full((batch, vocab_size), nothing))
        grads = backend.mix_logits_backward(z, logits, weights, mode, BOTH, *isa)
        assert torch.equal(grads[0], torch.zeros_like(logits))
        assert torch.equal(grads[1], torch.zeros_like(weights))


def test_who_runs_it(way: tuple[Any, ...]) -> None:
    backend, *isa = way
    logits = torch.randn(1, 2, 3)
    assert backend.why_not(logits, None) is None
    assert "float64" in str(backend.why_not(logits.double(), None))
    if isa:
        assert "meta" in str(backend.why_not(logits.to("meta"), None))
        with pytest.raises(ValueError, match="isa must be one of"):
            backend.mix_logits(logits, torch.ones(2, 1), "geometric", "mmx")
