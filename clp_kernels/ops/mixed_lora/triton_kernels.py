"""Triton device code of mixed_lora: shrink, the fused product, and expand. Unverified on a GPU.

One product serves the forward and dx, with (X, M, P, Q) = (x, W^T, A^T, B^T) or (dy, W, B, A):

    OUT = X M + select(rows, (X P) * omega) Q

`shrink_kernel` writes u = X P and z = u * omega in float32. `product_kernel` runs X M and z Q
into one float32 accumulator and rounds once; `expand_kernel` adds z Q to a product that a GEMM
library made. Launchers and the table of tiles are in clp_kernels.ops.mixed_lora.triton.

Accuracy. u is an output in float32, so its long sum over the inner axis is not left to the tensor
core's accumulator, which truncates. z is not rounded to a 16-bit dtype: it enters the dot as
z = high + low, so the low-rank part is as exact as the definition's.

Selection. A zero weight contributes exactly nothing: z is selected, not multiplied, and where the
whole row of weights is zero the low-rank part is dropped by a select after the dot, so that
infinities and NaN in A or B cannot reach that row.
"""

from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Every runtime argument of every kernel. None is specialised: no size, no alignment and no equality
# to 1 makes Triton compile in the middle of a request. Alignment is the constexpr ALIGNED instead.
RUNTIME_ARGUMENTS = (
    "x_ptr", "base_ptr", "p_ptr", "q_ptr", "u_ptr", "z_ptr", "bias_ptr", "weights_ptr", "ids_ptr",
    "out_ptr", "dy_ptr", "g_ptr", "planes_ptr", "d_lora_A_ptr", "d_lora_B_ptr", "order_ptr",
    "starts_ptr", "num_tokens", "depth", "features", "in_features", "out_features", "num_adapters",
    "batch_size", "tokens_per_example", "x_stride", "base_stride", "dy_stride", "first", "last",
    "splits",
)  # fmt: skip

_TRITON_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_IN_X_DTYPE = ("x_ptr", "dy_ptr", "base_ptr", "bias_ptr", "out_ptr")
_IN_LORA_DTYPE = ("p_ptr", "q_ptr", "d_lora_A_ptr", "d_lora_B_ptr")

# (name, kernel, signature, constexprs, options), as triton.compile and its ASTSource take them.
Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]


def variant(
    kernel: Any,
    x_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    settings: tuple[dict[str, Any], dict[str, Any]],
    absent: Collection[str] = (),
) -> Variant:
    """The types that a launch with these settings has; `absent` arguments are None."""
    constexprs, options = settings
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs or name in absent:
            signature[name] = "constexpr"
        elif name in _IN_X_DTYPE:
            signature[name] = _TRITON_NAMES[x_dtype]
        elif name in _IN_LORA_DTYPE:
            signature[name] = _TRITON_NAMES[lora_dtype]
        elif name == "ids_ptr":
            signature[name] = "*i32"
        elif name in ("order_ptr", "starts_ptr"):
            signature[name] = "*i64"
        else:
            signature[name] = "*fp32" if name.endswith("_ptr") else "i32"
    values = constexprs | {name: None for name in absent}
    shown = " ".join(f"{k}={v}" for k, v in (values | options).items())
    types = f"{_TRITON_NAMES[x_dtype][1:]}/{_TRITON_NAMES[lora_dtype][1:]}"
    return f"{kernel.__name__} {types} {shown}", kernel, signature, values, options


@triton.jit
def tile_at(base, offsets, AXIS: tl.constexpr, ALIGNED: tl.constexpr):
    """base + offsets, whose runs along AXIS start at multiples of 16 bytes where ALIGNED."""
    # The hint holds for the operation that makes the pointers, not for arguments of a function.
    pointers = base + offsets
    if ALIGNED:
        if AXIS == 0:
            pointers = tl.multiple_of(pointers, (16, 1))
        else:
            pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@triton.jit
def size(value, ALIGNED: tl.constexpr):
    """A size or stride, known to be a multiple of 16 where ALIGNED."""
    if ALIGNED:
        value = value // 16 * 16
    return value


@triton.jit
def weight_row(ids_ptr, t, num_tokens, tokens_per_example):
    """The row of weights that each token uses."""
    if ids_ptr is None:
        row = t // tokens_per_example
    else:
        row = tl.load(ids_ptr + t, mask=t < num_tokens, other=0).to(tl.int64)
    return row


@triton.jit
def omega(weights_ptr, row, i, wanted, batch_size, num_adapters):
    """weights[row, i] broadcast; NaN where the example does not exist, 0 where not wanted."""
    exists = (row >= 0) & (row < batch_size)
    w = tl.load(weights_ptr + row * num_adapters + i, mask=wanted & exists, other=float("nan"))
    return tl.where(wanted, w, 0.0)


@triton.jit
def select_scale(value, w):
    """value * w, and exactly 0 where w is 0, also for infinity and NaN."""
    return tl.where(w == 0.0, 0.0, value * w)


