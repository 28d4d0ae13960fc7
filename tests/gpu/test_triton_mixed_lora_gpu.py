"""The Triton kernels of mixed_lora on a GPU, against the definition in float64. Needs a GPU."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels.testing import WEIGHT_KINDS, assert_within_budget, noncontiguous, weight_rows

pytest.importorskip("triton")

from clp_kernels.ops.mixed_lora import triton as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or kernels.INTERPRETED,
        reason="needs a CUDA device, and triton without its interpreter",
    ),
]

DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
]
NAMES = ("x", "base_weight", "lora_A", "lora_B", "weights", "bias")
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _poison_and_seed() -> Any:
    """torch.empty gives NaN: an element that a kernel does not write fails its test."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


def draw(
    dtypes: tuple[torch.dtype, torch.dtype],
    leading: tuple[int, ...],
    n_in: int,
    n_out: int,
    m: int,
    r: int,
    kind: str = "all_different",
    examples: int | None = None,
) -> dict[str, Any]:
    """Arguments of the op by name; `examples` makes the tokens flat, with unsorted ids."""
    dtype, lora_dtype = dtypes
    batch = leading[0] if examples is None else examples
    cuda = {"device": "cuda"}
    ids = None
    if examples is not None:
        ids = torch.randint(0, examples, leading, dtype=torch.int32, **cuda)
    return {
        "x": torch.randn(*leading, n_in, **cuda).to(dtype),
        "base_weight": (torch.randn(n_out, n_in, **cuda) * n_in**-0.5).to(dtype),
        "lora_A": (torch.randn(m, r, n_in, **cuda) * n_in**-0.5).to(lora_dtype),
        "lora_B": (torch.randn(m, n_out, r, **cuda) * r**-0.5).to(lora_dtype),
        "weights": weight_rows(kind, batch, m, device="cuda"),
        "bias": torch.randn(n_out, **cuda).to(dtype),
        "ids": ids,
    }


def run(
    args: dict[str, Any], dy: Tensor, invariant: bool = False, path: str | None = None
) -> dict[str, Tensor]:
    *inputs, ids = args.values()
    y, u = kernels.mixed_lora(*inputs, ids, invariant, path=path)
    grads = kernels.mixed_lora_backward(dy, *inputs[:5], ids, u, invariant, [True] * 6, path=path)
    return {"y": y, "u": u} | {f"d_{k}": g for k, g in zip(NAMES, grads, strict=True)}


def plain(args: dict[str, Any], dy: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The formula in plain PyTorch under autograd, in float64 or in the inputs' own dtypes."""
    leaves = {k: args[k].detach().to(dtype or args[k].dtype).requires_grad_() for k in NAMES}
    x, base_weight, lora_A, lora_B, weights, bias = leaves.values()
    m, r, _ = lora_A.shape
    rows = args["ids"]
    if rows is None:
        tokens = x.numel() // x.shape[-1]
        rows = torch.arange(tokens, device=x.device) // max(1, tokens // max(1, len(weights)))
    u = F.linear(x.to(lora_A.dtype), lora_A.flatten(0, 1)).reshape(-1, m * r)
    z = u * weights[rows.long()].to(u.dtype).repeat_interleave(r, dim=-1)
    delta = F.linear(z, lora_B.transpose(0, 1).reshape(-1, m * r)).to(x.dtype)
    y = F.linear(x, base_weight, bias) + delta.view(*x.shape[:-1], delta.shape[-1])
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y, "u": u.view(*x.shape[:-1], m * r)} | {
        f"d_{k}": g for k, g in zip(leaves, grads, strict=True)
    }


def judge(cases: list[tuple[dict[str, Any], Tensor]], **mode: Any) -> None:
    """The error budget of the output, u and every gradient, over all the cases together.

    Together, because a result of few numbers must not be judged where plain PyTorch was lucky.
    """
    got = [run(args, dy, **mode) for args, dy in cases]
    exact = [plain(args, dy, torch.float64) for args, dy in cases]
    same = [plain(args, dy, None) for args, dy in cases]
    for (args, _), ours in zip(cases, same, strict=True):
        # u is kept in float32, so float32 is what it is held to.
        ours["u"] = F.linear(args["x"].float(), args["lora_A"].flatten(0, 1).float())
    for name in exact[0]:
        columns = (torch.stack([r[name] for r in rows]) for rows in (got, exact, same))
        assert_within_budget(*columns, name=name)


