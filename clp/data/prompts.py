"""Reading prompts: JSON Lines, one object with a "prompt" (a text or a conversation) per line."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clp.data.conversation import check_conversation, is_conversation
from clp.data.json_lines import read_lines
from clp.data.paths import TINY, home_expanded

TRAIN_PROMPTS = TINY / "prompts.jsonl"
HELDOUT_PROMPTS = TINY / "heldout.jsonl"
# What reward functions are given beside the columns: a column of that name would replace it.
ARGUMENTS = (
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
)  # fmt: skip


def load_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file: objects with "prompt" (text) and any columns the rewards use.

    Raises:
        ValueError: a missing or empty file; a line that clp.data.json_lines refuses, that is not an
            object with a non-empty string "prompt", or that lacks a column of the first line; a
            column in ARGUMENTS; with file and line number.
    """
    path = home_expanded(path)
    rows: list[dict[str, Any]] = []
    try:
        with path.open("rb") as stream:
            for line in read_lines(stream, f"prompts file {path}"):
                where = f"{path}:{line.number}"
                try:
                    row = line.parse()
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
                rows.append(row)
                _check_row(row, rows[0], where)
    except OSError as error:
        raise ValueError(f"prompts file {path} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"prompts file {path} holds no prompt")
    return rows


def check_prompts(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same checks for rows given in Python; errors name the row's index."""
    # A table, by columns, iterates over their names.
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable) or hasattr(rows, "iloc"):
        raise ValueError(
            f"train_dataset must hold dictionaries, one per prompt, got {type(rows).__name__}"
        )
    rows = list(rows)
    if not rows:
        raise ValueError("train_dataset holds no prompt")
    for i, row in enumerate(rows):
        _check_row(row, rows[0], f"train_dataset[{i}]")
    return rows


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The rows' columns but "prompt", as reward functions take them."""
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"} if rows else {}


def _check_row(row: Any, first: Any, where: str) -> None:
    if not isinstance(row, dict):
        came = type(row).__name__
        raise ValueError(f'{where}: expected an object such as {{"prompt": "Once"}}, got {came}')
    if "prompt" not in row:
        names = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f'{where}: "prompt" is missing, got {names}')
    prompt = row["prompt"]
    if is_conversation(prompt):
        check_conversation(prompt, f'{where}: "prompt"')
    elif not isinstance(prompt, str) or not prompt:
        wanted = "a non-empty string or a list of messages"
        raise ValueError(f'{where}: "prompt" must be {wanted}, got {prompt!r}')
    if isinstance(prompt, str) != isinstance(first["prompt"], str):
        raise ValueError(f'{where}: "prompt" must be a text or a conversation as in the first row')
    texts: list[str] = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt or ()]
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'{where}: "prompt" holds half of a surrogate pair: {prompt!a}') from None
    if odd := [name for name in row if not isinstance(name, str)]:
        raise ValueError(f"{where}: columns must have names, got {odd[0]!r}")
    if taken := sorted(set(ARGUMENTS) & set(row)):
        raise ValueError(
            f"{where}: the column {taken[0]!r} must have another name: reward functions are given "
            f"{', '.join(ARGUMENTS)} under these names"
        )
    if set(row) != set(first):
        found = []
        if missing := sorted(set(first) - set(row)):
            found.append(f"lacks {', '.join(map(repr, missing))}")
        if more := sorted(set(row) - set(first)):
            found.append(f"has {', '.join(map(repr, more))} too")
        raise ValueError(
            f"{where}: each row must have the columns of the first; this one {' and '.join(found)}"
        )


def row_place(index: int, path: str | Path | None) -> str:
    """Where a row is: the file and the line of the index-th object in it."""
    if path is None:
        return f"train_dataset[{index}]"
    if not home_expanded(path).is_file():  # a pipe, which is read once
        return f"{path}, prompt {index + 1}"
    with home_expanded(path).open("rb") as stream:
        return f"{path}:{next(itertools.islice(read_lines(stream), index, None)).number}"
