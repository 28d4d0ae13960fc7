"""The folder of a run: who may use it, and whether a run to resume is the same one.

config.yaml has the run's settings. run.json has what they do not say and what must not change
either: the order of the objectives, what each reward is and what it is divided by, and the content
of the prompts. .lock is locked while a training uses the folder, and says which one that is.
"""

import hashlib
import json
import os
import re
import socket
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, ClassVar

from clp.data.files import lock_file, write_whole
from clp.data.json_lines import parse_json, read_json
from clp.data.paths import check_folder, classifier_source, home_expanded
from clp.policies.card import checked_reward_scale, read_card
from clp.rewards import BUILTIN, RewardFunc
from clp.training.checkpoint import checkpoints
from clp.training.config import CLPConfig, load_config, located

_FORMAT = 1
_FUNCTION = "function:"  # begins what a reward is that was given in Python
_OF = " of "  # stands between the name of an inner function and what it reads
# What a resumed run may change: its folder, how often it saves, and what does not change a bit of
# the result.
_MAY_CHANGE = {"resume", "output_dir", "save_steps", "save_total_limit", "device", "eval_prompts",
               "gradient_checkpointing"}  # fmt: skip
# Compared by their content.
_IN_RUN_JSON = {"rewards", "prompts"}
# What transformers reads of a model's folder.
_MODEL_FILES = {".json", ".safetensors", ".txt", ".model"}