def upstream(args: dict[str, Any]) -> Tensor:
    return torch.randn(*args["x"].shape[:-1], len(args["bias"]), device="cuda").to(args["x"].dtype)


def drawn(count: int, *args: Any, **kwargs: Any) -> list[tuple[dict[str, Any], Tensor]]:
    cases = [draw(*args, **kwargs) for _ in range(count)]
    return [(case, upstream(case)) for case in cases]


MODES: list[dict[str, Any]] = [{"path": "fused"}, {"path": "split"}, {"invariant": True}]


@pytest.mark.parametrize("mode", MODES, ids=["fused", "split", "invariant"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "n_in", "n_out", "m", "r"),
    [
        (0, 64, 64, 2, 8),
        (1, 1, 1, 1, 1),
        (1, 896, 2049, 2, 16),
        (2, 172, 300, 3, 12),
        (7, 8, 172, 5, 4),
        (17, 300, 8, 8, 64),
        (64, 2049, 896, 4, 16),
        (129, 172, 64, 3, 1),
        (200, 2048, 1024, 4, 16),
        (1000, 896, 896, 4, 16),
    ],
)
def test_small_flat_tokens_within_budget(
    tokens: int, n_in: int, n_out: int, m: int, r: int, dtypes: Any, mode: dict[str, Any]
) -> None:
    count = 1 if tokens > 64 else 16 if n_in * n_out < 100 else 4
    kind = WEIGHT_KINDS[tokens % len(WEIGHT_KINDS)]
    judge(drawn(count, dtypes, (tokens,), n_in, n_out, m, r, kind, examples=5), **mode)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("path", ["fused", "split"])
def test_small_padded_examples_within_budget(kind: str, path: str) -> None:
    judge(drawn(2, DTYPES[0], (3, 30), 256, 320, 4, 16, kind), path=path)


@pytest.mark.parametrize("path", ["fused", "split"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_large_sizes_within_budget(dtypes: Any, path: str) -> None:
    """d = 4096 at decode, at the sizes between, and at prefill: every row of the plan's table."""
    for leading in [(1, 1), (16, 1), (60, 1), (4, 64), (2, 700), (2, 2200)]:
        judge(drawn(1, dtypes, leading, 4096, 4096, 4, 16), path=path)


def test_small_noncontiguous_inputs() -> None:
    args, dy = drawn(1, DTYPES[0], (4, 9), 72, 40, 3, 8)[0]
    expected = run(args, dy)
    scattered = {k: None if t is None else noncontiguous(t) for k, t in args.items()}
    got = run(scattered, noncontiguous(dy))
    judge([(scattered, noncontiguous(dy))])
    assert {k: t.shape for k, t in got.items()} == {k: t.shape for k, t in expected.items()}
    # Off by one element: not aligned to 16 bytes.
    shifted = {
        k: None if t is None else torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape)
        for k, t in args.items()
    }
    judge([(shifted, dy)])


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("mode", MODES, ids=["fused", "split", "invariant"])
@pytest.mark.parametrize("tokens", [5, 400])
def test_zero_rows_are_the_base_product_bit_for_bit(
    tokens: int, mode: dict[str, Any], value: float
) -> None:
    args = draw(DTYPES[0], (4, tokens), 128, 96, 2, 16, "zero")
    dy = upstream(args)
    bare = run(args | {"weights": torch.zeros(4, 2, device="cuda")}, dy, **mode)
    if mode.get("path") == "split":
        base = F.linear(args["x"], args["base_weight"], args["bias"])
        assert torch.equal(bare["y"], base)
    lora_A, lora_B = args["lora_A"].clone(), args["lora_B"].clone()
    lora_A[0, 0, 3] = lora_B[0, 5, 0] = value
    got = run(args | {"lora_A": lora_A, "lora_B": lora_B}, dy, **mode)
    for name in ("y", "d_x"):
        assert torch.equal(got[name][::2], bare[name][::2]), name
        assert not got[name][1::2].isfinite().all(), name


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["fused", "split"])
def test_two_runs_give_the_same_bits(path: str, dtypes: Any) -> None:
    args, dy = drawn(1, dtypes, (1500,), 512, 384, 4, 16, examples=9)[0]
    first, second = run(args, dy, path=path), run(args, dy, path=path)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_invariant_rows_do_not_depend_on_the_batch(dtypes: Any) -> None:
    args, dy = drawn(1, dtypes, (37, 11), 512, 384, 4, 16)[0]
    got = run(args, dy, invariant=True)
    order = torch.randperm(37, device="cuda")
    for rows in (order, order[:1], order[:20]):
        part = args | {"x": args["x"][rows], "weights": args["weights"][rows]}
        other = run(part, dy[rows], invariant=True)
        for name in ("y", "u", "d_x", "d_weights"):
            assert torch.equal(other[name], got[name][rows]), name


