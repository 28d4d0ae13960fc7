"""Triton backend of mixed_lora: the launches of the forward and of dx. Unverified on a GPU.

Two paths, chosen by `plan` (clp_kernels.ops.mixed_lora.triton_plan):

- "fused": shrink, then one product that adds the low-rank part inside the base GEMM's accumulator.
  On sm_90 and later the product starts while the shrink runs (programmatic dependent launch).
- "split": the base product by PyTorch's GEMM, then shrink, then an expand that updates it in place.

dx is the same computation with the roles of the adapters exchanged; the other gradients are in
clp_kernels.ops.mixed_lora.triton_backward.
u is never split over its inner axis: a shrink program streams no more than a program of the product
that runs beside it, so that planes of u and their sum would save nothing and cost traffic.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from clp_kernels.ops.mixed_lora import triton_backward as _backward
from clp_kernels.ops.mixed_lora.triton_kernels import (
    Variant,
    expand_kernel,
    product_kernel,
    shrink_kernel,
    variant,
)
from clp_kernels.ops.mixed_lora.triton_plan import Plan, Tile, plan

INTERPRETED = not isinstance(product_kernel, triton.JITFunction)


_cached_plan = lru_cache(maxsize=4096)(plan)


def why_not(x: Tensor, *rest: Any) -> str | None:
    """None if the kernels run on the op's arguments, (x, ...) or (dy, x, ...), or a sentence."""
    if x.dtype == torch.float64:
        return "the triton kernels accumulate in float32, and the inputs are float64"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the inputs are on {x.device}, not on a GPU"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "the Triton interpreter computes bfloat16 dots wrongly"
    # The forward's last argument is `invariant`, the backward's the list `needs`.
    adapters = rest[2:4] if rest and isinstance(rest[-1], list) else rest[1:3]
    if any(t.numel() == 0 for t in adapters):
        shapes = " and ".join(str(list(t.shape)) for t in adapters)
        return f"the adapters are empty, {shapes}"
    return None


class _Adapters(NamedTuple):
    """What both products of a call share; contiguous."""

    lora_A: Tensor
    lora_B: Tensor
    weights: Tensor
    ids: Tensor | None

    @property
    def sizes(self) -> tuple[int, int]:
        """(m, r)."""
        return self.lora_A.shape[0], self.lora_A.shape[1]

    def counts(self, tokens: int) -> tuple[int, int, int]:
        """Adapters, examples, tokens of an example: three arguments of every kernel."""
        batch_size = self.weights.shape[0]
        return self.lora_A.shape[0], batch_size, tokens // max(1, batch_size)


def _adapters(
    lora_A: Tensor, lora_B: Tensor, weights: Tensor, example_ids: Tensor | None
) -> _Adapters:
    ids = None if example_ids is None else example_ids.contiguous()
    return _Adapters(lora_A.contiguous(), lora_B.contiguous(), weights.contiguous(), ids)


def _rows(x: Tensor) -> Tensor:
    """[..., features] as [T, features] with unit stride in a row; copies only where it must."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _aligned(*tensors: Tensor) -> bool:
    """Whether 16-byte loads are safe: pointers, and every size and stride a multiple of 16.

    Of matrices the last axis and the stride of rows count; the rank axis does not.
    """
    return all(
        t.data_ptr() % 16 == 0
        and (t.dim() == 3 or (t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0))
        for t in tensors
    )


def _plan_for(x: Tensor, features: int, rank: int, invariant: bool, path: str | None) -> Plan:
    # The interpreter runs the tiles of sm_80.
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    tokens = x.numel() // x.shape[-1]
    chosen = _cached_plan(tokens, x.shape[-1], features, rank, x.dtype, capability, invariant)
    if path is None:
        return chosen
    if path not in ("fused", "split"):
        raise ValueError(f'path must be "fused", "split" or None, got {path!r}')
    if invariant and path == "split":
        raise ValueError('path must be "fused" in batch-invariant mode, got "split"')
    return replace(chosen, path=path)


def _tile(kernel: str, chosen: Plan, mixed: bool) -> Tile:
    """The plan's tile, smaller beside `mixed` float32 adapters.

    Their dots hold each operand in three parts in registers, where the plan's tile would spill.
    """
    tile: Tile = getattr(chosen, kernel)
    if mixed and kernel == "shrink":
        return replace(tile, columns=min(tile.columns, 32), depth=32)
    if mixed and kernel == "expand":
        return replace(tile, columns=64)
    return tile


def _settings(
    kernel: str, chosen: Plan, x_dtype: torch.dtype, lora_dtype: torch.dtype, r: int,
    forward: bool, aligned: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Constexprs and compile options of one kernel: for its launch and for `variants`."""
    mixed = lora_dtype != x_dtype
    tile = _tile(kernel, chosen, mixed)
    constexprs: dict[str, Any] = {
        "RANK": r,
        "FORWARD": forward,
        "ALIGNED": aligned,
        # 16-bit values are exact in tf32, so three tf32 products keep float32 adapters exact too.
        "PRECISION": "tf32x3" if mixed else "ieee",
        "BLOCK_T": tile.tokens,
    }
    options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if kernel == "shrink":
        constexprs |= {"PDL": chosen.pdl, "BLOCK_R": tile.columns, "BLOCK_K": tile.depth}
        return constexprs, options
    constexprs |= {"BLOCK_N": tile.columns, "BLOCK_R": 16 if mixed else chosen.rank_block}
    if kernel == "product":
        constexprs |= {
            "PDL": chosen.pdl, "LOW_RANK_FIRST": chosen.low_rank_first, "BLOCK_K": tile.depth,
        }  # fmt: skip
        options |= {"launch_pdl": True} if chosen.pdl else {}
    return constexprs, options


