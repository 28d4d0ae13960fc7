import pytest
from decoding_alone import new_spread_policy

from clp.engine.recording import Recording


@pytest.fixture(scope="module")
def policy():
    """Of the tests of one file."""
    return new_spread_policy()


@pytest.fixture
def count_runs(monkeypatch):
    """count_runs() gives a list with an entry for each run of a recorded step from then on."""

    def begin():
        seen, call = [], Recording.__call__
        monkeypatch.setattr(Recording, "__call__", lambda *args: seen.append(1) or call(*args))
        return seen

    return begin
