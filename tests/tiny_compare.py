"""Two small methods, and comparisons of them that take a second."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_runs import randomised

from clp.data.weights import parse_rows
from clp.methods.method import NOTHING, Budget, Outcome, Part, on_grid, steps_of
from clp.training.config import CLPConfig
from clp.training.trainer import CLPTrainer

TASK: dict[str, Any] = {
    "rewards": ["joy=readability", "brief=brevity"], "max_steps": 2, "num_prompts": 2,
    "num_generations": 2, "max_completion_length": 4, "r": 2, "save_steps": 1, "warmup_steps": 1,
    "scale_rewards": "none",
}  # fmt: skip


def budget_of(args: CLPConfig, steps: int, seconds: float) -> Budget:
    completions = steps * args.num_prompts * args.num_generations
    return Budget(completions, completions * 4, completions * len(args.rewards), steps, seconds)


def trained(
    args: CLPConfig, folder: Path, *, budget: float = 1.0, check_only: bool = False
) -> Outcome:
    """One run, resumed if it is there."""
    start, steps = time.perf_counter(), steps_of(args, budget)
    if check_only:
        return NOTHING
    run = replace(args, output_dir=str(folder / "run"), max_steps=steps, resume=True)
    policy = CLPTrainer(args=run).train()
    return Outcome(on_grid(policy), budget_of(args, steps, time.perf_counter() - start))


def several(
    args: CLPConfig,
    folder: Path,
    *,
    budget: float = 1.0,
    check_only: bool = False,
    weights: Sequence[Any],
) -> Outcome:
    """A random policy for each of the weights."""
    names = [spec.partition("=")[0] for spec in args.rewards]
    rows = parse_rows(weights, len(weights), names)
    if check_only:
        return NOTHING
    parts = [
        Part(randomised(0.1, args.seed + i, names, r=2), row[None]) for i, row in enumerate(rows)
    ]
    return Outcome(parts, budget_of(args, steps_of(args, budget), 0.0))


FAKES = {"trained": trained, "several": several}


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """What the file of a comparison holds."""
    torch.set_num_threads(1)
    methods = {
        "one": {"method": "trained"},
        "twice": {"method": "trained", "budget": 2, "learning_rate": 0.01},
        "points": {"method": "several", "weights": [[1, 0], "joy=0.5,brief=0.5", [0, 1]]},
    }
    plain = {
        "output_dir": str(folder), "tasks": {"demo": TASK}, "methods": methods, "seeds": [0, 1],
        "reference_point": "base", "num_prompts": 3, "max_tokens": 12,
    }  # fmt: skip
    return {key: value for key, value in (plain | changes).items() if value is not None}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
