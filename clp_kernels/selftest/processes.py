"""Runs the self-test in processes of its own, with a time limit, and keeps what comes of it."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import IO, Any

import torch
from tqdm import tqdm

from clp_kernels import registry, trust
from clp_kernels.files import cache_folder, locked
from clp_kernels.selftest import cases
from clp_kernels.trust import Result

# Seconds without word from a process. A case compiles up to about ten Triton kernels.
LIMIT = 120.0
# The child has the caller's sys.path, so that it imports the same package.
PROGRAM = (
    "import sys; count = int(sys.argv[1]); sys.path[:] = sys.argv[2 : 2 + count]; "
    "from clp_kernels.selftest.worker import main; main(*sys.argv[2 + count :])"
)
# What says nothing about a kernel: another try may go otherwise. Classes of errors, parts of their
# messages, and signals that others send.
_PASSING_ERRORS = {"OutOfMemoryError", "MemoryError", "OSError", "ImportError"}
_PASSING_MESSAGES = ("out of memory", "busy or unavailable")
_PASSING_SIGNALS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
Job = tuple[str, str]  # op and backend
Report = Callable[[dict[str, Any]], None]


def jobs(
    device: torch.device, ops: Iterable[str] | None = None, backend: str | None = None
) -> list[Job]:
    """The ops (default: all) and the backends of each (default: all) that run on this device.

    Raises:
        ValueError: an op that does not exist.
    """
    chosen = list(cases.CASES if ops is None else ops)
    for op in chosen:
        if op not in cases.CASES:
            raise ValueError(f"op must be one of {', '.join(cases.CASES)}, got {op!r}")
    found = [(op, one) for op in chosen for one in cases.backends(op) if _runs(one, device)]
    return [job for job in found if backend in (None, job[1])]


def _runs(backend: str, device: torch.device) -> bool:
    here = backend if backend in ("cpu", "cuda") else "cuda"
    if device.type != here and not (backend == "triton" and registry.interpreting()):
        return False
    return registry.missing(backend) is None


def ensure(
    device: torch.device | str, ops: Iterable[str] | None = None, *, progress: bool = True
) -> dict[Job, Result]:
    """Tests the GPU kernels of these ops that have no result on this device yet.

    It takes about a minute, once per GPU, driver, PyTorch, Triton and version of the kernels, and
    nothing afterwards. On the CPU nothing is tested: its kernels are used unless
    `python -m clp_kernels.selftest` has found one wrong. Nor is anything with CLP_KERNELS_TRUST=all
    or =none. Of several processes one tests, and the others wait for it.

    Args:
        device: "cuda", "cuda:1", "cpu" or a torch.device.
        ops: Names of ops, in a list; default: all.
        progress: Show a bar on standard error.

    Returns: the results by (op, backend). A failed test raises nothing: "auto" passes over the
    kernels, and `python -m clp_kernels.info` has the reason.

    Raises:
        ValueError: an op that does not exist, or CLP_KERNELS_TRUST is none of its values.
    """
    device = torch.device(device)
    if device.type != "cuda" or trust.trust() != "selftest":
        return {}
    wanted = jobs(device, ops)
    if not all(trust.find(*job, device) for job in wanted):
        with ExitStack() as stack:
            waiting = "another process tests the kernels; waiting for its results"
            try:
                folder = cache_folder()
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / "testing.lock", waiting))
            except OSError:  # `keep` warns of a folder that cannot be written to
                pass
            left = [job for job in wanted if not trust.find(*job, device)]
            for (op, backend), result in test(left, device, progress=progress).items():
                if result.reason is not None:
                    warnings.warn(
                        f"the {backend} kernels of {op} failed their self-test on {device}, and "
                        f"plain PyTorch runs in their place: {result.reason}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        trust.forget()  # what another process has tested
    return {job: found for job in wanted if (found := trust.find(*job, device))}


def test(
    wanted: Sequence[Job],
    device: torch.device,
    *,
    progress: bool = True,
    limit: float = LIMIT,
    program: str = PROGRAM,
) -> dict[Job, Result]:
    """Tests ops and backends on a device, and keeps the results.

    On a GPU several processes run at once, because compiling takes longer than testing.

    Args:
        limit: Seconds that a case may take.
        program: What the processes run, with sys.path, the device and the jobs as arguments.
    """
    if not wanted:
        return {}
    total = sum(len(cases.cases(op, device)) for op, _ in wanted)
    many = max(1, min(len(wanted), (os.cpu_count() or 1) // 2)) if device.type == "cuda" else 1
    found: dict[Job, Result] = {}
    lock, started = threading.Lock(), _Started()
    bar = tqdm(
        total=total, desc=f"testing the kernels on {device}", unit="case", disable=not progress
    )

    def report(line: dict[str, Any]) -> None:
        with lock:
            bar.update()
            bar.set_postfix_str(f"{line['op']} {line['backend']}", refresh=False)

    def run(group: list[Job]) -> None:
        while group:
            ends = _in_a_process(group, device, limit, program, report, started)
            if started.ended:  # and not by itself
                return
            for job, (result, lasting) in ends.items():
                trust.keep(*job, device, result, on_disk=lasting)
            with lock:
                found.update({job: result for job, (result, _) in ends.items()})
            group = [job for job in group if job not in ends]

    with bar, ThreadPoolExecutor(many) as pool:
        try:
            list(pool.map(run, (list(wanted[i::many]) for i in range(many))))
        except BaseException:  # Ctrl-C: the threads end when their processes do
            started.end_all()
            raise
    return {job: found[job] for job in wanted}


class _Started:
    """The processes that run. After `end_all` none is started."""

    def __init__(self) -> None:
        self._lock, self._running, self.ended = threading.Lock(), list[Any](), False

    def start(self, *arguments: Any, **options: Any) -> "subprocess.Popen[str]":
        with self._lock:
            if self.ended:
                raise _StoppedError
            process = subprocess.Popen(*arguments, **options)
            self._running.append(process)
            return process

    def end(self, process: "subprocess.Popen[str]") -> int:
        """Kills what is left of the process and of those that it has started; its status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with self._lock:
            self._running.remove(process)
        return process.wait()

    def end_all(self) -> None:
        with self._lock:
            self.ended = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


