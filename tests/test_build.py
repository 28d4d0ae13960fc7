"""Building: the CUDA source for every target without spills, setup.py without a compiler, the
source distribution, and the environment of `make dev`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import python

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_targets() -> list[str]:
    """What CMakeLists.txt builds for."""
    found = re.search(r"set\(CLP_CUDA_TARGETS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    return found[1].split()


def test_cuda_targets() -> None:
    assert cuda_targets() == ["80", "90a", "100"]


@pytest.mark.gate
@pytest.mark.skipif(NVCC is None, reason="nvcc is not on this machine")
@pytest.mark.parametrize(
    "source", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu"))
)
def test_cuda_compiles_without_spills(source: str, tmp_path: Path) -> None:
    """All targets in one run of nvcc: three runs compile the host's part three times (sample.cu:
    16 instead of 12 s of a processor)."""
    targets = cuda_targets()
    result = subprocess.run(
        [
            *(str(NVCC), "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra"),
            *(f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets),
            *("-I", str(ROOT / "csrc"), "-c", str(ROOT / source)),
            *("-o", str(tmp_path / "kernel.o")),
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
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    result = python("setup.py", "build_ext", *folders, cwd=ROOT, **environment)
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


def test_distributions(tmp_path: Path) -> None:
    """The source distribution holds all that a build needs, the wheel all that runs, and neither
    what a build or a run has left behind. tests/newcomer.sh compiles it."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md",
                 "LICENSE", "CHANGELOG.md", "constraints.txt"):  # fmt: skip
        shutil.copy(ROOT / name, copy)
    # Bytecode and compiled modules stay behind here, so that those below are all there are.
    made = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("clp", "clp_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=made)
    sources = {f"{p.relative_to(copy)}" for p in copy.rglob("*") if p.is_file()}
    for name in ("clp_kernels/_cpu.cpython-311-x86_64-linux-gnu.so", "csrc/left.so",
                 "clp/__pycache__/cli.cpython-311.pyc", "csrc/__pycache__/left.pyc"):  # fmt: skip
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"")
    hook = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    python("-c", hook, cwd=copy, CXX="/nonexistent/compiler").check_returncode()
    with tarfile.open(next((copy / "dist").glob("*.tar.gz"))) as archive:
        members = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    packed = {name for name in members if not name.startswith("clp_steer.egg-info/")}
    assert packed == sources | {"PKG-INFO", "setup.cfg"}
    with zipfile.ZipFile(next((copy / "dist").glob("*.whl"))) as wheel:
        installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert installed == {name for name in sources if name.startswith(("clp/", "clp_kernels/"))}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf shows what a module needs")
def test_compiled_modules_need_neither_pytorch_nor_a_cuda_installation() -> None:
    """A wheel is used on machines without nvcc, and with any PyTorch."""
    built = sorted((ROOT / "clp_kernels").glob("_c*.so"))
    assert built
    for path in built:
        shown = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
        needed = re.findall(r"NEEDED.*\[(.*)\]", shown.stdout)
        assert needed and not [name for name in needed if re.search("torch|c10|cuda|python", name)]


# A Python that answers as another version does, and that makes an environment like itself.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    -c*) exec {real} -c 'import sys
sys.version_info, sys.version = ({minor},), "{version}"
exec(sys.argv[1])' "$2" ;;
    "-m venv")
        for folder; do :; done
        case "$*" in *--clear*) rm -rf "$folder" ;; esac
        mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python" ;;
    "-m pip") [ ! -e offline ] || exit 1 ;;
