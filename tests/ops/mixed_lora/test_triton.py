"""The Triton kernels of mixed_lora in Triton's interpreter, against the definition in float64.

Compiled code is judged elsewhere: tests/ops/test_compile_gate.py compiles every variant, and
tests/gpu runs the kernels. bfloat16 is not run here: the interpreter's bfloat16 dot is wrong.
"""

import random
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from typing import Any

import cases
import pairwise
import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, INF, NAN, LoraInputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clp_kernels.testing import WEIGHT_KINDS, expanded, noncontiguous

pytest.importorskip("triton")

from clp_kernels.ops import triton_launch
from clp_kernels.ops.mixed_lora import triton as backend
from clp_kernels.ops.mixed_lora import triton_kernels as kernels
from clp_kernels.ops.mixed_lora.triton_plan import Plan, Tile, plan

interpreted = pytest.mark.skipif(
    not triton_launch.INTERPRETED, reason="TRITON_INTERPRET=1 was not set at import"
)
pytestmark = pytest.mark.usefixtures("one_thread")
ALL = [True] * 6


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = F32
    lora_dtype: torch.dtype = F32
    layout: str = "padded"
    tokens: int = 17
    batch: int = 2
    in_features: int = 64
    out_features: int = 64
    m: int = 2
    r: int = 8
    kind: str = "all_different"
    strides: str = "contiguous"
    bias: bool = True
    invariant: bool = False
    path: str | None = "fused"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        lora = "" if self.lora_dtype == self.dtype else "+lora32"
        mode = "invariant" if self.invariant else self.path
        return (
            f"{name}{lora}-{self.layout}-T{self.tokens}-{self.in_features}x{self.out_features}"
            f"-m{self.m}r{self.r}-{self.kind}-{self.strides}{'-bias' * self.bias}-{mode}"
        )


def draw(case: Case) -> LoraInputs:
    """Inputs of a case; strides apply to every tensor."""

    def strided(t: Tensor, expandable: bool) -> Tensor:
        if case.strides == "noncontiguous":
            return noncontiguous(t)
        if case.strides == "offset":
            # Off by one element: nothing is aligned to 16 bytes.
            return torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape)
        return expanded(t) if case.strides == "expanded" and expandable else t

    leading = (case.batch, case.tokens) if case.layout == "padded" else (case.tokens,)
    return cases.lora_inputs(
        (case.dtype, case.lora_dtype), leading, case.in_features, case.out_features, case.m, case.r,
        case.kind, case.batch if case.layout == "flat" else None, bias=case.bias,
        ids_dtype=torch.int32 if case.m % 2 else torch.int64, strided=strided,
    )  # fmt: skip


run = partial(cases.run_lora, backend)


AXES = [field.name for field in fields(Case)]


