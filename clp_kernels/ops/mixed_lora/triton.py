"""Triton backend of mixed_lora, forward and backward. Unverified on a GPU.

Two paths, chosen by `plan` (clp_kernels.ops.mixed_lora.triton_plan):

- "fused": shrink, then one product that adds the low-rank part inside the base GEMM's accumulator.
  On sm_90 and later the product starts while the shrink runs (programmatic dependent launch).
- "split": the base product by PyTorch's GEMM, then shrink, then an expand that updates it in place.

dx is the same computation with the roles of the adapters exchanged.
u is never split over its inner axis: a shrink program streams no more than a program of the product
that runs beside it, so that planes of u and their sum would save nothing and cost traffic.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from clp_kernels.ops import triton_launch
from clp_kernels.ops.mixed_lora import triton_kernels as kernels
from clp_kernels.ops.mixed_lora.reference import Inputs
from clp_kernels.ops.mixed_lora.triton_plan import Plan, Tile, plan
from clp_kernels.ops.triton_launch import KINDS, Variant, distinct, matrix, variant

# `plan` with its answers kept, since every call asks.
cached_plan = lru_cache(maxsize=4096)(plan)

# Unmeasured starting points: programs that fill a large GPU about four times, the fewest tokens
# worth a plane of their own, elements a program sums.
_PROGRAMS, TOKENS_PER_PLANE, _SUM_BLOCK = 512, 256, 1024


def why_not(inputs: Inputs, *_: object) -> str | None:
    """None if the kernels run, forward or backward, or a sentence."""
    if (reason := triton_launch.why_not(inputs.x, dots=True)) is not None:
        return reason
    adapters = (inputs.lora_A, inputs.lora_B)
    if any(t.numel() == 0 for t in adapters):
        shapes = " and ".join(str(list(t.shape)) for t in adapters)
        return f"the adapters are empty, {shapes}"
    return None


def _contiguous(inputs: Inputs) -> Inputs:
    """The inputs, of which all but x and base_weight are contiguous, as the kernels read them."""
    x, base_weight, lora_A, lora_B, weights, bias, ids, invariant = inputs
    bias, ids = (None if t is None else t.contiguous() for t in (bias, ids))
    adapters = lora_A.contiguous(), lora_B.contiguous(), weights.contiguous()
    return Inputs(x, base_weight, *adapters, bias, ids, invariant)


def _counts(weights: Tensor, tokens: int) -> tuple[int, int, int]:
    """Adapters, examples, tokens per example: three arguments of every kernel."""
    batch_size, m = weights.shape
    return m, batch_size, tokens // max(1, batch_size)


def _aligned(*tensors: Tensor) -> bool:
    """Whether 16-byte loads are safe: pointers, and every size and stride a multiple of 16.

    Of matrices the last axis and the stride of rows count; the rank axis does not.
    """
    return all(
        t.data_ptr() % 16 == 0
        and (t.dim() == 3 or (t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0))
        for t in tensors
    )


def _plan_for(inputs: Inputs, x: Tensor, features: int, path: str | None) -> Plan:
    capability, invariant = triton_launch.capability_of(x), inputs.invariant
    tokens, rank = x.numel() // x.shape[-1], inputs.lora_A.shape[:2].numel()
    chosen = cached_plan(tokens, x.shape[-1], features, rank, x.dtype, capability, invariant)
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


def settings_of(
    kernel: str, chosen: Plan, x_dtype: torch.dtype, lora_dtype: torch.dtype, r: int,
    forward: bool, aligned: bool, transposed: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Constexprs and compile options of one kernel: for its launch and for `variants`.

    transposed: whether base_weight lies in memory as [in, out].
    """
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
        if transposed and mixed:  # 128 spills registers on sm_80 (Triton 3.7.1)
            tile = replace(tile, depth=min(tile.depth, 64))
        constexprs |= {
            "BY_OUTPUT": forward != transposed, "PDL": chosen.pdl,
            "LOW_RANK_FIRST": chosen.low_rank_first, "BLOCK_K": tile.depth,
        }  # fmt: skip
        options |= {"launch_pdl": True} if chosen.pdl else {}
    return constexprs, options