esac
echo "{version} $*" >> log
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on this machine")
class TestMakeDev:
    """`make dev` with fake Pythons, in a folder with a space in its name."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = tmp_path / "a folder"
        self.folder.mkdir()
        shutil.copy(ROOT / "Makefile", self.folder)
        for name in ("pyproject.toml", "constraints.txt", "setup.py", "CMakeLists.txt"):
            (self.folder / name).write_text("")
            os.utime(self.folder / name, (0, 0))
        for version in ("3.9", "3.12", "3.13", "3.15"):
            program = tmp_path / ("python3" if version == "3.9" else f"python{version}")
            minor = version.replace(".", ", ")
            text = FAKE_PYTHON.format(real=sys.executable, version=version, minor=minor)
            program.write_text(text)
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        # What `make test PYTHON=...` hands to the make of a test.
        for name in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PYTHON"):
            monkeypatch.delenv(name, raising=False)

    def make(self, *arguments: str) -> tuple[int, list[str], list[str]]:
        """Exit status, what ran (who made an environment or installed), lines of stderr."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        command = ["make", "dev", *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        lines = log.read_text().splitlines() if log.is_file() else []
        steps = [" ".join(line.split()[:3]) for line in lines if "clp_kernels.info" not in line]
        return done.returncode, steps, done.stderr.splitlines()

    def test_an_unsupported_python_is_refused_before_anything_is_made(self) -> None:
        status, ran, errors = self.make()
        assert (status, ran) == (2, [])
        assert errors[0] == (
            "clp needs Python 3.11 to 3.14, python3 is Python 3.9: name another one, as in "
            "make dev PYTHON=python3.12"
        )
        assert not (self.folder / ".venv").exists()
        status, ran, errors = self.make("PYTHON=python3.15")
        assert (status, ran) == (2, [])
        assert errors[0].startswith("clp needs Python 3.11 to 3.14, python3.15 is Python 3.15:")
        # The next one starts over, and what it made is kept whatever python3 is.
        built = ["3.12 -m venv", "3.12 -m pip"]
        assert self.make("PYTHON=python3.12") == (0, built, [])
        assert self.make() == (0, [], [])

    def test_a_python_that_does_not_exist(self) -> None:
        status, ran, errors = self.make("PYTHON=python3.99")
        assert (status, ran) == (2, [])
        assert re.search("python3.99: (not found|No such file)", errors[0])
        assert not (self.folder / ".venv").exists()

    def test_another_python_starts_over(self) -> None:
        assert self.make("PYTHON=python3.12")[0] == 0
        (self.folder / ".venv" / "of 3.12").touch()
        assert self.make("PYTHON=python3.12") == (0, [], [])
        assert self.make("PYTHON=python3.13") == (0, ["3.13 -m venv", "3.13 -m pip"], [])
        assert not (self.folder / ".venv" / "of 3.12").exists()
        # One that cannot be used leaves what there is.
        assert self.make("PYTHON=python3")[:2] == (2, [])
        assert self.make() == (0, [], [])

    def test_an_interrupted_run_starts_over(self) -> None:
        (self.folder / "offline").touch()
        assert self.make("PYTHON=python3.12")[:2] == (2, ["3.12 -m venv"])
        (self.folder / ".venv" / "half").touch()
        (self.folder / "offline").unlink()
        assert self.make("PYTHON=python3.13") == (0, ["3.13 -m venv", "3.13 -m pip"], [])
        assert not (self.folder / ".venv" / "half").exists()

    def test_a_change_of_what_it_is_made_from_installs_again(self) -> None:
        assert self.make("PYTHON=python3.12")[0] == 0
        os.utime(self.folder / ".venv" / ".ready", (1, 1))
        os.utime(self.folder / "constraints.txt", (2, 2))
        assert self.make() == (0, ["3.12 -m pip"], [])
        assert self.make() == (0, [], [])

    def test_an_environment_whose_python_is_gone_starts_over(self, tmp_path: Path) -> None:
        """As after an upgrade of the system's Python: .venv/bin/python is a link to nothing."""
        assert self.make("PYTHON=python3.12")[0] == 0
        python = self.folder / ".venv" / "bin" / "python"
        python.unlink()
        python.symlink_to(tmp_path / "gone")
        shutil.copy(tmp_path / "python3.13", tmp_path / "python3")
        assert self.make()[:2] == (0, ["3.13 -m venv", "3.13 -m pip"])

    def test_a_demo_with_an_unsupported_python_keeps_the_last_one(self) -> None:
        assert self.make("PYTHON=python3.12")[0] == 0
        picture = self.folder / "runs" / "demo" / "pareto.png"
        picture.parent.mkdir(parents=True)
        picture.touch()
        done = subprocess.run(
            ["make", "demo", "PYTHON=python3.15"], cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 2 and "python3.15 is Python 3.15" in done.stderr
        assert picture.exists()
        assert self.make() == (0, [], [])
