"""mixed_lora and mixed_linear on the CPU backend: the error budget over every pair of values of
1,500 drawn cases an op, the instruction sets, both sides of the crossover, zero rows, bits, and the
choice of path."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import cases
import pairwise
import pytest
import torch
import torch.nn.functional as F
from cases import BF16, CPU_KERNELS, F16, F32, F64, ISAS, Results, Runs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.ops import mixed_lora as bench_mixed_lora
from bench.timing import peak_bytes_cpu
from clp_kernels import batch_invariant, mixed_linear, mixed_lora, native, registry, testing
from clp_kernels.ops.mixed_linear import cpu as cpu_mixed_linear
from clp_kernels.ops.mixed_linear import reference
from clp_kernels.ops.mixed_linear.reference import Inputs
from clp_kernels.ops.mixed_lora import cpu as cpu_mixed_lora

pytestmark = CPU_KERNELS

OPS = ("mixed_lora", "mixed_linear")
CASES, PARTS = 1500, 4


@dataclass(frozen=True)
class Case:
    """One call. layout: "rows" x [B, in], "padded" x [B, T/B, in], "flat" x [T, in] with ids."""

    dtype: torch.dtype
    lora_dtype: torch.dtype
    layout: str
    tokens: int
    in_features: int
    out_features: int
    m: int
    r: int
    kind: str
    strides: str
    bias: bool
    scaling: str
    seed: int

    @property
    def batch(self) -> int:
        if self.layout == "rows":
            return self.tokens
        return {0: 2, 1: 1, 2: 1, 7: 7, 17: 1, 64: 8, 129: 3, 1000: 8}[self.tokens]

    @property
    def draws(self) -> int:
        """Tensors of few elements are drawn several times and judged together: plain PyTorch's
        error on one of them may be zero by luck."""
        least = min(self.batch * self.m, self.in_features, self.out_features)
        if self.scaling == "tensor":
            least = min(least, self.m)
        if self.strides == "expanded":
            least //= 4  # a stride of zero leaves few distinct values
        if self.tokens == 0 or least >= 32:
            return 1
        return 4 if least > 8 else 12

    @property
    def leading(self) -> tuple[int, ...]:
        if self.layout == "padded":
            return (self.batch, self.tokens // self.batch)
        return (self.tokens,)


@cache
def sampled(op: str) -> list[Case]:
    """CASES cases sampled from the product of all axes; 1 in 100 may be large."""
    rng = random.Random(op)
    sizes = (1, 8, 64, 172, 896, 2049, 4096)
    found: list[Case] = []
    while len(found) < CASES:
        dtype = rng.choice((F32, BF16, F16))
        case = Case(
            dtype,
            rng.choice((F32, dtype)),
            rng.choice(("rows", "padded", "flat")),
            # The large ones are often refused below.
            rng.choice((0, 1, 2, 7, 17, *[64] * 2, *[129] * 3, *[1000] * 6)),
            rng.choice(sizes),
            rng.choice(sizes),
            rng.choice((1, 2, 3, 5, 8)),
            rng.choice((1, 4, 8, 12, 16, 64)),
            rng.choice(testing.WEIGHT_KINDS),
            rng.choice(("contiguous", "noncontiguous", "expanded")),
            rng.random() < 0.5,
            rng.choice(("one", "number", "tensor")),
            len(found),
        )
        per_row = case.in_features * case.out_features + case.m * case.r * (
            case.in_features + case.out_features
        )
        if op == "mixed_linear":
            per_row = case.m * case.in_features * case.out_features
        work = per_row * max(case.tokens, 8)
        if work * case.draws > (3e7 if len(found) % 100 == 0 else 3e6):
            continue
        if case.layout == "rows" and case.tokens > 129:
            continue
        found.append(case)
    return found


AXES = [name for name in Case.__annotations__ if name != "seed"]


@cache
def covering(op: str) -> list[Case]:
    """Of the sampled cases some that have every pair of values, and as many again."""
    drawn = sampled(op)
    found = pairwise.covering(drawn, AXES, lambda case: 2 + case.draws)
    taken = {case.seed for case in found}
    rest = [case for case in drawn if case.seed not in taken]
    found += pairwise.covering(rest, AXES, lambda case: 2 + case.draws)
    return sorted(found, key=lambda case: case.seed)


@pytest.mark.parametrize("op", OPS)
def test_sample_covers_every_pair(op: str) -> None:
    pairwise.check_covers(covering(op), sampled(op), AXES)
    values = [len({getattr(case, axis) for case in covering(op)}) for axis in AXES]
    assert values == [3, 3, 3, 8, 7, 7, 5, 6, len(testing.WEIGHT_KINDS), 3, 2, 3]
    assert len(covering(op)) > 200


def run(op: str, case: Case, draw: int = 0) -> tuple[Results, Runs]:
    """The inputs of one draw, and its results."""
    # torch.manual_seed also queues the seed for devices that are not there, with a formatted stack.
    torch.default_generator.manual_seed(1000 * case.seed + draw)

    def tensor(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        t = (torch.randn(*shape) * scale).to(dtype)
        if case.strides == "noncontiguous":
            return testing.noncontiguous(t)
        # Along the first axis: constant terms along a sum would all round in the same direction,
        # and judge the order of a sum instead of its result.
        return testing.expanded(t, 0) if case.strides == "expanded" and t.dim() > 1 else t

    ids = None
    token_rows = torch.arange(case.tokens) // max(1, case.tokens // max(1, case.batch))
    if case.layout == "flat":
        # Unsorted, unequal lengths, some examples without a token.
        token_rows = torch.randint(0, case.batch, (case.tokens,))
        ids = token_rows.int() if case.seed % 2 else token_rows
    weights = testing.weight_rows(case.kind, case.batch, case.m)
    inputs = {"x": tensor(*case.leading, case.in_features), "weights": weights}
    inputs |= cases.mixed_tensors(op, case, tensor)
    if op == "mixed_lora" and case.scaling == "tensor":
        inputs["scaling"] = torch.rand(case.m) + 0.5
    dy, options = tensor(*case.leading, case.out_features), {"example_ids": ids, "backend": "cpu"}
    return inputs, cases.mixed_runs(op, inputs, dy, token_rows, case.scaling, **options)


def check(op: str, case: Case) -> None:
    runs = []
    for draw in range(case.draws):
        inputs, results = run(op, case, draw)
        runs.append(results)
        for name, tensor in inputs.items():
            assert results[0][f"d_{name}"].dtype == tensor.dtype
    cases.judge(runs, f" of {case}")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("op", OPS)
def test_budget(op: str, part: int) -> None:
    for case in covering(op)[part::PARTS]:
        check(op, case)


# The C++ kernels themselves, on every instruction set of this machine.

SHAPES = (  # T, in, out, m, r: registers' remainders, one segment and more, few and many rows
    (1, 64, 64, 2, 8),
    (2, 1030, 21, 3, 5),
    (3, 37, 53, 8, 1),
    (5, 8, 1, 1, 16),
    (17, 172, 129, 2, 33),
    (40, 2500, 70, 4, 12),
)


def low_rank_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, lora_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    T, n_in, n_out, m, r = shape
    x, y = torch.randn(T, n_in).to(dtype), torch.randn(T, n_out).to(dtype)
    A = (torch.randn(m, r, n_in) * n_in**-0.5).to(lora_dtype)
    B = (torch.randn(m, n_out, r) * r**-0.5).to(lora_dtype)
    return x, A, B, torch.randn(T, m), y


def judge_low_rank(
    u: Tensor, y: Tensor, base: Callable[[torch.dtype], Tensor], inputs: Any, what: str
) -> None:
    """u, and y = base(dtype) + z B^T, of the inputs (x, A, B, w)."""

    def plain(t: torch.dtype) -> tuple[Tensor, Tensor]:
        x, A, B, w = cases.cast(inputs, t)
        u = x @ A.flatten(0, 1).t()
        z = u * w.repeat_interleave(A.shape[1], 1)
        return u, base(t) + z @ B.transpose(0, 1).flatten(1).t()

    (u64, y64), (u32, y32) = plain(F64), plain(F32)
    testing.assert_within_budget(u, u64, u32, name=f"u of {what}")
    testing.assert_within_budget(y, y64, y32.to(y.dtype), name=f"y of {what}")


def product(inputs: Any, dtype: torch.dtype) -> Tensor:
    return F.linear(*cases.cast(inputs, dtype))


each_kernel = pytest.mark.parametrize(
    "dtype, lora_dtype", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)]
)


@pytest.mark.parametrize("isa", ISAS)
@each_kernel
def test_low_rank_kernel_on_each_instruction_set(
    isa: str, dtype: torch.dtype, lora_dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        *inputs, y = low_rank_inputs(shape, dtype, lora_dtype)
        got = y.clone()
        u = cpu_mixed_lora.run_native(*inputs, None, got, isa=isa)
        judge_low_rank(u, got, y.to, inputs, f"{shape} on {isa}")


@pytest.mark.parametrize("isa", ISAS)
@each_kernel
def test_whole_kernel_on_each_instruction_set(
    isa: str, dtype: torch.dtype, lora_dtype: torch.dtype
) -> None:
    """With the base product, u computed or given, into columns of a wider y, some rows zero."""
    for shape in (*SHAPES, (150, 24, 50, 1, 3)):
        T, n_in, n_out = shape[:3]
        x, A, B, w, _ = low_rank_inputs(shape, dtype, lora_dtype)
        W, c = (torch.randn(n_out, n_in) * n_in**-0.5).to(dtype), torch.randn(n_out).to(dtype)
        w[1::3] = 0
        wide = torch.full((T, n_out + 9), torch.nan).to(dtype)
        y, base = wide[:, 4:-5], (testing.noncontiguous(W), c)
        u = cpu_mixed_lora.run_native(x, A, B, w, None, y, *base, isa=isa)
        assert int(wide.isnan().sum()) == 9 * T

        judge_low_rank(u, y, partial(product, (x, W, c)), (x, A, B, w), f"{shape} on {isa}")
        again = torch.full((T, n_out), torch.nan).to(dtype)
        cpu_mixed_lora.run_native(x, None, B, w, None, again, *base, u=u, isa=isa)
        assert torch.equal(again, y)
        assert torch.equal(u, cpu_mixed_lora.run_native(x, A, None, None, None, None, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_mixed_product_kernel_on_each_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for T, n_in, n_out, m, _ in SHAPES:
        x, w = torch.randn(T, n_in).to(dtype), torch.randn(T, m)
        E = (torch.randn(m, n_out, n_in) * n_in**-0.5).to(dtype)
        c = torch.randn(m, n_out).to(dtype)
        inputs = Inputs(x, E, w, c, None, False)
        got = cpu_mixed_linear.mix_products(inputs, isa)
        wide = reference.mixed_linear(cases.cast(inputs, F64))
        same = reference.mixed_linear(inputs)
        testing.assert_within_budget(got, wide, same, name=f"y of {(T, n_in, n_out, m)} on {isa}")


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_on_each_instruction_set(isa: str) -> None:
    """The store rounds as PyTorch does: ties to even, overflow, subnormals, NaN."""
    values = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, 65519.0, 65520.0, 3e38, 6e-8, 2.9e-8, -1e-7,
                           1e-41, torch.inf, -torch.inf, torch.nan, -0.0, 0.1, 1 / 3])  # fmt: skip
    for dtype in (BF16, F16):
        # 1 * value: an adapter of one rank whose B holds the values, in float32.
        B = values[None, :, None]
        y = torch.zeros(1, len(values), dtype=dtype)
        x = torch.ones(1, 1, dtype=dtype)
        cpu_mixed_lora.run_native(x, torch.ones(1, 1, 1), B, torch.ones(1, 1), None, y, isa=isa)
        torch.testing.assert_close(y[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_keeps_its_bits(isa: str, dtype: torch.dtype, set_threads: Any) -> None:
    """Alone, in any batch, on any number of threads."""
    x, A, B, w, y = low_rank_inputs((41, 1100, 75, 3, 12), dtype, dtype)
    E = A.mT.reshape(3, -1, 1100)[:, :11].contiguous()
    whole_y = y.clone()
    whole_u = cpu_mixed_lora.run_native(x, A, B, w, None, whole_y, isa=isa)
    W, c = torch.randn(75, 1100).to(dtype), torch.randn(75).to(dtype)
    based = torch.empty_like(y)
    cpu_mixed_lora.run_native(x, A, B, w, None, based, W, c, isa=isa)
    inputs = Inputs(x, E, w, None, None, False)
    whole = cpu_mixed_linear.mix_products(inputs, isa)
    for threads in (1, 2, 3):
        set_threads(threads)
        for rows in ([7], [0, 40], [3, 1, 2], list(range(19)), list(range(40, 6, -1))):
            part = y[rows].clone()
            u = cpu_mixed_lora.run_native(x[rows], A, B, w[rows], None, part, isa=isa)
            assert torch.equal(u, whole_u[rows])
            assert torch.equal(part, whole_y[rows])
            cpu_mixed_lora.run_native(x[rows], A, B, w[rows], None, part, W, c, isa=isa)
            assert torch.equal(part, based[rows])
            got = cpu_mixed_linear.mix_products(inputs._replace(x=x[rows], weights=w[rows]), isa)
            assert torch.equal(got, whole[rows])


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """y has 2^31 + 6144 elements, and the second row of x begins at element 2^31 + 64."""
    # Untouched pages cost nothing; filling 8 GB would.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    T, n_in, n_out = 2**20 + 3, 8, 2048
    x, A, B, w, _ = low_rank_inputs((T, n_in, 1, 1, 8), BF16, BF16)
    B = torch.randn(1, n_out, 8).to(BF16)
    y = torch.zeros(T, n_out, dtype=BF16)
    cpu_mixed_lora.run_native(x, A, B, w, None, y)
    tail = torch.zeros(5, n_out, dtype=BF16)
    cpu_mixed_lora.run_native(x[-5:], A, B, w[-5:], None, tail)
    assert torch.equal(y[-5:], tail)
    del y
    far = torch.empty(2**31 + 200, dtype=BF16).as_strided((2, 100), (2**31 + 64, 1))
    far.copy_(torch.randn(2, 100))
    near, E = far.clone(), torch.randn(2, 9, 100).to(BF16)
    inputs = Inputs(far, E, torch.ones(2, 2), None, None, False)
    got = cpu_mixed_linear.mix_products(inputs)
    assert torch.equal(got, cpu_mixed_linear.mix_products(inputs._replace(x=near)))


# The choice of path, and all paths.


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        # tokens, in + out, dtype, products' dtype: the C++ kernel runs
        (1, 8192, F32, F32): True,
        (32, 8192, F32, F32): True,
        (33, 8192, F32, F32): False,
        (2048, 128, F32, F32): True,
        (8, 8192, BF16, BF16): True,
        (9, 8192, BF16, BF16): False,
        (2048, 8192, BF16, F32): True,
        (2048, 8192, F16, F32): True,
    }
    for arguments, wanted in table.items():
        assert cpu_mixed_lora.use_native(*arguments, False) == wanted
        assert cpu_mixed_lora.use_native(*arguments, True)
    for fast in (True, False):
        monkeypatch.setattr(
            cpu_mixed_lora, "has_native_gemm", lambda dtype, fast=fast: fast or dtype == F32
        )
        base = partial(cpu_mixed_lora.use_native_base, size=128 * 128)
        assert [base(t, dtype=F32) for t in (1, 96, 97)] == [True, True, False]
        assert [base(t, dtype=BF16) for t in (1, 5000)] == [not fast] * 2
        assert not any(cpu_mixed_lora.use_native_base(1, 127 * 129, d) for d in (F32, BF16))
        assert cpu_mixed_lora.product_dtype(BF16, BF16) == (BF16 if fast else F32)
        assert cpu_mixed_lora.product_dtype(BF16, F32) == F32


@pytest.fixture(params=["whole", "native", "products", "copied products"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Forces one way of the CPU backend, whatever the processor and the number of rows."""
    limit = 10**12 if request.param in ("whole", "native") else 0
    monkeypatch.setattr(cpu_mixed_lora, "BASE_ROWS", limit if request.param == "whole" else 0)
    monkeypatch.setattr(cpu_mixed_lora, "BASE_SIZE", 1 if request.param == "whole" else 10**12)
    for name in ("NATIVE_WORK", "NATIVE_WORK_16_BITS"):
        monkeypatch.setattr(cpu_mixed_lora, name, limit)
    monkeypatch.setattr(cpu_mixed_linear, "NATIVE_ROWS", limit)
    monkeypatch.setattr(cpu_mixed_linear, "SMALL_WORK", limit)

    def has_gemm(dtype: torch.dtype) -> bool:
        return request.param not in ("whole", "copied products") or dtype == F32

    monkeypatch.setattr(cpu_mixed_lora, "has_native_gemm", has_gemm)
    monkeypatch.setattr(cpu_mixed_linear, "has_native_gemm", has_gemm)
    fast_path = cpu_mixed_lora.fast_path
    fast_path.cache_clear()  # it was handed the constants
    yield str(request.param)
    fast_path.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_every_path(op: str, path: str) -> None:
    wanted = [c for c in covering(op) if 17 <= c.tokens <= 129 and c.dtype != F16]
    for case in wanted[:30]:
        check(op, case)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_zero_rows_on_every_path(dtype: torch.dtype, path: str) -> None:
    """The bits of F.linear, also where adapters hold infinity and NaN and the base is -0.0."""
    x, A, B, w, _ = low_rank_inputs((150, 24, 40, 2, 4), dtype, dtype)
    W, c = torch.randn(40, 24).to(dtype), torch.full((40,), -0.0).to(dtype)
    W[3], w[::3], w[1] = 0, 0, -0.0
    A[0, 0, 0], B[1, 5, 2] = torch.inf, torch.nan
    bare, zero = F.linear(x, W, c), (w == 0).all(1)
    finite = torch.where(zero[:, None], 1.0, w), A.nan_to_num(0, 0), torch.full_like(B, -0.0)
    for gradient in (False, True):  # on the fast path, and dispatched
        A, a = A.requires_grad_(gradient), finite[1].requires_grad_(gradient)
        y = mixed_lora(x, W, A, B, w, bias=c, backend="cpu").detach()
        assert torch.equal(y[zero].view(torch.int16), bare[zero].view(torch.int16))
        assert not torch.equal(y[~zero], bare[~zero])
        # As a policy starts.
        y = mixed_lora(x, W, a, finite[2], finite[0], bias=c, backend="cpu").detach()
        assert torch.equal(y, bare)


