"""Conditions: what steers one completion, and the row of numbers that policies take of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from clp.data.kl_range import KLRange
from clp.data.weights import WeightSpec, parse_rows, parse_weights


@dataclass(frozen=True)
class Condition:
    """What steers one completion.

    Attributes:
        weights: Of the objectives; see clp.data.weights.parse_weights.
        kl: The KL strength alpha, for a policy that is trained on a range of them; None: the
            geometric mean of the range (KLRange.middle).
    """

    weights: WeightSpec
    kl: float | None = None


def draw_strengths(kl_range: KLRange, count: int, generator: torch.Generator) -> Tensor:
    """Log-uniform strengths [count] of the range, float32."""
    place = torch.rand(count, dtype=torch.float64, generator=generator)
    return (kl_range.low * (kl_range.high / kl_range.low) ** place).float()


def beta(alpha: Tensor | float) -> Any:
    """alpha / (1 - alpha), the KL coefficient if the coefficient of the rewards is 1."""
    return alpha / (1 - alpha)


def parse_condition(
    spec: WeightSpec | Condition,
    objectives: Sequence[str],
    kl_range: KLRange | None,
    *,
    simplex: bool = True,
) -> Tensor:
    """The m weights, and behind them alpha if there is a kl_range: [m] or [m + 1], float32.

    Raises: ValueError as parse_weights; a kl without a kl_range, or outside it.
    """
    given = spec if isinstance(spec, Condition) else Condition(spec)
    weights = parse_weights(given.weights, objectives, simplex=simplex)
    return _joined(weights, [given.kl], kl_range)


def parse_conditions(
    specs: WeightSpec | Condition | Sequence[WeightSpec | Condition],
    count: int,
    objectives: Sequence[str],
    kl_range: KLRange | None,
    *,
    simplex: bool = True,
) -> Tensor:
    """[count, m] or [count, m + 1], from one specification for all, or from a list of `count`.

    A tensor of that shape is one too.
    """
    if isinstance(specs, Condition):
        return parse_condition(specs, objectives, kl_range, simplex=simplex).expand(count, -1)
    given: Any = specs
    strengths: list[float | None] = [None] * count
    if isinstance(specs, list | tuple) and any(isinstance(one, Condition) for one in specs):
        each = [one if isinstance(one, Condition) else Condition(one) for one in specs]
        given, strengths = [one.weights for one in each], [one.kl for one in each]
    elif isinstance(specs, Tensor) and kl_range and specs.shape[1:] == (len(objectives) + 1,):
        given, strengths = specs[:, :-1], specs[:, -1].tolist()
    weights = parse_rows(given, count, objectives, simplex=simplex)
    return _joined(weights, strengths, kl_range)


def _joined(weights: Tensor, strengths: list[float | None], kl_range: KLRange | None) -> Tensor:
    """Weights [m] or [B, m] and their strengths (one per row)."""
    for kl in strengths:
        if kl is None:
            continue
        if kl_range is None:
            raise ValueError(
                f"kl must be left out, got {kl!r}: the policy was trained with one KL strength, "
                "and kl_range (--kl-range) trains it for a range of them"
            )
        number = isinstance(kl, Real) and not isinstance(kl, bool)
        low, high = kl_range
        # Strengths that are drawn are rounded to float32.
        if not number or not low * (1 - 1e-6) <= kl <= high * (1 + 1e-6):
            raise ValueError(
                f"kl must be in [{low:g}, {high:g}], which the policy was trained on, got {kl!r}"
            )
    if kl_range is None:
        return weights
    middle = kl_range.middle
    column = torch.tensor([middle if kl is None else float(kl) for kl in strengths])
    return torch.cat([weights, column.to(weights.dtype).reshape(*weights.shape[:-1], 1)], -1)
