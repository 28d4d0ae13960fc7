"""The Triton backend of linear_logprob on a GPU, held to float64. Needs a GPU."""

from functools import partial

import cases
import pytest
import torch
from cases import BF16, DTYPES, F32, HEAD_NAMES, head_inputs
from launches import TRITON_GPU

from clp_kernels.ops.linear_logprob import triton as backend
from clp_kernels.ops.linear_logprob.head import Inputs

pytestmark = TRITON_GPU


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens and of ids."""
    monkeypatch.setattr(backend, "BLOCK_TOKENS", 40)
    monkeypatch.setattr(backend, "BLOCK_LOGITS", 40 * 1300)


arguments = partial(head_inputs, device="cuda")


def check(inputs: Inputs) -> None:
    cases.judge_head([backend.linear_logprob(inputs, True, True)], [inputs])


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
    bias = order * torch.linspace(-300, 300, 4099, device="cuda")
    inputs = arguments(41, 4099, 24, F32, bias=True)._replace(bias=bias)
    for target in (4098 if order > 0 else 0, 2000):
        check(inputs._replace(targets=torch.full((41,), target, device="cuda")))


@pytest.mark.usefixtures("small_blocks")
def test_small_one_id_is_left() -> None:
    cases.check_one_id_is_left(backend, arguments(41, 4099, 24, F32, bias=True), 3000)


@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_two_runs_give_the_same_bits_and_a_graph_the_same_values(
    dtype: torch.dtype, m: int
) -> None:
    """A capture also fails where anything is read on the host."""
    args = arguments(70, 5000, 64, dtype, bias=True, m=m), True, True
    first, again = (backend.linear_logprob(*args) for _ in range(2))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.linear_logprob(*args)
    graph.replay()
    torch.cuda.synchronize()
    for name, *three in zip(HEAD_NAMES, first, again, captured, strict=True):
        assert torch.equal(three[0], three[1]), name
        # cuBLAS may choose otherwise in a capture, where it has another workspace: float32 sums in
        # another order, and gradients of 16 bits a rounding apart.
        wide = three[0].dtype == F32
        tolerance = 1e-5 if wide else 2.0**-7
        torch.testing.assert_close(three[2], three[0], rtol=tolerance, atol=tolerance, msg=name)


def test_small_what_is_not_asked_for_is_empty_and_on_the_gpu() -> None:
    inputs = arguments(8, 300, 24, BF16, bias=False)
    bare = backend.linear_logprob(inputs._replace(ref_hidden=None), False, False)
    assert [t.numel() for t in bare] == [8, 0, 0, 0, 0]
    assert all(t.is_cuda for t in bare)
