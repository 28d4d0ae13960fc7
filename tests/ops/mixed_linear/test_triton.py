"""The Triton kernels of mixed_linear in Triton's interpreter, held to the reference.

The interpreter runs float32 and float16; its bfloat16 dot product is wrong, so bfloat16 is compiled
(test_compile_gate.py) and runs in tests/gpu.
"""

import itertools
from typing import Any, NamedTuple

import cases
import numpy as np
import pairwise
import pytest
import torch
from cases import BF16, F16, F32, NAN, LinearInputs
from launches import INTERPRETER, Recorder, Witness, listed_keys, replace_kernels
from torch import Tensor

from clp_kernels import testing
from clp_kernels.ops import triton_launch
from clp_kernels.ops.mixed_linear import reference
from clp_kernels.ops.mixed_linear import triton as backend
from clp_kernels.ops.mixed_linear import triton_kernels as kernels

pytestmark = INTERPRETER
ALL = [True] * 4
DTYPES = (F32, F16)


class Case(NamedTuple):
    dtype: torch.dtype
    layout: str
    tokens: int
    in_features: int
    out_features: int
    m: int
    kind: str
    strides: str
    bias: bool
    invariant: bool


def inputs(case: Case) -> LinearInputs:
    g = torch.Generator().manual_seed(hash(case[2:6]) % 2**31)
    shape: tuple[int, ...] = (case.tokens,)
    batch, ids = case.tokens, None
    if case.layout == "padded":
        batch = next(d for d in (3, 2, 1) if case.tokens % d == 0)
        shape = (batch, case.tokens // batch)
    elif case.layout == "flat":
        # Six examples of unequal length, in any order; the last one has no token.
        batch = 6
        kind = (torch.int32, torch.int64)[case.m % 2]
        ids = (torch.rand(case.tokens, generator=g) ** 2 * 5).to(kind)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(case.dtype)

    x, dy = normal(*shape, case.in_features), normal(*shape, case.out_features)
    expert = normal(case.m, case.out_features, case.in_features)
    bias = normal(case.m, case.out_features) if case.bias else None
    weights = testing.weight_rows(case.kind, batch, case.m, generator=g)
    args = LinearInputs(dy, x, expert, weights, bias, ids)
    if case.strides == "gaps":
        return LinearInputs(*(t if t is None else testing.noncontiguous(t) for t in args))
    if case.strides == "expanded":
        x, dy, weights = map(testing.expanded, (x, dy, weights))
    elif case.strides == "sliced":
        # The last axis is dense and the others are not: read in place.
        padded = (torch.nn.functional.pad(t, (0, 3), value=NAN) for t in (x, dy, expert))
        x, dy, expert = (t[..., :-3] for t in padded)
    return LinearInputs(dy, x, expert, weights, bias, ids)


def cost(case: Case) -> int:
    """The interpreter's time, roughly: steps of the forward's inner loop and sums per example."""
    sizes = (case.tokens, case.in_features, case.out_features)
    tile = backend.plan(*sizes, case.m, case.dtype, (8, 0), case.invariant).forward
    blocks = (tile.block_t, tile.block_in, tile.block_out)
    t, i, o = (-(-size // block) for size, block in zip(sizes, blocks, strict=True))
    examples = case.tokens if case.layout == "rows" else 0
    return case.m * (t * i * o + examples // 4)


def sampled(count: int) -> list[Case]:
    axes = (
        DTYPES,
        ("rows", "padded", "flat"),
        (0, 1, 2, 7, 17, 64, 129),
        (1, 8, 64, 172, 300),
        (1, 8, 64, 172, 300),
        (1, 2, 3, 5, 8),
        testing.WEIGHT_KINDS,
        ("dense", "gaps", "expanded", "sliced"),
        (True, False),
        (True, False, False, False),
    )
    return cases.sampled(Case, axes, count, 3, lambda case: cost(case) <= 36)


LARGE = [
    Case(F32, "flat", 129, 64, 172, 2, "dirichlet", "dense", True, False),
    Case(F16, "padded", 129, 172, 64, 2, "negative", "sliced", True, False),
    Case(F16, "flat", 600, 64, 72, 2, "zero", "dense", True, False),
    Case(F32, "padded", 258, 24, 8, 2, "all_different", "dense", False, False),
    Case(F16, "rows", 3, 1100, 16, 2, "negative", "dense", True, False),
    Case(F32, "rows", 17, 600, 40, 1, "one_hot", "dense", True, False),
]


DRAWN = sampled(600)
COVERING = pairwise.covering(DRAWN, Case._fields, lambda case: 4 + cost(case))


def test_sample_covers_every_value() -> None:
    pairwise.check_covers(COVERING, DRAWN, Case._fields)
    columns = list(zip(*COVERING, strict=True))
    assert [len(set(column)) for column in columns] == [2, 3, 7, 5, 5, 5, 7, 4, 2, 2]


@pytest.mark.parametrize("case", [*COVERING, *LARGE], ids=cases.case_id)
def test_within_budget(case: Case) -> None:
    cases.judge_linear(backend, reference, inputs(case), case.invariant)


def small(dtype: torch.dtype = F32, layout: str = "flat", tokens: int = 40) -> LinearInputs:
    return inputs(Case(dtype, layout, tokens, 40, 24, 3, "negative", "dense", True, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unused_experts_may_hold_anything(dtype: torch.dtype) -> None:
    cases.check_unused_experts(backend, small(dtype, "rows", 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_row_is_no_part_of_the_gradients_of_the_experts(dtype: torch.dtype) -> None:
    args = small(dtype, "rows", 5)
    weights = args.weights.clone()
    weights[2] = 0
    dy = args.dy.clone()
    dy[2] = NAN
    keep = torch.tensor([0, 1, 3, 4])
    needs = [False, True, False, True]
    call = args.call()._replace(weights=weights)
    got = backend.mixed_linear_backward(call, dy, needs)
    call = call._replace(x=args.x[keep], weights=weights[keep])
    want = backend.mixed_linear_backward(call, dy[keep], needs)
    for index in (1, 3):
        assert torch.allclose(got[index], want[index], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    tokens = 520 if dtype == F16 else 130
    args = inputs(Case(dtype, "flat", tokens, 16, 8, 1, "negative", "dense", True, False))
    assert backend.plan(tokens, 16, 8, 1, dtype, (8, 0), False).token_splits > 1
    for first, second in zip(*(cases.linear_results(backend, args) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def matmul_by_column(a: Any, b: Any, dtype: Any) -> Any:
    """a @ b, every entry summed in the order of the inner axis."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        total += a[:, k : k + 1].astype(dtype) * b[k].astype(dtype)
    return total


@pytest.mark.parametrize("invariant", [True, False])
def test_the_mode_gives_a_row_the_same_bits_in_any_batch_and_is_needed(
    invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter's np.matmul rounds a row by its place in the tile, which the kernels under
    # test do not choose. tests/gpu compares the same rows on the hardware's own product.
    monkeypatch.setattr(np, "matmul", matmul_by_column)
    args = inputs(Case(F32, "rows", 260, 300, 8, 1, "negative", "dense", True, invariant))
    pairs = cases.rows_alone_and_together(backend, args, [(0, 1), (259, 260), (3, 20)], invariant)
    assert all(torch.equal(a, b) for a, b in pairs) == invariant


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("broken", ["x", "dy", "weights"])
def test_nan_stays_in_its_example(broken: str, layout: str) -> None:
    args = small(F32, layout, 42)
    rows = args.example_ids
    if rows is None:
        rows = torch.arange(3).repeat_interleave(14)
    needs = [True, False, True, False]

    def outputs(args: LinearInputs) -> tuple[Tensor, Tensor, Tensor]:
        y, dx, _, d_weights, _ = cases.linear_results(backend, args, needs=needs)
        return y.reshape(42, -1), dx.reshape(42, -1), d_weights

    clean = outputs(args)
    tensor = getattr(args, broken).clone()
    if broken == "weights":
        tensor[1] = NAN
    else:
        tensor.view(42, -1)[rows == 1] = NAN
    y, dx, d_weights = outputs(args._replace(**{broken: tensor}))
    others = torch.arange(args.weights.shape[0]) != 1
    assert torch.equal(y[rows != 1], clean[0][rows != 1])
    assert torch.equal(dx[rows != 1], clean[1][rows != 1])
    assert torch.equal(d_weights[others], clean[2][others])
    if broken != "dy":
        assert y[rows == 1].isnan().all()
    if broken != "weights":
        assert d_weights[1].isnan().all()


def test_gradients_not_asked_for_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs(Case(F32, "flat", 7, 8, 8, 1, "negative", "dense", True, False))
    launched: list[str] = []
    replace_kernels(monkeypatch, kernels, lambda *named: Recorder(*named, launched))
    complete = backend.mixed_linear_backward(args.call(), args.dy, ALL)
    expected = (
        {"mixed_product"},
        {"expert_gradient"},
        {"mixed_product", "bias_dot", "sum_planes", "sum_per_example"},
        {"bias_gradient"},
    )
    for needs in itertools.product([False, True], repeat=4):
        launched.clear()
        grads = backend.mixed_linear_backward(args.call(), args.dy, list(needs))
        asked = [names for names, need in zip(expected, needs, strict=True) if need]
        assert set(launched) == set().union(*asked)
        assert launched.count("mixed_product") == (needs[0] or needs[2])
        for grad, need, full in zip(grads, needs, complete, strict=True):
            if need:
                torch.testing.assert_close(grad, full, rtol=1e-5, atol=1e-5)
            else:
                assert grad.shape == (0,)


def without_optional(keys: set[Any]) -> set[Any]:
    """The variants without bias and ids, which are listed in some pairs only."""
    return {
        (
            name,
            *(frozenset((k, v) for k, v in p if k not in ("bias_ptr", "ids_ptr")) for p in parts),
        )
        for name, *parts in keys
    }


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_every_launch_is_a_listed_variant(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, seen = listed_keys(backend.variants(capability)), set[Any]()
    replace_kernels(monkeypatch, kernels, lambda _, kernel: Witness(kernel, seen))
    monkeypatch.setattr(backend, "capability_of", lambda x: capability)
    layouts, only = ("padded", "flat"), [[i == j for j in range(4)] for i in range(4)]
    for dtype, layout, tokens, size, invariant in itertools.product(
        (F32, BF16, F16), layouts, (16, 64, 256, 3000), (64, 700), (False, True)
    ):
        case = Case(dtype, layout, tokens, size, size, 1, "uniform", "dense", True, invariant)
        args = inputs(case)
        backend.mixed_linear(args.call(invariant))
        for needs in (ALL, *only):
            backend.mixed_linear_backward(args.call(invariant), args.dy, needs)
    seen, listed = without_optional(seen), without_optional(listed)
    assert seen <= listed, seen - listed
    assert {name for name, *_ in seen} == {name for name, *_ in listed}


def test_no_tokens_and_no_examples() -> None:
    for shape, batch in (((0, 5), 0), ((2, 0, 5), 2)):
        x, expert, bias = torch.randn(shape), torch.randn(3, 4, 5), torch.randn(3, 4)
        call = reference.Inputs(x, expert, torch.randn(batch, 3), bias, None, False)
        assert backend.mixed_linear(call).shape == (*shape[:-1], 4)
        dy = x.new_empty(*shape[:-1], 4)
        grads = backend.mixed_linear_backward(call, dy, ALL)
        assert [g.shape for g in grads] == [x.shape, expert.shape, (batch, 3), bias.shape]
        assert all((g == 0).all() for g in grads)


def test_a_token_of_an_example_that_does_not_exist_is_nan() -> None:
    args = small()
    ids = args.example_ids.clone()
    ids[3], ids[7] = 6, -1
    bad = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([3, 7]), True)
    y = backend.mixed_linear(args._replace(example_ids=ids).call())
    assert y[bad].isnan().all()
    assert torch.equal(y[~bad], backend.mixed_linear(args.call())[~bad])


@pytest.mark.parametrize(("w", "dy", "x"), [(2**13, 2**15, 2**-14), (2**-20, 2**-14, 2**15)])
def test_weighted_rows_of_dy_do_not_leave_the_range_of_float16(
    w: float, dy: float, x: float
) -> None:
    """w * dy is beyond float16's largest or below its smallest number, d_expert is not."""
    dy_row, x_row = torch.tensor([[dy]]).half(), torch.tensor([[x]]).half()
    call = reference.Inputs(
        x_row, torch.ones(1, 1, 1).half(), torch.tensor([[w]]), None, None, False
    )
    got = backend.mixed_linear_backward(call, dy_row, [False, True, False, False])[1]
    assert got.item() == w * dy * x


def test_offsets_beyond_two_to_the_31() -> None:
    """Two rows of x and two experts 2^31 elements apart, in memory that is never touched between.

    The same for dy; the addresses of outputs come from the same int64 token and column indices.
    """
    far = 2**31
    store = torch.from_numpy(np.zeros(far + 64, dtype=np.float16))
    x = store.as_strided((2, 8), (far, 1))
    dy = store.as_strided((2, 4), (far, 1), 8)
    expert = store.as_strided((2, 4, 8), (far, 8, 1), 16)
    for tensor in (x, dy, expert):
        tensor.copy_(torch.randn(tensor.shape))
    args = LinearInputs(dy, x, expert, torch.randn(2, 2), None, None)
    dense = LinearInputs(*(t if t is None else t.contiguous() for t in args))
    needs = [True, True, True, False]
    both = (cases.linear_results(backend, one, needs=needs) for one in (args, dense))
    assert all(map(torch.equal, *both))


@pytest.mark.parametrize(
    ("given", "tile", "splits"),
    [
        ((1, 4096, BF16, (9, 0), False), (16, 32, 128), (2, 1)),
        ((16, 4096, BF16, (9, 0), False), (16, 32, 128), (2, 1)),
        ((16, 2048, BF16, (9, 0), False), (16, 32, 128), (4, 1)),
        ((16, 128, BF16, (9, 0), False), (16, 32, 128), (1, 1)),
        ((16, 151_936, BF16, (9, 0), False), (16, 32, 128), (1, 1)),
        ((17, 4096, BF16, (9, 0), False), (64, 32, 64), (2, 1)),
        ((256, 4096, BF16, (9, 0), False), (128, 64, 64), (2, 1)),
        ((257, 4096, BF16, (9, 0), False), (128, 128, 64), (1, 1)),
        ((8192, 4096, BF16, (9, 0), False), (128, 128, 64), (1, 1)),
        ((8192, 4096, BF16, (8, 0), False), (128, 64, 64), (1, 1)),
        ((8192, 4096, BF16, (10, 0), False), (128, 64, 64), (1, 1)),
        ((8192, 256, BF16, (8, 0), False), (128, 64, 64), (1, 8)),
        ((8192, 256, BF16, (8, 0), True), (64, 64, 64), (1, 1)),
        ((1, 4096, F32, (8, 0), False), (16, 32, 32), (2, 1)),
        ((8192, 4096, F32, (8, 0), False), (32, 32, 32), (1, 1)),
    ],
)
def test_plan(given: tuple[Any, ...], tile: tuple[int, ...], splits: tuple[int, int]) -> None:
    tokens, size, *rest = given  # the dtype, the capability, whether it is invariant
    plan = backend.plan(tokens, size, size, 4, *rest)
    forward = plan.forward
    assert (forward.block_t, forward.block_out, forward.block_in) == tile
    assert (plan.forward_splits, plan.token_splits) == splits


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_invariant_plan_does_not_depend_on_the_tokens(dtype: torch.dtype) -> None:
    plans = {
        backend.plan(tokens, 4096, 4096, 4, dtype, (9, 0), True)
        for tokens in (1, 16, 17, 64, 65, 256, 257, 10**6)
    }
    assert len(plans) == 1


def test_why_not() -> None:
    call = small().call()
    assert backend.why_not(call) is None
    assert backend.why_not(call._replace(x=call.x.half()), None) is None
    assert "float64" in backend.why_not(call._replace(x=call.x.double()))
    assert "bfloat16" in backend.why_not(call._replace(x=call.x.bfloat16()))


def test_why_not_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    assert backend.why_not(small().call()) == "the inputs are on cpu, not on a GPU"
