"""What `clp compare` reads: tasks, methods and seeds, checked before anything is trained."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from clp.data.names import closest
from clp.data.paths import check_folder, home_expanded
from clp.evaluation.frontier import check_reference_point
from clp.methods.registry import find_method
from clp.training.config import CLPConfig, config_from, located, read_yaml

_SETTINGS = {item.name for item in fields(CLPConfig)}
# What the comparison itself sets.
_OWN = {"output_dir", "resume", "seed"}
# What makes a task and its unit of budget: equal for all methods.
_OF_TASK = {"model", "rewards", "prompts", "eval_prompts", "max_prompt_length", "max_steps",
            "num_prompts", "num_generations", "max_completion_length", "dtype"}  # fmt: skip
# Names are those of folders. Runs that several methods share are in experts-...
_NAME = re.compile(r"(?!experts-|compare)[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """A line of the comparison: a method with its budget.

    Attributes:
        method: Its name in clp.methods.registry.
        budget: Multiplies the completions that it samples in training.
        settings: Settings of CLPConfig that differ from the task's.
        options: The method's own.
    """

    method: str
    budget: float
    settings: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Methods x tasks x seeds.

    Attributes:
        tasks: Settings of CLPConfig by the task's name.
        methods: By the name under which the result is shown; differences are to the first.
        reference_points: Of each task's hypervolume; "base": the rewards of its base model.
        num_prompts: Held-out prompts, at most. max_tokens: Per completion in the evaluation; None:
            max_completion_length of the task.
    """

    output_dir: Path
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, Entry]
    seeds: list[int]
    reference_points: dict[str, list[float] | Literal["base"]]
    num_prompts: int = 128
    max_tokens: int | None = None

    def args(self, task: str, method: str, seed: int) -> CLPConfig:
        """The settings of a task with those of a method; output_dir is not that of a run.

        Raises: ValueError as CLPConfig and `located`, naming task and method.
        """
        values = self.tasks[task] | self.methods[method].settings | {"seed": seed}
        try:
            return located(config_from(values))
        except ValueError as error:
            raise ValueError(f"task {task!r}, method {method!r}: {error}") from error


def load_comparison(path: str | Path) -> Comparison:
    """Reads the YAML file of a comparison; docs/compare.md describes its keys.

    Raises:
        ValueError: the file is missing or not YAML; an unknown key, setting, option or method (with
            the closest match); no tasks, methods or seeds, or seeds twice; a task without rewards;
            a setting of the task in a method; a budget that is not positive; weights of a method
            that are off the simplex; reference points of the wrong size, or of several kinds.
    """
    values = read_yaml(path)
    known = {*Comparison.__dataclass_fields__, "reference_point"} - {"reference_points"}
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{closest(str(key), known)}")
    if not isinstance(values.get("output_dir"), str):
        raise ValueError(f"output_dir must be a folder, got {values.get('output_dir')!r}")
    tasks = {name: _task(name, own) for name, own in _named(values, "tasks").items()}
    objectives = {
        name: [spec.partition("=")[0] for spec in own["rewards"]] for name, own in tasks.items()
    }
    found = Comparison(
        output_dir=home_expanded(values["output_dir"]),
        tasks=tasks,
        methods={name: _entry(name, own) for name, own in _named(values, "methods").items()},
        seeds=_seeds(values.get("seeds")),
        reference_points=_reference_points(values.get("reference_point"), objectives),
        num_prompts=_count("num_prompts", values.get("num_prompts", 128)),
        max_tokens=None
        if values.get("max_tokens") is None
        else _count("max_tokens", values["max_tokens"]),
    )
    for method, entry in found.methods.items():
        for task in objectives:
            args = found.args(task, method, found.seeds[0])
            try:
                find_method(entry.method, entry.options)(
                    args, found.output_dir, budget=entry.budget, check_only=True, **entry.options
                )
            except ValueError as error:
                raise ValueError(f"task {task!r}, method {method!r}: {error}") from error
    check_folder(found.output_dir, ["compare.json"])
    return found


