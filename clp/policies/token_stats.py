"""Log-probability, entropy and KL of sampled tokens under a policy, with gradients."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import clp_kernels
from clp.policies.attention import rows
from clp.policies.head import Head
from clp.policies.packed import Packed

if TYPE_CHECKING:  # policy.py imports this file
    from clp.policies.policy import Policy


@dataclass
class Batch:
    """Prompts and completions as tensors: prompts padded left, completions right.

    Attributes:
        input_ids, attention_mask: [N, P + C]. The prompts are those that the policy gets.
        completion_mask: [N, C], True on sampled tokens (the end token included).
        conditions: [N, c], as Steerable.condition makes them.
        base_ids, base_mask: [N, P' + C]: the same with the prompts that the base model gets.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    conditions: Tensor
    base_ids: Tensor
    base_mask: Tensor

    def part(self, chosen: slice) -> "Batch":
        """The sequences of a slice."""
        part = Batch(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))
        if self.base_ids is self.input_ids:
            part.base_ids = part.input_ids
        return part


@dataclass
class TokenStats:
    """Per-token values [N, C] of a batch's completions, zero where there is no token.

    ref_logprobs: log pi_ref of the sampled tokens, without gradients; None if not asked for.
    hidden: [T, d], the policy's last hidden states before the T sampled tokens, without gradients,
        in the order of completion_mask; None in stats that are put together of several.
    """

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    ref_logprobs: Tensor | None = None
    hidden: Tensor | None = None


def token_stats(
    policy: "Policy", batch: Batch, head: Head, temperature: float, *, ref_logprobs: bool = False
) -> TokenStats:
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
    layer_weights = policy.layer_weights(batch.conditions)
    packed = Packed(batch.input_ids, batch.attention_mask, layer_weights)
    with policy.steer(batch.conditions[packed.examples]):
        hidden = policy.hidden_states(packed)
    base = packed
    if batch.base_ids is not batch.input_ids:
        base = Packed(batch.base_ids, batch.base_mask, layer_weights)
    with policy.base():
        ref_hidden = policy.hidden_states(base)
    targets = batch.input_ids[:, -width:][mask]
    if isinstance(head.ids, Tensor):
        targets = torch.searchsorted(head.ids, targets)
    chosen = rows(hidden, packed.places[:, before][mask])
    parts = _conditioned(
        head,
        chosen,
        rows(ref_hidden, base.places[:, before][mask]),
        layer_weights.repeat_interleave(mask.sum(1), 0),
    )
    found = clp_kernels.linear_logprob(
        parts.hidden,
        parts.head_weight,
        targets,
        bias=head.bias,
        temperature=temperature * head.temperature,
        return_entropy=True,
        ref_hidden=parts.ref_hidden,
    )
    values = [value for value in found if value is not None]
    if ref_logprobs:
        with torch.no_grad():
            reference = clp_kernels.linear_logprob(
                parts.ref_hidden,
                parts.head_weight,
                targets,
                bias=head.bias,
                temperature=temperature * head.temperature,
            )
        values.append(reference.logprobs)
    stats = TokenStats(
        *(torch.zeros_like(mask, dtype=v.dtype).masked_scatter(mask, v) for v in values)
    )
    stats.hidden = chosen.detach()
    return stats


class _Parts(NamedTuple):
    hidden: Tensor
    head_weight: Tensor
    ref_hidden: Tensor


def _conditioned(head: Head, hidden: Tensor, ref_hidden: Tensor, weights: Tensor) -> _Parts:
    """A head with experts as one plain head, for hidden states [T, d] and its weights [T, m]:

        W h + sum_i w_i (D_i h + b_i) = [W, D_1, ..., D_m, b_1, ..., b_m] [h, w_1 h, ..., w_m h, w]

    The reference has zeros in place of the weights, so that it is the base's whatever D_i is.
    """
    if head.experts is None:
        return _Parts(hidden, head.weight, ref_hidden)
    dtype = hidden.dtype
    differences = head.experts.expert_weight[:, head.ids].to(dtype)
    scales = weights.to(dtype)
    rows, columns = [hidden], [head.weight, *differences]
    rows += [hidden * scales[:, i : i + 1] for i in range(len(differences))]
    if head.experts.expert_bias is not None:
        rows.append(scales)
        columns.append(head.experts.expert_bias[:, head.ids].t().to(dtype))
    wide = torch.cat(rows, 1)
    nothing = ref_hidden.new_zeros(len(wide), wide.shape[1] - ref_hidden.shape[1])
    return _Parts(wide, torch.cat(columns, 1), torch.cat([ref_hidden, nothing], 1))
