"""Files that are whole or absent, and files that one process locks."""

import fcntl
import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file by a rename once its content is on disk: readers see the old or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lock_file(handle: int) -> bool:
    """Locks an open file until it is closed, also by the end of the process, however it ends.

    Returns: False if it is locked already, by this process or another one.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
