"""Where the conditions of a step's prompt groups come from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clp.data.condition import draw_strengths
from clp.data.kl_range import KLRange
from clp.data.weights import draw_from_dirichlet, draw_from_grid, draw_on_faces, parse_rows
from clp.training.config import CLPConfig

# (count, generator) -> weights [count, m]
DrawWeights = Callable[[int, torch.Generator], Tensor]


def condition_draws(
    args: CLPConfig, objectives: Sequence[str], function: DrawWeights | None
) -> DrawWeights:
    """(count, generator) -> conditions [count, c]: weights, then a strength if args has a range.

    Raises: as weight_draws.
    """
    draw = weight_draws(args, objectives, function)
    if args.kl_range is None:
        return draw
    strengths = KLRange.parse(args.kl_range)

    def both(count: int, generator: torch.Generator) -> Tensor:
        weights = draw(count, generator)
        return torch.cat([weights, draw_strengths(strengths, count, generator)[:, None]], 1)

    return both


def weight_draws(
    args: CLPConfig, objectives: Sequence[str], function: DrawWeights | None
) -> DrawWeights:
    """What args.weight_draws names; `function` is the user's own, which is called once here.

    Raises: ValueError for "function" without one, and, here and in a step, if it returns anything
        but weights [count, m] that are >= 0 and sum to 1. What it raises passes through.
    """
    m = len(objectives)
    if args.weight_draws == "grid":
        return lambda count, generator: draw_from_grid(count, m, generator)
    if args.weight_draws == "faces":
        return lambda count, generator: draw_on_faces(count, m, generator)
    if args.weight_draws == "dirichlet":
        numbers = args.dirichlet, args.corner_probability
        return lambda count, generator: draw_from_dirichlet(count, m, *numbers, generator)
    if function is None:
        raise ValueError(
            "weight_draws='function' needs the function: in Python, CLPTrainer(draw_weights=...)"
        )

    def checked(count: int, generator: torch.Generator) -> Tensor:
        drawn = function(count, generator)
        if not isinstance(drawn, Tensor) or tuple(drawn.shape) != (count, m):
            got = list(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
            raise ValueError(f"draw_weights must return a tensor [{count}, {m}], got {got}")
        return parse_rows(drawn, count, objectives)

    checked(2, torch.Generator().manual_seed(0))
    return checked