class _StoppedError(RuntimeError):
    """The test was interrupted."""


def _in_a_process(
    group: list[Job], device: torch.device, limit: float, program: str, report: Report,
    started: _Started,
) -> dict[Job, tuple[Result, bool]]:  # fmt: skip
    """The results of as many jobs of the group as one process gets to, at least of one; and whether
    they say something about the kernels."""
    found: dict[Job, tuple[Result, bool]] = {}
    begin, case, index, error = time.monotonic(), None, 0, dict[str, Any]()
    paths = [str(path) for path in sys.path]
    arguments = [str(len(paths)), *paths, str(device), json.dumps(group)]
    # Whatever the results and the environment say, it runs the kernels.
    environment = {**os.environ, "CLP_KERNELS_TRUST": "all", "CLP_KERNELS_BACKEND": ""}
    # Threads that spin while they wait made it 27 s instead of 10 beside another busy process.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = started.start(
            [sys.executable, "-P", "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches the caller, and a kill the whole group
        )
        status: int | None = None
        hangs = False
        try:
            lines = _lines(process.stdout)
            while len(found) < len(group):
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    hangs = True
                    break
                if line is None or "error" in line:
                    error = line or error
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        status = process.wait(10)
                    break
                if "case" in line:
                    case, index = line["case"], line["index"]
                    report(line)
                elif "cases" in line:
                    job = line["op"], line["backend"]
                    found[job] = Result(None, line["cases"], line["seconds"]), True
                    begin, case, index = time.monotonic(), None, 0
        finally:
            ended = started.end(process)
        if len(found) < len(group):
            job = next(job for job in group if job not in found)
            errors.seek(0)
            reason, lasting = _reason(
                f"did not end within {limit:g} s" if hangs else "",
                ended if status is None else status, error, errors.read(),
            )  # fmt: skip
            at = "its start" if case is None else case
            result = Result(f"{at}: {reason}", index, time.monotonic() - begin)
            found[job] = result, lasting and case is not None
    return found


def _lines(stream: IO[str] | None) -> "queue.Queue[dict[str, Any] | None]":
    """The lines of a worker as they come, then None; so that waiting for one can have a limit."""
    found: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in stream or ():
            try:
                value = json.loads(line)
            except ValueError:  # not the worker's
                continue
            if isinstance(value, dict):
                found.put(value)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def _reason(hang: str, status: int, error: dict[str, Any], said: str) -> tuple[str, bool]:
    """Why a process has ended, and whether that says something about the kernel."""
    if hang:
        return hang, True
    if error:
        text, kinds = _printable(error["error"]), set(error["kinds"])
        passing = kinds & _PASSING_ERRORS or any(one in text for one in _PASSING_MESSAGES)
        return text, not passing
    lines = [line for line in said.splitlines() if line.strip()]
    last = f": {_printable(lines[-1])}" if lines else ""
    if status < 0:
        known = -status in set(signal.Signals)
        name = signal.Signals(-status).name if known else f"signal {-status}"
        return f"ended by {name}{last}", -status not in _PASSING_SIGNALS
    return f"ended with status {status}{last}", True


def _printable(text: str) -> str:
    words = " ".join(text.split())[:500]
    return "".join(c if c.isprintable() else "?" for c in words)