@triton.jit
def _active(weights_ptr, row, t, num_tokens, batch_size, num_adapters):
    """Whether any weight of each token's row is not zero."""
    found = t < 0
    for i in range(num_adapters):
        found |= omega(weights_ptr, row, i, t < num_tokens, batch_size, num_adapters) != 0.0
    return found


@triton.jit
def _lora_offsets(j, f, features, RANK: tl.constexpr, BY_RANK: tl.constexpr):
    """Element (j, f) of the stacked adapters: lora_A [m, r, features] where BY_RANK, else lora_B
    [m, features, r], which is so read in place."""
    wide = tl.cast(features, tl.int64)
    if BY_RANK:
        offsets = j * wide + f
    else:
        offsets = (j // RANK) * (wide * RANK) + f.to(tl.int64) * RANK + j % RANK
    return offsets


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def shrink_kernel(
    x_ptr,
    p_ptr,
    weights_ptr,
    ids_ptr,
    u_ptr,
    z_ptr,
    num_tokens,
    depth,
    num_adapters,
    batch_size,
    tokens_per_example,
    x_stride,
    RANK: tl.constexpr,
    FORWARD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """u = X P and z = u * omega, float32 [T, m*r]. P is lora_A where FORWARD, else lora_B."""
    if PDL:
        # At once: the product needs nothing of this kernel until its own part X M is done. Without
        # effect where the next kernel is not launched as a dependent.
        gdc_launch_dependents()
    rank = num_adapters * RANK
    depth = size(depth, ALIGNED)
    x_stride = size(tl.cast(x_stride, tl.int64), ALIGNED)
    pid = tl.program_id(0)
    blocks_r = tl.cdiv(rank, BLOCK_R)
    t = (pid // blocks_r).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    t_in, j_in = t < num_tokens, j < rank
    x_rows = x_ptr + t[:, None] * x_stride
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < depth
        x_tile = tile_at(x_rows, k[None, :], 1, ALIGNED)
        x = tl.load(x_tile, mask=t_in[:, None] & k_in[None, :], other=0.0)
        offsets = _lora_offsets(j[None, :], k[:, None], depth, RANK, FORWARD)
        if FORWARD:
            p_tile = tile_at(p_ptr, offsets, 0, ALIGNED)
        else:
            p_tile = tile_at(p_ptr, offsets, 1, ALIGNED and RANK % 16 == 0)
        p = tl.load(p_tile, mask=k_in[:, None] & j_in[None, :], other=0.0)
        part = tl.dot(x.to(p.dtype), p, input_precision=PRECISION)
        # fma, because the compiler would fold dot + acc into the tensor core's accumulator, whose
        # truncation adds up over a long axis to more than u may be wrong.
        acc = tl.fma(part, 1.0, acc)
    wanted = t_in[:, None] & j_in[None, :]
    to = t[:, None] * rank
    tl.store(tile_at(u_ptr + to, j[None, :], 1, RANK % 4 == 0), acc, mask=wanted)
    row = weight_row(ids_ptr, t, num_tokens, tokens_per_example)[:, None]
    w = omega(weights_ptr, row, (j // RANK)[None, :], wanted, batch_size, num_adapters)
    z = select_scale(acc, w)
    tl.store(tile_at(z_ptr + to, j[None, :], 1, RANK % 4 == 0), z, mask=wanted)


@triton.jit
def _low_rank_tile(z_ptr, q_ptr, t, j, n, num_tokens, features, rank,
                   RANK: tl.constexpr, FORWARD: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Tiles of z [T, R] and Q [R, features]; Q is lora_B where FORWARD, else lora_A."""
    t_in, j_in, n_in = t < num_tokens, j < rank, n < features
    z_tile = tile_at(z_ptr + t[:, None] * rank, j[None, :], 1, RANK % 4 == 0)
    z = tl.load(z_tile, mask=t_in[:, None] & j_in[None, :], other=0.0)
    offsets = _lora_offsets(j[:, None], n[None, :], features, RANK, not FORWARD)
    if FORWARD:
        q_tile = tile_at(q_ptr, offsets, 0, ALIGNED and RANK % 16 == 0)
    else:
        q_tile = tile_at(q_ptr, offsets, 1, ALIGNED)
    return z, tl.load(q_tile, mask=j_in[:, None] & n_in[None, :], other=0.0)


@triton.jit
def split_operand(value, dtype: tl.constexpr):
    """value = high + low in a 16-bit dtype; low is 0 where high is not finite."""
    high = value.to(dtype)
    low = tl.where(tl.abs(high.to(tl.float32)) < float("inf"), value - high.to(tl.float32), 0.0)
    return high, low.to(dtype)


@triton.jit
def finite_part(value):
    """value, and 0 where it is infinite or NaN: the exact high part alone decides those."""
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def _low_rank(
    z_ptr,
    q_ptr,
    t,
    n,
    num_tokens,
    features,
    rank,
    RANK: tl.constexpr,
    FORWARD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """z Q of one tile in float32, one accumulator: first the low halves of z, then the high."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if dtype != tl.float32:
        for start in range(0, rank, BLOCK_R):
            j = start + tl.arange(0, BLOCK_R)
            z, q = _low_rank_tile(
                z_ptr, q_ptr, t, j, n, num_tokens, features, rank, RANK, FORWARD, ALIGNED
            )
            _, low = split_operand(z, dtype)
            acc = tl.dot(low, q, acc)
        acc = finite_part(acc)
    for start in range(0, rank, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        z, q = _low_rank_tile(
            z_ptr, q_ptr, t, j, n, num_tokens, features, rank, RANK, FORWARD, ALIGNED
        )
        acc = tl.dot(z.to(dtype), q, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def product_kernel(
    x_ptr,
    base_ptr,
    z_ptr,
    q_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    num_tokens,
    depth,
    features,
    num_adapters,
    batch_size,
    tokens_per_example,
    x_stride,
    base_stride,
    RANK: tl.constexpr,
    FORWARD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
    LOW_RANK_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = X M + z Q + bias, rounded once; M is W^T where FORWARD, else W.

    Without LOW_RANK_FIRST z is needed last, so that X M runs beside the shrink, at the price of a
    second accumulator: for small tiles. With it z Q starts the one accumulator: for large tiles.
    Either way a row of zero weights has the bits of X M + bias.
    """
    depth = size(depth, ALIGNED)
    features = size(features, ALIGNED)
    x_stride = size(tl.cast(x_stride, tl.int64), ALIGNED)
    base_stride = size(tl.cast(base_stride, tl.int64), ALIGNED)
    rank = num_adapters * RANK
    pid = tl.program_id(0)
    tiles_t, tiles_n = tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(features, BLOCK_N)
    # Eight rows of tiles at a time, so that programs that run together share W in L2.
    first = pid // (8 * tiles_n) * 8
    height = tl.minimum(tiles_t - first, 8)
    tile_t = first + pid % (8 * tiles_n) % height
    tile_n = pid % (8 * tiles_n) // height
    t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    t_in, n_in = t < num_tokens, n < features
    row = weight_row(ids_ptr, t, num_tokens, tokens_per_example)
    if LOW_RANK_FIRST:
        if PDL:
            gdc_wait()
        acc = _low_rank(
            z_ptr, q_ptr, t, n, num_tokens, features, rank,
            RANK, FORWARD, ALIGNED, PRECISION, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        use = _active(weights_ptr, row, t, num_tokens, batch_size, num_adapters)
        acc = tl.where(use[:, None], acc, 0.0)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)

    x_rows = x_ptr + t[:, None] * x_stride
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < depth
        x_tile = tile_at(x_rows, k[None, :], 1, ALIGNED)
        x = tl.load(x_tile, mask=t_in[:, None] & k_in[None, :], other=0.0)
        if FORWARD:
            w_tile = tile_at(base_ptr + n[None, :] * base_stride, k[:, None], 0, ALIGNED)
        else:
            w_tile = tile_at(base_ptr + k[:, None] * base_stride, n[None, :], 1, ALIGNED)
        w = tl.load(w_tile, mask=k_in[:, None] & n_in[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")

    if not LOW_RANK_FIRST:
        if PDL:
            gdc_wait()
        delta = _low_rank(
            z_ptr, q_ptr, t, n, num_tokens, features, rank,
            RANK, FORWARD, ALIGNED, PRECISION, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        use = _active(weights_ptr, row, t, num_tokens, batch_size, num_adapters)
        acc = tl.where(use[:, None], acc + delta, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
    out_tile = tile_at(out_ptr + t[:, None] * features, n[None, :], 1, ALIGNED)
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=t_in[:, None] & n_in[None, :])


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def expand_kernel(
    z_ptr,
    q_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    num_tokens,
    features,
    num_adapters,
    batch_size,
    tokens_per_example,
    RANK: tl.constexpr,
    FORWARD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out += z Q in place; rows of zero weights are not written."""
    features = size(features, ALIGNED)
    rank = num_adapters * RANK
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(features, BLOCK_N)
    t = (pid // tiles_n).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = (pid % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = weight_row(ids_ptr, t, num_tokens, tokens_per_example)
    use = _active(weights_ptr, row, t, num_tokens, batch_size, num_adapters)
    written = use[:, None] & (n < features)[None, :]
    delta = _low_rank(
        z_ptr, q_ptr, t, n, num_tokens, features, rank,
        RANK, FORWARD, ALIGNED, PRECISION, BLOCK_T, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    tile = tile_at(out_ptr + t[:, None] * features, n[None, :], 1, ALIGNED)
    base = tl.load(tile, mask=written, other=0.0).to(tl.float32)
    tl.store(tile, (base + delta).to(out_ptr.dtype.element_ty), mask=written)
