"""Building: the CUDA source for every target without spills, and setup.py without a compiler."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_targets() -> list[str]:
    """What CMakeLists.txt builds for."""
    found = re.search(r"set\(CLP_CUDA_TARGETS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    return found[1].split()


def test_cuda_targets() -> None:
    assert cuda_targets() == ["80", "90a", "100"]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on this machine")
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc").glob("*.cu")))
def test_cuda_compiles_without_spills(source: str, tmp_path: Path) -> None:
    """All targets in one run of nvcc: three runs compile the host's part three times (sample.cu:
    16 instead of 12 s of a processor)."""
    targets = cuda_targets()
    result = subprocess.run(
        [
            *(str(NVCC), "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra"),
            *(f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets),
            *("-c", str(ROOT / "csrc" / source), "-o", str(tmp_path / "kernel.o")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert "warning" not in report, report
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", report)
    kernels = {name for name, _ in compiled}
    assert kernels and set(compiled) == {(name, target) for name in kernels for target in targets}
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(compiled), report
    assert set(spills) == {("0", "0")}, report


def build(tmp_path: Path, **environment: str) -> tuple[int, str, list[str]]:
    """Runs setup.py build_ext into tmp_path: exit status, output, names of what was built."""
    result = subprocess.run(
        [
            *(sys.executable, "setup.py", "build_ext"),
            *("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")),
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    built = sorted(path.name.split(".")[0] for path in (tmp_path / "lib").rglob("*.so"))
    return result.returncode, result.stdout + result.stderr, built


def test_setup_without_a_compiler(tmp_path: Path) -> None:
    """The Python parts are installed, and a line says what is left out and why."""
    status, output, built = build(tmp_path, CXX="/nonexistent/compiler")
    assert status == 0, output
    assert built == []
    assert "no C++ compiler: CXX names '/nonexistent/compiler', which does not exist" in output
    assert "Skipping the compiled parts: clp_kernels._cpu and clp_kernels._cuda" in output


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_setup_with_a_broken_compiler(tmp_path: Path) -> None:
    """A compiler that fails is an error, and what it printed is shown."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    status, output, built = build(tmp_path, CXX=str(compiler), CLP_KERNELS_SKIP_CUDA="1")
    assert status != 0
    assert built == []
    assert "this compiler is broken" in output
    assert "clp-steer: this command failed, see above" in output


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("value", ["yes", "true", "2"])
def test_setup_with_an_unknown_wish(tmp_path: Path, value: str) -> None:
    """Before minutes of nvcc that were not wanted."""
    status, output, built = build(tmp_path, CLP_KERNELS_SKIP_CUDA=value)
    assert status != 0 and built == []
    assert f"clp-steer: CLP_KERNELS_SKIP_CUDA must be 0 or 1, got '{value}'" in output


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_setup_without_nvcc(tmp_path: Path) -> None:
    status, output, built = build(tmp_path, CLP_KERNELS_SKIP_CUDA="1")
    assert status == 0, output
    assert built == ["_cpu"]
    assert "CLP_KERNELS_SKIP_CUDA=1. Skipping clp_kernels._cuda" in output
    assert "warning:" not in output
