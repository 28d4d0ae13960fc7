"""The command line: clp train | sample | eval | compare | export | info.

Each command is a module of its own, which is imported where Ctrl-C is handled already. It imports
transformers, torch and matplotlib when it runs: `clp --help` is immediate.
"""

import atexit
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from clp.engine.model_error import is_out_of_memory

COMMANDS = ("train", "sample", "eval", "compare", "export", "info")


def main() -> None:
    """Entry point. Bad input ends with one line on standard error and exit code 2."""
    # Read by OpenMP when torch is loaded: how long waiting threads spin. On two cores beside one
    # endless loop a training step of the demo takes 2.6 s by default and 2.1 s with this; on idle
    # cores 0.9 s either way.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # A process may have been started without standard streams. Files must not take their places.
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:
            setattr(sys, stream, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A completion may hold characters that the terminal's encoding does not have.
        sys.stdout.reconfigure(errors="backslashreplace")
    name, *argv = sys.argv[1:] or ["--help"]
    stopped: list[int] = []

    def stop_now(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    def stop_soon(lost: "sys.UnraisableHookArgs") -> None:
        """A KeyboardInterrupt inside a finalizer is lost: it is raised once more a little later."""
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            hook(lost)
            return
        signal.signal(signal.SIGALRM, stop_now)
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    hook, sys.unraisablehook = sys.unraisablehook, stop_soon
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, stop_now)
    try:
        try:
            _run(name, argv)
        except SystemExit:  # the options' help has been printed
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        hint = f"; {stop}" if str(stop) else ""
        _end(130, f"clp {name}: stopped{hint}\n")
    except BrokenPipeError:
        # The reader of the output has ended (`| head`): nobody reads a message.
        _end(128 + signal.SIGPIPE)
    except (ValueError, TypeError, OSError, MemoryError) as error:
        if stopped:
            raise
        said = " ".join(str(error).split()) or "not enough memory"
        _end(2, f"clp {name}: error: {said}\n")
    except RuntimeError as error:
        if stopped or not is_out_of_memory(error):
            raise
        _end(2, f"clp {name}: error: not enough memory: {' '.join(str(error).split())}\n")
    finally:
        sys.unraisablehook = hook
        if signal.getsignal(signal.SIGINT) is stop_now:
            # Ctrl-C must not interrupt the interpreter's end, which may take seconds.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
            after = signal.SIG_IGN if stopped else signal.default_int_handler
            signal.signal(signal.SIGINT, after)
        if stopped and isinstance(sys.exception(), Exception):
            # PyTorch's C++, and what imports modules, turn a KeyboardInterrupt into other errors.
            _end(130, f"clp {name}: stopped\n")


def _run(name: str, argv: Sequence[str]) -> None:
    if name in ("--help", "-h"):
        print("clp: one policy for every trade-off between objectives\n")
        for command in COMMANDS:
            print(f"  {(_imported(command).__doc__ or '').splitlines()[0]}")
        print("\nOptions of a command: clp COMMAND --help; the version: clp --version")
    elif name == "--version":
        # Of what is installed: clp_kernels.__version__ would import torch.
        from importlib.metadata import version

        print(f"clp {version('clp-steer')}")
    elif name in COMMANDS:
        _imported(name)(argv)
    else:
        _end(2, f"clp: unknown command {name!r}; one of {', '.join(COMMANDS)}\n")


def _imported(command: str) -> Callable[[Sequence[str]], None]:
    run: Callable[[Sequence[str]], None] = importlib.import_module(f"clp.cli.{command}").run
    return run


def _end(code: int, message: str = "") -> NoReturn:
    """Ends with this code, and the message on standard error.

    A stream that takes nothing more (a full disk, a closed pipe) loses what is left for it. The
    interpreter would fail once more when it flushes that, and end with another code.
    """
    for stream, text in ((sys.stdout, ""), (sys.stderr, message)):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    # Under `python -m`, CPython ends a process by SIGINT if a KeyboardInterrupt has left an exec of
    # a text, as in an import that makes dataclasses, until another one has ended well.
    exec("")
    raise SystemExit(code)
