"""A step's rollout: prompt groups and their weights -> completions, tensors, rewards, metrics."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from clp.data.conversation import encode_prompt
from clp.data.prompts import columns
from clp.data.scoring import RewardLog, numbers_or_none, score
from clp.engine.requests import Completion, SamplingParams
from clp.engine.sampler import Sampler, with_seeds
from clp.policies.interface import Steerable
from clp.policies.token_stats import Batch, TokenStats
from clp.rewards import RewardFunc

# docs/metrics.md explains each.
_NAMES = (
    "step", "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std",
    "kl", "entropy", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/clipped_ratio", "completions/mean_terminated_length",
    "completions/min_terminated_length", "completions/max_terminated_length", "num_tokens",
    "skipped_steps",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "step_time",
)  # fmt: skip
# Those of options: kl_range, baseline="value", num_iterations.
OPTIONAL = ("alpha", "value/explained_variance", "clip_ratio/low_mean", "clip_ratio/high_mean",
            "clip_ratio/region_mean")  # fmt: skip
_OF_OBJECTIVE = ("rewards/{}/mean", "rewards/{}/std", "reward_weights/{}",
                 "reward_weights/{}/std")  # fmt: skip


@dataclass
class Rollout:
    """A step's completions: N = G * K sequences, in groups of K.

    Attributes:
        batch: The tensors. rewards: [G, K, m], NaN if an objective does not apply.
        sampler_logprobs: [N, C], as the sampler saw them.
        completions: The N completions. log: What the reward functions logged about them.
    """

    batch: Batch
    rewards: Tensor
    sampler_logprobs: Tensor
    completions: list[Completion]
    log: RewardLog


def make_batch(
    policy: Steerable,
    prompt_ids: Sequence[list[int]],
    completions: Sequence[Completion],
    conditions: Tensor,
) -> Batch:
    """Stacks prompts and completions; conditions [N, c]."""
    base_ids, base_mask, width = _stacked(policy, prompt_ids, completions)
    given = [policy.conditioned_prompt(*one) for one in zip(prompt_ids, conditions, strict=True)]
    ids, mask = base_ids, base_mask
    if given != list(prompt_ids):
        ids, mask, _ = _stacked(policy, given, completions)
    done = base_mask[:, -width:].bool()
    return Batch(ids, mask, done, conditions.to(policy.device), base_ids, base_mask)


def _stacked(
    policy: Steerable, prompt_ids: Sequence[list[int]], completions: Sequence[Completion]
) -> tuple[Tensor, Tensor, int]:
    """Ids and mask [N, P + C], and C."""
    pad = policy.tokenizer.pad_token_id or 0
    p = max(len(ids) for ids in prompt_ids)
    c = max(len(done.token_ids) for done in completions)
    ids = torch.full((len(completions), p + c), pad)
    mask = torch.zeros_like(ids)
    for i, (prompt, done) in enumerate(zip(prompt_ids, completions, strict=True)):
        whole = prompt + done.token_ids
        start = p - len(prompt)
        ids[i, start : start + len(whole)] = torch.tensor(whole)
        mask[i, start : start + len(whole)] = 1
    return ids.to(policy.device), mask.to(policy.device), c


def untrained_state() -> TrainerState:
    """What reward functions get as `trainer_state` if nothing is trained: step 0 of 0."""
    return TrainerState()


def roll_out(
    sampler: Sampler,
    reward_funcs: Mapping[str, RewardFunc],
    rows: Sequence[dict[str, Any]],
    conditions: Tensor,
    num_generations: int,
    params: SamplingParams,
    generator: torch.Generator,
    trainer_state: TrainerState,
) -> Rollout:
    """Samples and scores num_generations completions for each of the G prompts, conditions [G, c].

    Every completion draws with its own seed from `generator`. Reward functions get `trainer_state`,
    and may not log metrics with the names of a step's own.
    """
    policy: Any = sampler.policy
    repeated = [row for row in rows for _ in range(num_generations)]
    repeated_conditions = conditions.repeat_interleave(num_generations, 0)
    ids = [encode_prompt(row["prompt"], policy.tokenizer) for row in rows]
    prompt_ids = [p for p in ids for _ in range(num_generations)]
    seeds = torch.randint(2**62, (len(repeated),), generator=generator).tolist()
    completions = sampler.generate(prompt_ids, repeated_conditions, with_seeds(params, seeds))
    log = RewardLog(metric_names(policy.objectives))
    rewards = score(
        reward_funcs, [row["prompt"] for row in repeated], [done.text for done in completions],
        columns(repeated), completion_ids=[done.token_ids for done in completions],
        trainer_state=trainer_state, log=log,
    )  # fmt: skip
    batch = make_batch(policy, prompt_ids, completions, repeated_conditions)
    sampled = [torch.tensor(done.logprobs, dtype=torch.float32) for done in completions]
    logprobs = torch.nn.utils.rnn.pad_sequence(sampled, batch_first=True).to(policy.device)
    shape = (len(rows), num_generations, len(reward_funcs))
    return Rollout(batch, rewards.view(shape).to(policy.device), logprobs, completions, log)


def append_completions(
    path: Path,
    rollout: Rollout,
    rows: Sequence[dict[str, Any]],
    objectives: Sequence[str],
    step: int,
) -> None:
    """Appends a line of JSON per completion, with what reward functions logged about it."""
    rewards, conditions = rollout.rewards.flatten(0, 1), rollout.batch.conditions
    each = rollout.rewards.shape[1]
    with path.open("a", encoding="utf-8") as file:
        for i, done in enumerate(rollout.completions):
            line = {
                "step": step,
                "prompt": rows[i // each]["prompt"],
                "completion": done.text,
                "weights": dict(zip(objectives, conditions[i].tolist(), strict=False)),
                "rewards": dict(zip(objectives, numbers_or_none(rewards[i]), strict=True)),
                "extra": rollout.log.extra_of(i),
            }
            if alpha := conditions[i, len(objectives) :].tolist():
                line["alpha"] = alpha[0]
            file.write(json.dumps(line, allow_nan=False) + "\n")


def metric_names(objectives: Sequence[str]) -> frozenset[str]:
    """The names of all metrics of a step, which reward functions may not log."""
    return frozenset(_NAMES + OPTIONAL) | {
        each.format(n) for n in objectives for each in _OF_OBJECTIVE
    }


def rollout_metrics(
    rollout: Rollout, conditions: Tensor, stats: TokenStats, objectives: Sequence[str]
) -> dict[str, float | None]:
    """The step's numbers about its completions, with what reward functions logged.

    TRL's names mean what they mean in TRL 1.16's GRPOTrainer. The mean of an objective that applies
    to no completion is None, and the standard deviation of one that applies to fewer than two.
    That of the reward of a single completion is NaN.
    """
    rewards, mask = rollout.rewards.cpu(), rollout.batch.completion_mask
    weights, alphas = conditions[:, : len(objectives)], conditions[:, len(objectives) :]
    # The weight of an objective that does not apply counts as 0.
    weighted = torch.einsum("gkm,gm->gk", rewards.nan_to_num(nan=0.0), weights)
    spread = weighted.std(dim=1) if weighted.shape[1] > 1 else torch.zeros(len(weighted))
    lengths = mask.sum(1).float().cpu()
    ended = torch.tensor([done.finish_reason == "stop" for done in rollout.completions])
    terminated = lengths[ended] if ended.any() else torch.zeros(1, dtype=torch.float32)
    tokens = mask.sum()
    drift = (stats.logprobs - rollout.sampler_logprobs).abs() * mask
    values = {
        "reward": weighted.mean(),
        "reward_std": weighted.std() if weighted.numel() > 1 else math.nan,
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
    if alphas.shape[1]:
        values["alpha"] = alphas.mean()
    out: dict[str, float | None] = {name: float(value) for name, value in values.items()}
    for i, name in enumerate(objectives):
        known = rewards[..., i][~rewards[..., i].isnan()]
        out[f"rewards/{name}/mean"] = float(known.mean()) if len(known) > 0 else None
        out[f"rewards/{name}/std"] = float(known.std()) if len(known) > 1 else None
        out[f"reward_weights/{name}"] = float(weights[:, i].mean())
        out[f"reward_weights/{name}/std"] = float(weights[:, i].std()) if len(weights) > 1 else None
    return out | rollout.log.means()
