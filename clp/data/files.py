"""Files that are whole or absent, and files that one process locks."""

import fcntl
import os
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
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
