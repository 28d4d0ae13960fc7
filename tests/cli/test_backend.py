"""CLP_KERNELS_BACKEND on the command line: what it names is what is wrong, not the model."""

import pytest
from processes import python

from clp.engine.sampler import Sampler
from clp.policies.policy import Policy


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    rewards = ["joy=sentiment", "brief=brevity"]
    Policy.create("tiny", ["joy", "brief"], r=1, rewards=rewards).save(folder)
    return folder


@pytest.mark.parametrize("command", ["train", "eval", "sample"])
@pytest.mark.parametrize("value", ["nonsense", "cuda"])
def test_one_line(monkeypatch, clp, tmp_path, saved, command, value):
    monkeypatch.setenv("CLP_KERNELS_BACKEND", value)
    argv = {
        "train": ["--output-dir", tmp_path / "t", "--device", "cpu"],
        "eval": [saved],
        "sample": [saved, "Hi", "--weights", "joy=1"],
    }[command]
    error = clp(command, *argv, code=2).err.splitlines()[-1]
    assert error.startswith(f"clp {command}: error: CLP_KERNELS_BACKEND")
    assert list(tmp_path.iterdir()) == []


BOTH = """
import sys
from clp import cli
for argv in (["eval", sys.argv[1]], ["sample", sys.argv[1], "Hi", "--weights", "joy=1"]):
    sys.argv[:] = ["clp", *argv]
    try:
        cli.main()
    except SystemExit as error:
        print(argv[0], error.code)
"""


def test_an_instruction_set_that_is_not_there(saved):
    """It is read once per process."""
    done = python("-c", BOTH, str(saved), CLP_KERNELS_CPU_ISA="sse9")
    assert done.stdout.splitlines()[-2:] == ["eval 2", "sample 2"], done.stderr
    for command in ("eval", "sample"):
        wanted = f"clp {command}: error: CLP_KERNELS_CPU_ISA must be one of scalar"
        assert any(line.startswith(wanted) for line in done.stderr.splitlines()), done.stderr


def test_the_model_is_not_blamed(monkeypatch, saved):
    policy = Policy.load(saved)
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"^CLP_KERNELS_BACKEND must be one of"):
        Sampler(policy)
