"""Calls reward functions as TRL 1.16 does, and checks what they return: the matrix [N, m].

A reward is any callable with TRL's signature, called by keyword:
    f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns)
        -> list[float | None]
It gets those of the arguments that its signature names, or all of them if it takes **kwargs.
docs/rewards.md describes them.
"""

import asyncio
import contextlib
import functools
import inspect
import itertools
import math
import numbers
import reprlib
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clp.data.conversation import Messages, is_conversation
from clp.data.json_lines import MOST_NESTING
from clp.data.prompts import ARGUMENTS, columns, row_place

RewardFunc = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]


@dataclass
class RewardLog:
    """What reward functions log while they score N completions.

    Attributes:
        reserved: Names that log_metric refuses: those of the caller's own metrics.
        extra: objective -> column -> values, one per completion. metrics: name -> values.
    """

    reserved: frozenset[str] = frozenset()
    extra: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, objective: str, column: str, values: Sequence[Any]) -> None:
        """Adds values of a column of the objective's own: in all, one per completion."""
        if not isinstance(column, str):
            raise TypeError(f"log_extra: column must be a string, got {reprlib.repr(column)}")
        no_list = isinstance(values, str | bytes) or getattr(values, "ndim", 1) == 0
        if no_list or not isinstance(values, Iterable):
            raise TypeError(
                f"log_extra: {column!r} needs a list, one value per completion, got {values!r:.80}"
            )
        logged = self.extra.setdefault(objective, {})
        logged.setdefault(column, []).extend(_json(value) for value in values)

    def log_metric(self, name: str, value: float) -> None:
        """Adds a value of a metric; the mean of its values is reported.

        Raises: ValueError if `name` is one of the trainer's own metrics.
        """
        if not isinstance(name, str):
            raise TypeError(f"log_metric: name must be a string, got {reprlib.repr(name)}")
        if name in self.reserved:
            raise ValueError(f"log_metric: {name!r} is a metric of the trainer's; choose another")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"log_metric: {name!r} must be a number, got {value!r:.80}") from None
        self.metrics.setdefault(name, []).append(number)

    def check(self, count: int) -> None:
        """Raises ValueError if a column does not have one value per completion."""
        for objective, logged in self.extra.items():
            for column, values in logged.items():
                if len(values) != count:
                    raise ValueError(
                        f"reward {objective!r}: log_extra({column!r}, values) needs one value per "
                        f"completion, got {len(values)} for {count} completions"
                    )

    def extra_of(self, row: int) -> dict[str, dict[str, Any]]:
        """objective -> column -> value of one completion."""
        return {
            objective: {column: values[row] for column, values in logged.items()}
            for objective, logged in self.extra.items()
        }

    def means(self) -> dict[str, float | None]:
        """The mean of each metric over its finite values; None if it has none."""
        return {name: _json(_mean(values)) for name, values in self.metrics.items()}


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _json(value: Any, depth: int = 0) -> Any:
    """A value as every reader of JSON takes it.

    NaN and infinities are None. Objects of unknown kind, huge integers and what is nested too
    deeply are texts, and half of a surrogate pair is escaped.
    """
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # Python refuses to write more than 4,300 digits, and to read them.
        return int(value) if value.bit_length() <= 1024 else hex(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if hasattr(value, "tolist"):  # numpy, torch, pandas
        return _json(value.tolist(), depth)
    if depth < MOST_NESTING // 2:
        if isinstance(value, Mapping):
            return {_json(str(key)): _json(one, depth + 1) for key, one in value.items()}
        if isinstance(value, list | tuple | set):
            return [_json(one, depth + 1) for one in value]
        return _json(str(value))
    return _json(reprlib.repr(value))


def score(
    reward_funcs: Mapping[str, RewardFunc],
    prompts: Sequence[str | Messages],
    completions: Sequence[str],
    extra_columns: Mapping[str, Sequence[Any]],
    *,
    completion_ids: Sequence[Sequence[int]],
    trainer_state: Any,
    log: RewardLog,
) -> torch.Tensor:
    """The reward matrix, float32 `[N, m]` on the CPU; column i is the i-th of `reward_funcs`.

    NaN stands for None: that objective does not apply to that example.

    Args:
        prompts: Texts, or conversations; completions of these are given to the functions as
            [{"role": "assistant", "content": text}].
        extra_columns: The dataset's other columns.
        completion_ids: Token ids of each completion, the end token included.
        trainer_state: What has been trained so far, a transformers TrainerState.
        log: Takes what functions log.

    Async functions run concurrently, beside the others, on one event loop in its own thread, which
    lasts as long as the process: clients that a function keeps between calls stay usable, and a
    loop that already runs in this thread (Jupyter) does no harm. The others run in this thread, in
    order. Each function gets its own copies of the lists, and of the lists and dicts in them.
    Arrays, iterators, booleans, and scalars of numpy and torch are accepted as results.

    Raises:
        ValueError: a wrong number of values, NaN or a value not finite in float32, or an example
            for which every function returned None. TypeError: another non-number. Both name the
            objective. What a function raises passes through, with a note that names the objective.
    """
    if not reward_funcs:
        raise ValueError("reward_funcs is empty: at least one objective is needed")
    count = len(completions)
    given = {"prompts": prompts, "completion_ids": completion_ids, **extra_columns}
    for name, column in given.items():
        if name in extra_columns and name in ARGUMENTS:
            raise ValueError(f"the column {name!r} has the name of an argument; rename it")
        if len(column) != count:
            came = f"{len(column)} values for {count} completions"
            raise ValueError(f"{name!r} must have one value per completion, got {came}")
    given["completions"] = [
        [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    found: dict[str, Any] = {}
    try:
        # Those that wait for something else start first.
        for name in sorted(reward_funcs, key=lambda name: not _is_async(reward_funcs[name])):
            with _noted(name, count):
                tools = {
                    "trainer_state": trainer_state,
                    "log_extra": functools.partial(log.log_extra, name),
                    "log_metric": log.log_metric,
                }
                result = _call(reward_funcs[name], given, tools)
                if inspect.isawaitable(result):
                    result = result if inspect.iscoroutine(result) else _result(result)
                    result = asyncio.run_coroutine_threadsafe(result, _event_loop())
                found[name] = result
        for name, result in found.items():
            if isinstance(result, Future):
                with _noted(name, count):
                    found[name] = result.result()
    finally:
        for result in found.values():
            if isinstance(result, Future):
                result.cancel()
    scores = [_checked(name, found[name], count) for name in reward_funcs]
    log.check(count)
    rewards = torch.tensor(scores, dtype=torch.float32).T.contiguous()
    if len(unscored := rewards.isnan().all(1).nonzero()):
        row = int(unscored[0])
        raise ValueError(
            f"every reward ({', '.join(reward_funcs)}) returned None for row {row}: prompt "
            f"{reprlib.repr(prompts[row])}, completion {reprlib.repr(completions[row])}"
        )
    return rewards


def dry_call(
    reward_funcs: Mapping[str, RewardFunc],
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    trainer_state: Any,
    reserved: frozenset[str] = frozenset(),
    num_generations: int = 1,
    path: str | Path | None = None,
) -> None:
    """Scores short completions of the first and the last row, and then of the first row of each
    other kind, num_generations each; what functions log is dropped.

    So a function that cannot be called, returns what `score` refuses, or refuses a value of its
    columns, fails before anything is sampled. Rows are of one kind if their columns hold values of
    the same types.

    Args:
        path: The file that the rows are from, for messages.

    Raises: what `score` raises; of a row of another kind its ValueError and TypeError name the row.
    """

    def call(chosen: Sequence[dict[str, Any]], answers: Sequence[str]) -> None:
        several = [row for row in chosen for _ in range(num_generations)]
        texts = [text for text in answers for _ in range(num_generations)]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        score(
            reward_funcs, [row["prompt"] for row in several], texts, columns(several),
            completion_ids=ids, trainer_state=trainer_state, log=RewardLog(reserved),
        )  # fmt: skip

    call((rows[0], rows[-1]), ("Yes.", "No, not yet."))
    seen = {_kind(rows[0]), _kind(rows[-1])}
    for i, row in enumerate(rows):
        if (kind := _kind(row)) in seen:
            continue
        seen.add(kind)
        try:
            call([row], ["Yes."])
        except (ValueError, TypeError) as error:
            same = TypeError if isinstance(error, TypeError) else ValueError
            raise same(f"{row_place(i, path)}: {error}") from error


def _kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, _types(value)) for name, value in row.items() if name != "prompt")


def _types(value: Any) -> Any:
    """The type of a value, and of what a list or mapping holds."""
    parts = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | list | tuple):
        return type(value), frozenset(map(_types, parts))
    return type(value)


