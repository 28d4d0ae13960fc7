"""Evaluation: sweep the weight grid on held-out prompts, in mixed batches; numbers and a front."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from clp.data.condition import Condition
from clp.data.conversation import encode_prompt
from clp.data.files import write_whole
from clp.data.prompts import columns
from clp.data.scoring import RewardLog, dry_call, numbers_or_none, score
from clp.data.weights import weight_grid
from clp.engine.requests import Completion, SamplingParams
from clp.engine.sampler import Sampler, with_seeds
from clp.policies.policy import Head, Policy
from clp.policies.token_stats import token_stats
from clp.rewards import RewardFunc, distinct_2
from clp.training.rollout import make_batch, untrained_state

# The sampling parameters that an evaluation depends on, as Frontier holds them.
_RECORDED = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "stop_token_ids",
             "ignore_eos")  # fmt: skip


@dataclass(frozen=True)
class Frontier:
    """The trade-off curve of a policy; larger rewards are better. Lists follow `weights` [W, m].

    Attributes:
        objectives, weights [W, m], rewards [W, m] (means over the prompts to whose completions an
            objective applies), base_rewards [m].
        kl_per_token: [W], exact KL to the base, nats, mean over all tokens sampled with weights[i].
        distinct_2: [W], unique over all word bigrams of these completions; base_distinct_2.
        mean_length: [W], tokens per completion.
        spearman: objective -> rank correlation of its weight with its reward over the grid; None
            if its reward is constant.
        hypervolume, base_hypervolume: area (volume) between the reference point and the points
            of `rewards`, or the base's point; 0 if none of them exceeds it in every objective.
        reference_point: [m]. pareto: [W], whether no other point dominates this one; equal points
            do not dominate each other.
        kl: The KL strength alpha that the policy was steered by; None if it has no range of them.
        prompts, seed: how many prompts, and the seed of the completions.
        max_tokens, temperature, top_k, top_p, min_p, stop, stop_token_ids, ignore_eos: how the
            completions were sampled; see SamplingParams.
        metrics: name -> mean of what reward functions logged by log_metric.
        run, reward_specs, prompts_file: what was evaluated, on what; None if it was given in
            Python and has no name.
    """

    objectives: list[str]
    weights: list[list[float]]
    rewards: list[list[float]]
    base_rewards: list[float]
    kl_per_token: list[float]
    distinct_2: list[float]
    base_distinct_2: float
    mean_length: list[float]
    base_mean_length: float
    spearman: dict[str, float | None]
    hypervolume: float
    base_hypervolume: float
    reference_point: list[float]
    pareto: list[bool]
    prompts: int
    kl: float | None
    seed: int
    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    metrics: dict[str, float | None] = field(default_factory=dict)
    run: str | None = None
    reward_specs: list[str] | None = None
    prompts_file: str | None = None

    def save(self, path: Path) -> None:
        """Writes the JSON (no NaN in it), replacing the file by a rename."""
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        write_whole(path, f"{text}\n".encode())


def evaluate(
    policy: Policy,
    reward_funcs: Mapping[str, RewardFunc],
    rows: Sequence[dict[str, Any]],
    *,
    params: SamplingParams,
    seed: int = 0,
    kl: float | None = None,
    reference_point: Sequence[float] | None = None,
    max_batch_size: int = 64,
    progress: bool = False,
    trainer_state: Any = None,
) -> tuple[Frontier, list[dict[str, Any]]]:
    """Samples every prompt with all weights of the grid, and with the base model.

    Args:
        policy, reward_funcs: Objectives must agree in name and order. Each function is called once
            on two short completions before anything is sampled.
        rows: Held-out prompts (texts or conversations) with the rewards' columns.
        params: Sampling; its seed is ignored, n must be 1.
        seed: Any integer. Prompt i draws with the same seed for all weights, so that points differ
            by their weights and not by luck.
        kl: The KL strength, if the policy has a range of them; None: its middle.
        reference_point: Of the hypervolume; the origin if None, since built-in rewards are >= 0.
        max_batch_size: Sequences decoded together.
        trainer_state: What reward functions get under that name, such as CLPTrainer's `state`; if
            None, a TrainerState at step 0 of 0.

    Returns:
        The frontier, and one dict per completion: prompt, weights (None: base), text, rewards (None
        where an objective does not apply), and if reward functions log columns, "extra".

    Raises:
        ValueError: before anything is sampled, objectives that differ, no rows, n other than 1, a
            reference point that is not m finite numbers, a head that has no exact KL,
            prompts that do not fit, or what clp.data.scoring.score raises of two short completions.
            Afterwards, what it raises of the sampled ones, or an objective that applies to no
            completion at some weights.
    """
    trainer_state = untrained_state() if trainer_state is None else trainer_state
    if (given := tuple(reward_funcs)) != policy.objectives:
        raise ValueError(f"reward_funcs must be {list(policy.objectives)}, got {list(given)}")
    if not rows:
        raise ValueError("rows holds no prompt")
    if params.n != 1:
        raise ValueError(f"n must be 1 in an evaluation, got {params.n}")
    m = len(policy.objectives)
    reference = check_reference_point(reference_point, m)
    head = policy.head()
    dry_call(reward_funcs, rows, policy.tokenizer, trainer_state)
    grid = weight_grid(m)
    # Weights of zero give the base model, which shares the batches.
    sweep = torch.cat([grid, grid.new_zeros(1, m)])
    everyone = [row for _ in sweep for row in rows]
    sweep = torch.stack([policy.condition(Condition(w, kl), simplex=False) for w in sweep])
    conditions = sweep.repeat_interleave(len(rows), 0)
    generator = torch.Generator().manual_seed(seed % 2**64)
    seeds = torch.randint(2**62, (len(rows),), generator=generator).tolist() * len(sweep)
    sampler = Sampler(policy, max_batch_size=min(max_batch_size, len(everyone)))
    ids = [
        encode_prompt(row["prompt"], policy.tokenizer, f"prompt {i}") for i, row in enumerate(rows)
    ] * len(sweep)
    each = with_seeds(params, seeds)
    done = sampler.generate(ids, conditions, each, simplex=False, progress=progress)
    texts = [c.text for c in done]
    log = RewardLog()
    rewards = score(
        reward_funcs, [row["prompt"] for row in everyone], texts, columns(everyone),
        completion_ids=[c.token_ids for c in done], trainer_state=trainer_state, log=log,
    )  # fmt: skip
    shape = (len(sweep), len(rows))
    means = rewards.double().view(*shape, m).nanmean(1).numpy()
    for w, i in np.argwhere(np.isnan(means)).tolist():
        where = "the base model" if w == len(grid) else f"weights {grid[w].tolist()}"
        raise ValueError(
            f"reward {policy.objectives[i]!r} returned None for all {len(rows)} completions of "
            f"{where}; give prompts to which it applies"
        )
    divergence, tokens = _kl_sums(
        policy, head, ids, done, conditions, params.temperature, max_batch_size, progress
    )
    kl_per_token = (divergence.view(shape).sum(1) / tokens.view(shape).sum(1)).tolist()
    distinct = [distinct_2(texts[i : i + len(rows)]) for i in range(0, len(texts), len(rows))]
    length = tokens.view(shape).mean(1).tolist()
    recorded: dict[str, Any] = {
        name: list(value) if isinstance(value := getattr(params, name), tuple) else value
        for name in _RECORDED
    }
    front = Frontier(
        objectives=list(policy.objectives),
        weights=grid.double().numpy().round(6).tolist(),
        rewards=means[:-1].tolist(),
        base_rewards=means[-1].tolist(),
        kl_per_token=kl_per_token[:-1],
        distinct_2=distinct[:-1],
        base_distinct_2=distinct[-1],
        mean_length=length[:-1],
        base_mean_length=length[-1],
        spearman={
            name: _spearman(grid[:, i].numpy(), means[:-1, i])
            for i, name in enumerate(policy.objectives)
        },
        hypervolume=_hypervolume(means[:-1], reference),
        base_hypervolume=_hypervolume(means[-1:], reference),
        reference_point=reference,
        pareto=pareto(means[:-1]),
        prompts=len(rows),
        kl=None if policy.kl_range is None else float(sweep[0, m]),
        seed=seed,
        **recorded,
        metrics=log.means(),
    )
    samples = [
        {
            "prompt": row["prompt"],
            "weights": None if i >= len(grid) * len(rows) else conditions[i, :m].tolist(),
            "text": texts[i],
            "rewards": numbers_or_none(rewards[i]),
        }
        | ({"extra": log.extra_of(i)} if log.extra else {})
        for i, row in enumerate(everyone)
    ]
    return front, samples


def check_reference_point(point: Sequence[float] | None, m: int) -> list[float]:
    """The reference point [m] of the hypervolume; the origin if None.

    Raises: ValueError unless it is m finite numbers.
    """
    found = [0.0] * m if point is None else [float(value) for value in point]
    if len(found) != m:
        raise ValueError(f"reference_point must have {m} entries, got {len(found)}")
    if not all(map(math.isfinite, found)):
        raise ValueError(f"reference_point must be finite, got {found}")
    return found


def _kl_sums(
    policy: Policy,
    head: Head,
    prompt_ids: Sequence[list[int]],
    done: Sequence[Completion],
    conditions: Tensor,
    temperature: float,
    size: int,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """KL to the base summed over each completion, and its number of tokens; float64 [N]."""
    # Greedy sampling has no distribution; its KL is taken at temperature 1.
    tau = temperature or 1.0
    sums = []
    starts = range(0, len(done), size)
    for start in tqdm(starts, desc="KL to the base", unit="batch", disable=not progress):
        chosen = slice(start, start + size)
        batch = make_batch(policy, prompt_ids[chosen], done[chosen], conditions[chosen])
        with torch.no_grad():
            sums.append(token_stats(policy, batch, head, tau).kl.sum(1).double().cpu())
    return torch.cat(sums), torch.tensor([len(c.token_ids) for c in done], dtype=torch.float64)


def _spearman(weights: np.ndarray, rewards: np.ndarray) -> float | None:
    if len(weights) < 2 or np.ptp(rewards) == 0:
        return None
    return float(stats.spearmanr(weights, rewards).statistic)


def pareto(points: np.ndarray) -> list[bool]:
    """For each of the points [W, m] whether no other is as large everywhere and larger somewhere.

    Equal points do not dominate each other.
    """
    return moocore.is_nondominated(points, maximise=True, keep_weakly=True).tolist()  # type: ignore[no-any-return]


def _hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    return float(moocore.hypervolume(points, ref=np.asarray(reference), maximise=True))
