"""Methods x tasks x seeds: trains and evaluates what is missing, one folder per unit.

    OUTPUT_DIR/TASK/base.json               rewards of the base model, of the first evaluation
    OUTPUT_DIR/TASK/seed-SEED/METHOD/       unit.json, budget.json, frontier.json, samples.jsonl ...
    OUTPUT_DIR/compare.json, compare-TASK.png

unit.json says what the unit is, and is written first; frontier.json is the last file. Every file is
replaced by a rename, and every step follows from the files before it, so that a comparison that is
killed and started again ends with the same results.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from clp.data.json_lines import read_json
from clp.data.prompts import HELDOUT_PROMPTS, TRAIN_PROMPTS, load_prompts
from clp.engine.requests import SamplingParams
from clp.evaluation.compare_config import Comparison
from clp.evaluation.frontier import Frontier, evaluate_parts
from clp.evaluation.metrics import hypervolume
from clp.evaluation.report import save_evaluation
from clp.methods.registry import find_method
from clp.rewards import RewardFunc, load_rewards
from clp.training.run_folder import MAY_CHANGE, Inputs
from clp_kernels.files import lock_file, write_whole

# Sequences decoded together in an evaluation, as in clp eval.
BATCH = 128


class Unit(NamedTuple):
    """What is trained and evaluated at once."""

    task: str
    method: str
    seed: int

    @property
    def folder(self) -> Path:
        """Inside the comparison's folder."""
        return Path(self.task, f"seed-{self.seed}", self.method)


@dataclass(frozen=True)
class TaskData:
    """What the units of a task are evaluated on, and digests of what they learn from."""

    reward_funcs: dict[str, RewardFunc]
    rows: list[dict[str, Any]]
    digests: dict[str, Any]


def units(comparison: Comparison) -> list[Unit]:
    """All of them: the methods of a seed follow one another, since they may share runs."""
    return [
        Unit(task, method, seed)
        for task in comparison.tasks
        for seed in comparison.seeds
        for method in comparison.methods
    ]


def run_units(comparison: Comparison, *, progress: bool = False) -> None:
    """Trains and evaluates every unit that is not finished.

    Raises:
        ValueError: before anything is trained, what load_rewards and load_prompts refuse, a folder
            in use by another comparison, or a unit there with other settings, naming what differs.
            Afterwards, what a method or an evaluation raises.
    """
    data = {task: _load(comparison, task) for task in comparison.tasks}
    with locked(comparison.output_dir):
        for task in comparison.tasks:
            read_base(comparison, task)
        for unit in units(comparison):
            _check_record(comparison, unit, data[unit.task])
        for task in comparison.tasks:
            done = [u for u in units(comparison) if _finished(comparison.output_dir / u.folder)]
            known = read_base(comparison, task, data[task])
            if known is None and any(unit.task == task for unit in done):
                path = comparison.output_dir / task / "base.json"
                raise ValueError(
                    f"{path} is missing, which the finished units of {task!r} were measured with: "
                    "name another output_dir, or delete the folder of the task"
                )
        todo = [u for u in units(comparison) if not _finished(comparison.output_dir / u.folder)]
        total = len(comparison.tasks) * len(comparison.seeds) * len(comparison.methods)
        with tqdm(total=total, initial=total - len(todo), unit="unit", disable=not progress) as bar:
            for unit in todo:
                bar.set_description(str(unit.folder))
                _run(comparison, unit, data[unit.task], progress)
                bar.update()


def _finished(folder: Path) -> bool:
    return (folder / "frontier.json").is_file()


def _load(comparison: Comparison, task: str) -> TaskData:
    args = comparison.args(task, next(iter(comparison.methods)), comparison.seeds[0])
    functions = load_rewards(args.rewards)
    inputs = Inputs.of(functions, args.rewards, load_prompts(args.prompts or TRAIN_PROMPTS))
    rows = load_prompts(args.eval_prompts or HELDOUT_PROMPTS)[: comparison.num_prompts]
    held_out = sha256(json.dumps(rows).encode()).hexdigest()
    # The order of the rewards is that of the weights.
    rewards = list(inputs.rewards.items())
    digests = {"rewards": rewards, "prompts": inputs.prompts, "eval_prompts": held_out}
    return TaskData(functions, rows, digests)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other comparisons out of this output_dir. Raises: ValueError if one is there."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not lock_file(handle):
            raise ValueError(f"output_dir {folder} is in use by another comparison")
        yield
    finally:
        os.close(handle)


def _record(comparison: Comparison, unit: Unit, data: TaskData) -> dict[str, Any]:
    """What makes the unit's results what they are; JSON values, flat."""
    entry = comparison.methods[unit.method]
    settings = asdict(comparison.args(*unit))
    # Their content counts.
    for name in (*MAY_CHANGE, "rewards", "prompts", "seed"):
        settings.pop(name, None)
    options = {f"option {name}": value for name, value in entry.options.items()}
    record = {
        "method": entry.method, "budget": entry.budget, **options, **settings,
        **{f"content of {name}": value for name, value in data.digests.items()},
        "number of eval_prompts": len(data.rows),
        "max_tokens": comparison.max_tokens or settings["max_completion_length"],
        "reference_point": comparison.reference_points[unit.task],
    }  # fmt: skip
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