@pytest.mark.parametrize("out_features", [1, 40])
@pytest.mark.parametrize("op", OPS)
def test_the_gradient_of_weights_is_exact_beside_products(
    op: str, out_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """u, dy B and x W_i^T stay float32: no factor of d_weights is rounded to bfloat16."""
    for module in (cpu_mixed_lora, cpu_mixed_linear):
        monkeypatch.setattr(module, "has_native_gemm", lambda _: True)
    monkeypatch.setattr(cpu_mixed_lora, "NATIVE_WORK_16_BITS", 0)
    monkeypatch.setattr(cpu_mixed_linear, "SMALL_WORK", 0)
    case = Case(BF16, BF16, "padded", 64, 172, out_features, 3, 4, "all_different", "contiguous",
                True, "one", 5)  # fmt: skip
    got, exact, _ = (results["d_weights"] for results in run(op, case)[1])
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


def test_a_nan_example_keeps_its_nan(path: str) -> None:
    x, A, B, w, _ = low_rank_inputs((60, 24, 40, 3, 4), F32, F32)
    ids = torch.arange(60) % 5
    x[ids == 2] = torch.nan
    E = torch.randn(3, 40, 24)
    for function in (
        lambda rows: mixed_lora(x, E[0], A, B, rows, example_ids=ids, backend="cpu"),
        lambda rows: mixed_linear(x, E, rows, example_ids=ids, backend="cpu"),
    ):
        rows = w[:5].clone().requires_grad_()
        grad = torch.autograd.grad(function(rows).sum(), rows)[0]
        assert grad.isnan().any(1).tolist() == [b == 2 for b in range(5)]


def test_equal_rows_are_merged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 alone; see tests/ops/mixed_linear/test_expert_steps.py for 16 bits."""
    monkeypatch.setattr(cpu_mixed_linear, "has_native_gemm", lambda _: True)
    merged: list[torch.dtype] = []
    one_product = cpu_mixed_linear.merged

    def spy(x: Tensor, *rest: Any) -> Tensor:
        merged.append(x.dtype)
        return one_product(x, *rest)

    monkeypatch.setattr(cpu_mixed_linear, "merged", spy)
    x, E, c = torch.randn(40, 64), torch.randn(3, 50, 64) / 8, torch.randn(3, 50)
    rows = torch.rand(1, 3).expand(40, 3)
    got = mixed_linear(x, E, rows, bias=c, backend="cpu")
    assert merged == [F32]
    inputs = Inputs(x, E, rows, c, None, False)
    wide = reference.mixed_linear(cases.cast(inputs, F64))
    testing.assert_within_budget(got, wide, reference.mixed_linear(inputs))
    with batch_invariant():
        mixed_linear(x, E, rows, bias=c, backend="cpu")
    different = rows.clone()
    different[1, 0] += 1
    mixed_linear(x, E, different, bias=c, backend="cpu")
    mixed_linear(x.bfloat16(), E.bfloat16(), rows, bias=c.bfloat16(), backend="cpu")
    assert merged == [F32]


# Algebra in float32, 60 drawn examples an op.


@st.composite
def sizes(draw: Any) -> tuple[int, ...]:
    return tuple(draw(st.integers(1, top)) for top in (6, 7, 40, 40, 5, 18, 2**20))


def check_algebra(
    run: Callable[..., Tensor], base: Tensor, x: Tensor, w: Tensor, **adapters: Tensor
) -> tuple[Tensor, Callable[[Tensor, Tensor], None]]:
    """What holds for run(x=, w=, **adapters): linear in w beside the base, in any order of adapters
    and of examples, the same bits twice, and invariant. Gives run() and how close results are."""
    B, T = x.shape[:2]
    y, other = run(), torch.randn(w.shape)
    scale = float((1 + y.abs().max() + base.abs().max()) * (1 + w.abs().max()))

    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=0, atol=3e-5 * scale)

    close(run(w=2 * w - other) - base, 2 * (y - base) - (run(w=other) - base))
    p, q = torch.randperm(w.shape[1]), torch.randperm(B)
    close(run(w=w[:, p], **{name: t[p] for name, t in adapters.items()}), y)
    close(run(x=x[q], w=w[q]), y[q])
    assert torch.equal(run(), y)
    with batch_invariant():
        whole = run()
        assert torch.equal(run(x=x[q], w=w[q]), whole[q])
        flat = run(x=x.flatten(0, 1), example_ids=torch.arange(B).repeat_interleave(T))
        assert torch.equal(flat, whole.flatten(0, 1))
        assert torch.equal(run(x=x[:1], w=w[:1]), whole[:1])
    return y, close


@settings(max_examples=60)
@given(sizes())
def test_mixed_lora_algebra(size: tuple[int, ...]) -> None:
    B, T, n_in, n_out, m, r, seed = size
    torch.manual_seed(seed)
    x, W = torch.randn(B, T, n_in), torch.randn(n_out, n_in)
    A, C, w = torch.randn(m, r, n_in), torch.randn(m, n_out, r), torch.randn(B, m)

    def run(x: Tensor = x, w: Tensor = w, A: Tensor = A, C: Tensor = C, **k: Any) -> Tensor:
        return mixed_lora(x, W, A, C, w, backend="cpu", **k)

    y, close = check_algebra(run, F.linear(x, W), x, w, A=A, C=C)
    close(run(w=w * 0.5, scaling=2.0), y)
    pick = torch.arange(B) % m
    one_hot = run(w=F.one_hot(pick, m).float())
    for b, i in enumerate(pick):
        close(one_hot[b], F.linear(x[b], W + C[i] @ A[i]))


@settings(max_examples=60)
@given(sizes())
def test_mixed_linear_algebra(size: tuple[int, ...]) -> None:
    B, T, n_in, n_out, m, _, seed = size
    torch.manual_seed(seed)
    x, E = torch.randn(B, T, n_in), torch.randn(m, n_out, n_in)
    c, w = torch.randn(m, n_out), torch.randn(B, m)

    def run(x: Tensor = x, w: Tensor = w, E: Tensor = E, c: Tensor = c, **k: Any) -> Tensor:
        return mixed_linear(x, E, w, bias=c, backend="cpu", **k)

    _, close = check_algebra(run, torch.zeros(()), x, w, E=E, c=c)
    pick = torch.arange(B) % m
    one_hot = run(w=F.one_hot(pick, m).float())
    for b, i in enumerate(pick):
        close(one_hot[b], F.linear(x[b], E[i], c[i]))


# The short way from Python to the kernel: it takes what is plain, and gives None to all else.


def quick(**changed: Any) -> Tensor | None:
    """cpu_mixed_lora.fast_path on plain inputs of five examples with two tokens, some changed."""
    return cases.taken(cpu_mixed_lora, quick_arguments(**changed))


def quick_arguments(**changed: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    arguments: dict[str, Any] = {
        "x": torch.randn(5, 2, 24, generator=g),
        "base_weight": torch.randn(30, 24, generator=g),
        "lora_A": torch.randn(2, 4, 24, generator=g),
        "lora_B": torch.randn(2, 30, 4, generator=g),
        "weights": torch.randn(5, 2, generator=g),
        "scaling": 1.5,
        "bias": torch.randn(30, generator=g),
        "example_ids": None,
        "backend": "auto",
        "invariant": 0,
    }
    return cases.changed(arguments, changed)


def to_dtype(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: t.to(dtype)


class Mine(Tensor):
    pass


FLOATS = ("x", "base_weight", "lora_A", "lora_B", "bias")
TAKEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "named": {"backend": "cpu"},
    "no bias": {"bias": None},
    "scaling per adapter": {"scaling": torch.tensor([0.5, 2.0])},
    "integer scaling": {"scaling": 2},
    "a parameter": {"lora_A": lambda t: torch.nn.Parameter(t, requires_grad=False)},
    "bfloat16 beside float32": {n: to_dtype(BF16) for n in ("x", "base_weight", "bias")},
    "transposed base": {"base_weight": lambda t: t.t().contiguous().t()},
    "zero rows": {"weights": torch.zeros(5, 2)},
    "a zero row": {"weights": lambda t: t.index_fill(0, torch.tensor([2]), 0.0)},
    "zero adapters": {"lora_B": lambda t: t * 0},
    "bfloat16": {n: to_dtype(BF16) for n in FLOATS},
    "many rows": {"x": lambda t: t.repeat(1, 20_000, 1)},
    "float16": {n: to_dtype(F16) for n in FLOATS},
}
REFUSED: dict[str, dict[str, Any]] = {
    "ids": {"example_ids": torch.zeros(5, dtype=torch.int32)},
    "another backend": {"backend": "reference"},
    "an unknown backend": {"backend": "numpy"},
    "batch_invariant": {"invariant": 1},
    "a gradient": {"lora_A": lambda t: t.requires_grad_()},
    "a gradient of the weights": {"weights": lambda t: t.requires_grad_()},
    "a gradient of the base": {"base_weight": lambda t: t.requires_grad_()},
    "a gradient of the scaling": {"scaling": torch.ones(2, requires_grad=True)},
    "strides of x": {"x": testing.noncontiguous},
    "strides of A": {"lora_A": testing.noncontiguous},
    "expanded weights": {"weights": torch.ones(1, 2).expand(5, 2)},
    "float64": {"x": to_dtype(F64)},
    "mixed dtypes": {"x": to_dtype(BF16)},
    "weights in float64": {"weights": to_dtype(F64)},
    "adapters in another dtype": {"lora_A": to_dtype(BF16), "lora_B": to_dtype(BF16)},
    "A and B of two dtypes": {"lora_A": to_dtype(BF16)},
    "meta": {"x": lambda t: t.to("meta")},
    "a subclass": {"x": lambda t: t.as_subclass(Mine)},
    "a list": {"weights": lambda t: t.tolist()},
    "None": {"lora_B": None},
    "NaN weights": {"weights": torch.full((5, 2), torch.nan)},
    "infinite scaling": {"scaling": float("inf")},
    "a boolean scaling": {"scaling": True},
    "scaling of another shape": {"scaling": torch.ones(3)},
    "too few weight rows": {"weights": lambda t: t[:4]},
    "too few adapters": {"weights": lambda t: t[:, :1].contiguous()},
    "one axis": {"x": torch.randn(24)},
    "another width": {"x": torch.randn(5, 25)},
    "another rank": {"lora_B": lambda t: t[..., :3].contiguous()},
    "another output": {"lora_B": lambda t: t[:, :29].contiguous()},
    "bias of another shape": {"bias": lambda t: t[:29]},
    "no rows": {"x": lambda t: t[:0], "weights": lambda t: t[:0]},
    "many rows, one without adapters": {
        "x": lambda t: t.repeat(1, 20_000, 1),
        "weights": lambda t: t.index_fill(0, torch.tensor([2]), 0.0),
    },
    "many rows beside wider adapters": {
        **{n: to_dtype(BF16) for n in ("base_weight", "bias")},
        "x": lambda t: t.repeat(1, 20_000, 1).bfloat16(),
    },
    "sparse": {"lora_A": lambda t: t.to_sparse()},
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", TAKEN)
def test_fast_path_gives_what_the_checked_call_gives(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NATIVE_WORK", "FAST_PATH_WORK", "NATIVE_WORK_16_BITS"):
        monkeypatch.setattr(cpu_mixed_lora, name, 10**12)
    y = quick(**TAKEN[case])
    assert y is not None
    assert_checked_call_gives(y, case, monkeypatch)


def assert_checked_call_gives(y: Tensor, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checked and dispatched call, on the same arguments."""
    bare = registry.Backend("cpu", cpu_mixed_lora.mixed_lora, cpu_mixed_lora.why_not)
    monkeypatch.setitem(registry.BACKENDS, "mixed_lora", (bare,))

    def checked_call(x, base_weight, lora_A, lora_B, weights, scaling, bias, *_):  # type: ignore[no-untyped-def]
        return mixed_lora(x, base_weight, lora_A, lora_B, weights, scaling=scaling, bias=bias)

    monkeypatch.setattr(cpu_mixed_lora, "fast_path", lambda: checked_call)
    wanted = quick(**TAKEN[case])
    assert wanted is not None
    assert y.dtype == wanted.dtype
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("case", TAKEN)
def test_fast_path_by_products_gives_what_the_checked_call_gives(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves rows without adapters, and adapters in a wider dtype, to the checked call."""
    for name in ("NATIVE_WORK", "FAST_PATH_WORK", "NATIVE_WORK_16_BITS", "BASE_ROWS"):
        monkeypatch.setattr(cpu_mixed_lora, name, 0)
    monkeypatch.setattr(cpu_mixed_lora, "has_native_gemm", lambda dtype: True)
    cpu_mixed_lora.fast_path.cache_clear()
    y = quick(**TAKEN[case])
    left = {"zero rows", "a zero row", "zero adapters", "bfloat16 beside float32"}
    assert (y is None) == (case in left)
    if y is not None:
        assert_checked_call_gives(y, case, monkeypatch)
    monkeypatch.undo()
    cpu_mixed_lora.fast_path.cache_clear()


@pytest.mark.parametrize("case", REFUSED)
def test_fast_path_refuses(case: str) -> None:
    assert quick(**REFUSED[case]) is None


def test_fast_path_leaves_calls_under_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert quick(lora_A=lambda t: t.requires_grad_()) is not None
    cases.check_modes(cpu_mixed_lora, quick_arguments, monkeypatch)
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "cpu")
    assert quick() is not None


def test_fast_path_needs_the_first_backend_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    x, A, B, w, _ = low_rank_inputs((3, 8, 6, 2, 4), F32, F32)
    W = torch.randn(6, 8)
    for row in registry.BACKENDS["mixed_lora"]:
        assert (row.fast_path() is not None) == (row.name == "cpu")
    reference_row = registry.BACKENDS["mixed_lora"][-1]
    spy = registry.Backend(
        "cpu", lambda *a: used.append(1) or reference_row.run(*a), lambda *_: None
    )
    mixed_lora(x, W, A, B, w)
    monkeypatch.setitem(registry.BACKENDS, "mixed_lora", (spy, reference_row))
    mixed_lora(x, W, A, B, w)
    assert used == [1]


@pytest.mark.skipif(native.has_native_gemm(torch.bfloat16), reason="PyTorch's products run there")
def test_memory_of_forward_and_backward_in_bfloat16():
    """At most 1.1 times the frozen layer's, whose y and dx are 8 MB."""
    case = bench_mixed_lora.Case(1024, 2048, 8, 4, 16, "bfloat16", grad=True)
    data = bench_mixed_lora.inputs(case, torch.device("cpu"))
    run = next(p.run for p in bench_mixed_lora.providers(data) if p.name == "cpu")
    run()
    assert peak_bytes_cpu(run) <= 1.1 * 2 * 2048 * 1024 * 2
