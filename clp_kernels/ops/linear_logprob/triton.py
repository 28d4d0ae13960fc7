"""`linear_logprob` on a GPU: cuBLAS products on blocks of the logits, one Triton kernel between.

Unverified on a GPU. The design is that of the CPU backend: a block is some tokens times some ids;
the softmax is taken as in flash attention, relative to the largest logit so far, and the gradients
with respect to hidden are sums over the vocabulary like the others, scaled down when a larger logit
comes. What the second product needs of the probabilities is rounded to the head's dtype, in which
the tensor cores take it; all sums are of what was there before that rounding. A mixed head takes
one product per expert, scaled in float32. In batch_invariant(), and for the backward of a trained
head, the reference runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.ops import triton_launch
from clp_kernels.ops.linear_logprob.head import Head, Inputs, outputs
from clp_kernels.ops.triton_launch import KINDS, Variant, variant

# Blocks of 256 MiB of logits in float32. Unmeasured starting points, like the two below.
BLOCK_TOKENS, BLOCK_LOGITS = 2**12, 2**26
# Blocks of ids begin at multiples of this: whole tiles of cuBLAS, and rows that 16 bytes divide.
ALIGNMENT = 128
# Ids that a program works on at a time.
BLOCK = 1024
# Told a limit, ptxas takes the registers it needs; left alone it spills some to have more programs
# at a time. Fused multiply-add is named because the default of Triton changes with 3.10.
OPTIONS = {"num_warps": 8, "maxnreg": 80, "enable_fp_fusion": True}

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


@triton.jit(do_not_specialize=["first"])
def block_kernel(
    logits_ptr, ref_logits_ptr, bias_ptr, targets_ptr, temperature_ptr, state_ptr, factor_ptr,
    e_ptr, apart_ptr, first, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What csrc/cpu/linear_logprob/linear_logprob.h says of a block, one token a program, with a
    bias [count] or None.

    logits, ref_logits (or None) [n, count] float32; state [n, 8] float64, of which a first block
    (first = 0) reads nothing; factor [n]. e and e (z - z' - shift) go to e_ptr and apart_ptr
    [n, count], None where not asked for; each may be the logits it is made of.
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
    tl.store(factor_ptr + token, factor.to(tl.float32))
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


def why_not(inputs: Inputs, *_: object) -> str | None:
    """None if this backend can run, else a sentence."""
    reason = triton_launch.why_not(inputs.hidden)
    if reason is None and inputs.invariant:
        return "batch_invariant() needs products in fixed tiles"
    return reason


def linear_logprob(
    inputs: Inputs, return_entropy: bool, hidden_grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.linear_logprob: float32 logits and sums in every dtype.

    hidden [T, d] and head_weight [V, d] or [m, V, d] in float32, bfloat16 or float16. Holds
    BLOCK_LOGITS logits in float32 (twice with ref_hidden, and once more for a mixed head), with
    16-bit gradients as many probabilities in that dtype, and the gradients in float32. In float16 a
    probability below 2^-25 of the largest is 0 in the gradients. Reads nothing on the host.
    Deterministic; the bits depend on the number of tokens.
    """
    hidden, ref_hidden = inputs.hidden, inputs.ref_hidden
    tokens, vocab_size = hidden.shape[0], inputs.head_weight.shape[-2]

    def floats(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    state = hidden.new_empty(tokens, 8, dtype=torch.float64)
    wanted = (hidden_grads, hidden_grads and ref_hidden is not None)
    d_logprobs, d_kl = (floats(*hidden.shape) if on else floats(0) for on in wanted)
    tau, targets = inputs.temperature.float().contiguous(), inputs.targets.contiguous()
    head = Head.of(inputs)
    added = None if head.bias is None else head.bias.float().contiguous()
    for begin in range(0, tokens, BLOCK_TOKENS):
        rows = slice(begin, begin + BLOCK_TOKENS)
        h, ref = hidden[rows], None if ref_hidden is None else ref_hidden[rows]
        weights = None if head.weights is None else head.weights[rows]
        factor = floats(len(h))
        step = ids_of_a_block(len(h))
        for first in range(0, vocab_size, step):
            ids = slice(first, first + step)
            experts = head.experts[:, ids]
            z = _mixed(h, experts.mT, weights)
            ref_z = None if ref is None else _mixed(ref, experts.mT, weights)
            if weights is not None and added is not None:
                for logits in (z, ref_z):
                    if logits is not None:
                        logits.addmm_(weights, added[:, ids])
            e, apart = (
                _like(logits, hidden.dtype) if hidden_grads and logits is not None else None
                for logits in (z, ref_z)
            )
            with torch.cuda.device_of(hidden):
                block_kernel[(len(h),)](
                    logits_ptr=z,
                    ref_logits_ptr=ref_z,
                    bias_ptr=added[0, ids] if added is not None and weights is None else None,
                    targets_ptr=targets[rows],
                    temperature_ptr=tau[rows],
                    state_ptr=state[rows],
                    factor_ptr=factor,
                    e_ptr=e,
                    apart_ptr=apart,
                    first=first,
                    count=z.shape[1],
                    BLOCK=BLOCK,
                    **OPTIONS,
                )
            # Sums of e W and of e (z - z' - shift) W, relative to the largest logit so far.
            for total, terms in ((d_logprobs, e), (d_kl, apart)):
                if terms is None:
                    continue
                product, sums = _mixed(terms, experts, weights), total[rows]
                if first == 0:
                    sums.copy_(product)
                else:
                    torch.addcmul(product, sums, factor[:, None], out=sums)
    return outputs(state, head, inputs, return_entropy, d_logprobs, d_kl)


def ids_of_a_block(tokens: int) -> int:
    """How many ids a block of so many tokens has: whole tiles where the logits allow it."""
    step = max(1, BLOCK_LOGITS // tokens)
    return step if step < ALIGNMENT else step // ALIGNMENT * ALIGNMENT


def _mixed(a: Tensor, matrices: Tensor, weights: Tensor | None) -> Tensor:
    """sum_i w_i (a @ matrices[i]) in float32, weights [n, m]; a @ matrices[0] without them.

    Scaling the products keeps a's 16 bits as they are; scaled states would be rounded again.
    """
    total = _product(a, matrices[0])
    if weights is None:
        return total
    total.mul_(weights[:, :1])
    for i in range(1, len(matrices)):
        total.addcmul_(_product(a, matrices[i]), weights[:, i : i + 1])
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, never rounded to the dtype of 16-bit factors."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # PyTorch has that product on CUDA alone; this is for the interpreter.
    return torch.mm(a.float(), b.float())


def _like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where what becomes of logits goes: in their place if the dtype allows it."""
    return logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)


def variants(capability: tuple[int, int]) -> list[Variant]:
    """Every variant of the kernel that linear_logprob launches, on any GPU."""
    fp32, found = "*fp32", []
    always = {"logits": fp32, "targets": "*i64", "temperature": fp32, "state": "*fp64"}
    always["factor"] = fp32
    for bias in ({}, {"bias": fp32}):
        for kind in (None, *KINDS.values()):
            e = {} if kind is None else {"e": kind}
            apart = {} if kind is None else {"apart": kind}
            for more in (e, {"ref_logits": fp32, **e, **apart}):
                types = {**always, **bias, **more}
                found.append(variant(block_kernel, {"BLOCK": BLOCK}, OPTIONS, types))
    return found
