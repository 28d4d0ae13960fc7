"""Runs the self-test in processes of its own, with a time limit, and keeps what comes of it."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import IO, Any

import torch
from tqdm import tqdm

from clp_kernels import registry, trust
from clp_kernels.selftest import cases
from clp_kernels.trust import Result

# Seconds without word from a process. A case compiles up to about ten Triton kernels.
LIMIT = 120.0
# The child has the caller's sys.path, so that it imports the same package.
PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from clp_kernels.selftest.worker import main; main(*sys.argv[2:])"
)
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
        ops: Names of ops; default: all.
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
                trust.folder().mkdir(parents=True, exist_ok=True)
                stack.enter_context(trust.locked(trust.folder() / "testing.lock", waiting))
            except OSError:  # `keep` warns of a folder that cannot be written to
                pass
            left = [job for job in wanted if not trust.find(*job, device)]
            test(left, device, progress=progress)
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
    found: dict[Job, Result] = {}
    many = min(len(wanted), (os.cpu_count() or 1) // 2) if device.type == "cuda" else 1
    groups = [list(wanted[i :: max(many, 1)]) for i in range(max(many, 1))]
    lock = threading.Lock()
    with tqdm(
        total=total, desc=f"testing the kernels on {device}", unit="case", disable=not progress
    ) as bar:

        def report(line: dict[str, Any]) -> None:
            with lock:
                bar.update()
                bar.set_postfix_str(f"{line['op']} {line['backend']}", refresh=False)

        def run(group: list[Job]) -> None:
            while group:
                done = _in_a_process(group, device, limit, program, report)
                for job, result in done.items():
                    trust.keep(*job, device, result)
                with lock:
                    found.update(done)
                group = [job for job in group if job not in done]

        with ThreadPoolExecutor(len(groups)) as pool:
            list(pool.map(run, groups))
    return {job: found[job] for job in wanted}


def _in_a_process(
    group: list[Job], device: torch.device, limit: float, program: str, report: Report
) -> dict[Job, Result]:
    """The results of as many jobs of the group as one process gets to; at least of one."""
    found: dict[Job, Result] = {}
    begin, case, last = time.monotonic(), "its start", {"index": 0}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        arguments = [json.dumps(sys.path), str(device), json.dumps(group)]
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the caller, and a kill the whole group
        )
        try:
            lines = _lines(process.stdout)
            stopped = False
            while True:
                try:
                    text = lines.get(timeout=limit)
                except queue.Empty:
                    stopped = True
                    break
                if text is None:
                    process.wait(limit)
                    break
                line = json.loads(text)
                if "case" in line:
                    case, last = line["case"], line
                    report(line)
                else:
                    job = line["op"], line["backend"]
                    found[job] = Result(None, line["cases"], line["seconds"])
                    begin, case, last = time.monotonic(), "its end", {"index": 0}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        left = [job for job in group if job not in found]
        if left:
            if stopped:
                ended = f"did not end within {limit:g} s"
            else:
                errors.seek(0)
                ended = _how_it_ended(status, errors.read())
            seconds = time.monotonic() - begin
            found[left[0]] = Result(f"{case}: {ended}", last["index"], seconds)
    return found


def _lines(stream: IO[str] | None) -> "queue.Queue[str | None]":
    """The lines of a stream as they come, then None; so that waiting for one can have a limit."""
    found: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream or ():
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def _how_it_ended(status: int, errors: str) -> str:
    said = [line for line in errors.splitlines() if line.strip()]
    last = said[-1][:500] if said else "it said nothing"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}: {last}"
    return last if said else f"ended with status {status}"
