"""The folder of a run: who may use it, and whether a run to resume is the same one.

config.yaml has the run's settings. run.json has what they do not say and what must not change
either: the order of the objectives, what each reward is and what it is divided by, and the content
of the prompts. .lock is locked while a training uses the folder, and says which one that is.
"""

import hashlib
import json
import os
import socket
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from clp.data.json_lines import read_json
from clp.data.paths import check_folder, classifier_source, home_expanded
from clp.policies.card import checked_reward_scale, read_card
from clp.rewards import BUILTIN, RewardFunc
from clp.training.checkpoint import checkpoints
from clp.training.config import CLPConfig, load_config, located
from clp.training.function_identity import distinctive, insides_of, name_of, plain, swapped
from clp_kernels.files import lock_file, write_whole
from clp_kernels.ops import choices

_FORMAT = 1
_FUNCTION = "function:"  # begins what a reward is that was given in Python
# What a resumed run may change: its folder, how often it saves, and what does not change a bit of
# the result.
MAY_CHANGE = {"resume", "output_dir", "save_steps", "save_total_limit", "device", "eval_prompts",
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
            given in Python, with the plain values that a functools.partial binds; None in runs
            before that was kept.
        prompts: SHA-256 of the prompts and their other columns, in order; None if unknown.
        insides: Of functions given in Python, by objective, digests of their parts; of a recorded
            run those that tell them apart.
        draw_weights: The name of the function that draws the weights, if one does.
        base: A digest of the base model's parameters; None if it is not loaded yet, or unknown.
        config: The base model's configuration, if it is known.
        tokens: A digest of what the tokenizer makes of the prompts and of its end tokens, or None.
        reward_scale: The standard deviation of each objective's rewards under the base model; None
            if it is not measured, or not yet.
        scale_tokens, scale_seconds: What it took to measure that: tokens sampled, time.
    """

    rewards: dict[str, str | None]
    prompts: str | None
    reward_scale: dict[str, float] | None = None
    insides: dict[str, dict[str, str]] = field(default_factory=dict)
    draw_weights: str | None = None
    base: str | None = None
    config: dict[str, Any] | None = None
    tokens: str | None = None
    scale_tokens: int = 0
    scale_seconds: float = 0.0

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
        draw_weights: Any = None,
    ) -> "Inputs":
        """Those of functions, the specifications they come from (None: given in Python), prompts.

        Values in the prompts' columns that JSON does not have count as they are printed, without
        addresses.
        """
        rewards: dict[str, str | None] = {}
        insides: dict[str, dict[str, str]] = {}
        if specs is None:
            for name, function in reward_funcs.items():
                found = (known for known, builtin in BUILTIN.items() if builtin is function)
                rewards[name] = next(found, None) or _FUNCTION + name_of(function)
                insides[name] = insides_of(function)
        else:
            rewards |= _rewards_of(specs)
        draw = None if draw_weights is None else name_of(draw_weights)
        return cls(rewards, _rows_digest(rows), insides=insides, draw_weights=draw)


def had_other_prompts(folder: Path, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the run in a folder, or whose checkpoint it is, was trained on others than these.

    False if that is not known.
    """
    for run in (folder, folder.resolve().parent):
        if (inputs := _read_inputs(run)) is not None:
            return inputs.prompts != _rows_digest(rows)
    return False


def _rows_digest(rows: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        columns = [[name, plain(row[name])] for name in sorted(row)]
        digest.update(json.dumps(columns).encode() + b"\n")
    return digest.hexdigest()


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
        "insides": distinctive(inputs.insides),
        "draw_weights": inputs.draw_weights,
        "reward_scale": inputs.reward_scale,
        "base": inputs.base,
        "config": inputs.config,
        "tokens": inputs.tokens,
        "scale_tokens": inputs.scale_tokens,
        "scale_seconds": inputs.scale_seconds,
        "tuning": choices.fingerprint(),
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
    skipped = MAY_CHANGE | _IN_RUN_JSON if then.prompts else MAY_CHANGE | {"rewards"}
    for name in (item.name for item in fields(CLPConfig)):
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
        if reward not in (None, now.rewards[name]):
            raise ValueError(
                f"{run} was run with {reward} as the reward of {name}; resume gives "
                f"{now.rewards[name]}"
            )
    # What a function computes may have been corrected since, or depend on a state.
    if (places := swapped(then.insides, now.insides)) is not None:
        name, other = places
        raise ValueError(
            f"{run} was run with another {then.rewards[name]} as the reward of {name}; resume "
            f"gives what was that of {other}"
        )
    if None not in (then.draw_weights, now.draw_weights) and then.draw_weights != now.draw_weights:
        raise ValueError(
            f"{run} was run with the function {then.draw_weights} as draw_weights; resume gives "
            f"{now.draw_weights}"
        )
    if then.prompts not in (None, now.prompts):
        raise ValueError(f"{run} was run with other prompts: the content differs")
    if saved.scale_rewards == "reference":
        _check_reward_scale(run, then.reward_scale, found[-1] if found else None, card)
    inputs = replace(then, prompts=now.prompts, insides=now.insides)
    # As given, because a classifier may have moved.
    given = dict(zip(now.rewards, args.rewards, strict=True))
    return (
        replace(args, rewards=[given[name] for name in then.rewards]),
        inputs,
        found[-1] if found else None,
    )


def check_base(run: Path, then: Inputs, now: Inputs) -> None:
    """Whether the base model of a resumed run is that of before, as far as that is known.

    Raises: ValueError, naming what differs.
    """
    if then.base not in (None, now.base):
        raise ValueError(f"{run} was run with another base model: its parameters have changed")
    if (config := then.config) is not None and now.config is not None:
        # A later version of transformers may have more settings, or fewer.
        for name in sorted(config.keys() & now.config.keys()):
            if config[name] != now.config[name]:
                raise ValueError(
                    f"{run} was run with another base model: {name} of its configuration was "
                    f"{config[name]!r:.200} and is {now.config[name]!r:.200}"
                )
    if then.tokens not in (None, now.tokens):
        raise ValueError(
            f"{run} was run with another tokenizer, chat template or end tokens: prompts have "
            "other ids, or completions another end"
        )


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
    rewards, insides, config = (record.get(k, {}) for k in ("rewards", "insides", "config"))
    texts = {k: record.get(k) for k in ("prompts_sha256", "draw_weights", "base", "tokens")}
    if (
        not isinstance(rewards, dict)
        or not _is_insides(insides)
        or not isinstance(config, dict | None)
        or not all(isinstance(v, str | None) for v in [*rewards.values(), *texts.values()])
        or not isinstance(texts["prompts_sha256"], str)
    ):
        raise ValueError(f"{path} must hold rewards, insides, config, {', '.join(texts)}")
    insides = {name: parts for name, parts in insides.items() if isinstance(parts, dict)}
    scale = checked_reward_scale(record.get("reward_scale"), list(rewards), path)
    spent = [record.get(name, 0) for name in ("scale_tokens", "scale_seconds")]
    if not all(type(value) in (int, float) and value >= 0 for value in spent):
        raise ValueError(f"{path}: scale_tokens and scale_seconds must be numbers, got {spent}")
    return Inputs(
        rewards, texts["prompts_sha256"], scale, insides, texts["draw_weights"], texts["base"],
        config or None, texts["tokens"], int(spent[0]), float(spent[1]),
    )  # fmt: skip


def _is_insides(value: Any) -> bool:
    """A digest of each function in older runs, of which nothing is compared."""
    if not isinstance(value, dict):
        return False
    return all(
        isinstance(parts, str)
        or (isinstance(parts, dict) and all(isinstance(text, str) for text in parts.values()))
        for parts in value.values()
    )


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
            # Not by clp's strict reader: a line that is dropped here is lost.
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return kept


def cut_lines(path: Path, step: int) -> None:
    """Drops the lines after `step`, and one that a kill has cut short."""
    if path.exists():
        write_whole(path, b"".join(lines_until(path, step)))
