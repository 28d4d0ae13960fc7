"""The Triton backend of linear_logprob on a GPU, held to float64.

Needs no conftest.py.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from clp_kernels.ops.linear_logprob import triton as backend
from clp_kernels.testing import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(backend.INTERPRETED, reason="TRITON_INTERPRET=1 hides the GPU"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("logprobs", "entropy", "kl", "slope", "kl_slope")
Arguments = tuple[Any, ...]


@pytest.fixture(autouse=True)
def _poison() -> Any:
    """torch.empty gives NaN, so that an unwritten output fails its test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens and of ids."""
    monkeypatch.setattr(backend, "BLOCK_TOKENS", 40)
    monkeypatch.setattr(backend, "BLOCK_LOGITS", 40 * 1300)


def arguments(
    tokens: int, vocab_size: int, dim: int, dtype: torch.dtype, *, bias: bool, m: int = 0
) -> Arguments:
    """Of the op, with entropy, reference and slopes; every fourth token is ignored.

    m: experts of a mixed head, with weights of any sign for three examples; 0 for a plain head.
    """
    hidden, ref = (torch.randn(tokens, dim, device="cuda").to(dtype) for _ in range(2))
    shape = (m, vocab_size) if m else (vocab_size,)
    head = (2 * torch.randn(*shape, dim, device="cuda") * dim**-0.5).to(dtype)
    targets = torch.randint(vocab_size, (tokens,), device="cuda")
    targets[3::4] = -100
    added = torch.randn(shape, device="cuda").to(dtype) if bias else None
    temperature = torch.rand(tokens, device="cuda") + 0.5
    mixture: tuple[Tensor | None, Tensor | None] = (None, None)
    if m:
        mixture = (
            torch.randn(3, m, device="cuda"),
            torch.randint(3, (tokens,), device="cuda"),
        )
    return hidden, head, targets, added, *mixture, temperature, True, ref, True, False


def in_double(args: Arguments) -> Arguments:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def plain(args: Arguments) -> list[Tensor]:
    """From materialised logits in the dtype of the inputs; slopes by autograd."""
    hidden, head, targets, bias, weights, ids, temperature, _, ref, _, _ = args
    hidden = hidden.detach().requires_grad_()
    tau = temperature.to(hidden.dtype)[:, None]

    def logits(x: Tensor) -> Tensor:
        if weights is None:
            return torch.nn.functional.linear(x, head, bias)
        columns = weights.to(x.dtype)[ids]
        added = [None] * len(head) if bias is None else bias
        each = map(torch.nn.functional.linear, itertools.repeat(x), head, added)
        total: Tensor = sum(columns[:, i, None] * z for i, z in enumerate(each))
        return total

    logp, logq = (logits(x).div(tau).log_softmax(-1) for x in (hidden, ref))
    used = targets != -100
    picked = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0] * used
    p = logp.exp()
    kl = torch.where(p > 0, p * (logp - logq), 0).sum(-1) * used
    entropy = -torch.where(p > 0, p * logp, 0).sum(-1) * used
    slopes = [torch.autograd.grad(o.sum(), hidden, retain_graph=True)[0] for o in (picked, kl)]
    return [t.detach() for t in (picked, entropy, kl, *slopes)]


def check(args: Arguments) -> None:
    got = backend.linear_logprob(*args)
    wide, same = plain(in_double(args)), plain(args)
    for i, (name, *three) in enumerate(zip(NAMES, got, wide, same, strict=True)):
        assert got[i].dtype == (torch.float32 if i < 3 else args[0].dtype), name
        assert got[i].is_cuda, name
        assert_within_budget(*three, name=name)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_small_within_budget(dtype: torch.dtype, bias: bool) -> None:
    for tokens, dim in ((4, 24), (40, 64), (41, 8), (130, 128)):
        for vocab_size in (31, 128, 1023, 1280, 1281, 4099):
            check(arguments(tokens, vocab_size, dim, dtype, bias=bias))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_small_mixed_head_within_budget(dtype: torch.dtype, m: int) -> None:
    for tokens, dim, bias in ((4, 24, True), (41, 8, False), (130, 128, True)):
        for vocab_size in (31, 1280, 1281, 4099):
            check(arguments(tokens, vocab_size, dim, dtype, bias=bias, m=m))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [50_257, 151_936])
def test_large_vocabulary(dtype: torch.dtype, vocab_size: int) -> None:
    check(arguments(700, vocab_size, 256, dtype, bias=False))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", [1, -1])
def test_small_largest_logit_comes_last_or_first(order: int) -> None:
    args = list(arguments(41, 4099, 24, torch.float32, bias=True))
    args[3] = order * torch.linspace(-300, 300, 4099, device="cuda")
    for target in (4098 if order > 0 else 0, 2000):
        args[2] = torch.full((41,), target, device="cuda")
        check(tuple(args))


@pytest.mark.usefixtures("small_blocks")
def test_small_one_id_is_left() -> None:
    args = list(arguments(41, 4099, 24, torch.float32, bias=True))
    args[3][:] = -torch.inf
    args[3][3000] = 0.0
    args[2] = torch.full((41,), 3000, device="cuda")
    logprobs, entropy, kl, slope, kl_slope = backend.linear_logprob(*args)
    assert not logprobs.any() and not kl.any() and entropy.abs().max() < 1e-6
    assert slope.abs().max() < 1e-6 and kl_slope.abs().max() < 1e-6


@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_two_runs_give_the_same_bits_and_a_graph_the_same_values(
    dtype: torch.dtype, m: int
) -> None:
    """A capture also fails where anything is read on the host."""
    args = arguments(70, 5000, 64, dtype, bias=True, m=m)
    first, again = (backend.linear_logprob(*args) for _ in range(2))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.linear_logprob(*args)
    graph.replay()
    torch.cuda.synchronize()
    for name, *three in zip(NAMES, first, again, captured, strict=True):
        assert torch.equal(three[0], three[1]), name
        # cuBLAS may choose otherwise in a capture, where it has another workspace: float32 sums in
        # another order, and slopes of 16 bits a rounding apart.
        wide = three[0].dtype == torch.float32
        tolerance = 1e-5 if wide else 2.0**-7
        torch.testing.assert_close(three[2], three[0], rtol=tolerance, atol=tolerance, msg=name)


def test_small_what_is_not_asked_for_is_empty_and_on_the_gpu() -> None:
    args = arguments(8, 300, 24, torch.bfloat16, bias=False)
    bare = backend.linear_logprob(*args[:7], False, None, False, False)
    assert [t.numel() for t in bare] == [8, 0, 0, 0, 0]
    assert all(t.is_cuda for t in bare)
