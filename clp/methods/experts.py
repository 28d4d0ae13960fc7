"""Single-objective experts: a run for each objective that trains for that one alone."""

from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path

from clp.methods.method import Budget
from clp.methods.runs import train_run
from clp.training.config import CLPConfig


def check_experts(args: CLPConfig) -> None:
    """Raises: ValueError for "prompt", whose experts cannot be mixed, or a kl_range."""
    if args.conditioning == "prompt":
        raise ValueError("experts that are mixed need a conditioning other than 'prompt'")
    if args.kl_range is not None:
        raise ValueError(f"experts are trained with one KL strength, got kl_range={args.kl_range}")


def train_experts(args: CLPConfig, folder: Path, steps: int) -> tuple[list[Path], Budget]:
    """Trains one expert per objective for so many steps; their run folders, and the budget of all.

    Expert i maximises (1 - alpha) R_i - alpha KL, with R_i in the units of a joint run (its scale
    is measured under the same base model on the same completions), the same settings and seed. So
    LoRA experts start with equal A.

    The runs are in `folder`/experts-<conditioning>-<steps>/<objective>, for every method that asks
    for experts of so many steps.

    Raises: ValueError as check_experts and train_run.
    """
    check_experts(args)
    # A single objective has one weight, 1: nothing is drawn.
    args = replace(
        args,
        weight_draws="dirichlet",
        dirichlet=CLPConfig.dirichlet,
        corner_probability=CLPConfig.corner_probability,
    )
    group = folder / f"experts-{args.conditioning}-{steps}"
    folders, used = [], []
    for spec in args.rewards:
        folders.append(group / spec.partition("=")[0])
        used.append(train_run(replace(args, rewards=[spec]), folders[-1], steps)[1])
    return folders, reduce(add, used)
