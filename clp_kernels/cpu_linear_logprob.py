"""`linear_logprob` on the CPU: PyTorch's products on blocks of the logits, one C++ pass between.

A block is some tokens times some ids of the vocabulary, so that both products are of the shapes
that PyTorch is good at and the head is read once for BLOCK_TOKENS tokens. The softmax is taken as
in flash attention: relative to the largest logit so far, scaled down when a larger one comes. The
gradients of the log-probability and of the KL with respect to the hidden state, the "slopes", are
sums over the vocabulary like the others. A mixed head and batch_invariant() are the reference's
business, and so is the backward of a trained head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels import native

# 8 MB of logits, which the last-level cache keeps between the two products.
BLOCK_TOKENS, BLOCK_LOGITS = 2**11, 2**21


def why_not(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    example_ids: Tensor | None,
    temperature: Tensor,
    return_entropy: bool,
    ref_hidden: Tensor | None,
    slopes: bool,
    invariant: bool,
) -> str | None:
    """None where this backend can run, else a sentence."""
    if hidden.device.type != "cpu":
        return f"the tensors are on {hidden.device}, not on the CPU"
    if weights is not None:
        return "the head is mixed per example"
    if invariant:
        return "batch_invariant() needs products in fixed tiles"
    return native.cpu_missing() or native.dtype_why_not(hidden)


def linear_logprob(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    example_ids: Tensor | None,
    temperature: Tensor,
    return_entropy: bool,
    ref_hidden: Tensor | None,
    slopes: bool,
    invariant: bool,
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.linear_logprob without weights, in float32 whatever hidden's dtype.

    Holds BLOCK_LOGITS logits (twice with ref_hidden), the slopes in float32, and a block of the
    head in float32 where it is not. isa: an instruction set for this call, "" for the one in use.
    """
    tokens, vocab_size = hidden.shape[0], head_weight.shape[0]
    has_ref = ref_hidden is not None
    state = torch.empty(tokens, 8, dtype=torch.float64)
    by_logprob, by_kl = (
        torch.empty(hidden.shape if wanted else (0,)) for wanted in (slopes, slopes and has_ref)
    )
    tau, targets = temperature.float().contiguous(), targets.contiguous()
    for begin in range(0, tokens, BLOCK_TOKENS):
        rows = slice(begin, begin + BLOCK_TOKENS)
        h = hidden[rows].float()
        ref = None if ref_hidden is None else ref_hidden[rows].float()
        factor, moved = torch.empty(len(h)), torch.empty(len(h))
        step = max(1, BLOCK_LOGITS // len(h))
        for first in range(0, vocab_size, step):
            ids = slice(first, first + step)
            head = head_weight[ids].float()
            added = None if bias is None else bias[ids].float()
            z = F.linear(h, head, added)
            ref_z = None if ref is None else F.linear(ref, head, added)
            native.cpu().linear_logprob(
                z.data_ptr(),
                0 if ref_z is None else ref_z.data_ptr(),
                len(h),
                len(head),
                first,
                targets[rows].data_ptr(),
                tau[rows].data_ptr(),
                slopes,
                state[rows].data_ptr(),
                factor.data_ptr(),
                moved.data_ptr(),
                torch.get_num_threads(),
                isa,
            )
            if not slopes:
                continue
            # Sums of e (z - z' - shift) W and of e W, relative to the largest logit so far.
            known = float(first > 0)  # 0: whatever stood there is not read
            if ref_z is not None:
                if first > 0:
                    scaled = by_kl[rows].mul_(factor[:, None])
                    scaled.addcmul_(by_logprob[rows], (factor * moved)[:, None])
                by_kl[rows].addmm_(ref_z, head, beta=known)
            if first > 0:
                by_logprob[rows].mul_(factor[:, None])
            by_logprob[rows].addmm_(z, head, beta=known)
    return finish(state, head_weight, targets, tau, return_entropy, has_ref, by_logprob, by_kl)


def finish(
    state: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    tau: Tensor,
    return_entropy: bool,
    has_ref: bool,
    by_logprob: Tensor,
    by_kl: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs, from the sums over the vocabulary (csrc/linear_logprob.h)."""
    top, mass, weighted, apart, ref_top, ref_mass, shift, at_target = state.unbind(1)
    t, ignored, dtype = tau.double(), targets == -100, head_weight.dtype

    def output(value: Tensor, wanted: bool = True) -> Tensor:
        empty = value.new_empty(0, dtype=torch.float32)
        return value.float().masked_fill_(ignored, 0.0) if wanted else empty

    log_mass = mass.log()
    logprobs = output((at_target - top) / t - log_mass)
    entropy = output(log_mass - weighted / mass * math.log(2), return_entropy)
    # log p - log q = (z - z' - shift) / t + offset
    offset = (ref_top - top + shift) / t + ref_mass.log() - log_mass
    exact_kl = apart / mass / t + offset
    if by_kl.numel():
        # sum_v p (log p - log q - kl) W_v / t, in place: two [T, d] are held, not four.
        by_kl.mul_((1 / (mass * t * t)).float()[:, None])
        by_kl.addcmul_(by_logprob, ((offset - exact_kl) / (mass * t)).float()[:, None])
        by_kl.masked_fill_(ignored[:, None], 0.0)
    if by_logprob.numel():
        # (W_target - sum_v p W_v) / t
        by_logprob.mul_((-1 / (mass * t)).float()[:, None])
        for rows in range(0, len(t), BLOCK_TOKENS):
            some = slice(rows, rows + BLOCK_TOKENS)
            wanted = head_weight[targets[some].clamp(min=0)].float()
            by_logprob[some].addcdiv_(wanted, tau[some, None])
        by_logprob.masked_fill_(ignored[:, None], 0.0)
    return logprobs, entropy, output(exact_kl, has_ref), by_logprob.to(dtype), by_kl.to(dtype)
