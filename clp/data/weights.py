"""Weights: points of the simplex that are drawn, listed, parsed and checked."""

import itertools
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

WeightSpec = str | Mapping[str, float] | Sequence[float] | Tensor | np.ndarray
LARGEST = torch.finfo(torch.float32).max
_ARRAYS = (Tensor, np.ndarray, np.generic)

# How often draw_on_faces gives a corner, an edge, the whole simplex; from arXiv:2604.20816.
FACES = (0.50, 0.35, 0.15)


def draw_from_dirichlet(
    count: int, m: int, concentration: float, corner_probability: float, generator: torch.Generator
) -> Tensor:
    """Weights [count, m] from Dirichlet(concentration), some of them moved to a corner.

    Each is a corner e_i (i uniform) with probability `corner_probability`. Float32, sums to 1. CLP
    leaves the distribution open (arXiv:2407.15762); Dirichlet(1) is uniform on the simplex.
    """
    inner = _dirichlet(count, m, concentration, generator)
    corner = torch.rand(count, dtype=torch.float32, generator=generator) < corner_probability
    corners = torch.eye(m, dtype=inner.dtype)[torch.randint(m, (count,), generator=generator)]
    return torch.where(corner[:, None], corners, inner).float()


def draw_on_faces(count: int, m: int, generator: torch.Generator) -> Tensor:
    """Weights [count, m], uniform on a corner, on an edge or on the whole simplex (FACES).

    The corner, or the edge's two corners, are uniform among all. With many objectives Dirichlet(1)
    seldom comes near a corner or an edge, where a user may ask for weights too. Float32, sums to 1.
    """
    inner = _dirichlet(count, m, 1.0, generator)
    shares = torch.tensor(FACES, dtype=torch.float64)
    corners = torch.multinomial(shares, count, replacement=True, generator=generator) + 1
    # Keeps 1, 2 or all of a random order of the objectives. The rest of a uniform draw, divided by
    # its sum, is uniform on the face.
    order = torch.rand(count, m, dtype=torch.float64, generator=generator).argsort(1).argsort(1)
    kept = order < torch.where(corners == 3, m, corners)[:, None]
    face = torch.where(kept, inner, 0.0)
    return (face / face.sum(1, keepdim=True)).float()


def draw_from_grid(count: int, m: int, generator: torch.Generator) -> Tensor:
    """Weights [count, m], each one of `weight_grid(m)` with equal probability."""
    grid = weight_grid(m)
    return grid[torch.randint(len(grid), (count,), generator=generator)]


def _dirichlet(count: int, m: int, concentration: float, generator: torch.Generator) -> Tensor:
    # torch has no Dirichlet draw that takes a generator, so numpy draws, seeded by ours.
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).dirichlet([concentration] * m, count))


def weight_grid(m: int) -> Tensor:
    """The evaluation grid [W, m]: 11 weights for two objectives, a Das-Dennis lattice above.

    All weights that are multiples of 1/n and sum to 1, from the last corner to the first: n = 10
    for m = 2 (W = 11), 4 for m = 3 (15), 3 for m = 4 (20), 2 above; W = 1 for m = 1.
    """
    n = {1: 1, 2: 10, 3: 4, 4: 3}.get(m, 2)
    counts = [c for c in itertools.product(range(n + 1), repeat=m) if sum(c) == n]
    return torch.tensor(counts, dtype=torch.float32) / n


