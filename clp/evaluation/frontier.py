"""Evaluation: sweep the weight grid on held-out prompts, in mixed batches; numbers and a front."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clp.data.condition import Condition
from clp.data.conversation import encode_prompt
from clp.data.prompts import columns
from clp.data.scoring import RewardLog, dry_call, numbers_or_none, score
from clp.data.weights import WeightSpec, parse_rows, weight_grid
from clp.engine.requests import Completion, SamplingParams
from clp.engine.sampler import Sampler, with_seeds
from clp.evaluation.metrics import hypervolume, pareto, spearman
from clp.policies.interface import Steerable
from clp.rewards import RewardFunc, distinct_2
from clp.training.reward_functions import in_order
from clp.training.rollout import make_batch, untrained_state
from clp_kernels.files import write_whole

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
        alpha: The KL strength that the policy was steered by; None if it has no range of them.
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
    alpha: float | None
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
    policy: Steerable,
    reward_funcs: Mapping[str, RewardFunc],
    rows: Sequence[dict[str, Any]],
    *,
    params: SamplingParams,
    weights: Sequence[WeightSpec] | None = None,
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
        weights: The W weights to evaluate, on the simplex; None: those of `weight_grid(m)`.
        seed: Any integer. Prompt i draws with the same seed for all weights, so that points differ
            by their weights and not by luck.
        kl: The KL strength, if the policy has a range; None: its geometric mean.
        reference_point: Of the hypervolume; the origin if None, since built-in rewards are >= 0.
        max_batch_size: Sequences decoded together.
        trainer_state: What reward functions get under that name, such as CLPTrainer's `state`; if
            None, a TrainerState at step 0 of 0.

    Returns:
        The frontier, and one dict per completion: prompt, weights (None: base), text, tokens (their
        number), kl_to_base (nats, summed over them), rewards (None where an objective does not
        apply), and if reward functions log columns, "extra".

    Raises:
        ValueError: before anything is sampled, objectives that differ, no rows, n other than 1, no
            weights, weights off the simplex, a reference point that is not m finite numbers, a
            policy without a base model or a head that has no exact KL, prompts that do not fit, or
            what clp.data.scoring.score raises of two short completions. Afterwards, what it raises
            of the sampled ones, or an objective that applies to no completion at some weights.
    """
    grid = weight_grid(len(policy.objectives))
    if weights is not None:
        grid = parse_rows(list(weights), len(weights), policy.objectives)
    return evaluate_parts(
        [(policy, grid)], reward_funcs, rows, params=params, seed=seed, kl=kl,
        reference_point=reference_point, max_batch_size=max_batch_size, progress=progress,
        trainer_state=trainer_state,
    )  # fmt: skip


