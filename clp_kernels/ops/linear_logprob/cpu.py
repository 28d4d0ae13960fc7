"""`linear_logprob` on the CPU: PyTorch's products on blocks of the logits, one C++ pass between.

A block is some tokens times some ids of the vocabulary, so that both products are of the shapes
that PyTorch is good at and the head is read once for BLOCK_TOKENS tokens. The softmax is taken as
in flash attention: relative to the largest logit so far, scaled down when a larger one comes. The
gradients of the log-probability and of the KL with respect to the hidden state, the "slopes", are
sums over the vocabulary like the others. A mixed head takes a product for each expert.
batch_invariant() is the reference's business.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels import native

# 8 MB of logits, which the last-level cache keeps between the two products.
BLOCK_TOKENS, BLOCK_LOGITS = 2**11, 2**21


@dataclass(frozen=True)
class Head:
    """W = sum_i omega_i W_i and its bias alike: experts [m, V, d], bias [m, V] or None.

    omega: [T, m], a row for each token; None where m is 1 and nothing is mixed.
    """

    experts: Tensor
    bias: Tensor | None
    omega: Tensor | None

    @staticmethod
    def of(
        weight: Tensor, bias: Tensor | None, weights: Tensor | None, example_ids: Tensor | None
    ) -> "Head":
        """From the arguments of the op."""
        if weights is None or example_ids is None:
            return Head(weight[None], None if bias is None else bias[None], None)
        return Head(weight, bias, weights.float()[example_ids.long()])

    def part(self, rows: slice, ids: slice) -> "Head":
        """That of some tokens and some ids, in float32."""
        return Head(
            self.experts[:, ids].float(),
            None if self.bias is None else self.bias[:, ids].float(),
            None if self.omega is None else self.omega[rows],
        )

    def logits(self, h: Tensor) -> Tensor:
        """z = sum_i omega_i (h W_i^T + bias_i).

        The products are scaled, as in the reference. Scaled states would spare a pass over the
        logits for each expert; their sums round apart from plain PyTorch's, and in 1 of 60 cases of
        the error budget further than it allows, where one token's logits are large.
        """
        added = [None] * len(self.experts) if self.bias is None else list(self.bias)
        z = F.linear(h, self.experts[0], added[0])
        if self.omega is None:
            return z
        first, *columns = self.omega.t()[..., None]
        z.mul_(first)
        for column, expert, bias in zip(columns, self.experts[1:], added[1:], strict=True):
            z.addcmul_(F.linear(h, expert, bias), column)
        return z

    def add_product(self, total: Tensor, z: Tensor) -> None:
        """total += z W."""
        if self.omega is None:
            total.addmm_(z, self.experts[0])
            return
        for expert, column in zip(self.experts, self.omega.t()[..., None], strict=True):
            total.addcmul_(z @ expert, column)

    def rows_of(self, rows: slice, ids: Tensor) -> Tensor:
        """W_id for a token and an id each, [n, d] in float32."""
        if self.omega is None:
            return self.experts[0][ids].float()
        each = zip(self.experts, self.omega[rows].t()[..., None], strict=True)
        first, *others = (expert[ids].float() * column for expert, column in each)
        return sum(others, first)


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
    """As reference.linear_logprob, in float32 whatever hidden's dtype.

    Holds BLOCK_LOGITS logits (twice with ref_hidden, and once more for a mixed head), the slopes in
    float32, and a block of the head in float32 where it is not.
    isa: an instruction set for this call, "" for the one in use.
    """
    tokens, vocab_size = hidden.shape[0], head_weight.shape[-2]
    has_ref = ref_hidden is not None
    state = torch.empty(tokens, 8, dtype=torch.float64)
    by_logprob, by_kl = (
        torch.zeros(hidden.shape if wanted else (0,)) for wanted in (slopes, slopes and has_ref)
    )
    head = Head.of(head_weight, bias, weights, example_ids)
    tau, targets = temperature.float().contiguous(), targets.contiguous()
    for begin in range(0, tokens, BLOCK_TOKENS):
        rows = slice(begin, begin + BLOCK_TOKENS)
        h = [states[rows].float() for states in (hidden, ref_hidden) if states is not None]
        factor, moved = torch.empty(len(h[0])), torch.empty(len(h[0]))
        step = max(1, BLOCK_LOGITS // len(h[0]))
        for first in range(0, vocab_size, step):
            part = head.part(rows, slice(first, first + step))
            logits = [part.logits(states) for states in h]
            native.cpu().linear_logprob(
                **block_arguments(logits, first, targets[rows], tau[rows], state[rows], isa),
                gradient=slopes,
                factor=factor,
                moved=moved,
            )
            if not slopes:
                continue
            # Sums of e (z - z' - shift) W and of e W, relative to the largest logit so far.
            if has_ref:
                if first > 0:
                    scaled = by_kl[rows].mul_(factor[:, None])
                    scaled.addcmul_(by_logprob[rows], (factor * moved)[:, None])
                part.add_product(by_kl[rows], logits[1])
            if first > 0:
                by_logprob[rows].mul_(factor[:, None])
            part.add_product(by_logprob[rows], logits[0])
    return finish(state, head, targets, tau, return_entropy, has_ref, by_logprob, by_kl)


def block_arguments(
    logits: list[Tensor],
    first: int,
    targets: Tensor,
    temperature: Tensor,
    state: Tensor,
    isa: str,
) -> dict[str, Any]:
    """What both C++ functions take: a block of logits (and of the reference policy's) from the id
    `first` on, and what belongs to its tokens."""
    return {
        "logits": logits[0],
        "ref_logits": logits[1] if len(logits) > 1 else None,
        "n": logits[0].shape[0],
        "C": logits[0].shape[1],
        "first": first,
        "targets": targets,
        "temperature": temperature,
        "state": state,
        "num_threads": torch.get_num_threads(),
        "isa": isa,
    }


def finish(
    state: Tensor,
    head: Head,
    targets: Tensor,
    tau: Tensor,
    return_entropy: bool,
    has_ref: bool,
    by_logprob: Tensor,
    by_kl: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs, from the sums over the vocabulary (csrc/cpu/linear_logprob/linear_logprob.h)."""
    top, mass, weighted, apart, ref_top, ref_mass, shift, at_target = state.unbind(1)
    t, ignored, dtype = tau.double(), targets == -100, head.experts.dtype

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
            wanted = head.rows_of(some, targets[some].clamp(min=0))
            by_logprob[some].addcdiv_(wanted, tau[some, None])
        by_logprob.masked_fill_(ignored[:, None], 0.0)
    return logprobs, entropy, output(exact_kl, has_ref), by_logprob.to(dtype), by_kl.to(dtype)
