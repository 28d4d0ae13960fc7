"""`python -m clp_kernels.info` tells what there is, and never fails."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from processes import python

from clp_kernels import info as module
from clp_kernels import native, registry

OPS = {"mixed_lora", "mixed_linear", "mix_logits", "sample", "linear_logprob"}


def run(*argv: str, TRITON_INTERPRET: str | None = None, **environment: str) -> Any:
    own = {"TRITON_INTERPRET": TRITON_INTERPRET, **environment}
    return python("-m", "clp_kernels.info", *argv, **own)


def info(*argv: str, **environment: str) -> str:
    done = run(*argv, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain_report() -> Any:
    """Of a process of its own, without anything in the environment."""
    return json.loads(info("--json", CLP_KERNELS_CPU_ISA=""))


def test_json_lists_the_backends_that_run_here_and_why_the_others_do_not(plain_report) -> None:
    report = plain_report
    absent = {name: registry.missing(name) for name in ("cpu", "cuda")}
    if not torch.cuda.is_available():
        off = "Triton's interpreter (TRITON_INTERPRET=1) is off"
        absent["triton"] = f"PyTorch sees no GPU, and {off}"
        assert absent["cuda"] == "PyTorch sees no CUDA device"
    here = {name: reason for name, reason in absent.items() if reason}
    assert report["backends not here"] == (here or "none")
    assert set(report["backends"]) == OPS
    for op, names in report["backends"].items():
        assert names == [e.name for e in registry.BACKENDS[op] if e.name not in here]
        assert names[-1] == "reference"
    assert report["versions"]["torch"]
    assert report["names without kernels"]["mixed_lora_backward"] == "cuda means triton"
    assert "mixed_lora" not in report["names without kernels"]


def test_the_interpreter_makes_triton_a_backend_that_exists() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    report = json.loads(info("--json", TRITON_INTERPRET="1"))
    assert "triton" in report["backends"]["sample"]
    assert "triton" not in report["backends not here"]


def test_text_gives_the_reason_for_a_missing_module(monkeypatch, capsys) -> None:
    monkeypatch.setattr(native, "cpu_missing", lambda: "clp_kernels._cpu has not been built")
    module.main([])
    text = capsys.readouterr().out
    assert text.count("clp_kernels._cpu has not been built") == 2  # the module, and the backend
    shown = {line.split()[0]: line.split()[1:] for line in text.splitlines() if ">" in line}
    assert not any("cpu" in names for names in shown.values())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("nonsense", "must be one of auto, reference, cpu, triton, cuda, got 'nonsense'; every"),
        ("", "empty, as if it were not set (auto)"),
        ("reference", "reference"),
        ("auto", "auto"),
    ],
)
def test_the_backend_of_the_environment_is_reported(value, shown, monkeypatch) -> None:
    monkeypatch.setenv("CLP_KERNELS_BACKEND", value)
    assert shown in module.collect()["CLP_KERNELS_BACKEND"]


def test_without_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("CLP_KERNELS_BACKEND", raising=False)
    assert module.collect()["CLP_KERNELS_BACKEND"] == "not set (auto)"


@pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))
def test_the_instruction_set_of_the_environment_is_reported(plain_report) -> None:
    report = json.loads(info("--json", CLP_KERNELS_CPU_ISA="nonsense"))
    wanted = "must be one of scalar, avx2, avx512, avx512_bf16, got 'nonsense'"
    assert wanted in report["modules"]["_cpu"]
    assert report["backends not here"]["cpu"] == report["modules"]["_cpu"]
    assert "cpu" not in report["backends"]["sample"]
    report = plain_report
    built = f"built with {native.cpu().BUILT_WITH}"
    assert report["modules"]["_cpu"] == f"loaded, instruction set {native.isa()}, {built}"
    assert re.fullmatch(r"\w+ [\d.]+, (OpenMP|one thread)", native.cpu().BUILT_WITH)


@pytest.mark.skipif(native.load("_cuda")[0] is None, reason="_cuda has not been built")
def test_a_cuda_module_without_a_gpu_says_how_it_was_built(plain_report) -> None:
    """It was built with nvcc, on another machine if there is none here: a wheel carries it."""
    shown = plain_report["modules"]["_cuda"]
    how = r"built with nvcc [\d.]+, static CUDA runtime, for sm_80 sm_90a sm_100"
    where = "loaded, " if torch.cuda.is_available() else "not used: PyTorch sees no CUDA device; "
    assert re.fullmatch(where + how, shown)


@pytest.mark.parametrize("argv", [["--jso"], ["--js"], ["--json", "sample"]])
def test_an_unknown_argument_is_an_error(argv, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        module.main(argv)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    wrong = next(a for a in argv if a != "--json")
    assert said.err == f"info takes no argument but --json, got {wrong!r}\n"


@pytest.mark.parametrize("argv", [[], ["--json"]])
def test_a_reader_that_ends_early_is_no_error(argv) -> None:
    command = [sys.executable, "-m", "clp_kernels.info", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out
