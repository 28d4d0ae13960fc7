"""Figures of trade-off curves, as pure functions of arrays; larger rewards are better.

A curve is points [W, m]: the mean rewards of m objectives at W weights. docs/compare.md says what
each figure tells.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import moocore
import numpy as np
from scipy import stats

# Resamples of a bootstrap: the ends of a 95 % interval then vary by about 5 % of its width.
RESAMPLES = 1000

Data = TypeVar("Data")


def hypervolume(points: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """Volume of what is dominated by some of the points and dominates the reference point [m].

        HV = volume of the union over p in points of [reference_1, p_1] x ... x [reference_m, p_m]

    0 if no point [W, m] exceeds the reference in every objective. Exact, by moocore.

    Raises: ValueError if the reference point does not have m entries.
    """
    reference = np.asarray(reference, dtype=float)
    if reference.shape != points.shape[1:]:
        raise ValueError(
            f"reference must have shape {list(points.shape[1:])}, got {list(reference.shape)}"
        )
    return float(moocore.hypervolume(points, ref=reference, maximise=True))


def pareto(points: np.ndarray) -> list[bool]:
    """For each of the points [W, m] whether no other is as large everywhere and larger somewhere.

    Equal points do not dominate each other.
    """
    return moocore.is_nondominated(points, maximise=True, keep_weakly=True).tolist()  # type: ignore[no-any-return]


def dominated(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of the points [..., W, m] are dominated by some of the others [..., V, m].

    q dominates p if q_i >= p_i for every objective i and q_i > p_i for one.
    """
    p, q = points[..., :, None, :], others[..., None, :, :]
    beats = (q >= p).all(-1) & (q > p).any(-1)
    return beats.any(-1).sum(-1)  # type: ignore[no-any-return]


def additive_epsilon(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What must be added to all points [..., W, m] so that they cover the others [..., V, m].

        eps = max_q min_p max_i (q_i - p_i),   p in points, q in others

    Not above 0 if each of the others is equal to or dominated by a point. In units of the rewards,
    which must be comparable. Source: Zitzler et al. 2003, the binary additive epsilon indicator.
    """
    p, q = points[..., :, None, :], others[..., None, :, :]
    return (q - p).max(-1).min(-2).max(-1)  # type: ignore[no-any-return]


def inner_product(
    points: np.ndarray, weights: np.ndarray, *, offset: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """Mean over the weights of w.f(w), with rewards in the units (f_i - offset_i) / scale_i.

        mean_w sum_i w_i (f_i(w) - offset_i) / scale_i

    Rewards of different ranges cannot be added, so the units have no default: `clp compare` takes
    the mean and the standard deviation of each reward under the base model. The figure is then the
    gain that the weights ask for, in the units of the training's objective. It compares curves at
    equal weights only.

    Args:
        points: [..., W, m]. weights: [W, m]. offset, scale: [m].

    Raises: ValueError unless offset and scale are m finite numbers and scale > 0.
    """
    m = points.shape[-1]
    for name, value in {"offset": offset, "scale": scale}.items():
        if np.shape(value) != (m,) or not np.isfinite(value).all():
            raise ValueError(f"{name} must be {m} finite numbers, got {np.asarray(value).tolist()}")
    if not (np.asarray(scale) > 0).all():
        raise ValueError(f"scale must be positive, got {np.asarray(scale).tolist()}")
    normalised = (points - np.asarray(offset)) / np.asarray(scale)
    return (weights * normalised).sum(-1).mean(-1)  # type: ignore[no-any-return]


def spearman(weights: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Rank correlation of an objective's weights [W] with its rewards [..., W]; ties share a rank.

    NaN if either is constant.
    """
    ranks = [stats.rankdata(values, axis=-1) for values in (weights, rewards)]
    a, b = (r - r.mean(-1, keepdims=True) for r in ranks)
    spread = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / spread  # type: ignore[no-any-return]


def mean_rewards(rewards: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Points [B, W, m] from rewards per prompt [P, W, m], prompt p counted counts[b, p] times.

    NaN rewards (an objective does not apply) are left out; NaN where nothing is left.
    """
    known = np.isfinite(rewards)
    total = np.tensordot(counts, np.where(known, rewards, 0.0), 1)
    with np.errstate(invalid="ignore"):
        return total / np.tensordot(counts, known.astype(float), 1)  # type: ignore[no-any-return]


class Interval(NamedTuple):
    """A figure and its 95 % interval; NaN if it is undefined."""

    value: float
    low: float
    high: float


class Bootstrapped(NamedTuple):
    """A method's figures by name, and by how much they exceed those of the first method."""

    figures: dict[str, Interval]
    differences: dict[str, Interval]


def paired_bootstrap(
    statistic: Callable[[Data, np.ndarray], Mapping[str, np.ndarray]],
    methods: Mapping[str, Data],
    prompts: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Bootstrapped]:
    """95 % intervals of figures, over the prompts, for methods evaluated on the same prompts.

    Each resample draws `prompts` prompts with replacement, the same ones for all methods, so that
    what a prompt adds to all of them is not in the intervals of the differences.

    With the figure t of all prompts and t_b of the resamples, the interval is that from the 2.5 to
    the 97.5 percentile of t + (t_b - mean_b t_b). The shift matters for figures that are no means:
    a resample repeats prompts, and so has fewer distinct words than the prompts themselves.

    Args:
        statistic: (data of a method, counts [B, P]) -> figure by name [B], where prompt p counts
            counts[b, p] times. A resample in which a figure is NaN is left out.
        methods: Data by name, such as rewards [P, W, m] for a statistic that begins with
            `mean_rewards`.
        prompts: P.
        seed: The intervals are a function of the data and of this.
    """
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(prompts, [1 / prompts] * prompts, size=resamples).astype(float)
    once = np.ones((1, prompts))
    found = {}
    for name, data in methods.items():
        whole, each = statistic(data, once), statistic(data, counts)
        found[name] = {figure: (float(whole[figure][0]), each[figure]) for figure in whole}
    first = next(iter(found.values()))
    return {
        name: Bootstrapped(
            {figure: _interval(*pair) for figure, pair in own.items()},
            {
                figure: _interval(value - first[figure][0], each - first[figure][1])
                for figure, (value, each) in own.items()
                if figure in first
            },
        )
        for name, own in found.items()
    }


def _interval(value: float, each: np.ndarray) -> Interval:
    each = each[np.isfinite(each)]
    if not np.isfinite(value) or len(each) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(each - each.mean(), [2.5, 97.5])
    return Interval(value, value + float(low), value + float(high))
