"""Files and folders that are whole or absent, and files that one process locks."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
