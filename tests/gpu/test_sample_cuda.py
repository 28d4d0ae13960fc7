"""The CUDA sampling kernels against the reference on the CPU. Needs a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clp_kernels import native, sample
from clp_kernels.ops.sample import cpu as cpu_sample
from clp_kernels.ops.sample import cuda as cuda_sample
from clp_kernels.ops.sample import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.cuda_missing() is not None, reason=str(native.cuda_missing())),
]

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("geometric", "probability")
INF, NAN = float("inf"), float("nan")
TEMPERATURES = [0.0, 0.3, 1.0, 3.0]
# Of the arguments that `rows` makes.
LOGITS, WEIGHTS, MODE, TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, POSITION = range(9)


def rows(
    m: int,
    batch: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    mode: str = "geometric",
    filters: tuple[str, ...] = (),
) -> list[Any]:
    """Arguments of a draw, on the CPU: every temperature, weights of any sign that the mode allows.

    filters: of "top_k", "top_p" and "min_p"; each is off in some rows.
    """
    weights = torch.rand(batch, m) if mode == "probability" else torch.randn(batch, m)

    def one_of(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(0, len(values), (batch,))]

    k = one_of([0, 1, 2, 20, 1000, vocab_size, vocab_size + 9], torch.int64)
    p, least = one_of([1.0, 0.999999, 0.9, 0.5, 1e-6]), one_of([0.0, 1e-4, 0.05, 1.0])
    return [
        (3 * torch.randn(m, batch, vocab_size)).to(dtype),
        None if m == 1 else weights,
        mode,
        torch.tensor(TEMPERATURES).repeat(batch)[:batch],
        k if "top_k" in filters else None,
        p if "top_p" in filters else None,
        least if "min_p" in filters else None,
        torch.randint(-(2**63), 2**63 - 1, (batch,)),
        torch.randint(2**31, 2**40, (batch,)),
    ]


def each(args: list[Any], change: Any) -> list[Any]:
    """The arguments with `change` applied to the logits and to every row argument."""
    return [change(i, a) if isinstance(a, Tensor) else a for i, a in enumerate(args)]


def on_gpu(args: list[Any]) -> list[Any]:
    return each(args, lambda _, a: a.to(DEVICE))


def pick(args: list[Any], order: Any) -> list[Any]:
    """These rows of the batch."""
    return each(args, lambda i, a: a[:, order] if i == LOGITS else a[order])


def draw(args: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    return cuda_sample.sample(*args)


def assert_same_bits(actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert torch.equal(actual[0], wanted[0])
    for one, other in zip(actual[1:], wanted[1:], strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def assert_equals_reference(args: list[Any]) -> None:
    """The reference's tokens; log-probabilities of float64, which fixes the reference's rounding.

    In probability mode the reference's own float32 is off by up to 2e-5.
    """
    tokens, logprobs, filtered = reference.sample(*args)
    tolerance = 1e-6
    if args[MODE] == "probability":
        _, logprobs, filtered = reference.sample(args[LOGITS].double(), *args[1:])
        tolerance = 1e-5
    actual = draw(on_gpu(args))
    assert torch.equal(actual[0].cpu(), tokens)
    for one, wanted in zip(actual[1:], (logprobs, filtered), strict=True):
        torch.testing.assert_close(
            one.cpu(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 7, 31, 64, 257, 1000, 2048, 2049, 4099, 50_257])
def test_small_equals_reference(vocab_size: int, dtype: torch.dtype) -> None:
    for m in range(1, 7):
        for batch in (0, 1, 2, 9):
            assert_equals_reference(rows(m, batch, vocab_size, dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "filters", [(), ("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p")], ids=str
)
def test_small_filters_and_modes(filters: tuple[str, ...], mode: str) -> None:
    for vocab_size in (1, 2, 7, 2048, 2049, 5000):
        for m, dtype in ((1, torch.float32), (2, torch.float32), (5, torch.bfloat16)):
            for batch in (0, 1, 9):
                assert_equals_reference(rows(m, batch, vocab_size, dtype, mode, filters))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filters", [(), ("top_p",), ("top_k", "top_p", "min_p")], ids=str)
def test_large_vocabulary(filters: tuple[str, ...], mode: str) -> None:
    for m, dtype in ((1, torch.float32), (4, torch.bfloat16), (4, torch.float16)):
        assert_equals_reference(rows(m, 8, 151_936, dtype, mode, filters))


def test_small_ties_share_their_fate() -> None:
    """Whole logits: hundreds of ids tie with the last one kept, and both zeros are one."""
    for filters in (("top_k",), ("top_p",), ("top_k", "top_p")):
        args = rows(1, 24, 5000, filters=filters)
        args[LOGITS] = (args[LOGITS] / 3).round()
        assert args[LOGITS].signbit().logical_and(args[LOGITS] == 0).any()
        assert_equals_reference(args)


def test_small_zeros_of_both_signs_tie() -> None:
    args = rows(1, 8, 600, filters=("top_k", "top_p"))
    args[LOGITS][:] = -1.0
    args[LOGITS][:, :, 100:110:2], args[LOGITS][:, :, 101:110:2] = -0.0, 0.0
    args[TEMPERATURE][:], args[TOP_K][:], args[TOP_P][:] = 1.0, 3, 0.1
    filtered = draw(on_gpu(args))[2].cpu()
    torch.testing.assert_close(filtered, torch.tensor(0.1).log().expand(8))
    assert_equals_reference(args)


def test_flat_row_is_cut_at_the_exact_id() -> None:
    """One id too many or too few shows in the 7th digit: no mass may be lost in the adding up."""
    args = rows(1, 2, 151_936, filters=("top_p",))
    args[LOGITS] *= 0.01
    args[TEMPERATURE][:] = 1.0
    args[TOP_P][:] = torch.tensor([0.5, 0.03])
    assert_equals_reference(args)


def test_small_one_filtered_token_is_certain() -> None:
    args = rows(2, 4, 3000, filters=("top_k",))
    args[TOP_K][:] = 1
    args[TEMPERATURE][:] = 1
    tokens, logprobs, filtered = draw(on_gpu(args))
    assert torch.equal(filtered.cpu(), torch.zeros(4))
    assert (logprobs < 0).all()
    args[TEMPERATURE][:] = 0
    assert torch.equal(draw(on_gpu(args))[0], tokens)


@pytest.mark.parametrize("filters", [(), ("top_k", "top_p", "min_p")], ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e9, 1e17, 3e38])
def test_small_huge_logits(scale: float, filters: tuple[str, ...]) -> None:
    args = rows(1, 4, 5000, filters=filters)
    args[LOGITS][:] = scale
    args[LOGITS][:, 2, ::3] = -scale
    args[LOGITS][:, 3] *= 1 - torch.rand(5000) * 1e-6
    assert_equals_reference(args)


@pytest.mark.parametrize("filters", [(), ("min_p",)], ids=str)
@pytest.mark.parametrize("margin", [1e-3, -1e-3])
def test_small_largest_noise_is_not_pruned(margin: float, filters: tuple[str, ...]) -> None:
    """Id 510 of (seed 7, position 115434) has the word 0xffffffff: noise 22.87, once in 2^32."""
    seed, position = torch.tensor([7]), torch.tensor([115_434])
    noise = reference.gumbel(reference.philox_uniform(seed, position, 512))[0]
    args = rows(1, 1, 512, filters=filters)
    args[LOGITS][:] = -60.0
    args[LOGITS][0, 0, 0], args[LOGITS][0, 0, 510] = 0.0, noise[0] - noise[510] + margin
    args[TEMPERATURE][:], args[SEED], args[POSITION] = 1.0, seed, position
    if filters:
        args[MIN_P][:] = 1e-15
    assert_equals_reference(args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filters", [(), ("top_k", "top_p", "min_p")], ids=str)
def test_small_bad_rows(filters: tuple[str, ...], mode: str) -> None:
    args = rows(1, 6, 5000, mode=mode, filters=filters)
    args[LOGITS][0, 0] = -INF
    args[LOGITS][0, 1, 4500] = NAN
    args[LOGITS][0, 2, 3] = INF
    args[LOGITS][0, 3, :4990] = -INF
    args[LOGITS][0, 4] = -INF
    args[LOGITS][0, 4, 4999] = NAN
    if mode == "probability":
        args[WEIGHTS] = torch.ones(6, 1)
    for temperature in TEMPERATURES:
        args[TEMPERATURE][:] = temperature
        tokens = draw(on_gpu(args))[0]
        assert (tokens >= 0).tolist() == [False, False, False, True, False, True]
        assert_equals_reference(args)


@pytest.mark.parametrize("filters", [(), ("top_p",)], ids=str)
def test_small_weights_and_infinities(filters: tuple[str, ...]) -> None:
    """A term of weight 0 is not looked at; an active -inf decides, whatever stands beside it."""
    args = rows(4, 6, 600, filters=filters)
    logits, weights = args[LOGITS], args[WEIGHTS]
    weights[0] = torch.tensor([0.0, 1.0, 0.0, 2.0])
    logits[0, 0], logits[2, 0, ::2] = -INF, NAN
    weights[1] = torch.tensor([1.0, -1.0, 0.5, 0.5])
    logits[1, 1, :500] = -INF
    weights[2] = 1
    logits[0, 2, :300], logits[1, 2, :300] = -INF, NAN
    weights[3] = 0
    weights[4] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    logits[0, 4, 7], logits[2, 4, 8] = INF, INF
    weights[5] = torch.tensor([1.0, NAN, 0.0, 0.0])
    assert_equals_reference(args)


@pytest.mark.parametrize("filters", [(), ("top_p",)], ids=str)
def test_small_probability_weights_and_infinities(filters: tuple[str, ...]) -> None:
    """A term of weight 0 is not looked at; an id that one source rules out may come from another;
    an active source without a finite logit, or with NaN, makes the row bad, as do no weights."""
    args = rows(3, 6, 3000, mode="probability", filters=filters)
    logits, weights = args[LOGITS], args[WEIGHTS]
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
    args = rows(5, 64, 3000, torch.bfloat16)
    args[TEMPERATURE][:] = 0
    assert torch.equal(draw(on_gpu(args))[0].cpu(), cpu_sample.sample(*args)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filters", [(), ("top_k", "top_p", "min_p")], ids=str)
def test_small_row_bits_are_its_own(filters: tuple[str, ...], mode: str) -> None:
    """Whatever the alignment, the order, the batch, and how many blocks a row's filters take."""
    args = on_gpu(rows(3, 5, 20_011, mode=mode, filters=filters))
    drawn = draw(args)
    assert_same_bits(draw(args), drawn)
    padded = torch.full((5, 3, 20_017), NAN, device=DEVICE)[:, :, 3:20_014].transpose(0, 1)
    padded.copy_(args[LOGITS])
    assert_same_bits(draw([padded, *args[1:]]), drawn)
    for order in ([4, 0, 3], [2] * 150):
        which = torch.tensor(order, device=DEVICE)
        assert_same_bits(draw(pick(args, which)), tuple(t[which] for t in drawn))