def numbers_or_none(rewards: torch.Tensor) -> list[float | None]:
    """One completion's rewards as JSON has them: None if an objective does not apply."""
    return [None if math.isnan(value) else value for value in rewards.tolist()]


@contextlib.contextmanager
def _noted(objective: str, count: int) -> Iterator[None]:
    """Context that adds the objective's name to what its function raises."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"raised by reward {objective!r}, called on {count} completions")
        raise


def _call(func: RewardFunc, given: Mapping[str, Any], tools: Mapping[str, Any]) -> Any:
    # A module's __call__ takes anything; its forward names the arguments.
    called: Callable[..., Any] = func.forward if isinstance(func, nn.Module) else func
    named = _named(called, given.keys() | tools.keys())
    passed = {
        name: [_copy(value) for value in column]
        for name, column in given.items()
        if named is None or name in named
    }
    passed |= {name: tool for name, tool in tools.items() if named is None or name in named}
    return func(**passed)


def _named(called: Callable[..., Any], offered: Set[str]) -> set[str] | None:
    """The arguments that a function takes; None: all that are offered.

    A decorator's own signature counts, not that of the function which functools.wraps names: it
    may be called with other arguments. One of *args and **kwargs alone passes on what it gets, so
    what is inside counts if all that it needs is offered.
    """
    try:
        own = inspect.signature(called, follow_wrapped=False).parameters.values()
        if own and all(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in own):
            inside = inspect.signature(called).parameters.values()
            needed = {one.name for one in inside if one.default is one.empty}
            needed -= {o.name for o in inside if o.kind in (o.VAR_POSITIONAL, o.VAR_KEYWORD)}
            own = inside if needed <= offered else own
    except ValueError:  # some functions in C have none
        return None
    if any(one.kind is one.VAR_KEYWORD for one in own):
        return None
    return {one.name for one in own}


def _copy(value: Any) -> Any:
    if type(value) is list:
        # Token ids are many and immutable: they need not be copied one by one.
        plain = not value or type(value[0]) is int
        return list(value) if plain else [_copy(one) for one in value]
    return {key: _copy(one) for key, one in value.items()} if type(value) is dict else value


def _is_async(func: Any) -> bool:
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run, args=(loop,), name="async rewards", daemon=True).start()
    return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    # These two end run_forever before the thread that waits for the coroutine gets them.
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


# Lists already, or values without an order or that are no numbers.
_NOT_LISTS = (list, tuple, str, bytes, Mapping, set, frozenset)


def _checked(objective: str, values: Any, count: int) -> list[float]:
    expected = f"reward {objective!r} must return a list of {count} numbers, got"
    if isinstance(values, torch.Tensor):
        try:
            values = values.to_dense()
            values.tolist()
        except RuntimeError as error:  # on meta, nested, quantised
            raise TypeError(f"{expected} a tensor that has no list: {error}") from error
    if isinstance(values, torch.Tensor) and values.ndim > 1:
        values = list(values.flatten(1))  # each row must hold one number, as of a reward model
    elif hasattr(values, "tolist"):
        values = values.tolist()
    elif isinstance(values, Iterable) and not isinstance(values, _NOT_LISTS):
        values = list(itertools.islice(values, count + 1))
    if not isinstance(values, list | tuple):
        raise TypeError(f"{expected} {reprlib.repr(values)}")
    if len(values) != count:
        raise ValueError(f"{expected} {len(values)}")
    return [_number(objective, row, value) for row, value in enumerate(values)]


def _number(objective: str, row: int, value: Any) -> float:
    if value is None:
        return math.nan
    # numpy, torch; as in TRL, a tensor of one element in whatever shape is a number.
    one = getattr(value, "ndim", None) == 0 or (
        isinstance(value, torch.Tensor) and value.numel() == 1
    )
    try:
        plain: Any = value.item() if one else value
    except RuntimeError as error:
        raise TypeError(
            f"reward {objective!r}, row {row}: expected a finite number, got a tensor that has "
            f"none: {error}"
        ) from error
    if isinstance(plain, Decimal):
        plain = float(plain)
    came = f"reward {objective!r}, row {row}: expected a finite number, got {reprlib.repr(plain)}"
    if not isinstance(plain, numbers.Real):
        raise TypeError(f"{came}, a {type(value).__name__}")
    magnitude: Any = abs(plain)  # not float(plain): a huge integer overflows
    if not magnitude <= torch.finfo(torch.float32).max:
        raise ValueError(f"{came}, not finite in float32; None says that it does not apply")
    return float(plain)
