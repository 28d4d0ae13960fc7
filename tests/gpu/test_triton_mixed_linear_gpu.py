"""The Triton kernels of mixed_linear on a GPU, held to the reference. Needs a GPU."""

from typing import Any

import cases
import pytest
import torch
from cases import BF16, DTYPES, LinearInputs
from launches import TRITON_GPU

from clp_kernels.ops.mixed_linear import reference
from clp_kernels.ops.mixed_linear import triton as backend
from clp_kernels.ops.mixed_linear.reference import Inputs
from clp_kernels.testing import expanded, noncontiguous

pytestmark = TRITON_GPU


def inputs(
    shape: tuple[int, ...], out_features: int, m: int, dtype: torch.dtype, *, flat: bool = False
) -> LinearInputs:
    """Weights of any sign."""
    size = {"device": "cuda", "dtype": dtype}
    batch = 5 if flat else shape[0]
    ids = torch.randint(0, 4, shape[:1], device="cuda", dtype=torch.int32) if flat else None
    return LinearInputs(
        torch.randn(*shape[:-1], out_features, **size),
        torch.randn(shape, **size),
        torch.randn(m, out_features, shape[-1], **size) / shape[-1] ** 0.5,
        torch.randn(batch, m, device="cuda"),
        torch.randn(m, out_features, **size),
        ids,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("invariant", [False, True])
def test_small_within_budget(dtype: torch.dtype, m: int, invariant: bool) -> None:
    for tokens in (1, 2, 7, 17, 64, 129):
        for in_features, out_features in ((1, 8), (64, 172), (300, 1), (172, 300)):
            for flat in (False, True):
                args = inputs((tokens, in_features), out_features, m, dtype, flat=flat)
                cases.judge_linear(backend, reference, args, invariant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4096), (16, 4096), (64, 2049), (256, 4096), (2, 1000, 896)])
def test_large_within_budget(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    cases.judge_linear(backend, reference, inputs(shape, 4096, 3, dtype), False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_strides(dtype: torch.dtype) -> None:
    args = inputs((3, 7, 40), 24, 2, dtype)
    gaps = LinearInputs(*(None if t is None else noncontiguous(t) for t in args))
    cases.judge_linear(backend, reference, gaps, False)
    args = inputs((3, 7, 40), 24, 2, dtype)
    args = args._replace(dy=expanded(args.dy), x=expanded(args.x))
    cases.judge_linear(backend, reference, args, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    for shape in ((16, 4096), (3000, 512)):
        args = inputs(shape, 512, 3, dtype, flat=True)
        first, second = (cases.linear_results(backend, args) for _ in range(2))
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invariant_mode_gives_a_row_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    args = inputs((700, 2049), 172, 3, dtype)
    ranges = [(0, 1), (699, 700), (5, 22), (1, 130)]
    for invariant in (True, False):
        pairs = cases.rows_alone_and_together(backend, args, ranges, invariant)
        assert all(torch.equal(a, b) for a, b in pairs) == invariant, "the mode is not needed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unused_experts_may_hold_anything(dtype: torch.dtype) -> None:
    cases.check_unused_experts(backend, inputs((5, 200), 100, 3, dtype))


def test_cuda_graph_replays_with_new_inputs() -> None:
    def fresh() -> dict[str, Any]:
        return inputs((16, 2048), 2048, 4, BF16).call()._asdict()

    cases.assert_graph_replays(lambda args: (backend.mixed_linear(Inputs(**args)),), fresh)


def test_more_than_two_to_the_31_elements() -> None:
    """3 experts of 2^30 elements: the last rows of the last expert lie beyond 2^31."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    expert = torch.zeros(3, 2**18, 2**12, device="cuda", dtype=BF16)
    expert[2, -64:] = torch.randn(64, 2**12, device="cuda")
    x = torch.randn(4, 2**12, device="cuda").bfloat16()
    weights = torch.randn(4, 3, device="cuda")
    call = Inputs(x, expert, weights, None, None, False)
    y = backend.mixed_linear(call)
    last = call._replace(expert_weight=expert[2:, -64:], weights=weights[:, 2:])
    small = backend.mixed_linear(last)
    assert not y[:, :-64].any()
    torch.testing.assert_close(y[:, -64:], small, rtol=1e-2, atol=1e-2)
