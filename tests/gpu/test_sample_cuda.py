"""The CUDA sampling kernels against the reference on the CPU. Needs a GPU."""

from typing import Any

import cases
import pytest
import torch
from cases import BF16, CUDA_KERNELS, DTYPES, F16, F32, GOOD_ROWS, INF, MODES, NAN, Draw
from torch import Tensor

from clp_kernels import sample
from clp_kernels.ops.sample import cpu as cpu_sample
from clp_kernels.ops.sample import cuda as cuda_sample
from clp_kernels.ops.sample import reference
from clp_kernels.ops.sample.reference import Inputs

pytestmark = CUDA_KERNELS

DEVICE = "cuda"
EVERY = "top_k top_p min_p"


def on_gpu(args: Draw) -> Draw:
    return cases.draw_on(args, DEVICE)


def draw(args: Draw) -> tuple[Tensor, ...]:
    return cuda_sample.sample(Inputs(**args))


def assert_same_bits(actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert all(map(cases.same_bits, actual, wanted))


def assert_equals_reference(args: Draw) -> None:
    """The reference's tokens; log-probabilities of float64, which fixes the reference's rounding.

    In probability mode the reference's own float32 is off by up to 2e-5.
    """
    tokens, *wanted = reference.sample(Inputs(**args))
    if args["mode"] == "probability":
        wanted = reference.sample(Inputs(**{**args, "logits": args["logits"].double()}))[1:]
    tolerance = 1e-5 if args["mode"] == "probability" else 1e-6
    cases.assert_close_draws(draw(on_gpu(args)), (tokens, *wanted), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 7, 31, 64, 257, 1000, 2048, 2049, 4099, 50_257])