def _shrink(
    x: Tensor, adapters: _Adapters, chosen: Plan, forward: bool, aligned: bool
) -> tuple[Tensor, Tensor]:
    """u and z of rows x [T, K], both float32 [T, m*r]."""
    (m, r), tokens = adapters.sizes, x.shape[0]
    u = x.new_empty(tokens, m * r, dtype=torch.float32)
    z = torch.empty_like(u)
    p = adapters.lora_A if forward else adapters.lora_B
    constexprs, options = _settings("shrink", chosen, x.dtype, p.dtype, r, forward, aligned)
    tiles_t = triton.cdiv(tokens, constexprs["BLOCK_T"])
    grid = tiles_t * triton.cdiv(m * r, constexprs["BLOCK_R"])
    if grid:
        shrink_kernel[(grid,)](
            x, p, adapters.weights, adapters.ids, u, z, tokens, x.shape[1],
            *adapters.counts(tokens), x.stride(0), **constexprs, **options,
        )  # fmt: skip
    return u, z


def _product(
    x: Tensor,
    base_weight: Tensor,
    bias: Tensor | None,
    adapters: _Adapters,
    forward: bool,
    chosen: Plan,
) -> tuple[Tensor, Tensor]:
    """(X M + bias + z Q [T, N], u [T, m*r]): the forward, or dx and g."""
    rows, r = _rows(x), adapters.sizes[1]
    base = _rows(base_weight)
    tokens, features = rows.shape[0], base.shape[0 if forward else 1]
    q = adapters.lora_B if forward else adapters.lora_A
    aligned = _aligned(rows, base, adapters.lora_A, adapters.lora_B) and features % 16 == 0
    kernel = "product" if chosen.path == "fused" else "expand"
    constexprs, options = _settings(kernel, chosen, x.dtype, q.dtype, r, forward, aligned)
    tiles_t = triton.cdiv(tokens, constexprs["BLOCK_T"])
    grid = tiles_t * triton.cdiv(features, constexprs["BLOCK_N"])
    if kernel == "expand":
        # On x as it came, so that a row of zero weights has the bits that F.linear gives for it.
        out = F.linear(x, base_weight if forward else base_weight.t(), bias)
        out = out.contiguous().view(tokens, features)
        u, z = _shrink(rows, adapters, chosen, forward, aligned)
        if grid:
            expand_kernel[(grid,)](
                z, q, adapters.weights, adapters.ids, out, tokens, features,
                *adapters.counts(tokens), **constexprs, **options,
            )  # fmt: skip
        return out, u
    out = x.new_empty(tokens, features)
    u, z = _shrink(rows, adapters, chosen, forward, aligned)
    if grid:
        product_kernel[(grid,)](
            rows, base, z, q, bias, adapters.weights, adapters.ids, out, tokens, rows.shape[1],
            features, *adapters.counts(tokens), rows.stride(0), base.stride(0),
            **constexprs, **options,
        )  # fmt: skip
    return out, u