def evaluate_parts(
    parts: Sequence[tuple[Steerable, Tensor]],
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
    """As `evaluate`, of one curve that several policies make, each at its own weights [W, m].

    They must have one base model, as policies that are trained for one set of weights each; it is
    sampled once, from the first of them.
    """
    trainer_state = untrained_state() if trainer_state is None else trainer_state
    grid = torch.cat([weights for _, weights in parts])
    if not len(grid):
        raise ValueError("weights must hold at least one set of weights")
    reward_funcs = in_order(dict(reward_funcs), parts[0][0].objectives)
    for policy, _ in parts:
        if (given := tuple(reward_funcs)) != policy.objectives:
            raise ValueError(f"reward_funcs must be {list(policy.objectives)}, got {list(given)}")
    if not rows:
        raise ValueError("rows holds no prompt")
    if params.n != 1:
        raise ValueError(f"n must be 1 in an evaluation, got {params.n}")
    m = grid.shape[1]
    reference = check_reference_point(reference_point, m)
    for policy, _ in parts:
        policy.reference.head()  # refuses a model without exact KL
    tokenizer = parts[0][0].tokenizer
    dry_call(reward_funcs, rows, tokenizer, trainer_state)
    generator = torch.Generator().manual_seed(seed % 2**64)
    seeds = torch.randint(2**62, (len(rows),), generator=generator).tolist()
    ids = [encode_prompt(row["prompt"], tokenizer, f"prompt {i}") for i, row in enumerate(rows)]
    prompts = _Prompts(ids, with_seeds(params, seeds), kl, max_batch_size, progress)
    sampled = _sample(parts, prompts)
    done = [c for _, _, completions in sampled for c in completions]
    texts = [c.text for c in done]
    everyone = list(rows) * (len(grid) + 1)
    log = RewardLog()
    rewards = score(
        reward_funcs, [row["prompt"] for row in everyone], texts, columns(everyone),
        completion_ids=[c.token_ids for c in done], trainer_state=trainer_state, log=log,
    )  # fmt: skip
    shape = (len(grid) + 1, len(rows))
    means = rewards.double().view(*shape, m).nanmean(1).numpy()
    names = list(reward_funcs)
    for w, i in np.argwhere(np.isnan(means)).tolist():
        where = "the base model" if w == len(grid) else f"weights {grid[w].tolist()}"
        raise ValueError(
            f"reward {names[i]!r} returned None for all {len(rows)} completions of "
            f"{where}; give prompts to which it applies"
        )
    divergence = _kl_sums(sampled, prompts, params.temperature)
    tokens = torch.tensor([len(c.token_ids) for c in done], dtype=torch.float64)
    kl_per_token = (divergence.view(shape).sum(1) / tokens.view(shape).sum(1)).tolist()
    distinct = [distinct_2(texts[i : i + len(rows)]) for i in range(0, len(texts), len(rows))]
    length = tokens.view(shape).mean(1).tolist()
    recorded: dict[str, Any] = {
        name: list(value) if isinstance(value := getattr(params, name), tuple) else value
        for name in _RECORDED
    }
    front = Frontier(
        objectives=names,
        weights=grid.double().numpy().round(6).tolist(),
        rewards=means[:-1].tolist(),
        base_rewards=means[-1].tolist(),
        kl_per_token=kl_per_token[:-1],
        distinct_2=distinct[:-1],
        base_distinct_2=distinct[-1],
        mean_length=length[:-1],
        base_mean_length=length[-1],
        spearman={
            name: _number_or_none(spearman(grid[:, i].numpy(), means[:-1, i]))
            for i, name in enumerate(names)
        },
        hypervolume=hypervolume(means[:-1], reference),
        base_hypervolume=hypervolume(means[-1:], reference),
        reference_point=reference,
        pareto=pareto(means[:-1]),
        prompts=len(rows),
        alpha=float(sampled[0].conditions[0, m]) if parts[0][0].kl_range else None,
        seed=seed,
        **recorded,
        metrics=log.means(),
    )
    samples = [
        {
            "prompt": row["prompt"],
            "weights": None if i >= len(grid) * len(rows) else grid[i // len(rows)].tolist(),
            "text": texts[i],
            "tokens": len(done[i].token_ids),
            "kl_to_base": float(divergence[i]),
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
    given = [0.0] * m if point is None else list(point)
    if len(given) != m:
        raise ValueError(f"reference_point must have {m} entries, got {len(given)}")
    # An integer may be too large for a float. NaN is not less.
    if not all(abs(value) < 1e300 for value in given):
        raise ValueError(f"reference_point must be finite, got {given}")
    return [float(value) for value in given]


class _Prompts(NamedTuple):
    """P prompts as token ids, the parameters of each, the KL strength of all, sequences per batch,
    progress bars or not."""

    ids: list[list[int]]
    params: list[SamplingParams]
    kl: float | None
    max_batch_size: int
    progress: bool


class _Sampled(NamedTuple):
    """The completions of all prompts for each condition [W, c], W * P, from one policy."""

    policy: Steerable
    conditions: Tensor
    completions: list[Completion]


def _sample(parts: Sequence[tuple[Steerable, Tensor]], prompts: _Prompts) -> list[_Sampled]:
    """Those of the parts, and of the base model at the end, with weights of zero."""
    count = len(prompts.ids)

    def sample(policy: Steerable, weights: Tensor) -> _Sampled:
        given = [Condition(w, prompts.kl) for w in weights]
        conditions = torch.stack([policy.condition(one, simplex=False) for one in given])
        sampler = Sampler(
            policy, max_batch_size=min(prompts.max_batch_size, count * len(conditions))
        )
        done = sampler.generate(
            prompts.ids * len(conditions), conditions.repeat_interleave(count, 0),
            prompts.params * len(conditions), simplex=False, progress=prompts.progress,
        )  # fmt: skip
        return _Sampled(policy, conditions, done)

    first, weights = parts[0]
    zero = torch.zeros(1, weights.shape[1], dtype=weights.dtype)
    if first.reference is first:  # the base shares its batches
        both = sample(first, torch.cat([weights, zero]))
        own = _Sampled(first, both.conditions[:-1], both.completions[:-count])
        base = _Sampled(first, both.conditions[-1:], both.completions[-count:])
    else:
        own, base = sample(first, weights), sample(first.reference, zero)
    return [own, *(sample(policy, each) for policy, each in parts[1:]), base]


def _kl_sums(sampled: Sequence[_Sampled], prompts: _Prompts, temperature: float) -> Tensor:
    """KL to the base summed over each completion, float64 [N]; 0 for those of the base itself."""
    # Greedy sampling has no distribution; its KL is taken at temperature 1.
    tau = temperature or 1.0
    size, count = prompts.max_batch_size, len(prompts.ids)
    *own, base = sampled
    total = sum(-(-len(each.completions) // size) for each in own)
    sums = []
    with tqdm(
        total=total, desc="KL to the base", unit="batch", disable=not prompts.progress
    ) as bar:
        for policy, conditions, done in own:
            ids, each = prompts.ids * len(conditions), conditions.repeat_interleave(count, 0)
            for start in range(0, len(done), size):
                chosen = slice(start, start + size)
                batch = make_batch(policy, ids[chosen], done[chosen], each[chosen])
                sums.append(policy.token_kl(batch, tau).sum(1).double().cpu())
                bar.update()
    return torch.cat([*sums, torch.zeros(len(base.completions), dtype=torch.float64)])


def _number_or_none(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None
