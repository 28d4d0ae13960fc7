"""The CUDA decode kernel of mixed_lora against the reference. Needs a GPU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels import mixed_lora, native
from clp_kernels.ops.mixed_lora import cuda as cuda_mixed_lora
from clp_kernels.ops.mixed_lora import reference
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
HALVES = (torch.bfloat16, torch.float16)
DTYPES = [(x, lora) for x in HALVES for lora in (x, torch.float32)]
INF, NAN = float("inf"), float("nan")


def inputs(
    tokens: int,
    in_features: int,
    out_features: int,
    m: int = 2,
    r: int = 8,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.bfloat16),
    kind: str = "all_different",
    bias: bool = True,
) -> list[Any]:
    """Arguments of mixed_lora on the GPU, one row of weights a token."""
    dtype, lora_dtype = dtypes
    scale = max(1, in_features) ** -0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    return [
        normal(tokens, in_features).to(dtype),
        (scale * normal(out_features, in_features)).to(dtype),
        (scale * normal(m, r, in_features)).to(lora_dtype),
        normal(m, out_features, r).to(lora_dtype),
        weight_rows(kind, tokens, m, device=DEVICE),
        normal(out_features).to(dtype) if bias else None,
        None,
        False,
    ]


def in_float64(args: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def run(args: list[Any]) -> tuple[Tensor, Tensor]:
    assert cuda_mixed_lora.why_not(*args) is None
    return cuda_mixed_lora.mixed_lora(*args)


def assert_equals_reference(args: list[Any]) -> None:
    y, u = run(args)
    assert y.is_contiguous() and u.is_contiguous()
    y64, u64 = reference.mixed_lora(*in_float64(args))
    y_same, u_same = reference.mixed_lora(*args)
    assert y.dtype == y_same.dtype and u.dtype == u_same.dtype
    assert_within_budget(y, y64, y_same, name="y")
    assert_within_budget(u, u64, u_same, name="u")


def assert_same_bits(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 9, 17, 33])
def test_small_equals_reference(tokens: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for in_features, out_features in ((8, 1), (64, 8), (168, 65), (896, 172), (2048, 30)):
        for m, r in ((1, 1), (2, 4), (3, 12), (5, 16)):
            assert_equals_reference(inputs(tokens, in_features, out_features, m, r, dtypes))


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_small_weight_kinds(kind: str) -> None:
    for dtypes in DTYPES:
        assert_equals_reference(inputs(5, 128, 70, 3, 8, dtypes, kind))
        assert_equals_reference(inputs(5, 128, 70, 3, 8, dtypes, kind, bias=False))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 16, 32, 64, 129, 256])
def test_decode_sizes(tokens: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for in_features, out_features in ((4096, 4096), (4096, 1024), (2048, 11_008), (14_336, 2049)):
        assert_equals_reference(inputs(tokens, in_features, out_features, 4, 16, dtypes))


def test_many_ranks() -> None:
    for m, r in ((8, 64), (1, 64), (13, 5)):
        assert_equals_reference(inputs(19, 512, 200, m, r))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_small_zero_rows_are_bare(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """0 * inf must not leak, and the bits do not depend on what A and B hold."""
    args = inputs(6, 264, 70, 2, 8, dtypes)
    args[4][::2] = 0
    wanted = run(args)[0]
    bare = run([*args[:4], torch.zeros_like(args[4]), *args[5:]])[0]
    assert torch.equal(wanted[::2], bare[::2])
    args[2][0, 3, 5], args[2][1, 0], args[3][1, 60] = INF, NAN, -INF
    got = run(args)[0]
    assert torch.equal(got[::2], bare[::2])
    assert not got[1::2].isfinite().all(1).any()


def test_small_zero_weight_leaves_nothing_of_its_adapter() -> None:
    args = inputs(6, 264, 70, 3, 8)
    args[4][:, 1] = 0
    wanted = run(args)[0]
    args[2][1], args[3][1] = INF, NAN
    assert torch.equal(run(args)[0], wanted)


def test_small_infinite_adapter_is_where_the_reference_has_it() -> None:
    for dtypes in DTYPES:
        args = inputs(4, 64, 40, 2, 4, dtypes, bias=False)
        args[3][0, 33, 2] = INF
        args[2][1, 1, 7] = -INF
        args[3][1] = args[3][1].abs() + 1
        assert_equals_reference(args)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_small_float32_between_the_products(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """4097 - 4096, where 4097 is in u, and for float32 matrices in A or in B."""
    args = inputs(1, 8, 1, 1, 1, dtypes, kind="uniform", bias=False)
    x, base_weight, lora_A, lora_B = (args[place].zero_() for place in range(4))
    x[0, :2] = torch.tensor([64.0, 1.0])
    base_weight[0, 0] = -64
    lora_A[0, 0, :2], lora_B[:] = torch.tensor([64.0, 1.0]), 1
    assert run(args)[0].item() == 1
    assert run(args)[1].item() == 4097
    if dtypes[1] == torch.float32:
        lora_A[0, 0, :2] = torch.tensor([0.0, 4097.0])
        assert run(args)[0].item() == 1
        lora_A[0, 0, 1], lora_B[:] = 1, 4097
        assert run(args)[0].item() == 1


def test_small_negative_zero_of_a_bare_row() -> None:
    args = inputs(3, 64, 40, bias=False)
    args[0].zero_()
    args[1] = args[1].abs().neg()
    args[4].zero_()
    args[5] = torch.full((40,), -0.0, dtype=args[0].dtype, device=DEVICE)
    y = run(args)[0]
    assert torch.equal(y, torch.zeros_like(y))


def test_small_one_hot_is_the_single_adapter() -> None:
    args = inputs(6, 264, 70, 3, 8, kind="one_hot")
    y, u = run(args)
    for i in range(3):
        one = [t[i : i + 1] for t in args[2:4]]
        rows = torch.ones(6, 1, device=DEVICE)
        single_y, single_u = run([*args[:2], *one, rows, *args[5:]])
        assert torch.equal(y[i::3], single_y[i::3])
        assert torch.equal(u[:, 8 * i : 8 * i + 8], single_u)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_small_example_ids(ids_dtype: torch.dtype) -> None:
    args = inputs(11, 72, 33, 3, 4)
    ids = torch.tensor([2, 0, 1, 1, 2, 2, 0, 3, 0, 1, 3], device=DEVICE)
    table = weight_rows("negative", 4, 3, device=DEVICE)
    got = run([*args[:4], table, args[5], ids.to(ids_dtype), False])
    assert_same_bits(got, run([*args[:4], table[ids], *args[5:]]))


def test_small_tokens_of_an_example_share_its_row() -> None:
    args = inputs(12, 72, 33, 3, 4)
    table = weight_rows("negative", 4, 3, device=DEVICE)
    y, u = run([args[0].view(4, 3, 72), *args[1:4], table, *args[5:]])
    assert y.shape == (4, 3, 33) and u.shape == (4, 3, 12)
    flat = run([*args[:4], table.repeat_interleave(3, 0), *args[5:]])
    assert_same_bits((y.view(12, 33), u.view(12, 12)), flat)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_small_any_strides(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    args = inputs(9, 72, 33, 3, 4, dtypes)
    args[6] = torch.arange(9, dtype=torch.int32, device=DEVICE)
    wanted = run(args)
    scattered = [noncontiguous(a) if isinstance(a, Tensor) else a for a in args]
    assert_same_bits(run(scattered), wanted)
    for place in range(6):
        spread = list(args)
        spread[place] = expanded(args[place])
        dense = list(args)
        dense[place] = spread[place].contiguous()
        assert_same_bits(run(spread), run(dense))


def test_small_not_aligned() -> None:
    args = inputs(5, 72, 33)
    wanted = run(args)
    for place in (0, 1, 2):
        shifted = list(args)
        store = torch.full((args[place].numel() + 1,), NAN, dtype=args[place].dtype, device=DEVICE)
        store[1:] = args[place].flatten()
        shifted[place] = store[1:].view(args[place].shape)
        assert_same_bits(run(shifted), wanted)
    wide = torch.full((33, 80), NAN, dtype=args[1].dtype, device=DEVICE)
    wide[:, :72] = args[1]
    assert_same_bits(run([args[0], wide[:, :72], *args[2:]]), wanted)


def test_small_empty() -> None:
    for tokens, m, r, in_features, out_features in (
        (0, 2, 4, 16, 9),
        (3, 0, 4, 16, 9),
        (3, 2, 0, 16, 9),
        (3, 2, 4, 0, 9),
        (3, 2, 4, 16, 0),
    ):
        args = inputs(tokens, in_features, out_features, m, r)
        y, u = run(args)
        assert y.shape == (tokens, out_features) and u.shape == (tokens, m * r)
        if m * r * in_features == 0:
            bare = F.linear(args[0].float(), args[1].float(), args[5].float())
            torch.testing.assert_close(y.float(), bare, rtol=1e-2, atol=1e-2)
            assert u.eq(0).all()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(264, 70), (4096, 130)])
def test_row_bits_are_its_own(
    in_features: int, out_features: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """The same bits at any number of tokens, at any place, and in two runs."""
    args = inputs(70, in_features, out_features, 3, 12, dtypes)
    wanted = run(args)
    assert_same_bits(run(args), wanted)
    for first, last in ((0, 1), (3, 10), (5, 13), (60, 70), (1, 18), (37, 70), (2, 67)):
        part = [args[0][first:last], *args[1:4], args[4][first:last], *args[5:]]
        assert_same_bits(run(part), (wanted[0][first:last], wanted[1][first:last]))
    order = torch.randperm(70).to(DEVICE)
    moved = run([args[0][order], *args[1:4], args[4][order], *args[5:]])
    assert_same_bits(moved, (wanted[0][order], wanted[1][order]))


def test_u_is_ready_before_it_is_used() -> None:
    """Calls back to back, the second kernel of each started before the first has ended."""
    batches = [inputs(8, 4096, 512, 4, 16) for _ in range(3)]
    wanted = []
    for args in batches:
        wanted.append(run(args))
        torch.cuda.synchronize()
    for _ in range(50):
        got = [run(args) for args in batches]
        for one, other in zip(got, wanted, strict=True):
            assert_same_bits(one, other)


def test_cuda_graph_replay() -> None:
    """Capture once, replay with other inputs: nothing was read on the host."""
    args = inputs(8, 4096, 4096, 4, 16)
    args[6] = torch.arange(8, dtype=torch.int32, device=DEVICE)
    run(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(args)
    for _ in range(3):
        fresh = inputs(8, 4096, 4096, 4, 16, kind="zero")
        fresh[6] = torch.randint(0, 8, (8,), dtype=torch.int32, device=DEVICE)
        for captured_input, new in zip(args, fresh, strict=True):
            if isinstance(captured_input, Tensor):
                captured_input.copy_(new)
        graph.replay()
        assert_same_bits(captured, run(fresh))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of GPU memory")
    args = inputs(3, 4096, 64)
    tail = args[1].clone()
    args[1] = torch.zeros(2**19 + 64, 4096, dtype=torch.bfloat16, device=DEVICE)
    args[1][-64:] = tail
    args[3] = torch.randn(2, 2**19 + 64, 8, device=DEVICE).bfloat16()
    args[5] = None
    y, _ = run(args)
    small = [args[0], tail, args[2], args[3][:, -64:], *args[4:]]
    assert_within_budget(
        y[:, -64:],
        reference.mixed_lora(*in_float64(small))[0],
        reference.mixed_lora(*small)[0],
        name="y",
    )


def test_errors() -> None:
    args = inputs(4, 64, 40)[:5]
    with pytest.raises(RuntimeError, match=r"bfloat16 and float16, not torch\.float32"):
        mixed_lora(*(a.float() for a in args), backend="cuda")
    with pytest.raises(ValueError, match="base_weight must be on cuda"):
        mixed_lora(args[0], args[1].cpu(), *args[2:], backend="cuda")
    with pytest.raises(ValueError, match="weights must have shape"):
        mixed_lora(*args[:4], args[4][:3], backend="cuda")
