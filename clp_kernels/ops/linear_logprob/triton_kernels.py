"""The Triton kernels of linear_logprob: what becomes of a block of logits, one token a program.

csrc/cpu/linear_logprob/linear_logprob.h has the formulas. Unverified on a GPU.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(row_ptr, bias_ptr, v, count):
    """z at the ids v of a block, -inf beyond it."""
    z = tl.load(row_ptr + v, mask=v < count, other=float("-inf"))
    if bias_ptr is not None:
        z += tl.load(bias_ptr + v, mask=v < count, other=0.0)
    return z


@triton.jit
def _top(row_ptr, bias_ptr, before, count, BLOCK: tl.constexpr):
    """The largest of `before` and the logits of a row; it may pass over NaN."""
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, count, BLOCK):
        v = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, _logits(row_ptr, bias_ptr, v, count))
    return tl.maximum(before.to(tl.float32), tl.max(largest, axis=0))


@triton.jit
def _factor(old_top, top, temperature):
    """What the sums so far are scaled by, and its logarithm.

    0 where nothing is in them, and 1 as long as there is nothing.
    """
    gap = (old_top - top.to(tl.float64)) / temperature
    return tl.where((gap == 0.0) | (top == float("-inf")), 1.0, tl.exp(gap)), gap


@triton.jit
def _power(z, top, scale):
    """e = exp((z - top) / t) and its logarithm of base 2; below 2^-125 e is 0. NaN stays NaN.

    scale = log2(e) / t, used as two floats: one alone is off in the same direction for every id.
    """
    high = scale.to(tl.float32)
    low = (scale - high.to(tl.float64)).to(tl.float32)
    floor = tl.maximum(-125.5 / scale, -3e38).to(tl.float32)
    d = z - tl.where(top == float("-inf"), 0.0, top)
    d = tl.where(d < floor, floor, d)
    y = d * high + d * low
    return tl.where(d == floor, 0.0, tl.exp2(y)), y


@triton.jit
def _mean_gap(row_ptr, ref_row_ptr, bias_ptr, top, scale, count, BLOCK: tl.constexpr):
    """The mean of z - z' over a block, a float32; 0 where it is not finite."""
    mass, total = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = _logits(row_ptr, bias_ptr, v, count)
        e, _ = _power(z, top, scale)
        gap = z - _logits(ref_row_ptr, bias_ptr, v, count)
        mass += tl.sum(e, axis=0).to(tl.float64)
        total += tl.sum(tl.where(e == 0.0, 0.0, e * gap), axis=0).to(tl.float64)
    mean = (total / mass).to(tl.float32)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def _shifted_gap(z, ref_z, shift):
    """z - z' - shift, with what the first subtraction rounds off: kl is 0 where one id is left."""
    gap = z - ref_z
    back = gap - z
    lost = (z - (gap - back)) - (ref_z + back)
    return (gap - shift) + tl.where(tl.abs(gap) < float("inf"), lost, 0.0)


