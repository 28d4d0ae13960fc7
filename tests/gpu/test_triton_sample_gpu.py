"""The Triton kernels of sample and mix_logits on a GPU, held to the reference.

Needs a GPU. Draws are compared with the reference on the CPU.
"""

from collections.abc import Callable
from functools import partial

import cases
import pytest
import torch
from cases import BF16, DTYPES, F32, FINITE_ROWS, GOOD_ROWS, INF, MODES, Draw, MixtureInputs
from launches import TRITON_GPU

from clp_kernels.ops.mix_logits import reference as mix_reference
from clp_kernels.ops.mix_logits import triton as mixing
from clp_kernels.ops.sample import reference
from clp_kernels.ops.sample import triton as backend
from clp_kernels.ops.sample.reference import Inputs

pytestmark = TRITON_GPU

EVERY = "top_k top_p min_p"
FILTERS = ("", "top_k", "top_p", "min_p", "top_k top_p", EVERY)


def on_gpu(args: Draw) -> Draw:
    return cases.draw_on(args, "cuda")


def assert_equals_reference(args: Draw) -> None:
    cases.assert_close_draws(
        backend.sample(Inputs(**on_gpu(args))), reference.sample(Inputs(**args))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS)
def test_small_equals_reference(dtype: torch.dtype, filters: str) -> None:
    for vocab_size in (1, 2, 7, 31, 64, 513, 1024, 1025, 4099):
        for m in (1, 2, 5):
            for batch in (0, 1, 9):
                assert_equals_reference(
                    cases.draw_inputs(m, batch, vocab_size, dtype, filters=filters)
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", ["", EVERY])
def test_small_probability(dtype: torch.dtype, filters: str) -> None:
    for vocab_size in (1, 31, 513, 4099):
        assert_equals_reference(cases.draw_inputs(3, 5, vocab_size, dtype, "probability", filters))


@pytest.mark.parametrize("vocab_size", [50_257, 151_936, 262_144])
@pytest.mark.parametrize("filters", FILTERS)
def test_large_vocabulary(vocab_size: int, filters: str) -> None:
    for dtype in (BF16, F32):
        assert_equals_reference(cases.draw_inputs(2, 10, vocab_size, dtype, filters=filters))


@pytest.mark.parametrize("vocab_size", [700, 20_011])
@pytest.mark.parametrize("ties", [False, True])
def test_small_kept_sets_are_exactly_the_references(vocab_size: int, ties: bool) -> None:
    cases.check_kept_sets(backend, vocab_size, ties, 1.0, "cuda", alone=False)


@pytest.mark.parametrize("scale", [1e4, 1e17, 3e38])
def test_small_huge_logits(scale: float) -> None:
    for filters in ("", "top_p"):
        assert_equals_reference(cases.huge_draws(scale, filters=filters))


@pytest.mark.parametrize("margin", [1e-3, -1e-3])
def test_small_largest_noise(margin: float) -> None:
    assert_equals_reference(cases.largest_noise_draw(margin))


@pytest.mark.parametrize("make", [partial(cases.bad_draws, 5000), cases.infinite_draws])
@pytest.mark.parametrize("filters", ["", EVERY])
def test_small_bad_rows_and_infinities(filters: str, make: Callable[..., Draw]) -> None:
    args = make(filters=filters)
    good = GOOD_ROWS[:6] if args["weights"] is None else FINITE_ROWS
    assert (reference.sample(Inputs(**args))[0] >= 0).tolist() == good
    assert_equals_reference(args)


def test_small_mix_is_rounded_like_the_references() -> None:
    """One fused multiply-add would show."""
    for dtype in DTYPES:
        args = cases.draw_inputs(5, 64, 3000, dtype)
        logits, weights = args["logits"], args["weights"]
        got = mixing.mixture(logits.cuda(), weights.cuda(), "geometric", F32)
        assert torch.equal(
            got.cpu(), mix_reference.mix_logits(logits.float(), weights, "geometric")
        )
        rounded = mixing.mix_logits(logits.cuda(), weights.cuda(), "geometric")
        assert torch.equal(rounded.cpu(), mix_reference.mix_logits(logits, weights, "geometric"))


@pytest.mark.parametrize("filters", ["", EVERY])
@pytest.mark.parametrize("mode", MODES)
def test_small_row_bits_are_its_own(filters: str, mode: str) -> None:
    args = on_gpu(cases.draw_inputs(3, 5, 20_011, filters=filters, mode=mode))
    order = torch.tensor([4, 0, 3], device="cuda")
    cases.check_row_bits(lambda args: backend.sample(Inputs(**args)), args, [order])


@pytest.mark.parametrize("filters", ["", EVERY])
def test_cuda_graph_replay(filters: str) -> None:
    sizes = (4, 8, 32_000, BF16, "geometric", filters)
    cases.assert_graph_replays(
        lambda args: backend.sample(Inputs(**args)), lambda: on_gpu(cases.draw_inputs(*sizes))
    )


@pytest.mark.parametrize("filters", ["", "top_k", "top_p", "min_p"])
def test_distribution_of_a_million_draws(filters: str) -> None:
    """Chi-square against the reference's probabilities of one row; more rows than a grid axis."""
    draws, logits = 2**20, torch.linspace(-2, 2, 12)
    given = {"top_k": torch.tensor([5]), "top_p": torch.tensor([0.8]), "min_p": torch.tensor([0.2])}
    logp = logits.double().log_softmax(-1)[None]
    kept = torch.ones(1, 12, dtype=torch.bool)
    if filters == "top_k":
        kept = reference.top_k_mask(logp, given["top_k"])
    elif filters == "top_p":
        kept = reference.top_p_mask(logp, given["top_p"])
    elif filters == "min_p":
        kept = logp >= logp.amax() + given["min_p"].double().log()
    args = on_gpu(cases.draw_inputs(1, 1, 12))
    args["logits"] = logits.cuda().expand(1, draws, 12)
    args["temperature"] = torch.ones(draws, device="cuda")
    args["seed"] = torch.arange(draws, device="cuda")
    args["position"] = torch.full((draws,), 3, device="cuda")
    if filters:
        args[filters] = given[filters].cuda().expand(draws)
    counts = torch.bincount(backend.sample(Inputs(**args))[0], minlength=12).cpu().double()
    assert counts[~kept[0]].sum() == 0
    p = logp.masked_fill(~kept, -INF).softmax(-1)[0][kept[0]] * draws
    chi_square = ((counts[kept[0]] - p) ** 2 / p).sum().item()
    # Exceeded about once in a thousand with 11 degrees of freedom, or less with fewer.
    assert chi_square < 31.3


@pytest.mark.slow
def test_more_than_two_to_the_31_logits() -> None:
    batch, vocab_size = 14_200, 151_936
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    logits = torch.randn(1, batch, vocab_size, device="cuda", dtype=BF16)
    for filters in ("", "top_p"):
        args = on_gpu(cases.draw_inputs(1, batch, 1, filters=filters))
        args["logits"] = logits
        got = backend.sample(Inputs(**args))
        tail = cases.draw_on(cases.draw_rows(args, slice(-4, None)), "cpu")
        assert torch.equal(got[0][-4:].cpu(), reference.sample(Inputs(**tail))[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_small_mix_logits_within_budget(dtype: torch.dtype, mode: str) -> None:
    for m, batch, vocab_size in ((1, 3, 7), (2, 1, 1025), (5, 4, 4099), (3, 2, 151_936)):
        args = cases.draw_inputs(m, batch, vocab_size, dtype, mode=mode)
        logits, weights = args["logits"].cuda(), torch.rand(batch, m, device="cuda")
        if mode == "geometric":
            weights = weights - 0.5
        logits[:, :, 0] = -INF
        dz = torch.randn(batch, vocab_size, device="cuda").to(dtype)
        args = MixtureInputs(dz, logits, weights)
        got, _ = cases.judge_mixture(mixing, mix_reference, args, mode)
        again = cases.mixture_results(mixing, args, mode)
        assert all(map(torch.equal, got, again))
        alone = cases.mixture_results(mixing, args.rows([-1]), mode)
        assert torch.equal(alone[1], got[1][:, -1:])
        assert torch.equal(alone[2], got[2][-1:])