def cost(case: Case) -> float:
    """The interpreter's time, roughly: products of tiles, beside what every call takes."""
    t, i, o, k = (-(-n // 32) for n in (case.tokens, case.in_features, case.out_features, case.r))
    examples = 1 if case.layout == "flat" else case.batch
    return 8 + examples * t * (i * o + case.m * k * (i + o))


def sampled(count: int) -> list[Case]:
    """Every axis sampled; few cases of the largest sizes, a program takes milliseconds here."""
    rng = random.Random(0)
    found = []
    for i in range(count):
        dtype = rng.choice((F32, F16))
        mode = ("fused", "split", "invariant", "fused")[i % 4]
        tokens = 129 if i % 40 == 0 else rng.choice((0, 1, 2, 7, 7, 17, 17, 64))
        sizes = (1, 8, 64, 172, 300) if tokens < 64 else (8, 64, 172)
        m, r = rng.choice((1, 2, 3, 5, 8)), rng.choice((1, 4, 8, 12, 16, 64))
        strides = rng.choice(("contiguous", "noncontiguous", "expanded", "offset"))
        if strides == "expanded" and tokens > 17:
            strides = "noncontiguous"
        if m * r > 32 and i % 12:
            r = min(r, 4)
        elif m * r > 32:
            tokens, sizes = min(tokens, 7), (1, 8, 64)
        if tokens > 2 and m * r > 8:
            sizes = (1, 8, 64)
        case = Case(
            dtype=dtype,
            lora_dtype=rng.choice((dtype, F32)),
            layout=rng.choice(("rows", "padded", "flat")) if tokens < 64 else "flat",
            tokens=tokens,
            batch=rng.choice((1, 2, 3)),
            in_features=rng.choice(sizes),
            out_features=rng.choice(sizes),
            m=m,
            r=r,
            kind=rng.choice(WEIGHT_KINDS),
            strides=strides,
            bias=rng.choice((True, False)),
            invariant=mode == "invariant",
            path=None if mode == "invariant" else mode,
        )
        found.append(case)
    return found


DRAWN = sampled(800)
COVERING = pairwise.covering(DRAWN, AXES, cost)


def test_sample_covers_every_pair() -> None:
    pairwise.check_covers(COVERING, DRAWN, AXES)
    columns = zip(*([getattr(case, axis) for axis in AXES] for case in COVERING), strict=True)
    counts = [2, 2, 3, 7, 3, 5, 5, 5, 6, len(WEIGHT_KINDS), 4, 2, 2, 3]
    assert [len(set(column)) for column in columns] == counts


@interpreted
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_sampled_case_within_budget(case: Case) -> None:
    # A result of few distinct numbers is not judged by one of them: plain PyTorch can be lucky.
    few = case.tokens and (case.tokens <= 2 or case.strides == "expanded")
    draws = [draw(case) for _ in range(2 if few else 1)]
    cases.judge_lora(draws, [run(inputs, case.invariant, case.path) for inputs in draws])


class _Copies(TorchDispatchMode):
    """Counts the elements of the largest tensor that PyTorch makes meanwhile."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {t.data_ptr() for t in args if isinstance(t, Tensor)}
        for t in made if isinstance(made, tuple) else (made,):
            if isinstance(t, Tensor) and t.data_ptr() not in known:
                self.largest = max(self.largest, t.numel())
        return made


@interpreted
@pytest.mark.parametrize("path", ["fused", "split", "invariant"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_a_transposed_base_is_read_as_it_lies(dtype: torch.dtype, path: str) -> None:
    """GPT-2's Conv1D: a copy of it in each call would cost as much as a decoding step."""
    case = Case(dtype, lora_dtype=dtype, tokens=5, batch=1, in_features=128, out_features=96)
    dense = draw(case)
    stored = dense.base_weight.t().contiguous()
    inputs = replace(dense, base_weight=stored.t())
    invariant, path_name = path == "invariant", None if path == "invariant" else path
    cases.judge_lora([inputs], [run(inputs, invariant, path_name)])
    given = inputs.call(invariant)
    needs = [True, False, True, True, True, True]
    with _Copies() as copies:
        _, u = backend.mixed_lora(given, path_name)
        backend.mixed_lora_backward(given, inputs.dy, u, needs, path_name)
    assert 0 < copies.largest < stored.numel()


@interpreted
def test_empty_batch_without_examples() -> None:
    inputs = draw(Case(layout="rows", tokens=0))
    assert inputs.weights.shape[0] == 0
    got = run(inputs)
    assert got["y"].shape == (0, 64) and got["d_weights"].shape == (0, 2)
    for k in ("base_weight", "lora_A", "lora_B", "bias"):
        assert torch.equal(got[f"d_{k}"], torch.zeros_like(got[f"d_{k}"]))


@interpreted
@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("mode", ["fused", "split", "invariant", "large"])
def test_zero_rows_are_the_base_product_bit_for_bit(
    mode: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "large":
        # Starts the accumulator from the low-rank part, as large tiles do.
        monkeypatch.setattr(
            backend, "cached_plan", lambda *args: replace(plan(*args), low_rank_first=True)
        )
    path = mode if mode in ("fused", "split") else None
    inputs = draw(Case(dtype=F16, lora_dtype=F16, batch=4, tokens=5, kind="zero"))
    bare = run(replace(inputs, weights=torch.zeros(4, 2)), mode == "invariant", path)
    if mode == "split":
        assert torch.equal(bare["y"], F.linear(inputs.x, inputs.base_weight, inputs.bias))
        assert torch.equal(bare["d_x"], F.linear(inputs.dy, inputs.base_weight.t()))
    got = run(replace(inputs, **cases.not_finite(inputs, value)), mode == "invariant", path)
    for name in ("y", "d_x"):
        assert torch.equal(got[name][::2], bare[name][::2]), name
        assert not got[name][1::2].isfinite().all(), name


@interpreted
def test_zero_weight_shuts_out_an_adapter_that_is_not_finite() -> None:
    inputs = draw(Case(kind="one_hot", batch=4, tokens=3, m=4))
    lora_A = inputs.lora_A.clone()
    lora_A[1, 0, 3] = NAN
    expected = run(inputs)["y"]
    got = run(replace(inputs, lora_A=lora_A))["y"]
    others = [0, 2, 3]
    assert torch.equal(got[others], expected[others]) and got[1].isnan().all()


@interpreted
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("path", ["fused", "split"])
def test_infinity_in_used_adapters_stands_where_the_definition_has_it(
    path: str, dtype: torch.dtype
) -> None:
    inputs = draw(Case(dtype=dtype, lora_dtype=dtype, tokens=5, in_features=8, out_features=8))
    for name in ("lora_A", "lora_B"):
        changed = getattr(inputs, name).clone()
        changed[0, 2, 3] = INF
        case = replace(inputs, **{name: changed})
        exact = cases.lora_results(case, F64)
        got = run(case, path=path)
        for key in ("y", "u", "d_x"):
            finite = exact[key].isfinite()
            assert torch.equal(got[key].isfinite(), finite), (name, key)
            assert torch.equal(got[key].isnan(), exact[key].isnan()), (name, key)
            assert torch.equal(got[key].double()[~finite].nan_to_num(nan=7.0),
                               exact[key][~finite].nan_to_num(nan=7.0)), (name, key)  # fmt: skip


@interpreted
def test_one_hot_rows_equal_the_single_adapter() -> None:
    inputs = draw(Case(dtype=F16, lora_dtype=F16, kind="one_hot", batch=3, m=3, tokens=4))
    got = run(inputs)
    for i in range(3):
        alone = replace(
            inputs, x=inputs.x[i : i + 1], dy=inputs.dy[i : i + 1], weights=torch.ones(1, 1),
            lora_A=inputs.lora_A[i : i + 1], lora_B=inputs.lora_B[i : i + 1],
        )  # fmt: skip
        expected = run(alone)
        torch.testing.assert_close(got["y"][i : i + 1], expected["y"])
        torch.testing.assert_close(got["d_x"][i : i + 1], expected["d_x"])
        for name in ("d_lora_A", "d_lora_B"):
            torch.testing.assert_close(got[name][i : i + 1], expected[name])


@interpreted
@pytest.mark.parametrize("path", ["fused", "split"])
def test_two_runs_give_the_same_bits(path: str) -> None:
    inputs = draw(Case(dtype=F16, lora_dtype=F16, layout="flat", tokens=70, batch=5))
    cases.check_same_bits_twice(run, inputs, path)


@interpreted
def test_gradients_of_split_tokens_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(Case(dtype=F16, lora_dtype=F32, layout="flat", tokens=150, batch=3))
    monkeypatch.setattr(backend, "TOKENS_PER_PLANE", 40)
    assert backend.gradient_splits(150, 64, 64, 16) == 3
    cases.judge_lora([inputs], [run(inputs)])


@pytest.fixture
def rowwise_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """tl.dot whose rows do not depend on their place in the tile: numpy's BLAS does not hold that.

    A tensor core does, so that only what the kernels add to it is left to show here.
    """
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            column, row = a.data[:, k : k + 1], b.data[k : k + 1]
            total += column.astype(total.dtype) * row.astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


PER_ROW = ("y", "u", "d_x")


@interpreted
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_invariant_rows_do_not_depend_on_the_batch(dtype: torch.dtype, rowwise_dot: None) -> None:
    case = Case(dtype=dtype, lora_dtype=dtype, batch=6, tokens=11, in_features=72)
    inputs = draw(case)
    cases.check_invariant_rows(run, inputs, [torch.tensor([4, 0, 5, 2, 1, 3]), torch.tensor([3])])


@interpreted
def test_invariant_holds_for_flat_tokens_in_any_order(rowwise_dot: None) -> None:
    """Padded examples, and the same tokens flat and interleaved: the same bits."""
    inputs = draw(Case(dtype=F16, lora_dtype=F16, batch=3, tokens=7))
    padded = run(inputs, invariant=True)
    ids = torch.randperm(21) % 3
    position = torch.zeros(21, dtype=torch.long)
    for b in range(3):
        position[ids == b] = torch.arange(7)
    flat = run(replace(inputs, x=inputs.x[ids, position], dy=inputs.dy[ids, position],
                       ids=ids.int()), invariant=True)  # fmt: skip
    for name in PER_ROW:
        assert torch.equal(flat[name], padded[name][ids, position]), name
    assert torch.equal(flat["d_weights"], padded["d_weights"])


@interpreted
@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_nan_in_one_example_does_not_reach_another_row(layout: str) -> None:
    inputs = draw(Case(layout=layout, batch=4, tokens=9, m=3))
    if layout == "flat":
        inputs.ids = torch.tensor([3, 0, 2, 1, 2, 0, 0, 3, 2])
    cases.check_nan_stays_in_its_example(run, inputs)


@interpreted
def test_token_of_an_example_that_does_not_exist_is_nan() -> None:
    inputs = draw(Case(layout="flat", tokens=6, batch=2))
    ids = torch.tensor([0, 1, 2, -1, 1, 0])
    y, _ = backend.mixed_lora(inputs.call()._replace(example_ids=ids))
    assert y.isnan().all(-1).tolist() == [False, False, True, True, False, False]


class _Launch:
    """Stands for a kernel that must not run."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        raise AssertionError("launched a kernel")


@interpreted
def test_needs_are_the_same_bits_and_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(Case(dtype=F16, lora_dtype=F16, layout="flat", tokens=9, m=1))
    _, u = backend.mixed_lora(inputs.call())

    def gradients(needs: list[bool]) -> tuple[Tensor, ...]:
        return backend.mixed_lora_backward(inputs.call(), inputs.dy, u, needs)

    full = gradients(ALL)
    masks = [[i == k for i in range(6)] for k in range(6)]
    for needs in (*masks, [True, False, True, True, True, False], [False] * 6):
        each = zip(inputs.NAMES, needs, gradients(needs), full, strict=True)
        for name, need, got, expected in each:
            assert torch.equal(got, expected) if need else got.shape == (0,), name
    # The bias and the base matrix need no kernel, lora_B no product with dy.
    for name in ("shrink_kernel", "product_kernel", "expand_kernel"):
        monkeypatch.setattr(kernels, name, _Launch())
    gradients([False, False, False, True, False, False])
    for name in ("adapter_gradient_kernel", "sum_planes_kernel", "weight_gradient_kernel"):
        monkeypatch.setattr(kernels, name, _Launch())
    gradients([False, True, False, False, False, True])
    with pytest.raises(AssertionError, match="launched"):
        gradients([False, False, False, False, True, False])


@interpreted
def test_why_not_names_the_reason() -> None:
    inputs = draw(Case(dtype=F16, lora_dtype=F16))
    forward, u = inputs.call(), torch.zeros(2, 17, 16)
    assert backend.why_not(forward) is None
    assert backend.why_not(forward, inputs.dy, u, ALL) is None
    empty = forward._replace(x=inputs.x[:0])
    assert backend.why_not(empty) is None
    assert backend.why_not(empty, inputs.dy[:0], u[:0], ALL) is None
    assert "float64" in str(backend.why_not(forward._replace(x=inputs.x.double())))
    assert "bfloat16" in str(backend.why_not(forward._replace(x=inputs.x.bfloat16())))
    none = forward._replace(lora_A=inputs.lora_A[:, :0], lora_B=inputs.lora_B[:, :, :0])
    assert "empty" in str(backend.why_not(none))
    assert "empty" in str(backend.why_not(none, inputs.dy, u[..., :0], ALL))


def test_why_not_without_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    inputs = draw(Case()).call()
    assert backend.why_not(inputs) == "the inputs are on cpu, not on a GPU"
    assert "float64" in str(backend.why_not(inputs._replace(x=inputs.x.double())))


@interpreted
def test_path_errors() -> None:
    inputs = draw(Case())
    with pytest.raises(ValueError, match=r"path must be .* got 'both'"):
        backend.mixed_lora(inputs.call(), path="both")
    with pytest.raises(ValueError, match='"fused" in batch-invariant mode, got "split"'):
        backend.mixed_lora(inputs.call(invariant=True), path="split")


@pytest.mark.parametrize(
    ("tokens", "sizes", "dtype", "capability", "invariant", "expected"),
    [
        (1, (4096, 4096), BF16, (9, 0), False, ("fused", Tile(16, 32, 256, 4, 4), False, True)),
        (16, (4096, 1024), BF16, (9, 0), False, ("fused", Tile(16, 16, 256, 4, 4), False, True)),
        (17, (4096, 1024), BF16, (9, 0), False, ("fused", Tile(64, 32, 128, 4, 4), False, True)),
        (256, (4096, 4096), F16, (8, 0), False, ("fused", Tile(64, 64, 64, 8, 4), False, False)),
        (257, (4096, 4096), F16, (8, 0), False, ("fused", Tile(128, 128, 64, 8, 3), True, False)),
        (8192, (4096, 4096), BF16, (9, 0), False, ("split", Tile(128, 128, 64, 8, 3), True, True)),
        (8192, (2048, 2048), BF16, (10, 0), False, ("fused", Tile(128, 128, 64, 8, 3), True, True)),
        (8192, (64, 64), F32, (8, 0), False, ("split", Tile(64, 64, 16, 8, 3), False, False)),
        (256, (64, 64), F32, (8, 0), False, ("fused", Tile(32, 32, 32, 4, 2), False, False)),
        (1, (4096, 4096), BF16, (9, 0), True, ("fused", Tile(64, 64, 64, 4, 4), False, True)),
        (8192, (4096, 4096), F32, (9, 0), True, ("fused", Tile(64, 64, 16, 8, 3), False, True)),
    ],
)
def test_plan_table(tokens, sizes, dtype, capability, invariant, expected) -> None:
    chosen = plan(tokens, *sizes, 64, dtype, capability, invariant)
    assert (chosen.path, chosen.product, chosen.low_rank_first, chosen.pdl) == expected


def grid() -> Any:
    return product(
        (0, 1, 15, 16, 17, 64, 65, 256, 257, 4096, 4097, 2**33),
        (1, 172, 2048, 2049, 16384),
        (1, 172, 2048, 2049, 16384),
        (1, 16, 17, 64, 512),
        (BF16, F16, F32),
        ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)),
        (False, True),
    )


def test_plan_is_total_pure_and_bucketed() -> None:
    fixed: dict[Any, set[Plan]] = {}
    for sizes in grid():
        chosen = plan(*sizes)
        assert chosen == plan(*sizes) and chosen.path in ("fused", "split")
        for tile in (chosen.shrink, chosen.product, chosen.expand):
            for value in (tile.tokens, tile.columns, tile.depth):
                assert value >= 16 and value & (value - 1) == 0
        if sizes[-1]:
            assert chosen.path == "fused"
            fixed.setdefault(sizes[1:], set()).add(chosen)
    assert all(len(plans) == 1 for plans in fixed.values())
    buckets = {plan(t, 4096, 4096, 64, BF16, (9, 0), False) for t in range(1, 6000)}
    assert len(buckets) == 5


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_variants_cover_the_plan(capability: tuple[int, int]) -> None:
    found = backend.variants(capability)
    names = [v[0] for v in found]
    assert len(set(names)) == len(names)
    for _, kernel, signature, constexprs, options in found:
        assert list(signature) == list(kernel.arg_names)
        assert {k for k, v in signature.items() if v == "constexpr"} == set(constexprs)
        assert set(options) <= {"num_warps", "num_stages", "launch_pdl"}

    def key(constexprs: dict[str, Any], options: dict[str, Any]) -> Any:
        free = ("RANK", "ALIGNED", "bias_ptr", "ids_ptr")
        return frozenset({k: v for k, v in (constexprs | options).items() if k not in free}.items())

    compiled = {(v[1].__name__, v[2].get("p_ptr") or v[2].get("q_ptr"), key(*v[3:])) for v in found}
    for *sizes, dtype, at, invariant in grid():
        if at != capability:
            continue
        chosen = plan(*sizes, dtype, at, invariant)
        for name, lora_dtype, forward in product(
            ("shrink", "product" if chosen.path == "fused" else "expand"),
            {dtype, F32},
            (1,) if dtype == F16 else (0, 1),
        ):
            wanted = triton_launch.KINDS[lora_dtype]
            given = name, chosen, dtype, lora_dtype, 16, bool(forward), True
            for transposed in (False, dtype != F16):
                settings = backend.settings_of(*given, transposed)
                assert (f"{name}_kernel", wanted, key(*settings)) in compiled, (name, sizes)