def _check_record(comparison: Comparison, unit: Unit, data: TaskData) -> None:
    """Raises: ValueError if the folder of the unit is that of another one, naming what differs."""
    folder = comparison.output_dir / unit.folder
    if not (folder / "unit.json").is_file():
        if _finished(folder):
            raise ValueError(f"{folder} has no unit.json that says what was evaluated")
        return
    then, now = read_json(folder / "unit.json"), _record(comparison, unit, data)
    if not isinstance(then, dict):
        raise ValueError(f"{folder / 'unit.json'} must hold an object")
    differences = [
        f"{name} was {then.get(name)!r:.100} and is {now.get(name)!r:.100}"
        # Digests last: they tell a reader least.
        for name in sorted(then.keys() | now.keys(), key=lambda k: (k.startswith("content of"), k))
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} belongs to a comparison with other settings: {'; '.join(differences)}. Name "
            "another output_dir, or give the method another name"
        )


def _run(comparison: Comparison, unit: Unit, data: TaskData, progress: bool) -> None:
    """Trains and evaluates one unit, or what is left of it."""
    folder = comparison.output_dir / unit.folder
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "unit.json", _record(comparison, unit, data))
    entry, args = comparison.methods[unit.method], comparison.args(*unit)
    # Methods share runs beside their folders, which must have the task's settings.
    runs = folder / "runs" if entry.settings else folder
    outcome = find_method(entry.method, entry.options)(
        args, runs, budget=entry.budget, **entry.options
    )
    _write(folder / "budget.json", asdict(outcome.budget))
    most = comparison.max_tokens or args.max_completion_length
    base = read_base(comparison, unit.task, data)
    front, samples = evaluate_parts(
        outcome.parts, data.reward_funcs, data.rows, params=SamplingParams(max_tokens=most),
        seed=unit.seed, max_batch_size=BATCH, progress=progress,
    )  # fmt: skip
    if base is None:
        base = _freeze_base(comparison, unit.task, data, front, samples)
    front = _measured_from(front, base["reference_point"])
    front = replace(
        front, run=str(folder), reward_specs=args.rewards,
        prompts_file=args.eval_prompts or str(HELDOUT_PROMPTS),
    )  # fmt: skip
    save_evaluation(front, samples, folder)


def _freeze_base(
    comparison: Comparison,
    task: str,
    data: TaskData,
    front: Frontier,
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    """Writes base.json: mean and standard deviation of the base's rewards over the prompts, and
    what they were measured on."""
    own = [sample["rewards"] for sample in samples[-front.prompts :]]
    point = comparison.reference_points[task]
    base = {
        "rewards": front.base_rewards,
        "std": np.nanstd(np.array(own, dtype=float), 0).tolist(),
        "reference_point": front.base_rewards if point == "base" else point,
        "measured_on": _measured_on(comparison, task, data),
    }
    _write(comparison.output_dir / task / "base.json", base)
    return base


def _measured_on(comparison: Comparison, task: str, data: TaskData) -> dict[str, Any]:
    args = comparison.args(task, next(iter(comparison.methods)), comparison.seeds[0])
    found = {
        "model": args.model, "dtype": args.dtype, "num_prompts": len(data.rows),
        "max_tokens": comparison.max_tokens or args.max_completion_length,
        "rewards": data.digests["rewards"], "eval_prompts": data.digests["eval_prompts"],
    }  # fmt: skip
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def read_base(
    comparison: Comparison, task: str, data: TaskData | None = None
) -> dict[str, Any] | None:
    """What base.json holds: rewards, std and reference_point, each [m]; None before it is written.

    Args:
        data: What it must have been measured on; None: that is not looked at.

    Raises: ValueError for another file of that name, another reference point, or one that was
        measured on something else.
    """
    path = comparison.output_dir / task / "base.json"
    if not path.is_file():
        return None
    base, m = read_json(path), len(comparison.tasks[task]["rewards"])
    names = ("rewards", "std", "reference_point")
    if not isinstance(base, dict) or not all(_are_numbers(base.get(name), m) for name in names):
        raise ValueError(f"{path} must be an object with {', '.join(names)}, {m} numbers each")
    now = None if data is None else _measured_on(comparison, task, data)
    if now is not None and (then := base.get("measured_on")) != now:
        before = then if isinstance(then, dict) else {}
        odd = [name for name in now if before.get(name) != now[name]]
        raise ValueError(
            f"{path} was measured with another {', '.join(odd)}: name another output_dir, or "
            "delete the folder of the task"
        )
    point = comparison.reference_points[task]
    if base["reference_point"] != (base["rewards"] if point == "base" else point):
        raise ValueError(
            f"{path} has the reference_point {base['reference_point']}; the comparison gives "
            f"{point}"
        )
    return base


def _are_numbers(values: Any, m: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == m
        and all(type(value) in (int, float) for value in values)
    )


def _measured_from(front: Frontier, point: list[float]) -> Frontier:
    return replace(
        front,
        reference_point=point,
        hypervolume=hypervolume(np.array(front.rewards), point),
        base_hypervolume=hypervolume(np.array([front.base_rewards]), point),
    )


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, f"{json.dumps(value, indent=1, allow_nan=False)}\n".encode())
