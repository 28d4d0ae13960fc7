"""The CUDA sampling kernel against the reference on the CPU. Needs a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clp_kernels import native, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.cuda_missing() is not None, reason=str(native.cuda_missing())),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


def rows(m: int, batch: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of a draw, on the CPU: weights of any sign, every temperature."""
    return [
        (3 * torch.randn(m, batch, vocab_size)).to(dtype),
        None if m == 1 else torch.randn(batch, m),
        "geometric",
        torch.tensor([0.0, 0.3, 1.0, 3.0]).repeat(batch)[:batch],
        torch.randint(-(2**63), 2**63 - 1, (batch,)),
        torch.randint(2**31, 2**40, (batch,)),
    ]


def on_gpu(args: list[Any]) -> list[Any]:
    return [a.cuda() if isinstance(a, Tensor) else a for a in args]


def assert_equals_reference(args: list[Any]) -> None:
    logits, weights, mode, temperature, seed, position = args
    tokens, logprobs, _ = reference.sample(
        logits, weights, mode, temperature, None, None, None, seed, position
    )
    actual = native.sample_cuda(*on_gpu(args))
    assert torch.equal(actual[0].cpu(), tokens)
    torch.testing.assert_close(actual[1].cpu(), logprobs, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 7, 31, 64, 257, 1000, 2048, 2049, 4099, 50_257])
def test_small_equals_reference(vocab_size: int, dtype: torch.dtype) -> None:
    for m in range(1, 7):
        for batch in (0, 1, 2, 9):
            assert_equals_reference(rows(m, batch, vocab_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_vocabulary(dtype: torch.dtype) -> None:
    for m in (1, 4):
        assert_equals_reference(rows(m, 8, 151_936, dtype))


@pytest.mark.parametrize("scale", [1e4, 1e9, 1e17, 3e38])
def test_small_huge_logits(scale: float) -> None:
    args = rows(1, 4, 5000)
    args[0][:] = scale
    args[0][:, 2, ::3] = -scale
    args[0][:, 3] *= 1 - torch.rand(5000) * 1e-6
    assert_equals_reference(args)


@pytest.mark.parametrize("margin", [1e-3, -1e-3])
def test_small_largest_noise_is_not_pruned(margin: float) -> None:
    """Id 510 of (seed 7, position 115434) has the word 0xffffffff: noise 22.87, once in 2^32."""
    seed, position = torch.tensor([7]), torch.tensor([115_434])
    noise = reference.gumbel(reference.philox_uniform(seed, position, 512))[0]
    logits = torch.full((1, 1, 512), -60.0)
    logits[0, 0, 0], logits[0, 0, 510] = 0.0, noise[0] - noise[510] + margin
    assert_equals_reference([logits, None, "geometric", torch.ones(1), seed, position])


def test_small_bad_rows() -> None:
    args = rows(1, 6, 5000)
    args[0][0, 0] = -INF
    args[0][0, 1, 4500] = NAN
    args[0][0, 2, 3] = INF
    args[0][0, 3, :4990] = -INF
    args[0][0, 4] = -INF
    args[0][0, 4, 4999] = NAN
    tokens = native.sample_cuda(*on_gpu(args))[0]
    assert (tokens >= 0).tolist() == [False, False, False, True, False, True]
    assert_equals_reference(args)


def test_small_weights_and_infinities() -> None:
    """A term of weight 0 is not looked at; an active -inf decides, whatever stands beside it."""
    args = rows(4, 6, 600)
    logits, weights = args[0], args[1]
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


def test_small_mix_has_the_bits_of_the_cpu() -> None:
    """Greedy over sums that differ in the last bit: one fused multiply-add would show."""
    args = rows(5, 64, 3000, torch.bfloat16)
    args[3][:] = 0
    assert torch.equal(native.sample_cuda(*on_gpu(args))[0].cpu(), native.sample_cpu(*args)[0])


def test_small_row_bits_are_its_own() -> None:
    args = on_gpu(rows(3, 5, 20_011))
    tokens, logprobs = native.sample_cuda(*args)
    padded = torch.full((5, 3, 20_017), NAN, device="cuda")[:, :, 3:20_014].transpose(0, 1)
    padded.copy_(args[0])
    order = torch.tensor([4, 0, 3], device="cuda")
    variants = [
        ([padded, *args[1:]], torch.arange(5, device="cuda")),
        ([args[0][:, order], args[1][order], args[2], *(a[order] for a in args[3:])], order),
    ]
    for variant, which in variants:
        again = native.sample_cuda(*variant)
        assert torch.equal(again[0], tokens[which])
        assert torch.equal(again[1], logprobs[which])


def test_cuda_graph_replay() -> None:
    """Capture once, replay with other inputs: nothing was read on the host."""
    args = on_gpu(rows(4, 8, 32_000, torch.bfloat16))
    native.sample_cuda(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = native.sample_cuda(*args)
    for _ in range(2):
        fresh = on_gpu(rows(4, 8, 32_000, torch.bfloat16))
        for held, new in zip(args, fresh, strict=True):
            if isinstance(held, Tensor):
                held.copy_(new)
        graph.replay()
        wanted = native.sample_cuda(*fresh)
        assert torch.equal(captured[0], wanted[0])
        assert torch.equal(captured[1], wanted[1])


def test_more_rows_than_a_grid_axis() -> None:
    args = on_gpu(rows(1, 70_001, 130))
    tokens, _ = native.sample_cuda(*args)
    last = native.sample_cuda(args[0][:, -1:], None, args[2], *(a[-1:] for a in args[3:]))
    assert tokens[-1] == last[0][0]


@pytest.mark.slow
def test_more_than_two_to_the_31_logits() -> None:
    batch, vocab_size = 14_200, 151_936
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of GPU memory")
    logits = torch.randn(1, batch, vocab_size, device="cuda", dtype=torch.bfloat16)
    args = on_gpu(rows(1, batch, 1))
    tokens, logprobs = native.sample_cuda(logits, *args[1:])
    tail = [logits[:, -4:].cpu(), None, "geometric", *(a[-4:].cpu() for a in args[3:])]
    wanted = reference.sample(*tail[:4], None, None, None, *tail[4:])
    assert torch.equal(tokens[-4:].cpu(), wanted[0])
    torch.testing.assert_close(logprobs[-4:].cpu(), wanted[1], rtol=1e-6, atol=1e-6)


def test_errors() -> None:
    args = on_gpu(rows(2, 3, 5))
    with pytest.raises(ValueError, match="mode must be"):
        native.sample_cuda(*args[:2], "probability", *args[3:])
    with pytest.raises(ValueError, match="seed must be on cuda"):
        native.sample_cuda(*args[:4], args[4].cpu(), args[5])
