"""The numbers of a training step, as metrics.jsonl has them; docs/metrics.md explains each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clp.training.rollout import Rollout, TokenStats

_NAMES = (
    "step", "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std",
    "kl", "entropy", "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio", "completions/mean_terminated_length",
    "completions/min_terminated_length", "completions/max_terminated_length", "num_tokens",
    "skipped_steps",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "step_time",
)  # fmt: skip
_OF_OBJECTIVE = ("rewards/{}/mean", "rewards/{}/std", "reward_weights/{}")


def metric_names(objectives: Sequence[str]) -> frozenset[str]:
    """The names of all metrics of a step, which reward functions may not log."""
    return frozenset(_NAMES) | {each.format(n) for n in objectives for each in _OF_OBJECTIVE}


def rollout_metrics(
    rollout: Rollout, weights: Tensor, stats: TokenStats, objectives: Sequence[str]
) -> dict[str, float | None]:
    """The step's numbers about its completions, with what reward functions logged.

    Names of TRL's mean what they mean in TRL 1.16's GRPOTrainer. Where an objective applies to no
    completion its mean is None, where to fewer than two its standard deviation.
    """
    rewards, mask = rollout.rewards.cpu(), rollout.batch.completion_mask
    # Where an objective does not apply its weight counts as 0.
    weighted = torch.einsum("gkm,gm->gk", rewards.nan_to_num(nan=0.0), weights)
    spread = weighted.std(dim=1)
    lengths = mask.sum(1).float().cpu()
    ended = torch.tensor([done.finish_reason == "stop" for done in rollout.completions])
    terminated = lengths[ended] if ended.any() else torch.zeros(1)
    tokens = mask.sum()
    drift = (stats.logprobs - rollout.sampler_logprobs).abs() * mask
    values = {
        "reward": weighted.mean(),
        "reward_std": weighted.std(),
        "frac_reward_zero_std": spread.isclose(torch.zeros_like(spread)).float().mean(),
        "kl": stats.kl.sum() / tokens,
        "entropy": stats.entropy.sum() / tokens,
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (~ended).float().mean(),
        "completions/mean_terminated_length": terminated.mean(),
        "completions/min_terminated_length": terminated.min(),
        "completions/max_terminated_length": terminated.max(),
        "sampling/sampling_logp_difference/mean": drift.sum() / tokens,
        "sampling/sampling_logp_difference/max": drift.max(),
    }
    out: dict[str, float | None] = {name: float(value) for name, value in values.items()}
    for i, name in enumerate(objectives):
        known = rewards[..., i][~rewards[..., i].isnan()]
        out[f"rewards/{name}/mean"] = float(known.mean()) if len(known) > 0 else None
        out[f"rewards/{name}/std"] = float(known.std()) if len(known) > 1 else None
        out[f"reward_weights/{name}"] = float(weights[:, i].mean())
    return out | rollout.log.means()
