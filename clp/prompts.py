"""Reading prompts: JSON Lines, one object with a "prompt" (a text or a conversation) a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clp.conversation import check_conversation, is_conversation
from clp.policy import TINY

TRAIN_PROMPTS = TINY / "prompts.jsonl"
HELDOUT_PROMPTS = TINY / "heldout.jsonl"


def load_prompts(path: str | Path, *, same_columns: bool = True) -> list[dict[str, Any]]:
    """The rows of a JSONL file: objects with "prompt" (text) and any columns the rewards use.

    Args:
        path: The file.
        same_columns: Whether every row must have the columns of the first.

    Raises:
        ValueError: a missing or empty file; a line that is not an object with a non-empty string
            "prompt", or that lacks a column of the first line; with file and line number.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts file {path} cannot be read: {error}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        rows.append(row)
        _check_row(row, rows[0] if same_columns else row, f"{path}:{number}")
    if not rows:
        raise ValueError(f"prompts file {path} holds no prompt")
    return rows


def check_prompts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same checks for rows given in Python; errors name the row's index."""
    if not rows:
        raise ValueError("train_dataset holds no prompt")
    for i, row in enumerate(rows):
        _check_row(row, rows[0], f"train_dataset[{i}]")
    return list(rows)


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The rows' columns but "prompt", as reward functions take them."""
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"} if rows else {}


def _check_row(row: Any, first: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
    prompt = row.get("prompt")
    if is_conversation(prompt):
        check_conversation(prompt, f'{where}: "prompt"')
    elif not isinstance(prompt, str) or not prompt:
        raise ValueError(
            f'{where}: "prompt" must be a non-empty string or a list of messages, got {prompt!r}'
        )
    if isinstance(prompt, str) != isinstance(first["prompt"], str):
        raise ValueError(f'{where}: "prompt" must be a text or a conversation as in the first row')
    if set(row) != set(first):
        odd = sorted(set(row) ^ set(first))
        raise ValueError(f"{where}: columns differ from the first row's in {', '.join(odd)}")