def _shrink(
    inputs: Inputs, x: Tensor, chosen: Plan, forward: bool, aligned: bool
) -> tuple[Tensor, Tensor]:
    """u and z of rows x [T, K], both float32 [T, m*r]."""
    (m, r, _), tokens = inputs.lora_A.shape, x.shape[0]
    u = x.new_empty(tokens, m * r, dtype=torch.float32)
    z = torch.empty_like(u)
    p = inputs.lora_A if forward else inputs.lora_B
    constexprs, options = settings_of("shrink", chosen, x.dtype, p.dtype, r, forward, aligned)
    tiles_t = triton.cdiv(tokens, constexprs["BLOCK_T"])
    grid = tiles_t * triton.cdiv(m * r, constexprs["BLOCK_R"])
    if grid:
        kernels.shrink_kernel[(grid,)](
            x, p, inputs.weights, inputs.example_ids, u, z, tokens, x.shape[1],
            *_counts(inputs.weights, tokens), x.stride(0), **constexprs, **options,
        )  # fmt: skip
    return u, z


def _product(inputs: Inputs, x: Tensor, forward: bool, chosen: Plan) -> tuple[Tensor, Tensor]:
    """(X M + bias + z Q [T, N], u [T, m*r]): the forward of x, or dx and g of dy."""
    _, base_weight, lora_A, lora_B, weights, bias, ids, _ = inputs
    rows, r = matrix(x), lora_A.shape[1]
    tokens, features = rows.shape[0], base_weight.shape[0 if forward else 1]
    q = lora_B if forward else lora_A
    kernel = "product" if chosen.path == "fused" else "expand"
    base, transposed = base_weight, False
    aligned = _aligned(rows, lora_A, lora_B) and features % 16 == 0
    if kernel == "product":
        # A transposed one (GPT-2's Conv1D) is read as it lies: a copy in each call would cost as
        # much as a decoding step's product.
        transposed = base.stride(1) != 1 and base.stride(0) == 1
        base = matrix(base.t() if transposed else base)
        aligned = aligned and _aligned(base)
    settings = settings_of(kernel, chosen, x.dtype, q.dtype, r, forward, aligned, transposed)
    constexprs, options = settings
    tiles_t = triton.cdiv(tokens, constexprs["BLOCK_T"])
    grid = tiles_t * triton.cdiv(features, constexprs["BLOCK_N"])
    if kernel == "expand":
        # On x as it came, so that zero weights give the bits of F.linear.
        out = F.linear(x, base_weight if forward else base_weight.t(), bias)
        out = out.contiguous().view(tokens, features)
        u, z = _shrink(inputs, rows, chosen, forward, aligned)
        if grid:
            kernels.expand_kernel[(grid,)](
                z, q, weights, ids, out, tokens, features, *_counts(weights, tokens),
                **constexprs, **options,
            )  # fmt: skip
        return out, u
    out = x.new_empty(tokens, features)
    u, z = _shrink(inputs, rows, chosen, forward, aligned)
    if grid:
        kernels.product_kernel[(grid,)](
            rows, base, z, q, bias, weights, ids, out, tokens, rows.shape[1], features,
            *_counts(weights, tokens), rows.stride(0), base.stride(0), **constexprs, **options,
        )  # fmt: skip
    return out, u


def mixed_lora(inputs: Inputs, path: str | None = None) -> tuple[Tensor, Tensor]:
    """As reference.mixed_lora.

    Returns y [..., out] in x's dtype and u [..., m*r] float32, contiguous. Accumulates in float32
    and rounds y once on the fused path, twice on the split one. Weights that are all zero give the
    bits of the base product that the path makes: F.linear's on the split path. In float16 the
    mixed activations u * weights must stay below 65,504.

    Args:
        path: "fused" or "split", for benchmarks; None follows `plan`.

    Deterministic. With `invariant` the bits of a row do not depend on the other rows.
    Raises: ValueError for a path that does not exist or does not suit `invariant`.
    """
    inputs, x = _contiguous(inputs), inputs.x
    chosen = _plan_for(inputs, x, inputs.base_weight.shape[0], path)
    with torch.cuda.device_of(x):
        y, u = _product(inputs, x, True, chosen)
    return y.view(*x.shape[:-1], y.shape[-1]), u.view(*x.shape[:-1], u.shape[-1])


