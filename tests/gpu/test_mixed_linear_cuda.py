"""The CUDA decode kernel of mixed_linear against the reference. Needs a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clp_kernels import mixed_linear, native
from clp_kernels.ops.mixed_linear import cuda as cuda_mixed_linear
from clp_kernels.ops.mixed_linear import reference
from clp_kernels.testing import (
    WEIGHT_KINDS,
    assert_within_budget,
    expanded,
    noncontiguous,
    weight_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.cuda_missing() is not None, reason=str(native.cuda_missing())),
]

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
NAN = float("nan")


def inputs(
    tokens: int,
    in_features: int,
    out_features: int,
    m: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    kind: str = "all_different",
    bias: bool = True,
) -> list[Any]:
    """Arguments of mixed_linear on the GPU, one row of weights a token."""
    scale = max(1, in_features) ** -0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    return [
        normal(tokens, in_features).to(dtype),
        (scale * normal(m, out_features, in_features)).to(dtype),
        weight_rows(kind, tokens, m, device=DEVICE),
        normal(m, out_features).to(dtype) if bias else None,
        None,
        False,
    ]


def run(args: list[Any]) -> Tensor:
    assert cuda_mixed_linear.why_not(*args) is None
    return cuda_mixed_linear.mixed_linear(*args)


def assert_equals_reference(args: list[Any]) -> None:
    y = run(args)
    assert y.is_contiguous() and y.dtype == args[0].dtype
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    assert_within_budget(y, reference.mixed_linear(*wide), reference.mixed_linear(*args), name="y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 9, 17, 33])
def test_small_equals_reference(tokens: int, dtype: torch.dtype) -> None:
    for in_features, out_features in ((8, 1), (64, 8), (168, 65), (896, 172), (2048, 30)):
        for m in (1, 2, 3, 5):
            assert_equals_reference(inputs(tokens, in_features, out_features, m, dtype))


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_small_weight_kinds(kind: str) -> None:
    for dtype in DTYPES:
        assert_equals_reference(inputs(5, 128, 70, 3, dtype, kind))
        assert_equals_reference(inputs(5, 128, 70, 3, dtype, kind, bias=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 16, 32, 64, 129, 256])
def test_decode_sizes(tokens: int, dtype: torch.dtype) -> None:
    for in_features, out_features in ((4096, 4096), (4096, 1024), (2048, 11_008), (14_336, 2049)):
        assert_equals_reference(inputs(tokens, in_features, out_features, 3, dtype))


def test_small_zero_weight_leaves_nothing_of_its_expert() -> None:
    for tokens in (6, 40):
        args = inputs(tokens, 264, 70, 3)
        args[2][:, 1] = 0
        args[2][3] = 0
        wanted = run(args)
        assert wanted[3].eq(0).all()
        args[1][1], args[3][1] = NAN, NAN
        assert torch.equal(run(args), wanted)


def test_small_one_hot_is_the_single_expert() -> None:
    args = inputs(6, 264, 70, 3, kind="one_hot")
    y = run(args)
    for i in range(3):
        rows = torch.ones(6, 1, device=DEVICE)
        single = run([args[0], args[1][i : i + 1], rows, args[3][i : i + 1], *args[4:]])
        assert torch.equal(y[i::3], single[i::3])


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_small_example_ids(ids_dtype: torch.dtype) -> None:
    args = inputs(11, 72, 33, 3)
    ids = torch.tensor([2, 0, 1, 1, 2, 2, 0, 3, 0, 1, 3], device=DEVICE)
    table = weight_rows("negative", 4, 3, device=DEVICE)
    got = run([*args[:2], table, args[3], ids.to(ids_dtype), False])
    assert torch.equal(got, run([*args[:2], table[ids], *args[3:]]))


def test_small_tokens_of_an_example_share_its_row() -> None:
    args = inputs(12, 72, 33, 3)
    table = weight_rows("negative", 4, 3, device=DEVICE)
    y = run([args[0].view(4, 3, 72), args[1], table, *args[3:]])
    assert y.shape == (4, 3, 33)
    flat = run([*args[:2], table.repeat_interleave(3, 0), *args[3:]])
    assert torch.equal(y.view(12, 33), flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_any_strides(dtype: torch.dtype) -> None:
    args = inputs(9, 72, 33, 3, dtype)
    args[4] = torch.arange(9, dtype=torch.int32, device=DEVICE)
    wanted = run(args)
    assert torch.equal(
        run([noncontiguous(a) if isinstance(a, Tensor) else a for a in args]), wanted
    )
    for place in range(4):
        spread = list(args)
        spread[place] = expanded(args[place])
        dense = list(args)
        dense[place] = spread[place].contiguous()
        assert torch.equal(run(spread), run(dense))


def test_small_not_aligned() -> None:
    args = inputs(5, 72, 33)
    wanted = run(args)
    for place in (0, 1):
        shifted = list(args)
        store = torch.full((args[place].numel() + 1,), NAN, dtype=args[place].dtype, device=DEVICE)
        store[1:] = args[place].flatten()
        shifted[place] = store[1:].view(args[place].shape)
        assert torch.equal(run(shifted), wanted)


def test_small_empty() -> None:
    for tokens, m, in_features, out_features in (
        (0, 2, 16, 9),
        (3, 0, 16, 9),
        (3, 2, 0, 9),
        (3, 2, 16, 0),
    ):
        args = inputs(tokens, in_features, out_features, m)
        y, wanted = run(args), reference.mixed_linear(*args)
        assert y.shape == wanted.shape
        torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(264, 70), (4096, 130)])
def test_row_bits_are_its_own(in_features: int, out_features: int, dtype: torch.dtype) -> None:
    """The same bits at any number of tokens, at any place, and in two runs."""
    args = inputs(70, in_features, out_features, 3, dtype)
    wanted = run(args)
    assert torch.equal(run(args), wanted)
    for first, last in ((0, 1), (3, 10), (5, 13), (60, 70), (1, 18), (37, 70), (2, 67)):
        part = [args[0][first:last], args[1], args[2][first:last], *args[3:]]
        assert torch.equal(run(part), wanted[first:last])
    order = torch.randperm(70).to(DEVICE)
    assert torch.equal(run([args[0][order], args[1], args[2][order], *args[3:]]), wanted[order])


def test_cuda_graph_replay() -> None:
    """Capture once, replay with other inputs: nothing was read on the host."""
    args = inputs(8, 2048, 2048, 4)
    args[4] = torch.arange(8, dtype=torch.int32, device=DEVICE)
    run(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(args)
    for _ in range(3):
        fresh = inputs(8, 2048, 2048, 4, kind="zero")
        fresh[4] = torch.randint(0, 8, (8,), dtype=torch.int32, device=DEVICE)
        for captured_input, new in zip(args, fresh, strict=True):
            if isinstance(captured_input, Tensor):
                captured_input.copy_(new)
        graph.replay()
        assert torch.equal(captured, run(fresh))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of GPU memory")
    args = inputs(3, 4096, 64, bias=False)
    experts = torch.zeros(2, 2**18 + 64, 4096, dtype=torch.bfloat16, device=DEVICE)
    experts[:, -64:] = args[1]
    y = run([args[0], experts, *args[2:]])
    assert torch.equal(y[:, :-64], torch.zeros_like(y[:, :-64]))
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    assert_within_budget(
        y[:, -64:], reference.mixed_linear(*wide), reference.mixed_linear(*args), name="y"
    )


def test_errors() -> None:
    args = inputs(4, 64, 40)[:3]
    with pytest.raises(RuntimeError, match=r"bfloat16 and float16, not torch\.float32"):
        mixed_linear(*(a.float() for a in args), backend="cuda")
    with pytest.raises(ValueError, match="expert_weight must be on cuda"):
        mixed_linear(args[0], args[1].cpu(), args[2], backend="cuda")
    with pytest.raises(ValueError, match="weights must have shape"):
        mixed_linear(*args[:2], args[2][:3], backend="cuda")
