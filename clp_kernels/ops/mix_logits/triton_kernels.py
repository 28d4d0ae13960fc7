"""The Triton kernels that clp_kernels.ops.mix_logits.triton launches. Unverified on a GPU.

A program owns one slice of BLOCK ids of one row. What is summed over a row goes through partials,
one per slice, that another kernel adds in order: a row's bits depend on nothing but that row. Row
addresses are int64, ids within a row int32. Launch them without fused multiply-add (OPTIONS in
clp_kernels.ops.mix_logits.triton): the mixture is rounded product by product, sum by sum.
"""

import triton
import triton.language as tl

# What changes from call to call compiles no new kernel.
COUNTS = ["batch_size", "num_terms", "slices"]


@triton.jit
def log_softmax_term(logits, log_norms_ptr, b, i, batch_size, num_terms):
    """log_softmax of row b of term i, from what `log_norms_kernel` found; NaN in a bad row."""
    at = tl.cast(i, tl.int64) * batch_size + b
    maximum = tl.load(log_norms_ptr + at)
    log_sum = tl.load(log_norms_ptr + tl.cast(num_terms, tl.int64) * batch_size + at)
    return logits - maximum - log_sum


@triton.jit
def probability_term(
    row_ptr, weights_ptr, log_norms_ptr, b, v, vocab_size, term_stride, batch_size, num_terms, i
):  # fmt: skip
    """log(w_i softmax(l_i)); -inf where w_i is zero, whatever l_i holds."""
    w = tl.load(weights_ptr + b * num_terms + i)
    used = w != 0
    terms = row_ptr + tl.cast(i, tl.int64) * term_stride + v
    logits = tl.load(terms, mask=v < tl.where(used, vocab_size, 0), other=0.0)
    log_p = log_softmax_term(logits.to(tl.float32), log_norms_ptr, b, i, batch_size, num_terms)
    return tl.where(used, tl.log(tl.where(used, w, 1.0)) + log_p, float("-inf"))


@triton.jit
def mixed(
    logits_ptr, weights_ptr, log_norms_ptr, b, v, vocab_size, term_stride, row_stride, batch_size,
    num_terms,
):  # fmt: skip
    """The mixture of row b at the ids v, in float32, as reference.mix_logits before its rounding.

    Without weights the first term as it is; geometric without log_norms_ptr, else probability.
    """
    row_ptr = logits_ptr + b * row_stride
    if weights_ptr is None:
        z = tl.load(row_ptr + v, mask=v < vocab_size, other=0.0).to(tl.float32)
    elif log_norms_ptr is None:
        z = tl.full(v.shape, 0.0, tl.float32)
        blocked = z != 0
        for i in range(num_terms):
            w = tl.load(weights_ptr + b * num_terms + i)
            # A term of weight zero is not read: it is zero, whatever stands there.
            terms = row_ptr + tl.cast(i, tl.int64) * term_stride + v
            used = v < tl.where(w != 0, vocab_size, 0)
            logits = tl.load(terms, mask=used, other=0.0).to(tl.float32)
            z += w * logits
            blocked = blocked | (logits == float("-inf"))
        z = tl.where(blocked, float("-inf"), z)
    else:
        top = tl.full(v.shape, float("-inf"), tl.float32)
        for i in range(num_terms):
            term = probability_term(
                row_ptr, weights_ptr, log_norms_ptr, b, v, vocab_size, term_stride, batch_size,
                num_terms, i,
            )  # fmt: skip
            top = tl.maximum(top, term)
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.full(v.shape, 0.0, tl.float32)
        # The terms are read again, from the cache, not kept: their number is not known.
        for i in range(num_terms):
            term = probability_term(
                row_ptr, weights_ptr, log_norms_ptr, b, v, vocab_size, term_stride, batch_size,
                num_terms, i,
            )  # fmt: skip
            total += tl.exp(term - safe)
        # -inf where every term is, NaN where one is NaN, which the maximum passes over.
        z = safe + tl.log(total)
    return z


