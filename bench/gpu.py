"""`python -m bench.gpu`: all that needs an NVIDIA GPU, in under eight minutes.

Builds the modules in place, runs tests/gpu, runs its small cases under compute-sanitizer, and
measures the ladders of `mixed_lora` (decode in CUDA graphs, prefill, forward and backward), of
`sample` and `linear_logprob`, and, if transformers is installed, the generation runs of
`sampler`; what torch.compile takes part in comes last, as far as the time goes. Needs a CUDA build
of PyTorch, nvcc, pytest and what `import clp_kernels` needs (safetensors); nothing has to be
installed first. Appends to bench/results/cuda.csv, and copies bench/results/*.csv to the folder
$OUT if that is set. Outside a git checkout, $GIT_COMMIT is the commit that the rows name.

What fails its tests is not measured. The tests of `mixed_lora` and `mixed_linear` are one stage,
and the sampler's another, so that a failure leaves the other ladders. Exit status: 0 all passed, 1
something failed or did not run to its end, 2 there is no GPU.
"""

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.report import rows, tables

DEADLINE = 470  # seconds for everything
PYTHON = sys.executable
# tests/conftest.py is for the CPU suite (it wants hypothesis); the GPU tests need none of it.
PYTEST = [PYTHON, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
PYTEST += ["--confcutdir=tests/gpu"]
LOADS = "from clp_kernels import native; raise SystemExit(native.cuda_missing())"
SAMPLE = [PYTHON, "-m", "bench", "sample", "--device", "cuda"]
HEAD = [PYTHON, "-m", "bench", "linear_logprob", "--device", "cuda"]
MIXED = [PYTHON, "-m", "bench", "mixed_lora", "--device", "cuda"]
SAMPLER = [PYTHON, "-m", "bench", "sampler", "--device", "cuda", "--quick"]


@dataclass(frozen=True)
class Stage:
    """A command, the stages that must have passed before it, and its limit in seconds.

    `needs`: a package without which it is skipped.
    """

    name: str
    command: list[str]
    after: tuple[str, ...] = ()
    limit: float = 120
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. `ok` is None if it was not run."""

    name: str
    ok: bool | None
    seconds: float
    note: str


# Of tests/gpu what runs under compute-sanitizer. No graph: PyTorch's allocator, which a capture
# needs, is off there (see `run`).
SANITIZED = "small and not 50257 and not graph"


def stages(sanitizer: str | None) -> list[Stage]:
    """In the order in which they run; without the sanitizer if its program is missing.

    The limits of all up to the last mixed_lora ladder add up to DEADLINE: a stage that hangs takes
    no time from these.
    """
    built = ("build", "load")
    tested, mixed = (*built, "tests"), (*built, "tests, mixed")
    found = [
        Stage("build", [PYTHON, "setup.py", "build_ext", "--inplace"], limit=85),
        Stage("load", [PYTHON, "-c", LOADS], ("build",), limit=20),
        Stage("tests", [*PYTEST, "-k", "not mixed and not sampler"], built, limit=60),
    ]
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", *PYTEST]
        found.append(Stage(tool, [*command, "-k", SANITIZED], built, limit=40))
    found += [
        Stage("tests, mixed", [*PYTEST, "-k", "mixed"], built, limit=100),
        Stage("mixed_lora, graph", [*MIXED, "--graph"], mixed, limit=65),
        Stage("mixed_lora", MIXED, mixed, limit=25),
        Stage("mixed_lora, grad", [*MIXED, "--grad"], mixed, limit=35),
        # The first of each has time for what bench/peers.py compiles where it is installed.
        Stage("sample", SAMPLE, tested, limit=100),
        Stage("sample, graph", [*SAMPLE, "--graph"], tested, limit=60),
        Stage("linear_logprob", HEAD, tested, limit=90),
        Stage("tests, sampler", [*PYTEST, "-k", "sampler"], built, 60, "transformers"),
        Stage("sampler", SAMPLER, (*built, "tests, sampler"), 120, "transformers"),
        Stage("sample, compiled", [*SAMPLE, "--graph", "--compile", "--quick"], tested),
        Stage("mixed_lora, compiled", [*MIXED, "--graph", "--compile", "--quick"], mixed),
    ]
    return found


def run(command: list[str], limit: float) -> tuple[int | None, str]:
    """(exit status, or None if the limit stopped it; output), printing as it comes."""
    # Without PyTorch's cache every tensor has its own allocation, so that the sanitizer sees
    # a read past its end.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "--error-exitcode" in command else {}
    process = subprocess.Popen(
        command,
        cwd=rows.ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **alone},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that the limit ends its children too
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    timer.cancel()
    return None if stopped.is_set() else status, "".join(lines)


def perform(stage: Stage, passed: set[str], time_left: float) -> Outcome:
    """Runs a stage, unless one that it needs has not passed or the time is up."""
    if stage.needs is not None and importlib.util.find_spec(stage.needs) is None:
        return Outcome(stage.name, None, 0.0, f"skipped: {stage.needs} is not installed")
    missing = [name for name in stage.after if name not in passed]
    if missing:
        return Outcome(stage.name, None, 0.0, f"not run: {missing[0]} did not pass")
    if time_left <= 0:
        return Outcome(stage.name, None, 0.0, f"not run: the {DEADLINE} s are used up")
    limit = min(stage.limit, time_left)
    print(f"\n$ {shlex.join(stage.command)}", flush=True)
    begin = time.monotonic()
    status, output = run(stage.command, limit)
    seconds = time.monotonic() - begin
    note = f"stopped after {limit:.0f} s" if status is None else f"exit status {status}"
    ok: bool | None = status == 0
    if "No module named pytest" in output:
        note = "pytest is not installed: no test ran"
    elif not ok and "--error-exitcode" in stage.command and "Device not supported" in output:
        ok, note = None, "skipped: compute-sanitizer does not support this device"
    print(f"({stage.name}: {note}, {seconds:.1f} s)", flush=True)
    return Outcome(stage.name, ok, seconds, note)


def main() -> int:
    """Runs the stages and prints the summary; gives the exit status."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("bench.gpu needs an NVIDIA GPU, and this PyTorch sees none.", file=sys.stderr)
        return 2
    begin = time.monotonic()
    csv = rows.RESULTS / "cuda.csv"
    known = len(rows.read(csv))
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:{_cuda()}")
    outcomes: list[Outcome] = []
    for stage in stages(sanitizer):
        passed = {o.name for o in outcomes if o.ok}
        outcomes.append(perform(stage, passed, DEADLINE - (time.monotonic() - begin)))
    if sanitizer is None:
        for tool in ("memcheck", "racecheck"):
            outcomes.append(Outcome(tool, None, 0.0, "skipped: no compute-sanitizer on the path"))
    if out := os.environ.get("OUT"):
        for path in rows.RESULTS.glob("*.csv"):
            shutil.copy(path, Path(out) / path.name)
    new = tables.latest(rows.read(csv)[known:])
    if new:
        print(f"\n{tables.tables(new, spread=False)}")
    print(f"\n{rows.machine(torch.device('cuda'))}, torch {torch.__version__}")
    for o in outcomes:
        verdict = {True: "passed", False: "FAILED", None: "-"}[o.ok]
        print(f"{o.name:20} {verdict:7} {o.seconds:7.1f} s  {o.note}")
    return exit_status(outcomes)


def exit_status(outcomes: list[Outcome]) -> int:
    """1 if a stage failed, or was left out for another reason than a missing package."""
    return int(any(o.ok is False or o.note.startswith("not run") for o in outcomes))


def _cuda() -> str:
    return f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"


if __name__ == "__main__":
    sys.exit(main())
