"""The command line with standard streams that are missing or full, and with signals."""

import os
import signal
import subprocess
import sys

import pytest

PRELUDE = """
import atexit, builtins, os, signal, sys, time
import clp.cli.info
from clp import cli

atexit.register(lambda: "twice" in sys.argv and os.kill(os.getpid(), signal.SIGINT))

def info(argv):
    "clp info"
    print("x" * 99)
    if argv[:1] == ["signal"]:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # as PyTorch's C++ does, and what imports a module
            raise getattr(builtins, argv[1])("could not determine the shape") from None
    if argv == ["finalizer"]:
        class Ending:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)
        Ending()
        time.sleep(60)
    if argv == ["fail"]:
        raise ValueError("wrong")
    with open(os.devnull) as file:
        assert file.fileno() > 2, file.fileno()
    print(sys.stdin.isatty(), "é")
    print("said", file=sys.stderr)

clp.cli.info.run = info
cli.main()
"""


IMPORTING = """
import signal, sys

class Stop:
    def find_spec(self, name, *_):
        if name == "tyro":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Stop())
from clp import cli
cli.main()
"""


def ended(redirections, *argv, script=PRELUDE):
    """What a command says on standard error, and how it ends."""
    shell = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", script]
    # Buffered, as it is by default: the output fails when it is flushed.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    # The tests may run in the background of a script, where SIGINT is ignored.
    done = subprocess.run(
        [*shell, *argv], capture_output=True, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_missing_streams_are_no_error(closed):
    """As under cron or a service manager; what is opened next does not take their numbers."""
    assert ended(closed, "info") == (0, "" if "2" in closed else "said\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("argv", [["info"], ["--help"], ["--version"], ["export", "--help"]])
def test_output_that_cannot_be_written_is_one_line(argv):
    code, error = ended(">/dev/full", *argv)
    said = error.splitlines()[-1]
    assert code == 2 and said == f"clp {argv[0]}: error: [Errno 28] No space left on device"
    assert len(error.splitlines()) == 1 + (argv == ["info"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_bad_input_keeps_its_code_without_room_to_say_it():
    assert ended(">/dev/full", "info", "fail") == (2, "clp info: error: wrong\n")
    assert ended(">/dev/full 2>/dev/full", "info", "fail") == (2, "")
    assert ended("2>/dev/full", "fly") == (2, "")


@pytest.mark.parametrize(
    "kind",
    ["TypeError", "ValueError", "RuntimeError", "ModuleNotFoundError", "RecursionError",
     "SystemError", "AttributeError", "MemoryError"],
)  # fmt: skip
def test_ctrl_c_that_becomes_another_error(kind):
    assert ended(">/dev/null", "info", "signal", kind) == (130, "clp info: stopped\n")


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["sample", "x"]])
def test_ctrl_c_while_a_command_is_imported(argv):
    assert ended(">/dev/null", *argv, script=IMPORTING) == (130, f"clp {argv[0]}: stopped\n")


def test_a_second_ctrl_c_does_not_interrupt_the_end():
    stopped = ended(">/dev/null", "info", "signal", "KeyboardInterrupt", "twice")
    assert stopped == (130, "clp info: stopped; could not determine the shape\n")


def test_ctrl_c_inside_a_finalizer_stops():
    """Python reports it as an error that is ignored, and goes on."""
    assert ended(">/dev/null", "info", "finalizer") == (130, "clp info: stopped\n")


def test_ctrl_c_after_the_end_of_a_command_changes_nothing():
    assert ended(">/dev/null", "info", "twice") == (0, "said\n")


def test_ctrl_c_stays_ignored_where_it_was():
    """As behind nohup, or "&" in a script."""
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", PRELUDE]
    done = subprocess.run([*shell, "info", "signal"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "said\n")
