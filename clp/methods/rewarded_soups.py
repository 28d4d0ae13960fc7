"""Rewarded Soups: the parameters of single-objective experts, mixed when sampling."""

from pathlib import Path

from clp.methods.experts import check_experts, train_experts
from clp.methods.method import NOTHING, Outcome, on_grid, steps_of
from clp.methods.soup import soup_of
from clp.training.config import CLPConfig


def rewarded_soups(
    args: CLPConfig, folder: Path, *, budget: float = 1.0, check_only: bool = False
) -> Outcome:
    """Rewarded Soups (arXiv:2306.04488) with the exact sum of the experts' differences.

        theta(w) = theta_ref + sum_i w_i delta_i

    Each of the m experts has 1/m of the budget. See clp.methods.soup.
    """
    steps = steps_of(args, budget, len(args.rewards))
    check_experts(args)
    if check_only:
        return NOTHING
    folders, used = train_experts(args, folder.parent, steps)
    return Outcome(on_grid(soup_of(args, folders)), used)
