"""Log-probability, entropy and KL of sampled tokens under a policy, with gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

import clp_kernels
from clp.policies.policy import Head, Policy


@dataclass
class Batch:
    """Prompts and completions as tensors: prompts padded left, completions right.

    Attributes:
        input_ids, attention_mask: [N, P + C].
        completion_mask: [N, C], True on sampled tokens (the end token included).
        weights: [N, m].
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    weights: Tensor

    def part(self, chosen: slice) -> "Batch":
        """The sequences of a slice."""
        return Batch(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass
class TokenStats:
    """Per-token values [N, C] of a batch's completions, zero where there is no token."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor


def token_stats(policy: Policy, batch: Batch, head: Head, temperature: float) -> TokenStats:
    """Log-probability, entropy and exact KL to the base at every sampled token, with gradients.

    All three under softmax(logits / temperature), as sampled; nats, float32. The base runs without
    gradients.

    Args:
        head: Policy.head().
    """
    mask = batch.completion_mask
    width = mask.shape[1]
    # The hidden state before a token predicts it.
    before = slice(-width - 1, -1)
    with policy.steer(batch.weights):
        hidden = policy.hidden_states(batch.input_ids, batch.attention_mask)
    with policy.base():
        ref_hidden = policy.hidden_states(batch.input_ids, batch.attention_mask)
    targets = batch.input_ids[:, -width:][mask]
    if isinstance(head.ids, Tensor):
        targets = torch.searchsorted(head.ids, targets)
    found = clp_kernels.linear_logprob(
        hidden[:, before][mask],
        head.weight,
        targets,
        bias=head.bias,
        temperature=temperature * head.temperature,
        return_entropy=True,
        ref_hidden=ref_hidden[:, before][mask],
    )
    values = (value for value in found if value is not None)
    return TokenStats(
        *(torch.zeros_like(mask, dtype=v.dtype).masked_scatter(mask, v) for v in values)
    )