@triton.jit(do_not_specialize=COUNTS)
def row_sums_kernel(
    logits_ptr, parts_ptr, vocab_size, term_stride, row_stride, batch_size, num_terms, slices,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[0, i, b, slice] = maximum of l_i, parts[1] = sum exp(l_i - that maximum).

    NaN counts as +inf, which `log_norms_kernel` turns into NaN.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, slice_id = pid // slices, (pid % slices).to(tl.int32)
    i, b = row // batch_size, row % batch_size
    v = slice_id * BLOCK + tl.arange(0, BLOCK)
    row_ptr = logits_ptr + i * term_stride + b * row_stride
    x = tl.load(row_ptr + v, mask=v < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.where(x < float("inf"), x, float("inf"))
    maximum = tl.max(x, axis=0)
    finite = tl.abs(maximum) < float("inf")
    terms = tl.exp(x - tl.where(finite, maximum, 0.0))
    tl.store(parts_ptr + pid, maximum)
    count = tl.cast(slices, tl.int64) * batch_size * num_terms
    tl.store(parts_ptr + count + pid, tl.where(finite, tl.sum(terms, axis=0), 0.0))


@triton.jit(do_not_specialize=["rows", "slices"])
def log_norms_kernel(parts_ptr, log_norms_ptr, rows, slices, BLOCK: tl.constexpr):
    """log_norms[0, row] = maximum of the row, [1, row] = log sum exp(l - maximum), or NaN."""
    row = tl.program_id(0).to(tl.int64)
    sums_ptr = parts_ptr + tl.cast(rows, tl.int64) * slices
    maximum = float("-inf")
    for start in range(0, slices, BLOCK):
        s = start + tl.arange(0, BLOCK)
        peaks = tl.load(parts_ptr + row * slices + s, mask=s < slices, other=float("-inf"))
        maximum = tl.maximum(maximum, tl.max(peaks, axis=0))
    finite = tl.abs(maximum) < float("inf")
    shift = tl.where(finite, maximum, 0.0)
    total = 0.0
    for start in range(0, slices, BLOCK):
        s = start + tl.arange(0, BLOCK)
        peaks = tl.load(parts_ptr + row * slices + s, mask=s < slices, other=float("-inf"))
        sums = tl.load(sums_ptr + row * slices + s, mask=s < slices, other=0.0)
        total += tl.sum(tl.where(sums > 0, sums * tl.exp(peaks - shift), 0.0), axis=0)
    log_sum = tl.where(finite, tl.log(tl.where(finite, total, 1.0)), float("nan"))
    tl.store(log_norms_ptr + row, maximum)
    tl.store(log_norms_ptr + rows + row, log_sum)


@triton.jit(do_not_specialize=COUNTS)
def mix_kernel(
    logits_ptr, weights_ptr, log_norms_ptr, out_ptr, vocab_size, term_stride, row_stride,
    batch_size, num_terms, slices,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b] = the mixture of row b, rounded once to out's dtype."""
    pid = tl.program_id(0).to(tl.int64)
    b, slice_id = pid // slices, (pid % slices).to(tl.int32)
    v = slice_id * BLOCK + tl.arange(0, BLOCK)
    inside = v < vocab_size
    z = mixed(
        logits_ptr, weights_ptr, log_norms_ptr, b, v, vocab_size, term_stride, row_stride,
        batch_size, num_terms,
    )  # fmt: skip
    tl.store(out_ptr + b * vocab_size + v, z.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def gradients_kernel(
    dz_ptr, logits_ptr, weights_ptr, log_norms_ptr, ratio_sums_ptr, d_logits_ptr, parts_ptr,
    vocab_size, term_stride, row_stride, batch_size, num_terms, slices,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Per id: d_logits[i, b]; per slice: parts[slice, b, i], what adds up to d_weights[b, i].

    geometric:    d_logits_i = dz w_i,  d_weights_i = sum dz l_i
    probability:  r_i = softmax(l_i) / exp(z),  d_weights_i = sum dz r_i,
                  d_logits_i = w_i (dz r_i - softmax(l_i) sum dz r_i)

    The last sum is ratio_sums [B, m]; so in probability mode d_logits takes a launch of its own.
    d_logits_ptr or parts_ptr may be None.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, slice_id = pid // slices, (pid % slices).to(tl.int32)
    v = slice_id * BLOCK + tl.arange(0, BLOCK)
    inside = v < vocab_size
    z = mixed(
        logits_ptr, weights_ptr, log_norms_ptr, b, v, vocab_size, term_stride, row_stride,
        batch_size, num_terms,
    )  # fmt: skip
    blocked = z == float("-inf")
    dz = tl.load(dz_ptr + b * vocab_size + v, mask=inside & ~blocked, other=0.0).to(tl.float32)
    for i in range(num_terms):
        w = tl.load(weights_ptr + b * num_terms + i)
        row = tl.cast(i, tl.int64) * batch_size + b
        terms = logits_ptr + b * row_stride + tl.cast(i, tl.int64) * term_stride + v
        logits = tl.load(terms, mask=inside, other=0.0).to(tl.float32)
        if log_norms_ptr is None:
            gradient = dz * w
            part = dz * tl.where(logits == float("-inf"), 0.0, logits)
        else:
            log_p = log_softmax_term(logits, log_norms_ptr, b, i, batch_size, num_terms)
            # In log space: both probabilities may be below the smallest float.
            part = dz * tl.where(blocked, 0.0, tl.exp(log_p - tl.where(blocked, 0.0, z)))
            gradient = part
            if d_logits_ptr is not None:
                share = tl.where(w != 0, w * tl.load(ratio_sums_ptr + b * num_terms + i), 0.0)
                gradient = tl.where(w != 0, part * w, 0.0) - tl.exp(log_p) * share
        if d_logits_ptr is not None:
            out_ptrs = d_logits_ptr + row * vocab_size + v
            tl.store(out_ptrs, gradient.to(d_logits_ptr.dtype.element_ty), mask=inside)
        if parts_ptr is not None:
            part = tl.sum(tl.where(inside, part, 0.0), axis=0)
            place = (tl.cast(slice_id, tl.int64) * batch_size + b) * num_terms + i
            tl.store(parts_ptr + place, part)


@triton.jit(do_not_specialize=["size", "slices"])
def sum_slices_kernel(parts_ptr, out_ptr, size, slices, BLOCK: tl.constexpr):
    """out[j] = sum over the slices of parts[slice, j], in a fixed order."""
    j = tl.program_id(0).to(tl.int64)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, slices, BLOCK):
        s = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + s.to(tl.int64) * size + j, mask=s < slices, other=0.0)
    tl.store(out_ptr + j, tl.sum(total, axis=0))
