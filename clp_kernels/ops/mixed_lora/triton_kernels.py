"""The Triton kernels that clp_kernels.ops.mixed_lora.triton launches. Unverified on a GPU.

One product serves the forward and dx, with (X, M, P, Q) = (x, W^T, A^T, B^T) or (dy, W, B, A), and
w the weights of each token:

    OUT = X M + select(w != 0, (X P) * w) Q

`shrink_kernel` writes u = X P and z = u * w in float32. `product_kernel` runs X M and z Q
into one float32 accumulator and rounds once; `expand_kernel` adds z Q to a product that a GEMM
library made. The gradients of the adapters and of the weights are, with u = x A^T and g = dy B,

    dA = (g * w)^T x,    dB = dy^T (u * w),    dweights[b, i] = sum_{t in b} g_ti . u_ti

dA and dB are one launch over x and dy that splits the tokens into parts; each part writes a float32
plane and `sum_planes_kernel` adds the planes in order. dweights runs over the tokens of one example
in their order, so that no other example can reach it, not even with a NaN. No atomics: two runs
give the same bits.

Accuracy. u is an output in float32, so its long sum over the inner axis is not left to the tensor
core's accumulator, which truncates. z is not rounded to a 16-bit dtype: it enters the dot as
z = high + low, so the low-rank part is as exact as the definition's.

Selection. A zero weight contributes exactly nothing: z is selected, not multiplied, and where
all weights of a token are zero the low-rank part is dropped by a select after the dot, so that
infinities and NaN in A or B cannot reach that token.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from clp_kernels.ops.triton_launch import example_of, weight_of

# Every runtime argument of every kernel. None is specialised: no size, no alignment and no equality
# to 1 makes Triton compile in the middle of a request. Alignment is the constexpr ALIGNED instead.
RUNTIME_ARGUMENTS = (
    "x_ptr", "base_ptr", "p_ptr", "q_ptr", "u_ptr", "z_ptr", "bias_ptr", "weights_ptr", "ids_ptr",
    "out_ptr", "dy_ptr", "g_ptr", "planes_ptr", "d_lora_A_ptr", "d_lora_B_ptr", "order_ptr",
    "starts_ptr", "num_tokens", "depth", "features", "in_features", "out_features", "num_adapters",
    "batch_size", "tokens_per_example", "x_stride", "base_stride", "dy_stride", "first", "last",
    "splits",
)  # fmt: skip


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
def select_scale(value, w):
    """value * w, and exactly 0 where w is 0, also for infinity and NaN."""
    return tl.where(w == 0.0, 0.0, value * w)


@triton.jit
def _active(weights_ptr, example, t, num_tokens, batch_size, num_adapters):
    """Whether any weight of each token is not zero."""
    found, t_in = t < 0, t < num_tokens
    for i in range(num_adapters):
        found |= weight_of(weights_ptr, example, i, t_in, batch_size, num_adapters) != 0.0
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
    x_ptr, p_ptr, weights_ptr, ids_ptr, u_ptr, z_ptr, num_tokens, depth, num_adapters, batch_size,
    tokens_per_example, x_stride,
    RANK: tl.constexpr, FORWARD: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """u = X P and z = u * w, float32 [T, m*r]. P is lora_A where FORWARD, else lora_B."""
    if PDL:
        # First of all: the product needs nothing of this kernel until its own part X M is done.
        # Without effect if the next kernel is not launched as a dependent.
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
    example = example_of(ids_ptr, t, t_in, tokens_per_example)[:, None]
    w = weight_of(weights_ptr, example, (j // RANK)[None, :], wanted, batch_size, num_adapters)
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
    z_ptr, q_ptr, t, n, num_tokens, features, rank,
    RANK: tl.constexpr, FORWARD: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
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
    x_ptr, base_ptr, z_ptr, q_ptr, bias_ptr, weights_ptr, ids_ptr, out_ptr, num_tokens, depth,
    features, num_adapters, batch_size, tokens_per_example, x_stride, base_stride,
    RANK: tl.constexpr, FORWARD: tl.constexpr, BY_OUTPUT: tl.constexpr, ALIGNED: tl.constexpr,
    PDL: tl.constexpr, LOW_RANK_FIRST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = X M + z Q + bias, rounded once; M is W^T where FORWARD, else W.

    In memory a row of `base` is a column of M, which makes one output feature, where BY_OUTPUT,
    else a row of M.
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
    example = example_of(ids_ptr, t, t < num_tokens, tokens_per_example)
    if LOW_RANK_FIRST:
        if PDL:
            gdc_wait()
        acc = _low_rank(
            z_ptr, q_ptr, t, n, num_tokens, features, rank,
            RANK, FORWARD, ALIGNED, PRECISION, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        use = _active(weights_ptr, example, t, num_tokens, batch_size, num_adapters)
        acc = tl.where(use[:, None], acc, 0.0)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)

    x_rows = x_ptr + t[:, None] * x_stride
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < depth
        x_tile = tile_at(x_rows, k[None, :], 1, ALIGNED)
        x = tl.load(x_tile, mask=t_in[:, None] & k_in[None, :], other=0.0)
        if BY_OUTPUT:
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
        use = _active(weights_ptr, example, t, num_tokens, batch_size, num_adapters)
        acc = tl.where(use[:, None], acc + delta, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
    out_tile = tile_at(out_ptr + t[:, None] * features, n[None, :], 1, ALIGNED)
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=t_in[:, None] & n_in[None, :])


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def expand_kernel(
    z_ptr, q_ptr, weights_ptr, ids_ptr, out_ptr, num_tokens, features, num_adapters, batch_size,
    tokens_per_example,
    RANK: tl.constexpr, FORWARD: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out += z Q in place; rows of zero weights are not written."""
    features = size(features, ALIGNED)
    rank = num_adapters * RANK
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(features, BLOCK_N)
    t = (pid // tiles_n).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = (pid % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    example = example_of(ids_ptr, t, t < num_tokens, tokens_per_example)
    use = _active(weights_ptr, example, t, num_tokens, batch_size, num_adapters)
    written = use[:, None] & (n < features)[None, :]
    delta = _low_rank(
        z_ptr, q_ptr, t, n, num_tokens, features, rank,
        RANK, FORWARD, ALIGNED, PRECISION, BLOCK_T, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    tile = tile_at(out_ptr + t[:, None] * features, n[None, :], 1, ALIGNED)
    base = tl.load(tile, mask=written, other=0.0).to(tl.float32)
    tl.store(tile, (base + delta).to(out_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def adapter_gradient_kernel(
    x_ptr, dy_ptr, g_ptr, u_ptr, weights_ptr, ids_ptr, planes_ptr, num_tokens, in_features,
    out_features, num_adapters, batch_size, tokens_per_example, x_stride, dy_stride, splits,
    RANK: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """planes[split] = [(g * w)^T x, (u * w)^T dy] over one part of the tokens.

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
        example = example_of(ids_ptr, t, t < num_tokens, tokens_per_example)[None, :]
        w = weight_of(weights_ptr, example, (j // RANK)[:, None], wanted, batch_size, num_adapters)
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
    planes_ptr, d_lora_A_ptr, d_lora_B_ptr, in_features, out_features, num_adapters, splits,
    RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
def weight_gradient_kernel(
    g_ptr, u_ptr, order_ptr, starts_ptr, out_ptr, num_adapters, tokens_per_example,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
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
