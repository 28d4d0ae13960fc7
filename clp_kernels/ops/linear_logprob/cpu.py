"""`linear_logprob` on the CPU: PyTorch's products on blocks of the logits, one C++ pass between.

A block is some tokens times some ids of the vocabulary, so that both products are of the shapes
that PyTorch is good at and the head is read once for BLOCK_TOKENS tokens. The softmax is taken as
in flash attention: relative to the largest logit so far, scaled down when a larger one comes. The
gradients of the log-probability and of the KL with respect to the hidden state are sums over the
vocabulary like the others. A mixed head takes one product per expert. In batch_invariant() the
reference runs.
"""

from typing import Any

import torch
from torch import Tensor

from clp_kernels import native
from clp_kernels.ops.linear_logprob.head import Head, Inputs, outputs

# 8 MB of logits, which the last-level cache keeps between the two products.
BLOCK_TOKENS, BLOCK_LOGITS = 2**11, 2**21


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
    for begin in range(0, tokens, BLOCK_TOKENS):
        rows = slice(begin, begin + BLOCK_TOKENS)
        h = [states[rows].float() for states in (hidden, ref_hidden) if states is not None]
        factor, moved = (torch.empty(len(h[0]), dtype=torch.float32) for _ in range(2))
        step = max(1, BLOCK_LOGITS // len(h[0]))
        for first in range(0, vocab_size, step):
            part = head.part(rows, slice(first, first + step))
            logits = [part.logits(states) for states in h]
            native.cpu().linear_logprob(
                **block_arguments(logits, first, targets[rows], tau[rows], state[rows], isa),
                gradient=hidden_grads,
                factor=factor,
                moved=moved,
            )
            if not hidden_grads:
                continue
            # Sums of e (z - z' - shift) W and of e W, relative to the largest logit so far.
            if ref_hidden is not None:
                if first > 0:
                    scaled = d_kl[rows].mul_(factor[:, None])
                    scaled.addcmul_(d_logprobs[rows], (factor * moved)[:, None])
                part.add_product(d_kl[rows], logits[1])
            if first > 0:
                d_logprobs[rows].mul_(factor[:, None])
            part.add_product(d_logprobs[rows], logits[0])
    return outputs(state, head, inputs, return_entropy, d_logprobs, d_kl)


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
