"""The command line, run in this process."""

import sys

import pytest
from tiny_runs import SMALL

from clp import cli


@pytest.fixture
def clp(monkeypatch, capsys):
    """clp(*argv, code=2) runs a command that must end with this code (without one it must return),
    and gives what it has written: `out` and `err`."""

    def run(*argv, code=None):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["clp", *map(str, argv)])
        ended = None
        try:
            cli.main()
        except SystemExit as stop:
            ended = stop.code
        said = capsys.readouterr()
        assert ended == code, said
        return said

    return run


@pytest.fixture
def refused(clp):
    """refused(*argv) gives what a command says that ends with code 2."""

    def run(*argv):
        said = clp(*argv, code=2).err
        assert "Traceback" not in said
        lines = [line for line in said.splitlines() if line.startswith("clp")]
        assert len(lines) == 1 or "For full helptext" in said  # tyro's page about an option
        return said

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["clp", "train", "--output-dir", str(folder), *SMALL])
        cli.main()
    return folder