def mixed_lora(
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    invariant: bool,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The op mixed_lora on a GPU; arguments and results as clp_kernels.ops.reference.mixed_lora.

        y_t = x_t W^T + bias + sum_i weights[b(t), i] (x_t A_i^T) B_i^T,    u = x A^T

    Returns y [..., out] in x's dtype and u [..., m*r] float32, contiguous. Accumulates in float32
    and rounds y once on the fused path, twice on the split one. A row of zeros in `weights` gives
    the bits of the base product that the path makes: F.linear's on the split path. In float16 the
    mixed activations u * weights must stay below 65,504.

    Args:
        path: "fused" or "split", for benchmarks; None follows `plan`.

    Deterministic. With `invariant` the bits of a row do not depend on the other rows.
    Raises: ValueError for a path that does not exist or does not suit `invariant`.
    """
    adapters = _adapters(lora_A, lora_B, weights, example_ids)
    m, r = adapters.sizes
    chosen = _plan_for(x, base_weight.shape[0], m * r, invariant, path)
    if bias is not None:
        bias = bias.contiguous()
    with torch.cuda.device_of(x):
        y, u = _product(x, base_weight, bias, adapters, True, chosen)
    return y.view(*x.shape[:-1], y.shape[-1]), u.view(*x.shape[:-1], m * r)


def mixed_lora_backward(
    dy: Tensor,
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    example_ids: Tensor | None,
    u: Tensor,
    invariant: bool,
    needs: list[bool],
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, base_weight, lora_A, lora_B, weights, bias); empty where not needed.

    As reference.mixed_lora_backward. A gradient that is not needed costs no launch; dx
    brings g = dy B along. The base matrix's gradient is PyTorch's GEMM, the bias's its sum.

    Deterministic. With `invariant` the bits of dx and of a row of dweights do not depend on the
    other rows; the gradients of the matrices are sums over all of them.
    """
    adapters = _adapters(lora_A, lora_B, weights, example_ids)
    m, r = adapters.sizes
    dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias = (x.new_empty(0) for _ in needs)
    x_rows, dy_rows, u_rows = _rows(x), _rows(dy), _rows(u).contiguous()
    g: Tensor | None = None
    with torch.cuda.device_of(x):
        chosen = _plan_for(dy, x.shape[-1], m * r, invariant, path)
        if needs[0]:
            dx, g = _product(dy, base_weight, None, adapters, False, chosen)
            dx = dx.view(x.shape)
        elif needs[2] or needs[4]:
            aligned = _aligned(dy_rows, adapters.lora_B)
            g, _ = _shrink(dy_rows, adapters, chosen, False, aligned)
        if needs[1]:
            d_base = dy_rows.t() @ x_rows
        if needs[2] or needs[3]:
            d_lora_A, d_lora_B = _backward.adapter_gradients(
                x_rows, dy_rows, g, u_rows, adapters.weights, adapters.ids,
                adapters.lora_A if needs[2] else None, adapters.lora_B if needs[3] else None,
                _aligned(x_rows, dy_rows) and u_rows.data_ptr() % 16 == 0,
            )  # fmt: skip
        if needs[4] and g is not None:
            d_weights = _backward.row_gradient(g, u_rows, adapters.ids, adapters.weights, r)
        if needs[5]:
            d_bias = dy_rows.sum(0, dtype=torch.float32).to(base_weight.dtype)
    return dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias


_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
)


def variants(capability: tuple[int, int]) -> list[Variant]:
    """Every kernel variant that `plan` can choose, for a compile without a GPU.

    Each tile with every pair of dtypes at r = 16 and aligned; the forward with bias and
    example_ids, dx without. float16 only forward: it compiles to bfloat16's code with another
    instruction type. One bucket also at r = 12, where nothing is aligned.
    """
    found: dict[str, Variant] = {}
    grid = product((16, 64, 256, 4096, 4097), (1024, 4096), (16, 64), _DTYPES, (False, True))
    for tokens, features, rank, dtypes, invariant in grid:
        chosen = plan(tokens, features, features, rank, dtypes[0], capability, invariant)
        directions = (True,) if dtypes[0] == torch.float16 else (True, False)
        for one in _variants(chosen, dtypes, rank // 16, 16, True, directions):
            found.setdefault(one[0], one)
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        chosen = plan(256, 4096, 4096, 60, dtypes[0], capability, False)
        for one in _variants(chosen, dtypes, 5, 12, False, (True,)):
            found.setdefault(one[0], one)
    return list(found.values())


def _variants(
    chosen: Plan,
    dtypes: tuple[torch.dtype, torch.dtype],
    m: int,
    r: int,
    aligned: bool,
    directions: tuple[bool, ...],
) -> Iterator[Variant]:
    for forward in directions:
        for kernel in (shrink_kernel, product_kernel, expand_kernel):
            name = kernel.__name__.removesuffix("_kernel")
            absent = () if forward else ("ids_ptr", *(["bias_ptr"] if name == "product" else []))
            settings = _settings(name, chosen, *dtypes, r, forward, aligned)
            yield variant(kernel, *dtypes, settings, absent)
    yield from _backward.variants(*dtypes, m, r, aligned)
