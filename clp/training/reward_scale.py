"""The unit of each objective: the standard deviation of its rewards under the reference policy.

A scale that followed the policy would change the objective while it is trained: as the policy
narrows, its rewards spread less, their quotient grows, and KL restrains it less and less (the
demo's brevity alone: standard deviation 0.242 to 0.053, KL to 4.9 nats per token).
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from clp.data.conversation import encode_prompt
from clp.data.prompts import columns
from clp.data.scoring import RewardLog, score
from clp.engine.requests import SamplingParams
from clp.engine.sampler import Sampler, with_seeds
from clp.rewards import RewardFunc

# The standard error of a standard deviation is 3 % of it, if rewards are roughly normal.
COMPLETIONS = 512


def measured_completions(num_generations: int) -> int:
    """How many completions measure the scale: COMPLETIONS in whole groups."""
    return -(-COMPLETIONS // num_generations) * num_generations


def measure_reward_scale(
    sampler: Sampler,
    reward_funcs: Mapping[str, RewardFunc],
    rows: Sequence[dict[str, Any]],
    params: SamplingParams,
    num_generations: int,
    seed: int,
    trainer_state: Any,
    reserved: frozenset[str],
) -> dict[str, float]:
    """The standard deviation of each objective's rewards under pi_ref, in the rewards' own units.

        std_i = sqrt(mean_n (R_i(y_n) - mean_n R_i(y_n))^2),  y_n ~ pi_ref

    where n runs over those of at least COMPLETIONS completions to which objective i applies. The
    prompts are `rows` in a random order, again and again, each num_generations times in a row, as
    in training. Deterministic in the seed.

    Args:
        params: Length and temperature as in training.
        trainer_state: What the functions get as `trainer_state`, a transformers TrainerState.
        reserved: Names that reward functions may not log.

    Raises:
        ValueError: a standard deviation of 0, or of fewer than two completions, naming the
            objective. What a reward function raises passes through.
    """
    policy = sampler.policy
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    groups = measured_completions(num_generations) // num_generations
    chosen = [rows[order[i % len(rows)]] for i in range(groups) for _ in range(num_generations)]
    ids = [encode_prompt(row["prompt"], policy.tokenizer) for row in chosen]
    seeds = torch.randint(2**62, (len(chosen),), generator=generator).tolist()
    text = f"measuring the reward scale on {len(chosen)} completions of the base model"
    tqdm.write(text, file=sys.stderr)
    # Weights of zero give the base model.
    nothing, each = [0.0] * len(reward_funcs), with_seeds(params, seeds)
    done = sampler.generate(ids, nothing, each, simplex=False, progress=True)
    rewards = score(
        reward_funcs, [row["prompt"] for row in chosen], [c.text for c in done], columns(chosen),
        completion_ids=[c.token_ids for c in done], trainer_state=trainer_state,
        log=RewardLog(reserved),
    )  # fmt: skip
    found = {}
    for name, column in zip(reward_funcs, rewards.double().T, strict=True):
        known = column[~column.isnan()]
        # The mean of equal values, summed in float64, is exact, and their deviation exactly 0.
        std = float(known.std(correction=0)) if len(known) > 1 else 0.0
        if std == 0:
            what = f"is {float(known[0]):g} for" if len(known) > 1 else "applies to at most one of"
            raise ValueError(
                f"the reward of {name} {what} all {len(chosen)} completions of the base model, so "
                "it has no standard deviation to be divided by (scale_rewards='reference'); "
                "scale_rewards='none' takes rewards as they are"
            )
        found[name] = std
    shown = ", ".join(f"{name} {std:.3g}" for name, std in found.items())
    tqdm.write(f"standard deviations of the rewards: {shown}", file=sys.stderr)
    return found