class RunLock:
    """The lock of a run's folder; released by `release`, with the object, or with the process."""

    # Those of this process. One that it forks shares the open files and must not keep the locks.
    _all: ClassVar["weakref.WeakSet[RunLock]"] = weakref.WeakSet()

    def __init__(self, run: Path) -> None:
        self.run = run
        self._handle = -1
        self._close: weakref.finalize[..., RunLock] | None = None
        self._all.add(self)

    def acquire(self) -> None:
        """Takes the lock, unless this object has it; the folder must exist.

        Raises: ValueError if another object has it, with that one's process, host and time; if the
            file cannot be opened; or if the folder is not the one any more in which this object
            took it.
        """
        if self._close is not None and self._close.alive:
            path = self.run / ".lock"
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(self._handle)):
                raise ValueError(
                    f"output_dir {self.run} was deleted or replaced after this training took it"
                )
            return
        try:
            handle = os.open(self.run / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"output_dir {self.run} cannot be locked: {error}") from error
        if not lock_file(handle):
            holder = os.pread(handle, 1000, 0).decode("utf-8", "replace").strip()
            os.close(handle)
            raise ValueError(f"output_dir {self.run} is in use by another training ({holder})")
        self._handle, self._close = handle, weakref.finalize(self, os.close, handle)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
        os.ftruncate(handle, 0)
        os.write(handle, holder.encode())

    def release(self) -> None:
        """Gives the lock back, if this object has it."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def _let_go() -> None:
    for lock in RunLock._all:
        lock.release()


os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True)
class Inputs:
    """What a run learns from.

    Attributes:
        rewards: For each objective, in the order of the weights' columns, the built-in's name,
            "classifier:SHA-256#label" with that of the folder's files, or "function:NAME" for one
            given in Python, with what a functools.partial adds; None in runs before that was kept.
        prompts: SHA-256 of the prompts and their other columns, in order; None if unknown.
        base: A digest of the base model's parameters; None if it is not loaded yet, or unknown.
        reward_scale: The standard deviation of each objective's rewards under the base model; None
            if it is not measured, or not yet.
    """

    rewards: dict[str, str | None]
    prompts: str | None
    reward_scale: dict[str, float] | None = None
    base: str | None = None

    @property
    def functions(self) -> list[str]:
        """The objectives whose rewards were given in Python."""
        return [n for n, r in self.rewards.items() if (r or _FUNCTION).startswith(_FUNCTION)]

    @classmethod
    def of(
        cls,
        reward_funcs: Mapping[str, RewardFunc],
        specs: Sequence[str] | None,
        rows: Sequence[dict[str, Any]],
    ) -> "Inputs":
        """Those of functions, the specifications they come from (None: given in Python), prompts.

        Values in the prompts' columns that JSON does not have count as they are printed, without
        addresses.
        """
        rewards: dict[str, str | None] = {}
        if specs is None:
            for name, function in reward_funcs.items():
                found = (known for known, builtin in BUILTIN.items() if builtin is function)
                rewards[name] = next(found, None) or _FUNCTION + _described(function)
        else:
            rewards |= _rewards_of(specs)
        digest = hashlib.sha256()
        for row in rows:
            columns = [[name, _plain(row[name])] for name in sorted(row)]
            text = json.dumps(columns)
            digest.update(text.encode() + b"\n")
        return cls(rewards, digest.hexdigest())


def check_free(run: Path, *, resume: bool = False) -> None:
    """Raises: ValueError if the folder holds a run, or cannot be made or written."""
    if os.path.lexists(run) and not run.is_dir():
        raise ValueError(f"output_dir {run} is not a folder")
    marks = ["config.yaml", "metrics.jsonl", "clp.json"]
    found = [m for m in marks if (run / m).exists()] + [p.name for p in checkpoints(run)]
    if found and resume:
        own = run.resolve().parent
        hint = f"; the run is {own}" if (own / "run.json").is_file() else ""
        raise ValueError(f"output_dir {run} is not a run, it holds no config.yaml{hint}")
    if found:
        raise ValueError(
            f"output_dir {run} holds another run ({found[0]}); choose another folder, or "
            "resume=True (--resume) to continue it"
        )
    check_folder(run)


def claim(lock: RunLock, args: CLPConfig, inputs: Inputs, *, new: bool) -> None:
    """Takes the folder for a run, or writes what a resumed run has otherwise than before.

    Raises: ValueError if it is in use, or a new run finds one there; OSError if it cannot be
        written. Then it is as it was, but for the folder itself.
    """
    run = lock.run
    run.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    if new:
        check_free(run)
    record = {
        "format": _FORMAT,
        "rewards": inputs.rewards,
        "prompts_sha256": inputs.prompts,
        "reward_scale": inputs.reward_scale,
        "base": inputs.base,
    }
    settings = replace(args, resume=False).to_yaml()
    write_whole(run / "run.json", (json.dumps(record, indent=2) + "\n").encode())
    # The last file: a folder without it does not hold a run.
    write_whole(run / "config.yaml", settings.encode())


def check_resumed(run: Path, args: CLPConfig, now: Inputs) -> tuple[CLPConfig, Inputs, Path | None]:
    """The settings and the inputs of the run in a folder, if args and `now` are to continue it.

    Returns: args with the rewards in the run's order, the run's inputs, and its last checkpoint.

    Raises: ValueError if the run is another one, naming what differs.
    """
    then, found, loaded = _read_inputs(run), checkpoints(run), load_config(run / "config.yaml")
    # A base model may have moved: its parameters are compared when it has been loaded.
    moved = then is not None and then.base is not None
    saved = located(replace(loaded, model=args.model) if moved else loaded)
    card = read_card(found[-1]) if found else None
    if then is None:
        then = _older_inputs(run, saved, now, card)
    if card is not None and card["objectives"] != list(then.rewards):
        own, recorded = ", ".join(card["objectives"]), ", ".join(then.rewards)
        raise ValueError(f"{found[-1]} has the objectives {own}; {run / 'run.json'} has {recorded}")
    skipped = _MAY_CHANGE | _IN_RUN_JSON if then.prompts else _MAY_CHANGE | {"rewards"}
    for name in (field.name for field in fields(CLPConfig)):
        before, asked = getattr(saved, name), getattr(args, name)
        if name in skipped or before == asked or (name == "max_steps" and before < asked):
            continue
        grow = ", and max_steps may only grow" if name == "max_steps" else ""
        raise ValueError(
            f"{run} was run with {name}={before!r}; resume asks for {asked!r}{grow} (in Python, "
            "CLPConfig.of_run has the settings of a run)"
        )
    if then.rewards.keys() != now.rewards.keys():
        raise ValueError(
            f"{run} was run with the objectives {', '.join(then.rewards)}; resume gives "
            f"{', '.join(now.rewards)}"
        )
    for name, reward in then.rewards.items():
        given = now.rewards[name]
        # What a lambda or an inner function reads may have been mended since, or be a state.
        alike = reward is None or reward.partition(_OF)[0] == (given or "").partition(_OF)[0]
        if not alike or (given != reward and given in then.rewards.values()):
            raise ValueError(
                f"{run} was run with {reward} as the reward of {name}; resume gives {given}"
            )
    if then.prompts not in (None, now.prompts):
        raise ValueError(f"{run} was run with other prompts: the content differs")
    if saved.scale_rewards == "reference":
        _check_reward_scale(run, then.reward_scale, found[-1] if found else None, card)
    inputs = Inputs(then.rewards, now.prompts, then.reward_scale, then.base)
    return replace(args, rewards=saved.rewards), inputs, found[-1] if found else None


def _check_reward_scale(
    run: Path, scale: dict[str, float] | None, checkpoint: Path | None, card: dict[str, Any] | None
) -> None:
    """Raises: ValueError if run.json does not say what the rewards are divided by, or if the
    checkpoint says otherwise."""
    path = run / "run.json"
    if scale is None:
        raise ValueError(
            f"{path} is missing or has no reward_scale: without the standard deviations that the "
            "rewards were divided by (scale_rewards='reference') the run cannot be continued"
        )
    if card is not None and card["reward_scale"] != scale:
        other = f"{checkpoint}/clp.json has {card['reward_scale']}"
        raise ValueError(f"{path} has the reward_scale {scale}; {other}")


def _plain(value: Any) -> Any:
    """A value as JSON has it: equal for equal ones, in whatever order a mapping holds its keys."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {"keys": sorted([repr(k), _plain(v)] for k, v in value.items())}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted(json.dumps(_plain(one)) for one in value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: _plain(vars(value))}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return {type(value).__name__: re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))}


