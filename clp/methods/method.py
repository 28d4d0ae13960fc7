"""What a method is: settings and a budget in, policies for evaluation and what they used out."""

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from clp.data.weights import weight_grid
from clp.policies.interface import Steerable
from clp.training.config import CLPConfig


@dataclass(frozen=True)
class Budget:
    """What a method has used in training; `+` adds field by field.

    A run that several methods share counts in full for each. What a kill has lost is not counted.

    Attributes:
        completions: Sampled, those that measure the reward scale included.
        sampled_tokens: Their tokens, without prompts.
        reward_calls: Completions scored, times objectives.
        gradient_steps: Of the optimizer.
        seconds: Wall clock of steps and of measuring the scale, on the machines they ran on.
    """

    completions: int
    sampled_tokens: int
    reward_calls: int
    gradient_steps: int
    seconds: float

    def __add__(self, other: "Budget") -> "Budget":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Budget(*(mine + theirs for mine, theirs in pairs))


class Part(NamedTuple):
    """A policy, and the weights [W, m] at which it is evaluated."""

    policy: Steerable
    weights: Tensor


class Outcome(NamedTuple):
    """What a method made: one part for a steerable policy, one per weight for `one_per_weight`."""

    parts: list[Part]
    budget: Budget


class Method(Protocol):
    """A way to get policies for every trade-off.

    Args of a call:
        args: The task's settings. args.max_steps is the steps of budget 1; output_dir is not used.
        folder: The method's own. It trains what is missing there, each run in a sub-folder: a
            finished run is loaded and a partial one resumed, so that a call after a kill goes on.
            Single-objective experts are beside it, for all methods of this folder's parent.
        budget: Multiplies the steps of all the method's runs together.
        check_only: Only check the arguments, and return NOTHING.
        options: The method's own.

    Raises: ValueError for a bad budget or option; as CLPTrainer.
    """

    def __call__(
        self,
        args: CLPConfig,
        folder: Path,
        *,
        budget: float = 1.0,
        check_only: bool = False,
        **options: Any,
    ) -> Outcome: ...


NOTHING = Outcome([], Budget(0, 0, 0, 0, 0.0))


def steps_of(args: CLPConfig, budget: float, runs: int = 1) -> int:
    """Steps of each of `runs` equal runs that share a budget: max_steps * budget / runs, rounded.

    Raises: ValueError for a budget that is not a number in (0, 1e6], or that leaves a run no step.
    """
    bad = isinstance(budget, bool) or not isinstance(budget, int | float)
    if bad or not 0 < budget <= 1e6:
        raise ValueError(f"budget must be a positive number up to 1e6, got {budget!r:.50}")
    steps = round(args.max_steps * budget / runs)
    if steps < 1:
        raise ValueError(
            f"budget must leave a step to each of {runs} runs; {budget} times max_steps="
            f"{args.max_steps} does not"
        )
    return steps


def on_grid(policy: Steerable) -> list[Part]:
    """The one part of a steerable policy: the whole evaluation grid."""
    return [Part(policy, weight_grid(len(policy.objectives)))]
