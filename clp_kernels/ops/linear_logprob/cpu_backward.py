"""The backward of `linear_logprob` on the CPU, by blocks like its forward.

The softmax needs all logits of a token before the first derivative, so the blocks are gone through
twice: for the sums of the forward, and for what the derivatives by the logits give the hidden
states, the head, its bias and the weights. In between the logits are kept if there is room for
whole rows of enough tokens, and computed again if not. In batch_invariant() the reference runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clp_kernels import native
from clp_kernels.ops.linear_logprob import cpu
from clp_kernels.ops.linear_logprob.cpu import block_arguments
from clp_kernels.ops.linear_logprob.head import Head, Inputs
from clp_kernels.ops.mixed_lora.reference import sum_per_example

# 64 MB of logits (twice with ref_hidden) are kept if those are of so many tokens. With fewer, four
# products of large blocks take as long as three of small ones, which read the head more often. One
# thread: V 151,936, d 1,024: 6.9 s for the three by 110 tokens, 7.2 for the four by 512; V 32,000,
# d 512: 2.3 for the three by 512 tokens, 3.0 for the four by 2,048.
KEPT_LOGITS, KEPT_TOKENS = 2**24, 2**8


@dataclass(frozen=True)
class _Gradients:
    """Sums in float32, None if not needed; bias and weights as in Head."""

    hidden: Tensor | None
    experts: Tensor | None
    bias: Tensor | None
    weights: Tensor | None

    def add(self, part: Head, rows: slice, ids: slice, dz: Tensor, h: Tensor) -> None:
        """What dz [n, ids], the derivative by the logits of states h [n, d], adds to each."""
        if self.weights is not None and part.weights is not None:
            for i, expert in enumerate(part.experts):
                product = dz @ expert
                if self.hidden is not None:
                    self.hidden[rows].addcmul_(product, part.weights[:, i, None])
                self.weights[rows, i] += (product * h).sum(-1)
                if part.bias is not None:
                    self.weights[rows, i] += dz @ part.bias[i]
        elif self.hidden is not None:
            part.add_product(self.hidden[rows], dz)
        if self.experts is not None:
            for i, total in enumerate(self.experts[:, ids]):
                states = h if part.weights is None else h * part.weights[:, i, None]
                total.addmm_(dz.t(), states)
        if self.bias is not None:
            if part.weights is None:
                self.bias[0, ids] += dz.sum(0)
            else:
                self.bias[:, ids] += part.weights.t() @ dz


def linear_logprob_backward(
    inputs: Inputs, upstream: tuple[Tensor, ...], needs: list[bool], isa: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.linear_logprob_backward, in float32 whatever hidden's dtype.

    Holds KEPT_LOGITS logits, or a block of them (twice with ref_hidden); of the head and the states
    what the forward holds; and the needed gradients in float32. Deterministic.
    isa: an instruction set for this call, "" for the one in use.
    """
    hidden, head_weight, targets, _, weights, example_ids, temperature, ref_hidden, _ = inputs
    tokens, vocab_size = hidden.shape[0], head_weight.shape[-2]
    head = Head.of(inputs)
    tau, targets = temperature.float().contiguous(), targets.contiguous()
    upstream = tuple(d.float().contiguous() for d in upstream)
    m = len(head.experts)
    shapes = (hidden.shape, head.experts.shape, (m, vocab_size), (tokens, m))
    sums = [
        torch.zeros(shape, dtype=torch.float32) if need else None
        for shape, need in zip(shapes, needs, strict=True)
    ]
    grads = _Gradients(*sums)
    # The reference policy has the same head, and is not differentiated by its own states.
    ref_grads = _Gradients(None, *sums[1:])
    room = KEPT_LOGITS // vocab_size
    keep, most = room >= KEPT_TOKENS, cpu.BLOCK_TOKENS
    for rows in _slices(tokens, min(most, room) if keep else most):
        h = [x[rows].float() for x in (hidden, ref_hidden) if x is not None]
        count = len(h[0])
        state = torch.empty(count, 8, dtype=torch.float64)
        unused = torch.empty(2, count, dtype=torch.float32)
        blocks = _slices(vocab_size, max(1, cpu.BLOCK_LOGITS // count))
        kept = []
        for ids in blocks:
            logits = [head.part(rows, ids).logits(x) for x in h]
            native.cpu().linear_logprob(
                **block_arguments(logits, ids.start, targets[rows], tau[rows], state, isa),
                gradient=False,
                factor=unused[0],
                moved=unused[1],
            )
            if keep:
                kept.append(logits)
        for ids in blocks:
            part = head.part(rows, ids)
            logits = kept.pop(0) if keep else [part.logits(x) for x in h]
            d_logprob, d_entropy_, d_kl_ = (d[rows] if d.numel() else None for d in upstream)
            native.cpu().linear_logprob_backward(
                **block_arguments(logits, ids.start, targets[rows], tau[rows], state, isa),
                d_logprobs=d_logprob,
                d_entropy=d_entropy_,
                d_kl=d_kl_,
            )
            grads.add(part, rows, ids, logits[0], h[0])
            if ref_hidden is not None:
                ref_grads.add(part, rows, ids, logits[1], h[1])
    d_hidden, d_experts, d_bias, d_w = sums
    out_hidden, out_head, out_bias, out_weights = (hidden.new_empty(0) for _ in needs)
    if d_hidden is not None:
        out_hidden = d_hidden.to(hidden.dtype)
    if d_experts is not None:
        out_head = d_experts.view(head_weight.shape).to(hidden.dtype)
    if d_bias is not None:
        out_bias = d_bias.view(head_weight.shape[:-1]).to(hidden.dtype)
    if d_w is not None and weights is not None:
        per_example = sum_per_example(d_w, len(weights), example_ids)
        out_weights = per_example.to(weights.dtype)
    return out_hidden, out_head, out_bias, out_weights


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
