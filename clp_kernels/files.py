"""Files and folders that are whole or absent, files that one process locks, and the user's cache.

In the cache folder lie JSON files of what was found on this machine: the results of the self-test,
and which paths are fastest. They are replaced by a rename, under a lock, so that several processes
may write at once. A file that is damaged or not one of ours is ignored with a warning, and made
anew with what is found next. If the folder cannot be written to, the process alone keeps it.
"""

import fcntl
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path of a temporary file, which is on disk and replaces the file when the context ends.

    Readers see the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder, which is on disk and replaces the folder when the context ends.

    A folder of that name is complete whenever the machine stops. On an error the temporary one is
    removed, and what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for each in [*temporary.rglob("*"), temporary]:
            flush(each)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file by one with this content, as `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def lock_file(handle: int) -> bool:
    """Locks an open file until it is closed, also by the end of the process, however it ends.

    Returns: False if it is locked already, by this process or another one.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def cache_folder() -> Path:
    """CLP_KERNELS_CACHE, or clp_kernels in the user's cache folder.

    Raises: FileNotFoundError if it is in a home folder that there is not.
    """
    chosen = os.environ.get("CLP_KERNELS_CACHE")
    parent = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return Path(chosen).expanduser() if chosen else parent.expanduser() / "clp_kernels"
    except RuntimeError as error:
        raise FileNotFoundError(f"{error} Set CLP_KERNELS_CACHE") from error


class CacheFile:
    """A file of the cache folder: {"format": ..., "results": {...}}.

    Args:
        name: Of the file.
        format: A number for its layout; another one makes it a foreign file.
        content: What it holds, for messages.
        check: Raises ValueError if results are not what is written.
    """

    def __init__(
        self, name: str, format: int, content: str, check: Callable[[dict[str, Any]], object]
    ) -> None:
        self.name, self.format, self.content, self.check = name, format, content, check

    def read(self) -> dict[str, Any]:
        """The results; none if there is no file, or if it is damaged or of another format."""
        try:
            path = cache_folder() / self.name
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, UnicodeDecodeError) as error:
            warn_once(f"{cache_folder() / self.name} is ignored: {error}")
            return {}
        try:
            whole = json.loads(text)
            if not isinstance(whole, dict) or repr(whole.get("format")) != repr(self.format):
                raise ValueError(f'expected an object with "format": {self.format}')
            results = whole.get("results")
            if not isinstance(results, dict):
                raise ValueError(f"expected an object, got {type(results).__name__}")
            self.check(results)
        except (ValueError, RecursionError) as error:
            warn_once(f"{path} is ignored, it holds no {self.content}: {error}")
            return {}
        return results

    def update(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Has `change` add to the results of the file, if it can be written."""
        try:
            path = cache_folder() / self.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                results = self.read()
                change(results)
                whole = {"format": self.format, "results": results}
                write_whole(path, json.dumps(whole, indent=1).encode())
        except OSError as error:
            warn_once(f"the {self.content} are kept in this process alone: {error}")


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Holds a lock of this file against other processes. Raises: OSError.

    waiting: what standard error is told if another process holds it.
    """
    with path.open("a") as file:  # with which the lock ends, as with the process
        if not lock_file(file.fileno()):
            if waiting is not None:
                print(waiting, file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warns, once per process."""
    if message not in warned:
        warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