def _named(values: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """The sections under a key, each a mapping, with names that folders can have."""
    sections = values.get(key)
    if not isinstance(sections, dict) or not sections:
        raise ValueError(f"{key} must map names to at least one section, got {sections!r}")
    for name, own in sections.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{key}: {name!r:.120} must be at most 100 letters, digits and . _ + -, with a "
                "letter or digit first, and not begin with 'experts-' or 'compare'"
            )
        if not isinstance(own, dict):
            raise ValueError(f"{key}: {name!r} must hold a mapping, got {own!r}")
    if twice := len(sections) - len({name.lower() for name in sections}):
        raise ValueError(f"{key}: {twice} names differ from others in upper and lower case alone")
    return sections


def _task(name: str, own: dict[str, Any]) -> dict[str, Any]:
    where = f"task {name!r}"
    if "reference_point" in own:
        raise ValueError(f"{where}: reference_point stands at the top of the file, for all tasks")
    for key in own:
        if key in _OWN:
            raise ValueError(f"{where}: {key} is set by the comparison and must be left out")
        if key not in _SETTINGS:
            raise ValueError(f"{where}: unknown key {key!r}{closest(str(key), _SETTINGS)}")
    if "rewards" not in own:
        raise ValueError(f"{where}: rewards is missing: a list such as [joy=sentiment, brevity]")
    _check_draws(where, own)
    try:
        config_from(own)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return own


def _entry(name: str, own: dict[str, Any]) -> Entry:
    where = f"method {name!r}"
    if not isinstance(own.get("method"), str):
        raise ValueError(f"{where}: method must be the name of one, got {own.get('method')!r}")
    if "reference_point" in own:
        raise ValueError(
            f"{where}: all methods of a task are compared under one reference_point, which stands "
            "at the top of the file"
        )
    _check_draws(where, own)
    settings, options = {}, {}
    for key, value in own.items():
        if key in _OWN:
            raise ValueError(f"{where}: {key} is set by the comparison and must be left out")
        if key in _OF_TASK:
            raise ValueError(f"{where}: {key} belongs to the task, equal for all methods")
        if key in _SETTINGS:
            settings[key] = value
        elif key not in ("method", "budget"):
            options[key] = value
    try:
        find_method(own["method"], map(str, options))
    except ValueError as error:
        hints = (closest(str(key), {*_SETTINGS, "method", "budget"}) for key in options)
        hint = "" if "did you mean" in str(error) else next(filter(None, hints), "")
        raise ValueError(f"{where}: {error}{hint}") from error
    return Entry(own["method"], own.get("budget", 1), settings, options)


def _check_draws(where: str, own: Mapping[str, Any]) -> None:
    if own.get("weight_draws") == "function":
        raise ValueError(f"{where}: weight_draws must be one that needs no function of Python's")


def _seeds(seeds: Any) -> list[int]:
    if not isinstance(seeds, list) or not seeds or any(type(s) is not int or s < 0 for s in seeds):
        raise ValueError(f"seeds must be a non-empty list of integers from 0 on, got {seeds!r}")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must differ, got {seeds}")
    return seeds


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer from 1 on, got {value!r}")
    return value


def _reference_points(
    given: Any, objectives: Mapping[str, list[str]]
) -> dict[str, list[float] | Literal["base"]]:
    """One point for all tasks, or a mapping from each task to its point."""
    if isinstance(given, dict):
        for name in given:
            if name not in objectives:
                raise ValueError(
                    f"reference_point: unknown task {name!r}{closest(str(name), objectives)}"
                )
        if missing := [name for name in objectives if name not in given]:
            raise ValueError(f"reference_point: no point for the task {missing[0]!r}")
        if len({point == "base" for point in given.values()}) > 1:
            raise ValueError(
                "reference_point: either every task has 'base' or every task has numbers, got "
                f"{given}"
            )
    points: dict[str, list[float] | Literal["base"]] = {}
    for name, own in objectives.items():
        point = given[name] if isinstance(given, dict) else given
        if point == "base":
            points[name] = "base"
            continue
        numbers = (int, float)
        if point is not None and (
            not isinstance(point, list)
            or any(isinstance(v, bool) or not isinstance(v, numbers) for v in point)
        ):
            raise ValueError(f"reference_point must be numbers or 'base', got {point!r}")
        try:
            points[name] = check_reference_point(point, len(own))
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from error
        for other, others in objectives.items():
            if others == own and points.get(other, points[name]) != points[name]:
                raise ValueError(
                    f"reference_point: the tasks {other!r} and {name!r} have the objectives "
                    f"{', '.join(own)} and must have one point, got {points[other]} and "
                    f"{points[name]}"
                )
    return points
