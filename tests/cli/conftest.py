"""The command line, run in this process."""

import sys
from typing import NamedTuple

import pytest

from clp import cli


class Said(NamedTuple):
    """What a command has written."""

    out: str
    err: str

    @property
    def last(self):
        return self.err.splitlines()[-1]


@pytest.fixture
def clp(monkeypatch, capsys):
    """clp(*argv, code=2) runs a command that must end with this code; without one it returns."""

    def run(*argv, code=None):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["clp", *map(str, argv)])
        ended = None
        try:
            cli.main()
        except SystemExit as stop:
            ended = stop.code
        said = Said(*capsys.readouterr())
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
