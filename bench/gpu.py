"""`python -m bench.gpu`: all that needs an NVIDIA GPU, in the order of what is worth most.

It builds the modules in place, has the kernels prove themselves (clp_kernels.selftest, which
compiles them in several processes), and measures the ladders of `mixed_lora` (decode in CUDA
graphs, prefill, forward and backward), of `sample` and `linear_logprob`, and, if transformers is
installed, the generation runs of `sampler` and the training steps of `training`. Each case of a
ladder is held to its own error budget. Then come tests/gpu, each file in a process of its own,
because one illegal address ends all tests of a process; what torch.compile takes part in; and some
of the tests under compute-sanitizer. Each stage has a limit, and DEADLINE is that of all.

It needs a CUDA build of PyTorch, nvcc, pytest and what `import clp_kernels` needs (safetensors);
nothing has to be installed first. Each stage leaves its log in bench/results/gpu/, tests also junit
XML, and ladders their rows in bench/results/cuda.csv; these are copied to the folder $OUT, if that
is set, after each stage. Outside a git checkout, $GIT_COMMIT is the commit that the rows name.

    --stage NAME    this stage alone (may be given several times)
    --dry-run       prints the stages, on any machine

Exit status: 0 all passed, 1 something failed or did not run to its end, 2 there is no GPU.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.report import rows, tables

DEADLINE = 470  # seconds for everything
PYTHON = sys.executable
LOGS = rows.RESULTS / "gpu"
# tests/conftest.py is for the CPU suite (it wants hypothesis); the GPU tests need none of it.
PYTEST = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpu"]
LOADS = "from clp_kernels import native; raise SystemExit(native.cuda_missing())"
SELFTEST = [PYTHON, "-m", "clp_kernels.selftest", "--device", "cuda"]
BENCH = [PYTHON, "-m", "bench"]
CUDA = ["--device", "cuda"]
# Of tests/gpu what runs under compute-sanitizer, about 20 tests. No graph: PyTorch's allocator,
# which a capture needs, is off there (see `run`).
SANITIZED = "small and not 50257 and not graph"


@dataclass(frozen=True)
class Stage:
    """A command, the stages that must have passed before it, and its limit in seconds.

    `expected`: seconds on 16 cores, an estimate until a GPU has run it. `needs`: a package without
    which it is skipped.
    """

    name: str
    command: list[str]
    limit: float
    expected: float
    after: tuple[str, ...] = ("build", "load")
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. `ok` is None if it was not run."""

    name: str
    ok: bool | None
    seconds: float
    note: str


