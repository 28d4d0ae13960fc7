"""The gradient of a step's loss, in micro-batches of whole prompt groups."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clp.policies.head import Head
from clp.policies.policy import Policy
from clp.policies.token_stats import Batch, TokenStats, token_stats
from clp.training.config import CLPConfig
from clp.training.gradient_checkpointing import checkpointing
from clp.training.losses import (
    clipped_loss,
    kl_returns,
    policy_loss,
    rloo_advantages,
    value_advantages,
)
from clp.training.value_head import Experience, ValueHead


class Pass(NamedTuple):
    """What the first pass over a step's completions gives.

    Attributes:
        loss: The loss. stats: Those of all N completions, detached.
        fixed: Log-probabilities and advantages of each micro-batch, for further passes.
        experience: That of each micro-batch, if there is a value head.
    """

    loss: float
    stats: TokenStats
    fixed: list[tuple[Tensor, Tensor]]
    experience: list[Experience]


def accumulate_gradients(
    policy: Policy,
    head: Head,
    args: CLPConfig,
    batch: Batch,
    rewards: Tensor,
    value: ValueHead | None = None,
) -> Pass:
    """Adds the gradient of the loss to the parameters.

    Args:
        head: Policy.head().
        batch: N = G * K completions. rewards: [G, K, m], scaled.
        value: The baseline; None: leave-one-out.
    """
    k, how = args.num_generations, args.kl_gradient
    total, parts = 0.0, []
    fixed: list[tuple[Tensor, Tensor]] = []
    experience: list[Experience] = []
    for chosen, part in _micro_batches(args, batch):
        stats = _token_stats(policy, part, head, args, ref_logprobs=how != "exact")
        found = [stats.logprobs.detach(), stats.entropy.detach(), stats.kl.detach()]
        reference = found[0] if stats.ref_logprobs is None else stats.ref_logprobs
        returned = kl_returns(how, found[2], found[0] - reference).unflatten(0, (-1, k))
        alphas = _strengths(args, part, rewards.shape[-1])
        weights = part.conditions[::k, : rewards.shape[-1]]
        given = rewards[chosen], weights, returned, alphas[::k, None, None]
        if value is None:
            advantages = rloo_advantages(*given).flatten(0, 1)
        else:
            assert stats.hidden is not None
            seen = _experience(value, stats.hidden, part, *given)
            experience.append(seen)
            nothing = torch.zeros_like(found[0])
            advantages = nothing.masked_scatter(part.completion_mask, seen.advantages)
        kl = stats.kl if how == "exact" else None
        loss = policy_loss(stats.logprobs, kl, advantages, alphas)
        loss = loss * (len(found[0]) / len(batch.conditions))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        parts.append(found)
        fixed.append((found[0], advantages))
    stats = TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return Pass(total, stats, fixed, experience)


def accumulate_clipped_gradients(
    policy: Policy, head: Head, args: CLPConfig, batch: Batch, first: Pass
) -> tuple[float, int, int]:
    """Adds the gradient of the clipped loss for the completions of an earlier pass.

    Returns: the loss, and how many tokens are clipped below and above.
    """
    total, low, high = 0.0, 0, 0
    for (_, part), (old, advantages) in zip(_micro_batches(args, batch), first.fixed, strict=True):
        stats = _token_stats(policy, part, head, args)
        found = clipped_loss(
            stats.logprobs, old, stats.kl if args.kl_gradient == "exact" else None, advantages,
            part.completion_mask, _strengths(args, part, len(policy.objectives)), args.epsilon,
        )  # fmt: skip
        loss = found.loss * (len(old) / len(batch.conditions))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        low, high = low + int(found.low.sum()), high + int(found.high.sum())
    return total, low, high


def _micro_batches(args: CLPConfig, batch: Batch) -> Iterator[tuple[slice, Batch]]:
    """The prompt groups of each micro-batch, and its completions."""
    k = args.num_generations
    groups = max(1, args.micro_batch_size // k)
    for first in range(0, len(batch.conditions) // k, groups):
        last = first + groups
        yield slice(first, last), batch.part(slice(first * k, last * k))


def _strengths(args: CLPConfig, part: Batch, m: int) -> Tensor:
    """The KL strength of each completion [N]: its own, or that of all."""
    if args.kl_range is not None:
        return part.conditions[:, m]
    return part.conditions.new_full((len(part.conditions),), args.alpha)


def _token_stats(
    policy: Policy, part: Batch, head: Head, args: CLPConfig, *, ref_logprobs: bool = False
) -> TokenStats:
    context: Any = checkpointing if args.gradient_checkpointing else nullcontext
    with context(policy.model):
        return token_stats(policy, part, head, args.temperature, ref_logprobs=ref_logprobs)


@torch.no_grad()
def _experience(
    value: ValueHead,
    hidden: Tensor,
    part: Batch,
    rewards: Tensor,
    weights: Tensor,
    kl: Tensor,
    alphas: Tensor,
) -> Experience:
    """What the value head learns from a micro-batch: rewards [g, K, m], kl [g, K, C or 1]."""
    mask = part.completion_mask
    conditions = part.conditions.repeat_interleave(mask.sum(1), 0)
    per_token = rewards.flatten(0, 1).repeat_interleave(mask.sum(1), 0)
    own_kl = kl.flatten(0, 1).expand(mask.shape)[mask]
    values = rewards.new_zeros(*mask.shape, rewards.shape[-1] + 1)
    shape = rewards.shape[:2]

    def advantages() -> Tensor:
        found = value_advantages(rewards, weights, kl, values.unflatten(0, shape), alphas)
        return found.flatten(0, 1)[mask]

    returns = advantages()
    values[mask] = value(hidden, conditions)
    targets = torch.cat([per_token, own_kl[:, None]], 1)
    return Experience(hidden, conditions, targets, returns, advantages())
