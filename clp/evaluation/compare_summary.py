"""The figures of a comparison, from the files of its units: what compare.json holds."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clp.data.json_lines import read_json, read_lines
from clp.evaluation.compare import Unit, read_base
from clp.evaluation.compare_config import Comparison
from clp.evaluation.frontier import Frontier
from clp.evaluation.metrics import (
    RESAMPLES,
    Interval,
    additive_epsilon,
    dominated,
    hypervolume,
    inner_product,
    mean_rewards,
    paired_bootstrap,
    spearman,
)
from clp.rewards import words

EQUAL_BUDGET = (
    "completions sampled in training: budget 1 is max_steps * num_prompts * num_generations of the "
    "task; those that measure the reward scale come on top"
)
INTERVALS = (
    f"mean over the seeds; 95 % interval of a paired bootstrap over the prompts, {RESAMPLES} "
    "resamples"
)


class Swept(NamedTuple):
    """One unit's evaluation at W weights on P prompts.

    Attributes:
        weights [W, m], rewards [P, W, m] (NaN where an objective does not apply).
        kl, tokens: [P, W], summed over each completion.
        bigrams: For each of the weights, how often each prompt's completion has each bigram
            [P, G].
    """

    weights: np.ndarray
    rewards: np.ndarray
    kl: np.ndarray
    tokens: np.ndarray
    bigrams: list[np.ndarray]


def read_unit(folder: Path) -> tuple[Frontier, Swept, dict[str, float]]:
    """A finished unit: its frontier, its completions as arrays, the budget that it used."""
    front = Frontier(**read_json(folder / "frontier.json"))
    with (folder / "samples.jsonl").open("rb") as stream:
        samples = [line.parse() for line in read_lines(stream)][: -front.prompts]
    count, shape = len(front.weights), (front.prompts, len(front.weights))

    def table(key: str) -> np.ndarray:
        values = np.array([sample[key] for sample in samples], dtype=float)
        return values.reshape(count, front.prompts, *values.shape[1:]).swapaxes(0, 1)

    texts = [sample["text"] for sample in samples]
    chunks = [texts[i : i + shape[0]] for i in range(0, len(texts), shape[0])]
    swept = Swept(
        np.array(front.weights), table("rewards"), table("kl_to_base"), table("tokens"),
        [_bigrams(chunk) for chunk in chunks],
    )  # fmt: skip
    return front, swept, read_json(folder / "budget.json")


def _bigrams(texts: Sequence[str]) -> np.ndarray:
    index: dict[tuple[str, str], int] = {}
    pairs = [
        [index.setdefault(pair, len(index)) for pair in itertools.pairwise(words(text.lower()))]
        for text in texts
    ]
    found = np.zeros((len(texts), len(index)), dtype=np.float32)
    for row, own in zip(found, pairs, strict=True):
        np.add.at(row, own, 1)
    return found


def _distinct_2(bigrams: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """clp.rewards.distinct_2 of the resampled texts, for counts [B, P]: [B]."""
    counts = counts.astype(np.float32)
    total = counts @ bigrams.sum(1)
    unique = (counts @ bigrams > 0).sum(1)
    return unique / np.maximum(total, 1)  # type: ignore[no-any-return]


def figures_of(
    objectives: Sequence[str], base: dict[str, Any], first: Sequence[Swept]
) -> Callable[[Sequence[Swept], np.ndarray], dict[str, np.ndarray]]:
    """The statistic for clp.evaluation.metrics.paired_bootstrap: a method's figures over its seeds.

    docs/compare.md describes the figures. `first` is the method that the others are held against,
    seed by seed; its own figures lack those of two methods.
    """
    offset, scale = np.array(base["rewards"]), np.array(base["std"])

    def of_seed(swept: Swept, rival: Swept | None, counts: np.ndarray) -> dict[str, np.ndarray]:
        points = mean_rewards(swept.rewards, counts)
        found = {"hypervolume": np.array([_volume(p, base["reference_point"]) for p in points])}
        if (scale > 0).all():
            found["inner_product"] = inner_product(
                points, swept.weights, offset=offset, scale=scale
            )
        for i, name in enumerate(objectives):
            found[f"spearman/{name}"] = spearman(swept.weights[:, i], points[..., i])
            found[f"range/{name}"] = np.ptp(points[..., i], axis=-1)
        found["kl"] = ((counts @ swept.kl) / (counts @ swept.tokens)).max(1)
        found["distinct_2"] = np.min([_distinct_2(own, counts) for own in swept.bigrams], 0)
        if rival is not None:
            others = mean_rewards(rival.rewards, counts)
            found["dominated_by_first"] = dominated(points, others).astype(float)
            found["dominates_of_first"] = dominated(others, points).astype(float)
            found["epsilon_to_first"] = additive_epsilon(points, others)
            found["epsilon_of_first"] = additive_epsilon(others, points)
        return found

    def statistic(seeds: Sequence[Swept], counts: np.ndarray) -> dict[str, np.ndarray]:
        rivals: Sequence[Swept | None] = [None] * len(seeds) if seeds is first else first
        each = [of_seed(own, rival, counts) for own, rival in zip(seeds, rivals, strict=True)]
        return {name: np.mean([one[name] for one in each], 0) for name in each[0]}

    return statistic


def _volume(points: np.ndarray, reference: Sequence[float]) -> float:
    return hypervolume(points, reference) if np.isfinite(points).all() else float("nan")


def summarise(comparison: Comparison) -> dict[str, Any]:
    """What compare.json holds, of a comparison whose units are all finished.

    It does not depend on when and where they were made, but for the seconds of budgets.
    """
    return {
        "equal_budget": EQUAL_BUDGET,
        "intervals": INTERVALS,
        "seeds": comparison.seeds,
        "tasks": {task: _of_task(comparison, task) for task in comparison.tasks},
    }


def _of_task(comparison: Comparison, task: str) -> dict[str, Any]:
    units = {
        name: [
            read_unit(comparison.output_dir / Unit(task, name, seed).folder)
            for seed in comparison.seeds
        ]
        for name in comparison.methods
    }
    base = read_base(comparison, task)
    assert base is not None  # written with the first unit
    swept = {name: [own for _, own, _ in seeds] for name, seeds in units.items()}
    fronts = {name: [front for front, _, _ in seeds] for name, seeds in units.items()}
    one = next(iter(fronts.values()))
    first = next(iter(swept.values()))
    statistic = figures_of(one[0].objectives, base, first)
    found = paired_bootstrap(statistic, swept, one[0].prompts)
    methods: dict[str, Any] = {}
    for name, entry in comparison.methods.items():
        rewards = np.array([front.rewards for front in fronts[name]])
        used = [budget for _, _, budget in units[name]]
        methods[name] = {
            "method": entry.method,
            "budget": entry.budget,
            "settings": entry.settings,
            "options": entry.options,
            "used": {key: [budget[key] for budget in used] for key in used[0]},
            "weights": fronts[name][0].weights,
            "rewards": {"mean": rewards.mean(0).tolist(), "std": rewards.std(0).tolist()},
            "figures": {key: _numbers(own) for key, own in found[name].figures.items()},
            "difference": {key: _numbers(own) for key, own in found[name].differences.items()},
            "dominated_by": {
                other: float(
                    np.mean(
                        [
                            dominated(points, np.array(front.rewards))
                            for points, front in zip(rewards, fronts[other], strict=True)
                        ]
                    )
                )
                for other in comparison.methods
                if other != name
            },
        }
    return {
        "objectives": one[0].objectives,
        "prompts": one[0].prompts,
        "max_tokens": one[0].max_tokens,
        "reference_point": base["reference_point"],
        "base": {
            "rewards": np.mean([front.base_rewards for front in one], 0).tolist(),
            "hypervolume": float(np.mean([front.base_hypervolume for front in one])),
            "distinct_2": float(np.mean([front.base_distinct_2 for front in one])),
            "frozen": {name: base[name] for name in ("rewards", "std")},
        },
        "methods": methods,
    }


def _numbers(interval: Interval) -> list[float | None]:
    """[value, low, high]; None for NaN, which JSON does not have."""
    return [float(v) if np.isfinite(v) else None for v in interval]