def stages(sanitizer: str | None) -> list[Stage]:
    """In the order in which they run; without the sanitizer if its program is missing."""
    found = [
        Stage("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 90, 60, ()),
        Stage("load", [PYTHON, "-c", LOADS], 20, 5, ("build",)),
        Stage("selftest", SELFTEST, 90, 60),
        Stage("mixed_lora, graph", [*BENCH, "mixed_lora", *CUDA, "--graph"], 65, 40),
        Stage("mixed_lora", [*BENCH, "mixed_lora", *CUDA], 30, 15),
        Stage("mixed_lora, grad", [*BENCH, "mixed_lora", *CUDA, "--grad"], 40, 20),
        Stage("sample, graph", [*BENCH, "sample", *CUDA, "--graph"], 60, 30),
        Stage("linear_logprob", [*BENCH, "linear_logprob", *CUDA], 60, 30),
        Stage("sample", [*BENCH, "sample", *CUDA], 60, 30),
        Stage("sampler", [*BENCH, "sampler", *CUDA, "--quick"], 90, 40, needs="transformers"),
        Stage("training", [*BENCH, "training", *CUDA, "--quick"], 60, 30, needs="transformers"),
    ]
    for path in sorted((rows.ROOT / "tests" / "gpu").glob("test_*.py")):
        needs = "transformers" if "sampler" in path.name else None
        name = path.stem.removeprefix("test_").removesuffix("_gpu")
        command = [*PYTEST, str(path.relative_to(rows.ROOT))]
        found.append(Stage(f"tests, {name}", command, 60, 5, needs=needs))
    compiled = ["--graph", "--compile", "--quick"]
    found += [
        Stage("sample, compiled", [*BENCH, "sample", *CUDA, *compiled], 60, 15),
        Stage("mixed_lora, compiled", [*BENCH, "mixed_lora", *CUDA, *compiled], 60, 15),
    ]
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", *PYTEST, "tests/gpu"]
        found.append(Stage(tool, [*command, "-k", SANITIZED], 60, 20))
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
    command = stage.command
    if "pytest" in command:
        command = [*command, f"--junitxml={LOGS / (_file_name(stage) + '.xml')}"]
    print(f"\n$ {shlex.join(command)}", flush=True)
    begin = time.monotonic()
    status, output = run(command, limit)
    seconds = time.monotonic() - begin
    note = f"stopped after {limit:.0f} s" if status is None else f"exit status {status}"
    ok: bool | None = status == 0
    if "No module named pytest" in output:
        note = "pytest is not installed: no test ran"
    elif not ok and "--error-exitcode" in stage.command and "Device not supported" in output:
        ok, note = None, "skipped: compute-sanitizer does not support this device"
    ended = f"({stage.name}: {note}, {seconds:.1f} s)"
    print(ended, flush=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    text = f"$ {shlex.join(command)}\n{output}{ended}\n"
    (LOGS / f"{_file_name(stage)}.log").write_text(text, encoding="utf-8")
    return Outcome(stage.name, ok, seconds, note)


def main(argv: list[str] | None = None) -> int:
    """Runs the stages and prints the summary; gives the exit status."""
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:{_cuda()}")
    wanted = stages(sanitizer)
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", allow_abbrev=False)
    names = [stage.name for stage in wanted]
    parser.add_argument("--stage", action="append", choices=names, metavar="NAME",
                        help=f"this one alone: {'; '.join(names)}")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the stages")
    options = parser.parse_args(argv)
    if options.stage:
        wanted = [replace(s, after=()) for s in wanted if s.name in options.stage]
    if options.dry_run:
        print(f"{'stage':28} {'limit':>7} {'expected':>9}")
        for stage in wanted:
            print(f"{stage.name:28} {stage.limit:5.0f} s {stage.expected:7.0f} s")
        print(f"{'all':28} {'':7} {sum(stage.expected for stage in wanted):7.0f} s of {DEADLINE} s")
        return 0
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("bench.gpu needs an NVIDIA GPU, and this PyTorch sees none.", file=sys.stderr)
        return 2
    begin = time.monotonic()
    csv = rows.RESULTS / "cuda.csv"
    known = len(rows.read(csv))
    outcomes: list[Outcome] = []
    for stage in wanted:
        passed = {o.name for o in outcomes if o.ok}
        outcomes.append(perform(stage, passed, DEADLINE - (time.monotonic() - begin)))
        copy_results()
    if sanitizer is None:
        for tool in ("memcheck", "racecheck"):
            outcomes.append(Outcome(tool, None, 0.0, "skipped: no compute-sanitizer on the path"))
    new = tables.latest(rows.read(csv)[known:])
    if new:
        print(f"\n{tables.tables(new, spread=False)}")
    print(f"\n{rows.machine(torch.device('cuda'))}, torch {torch.__version__}")
    for o in outcomes:
        verdict = {True: "passed", False: "FAILED", None: "-"}[o.ok]
        print(f"{o.name:28} {verdict:7} {o.seconds:7.1f} s  {o.note}")
    return exit_status(outcomes)


def copy_results() -> None:
    """Copies the rows and the logs to $OUT, if that is set: what is there when the machine goes."""
    if out := os.environ.get("OUT"):
        for path in [*rows.RESULTS.glob("*.csv"), *LOGS.glob("*")]:
            shutil.copy(path, Path(out) / path.name)


def _file_name(stage: Stage) -> str:
    return stage.name.replace(", ", "_")


def exit_status(outcomes: list[Outcome]) -> int:
    """1 if a stage failed, or was left out for another reason than a missing package."""
    return int(any(o.ok is False or o.note.startswith("not run") for o in outcomes))


def _cuda() -> str:
    return f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"


if __name__ == "__main__":
    sys.exit(main())
