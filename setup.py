"""Builds the compiled modules with CMake and Ninja; everything else is in pyproject.toml.

Needs neither PyTorch nor a GPU. Where a tool is missing, the Python and Triton parts are installed
without the compiled ones and a line on stderr says so (pip shows it with -v); a compiler error is
an error. Environment:
    CXX                     the C++ compiler (default: c++, g++ or clang++ on the path)
    CUDACXX, CUDA_HOME      where nvcc is (default: on the path, then /usr/local/cuda)
    CLP_KERNELS_SKIP_CUDA   1: do not build clp_kernels._cuda; 0 or empty: as if it were not set
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class MissingTool(Exception):
    """Something that is needed to compile is not on this machine."""


def say(text: str) -> None:
    print(f"clp-steer: {text}", file=sys.stderr, flush=True)


def find_compiler() -> str:
    named = os.environ.get("CXX")
    if named:
        if shutil.which(shlex.split(named)[0]):
            return named
        raise MissingTool(f"no C++ compiler: CXX names {named!r}, which does not exist")
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise MissingTool("no C++ compiler: neither c++, g++ nor clang++ is on the path")


def find_program(name: str) -> str:
    """The one of the Python package (a pinned build requirement), else the system's."""
    if spec := importlib.util.find_spec(name):
        inside = [Path(f) / "data" / "bin" / name for f in spec.submodule_search_locations or ()]
        for path in (*inside, Path(sys.executable).with_name(name)):
            if path.is_file():
                return str(path)
    if path := shutil.which(name):
        return path
    raise MissingTool(f"no {name}: neither the Python package nor a program on the path")


def find_pybind11() -> str:
    """Its include folder; PyTorch carries a copy, which does where the package is not installed."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            include = Path(folder) / "include"
            if (include / "pybind11" / "pybind11.h").is_file():
                return str(include)
    raise MissingTool("no pybind11 headers: neither the pybind11 package nor PyTorch has them")


def find_nvcc() -> str:
    skip = os.environ.get("CLP_KERNELS_SKIP_CUDA", "")
    if skip not in ("", "0", "1"):
        raise SystemExit(f"clp-steer: CLP_KERNELS_SKIP_CUDA must be 0 or 1, got {skip!r}")
    if skip == "1":
        raise MissingTool("CLP_KERNELS_SKIP_CUDA=1")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home]
    named = os.environ.get("CUDACXX")
    for place in [named] if named else [*places, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if path := shutil.which(place):
            return path
    raise MissingTool(
        f"no nvcc{f': CUDACXX names {named!r}, which does not exist' if named else ''}"
    )


class CMakeBuild(build_ext):
    """Replaces the compilation of the two extensions by one CMake run."""

    def run(self) -> None:
        try:
            tools = [find_program("cmake"), find_program("ninja"), find_pybind11(), find_compiler()]
        except MissingTool as reason:
            say(f"{reason}. Skipping the compiled parts: clp_kernels._cpu and clp_kernels._cuda.")
            self.extensions = []
            return
        try:
            nvcc = find_nvcc()
        except MissingTool as reason:
            say(f"{reason}. Skipping clp_kernels._cuda.")
            nvcc = None
            self.extensions = [e for e in self.extensions if e.name != "clp_kernels._cuda"]
        self.modules = self.build_modules(*tools, nvcc)
        super().run()

    def build_modules(
        self, cmake: str, ninja: str, pybind11: str, compiler: str, nvcc: str | None
    ) -> Path:
        folder = (Path(self.build_temp) / "cmake").resolve()
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCLP_PYBIND11_INCLUDE={pybind11}",
            f"-DCLP_CUDA={'ON' if nvcc else 'OFF'}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
        ]
        # CMake keeps the first compiler it saw; another command line starts afresh.
        stamp, line = folder / "configured.txt", shlex.join([compiler, *configure])
        if not stamp.is_file() or stamp.read_text() != line:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        environment = {**os.environ, "CXX": compiler}
        for command in (configure, [cmake, "--build", str(folder)]):
            if subprocess.run(command, env=environment).returncode != 0:
                raise SystemExit(
                    f"clp-steer: this command failed, see above: {shlex.join(command)}"
                )
        stamp.write_text(line)
        return folder / "modules"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.modules / target.name, target)
        say(f"built {ext.name}")


setup(
    ext_modules=[Extension("clp_kernels._cpu", []), Extension("clp_kernels._cuda", [])],
    cmdclass={"build_ext": CMakeBuild},
)
