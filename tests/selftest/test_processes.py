"""The processes of the self-test: kernels that fail, crash and hang, and what is made of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CPU_KERNELS
from processes import python

from clp_kernels import registry, trust
from clp_kernels.files import cache_folder
from clp_kernels.selftest import __main__ as command
from clp_kernels.selftest import processes
from clp_kernels.selftest.processes import PROGRAM
from clp_kernels.trust import Result

pytestmark = [CPU_KERNELS, pytest.mark.usefixtures("kernels_cache")]

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
# What a process runs before the worker: replaces the kernels of mix_logits by `bad`.
BAD = (
    "import atexit, ctypes, os, signal, sys, time\n"
    "count = int(sys.argv[1]); sys.path[:] = sys.argv[2 : 2 + count]\n"
    "from dataclasses import replace\n"
    "from clp_kernels import mix_logits, registry\n"
    "def bad(*args):\n"
    "    {}\n"
    "first, *rest = registry.BACKENDS['mix_logits']\n"
    "registry.BACKENDS['mix_logits'] = (replace(first, run=bad), *rest)\n"
)
KINDS = {
    "fails": ("return first.run(*args) + 1", "AssertionError: output 0 is out of its error budget"),
    "raises": ("raise ValueError('one\\n\\ntwo\\x07')", "ValueError: one two?"),
    "raises after noise": (
        "atexit.register(print, 'bye', file=sys.stderr); raise IndexError(7)",
        "IndexError: 7",
    ),
    "raises and hangs": (
        "atexit.register(time.sleep, 600); raise IndexError(8)",
        "IndexError: 8",
    ),
    "ends by an unknown signal": ("os.kill(os.getpid(), 40)", "ended by signal 40"),
    "crashes": ("os.abort()", "ended by SIGABRT"),
    "reads where nothing is": ("ctypes.string_at(8)", "ended by SIGSEGV"),
    "ends the process": ("os._exit(3)", "ended with status 3"),
    "hangs": ("time.sleep(600)", "did not end within 8 s"),
}


# After these another op is tested: an error, an end by a signal, a hang, and one after an error.
WITH_ANOTHER = {"fails", "crashes", "hangs", "raises and hangs"}


def run(body: str, ops: list[str], **options: Any) -> dict[tuple[str, str], Result]:
    jobs = processes.jobs(CPU, ops, "cpu")
    program = BAD.format(body) + PROGRAM
    return processes.test(jobs, CPU, progress=False, program=program, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_kernel_is_recorded_and_never_chosen(kind: str) -> None:
    body, reason = KINDS[kind]
    begin = time.monotonic()
    ops = ["mix_logits", "slot_attention"] if kind in WITH_ANOTHER else ["mix_logits"]
    found = run(body, ops, limit=8.0 if kind == "hangs" else 60.0)
    assert time.monotonic() - begin < 60
    # The next op is tested all the same, in another process.
    assert all(found[op, "cpu"].reason is None for op in ops[1:])
    result = found["mix_logits", "cpu"]
    assert result.reason is not None and reason in result.reason, result.reason
    assert result.reason.startswith("bf16 m1 B1 V1 geometric: ")
    trust.of_this_process.clear()  # as another process has it, from the file
    trust.forget()
    assert trust.find("mix_logits", "cpu", CPU) == result
    logits, weights = torch.randn(2, 3, 4), torch.rand(3, 2)
    for op in ("mix_logits", "mix_logits_backward"):
        assert registry.select(op, "auto", logits, weights, "geometric").name == "reference"
    with pytest.raises(RuntimeError, match="no backend"):
        table = registry.BACKENDS["mix_logits"][:1]
        with pytest.MonkeyPatch.context() as alone:
            alone.setitem(registry.BACKENDS, "mix_logits", table)
            registry.select("mix_logits", "auto", logits, weights, "geometric")


def test_what_kernels_print_is_not_taken_for_a_result() -> None:
    found = run(
        "os.write(1, b'{}\\n'); print('half', end=''); return first.run(*args)", ["mix_logits"]
    )
    assert found["mix_logits", "cpu"].reason is None and found["mix_logits", "cpu"].cases == 30


def test_kernels_that_run_no_case_have_not_passed() -> None:
    jobs = processes.jobs(CPU, ["mix_logits"], "cpu")
    refusing = BAD.replace("run=bad", "why_not=lambda *_: 'not here'").format("pass")
    program = refusing + PROGRAM
    [result] = processes.test(jobs, CPU, progress=False, program=program).values()
    assert result.reason is not None
    assert result.reason.endswith("AssertionError: the kernels run none of the cases")


PASSING = {
    "a full disk": "raise OSError(28, 'No space left on device')",
    "the host's memory": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("kind", PASSING)
def test_a_failure_that_another_try_may_not_have_is_not_kept_on_disk(kind: str) -> None:
    [result] = run(PASSING[kind], ["mix_logits"]).values()
    assert result.reason is not None and trust.find("mix_logits", "cpu", CPU) == result
    trust.of_this_process.clear()
    assert trust.find("mix_logits", "cpu", CPU) is None


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (MemoryError("no room"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: devices are busy or unavailable\nCompile"), True),
        (OSError(28, "No space left on device"), True),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (AssertionError("output 0 is out of its error budget"), False),
    ],
)
def test_which_errors_say_nothing_about_a_kernel(error: BaseException, passing: bool) -> None:
    """As the process of the kernels tells them."""
    kind = type(error)
    told = {"error": f"{kind.__name__}: {error}", "kinds": [k.__name__ for k in kind.__mro__]}
    assert processes._reason("", 1, told, "")[1] is not passing


def test_a_process_that_does_not_start_is_a_reason_for_this_process() -> None:
    jobs = processes.jobs(CPU, ["mix_logits"], "cpu")
    [result] = processes.test(
        jobs, CPU, progress=False, program="import nothing_of_this_name"
    ).values()
    assert result.reason == (
        "its start: ended with status 1: ModuleNotFoundError: No module named "
        "'nothing_of_this_name'"
    )
    trust.of_this_process.clear()
    assert trust.find("mix_logits", "cpu", CPU) is None


def test_what_the_results_and_the_environment_say_does_not_change_a_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that has failed is tested all the same, on its fast path too."""
    wrong = "first, *rest = registry.BACKENDS['sample']\ntaken = first.fast_path()\n"
    wrong += "def bad(*args):\n    found = taken(*args)\n"
    wrong += "    return found if found is None else (found[0] * 0, *found[1:])\n"
    wrong += "registry.BACKENDS['sample'] = (replace(first, fast_path=lambda: bad), *rest)\n"
    program = BAD.format("pass").rpartition("first, *rest")[0] + wrong + PROGRAM
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "reference")
    for _ in range(2):
        jobs = processes.jobs(CPU, ["sample"], "cpu")
        [result] = processes.test(jobs, CPU, progress=False, program=program).values()
        assert result.reason is not None and "tokens are" in result.reason


