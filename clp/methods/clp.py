"""CLP itself: one policy conditioned on the weights, trained on weights that are drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clp.methods.method import NOTHING, Outcome, on_grid, steps_of
from clp.methods.runs import train_run
from clp.training.config import CLPConfig


def clp(
    args: CLPConfig,
    folder: Path,
    *,
    budget: float = 1.0,
    check_only: bool = False,
    conditioning: str | None = None,
) -> Outcome:
    """CLP (arXiv:2407.15762); prompt-conditioned MORLHF with conditioning "prompt".

    Args:
        conditioning: That of CLPConfig; None: args.conditioning.
    """
    if conditioning is not None:
        chosen: Any = conditioning
        args = replace(args, conditioning=chosen)
    steps = steps_of(args, budget)
    if check_only:
        return NOTHING
    policy, used = train_run(args, folder / "clp", steps)
    return Outcome(on_grid(policy), used)