def test_small_filters_of_others_do_not_show() -> None:
    """A row whose filters are off has the bits of a call without filters."""
    args = on_gpu(rows(2, 6, 7000, filters=("top_k", "top_p", "min_p")))
    args[TOP_K][::2], args[TOP_P][::2], args[MIN_P][::2] = 0, 1.0, 0.0
    args[TOP_K][1::2] = 7
    bare = draw([*args[:TOP_K], None, None, None, *args[SEED:]])
    assert_same_bits(tuple(t[::2] for t in draw(args)), tuple(t[::2] for t in bare))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filters", [(), ("top_k", "top_p", "min_p")], ids=str)
def test_cuda_graph_replay(filters: tuple[str, ...], mode: str) -> None:
    """Capture once, replay with other inputs, filters included: nothing was read on the host."""
    args = on_gpu(rows(4, 8, 32_000, torch.bfloat16, mode, filters))
    draw(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw(args)
    for _ in range(3):
        fresh = on_gpu(rows(4, 8, 32_000, torch.bfloat16, mode, filters))
        for captured_input, new in zip(args, fresh, strict=True):
            if isinstance(captured_input, Tensor):
                captured_input.copy_(new)
        graph.replay()
        assert_same_bits(captured, draw(fresh))


@pytest.mark.parametrize("filters", [(), ("top_k",)], ids=str)
def test_more_rows_than_a_grid_axis(filters: tuple[str, ...]) -> None:
    args = on_gpu(rows(1, 70_001, 130, filters=filters))
    drawn = draw(args)
    last = draw(pick(args, slice(-1, None)))
    assert_same_bits(tuple(t[-1:] for t in drawn), last)


@pytest.mark.slow
@pytest.mark.parametrize("filters", [(), ("top_k", "top_p")], ids=str)
def test_more_than_two_to_the_31_logits(filters: tuple[str, ...]) -> None:
    batch, vocab_size = 14_200, 151_936
    if torch.cuda.mem_get_info()[0] < (16 if filters else 8) * 2**30:
        pytest.skip("needs 8 GB of GPU memory, with filters 16 GB")
    args = on_gpu(rows(1, batch, 1, filters=filters))
    args[LOGITS] = torch.randn(1, batch, vocab_size, device=DEVICE, dtype=torch.bfloat16)
    drawn = draw(args)
    tail = each(pick(args, slice(-4, None)), lambda _, a: a.cpu())
    wanted = reference.sample(*tail)
    assert torch.equal(drawn[0][-4:].cpu(), wanted[0])
    for one, other in zip(drawn[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one[-4:].cpu(), other, rtol=1e-6, atol=1e-6)


def test_errors() -> None:
    args = on_gpu(rows(2, 3, 5, filters=("top_k",)))

    def public(**changed: Any) -> None:
        names = {"weights": WEIGHTS, "top_k": TOP_K, "seed": SEED, "position": POSITION}
        given = {name: args[i] for name, i in names.items()}
        sample(args[LOGITS], backend="cuda", **{**given, **changed})

    with pytest.raises(ValueError, match="mode must be"):
        public(mode="harmonic")
    with pytest.raises(ValueError, match="seed must be on cuda"):
        public(seed=args[SEED].cpu())
    with pytest.raises(TypeError, match="top_k must be an integer tensor"):
        public(top_k=args[TOP_K].float())
    with pytest.raises(ValueError, match=r"top_k must be a number or have shape \[3\]"):
        public(top_k=args[TOP_K][:2])
