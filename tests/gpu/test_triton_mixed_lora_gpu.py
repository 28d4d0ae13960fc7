"""The Triton kernels of mixed_lora on a GPU, against the definition in float64. Needs a GPU."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import INF, NAN, LoraInputs
from cases import LORA_DTYPES as DTYPES
from launches import TRITON_GPU
from torch import Tensor

from clp_kernels.ops.mixed_lora import triton as backend
from clp_kernels.ops.mixed_lora import triton_kernels as kernels
from clp_kernels.testing import WEIGHT_KINDS, noncontiguous

pytestmark = TRITON_GPU


draw, run = partial(cases.lora_inputs, device="cuda"), partial(cases.run_lora, backend)


def judge(draws: list[LoraInputs], **mode: Any) -> None:
    cases.judge_lora(draws, [run(inputs, **mode) for inputs in draws])


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
    sizes = (tokens,), n_in, n_out, m, r
    judge([draw(dtypes, *sizes, kind, examples=5) for _ in range(count)], **mode)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("path", ["fused", "split"])
def test_small_padded_examples_within_budget(kind: str, path: str) -> None:
    judge([draw(DTYPES[0], (3, 30), 256, 320, 4, 16, kind) for _ in range(2)], path=path)


@pytest.mark.parametrize("path", ["fused", "split"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_large_sizes_within_budget(dtypes: Any, path: str) -> None:
    """d = 4096 at decode, at the sizes between, and at prefill: every row of the plan's table."""
    for leading in [(1, 1), (16, 1), (60, 1), (4, 64), (2, 700), (2, 2200)]:
        judge([draw(dtypes, leading, 4096, 4096, 4, 16)], path=path)


def test_small_noncontiguous_inputs() -> None:
    inputs = draw(DTYPES[0], (4, 9), 72, 40, 3, 8)
    expected, given = run(inputs), {k: t for k, t in vars(inputs).items() if t is not None}
    scattered = replace(inputs, **{k: noncontiguous(t) for k, t in given.items()})
    got = run(scattered)
    judge([scattered])
    assert {k: t.shape for k, t in got.items()} == {k: t.shape for k, t in expected.items()}
    # Off by one element: not aligned to 16 bytes.
    del given["dy"]
    flat = {k: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:] for k, t in given.items()}
    judge([replace(inputs, **{k: t.view(given[k].shape) for k, t in flat.items()})])


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("mode", MODES, ids=["fused", "split", "invariant"])
@pytest.mark.parametrize("tokens", [5, 400])
def test_zero_rows_are_the_base_product_bit_for_bit(
    tokens: int, mode: dict[str, Any], value: float
) -> None:
    inputs = draw(DTYPES[0], (4, tokens), 128, 96, 2, 16, "zero")
    bare = run(replace(inputs, weights=torch.zeros(4, 2, device="cuda")), **mode)
    if mode.get("path") == "split":
        base = F.linear(inputs.x, inputs.base_weight, inputs.bias)
        assert torch.equal(bare["y"], base)
    got = run(replace(inputs, **cases.not_finite(inputs, value)), **mode)
    for name in ("y", "d_x"):
        assert torch.equal(got[name][::2], bare[name][::2]), name
        assert not got[name][1::2].isfinite().all(), name


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["fused", "split"])
def test_two_runs_give_the_same_bits(path: str, dtypes: Any) -> None:
    inputs = draw(dtypes, (1500,), 512, 384, 4, 16, examples=9)
    cases.check_same_bits_twice(run, inputs, path)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_invariant_rows_do_not_depend_on_the_batch(dtypes: Any) -> None:
    inputs = draw(dtypes, (37, 11), 512, 384, 4, 16)
    order = torch.randperm(37, device="cuda")
    cases.check_invariant_rows(run, inputs, [order, order[:1], order[:20]])


@pytest.mark.parametrize("flat", [False, True])
def test_nan_in_one_example_does_not_reach_another_row(flat: bool) -> None:
    leading, examples = ((60,), 4) if flat else ((4, 15), None)
    inputs = draw(DTYPES[0], leading, 64, 64, 3, 8, examples=examples)
    cases.check_nan_stays_in_its_example(run, inputs)


@pytest.mark.parametrize(("tokens", "path"), [(4, None), (4, "split"), (600, "fused")])
def test_graph_replays_with_changed_weights(tokens: int, path: str | None) -> None:
    kinds = itertools.cycle(("dirichlet", "one_hot", "negative"))

    def results(args: dict[str, Any]) -> tuple[Tensor, ...]:
        return tuple(run(LoraInputs(**args), path=path).values())

    sizes = (4, tokens // 4), 512, 512, 4, 16
    cases.assert_graph_replays(results, lambda: vars(draw(DTYPES[0], *sizes, next(kinds))))


def test_no_compile_when_sizes_change_inside_a_bucket() -> None:
    caches = [
        k.device_caches[torch.cuda.current_device()][0]
        for k in (kernels.shrink_kernel, kernels.product_kernel)
    ]
    backend.mixed_lora(draw(DTYPES[0], (2, 3), 512, 512, 4, 16).call())
    before = [len(cache) for cache in caches]
    for leading in [(1, 1), (2, 1), (5, 1), (16, 1)]:
        inputs = draw(DTYPES[0], leading, 512, 512, 4, 16)
        # Weights that are not aligned to 16 bytes.
        shifted = torch.cat([inputs.weights.new_zeros(1), inputs.weights.flatten()])[1:]
        inputs.weights = shifted.view(leading[0], 4)
        backend.mixed_lora(inputs.call())
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
    small = draw(DTYPES[0], (2, 8), width, width, 4, 16)
    x = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    x[-256:].normal_()
    ids = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    ids[-256:] = 1
    inputs = small.call()._replace(x=x, example_ids=ids)
    last = inputs._replace(x=x[-256:].clone(), example_ids=ids[-256:])
    y, u = backend.mixed_lora(inputs, path=path)
    part, part_u = backend.mixed_lora(last, path=path)
    # The tiles differ with the number of tokens, so the bits may.
    torch.testing.assert_close(y[-256:], part, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(u[-256:], part_u, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[0], small.bias) and not u[0].any()
    dy = torch.zeros_like(y)
    dy[-256:].normal_()
    del y
    needs = [True, False, True, True, True, False]
    full = backend.mixed_lora_backward(inputs, dy, u, needs, path=path)
    alone = backend.mixed_lora_backward(last, dy[-256:].clone(), part_u, needs, path=path)
    torch.testing.assert_close(full[0][-256:], alone[0], rtol=2e-2, atol=2e-2)
    for index in (2, 3):
        torch.testing.assert_close(full[index], alone[index], rtol=2e-2, atol=2e-1)
    torch.testing.assert_close(full[4], alone[4], rtol=1e-3, atol=1e-2)
