"""The updates of one step: those of the policy, and of the value head if there is one."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clp.policies.head import Head
from clp.policies.policy import Policy
from clp.policies.token_stats import Batch, TokenStats
from clp.training.config import CLPConfig
from clp.training.gradients import accumulate_clipped_gradients, accumulate_gradients
from clp.training.value_head import ValueHead


class Updated(NamedTuple):
    """What a step's updates were.

    Attributes:
        passes: How many passes were made over the completions, each with its gradient.
        skipped: Whether a loss or a gradient was not finite, that of the value head included.
        stats: Those of the completions before the first update.
        metrics: loss and grad_norm of the first update; the value head's and the clipping's if
            there are such.
    """

    passes: int
    skipped: bool
    stats: TokenStats
    metrics: dict[str, float]


def update(
    policy: Policy,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    head: Head,
    args: CLPConfig,
    batch: Batch,
    rewards: Tensor,
    value: ValueHead | None,
) -> Updated:
    """args.num_iterations updates of the policy with the same completions.

    Advantages are those of the first pass, with the value head as it was before, which then learns
    from the same completions. From the first pass on whose loss or gradient is not finite, nothing
    changes any more.

    Args: as accumulate_gradients.
    """
    optimizer.zero_grad(set_to_none=True)
    first = accumulate_gradients(policy, head, args, batch, rewards, value)
    norm, skipped = _step(optimizer, parameters, args, first.loss)
    metrics = {"loss": first.loss, "grad_norm": norm}
    if value is not None:
        explained = math.nan
        if not skipped:
            explained, finite = value.fit(first.experience, args.max_grad_norm)
            skipped = not finite
        metrics["value/explained_variance"] = explained
    lows = highs = 0
    passes = 1
    for _ in range(1, args.num_iterations):
        if skipped:
            break
        optimizer.zero_grad(set_to_none=True)
        loss, low, high = accumulate_clipped_gradients(policy, head, args, batch, first)
        _, skipped = _step(optimizer, parameters, args, loss)
        passes, lows, highs = passes + 1, lows + low, highs + high
    if args.num_iterations > 1:
        # The first pass counts too: its ratios are 1.
        tokens = int(batch.completion_mask.sum()) * args.num_iterations
        metrics["clip_ratio/low_mean"] = lows / tokens
        metrics["clip_ratio/high_mean"] = highs / tokens
        metrics["clip_ratio/region_mean"] = (lows + highs) / tokens
    return Updated(passes, skipped, first.stats, metrics)


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    args: CLPConfig,
    loss: float,
) -> tuple[float, bool]:
    """Clips the gradients and updates, if all is finite; the norm, and whether it was not."""
    norm = float(nn.utils.clip_grad_norm_(parameters.values(), args.max_grad_norm))
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    return norm, not finite
