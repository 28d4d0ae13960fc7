"""One model per weight: the ceiling that a steerable policy is measured against."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from clp.data.weights import WeightSpec, parse_rows
from clp.methods.experts import check_experts, train_experts
from clp.methods.method import NOTHING, Outcome, Part, steps_of
from clp.methods.runs import train_run
from clp.methods.soup import soup_of
from clp.training.config import CLPConfig


def one_per_weight(
    args: CLPConfig,
    folder: Path,
    *,
    budget: float = 1.0,
    check_only: bool = False,
    weights: Sequence[WeightSpec],
) -> Outcome:
    """Trains a policy for each of the weights, with these alone, and evaluates it at these alone.

    The runs share the budget equally. Those of the corners e_i are the single-objective experts of
    so many steps; if there is a corner among the weights, the experts of all objectives are
    trained, and count.

    Args:
        weights: Distinct points of the simplex, each as clp.Sampler takes weights.
    """
    rows = _checked(weights, [spec.partition("=")[0] for spec in args.rewards])
    corners, inner = rows[rows.amax(1) == 1], rows[rows.amax(1) < 1]
    experts = rows.shape[1] if len(corners) else 0
    steps = steps_of(args, budget, experts + len(inner))
    if experts:
        check_experts(args)
    if check_only:
        return NOTHING
    parts, used = [], []
    if experts:
        folders, spent = train_experts(args, folder.parent, steps)
        parts.append(Part(soup_of(args, folders), corners))
        used.append(spent)
    fixed = replace(
        args,
        weight_draws="function",
        dirichlet=CLPConfig.dirichlet,
        corner_probability=CLPConfig.corner_probability,
    )
    for row in inner:
        place = folder / "-".join(f"{w:.9g}" for w in row.tolist())
        draw = partial(_always, row.tolist())
        policy, spent = train_run(fixed, place, steps, draw_weights=draw)
        parts.append(Part(policy, row[None]))
        used.append(spent)
    return Outcome(parts, sum(used[1:], used[0]))


def _checked(weights: Sequence[WeightSpec], objectives: list[str]) -> Tensor:
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not weights:
        raise ValueError(f"weights must be a list of weights, got {weights!r}")
    rows = parse_rows(weights, len(weights), objectives)
    rows = rows / rows.sum(1, keepdim=True)  # they may be 1e-3 off the simplex
    if len(rows.unique(dim=0)) != len(rows):
        raise ValueError(f"weights must be distinct, got {rows.tolist()}")
    return rows


def _always(row: list[float], count: int, generator: torch.Generator) -> Tensor:
    return torch.tensor([row] * count, dtype=torch.float32)
