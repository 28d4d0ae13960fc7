"""constraints.txt against the package index: `make check` runs this, `make test` does not.

uv resolves from metadata, which takes a second per Python and downloads no wheel, and reads no
configuration of pip, so what only one machine's pip can find does not count.
"""

import functools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.index
ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = [
    name.rpartition(" :: ")[2]
    for name in PROJECT["project"]["classifiers"]
    if name.startswith("Programming Language :: Python :: 3.")
]
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")


def pins(text: str) -> set[str]:
    """Each `name==version` of a requirements file, with the name normalised as in PEP 503."""
    lines = [line.partition("#")[0].partition(";")[0].strip() for line in text.splitlines()]
    split = [line.partition("==") for line in lines if line]
    return {f"{re.sub('[-_.]+', '-', name).lower()}=={version}" for name, _, version in split}


@functools.cache
def resolve(python: str, platform: str) -> set[str]:
    """What `pip install -e '.[dev]' -c constraints.txt` installs there, all of it wheels."""
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "dev"),
        *("--constraint", "constraints.txt", "--only-binary", ":all:", "--quiet"),
        *("--python", sys.executable, "--python-version", python, "--python-platform", platform),
    ]
    # The oldest macOS that PyTorch's wheels run on; uv takes 13 by default.
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        what = f"the package index does not resolve constraints.txt for {python} on {platform}"
        pytest.fail(f"{what}:\n{done.stderr}", pytrace=False)
    return pins(done.stdout)


def test_pythons() -> None:
    """The classifiers name the Pythons that `make dev` takes, from the oldest allowed on."""
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    minors = [int(version.removeprefix("3.")) for version in PYTHONS]
    assert PYTHONS[0] == oldest
    assert minors == list(range(minors[0], minors[-1] + 1))
    taken = f"(3, {minors[0]}) <= sys.version_info < (3, {minors[-1] + 1})"
    assert taken in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_resolves(python: str, platform: str) -> None:
    assert any(pin.startswith("torch==") for pin in resolve(python, platform))


def test_everything_is_pinned_and_nothing_else() -> None:
    installed = set().union(*(resolve(python, where) for python in PYTHONS for where in PLATFORMS))
    wanted = installed | pins("\n".join(PROJECT["build-system"]["requires"]))
    pinned = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    found = {"missing": wanted - pinned, "stale": pinned - wanted}
    assert not any(found.values()), found
