"""CLP itself: one policy conditioned on the weights, trained on weights that are drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clp.methods.method import Outcome, on_grid, steps_of
from clp.methods.runs import train_run
from clp.training.config import CLPConfig


def clp(
    args: CLPConfig, folder: Path, *, budget: float = 1.0, conditioning: str | None = None
) -> Outcome:
    """CLP (arXiv:2407.15762); prompt-conditioned MORLHF with conditioning "prompt".

    Args:
        conditioning: That of CLPConfig; None: args.conditioning.
    """
    if conditioning is not None:
        chosen: Any = conditioning
        args = replace(args, conditioning=chosen)
    policy, used = train_run(args, folder / "clp", steps_of(args, budget))
    return Outcome(on_grid(policy), used)