@pytest.mark.parametrize("flat", [False, True])
def test_nan_in_one_example_does_not_reach_another_row(flat: bool) -> None:
    args = draw(DTYPES[0], (60,) if flat else (4, 15), 64, 64, 3, 8, examples=4 if flat else None)
    dy = upstream(args)
    expected = run(args, dy)["d_weights"]
    rows = args["ids"] if flat else torch.arange(60, device="cuda") // 15
    dy.view(-1, 64)[(rows == 2).nonzero()[0, 0]] = NAN
    got = run(args, dy)["d_weights"]
    others = [0, 1, 3]
    assert got[2].isnan().all() and torch.equal(got[others], expected[others])


@pytest.mark.parametrize(("tokens", "path"), [(4, None), (4, "split"), (600, "fused")])
def test_graph_replays_with_changed_weights(tokens: int, path: str | None) -> None:
    """Also that no launch reads a tensor on the host."""
    args = draw(DTYPES[0], (4, tokens // 4), 512, 512, 4, 16)
    dy = upstream(args)
    run(args, dy, path=path)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = run(args, dy, path=path)
    for kind in ("one_hot", "negative"):
        args["weights"].copy_(weight_rows(kind, 4, 4, device="cuda"))
        args["x"].normal_()
        graph.replay()
        expected = run(args, dy, path=path)
        for name in expected:
            assert torch.equal(captured[name], expected[name]), (kind, name)


def test_no_compile_when_sizes_change_inside_a_bucket() -> None:
    caches = [
        k.device_caches[torch.cuda.current_device()][0]
        for k in (kernels.shrink_kernel, kernels.product_kernel)
    ]
    args = draw(DTYPES[0], (2, 3), 512, 512, 4, 16)
    kernels.mixed_lora(*list(args.values())[:6], None, False)
    before = [len(cache) for cache in caches]
    for leading in product((1, 2, 5, 16), (1,)):
        args = draw(DTYPES[0], leading, 512, 512, 4, 16)
        # Weights that are not aligned to 16 bytes.
        args["weights"] = torch.cat([args["weights"].new_zeros(1), args["weights"].flatten()])[
            1:
        ].view(leading[0], 4)
        kernels.mixed_lora(*list(args.values())[:6], None, False)
    assert [len(cache) for cache in caches] == before


@pytest.mark.slow
@pytest.mark.parametrize("path", ["fused", "split"])
def test_more_than_two_to_the_31_elements(path: str) -> None:
    """x and y beyond int32 indices: the last rows equal the same rows alone."""
    tokens, width = 2**31 // 2048 + 300, 2048
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * tokens * width:
        pytest.skip(f"needs {12 * tokens * width >> 30} GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)
    args = draw(DTYPES[0], (2, 8), width, width, 4, 16)
    x = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    x[-256:].normal_()
    ids = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    ids[-256:] = 1
    inputs = list(args.values())[1:6]
    y, u = kernels.mixed_lora(x, *inputs, ids, False, path=path)
    part, part_u = kernels.mixed_lora(x[-256:].clone(), *inputs, ids[-256:], False, path=path)
    # The tiles differ with the number of tokens, so the bits may.
    torch.testing.assert_close(y[-256:], part, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(u[-256:], part_u, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[0], args["bias"]) and not u[0].any()
    dy = torch.zeros_like(y)
    dy[-256:].normal_()
    del y
    needs = [True, False, True, True, True, False]
    full = kernels.mixed_lora_backward(dy, x, *inputs[:4], ids, u, False, needs, path=path)
    alone = kernels.mixed_lora_backward(
        dy[-256:].clone(), x[-256:].clone(), *inputs[:4], ids[-256:], part_u, False, needs,
        path=path,
    )  # fmt: skip
    torch.testing.assert_close(full[0][-256:], alone[0], rtol=2e-2, atol=2e-2)
    for index in (2, 3):
        torch.testing.assert_close(full[index], alone[index], rtol=2e-2, atol=2e-1)
    torch.testing.assert_close(full[4], alone[4], rtol=1e-3, atol=1e-2)
