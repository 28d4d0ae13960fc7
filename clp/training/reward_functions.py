"""The reward functions of a training by objective: names and order."""

import functools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from clp.rewards import RewardFunc, load_rewards


def named_functions(
    reward_funcs: RewardFunc | Mapping[str, RewardFunc] | Sequence[RewardFunc] | None,
    specs: Sequence[str],
) -> dict[str, RewardFunc]:
    """Objective -> function, of what CLPTrainer was given; None: what the specifications name.

    Raises: ValueError for anything but distinct identifiers and functions.
    """
    if reward_funcs is None:
        return load_rewards(specs)
    if callable(reward_funcs) or isinstance(reward_funcs, str):
        reward_funcs = [reward_funcs]
    if isinstance(reward_funcs, Mapping):
        pairs = list(reward_funcs.items())
    else:
        pairs = [(_name(function), function) for function in reward_funcs]
    named: dict[str, RewardFunc] = {}
    for name, function in pairs:
        if isinstance(function, PreTrainedModel):
            raise ValueError(
                f"reward_funcs: {name!r} is a model; clp.rewards.classifier makes a function of "
                "the folder of a sequence classifier"
            )
        if not callable(function):
            raise ValueError(
                f"reward_funcs must be functions, got {reprlib.repr(function)}; specifications "
                'such as "joy=sentiment" go into args.rewards'
            )
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(
                f"reward_funcs: {name!r} cannot name an objective, which takes an identifier; a "
                'mapping gives names, as in {"joy": function}'
            )
        if name in named:
            raise ValueError(
                f"reward_funcs must have distinct names, got {name!r} twice; a mapping names them"
            )
        named[name] = function
    if not named:
        raise ValueError("reward_funcs must have at least one function, got none")
    return named


def in_order(named: dict[str, RewardFunc], objectives: Sequence[str]) -> dict[str, RewardFunc]:
    """The functions in the order of a policy's objectives. Raises: ValueError if they differ."""
    if sorted(named) != sorted(objectives):
        raise ValueError(
            f"reward_funcs must be those of the policy's objectives {', '.join(objectives)}, got "
            f"{', '.join(named)}"
        )
    return {name: named[name] for name in objectives}


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))
