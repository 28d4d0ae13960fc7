"""Triton backend of mixed_lora: gradients of the adapters and of the rows of weights.

Unverified on a GPU. With u = x A^T, g = dy B (both [T, m*r] float32) and omega of each token:

    dA = (g * omega)^T x,    dB = dy^T (u * omega),    dweights[b, i] = sum_{t in b} g_ti . u_ti

dA and dB are one launch over x and dy that splits the tokens into parts; each part writes a float32
plane and `sum_planes_kernel` adds the planes in order. dweights runs over the tokens of one
example in their order, so that no other example can reach it, not even with a NaN. No atomics: two
runs give the same bits.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.ops.mixed_lora.triton_kernels import (
    RUNTIME_ARGUMENTS,
    Variant,
    finite_part,
    omega,
    select_scale,
    size,
    split_operand,
    tile_at,
    variant,
    weight_row,
)

# Unmeasured starting points: programs that fill a large GPU about four times, the fewest tokens
# worth a plane of their own, elements a program sums.
_PROGRAMS, _TOKENS_PER_PLANE, _SUM_BLOCK = 512, 256, 1024


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def adapter_gradient_kernel(
    x_ptr,
    dy_ptr,
    g_ptr,
    u_ptr,
    weights_ptr,
    ids_ptr,
    planes_ptr,
    num_tokens,
    in_features,
    out_features,
    num_adapters,
    batch_size,
    tokens_per_example,
    x_stride,
    dy_stride,
    splits,
    RANK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """planes[split] = [(g * omega)^T x, (u * omega)^T dy] over one part of the tokens.

    A plane is [m*r, in_features], then [m*r, out_features]; a size of 0 leaves that gradient out.
    WIDE: the adapters are float32, and so are the operands of the dots.
    """
    rank = num_adapters * RANK
    blocks_r = tl.cdiv(rank, BLOCK_R)
    blocks_a = tl.cdiv(in_features, BLOCK_F)
    blocks = blocks_a + tl.cdiv(out_features, BLOCK_F)
    pid = tl.program_id(0)
    block = pid // blocks_r % blocks
    split = pid // (blocks_r * blocks)
    plane = planes_ptr + split.to(tl.int64) * rank * (in_features + out_features)
    if block < blocks_a:
        s_ptr, y_ptr, y_stride, features = g_ptr, x_ptr, tl.cast(x_stride, tl.int64), in_features
    else:
        s_ptr, y_ptr, y_stride, features = u_ptr, dy_ptr, tl.cast(dy_stride, tl.int64), out_features
        plane += tl.cast(rank, tl.int64) * in_features
        block -= blocks_a
    y_stride = size(y_stride, ALIGNED)
    features = size(features, ALIGNED)
    j = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    f = block.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    j_in, f_in = j < rank, f < features

    part = tl.cdiv(tl.cdiv(num_tokens, splits), BLOCK_T) * BLOCK_T
    first = split.to(tl.int64) * part
    last = tl.minimum(first + part, num_tokens)
    acc = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    acc_low = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        t_in = t < last
        wanted = j_in[:, None] & t_in[None, :]
        row = weight_row(ids_ptr, t, num_tokens, tokens_per_example)[None, :]
        w = omega(weights_ptr, row, (j // RANK)[:, None], wanted, batch_size, num_adapters)
        s_tile = tile_at(s_ptr + t[None, :] * rank, j[:, None], 0, ALIGNED and RANK % 4 == 0)
        s = select_scale(tl.load(s_tile, mask=wanted, other=0.0), w)
        y_tile = tile_at(y_ptr + t[:, None] * y_stride, f[None, :], 1, ALIGNED)
        y = tl.load(y_tile, mask=t_in[:, None] & f_in[None, :], other=0.0)
        if WIDE:
            # fma for the reason given in the shrink: the gradient of float32 adapters is float32.
            acc = tl.fma(tl.dot(s, y.to(tl.float32), input_precision=PRECISION), 1.0, acc)
        else:
            high, low = split_operand(s, y.dtype)
            acc = tl.dot(high, y, acc)
            acc_low = tl.dot(low, y, acc_low)
    if not WIDE:
        acc += finite_part(acc_low)
    to = tile_at(plane + j[:, None] * features.to(tl.int64), f[None, :], 1, ALIGNED)
    tl.store(to, acc, mask=j_in[:, None] & f_in[None, :])


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def sum_planes_kernel(
    planes_ptr,
    d_lora_A_ptr,
    d_lora_B_ptr,
    in_features,
    out_features,
    num_adapters,
    splits,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the planes in order, rounds once, and lays dB out as [m, out_features, r]."""
    rank = tl.cast(num_adapters * RANK, tl.int64)
    size_a = rank * in_features
    total = size_a + rank * out_features
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        acc += tl.load(planes_ptr + split * total + element, mask=element < total, other=0.0)
    in_a = element < size_a
    tl.store(d_lora_A_ptr + element, acc.to(d_lora_A_ptr.dtype.element_ty), mask=in_a)
    # In the plane element (j, n), adapter j // r.
    rest = element - size_a
    j, n = rest // tl.maximum(out_features, 1), rest % tl.maximum(out_features, 1)
    to = (j // RANK) * RANK * out_features + n * RANK + j % RANK
    in_b = (element >= size_a) & (element < total)
    tl.store(d_lora_B_ptr + to, acc.to(d_lora_B_ptr.dtype.element_ty), mask=in_b)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def row_gradient_kernel(
    g_ptr,
    u_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    num_adapters,
    tokens_per_example,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[b, i] = sum over the tokens of example b of g_i . u_i; one program for each (b, i).

    The tokens of b are order[starts[b]:starts[b + 1]], or the b-th run of tokens_per_example where
    order_ptr is None. Tiles begin at the example's first token: its bits depend on nothing else.
    """
    pid = tl.program_id(0)
    b = (pid // num_adapters).to(tl.int64)
    adapter = pid % num_adapters
    if order_ptr is None:
        first = b * tokens_per_example
        last = first + tokens_per_example
    else:
        first = tl.load(starts_ptr + b)
        last = tl.load(starts_ptr + b + 1)
    j = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_T):
        position = start + tl.arange(0, BLOCK_T)
        t_in = position < last
        t = position
        if order_ptr is not None:
            t = tl.load(order_ptr + position, mask=t_in, other=0)
        at = (t[:, None] * num_adapters + adapter) * RANK + j[None, :]
        wanted = t_in[:, None] & (j < RANK)[None, :]
        g = tl.load(g_ptr + at, mask=wanted, other=0.0)
        u = tl.load(u_ptr + at, mask=wanted, other=0.0)
        acc += g * u
    tl.store(out_ptr + pid, tl.sum(tl.sum(acc, axis=1), axis=0))


def gradient_splits(tokens: int, in_features: int, out_features: int, rank: int) -> int:
    """Into how many parts the tokens are split for dA and dB: a function of the sizes alone."""
    tiles = triton.cdiv(rank, 64) * triton.cdiv(max(1, in_features + out_features), 128)
    return max(1, min(_PROGRAMS // tiles, tokens // _TOKENS_PER_PLANE))


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


def _row_settings(r: int) -> tuple[dict[str, Any], dict[str, Any]]:
    block_r = triton.next_power_of_2(r)
    constexprs = {"RANK": r, "BLOCK_T": max(1, 4096 // block_r), "BLOCK_R": block_r}
    return constexprs, {"num_warps": 8, "num_stages": 2}


def adapter_gradients(
    x: Tensor,
    dy: Tensor,
    g: Tensor | None,
    u: Tensor,
    weights: Tensor,
    example_ids: Tensor | None,
    like_A: Tensor | None,
    like_B: Tensor | None,
    is_aligned: bool,
) -> tuple[Tensor, Tensor]:
    """(dA like `like_A` [m, r, in], dB like `like_B` [m, out, r]); empty where that is None.

    x [T, in] and dy [T, out] with rows of unit stride; g and u [T, m*r] and weights contiguous; g
    may be None without `like_A`. is_aligned: pointers, strides and features suit 16-byte loads.
    """
    tokens, m = x.shape[0], weights.shape[1]
    r = u.shape[1] // m
    d_lora_A = x.new_empty(0) if like_A is None else torch.empty_like(like_A)
    d_lora_B = x.new_empty(0) if like_B is None else torch.empty_like(like_B)
    in_features = 0 if like_A is None else x.shape[1]
    out_features = 0 if like_B is None else dy.shape[1]
    lora_dtype = (d_lora_B if like_A is None else d_lora_A).dtype
    splits = gradient_splits(tokens, in_features, out_features, m * r)
    total = m * r * (in_features + out_features)
    planes = x.new_empty(splits, total, dtype=torch.float32)
    constexprs, options = _adapter_settings(x.dtype, lora_dtype, m, r, is_aligned)
    blocks = sum(triton.cdiv(n, constexprs["BLOCK_F"]) for n in (in_features, out_features))
    adapter_gradient_kernel[(triton.cdiv(m * r, constexprs["BLOCK_R"]) * blocks * splits,)](
        x, dy, u if g is None else g, u, weights, example_ids, planes,
        tokens, in_features, out_features, m, weights.shape[0],
        tokens // max(1, weights.shape[0]), x.stride(0), dy.stride(0), splits,
        **constexprs, **options,
    )  # fmt: skip
    sum_planes_kernel[(triton.cdiv(total, _SUM_BLOCK),)](
        planes, d_lora_A, d_lora_B, in_features, out_features, m, splits,
        RANK=r, BLOCK=_SUM_BLOCK, num_warps=4,
    )  # fmt: skip
    return d_lora_A, d_lora_B


def row_gradient(
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
    constexprs, options = _row_settings(r)
    row_gradient_kernel[(batch_size * m,)](
        g, u, order, starts, out, m, g.shape[0] // batch_size, **constexprs, **options
    )
    return out


def variants(
    x_dtype: torch.dtype, lora_dtype: torch.dtype, m: int, r: int, is_aligned: bool
) -> Iterator[Variant]:
    """The variants that the gradients of these dtypes and sizes launch."""
    adapters = _adapter_settings(x_dtype, lora_dtype, m, r, is_aligned)
    yield variant(adapter_gradient_kernel, x_dtype, lora_dtype, adapters)
    summed = {"RANK": r, "BLOCK": _SUM_BLOCK}, {"num_warps": 4}
    yield variant(sum_planes_kernel, x_dtype, lora_dtype, summed)
    # Its out_ptr is float32 whatever x is.
    rows = _row_settings(r)
    yield variant(row_gradient_kernel, torch.float32, torch.float32, rows)
    ordered = ("order_ptr", "starts_ptr")
    yield variant(row_gradient_kernel, torch.float32, torch.float32, rows, ordered)
