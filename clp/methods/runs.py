"""A method's training runs: ordinary run folders, resumed after a kill."""

from dataclasses import replace
from pathlib import Path

from clp.methods.method import Budget
from clp.policies.policy import Policy
from clp.training.config import CLPConfig, load_config
from clp.training.trainer import CLPTrainer
from clp.training.weight_draws import DrawWeights


def train_run(
    args: CLPConfig,
    folder: Path,
    steps: int,
    *,
    start: Policy | None = None,
    draw_weights: DrawWeights | None = None,
) -> tuple[Policy, Budget]:
    """Trains a run of so many steps in the folder, or what is left of it; its policy and budget.

    Args:
        start, draw_weights: As CLPTrainer's `model` and `draw_weights`.

    Raises: ValueError if the folder has a run of other settings or another number of steps; as
        CLPTrainer.
    """
    if (folder / "config.yaml").is_file():
        before = load_config(folder / "config.yaml").max_steps
        # CLPTrainer would train on, with another schedule than that of a run of so many steps.
        if before != steps:
            raise ValueError(f"{folder} holds a run of {before} steps, not of {steps}")
    args = replace(args, output_dir=str(folder), max_steps=steps, resume=True)
    trainer = CLPTrainer(start, args=args, draw_weights=draw_weights)
    policy, done = trainer.train(), trainer.progress
    calls = done.completions * len(policy.objectives)
    return policy, Budget(
        done.completions, done.sampled_tokens, calls, done.gradient_steps, done.seconds
    )
