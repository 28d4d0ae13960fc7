"""Python in a process of its own."""

import os
import subprocess
import sys


def python(*argv: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs it with these arguments; None takes a variable out of the environment."""
    given = {k: v for k, v in (os.environ | environment).items() if v is not None}
    return subprocess.run([sys.executable, *argv], env=given, capture_output=True, text=True)