def _described(function: Any) -> str:
    """The name of a function or of an object's class, and what is bound to it.

    Lambdas, and functions that one function makes, are named alike: their closures and what their
    code names show whether they have changed places.
    """
    if isinstance(function, partial):
        bound = json.dumps(_plain([function.args, function.keywords]))
        return f"{_described(function.func)} with {bound}"
    name = str(getattr(function, "__qualname__", type(function).__qualname__))
    if isinstance(function, FunctionType) and "<" in name:
        cells = [_content(cell) for cell in function.__closure__ or ()]
        name += _OF + json.dumps([cells, sorted(_words(function.__code__))])
    return name


def _content(cell: CellType) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # a function that names itself before it is there
        return None
    # By name alone: it may name itself.
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return name if callable(value) else _plain(value)


def _words(code: CodeType) -> set[str]:
    """The names and constants in a function's code, those of functions inside it included."""
    inner = [_words(const) for const in code.co_consts if isinstance(const, CodeType)]
    plain = {repr(const) for const in code.co_consts if not isinstance(const, CodeType)}
    return plain.union(code.co_names, *inner)


def _rewards_of(specs: Sequence[str]) -> dict[str, str]:
    """Objective -> what its reward is, of specifications that load_rewards takes."""
    found = {}
    for spec in specs:
        name, _, reward = spec.partition("=")
        kind, _, target = (reward or name).partition(":")
        if kind == "classifier":
            path, label = classifier_source(target)
            kind = f"classifier:{_digest(home_expanded(path))}"
            kind += "" if label is None else f"#{label}"
        found[name] = kind
    return found


def _digest(folder: Path) -> str:
    """SHA-256 of the files of a model's folder: 0.5 to 2 s for each gigabyte."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in _MODEL_FILES):
        with path.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def _read_inputs(run: Path) -> Inputs | None:
    path = run / "run.json"
    try:
        record = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError(f"{path} must be an object with format {_FORMAT}")
    rewards, prompts, base = (record.get(k) for k in ("rewards", "prompts_sha256", "base"))
    if (
        not isinstance(rewards, dict)
        or not all(isinstance(value, str | None) for value in rewards.values())
        or not isinstance(prompts, str)
        or not isinstance(base, str | None)
    ):
        raise ValueError(f"{path} must hold rewards, prompts_sha256 and base")
    scale = checked_reward_scale(record.get("reward_scale"), list(rewards), path)
    return Inputs(rewards, prompts, scale, base)


def _older_inputs(run: Path, saved: CLPConfig, now: Inputs, card: dict[str, Any] | None) -> Inputs:
    """What is known of a run that was begun before there was a run.json."""
    if card is None:  # nothing has been learned from them
        return replace(now, prompts=None)
    warnings.warn(
        f"{run} has no run.json: whether the prompts are those of before cannot be checked",
        stacklevel=4,
    )
    specs = _rewards_of(saved.rewards) if card["rewards"] else now.rewards
    return Inputs({name: specs.get(name) for name in card["objectives"]}, None)


def lines_until(path: Path, step: int) -> list[bytes]:
    """The lines of a JSON Lines file up to `step`, without one that a kill has cut short."""
    kept: list[bytes] = []
    if not path.exists():
        return kept
    for line in path.read_bytes().split(b"\n"):
        try:
            if parse_json(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError):
            continue
    return kept


def cut_lines(path: Path, step: int) -> None:
    """Drops the lines after `step`, and one that a kill has cut short."""
    if path.exists():
        write_whole(path, b"".join(lines_until(path, step)))
