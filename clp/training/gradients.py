"""The gradient of a step's loss, in micro-batches of whole prompt groups."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from clp.policies.policy import Head, Policy
from clp.policies.token_stats import Batch, TokenStats, token_stats
from clp.training.config import CLPConfig
from clp.training.gradient_checkpointing import checkpointing
from clp.training.losses import kl_returns, policy_loss, rloo_advantages


def accumulate_gradients(
    policy: Policy, head: Head, args: CLPConfig, batch: Batch, rewards: Tensor, conditions: Tensor
) -> tuple[float, TokenStats]:
    """Adds the gradient of the loss to the parameters; the loss, and the token stats, detached.

    Args:
        head: Policy.head().
        batch: N = G * K completions. rewards: [G, K, m], scaled. conditions: [G, c], those of
            the groups, as Steerable.condition makes them.
    """
    k, how = args.num_generations, args.kl_gradient
    m, conditions = rewards.shape[-1], conditions.to(rewards.device)
    weights = conditions[:, :m]
    # [G]: each group's own strength, or the one of all.
    alphas = conditions[:, m] if args.kl_range else weights.new_full((len(weights),), args.alpha)
    context: Any = checkpointing if args.gradient_checkpointing else nullcontext
    groups = max(1, args.micro_batch_size // k)
    total, parts = 0.0, []
    for first in range(0, len(weights), groups):
        chosen = slice(first, first + groups)
        part = batch.part(slice(first * k, (first + groups) * k))
        with context(policy.model):
            stats = token_stats(policy, part, head, args.temperature, ref_logprobs=how != "exact")
        found = [stats.logprobs.detach(), stats.entropy.detach(), stats.kl.detach()]
        reference = found[0] if stats.ref_logprobs is None else stats.ref_logprobs
        returned = kl_returns(how, found[2], found[0] - reference)
        advantages = rloo_advantages(
            rewards[chosen],
            weights[chosen],
            returned.unflatten(0, (-1, k)),
            alphas[chosen, None, None],
        )
        loss = policy_loss(
            stats.logprobs,
            stats.kl if how == "exact" else None,
            advantages.flatten(0, 1),
            alphas[chosen].repeat_interleave(k),
        )
        loss = loss * (len(returned) / (len(weights) * k))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        parts.append(found)
    return total, TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
