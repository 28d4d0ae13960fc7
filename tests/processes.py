"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def python(
    *argv: str, cwd: Path | None = None, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs it with these arguments; None takes a variable out of the environment."""
    given = {k: v for k, v in (os.environ | environment).items() if v is not None}
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True)