def test_a_process_that_does_not_end_keeps_what_it_has_found() -> None:
    found = run("atexit.register(time.sleep, 600); return first.run(*args)", ["mix_logits"])
    assert found["mix_logits", "cpu"].reason is None


def test_what_a_kernel_starts_ends_with_the_test(tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.fork() or time.sleep(600)))"
    begin = time.monotonic()
    found = run(f"{body}; return first.run(*args)", ["mix_logits"])
    assert found["mix_logits", "cpu"].reason is None and time.monotonic() - begin < 60
    wait_for_end(int((tmp_path / "pid").read_text()))


def wait_for_end(pid: int) -> None:
    """Of a process that nobody may have waited for."""
    deadline = time.monotonic() + 10
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        if "State:\tZ" in status:
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_kernel_that_hangs_ends_with_its_caller(stop: int, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    body = f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import signal, sys, torch; from clp_kernels.selftest import processes\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # nohup has it ignored
        "jobs = processes.jobs(torch.device('cpu'), ['mix_logits', 'sample'], 'cpu')\n"
        "processes.test(jobs, torch.device('cpu'), program=sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, BAD.format(body) + PROGRAM]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not pid.is_file() or not pid.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(stop)
    assert process.wait(20) != 0
    wait_for_end(int(pid.read_text()))


def test_an_interrupt_ends_the_process_and_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []
    popen = processes.subprocess.Popen

    def start(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return started[-1]

    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    monkeypatch.setattr(processes.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("time.sleep(600)", ["mix_logits"], limit=60.0)
    assert [process.poll() for process in started] == [-9]
    assert trust.find("mix_logits", "cpu", CPU) is None


def test_jobs_are_what_runs_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "interpreting", lambda: False)
    monkeypatch.setattr(registry, "missing", lambda backend: None)
    assert {backend for _, backend in processes.jobs(CPU)} == {"cpu"}
    on_gpu = processes.jobs(GPU)
    assert {backend for _, backend in on_gpu} == {"triton", "cuda"}
    assert ("linear_logprob", "cuda") not in on_gpu and ("sample", "cuda") in on_gpu
    assert processes.jobs(GPU, ["sample"]) == [("sample", "cuda"), ("sample", "triton")]
    monkeypatch.setattr(registry, "missing", lambda backend: "not here")
    assert processes.jobs(GPU) == []
    with pytest.raises(ValueError, match=r"op must be one of mixed_lora, .* got 'nope'"):
        processes.jobs(CPU, ["nope"])


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As if there were a GPU whose kernels all pass; what was tested."""
    monkeypatch.setattr(registry, "missing", lambda backend: None)
    monkeypatch.setattr(trust, "machine", lambda device, backend: f"{device} {backend}")
    calls: list[Any] = []

    def test(jobs: Any, device: torch.device, *, progress: bool) -> dict[Any, Result]:
        calls.append(list(jobs))
        for job in jobs:
            trust.keep(*job, device, Result(None, 9, 1.0))
        return dict.fromkeys(jobs, Result(None, 9, 1.0))

    monkeypatch.setattr(processes, "test", test)
    return calls


def test_ensure_tests_once_what_has_no_result(tested: list[Any]) -> None:
    trust.keep("sample", "triton", GPU, Result("it is wrong", 0, 1.0))
    found = processes.ensure("cuda:0", ["sample", "mix_logits"])
    assert tested == [[("sample", "cuda"), ("mix_logits", "triton")]]
    assert found["sample", "triton"].reason == "it is wrong"
    assert found["sample", "cuda"].reason is None
    assert processes.ensure(GPU, ["sample", "mix_logits"]) == found
    trust.of_this_process.clear()
    assert processes.ensure(GPU, ["sample"], progress=False).keys() < found.keys()
    assert len(tested) == 1


def test_ensure_waits_for_another_process_and_takes_its_results(
    tested: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    locked = processes.locked

    def late(path: Path, waiting: str | None = None) -> Any:
        if waiting is not None:  # while it waits, the other ends
            for job in processes.jobs(GPU, ["sample"]):
                trust.keep(*job, GPU, Result(None, 9, 1.0))
        return locked(path, waiting)

    monkeypatch.setattr(processes, "locked", late)
    trust.distrust("sample", "cuda", CPU)
    found = processes.ensure(GPU, ["sample"])
    assert all(result.reason is None for result in found.values()) and len(found) == 2
    assert tested == [[]]
    assert trust.distrust("sample", "cuda", GPU) is None


@pytest.mark.parametrize("value", ["all", "none"])
def test_ensure_tests_nothing_on_the_cpu_or_if_it_is_not_asked(
    value: str, tested: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert processes.ensure("cpu") == {}
    monkeypatch.setattr(trust, "trust", lambda: value)
    assert processes.ensure("cuda") == {}
    assert not tested


def test_sampler_and_trainer_ask_for_their_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clp
    from clp.engine import runner
    from clp.training import trainer

    asked: list[Any] = []
    for module in (runner, trainer):
        monkeypatch.setattr(module, "ensure", lambda *args: asked.append(args))
    clp.CLPTrainer(args=clp.CLPConfig(output_dir=str(tmp_path / "run"), rewards=["brevity"]))
    assert asked == [(CPU,), (CPU, runner.OPS)]
    assert set(runner.OPS) < set(processes.cases.CASES)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--op", "mix_logits", "--backend", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["mix_logits", "cpu", "passed", "30"]
    assert trust.find("mix_logits", "cpu", CPU) is not None
    assert "python -m clp_kernels.info shows what is kept" in lines[-1]


def test_the_command_shows_why_a_kernel_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Result("T9: it is wrong", 4, 1.0)
    monkeypatch.setattr(processes, "test", lambda jobs, device: dict.fromkeys(jobs, wrong))
    assert command.main(["--op", "sample", "--backend", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "sample           cpu      FAILED      4" in out
    assert "sample cpu: T9: it is wrong" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "nope"], "--device must be cpu, cuda or cuda:N, got 'nope'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["--op", "nope"], "invalid choice: 'nope'"),
        (["--device", "cpu:5"], "--device must be cpu, cuda or cuda:N, got 'cpu:5'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert message in said.err


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (["--backend", "cuda", "--device", "cpu"], {}, "no such kernels run on cpu here"),
        ([], {"CLP_KERNELS_CPU_ISA": "nope"}, "CLP_KERNELS_CPU_ISA must be one of"),
        ([], {"CLP_KERNELS_TRUST": "nope"}, "CLP_KERNELS_TRUST must be one of"),
    ],
)
def test_wrong_arguments_of_a_process_are_one_line_and_exit_code_2(
    argv: list[str], environment: dict[str, str], message: str
) -> None:
    """What a process decides once."""
    done = python("-m", "clp_kernels.selftest", *argv, TRITON_INTERPRET=None, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr


def test_info_shows_results(capsys: pytest.CaptureFixture[str]) -> None:
    from clp_kernels import info

    trust.keep("sample", "cpu", CPU, Result("T9: it is wrong", 4, 1.0))
    trust.keep("mix_logits", "cpu", CPU, Result(None, 30, 1.0))
    report = info.collect()
    assert report["CLP_KERNELS_TRUST"] == "selftest"
    shown = report["self-test"]
    assert shown["sample cpu on cpu"] == "FAILED: T9: it is wrong"
    assert shown["mix_logits cpu on cpu"] == "passed in 30 cases"
    untested = "not tested (python -m clp_kernels.selftest --device cpu)"
    assert shown["mixed_lora cpu on cpu"] == untested
    json.dumps(report)
    assert os.path.exists(cache_folder() / trust.FILE.name)
