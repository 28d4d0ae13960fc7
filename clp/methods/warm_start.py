"""CLP that starts from the soup of single-objective experts instead of the base model."""

from dataclasses import replace
from pathlib import Path

from clp.methods.experts import check_experts, train_experts
from clp.methods.method import NOTHING, Outcome, on_grid, steps_of
from clp.methods.runs import train_run
from clp.methods.soup import soup_of
from clp.training.config import CLPConfig


def warm_start(
    args: CLPConfig, folder: Path, *, budget: float = 1.0, check_only: bool = False
) -> Outcome:
    """Half of the budget trains the m experts (1/(2 m) each), the other half CLP from their soup.

    CLP's objective and reference policy stay those of the base model.
    """
    steps = steps_of(args, budget, 2)
    each = steps_of(args, budget, 2 * len(args.rewards))
    check_experts(args)
    if check_only:
        return NOTHING
    folders, used = train_experts(args, folder.parent, each)
    # The policy has its adapters already; CLPTrainer refuses settings of new ones.
    new = CLPConfig()
    args_of_start = replace(
        args, r=new.r, lora_alpha=new.lora_alpha, target_modules=new.target_modules,
        exclude_modules=new.exclude_modules,
    )  # fmt: skip
    start = soup_of(args, folders)
    policy, more = train_run(args_of_start, folder / "clp", steps, start=start)
    return Outcome(on_grid(policy), used + more)