def test_small_equals_reference(vocab_size: int, dtype: torch.dtype) -> None:
    for m in range(1, 7):
        for batch in (0, 1, 2, 9):
            assert_equals_reference(cases.draw_inputs(m, batch, vocab_size, dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filters", ["", "top_k", "top_p", "min_p", EVERY])
def test_small_filters_and_modes(filters: str, mode: str) -> None:
    for vocab_size in (1, 2, 7, 2048, 2049, 5000):
        for m, dtype in ((1, F32), (2, F32), (5, BF16)):
            for batch in (0, 1, 9):
                assert_equals_reference(
                    cases.draw_inputs(m, batch, vocab_size, dtype, mode, filters)
                )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filters", ["", "top_p", EVERY])
def test_large_vocabulary(filters: str, mode: str) -> None:
    for m, dtype in ((1, F32), (4, BF16), (4, F16)):
        assert_equals_reference(cases.draw_inputs(m, 8, 151_936, dtype, mode, filters))


def test_small_ties_share_their_fate() -> None:
    """Whole logits: hundreds of ids tie with the last one kept, and both zeros are one."""
    for filters in ("top_k", "top_p", "top_k top_p"):
        args = cases.draw_inputs(1, 24, 5000, filters=filters)
        args["logits"] = (args["logits"] / 3).round()
        assert args["logits"].signbit().logical_and(args["logits"] == 0).any()
        assert_equals_reference(args)


def test_small_zeros_of_both_signs_tie() -> None:
    args = cases.draw_inputs(1, 8, 600, filters="top_k top_p")
    args["logits"][:] = -1.0
    args["logits"][:, :, 100:110:2], args["logits"][:, :, 101:110:2] = -0.0, 0.0
    args["temperature"][:], args["top_k"][:], args["top_p"][:] = 1.0, 3, 0.1
    filtered = draw(on_gpu(args))[2].cpu()
    torch.testing.assert_close(filtered, torch.tensor(0.1).log().expand(8))
    assert_equals_reference(args)


def test_flat_row_is_cut_at_the_exact_id() -> None:
    """One id too many or too few shows in the 7th digit: no mass may be lost in the adding up."""
    args = cases.draw_inputs(1, 2, 151_936, filters="top_p")
    args["logits"] *= 0.01
    args["temperature"][:] = 1.0
    args["top_p"][:] = torch.tensor([0.5, 0.03])
    assert_equals_reference(args)


def test_small_one_filtered_token_is_certain() -> None:
    args = cases.draw_inputs(2, 4, 3000, filters="top_k")
    args["top_k"][:] = 1
    args["temperature"][:] = 1
    tokens, logprobs, filtered = draw(on_gpu(args))
    assert torch.equal(filtered.cpu(), torch.zeros(4))
    assert (logprobs < 0).all()
    args["temperature"][:] = 0
    assert torch.equal(draw(on_gpu(args))[0], tokens)


@pytest.mark.parametrize("filters", ["", EVERY])
@pytest.mark.parametrize("scale", [1e4, 1e9, 1e17, 3e38])
def test_small_huge_logits(scale: float, filters: str) -> None:
    assert_equals_reference(cases.huge_draws(scale, filters=filters))


@pytest.mark.parametrize("filters", ["", "min_p"])
@pytest.mark.parametrize("margin", [1e-3, -1e-3])
def test_small_largest_noise_is_not_pruned(margin: float, filters: str) -> None:
    args = cases.largest_noise_draw(margin, filters)
    if filters:
        args["min_p"][:] = 1e-15
    assert_equals_reference(args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filters", ["", EVERY])
def test_small_bad_rows(filters: str, mode: str) -> None:
    args = cases.bad_draws(5000, mode=mode, filters=filters)
    if mode == "probability":
        args["weights"] = torch.ones(6, 1)
    for temperature in (0.0, 0.3, 1.0, 3.0):
        args["temperature"][:] = temperature
        assert (draw(on_gpu(args))[0] >= 0).tolist() == GOOD_ROWS[:6]
        assert_equals_reference(args)


@pytest.mark.parametrize("filters", ["", "top_p"])
def test_small_weights_and_infinities(filters: str) -> None:
    assert_equals_reference(cases.infinite_draws(filters))


@pytest.mark.parametrize("filters", ["", "top_p"])
def test_small_probability_weights_and_infinities(filters: str) -> None:
    """A term of weight 0 is not looked at; an id that one source rules out may come from another;
    an active source without a finite logit, or with NaN, makes the row bad, as do no weights."""
    args = cases.draw_inputs(3, 6, 3000, mode="probability", filters=filters)
    logits, weights = args["logits"], args["weights"]
    weights[0] = torch.tensor([0.0, 0.5, 2.0])
    logits[0, 0] = NAN
    logits[1, 1, 5:], logits[2, 1, :2000] = -INF, -INF
    logits[1, 2] = -INF
    logits[2, 3, 2999] = NAN
    weights[4] = 0
    logits[:, 5, ::2] = -INF
    tokens = draw(on_gpu(args))[0]
    assert (tokens >= 0).tolist() == [True, True, False, False, False, True]
    assert_equals_reference(args)


def test_small_mix_has_the_bits_of_the_cpu() -> None:
    """Greedy over sums that differ in the last bit: one fused multiply-add would show."""
    args = cases.draw_inputs(5, 64, 3000, BF16)
    args["temperature"][:] = 0
    assert torch.equal(draw(on_gpu(args))[0].cpu(), cpu_sample.sample(Inputs(**args))[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filters", ["", EVERY])
def test_small_row_bits_are_its_own(filters: str, mode: str) -> None:
    """Whatever the alignment, the order, the batch, and how many blocks a row's filters take."""
    args = on_gpu(cases.draw_inputs(3, 5, 20_011, mode=mode, filters=filters))
    orders = [torch.tensor(order, device=DEVICE) for order in ([4, 0, 3], [2] * 150)]
    cases.check_row_bits(draw, args, orders)


def test_small_filters_of_others_do_not_show() -> None:
    """A row whose filters are off has the bits of a call without filters."""
    args = on_gpu(cases.draw_inputs(2, 6, 7000, filters=EVERY))
    args["top_k"][::2], args["top_p"][::2], args["min_p"][::2] = 0, 1.0, 0.0
    args["top_k"][1::2] = 7
    bare = draw({**args, "top_k": None, "top_p": None, "min_p": None})
    assert_same_bits(tuple(t[::2] for t in draw(args)), tuple(t[::2] for t in bare))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filters", ["", EVERY])
def test_cuda_graph_replay(filters: str, mode: str) -> None:
    """The filters are replayed with other values too."""
    sizes = (4, 8, 32_000, BF16, mode, filters)
    cases.assert_graph_replays(draw, lambda: on_gpu(cases.draw_inputs(*sizes)))


@pytest.mark.parametrize("filters", ["", "top_k"])
def test_more_rows_than_a_grid_axis(filters: str) -> None:
    args = on_gpu(cases.draw_inputs(1, 70_001, 130, filters=filters))
    drawn = draw(args)
    last = draw(cases.draw_rows(args, slice(-1, None)))
    assert_same_bits(tuple(t[-1:] for t in drawn), last)


@pytest.mark.slow
@pytest.mark.parametrize("filters", ["", "top_k top_p"])
def test_more_than_two_to_the_31_logits(filters: str) -> None:
    batch, vocab_size = 14_200, 151_936
    if torch.cuda.mem_get_info()[0] < (16 if filters else 8) * 2**30:
        pytest.skip("needs 8 GB of GPU memory, with filters 16 GB")
    args = on_gpu(cases.draw_inputs(1, batch, 1, filters=filters))
    args["logits"] = torch.randn(1, batch, vocab_size, device=DEVICE, dtype=BF16)
    drawn = draw(args)
    tail = cases.draw_on(cases.draw_rows(args, slice(-4, None)), "cpu")
    cases.assert_close_draws([t[-4:] for t in drawn], reference.sample(Inputs(**tail)), atol=1e-6)


def test_errors() -> None:
    args = on_gpu(cases.draw_inputs(2, 3, 5, filters="top_k"))

    def public(**changed: Any) -> None:
        given = {name: args[name] for name in ("logits", "weights", "top_k", "seed", "position")}
        sample(**{**given, **changed}, backend="cuda")

    with pytest.raises(ValueError, match="mode must be"):
        public(mode="harmonic")
    with pytest.raises(ValueError, match="seed must be on cuda"):
        public(seed=args["seed"].cpu())
    with pytest.raises(TypeError, match="top_k must be an integer tensor"):
        public(top_k=args["top_k"].float())
    with pytest.raises(ValueError, match=r"top_k must be a number or have shape \[3\]"):
        public(top_k=args["top_k"].new_empty(2))
