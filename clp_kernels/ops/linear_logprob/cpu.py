"""`linear_logprob` on the CPU: PyTorch's products on blocks of the logits, one C++ pass between.

A block is some tokens times some ids of the vocabulary, so that both products are of the shapes
that PyTorch is good at and the head is read once for BLOCK_TOKENS tokens. The softmax is taken as
in flash attention: relative to the largest logit so far, scaled down when a larger one comes. The
gradients of the log-probability and of the KL with respect to the hidden state are sums over the
vocabulary like the others. A mixed head takes one product per expert. In batch_invariant() the
reference runs.

The softmax needs all logits of a token before the first derivative, so the backward goes through
the blocks twice: for the sums of the forward, and for what the derivatives by the logits give the
hidden states, the head, its bias and the weights. In between the logits are kept if there is room
for whole rows of enough tokens, and computed again if not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clp_kernels import native
from clp_kernels.ops.linear_logprob.head import Head, Inputs, gradients, outputs

# 8 MB of logits, which the last-level cache keeps between the two products.
BLOCK_TOKENS, BLOCK_LOGITS = 2**11, 2**21

# 64 MB of logits (twice with ref_hidden) are kept if those are of so many tokens. With fewer, four
# products of large blocks take as long as three of small ones, which read the head more often. One
# thread: V 151,936, d 1,024: 6.9 s for the three by 110 tokens, 7.2 for the four by 512; V 32,000,
# d 512: 2.3 for the three by 512 tokens, 3.0 for the four by 2,048.
KEPT_LOGITS, KEPT_TOKENS = 2**24, 2**8


def why_not(inputs: Inputs, *_: object) -> str | None:
    """None if this backend can run, forward and backward, else a sentence."""
    if inputs.hidden.device.type != "cpu":
        return f"the tensors are on {inputs.hidden.device}, not on the CPU"
    if inputs.invariant:
        return "batch_invariant() needs products in fixed tiles"
    return native.cpu_missing() or native.dtype_why_not(inputs.hidden)


def linear_logprob(
    inputs: Inputs, return_entropy: bool, hidden_grads: bool, isa: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.linear_logprob, in float32 whatever hidden's dtype.

    Holds BLOCK_LOGITS logits (twice with ref_hidden, and once more for a mixed head), the gradients
    in float32, and a block of the head in float32 if it is not.
    isa: an instruction set for this call, "" for the one in use.
    """
    hidden, ref_hidden = inputs.hidden, inputs.ref_hidden
    tokens, vocab_size = hidden.shape[0], inputs.head_weight.shape[-2]
    state = torch.empty(tokens, 8, dtype=torch.float64)
    wanted = (hidden_grads, hidden_grads and ref_hidden is not None)
    d_logprobs, d_kl = (
        torch.zeros(hidden.shape if on else (0,), dtype=torch.float32) for on in wanted
    )
    head = Head.of(inputs)
    tau, targets = inputs.temperature.float().contiguous(), inputs.targets.contiguous()
    for rows in _slices(tokens, BLOCK_TOKENS):
        h = [states[rows].float() for states in (hidden, ref_hidden) if states is not None]
        factor, moved = (torch.empty(len(h[0]), dtype=torch.float32) for _ in range(2))
        for ids in _slices(vocab_size, max(1, BLOCK_LOGITS // len(h[0]))):
            part = head.part(rows, ids)
            logits = [part.logits(states) for states in h]
            native.cpu().linear_logprob(
                **_arguments(logits, ids, targets[rows], tau[rows], state[rows], isa),
                gradient=hidden_grads,
                factor=factor,
                moved=moved,
            )
            if not hidden_grads:
                continue
            # Sums of e (z - z' - shift) W and of e W, relative to the largest logit so far.
            if ref_hidden is not None:
                if ids.start > 0:
                    scaled = d_kl[rows].mul_(factor[:, None])
                    scaled.addcmul_(d_logprobs[rows], (factor * moved)[:, None])
                part.add_product(d_kl[rows], logits[1])
            if ids.start > 0:
                d_logprobs[rows].mul_(factor[:, None])
            part.add_product(d_logprobs[rows], logits[0])
    return outputs(state, head, inputs, return_entropy, d_logprobs, d_kl)


def _arguments(
    logits: list[Tensor], ids: slice, targets: Tensor, temperature: Tensor, state: Tensor, isa: str
) -> dict[str, Any]:
    """What both C++ functions take: a block of logits (and of the reference policy's) of these ids,
    and what belongs to its tokens."""
    return {
        "logits": logits[0],
        "ref_logits": logits[1] if len(logits) > 1 else None,
        "n": logits[0].shape[0],
        "C": logits[0].shape[1],
        "first": ids.start,
        "targets": targets,
        "temperature": temperature,
        "state": state,
        "num_threads": torch.get_num_threads(),
        "isa": isa,
    }


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


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
    hidden, ref_hidden = inputs.hidden, inputs.ref_hidden
    tokens, vocab_size = hidden.shape[0], inputs.head_weight.shape[-2]
    head = Head.of(inputs)
    tau, targets = inputs.temperature.float().contiguous(), inputs.targets.contiguous()
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
    keep, most = room >= KEPT_TOKENS, BLOCK_TOKENS
    for rows in _slices(tokens, min(most, room) if keep else most):
        h = [x[rows].float() for x in (hidden, ref_hidden) if x is not None]
        count = len(h[0])
        state = torch.empty(count, 8, dtype=torch.float64)
        unused = torch.empty(2, count, dtype=torch.float32)
        blocks = _slices(vocab_size, max(1, BLOCK_LOGITS // count))
        kept = []
        for ids in blocks:
            logits = [head.part(rows, ids).logits(x) for x in h]
            native.cpu().linear_logprob(
                **_arguments(logits, ids, targets[rows], tau[rows], state, isa),
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
                **_arguments(logits, ids, targets[rows], tau[rows], state, isa),
                d_logprobs=d_logprob,
                d_entropy=d_entropy_,
                d_kl=d_kl_,
            )
            grads.add(part, rows, ids, logits[0], h[0])
            if ref_hidden is not None:
                ref_grads.add(part, rows, ids, logits[1], h[1])
    return gradients(inputs, *sums)