@triton.jit
def _scale(row_ptr, factor, width, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        sums = tl.load(row_ptr + column, mask=column < width)
        tl.store(row_ptr + column, sums * factor, mask=column < width)


@triton.jit(do_not_specialize=["first"])
def block_kernel(
    logits_ptr, ref_logits_ptr, bias_ptr, targets_ptr, temperature_ptr, state_ptr,
    e_ptr, apart_ptr, sums_ptr, apart_sums_ptr, first, count, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What csrc/cpu/linear_logprob/linear_logprob.h says of a block, one token a program, with a
    bias [count] or None.

    logits, ref_logits (or None) [n, count] float32; state [n, 8] float64, of which a first block
    (first = 0) reads nothing. e and e (z - z' - shift) go to e_ptr and apart_ptr [n, count], None
    where not asked for; each may be the logits it is made of. sums and apart_sums [n, width]
    float32 are the caller's sums of these over earlier blocks, scaled if a larger logit has come.
    """
    token = tl.program_id(0).to(tl.int64)
    row = token * count
    state_ptr += token * 8
    follows = first > 0
    temperature = tl.load(temperature_ptr + token).to(tl.float64)
    log2e = tl.full((), _LOG2E, tl.float64)
    scale = log2e / temperature

    target = tl.load(targets_ptr + token) - first
    here = (target >= 0) & (target < count)
    at_target = tl.load(logits_ptr + row + target, mask=here, other=float("-inf"))
    if bias_ptr is not None:
        at_target += tl.load(bias_ptr + target, mask=here, other=0.0)
    tl.store(state_ptr + 7, at_target.to(tl.float64), mask=here | (first == 0))

    old_top = tl.load(state_ptr, mask=follows, other=float("-inf"))
    top = _top(logits_ptr + row, bias_ptr, old_top, count, BLOCK)
    tl.store(state_ptr, top.to(tl.float64))
    factor, gap = _factor(old_top, top, temperature)
    if e_ptr is not None:  # noqa: SIM102, known when the kernel is compiled
        # Most blocks have no larger logit: then the sums are neither read nor written.
        if follows & (factor != 1.0):
            _scale(sums_ptr + token * width, factor.to(tl.float32), width, BLOCK)
            if apart_ptr is not None:
                _scale(apart_sums_ptr + token * width, factor.to(tl.float32), width, BLOCK)
    mass = tl.load(state_ptr + 1, mask=follows, other=0.0)
    weighted = tl.load(state_ptr + 2, mask=follows, other=0.0)
    weighted = tl.where(mass == 0.0, weighted, factor * (weighted + gap * log2e * mass))
    mass *= factor

    if ref_logits_ptr is not None:
        apart = factor * tl.load(state_ptr + 3, mask=follows, other=0.0)
        old_ref_top = tl.load(state_ptr + 4, mask=follows, other=float("-inf"))
        ref_top = _top(ref_logits_ptr + row, bias_ptr, old_ref_top, count, BLOCK)
        tl.store(state_ptr + 4, ref_top.to(tl.float64))
        ref_factor, _gap = _factor(old_ref_top, ref_top, temperature)
        ref_mass = ref_factor * tl.load(state_ptr + 5, mask=follows, other=0.0)
        shift = tl.load(state_ptr + 6, mask=follows, other=0.0).to(tl.float32)
        if old_top == float("-inf"):
            # Up to here no id had a logit, and no sum depends on the shift. The mean of z - z'
            # becomes it: with another, the gradient of kl is a small difference of large sums.
            shift = _mean_gap(
                logits_ptr + row, ref_logits_ptr + row, bias_ptr, top, scale, count, BLOCK
            )
        tl.store(state_ptr + 6, shift.to(tl.float64))

    for start in range(0, count, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = _logits(logits_ptr + row, bias_ptr, v, count)
        e, y = _power(z, top, scale)
        mass += tl.sum(e, axis=0).to(tl.float64)
        weighted += tl.sum(tl.where(e == 0.0, 0.0, e * y), axis=0).to(tl.float64)
        if ref_logits_ptr is not None:
            ref_z = _logits(ref_logits_ptr + row, bias_ptr, v, count)
            ref_e, _y = _power(ref_z, ref_top, scale)
            ref_mass += tl.sum(ref_e, axis=0).to(tl.float64)
            # An id without probability counts for nothing, whatever z' says of it.
            terms = tl.where(e == 0.0, 0.0, e * _shifted_gap(z, ref_z, shift))
            apart += tl.sum(terms, axis=0).to(tl.float64)
            if apart_ptr is not None:
                out = terms.to(apart_ptr.dtype.element_ty)
                tl.store(apart_ptr + row + v, out, mask=v < count)
        if e_ptr is not None:
            tl.store(e_ptr + row + v, e.to(e_ptr.dtype.element_ty), mask=v < count)

    tl.store(state_ptr + 1, mass)
    tl.store(state_ptr + 2, weighted)
    if ref_logits_ptr is not None:
        tl.store(state_ptr + 3, apart)
        tl.store(state_ptr + 5, ref_mass)
    else:
        for i in range(3, 7):
            tl.store(state_ptr + i, 0.0)


@triton.jit(do_not_specialize=["first"])
def gradient_kernel(
    logits_ptr, ref_logits_ptr, bias_ptr, targets_ptr, temperature_ptr, state_ptr, unit_ptr,
    d_logprobs_ptr, d_entropy_ptr, d_kl_ptr, dz_ptr, ref_dz_ptr, first, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The backward of a block, as the same file says, over unit, one token a program.

    logits, ref_logits (or None), bias as in block_kernel; state [n, 8] after the last block;
    d_logprobs [n], d_entropy (or None) and d_kl (None without ref_logits) alike, float32; unit: one
    float32, by which dz and dz' [n, count] are divided. Each may be the logits it is made of.
    """
    token = tl.program_id(0).to(tl.int64)
    row = token * count
    state_ptr += token * 8
    temperature = tl.load(temperature_ptr + token).to(tl.float64)
    scale = tl.full((), _LOG2E, tl.float64) / temperature
    target = tl.load(targets_ptr + token)
    ignored = target == -100
    by_logprob = tl.load(d_logprobs_ptr + token) / tl.load(unit_ptr)
    top = tl.load(state_ptr).to(tl.float32)
    mass = tl.load(state_ptr + 1)
    # e and e' times these are p / t and q / t.
    share = (1.0 / (mass * temperature)).to(tl.float32)
    if d_entropy_ptr is not None:
        # log p + H = (y - weighted / mass) log 2
        by_entropy = tl.load(d_entropy_ptr + token) / tl.load(unit_ptr) / _LOG2E
        mean = (tl.load(state_ptr + 2) / mass).to(tl.float32)
    if ref_logits_ptr is not None:
        # log p/q - kl = (z - z' - shift - apart / mass) / t
        d_kl = tl.load(d_kl_ptr + token) / tl.load(unit_ptr)
        by_kl = (d_kl / temperature).to(tl.float32)
        apart = (tl.load(state_ptr + 3) / mass).to(tl.float32)
        ref_top = tl.load(state_ptr + 4).to(tl.float32)
        ref_share = (1.0 / (tl.load(state_ptr + 5) * temperature)).to(tl.float32)
        shift = tl.load(state_ptr + 6).to(tl.float32)

    for start in range(0, count, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < count
        z = _logits(logits_ptr + row, bias_ptr, v, count)
        e, y = _power(z, top, scale)
        p = e * share
        change = tl.zeros((BLOCK,), tl.float32) - by_logprob
        if d_entropy_ptr is not None:
            change -= by_entropy * (y - mean)
        if ref_logits_ptr is not None:
            ref_z = _logits(ref_logits_ptr + row, bias_ptr, v, count)
            ref_e, _y = _power(ref_z, ref_top, scale)
            # An id without probability counts for nothing, whatever z' says of it.
            change += tl.where(e == 0.0, 0.0, by_kl * (_shifted_gap(z, ref_z, shift) - apart))
            ref_dz = tl.where(ignored, 0.0, d_kl * (ref_e * ref_share - p))
            tl.store(ref_dz_ptr + row + v, ref_dz.to(ref_dz_ptr.dtype.element_ty), mask=inside)
        # Of the target's 1 - p and of p alike, the sum is rounded once.
        dz = p * change
        dz += tl.where(first + v == target, (by_logprob / temperature).to(tl.float32), 0.0)
        dz = tl.where(ignored, 0.0, dz)
        tl.store(dz_ptr + row + v, dz.to(dz_ptr.dtype.element_ty), mask=inside)
