"""Paths as they are recorded, to be found from any folder; what is a path and what a hub name."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

# The embedded model and its prompts.
TINY = Path(__file__).resolve().parents[1] / "tiny"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*|[A-Za-z0-9][\w-]*", re.ASCII)


def home_expanded(path: str | Path) -> Path:
    """The path with "~" as the home folder: no shell expands it after "=" or in a YAML file.

    Raises: ValueError for an empty text, which would be the current folder, for a NUL character, or
        for what is not UTF-8: safetensors writes into such a folder and cannot read it again.
    """
    if path == "":
        raise ValueError("a path is empty")
    if "\0" in str(path):
        raise ValueError(f"the path {str(path)!r} has a NUL character")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"the path {str(path)!r} is not UTF-8") from None
    return Path(os.path.expanduser(path))


def absolute(path: str | Path) -> str:
    """The path as it is found from any folder; an absolute one is kept, its links unresolved."""
    expanded = home_expanded(path)
    # Path.resolve raises RuntimeError for a circle of links, in Python 3.12 and before.
    return str(expanded if expanded.is_absolute() else os.path.realpath(expanded))


def check_folder(folder: Path, files: Sequence[str] = (), *, empty: bool = False) -> None:
    """Whether files can be written into a folder that is there or can be made; makes nothing.

    Raises: ValueError if they cannot, if one of `files` is a folder, or if the folder must be empty
        and is not.
    """
    if taken := next((name for name in files if (folder / name).is_dir()), None):
        raise ValueError(f"{folder} cannot be written: {taken} in it is a folder")
    if empty and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"the folder {folder} must be missing or empty")
    there = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    if not there.is_dir():
        what = "a file" if there.exists() else "a link to nothing"
        raise ValueError(f"{folder} cannot be a folder: {there} is {what}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written: no permission in {there}")


def model_location(name: str) -> str:
    """How a base model is recorded: a folder by its absolute path, else the name itself.

    Names are "tiny", which is the embedded model even if there is a folder of that name, and those
    of a hub: "gpt2", "org/model". What looks like a path is never one of a hub: it begins with
    ".", "~" or "/", it has more than one "/", it exists, or its first part is a folder here.

    Raises: ValueError for what looks like a path and is not a folder.
    """
    if name == "tiny":
        return name
    wrong = f"model {name!r} is neither a folder nor a hub name such as org/model"
    if not name:
        raise ValueError(wrong)
    path = home_expanded(name)
    if path.is_dir():
        return absolute(path)
    if path.is_file():
        raise ValueError(f"{wrong}: it is a file")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(wrong)
    first, slash, _ = name.partition("/")
    if slash and Path(first).is_dir():
        raise ValueError(f"{wrong}: the folder {first!r} is here and does not hold it")
    return name


def classifier_source(target: str) -> tuple[str, str | None]:
    """The folder and the label of `PATH[#label]`; a "#" in the name of a folder is part of it."""
    path, mark, label = target.rpartition("#")
    if not mark or home_expanded(target).is_dir():
        return target, None
    return path, label


def reward_locations(specs: Sequence[str]) -> list[str]:
    """Reward specifications with the folders of classifiers as absolute paths."""
    found = []
    for spec in specs:
        objective, mark, target = spec.partition("=classifier:")
        path, label = classifier_source(target)
        if mark and path:
            target = absolute(path) + ("" if label is None else f"#{label}")
        found.append(objective + mark + target)
    return found
