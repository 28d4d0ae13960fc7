"""The Triton kernels that clp_kernels.ops.mixed_linear.triton launches. Unverified on a GPU.

Addresses are int64, every axis is masked, sums are in float32 and in a fixed order.
"""

import triton
import triton.language as tl

from clp_kernels.ops.triton_launch import example_of, weight_of

# What changes from call to call compiles no new kernel; sizes and strides of layers may.
_COUNTS = ["num_tokens", "batch_size", "tokens_per_example", "num_experts", "splits"]


@triton.jit(do_not_specialize=_COUNTS)
def mixed_product_kernel(
    x_ptr, expert_ptr, bias_ptr, weights_ptr, ids_ptr, other_ptr, out_ptr, dots_ptr, num_tokens,
    batch_size, tokens_per_example, num_experts, in_size, out_size, x_stride, expert_stride,
    matrix_stride, other_stride, splits,
    TRANSPOSED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """out[split, t] = sum_i w_i (x_t M_i + bias_i); dots[plane, i, t] = other_t . (x_t M_i).

    M_i [in_size, out_size] is W_i^T, or W_i where TRANSPOSED. out_ptr, bias_ptr and the pair
    other_ptr (a matrix like out) and dots_ptr may be None. A split takes a range of the inner axis.
    """
    pid = tl.program_id(0)
    tiles_t = (num_tokens + BLOCK_T - 1) // BLOCK_T
    tiles_out = (out_size + BLOCK_OUT - 1) // BLOCK_OUT
    split = pid // (tiles_t * tiles_out)
    tile = pid % (tiles_t * tiles_out)
    # Eight rows of tiles at a time, so that programs that run together share experts in L2.
    first = tile // (8 * tiles_out) * 8
    height = tl.minimum(tiles_t - first, 8)
    tile_t = first + tile % (8 * tiles_out) % height
    tile_out = tile % (8 * tiles_out) // height

    t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    out = tile_out.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, BLOCK_IN)
    t_in, out_in = t < num_tokens, out < out_size
    part = (in_size + BLOCK_IN * splits - 1) // (BLOCK_IN * splits) * BLOCK_IN
    begin = split * part
    end = tl.minimum(in_size, begin + part)
    x_start = x_ptr + t[:, None] * x_stride + (begin + inner)[None, :]
    if TRANSPOSED:
        step = tl.cast(matrix_stride, tl.int64)
        expert_start = expert_ptr + (begin + inner).to(tl.int64)[:, None] * step + out[None, :]
    else:
        step = tl.cast(1, tl.int64)
        expert_start = expert_ptr + out[None, :] * matrix_stride + (begin + inner)[:, None]

    total = tl.full((BLOCK_T, BLOCK_OUT), 0.0, tl.float32)
    for i in range(num_experts):
        x_ptrs, expert_ptrs = x_start, expert_start
        product = tl.full((BLOCK_T, BLOCK_OUT), 0.0, tl.float32)
        for start in range(begin, end, BLOCK_IN):
            inner_in = inner < end - start
            a = tl.load(x_ptrs, mask=t_in[:, None] & inner_in[None, :], other=0.0)
            b = tl.load(expert_ptrs, mask=inner_in[:, None] & out_in[None, :], other=0.0)
            product = tl.dot(a, b, product, input_precision="ieee")
            x_ptrs += BLOCK_IN
            expert_ptrs += BLOCK_IN * step
        if dots_ptr is not None:
            other_ptrs = other_ptr + t[:, None] * other_stride + out[None, :]
            other = tl.load(other_ptrs, mask=t_in[:, None] & out_in[None, :], other=0.0)
            plane = (split * tiles_out + tile_out).to(tl.int64) * num_experts + i
            dots = tl.sum(other.to(tl.float32) * product, axis=1)
            tl.store(dots_ptr + plane * num_tokens + t, dots, mask=t_in)
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + tl.cast(i, tl.int64) * out_size + out
            bias = tl.load(bias_ptrs, mask=out_in, other=0.0).to(tl.float32)
            product += tl.where(split == 0, bias, 0.0)[None, :]
        if out_ptr is not None:
            example = example_of(ids_ptr, t, t_in, tokens_per_example)
            w = weight_of(weights_ptr, example, i, t_in, batch_size, num_experts)[:, None]
            # Selected, not multiplied: 0 * inf of an expert that is not used would be NaN.
            total += tl.where(w != 0, w * product, 0.0)
        expert_start += tl.cast(expert_stride, tl.int64)
    if out_ptr is not None:
        out_ptrs = out_ptr + (split.to(tl.int64) * num_tokens + t)[:, None] * out_size
        mask = t_in[:, None] & out_in[None, :]
        tl.store(out_ptrs + out[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def expert_gradient_kernel(
    dy_ptr, x_ptr, weights_ptr, ids_ptr, out_ptr, num_tokens, batch_size, tokens_per_example,
    num_experts, in_size, out_size, dy_stride, x_stride, splits,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """out[split, i] = sum over a range of tokens of (w_i dy_t)^T x_t."""
    pid = tl.program_id(0)
    tiles_in = (in_size + BLOCK_IN - 1) // BLOCK_IN
    tiles = (out_size + BLOCK_OUT - 1) // BLOCK_OUT * tiles_in
    # Experts vary fastest: they read the same tiles of dy and x.
    i = pid % num_experts
    tile = pid // num_experts % tiles
    split = pid // num_experts // tiles
    out = (tile // tiles_in).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = (tile % tiles_in).to(tl.int64) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    out_in, inner_in = out < out_size, inner < in_size
    part = (num_tokens + BLOCK_T * splits - 1) // (BLOCK_T * splits) * BLOCK_T
    begin = split * part
    end = tl.minimum(num_tokens, begin + part)

    total = tl.full((BLOCK_OUT, BLOCK_IN), 0.0, tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        t_in = t < end
        dy_ptrs = dy_ptr + t[:, None] * dy_stride + out[None, :]
        dy = tl.load(dy_ptrs, mask=t_in[:, None] & out_in[None, :], other=0.0)
        x_ptrs = x_ptr + t[:, None] * x_stride + inner[None, :]
        x = tl.load(x_ptrs, mask=t_in[:, None] & inner_in[None, :], other=0.0)
        example = example_of(ids_ptr, t, t_in, tokens_per_example)
        w = weight_of(weights_ptr, example, i, t_in, batch_size, num_experts)[:, None]
        scaled = tl.trans(tl.where(w != 0, w * dy.to(tl.float32), 0.0))
        # One rounding of w * dy would double the error of the result: the product is fed as
        # a high and a low part. float16 has no exponents to spare for it, TF32 holds x exactly.
        if x.dtype == tl.float32:
            total = tl.dot(scaled, x, total, input_precision="ieee")
        elif x.dtype == tl.bfloat16:
            high = scaled.to(tl.bfloat16)
            total = tl.dot(high, x, total)
            total = tl.dot((scaled - high.to(tl.float32)).to(tl.bfloat16), x, total)
        else:
            wide = x.to(tl.float32)
            high = (scaled.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            total = tl.dot(high, wide, total, input_precision="tf32")
            total = tl.dot(scaled - high, wide, total, input_precision="tf32")
    plane = split.to(tl.int64) * num_experts + i
    out_ptrs = out_ptr + (plane * out_size + out)[:, None] * in_size + inner[None, :]
    mask = out_in[:, None] & inner_in[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def bias_gradient_kernel(
    dy_ptr, weights_ptr, ids_ptr, out_ptr, num_tokens, batch_size, tokens_per_example,
    num_experts, out_size, dy_stride, splits,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """out[split, i] = sum over a range of tokens of w_i dy_t."""
    pid = tl.program_id(0)
    tiles = (out_size + BLOCK_OUT - 1) // BLOCK_OUT
    i = pid % num_experts
    out = (pid // num_experts % tiles).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    split = pid // num_experts // tiles
    part = (num_tokens + BLOCK_T * splits - 1) // (BLOCK_T * splits) * BLOCK_T
    begin = split * part
    end = tl.minimum(num_tokens, begin + part)
    total = tl.full((BLOCK_T, BLOCK_OUT), 0.0, tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        t_in = t < end
        dy_ptrs = dy_ptr + t[:, None] * dy_stride + out[None, :]
        dy = tl.load(dy_ptrs, mask=t_in[:, None] & (out < out_size)[None, :], other=0.0)
        example = example_of(ids_ptr, t, t_in, tokens_per_example)
        w = weight_of(weights_ptr, example, i, t_in, batch_size, num_experts)[:, None]
        total += tl.where(w != 0, w * dy.to(tl.float32), 0.0)
    sums = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    plane = split.to(tl.int64) * num_experts + i
    tl.store(out_ptr + plane * out_size + out, sums, mask=out < out_size)


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def bias_dot_kernel(
    dy_ptr, bias_ptr, dots_ptr, num_tokens, num_experts, out_size, dy_stride,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """dots[i, t] = dy_t . bias_i: the part of d_weights that the bias brings."""
    pid = tl.program_id(0)
    i = pid % num_experts
    t = (pid // num_experts).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.full((BLOCK_T, BLOCK_OUT), 0.0, tl.float32)
    for start in range(0, out_size, BLOCK_OUT):
        out = start + tl.arange(0, BLOCK_OUT)
        mask = (t < num_tokens)[:, None] & (out < out_size)[None, :]
        dy = tl.load(dy_ptr + t[:, None] * dy_stride + out[None, :], mask=mask, other=0.0)
        bias_ptrs = bias_ptr + tl.cast(i, tl.int64) * out_size + out
        bias = tl.load(bias_ptrs, mask=out < out_size, other=0.0)
        total += dy.to(tl.float32) * bias.to(tl.float32)[None, :]
    dots_ptrs = dots_ptr + tl.cast(i, tl.int64) * num_tokens + t
    tl.store(dots_ptrs, tl.sum(total, axis=1), mask=t < num_tokens)


@triton.jit(do_not_specialize=["size", "num_planes"])
def sum_planes_kernel(planes_ptr, out_ptr, size, num_planes, BLOCK: tl.constexpr):
    """out = planes[0] + planes[1] + ..., in that order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    plane = planes_ptr + offsets
    for _ in range(num_planes):
        total += tl.load(plane, mask=offsets < size, other=0.0)
        plane += tl.cast(size, tl.int64)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=offsets < size)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_example", "num_experts"])
def sum_per_example_kernel(
    per_token_ptr, ids_ptr, out_ptr, num_tokens, tokens_per_example, num_experts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, i] = sum of per_token[i, t] over the tokens of example b, ids in any order.

    Tokens of other examples are masked, not multiplied by zero: their NaN stays with them.
    """
    pid = tl.program_id(0)
    b, i = (pid // num_experts).to(tl.int64), pid % num_experts
    if ids_ptr is None:
        begin = b * tokens_per_example
        end = begin + tokens_per_example
    else:
        begin = tl.cast(0, tl.int64)
        end = tl.cast(num_tokens, tl.int64)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        mine = t < end
        if ids_ptr is not None:
            mine = mine & (tl.load(ids_ptr + t, mask=mine, other=-1) == b)
        per_token = per_token_ptr + tl.cast(i, tl.int64) * num_tokens + t
        total += tl.load(per_token, mask=mine, other=0.0)
    tl.store(out_ptr + pid, tl.sum(total, axis=0))
