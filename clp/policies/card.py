"""clp.json, the card of a saved policy: base model, conditioning, objectives, rewards and their
scale, KL strengths, digests of adapters or experts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clp.data.json_lines import read_json
from clp.data.kl_range import KLRange
from clp_kernels.files import write_whole

CONDITIONINGS = ("lora", "full", "attention", "head", "prompt")


def write_card(
    directory: Path,
    base_model: str,
    conditioning: str,
    objectives: Sequence[str],
    rewards: Sequence[str],
    reward_scale: Mapping[str, float] | None,
    ends: Sequence[int],
    kl_range: KLRange | None,
    base_digests: Mapping[str, str] | None,
    digests: Mapping[str, str],
) -> None:
    """Writes clp.json.

    Args:
        base_digests: Of the base model's parameters, by dtype; None if they are not known.
        digests: Of the files of adapters or experts in the folder.
    """
    card = {
        "format": 1,
        "conditioning": conditioning,
        "base_model": base_model,
        "objectives": list(objectives),
        "rewards": list(rewards),
        "reward_scale": None if reward_scale is None else dict(reward_scale),
        "ends": list(ends),
        "kl_range": None if kl_range is None else list(kl_range),
        "base_digests": None if base_digests is None else dict(base_digests),
        "adapters": dict(digests),
    }
    write_whole(directory / "clp.json", (json.dumps(card, indent=2) + "\n").encode())


def read_card(directory: Path) -> dict[str, Any]:
    """clp.json of a folder written by Policy.save. Raises: ValueError if it is malformed."""
    path = directory / "clp.json"
    try:
        card = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        unfinished = any(directory.glob("checkpoint-*/clp.json"))
        hint = "; the training has not ended: name one of its checkpoints" if unfinished else ""
        if not directory.is_dir():
            hint = "; there is no such folder"
        raise ValueError(f"{directory} holds no policy: {path} is missing{hint}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    want = {"base_model": str, "objectives": list, "rewards": list, "adapters": dict}
    if not isinstance(card, dict) or card.get("format") != 1:
        raise ValueError(f"{path} must be an object with format 1")
    for key, kind in want.items():
        if not isinstance(card.get(key), kind):
            raise ValueError(f"{path}: {key} must be a {kind.__name__}, got {card.get(key)!r}")
    # Cards of version 0.1.0 have none.
    how = card.setdefault("conditioning", "lora")
    if how not in CONDITIONINGS:
        raise ValueError(
            f"{path}: conditioning must be one of {', '.join(CONDITIONINGS)}, got {how!r}"
        )
    ends = card.setdefault("ends", [])
    if not isinstance(ends, list) or not all(type(end) is int and end >= 0 for end in ends):
        raise ValueError(f"{path}: ends must be a list of token ids, got {ends!r:.200}")
    known = card.setdefault("base_digests", None)
    if known is not None and not isinstance(known, dict):
        raise ValueError(f"{path}: base_digests must map dtypes to digests, got {known!r:.200}")
    if (kl_range := card.setdefault("kl_range", None)) is not None:
        card["kl_range"] = KLRange.parse(kl_range, f"{path}: kl_range")
    if not all(isinstance(spec, str) for spec in card["rewards"]):
        raise ValueError(f"{path}: rewards must be a list of texts, got {card['rewards']!r}")
    names = card["objectives"]
    good = all(isinstance(n, str) and n.isidentifier() for n in names)
    if not names or not good or len(set(names)) != len(names):
        wanted = "a list of names, all different"
        raise ValueError(f"{path}: objectives must be {wanted}, got {names!r}")
    card["reward_scale"] = checked_reward_scale(card.get("reward_scale"), names, path)
    return card


def checked_reward_scale(
    value: Any, objectives: Sequence[str], path: Path
) -> dict[str, float] | None:
    """The standard deviation of each objective's rewards as read from a file; None if it has none.

    Raises: ValueError unless it maps the objectives, in their order, to positive numbers.
    """
    if value is None:
        return None
    if (
        not isinstance(value, dict)
        or list(value) != list(objectives)
        or not all(type(v) in (int, float) and 0 < v < float("inf") for v in value.values())
    ):
        raise ValueError(
            f"{path}: reward_scale must map {', '.join(objectives)} to positive numbers, got "
            f"{value!r:.200}"
        )
    return {name: float(number) for name, number in value.items()}