def parse_weights(spec: WeightSpec, objectives: Sequence[str], *, simplex: bool = True) -> Tensor:
    """Weights [m] from "joy=0.7,brief=0.3", a mapping (missing names are 0), or m numbers.

    Args:
        spec: The weights; a string may also be "0.7,0.3". Numbers are Python's, NumPy's or tensors
            without axes, and m of them also a tensor or an array [m].
        objectives: The m names in order.
        simplex: Require entries >= 0 that sum to 1 within 1e-3, or within the rounding of their
            dtype (what a policy was trained on); otherwise any finite weights are taken.

    Raises:
        ValueError: unknown objective, wrong length, not a number, not finite in float32, off the
            simplex.
    """
    if isinstance(spec, str):
        spec = _parse_string(spec)
    if isinstance(spec, Mapping):
        for name in spec:
            if name not in objectives:
                known = ", ".join(objectives)
                raise ValueError(f"weights: unknown objective {name!r}; objectives: {known}")
        values: list[object] = [spec.get(name, 0.0) for name in objectives]
    elif isinstance(spec, (Tensor, np.ndarray)):
        spec = spec.cpu() if isinstance(spec, Tensor) else spec
        values = list(spec) if spec.ndim == 1 else [spec]
    elif isinstance(spec, Sequence) and not isinstance(spec, (bytes, bytearray)):
        values = list(spec)
    else:
        raise ValueError(f"weights must be a string, mapping or sequence, got {spec!r}")
    if len(values) != len(objectives):
        raise ValueError(
            f"weights must have {len(objectives)} entries ({', '.join(objectives)}), "
            f"got {len(values)}"
        )
    parsed: list[float] = []
    for name, given in zip(objectives, values, strict=True):
        value: Any = given.item() if isinstance(given, _ARRAYS) and given.ndim == 0 else given
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"weights: {name} must be a number, got {given!r}")
        if not abs(value) <= LARGEST:  # type: ignore[operator]  # Real has them
            raise ValueError(f"weights: {name} must be finite in float32, got {value}")
        parsed.append(float(value))
    off = max(1e-3, *map(_rounding, values))
    if simplex and (min(parsed) < 0 or abs(sum(parsed) - 1) > off):
        shown = ", ".join(f"{n}={v:g}" for n, v in zip(objectives, parsed, strict=True))
        raise ValueError(
            f"weights must be >= 0 and sum to 1, got {shown}; simplex=False (--no-simplex) allows "
            "any weights, outside what the policy was trained on"
        )
    return torch.tensor(parsed, dtype=torch.float32)


def parse_rows(
    specs: WeightSpec | Sequence[WeightSpec],
    count: int,
    objectives: Sequence[str],
    *,
    simplex: bool = True,
) -> Tensor:
    """Weights [count, m] from one specification for all, or from a list of `count` of them."""
    many = (
        isinstance(specs, Sequence)
        and not isinstance(specs, str)
        and (len(specs) == 0 or not all(_is_number(s) for s in specs))
    ) or (isinstance(specs, (Tensor, np.ndarray)) and specs.ndim == 2)
    if not many:
        return parse_weights(specs, objectives, simplex=simplex).expand(count, -1)  # type: ignore[arg-type]
    if isinstance(specs, Tensor):
        specs = specs.cpu()  # one transfer for all
    if len(specs) != count:
        raise ValueError(f"weights must be given once or for all {count} prompts, got {len(specs)}")
    parsed = [parse_weights(s, objectives, simplex=simplex) for s in specs]  # type: ignore[arg-type, union-attr]
    if not parsed:
        return torch.zeros(0, len(objectives), dtype=torch.float32)
    return torch.stack(parsed)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) or (isinstance(value, _ARRAYS) and value.ndim == 0)


def _rounding(value: object) -> float:
    """By how much a number of this dtype may differ from the one that was meant, relative to it."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.finfo(value.dtype).eps / 2
    return float(np.finfo(value.dtype).eps) / 2 if isinstance(value, np.floating) else 0.0


def _parse_string(text: str) -> dict[str, float] | list[float]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    named = [part.partition("=") for part in parts]
    if not parts or len({bool(sep) for _, sep, _ in named}) != 1:
        raise ValueError(f'weights must look like "joy=0.7,brief=0.3" or "0.7,0.3", got {text!r}')
    if not named[0][1]:
        return [_number(part, text) for part in parts]
    result: dict[str, float] = {}
    for name, _, value in named:
        if name.strip() in result:
            raise ValueError(f"weights: {name.strip()!r} is given twice in {text!r}")
        result[name.strip()] = _number(value, text)
    return result


def _number(part: str, text: str) -> float:
    try:
        return float(part)
    except ValueError:
        raise ValueError(
            f"weights: {part.strip()!r} in {text!r} is not a number; weights look like "
            '"joy=0.7,brief=0.3" or "0.7,0.3"'
        ) from None