def mixed_lora_backward(
    inputs: Inputs, dy: Tensor, u: Tensor, needs: list[bool], path: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, base_weight, lora_A, lora_B, weights, bias); empty where not needed.

    As reference.mixed_lora_backward. A gradient that is not needed costs no launch; dx also gives
    g = dy B. The base matrix's gradient is PyTorch's GEMM, the bias's its sum.

    Deterministic. With `invariant` the bits of dx and of a row of dweights do not depend on the
    other rows; the gradients of the matrices are sums over all of them.
    """
    inputs = _contiguous(inputs._replace(bias=None))
    x, base_weight, lora_A, lora_B, weights, _, ids, _ = inputs
    dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias = (x.new_empty(0) for _ in needs)
    x_rows, dy_rows, u_rows = matrix(x), matrix(dy), matrix(u).contiguous()
    g: Tensor | None = None
    with torch.cuda.device_of(x):
        chosen = _plan_for(inputs, dy, x.shape[-1], path)
        if needs[0]:
            dx, g = _product(inputs, dy, False, chosen)
            dx = dx.view(x.shape)
        elif needs[2] or needs[4]:
            g, _ = _shrink(inputs, dy_rows, chosen, False, _aligned(dy_rows, lora_B))
        if needs[1]:
            d_base = dy_rows.t() @ x_rows
        if needs[2] or needs[3]:
            rows = (x_rows, dy_rows, u_rows if g is None else g, u_rows)
            d_lora_A, d_lora_B = _adapter_gradients(inputs, *rows, needs)
        if needs[4] and g is not None:
            d_weights = _weight_gradient(g, u_rows, ids, weights, lora_A.shape[1])
        if needs[5]:
            d_bias = dy_rows.sum(0, dtype=torch.float32).to(base_weight.dtype)
    return dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias


def gradient_splits(tokens: int, in_features: int, out_features: int, rank: int) -> int:
    """Into how many parts the tokens are split for dA and dB: a function of the sizes alone."""
    tiles = triton.cdiv(rank, 64) * triton.cdiv(max(1, in_features + out_features), 128)
    return max(1, min(_PROGRAMS // tiles, tokens // TOKENS_PER_PLANE))


def _adapter_settings(
    x_dtype: torch.dtype, lora_dtype: torch.dtype, m: int, r: int, is_aligned: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    full, wide = x_dtype == torch.float32, lora_dtype == torch.float32
    block_r = 16 if m * r <= 16 else 32 if full else 64
    constexprs = {
        "RANK": r,
        "WIDE": wide,
        "ALIGNED": is_aligned,
        "PRECISION": "tf32x3" if wide and not full else "ieee",
        "BLOCK_R": block_r,
        "BLOCK_F": 64 if wide else 128,
        # 32 spills registers on sm_80 (Triton 3.7.1).
        "BLOCK_T": 16,
    }
    return constexprs, {"num_warps": 8, "num_stages": 3}


def _weight_settings(r: int) -> tuple[dict[str, Any], dict[str, Any]]:
    block_r = triton.next_power_of_2(r)
    constexprs = {"RANK": r, "BLOCK_T": max(1, 4096 // block_r), "BLOCK_R": block_r}
    return constexprs, {"num_warps": 8, "num_stages": 2}


def _adapter_gradients(
    inputs: Inputs, x: Tensor, dy: Tensor, g: Tensor, u: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """(dA [m, r, in], dB [m, out, r]); empty where not needed.

    x [T, in] and dy [T, out] with rows of unit stride; g and u [T, m*r] contiguous; dB does not
    depend on g.
    """
    lora_A, lora_B, weights = inputs[2:5]
    (m, r, _), tokens = lora_A.shape, x.shape[0]
    d_lora_A = torch.empty_like(lora_A) if needs[2] else x.new_empty(0)
    d_lora_B = torch.empty_like(lora_B) if needs[3] else x.new_empty(0)
    in_features = x.shape[1] if needs[2] else 0
    out_features = dy.shape[1] if needs[3] else 0
    is_aligned = _aligned(x, dy) and u.data_ptr() % 16 == 0
    splits = gradient_splits(tokens, in_features, out_features, m * r)
    total = m * r * (in_features + out_features)
    planes = x.new_empty(splits, total, dtype=torch.float32)
    constexprs, options = _adapter_settings(x.dtype, lora_A.dtype, m, r, is_aligned)
    blocks = sum(triton.cdiv(n, constexprs["BLOCK_F"]) for n in (in_features, out_features))
    kernels.adapter_gradient_kernel[(triton.cdiv(m * r, constexprs["BLOCK_R"]) * blocks * splits,)](
        x, dy, g, u, weights, inputs.example_ids, planes, tokens, in_features, out_features,
        *_counts(weights, tokens), x.stride(0), dy.stride(0), splits, **constexprs, **options,
    )  # fmt: skip
    kernels.sum_planes_kernel[(triton.cdiv(total, _SUM_BLOCK),)](
        planes, d_lora_A, d_lora_B, in_features, out_features, m, splits,
        RANK=r, BLOCK=_SUM_BLOCK, num_warps=4,
    )  # fmt: skip
    return d_lora_A, d_lora_B


def _weight_gradient(
    g: Tensor, u: Tensor, example_ids: Tensor | None, weights: Tensor, r: int
) -> Tensor:
    """dweights [B, m] float32 from contiguous g and u [T, m*r]."""
    batch_size, m = weights.shape
    out = torch.empty_like(weights, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    order = starts = None
    if example_ids is not None:
        # Stable: each example's tokens stay in their order, wherever they stand in the batch.
        ids, order = torch.sort(example_ids, stable=True)
        edges = torch.arange(batch_size + 1, device=ids.device, dtype=ids.dtype)
        starts = torch.searchsorted(ids, edges)
    constexprs, options = _weight_settings(r)
    kernels.weight_gradient_kernel[(batch_size * m,)](
        g, u, order, starts, out, m, g.shape[0] // batch_size, **constexprs, **options
    )
    return out


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
    example_ids, dx without; with a base_weight that is stored transposed, too. float16 only
    forward: it compiles to bfloat16's code with another instruction type. One bucket also at
    r = 12, where nothing is aligned.
    """
    found: list[Variant] = []
    grid = product((16, 64, 256, 4096, 4097), (1024, 4096), (16, 64), _DTYPES, (False, True))
    for tokens, features, rank, dtypes, invariant in grid:
        chosen = plan(tokens, features, features, rank, dtypes[0], capability, invariant)
        directions = (True,) if dtypes[0] == torch.float16 else (True, False)
        found += _variants(chosen, dtypes, rank // 16, 16, True, directions)
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        chosen = plan(256, 4096, 4096, 60, dtypes[0], capability, False)
        found += _variants(chosen, dtypes, 5, 12, False, (True,))
    return distinct(found)


# The dtype of each pointer: x's, the adapters', or its own; float32 if it is not named.
_IN_X_DTYPE = ("x", "dy", "base", "bias", "out")
_IN_LORA_DTYPE = ("p", "q", "d_lora_A", "d_lora_B")
_OWN = {"ids": "*i32", "order": "*i64", "starts": "*i64"}


def _variants(
    chosen: Plan,
    dtypes: tuple[torch.dtype, torch.dtype],
    m: int,
    r: int,
    aligned: bool,
    directions: tuple[bool, ...],
) -> Iterator[Variant]:
    x_kind, lora_kind = (KINDS[dtype] for dtype in dtypes)
    kinds = {**_OWN, **dict.fromkeys(_IN_X_DTYPE, x_kind)}
    kinds |= dict.fromkeys(_IN_LORA_DTYPE, lora_kind)

    def one(kernel: Any, settings: tuple[dict[str, Any], dict[str, Any]], *absent: str) -> Variant:
        pointers = [a[:-4] for a in kernel.arg_names if a.endswith("_ptr")]
        types = {name: kinds.get(name, "*fp32") for name in pointers if name not in absent}
        return variant(kernel, *settings, types)

    for forward in directions:
        for name in ("shrink", "product", "expand"):
            settings = settings_of(name, chosen, *dtypes, r, forward, aligned)
            absent = () if forward else ("ids", "bias")
            yield one(getattr(kernels, f"{name}_kernel"), settings, *absent)
        if dtypes[0] != torch.float16:
            settings = settings_of("product", chosen, *dtypes, r, forward, aligned, transposed=True)
            yield one(kernels.product_kernel, settings, *absent)
    adapters = _adapter_settings(*dtypes, m, r, aligned)
    yield one(kernels.adapter_gradient_kernel, adapters)
    summed = {"RANK": r, "BLOCK": _SUM_BLOCK}, {"num_warps": 4}
    yield one(kernels.sum_planes_kernel, summed)
    kinds["out"] = "*fp32"  # of the gradient of weights, whatever x is
    for absent in ((), ("order", "starts")):
        yield one(kernels.weight_gradient_kernel, _weight_settings(r), *absent)
