"""Who may import whom, what `import clp_kernels` loads, and that what is imported is declared."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import python

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("clp_kernels", "clp", "bench", "tests", "scripts")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def python_files(*packages: str) -> list[Path]:
    return sorted(p for package in packages for p in (ROOT / package).rglob("*.py"))


def imports(
    tree: ast.AST, package: str, *, at_import_time: bool = False
) -> Iterator[tuple[str, int]]:
    """(module, line) of every import; with `at_import_time`, of those outside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield package if node.level else origin, node.lineno
        elif not (at_import_time and isinstance(node, FUNCTIONS)):
            yield from imports(node, package, at_import_time=at_import_time)


def offences(package: str, forbidden: set[str], *, at_import_time: bool = False) -> list[str]:
    found = []
    for path in python_files(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module, line in imports(tree, package, at_import_time=at_import_time):
            if module.split(".")[0] in forbidden:
                found.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    return found


# The map of the packages. A part imports its own files and the parts to the left of it in its line;
# clp imports clp_kernels; bench and tests import both, and nothing imports them.
PARTS = (
    ("clp_kernels", "checks files native invariant registry testing trust", "ops", "nn", "peft"),
    ("clp_kernels", "checks files native invariant registry testing trust", "ops", "selftest"),
    ("clp", "data", "policies", "rewards", "engine", "training", "methods", "evaluation", "cli"),
    ("clp", "data", "policies", "rewards", "engine", "serving", "cli"),
)
# An op may use the reference and the kernels of these others.
OPS = {"mixed_linear": {"mixed_lora"}, "linear_logprob": {"mixed_lora", "mixed_linear"},
       "sample": {"mix_logits"}}  # fmt: skip
ROOT_FILES = {
    "clp_kernels": {
        "__init__",
        "checks",
        "files",
        "info",
        "invariant",
        "native",
        "registry",
        "testing",
        "trust",
    },
    "clp": {"__init__", "rewards"},
}
# Who alone may import these, at any time.
ALONE = {
    "tyro": ("clp/cli",),
    "accelerate": ("clp/training/distributed.py",),
    # In training: what reward functions are given, and its layers that recompute.
    "transformers": (
        "clp/policies/",
        "clp/rewards.py",
        "clp/training/gradient_checkpointing.py",
        "clp/training/rollout.py",
        "clp/training/reward_functions.py",
        "clp/training/trainer.py",
    ),
}


def edges(package: str) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(file, its module, module that it imports) for every import inside a package."""
    for path in python_files(package):
        own = path.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # What is imported from a package may be a module of it.
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for module in modules:
                if module.split(".")[0] == package:
                    yield path, [*own, ""], [*module.split("."), ""]


@pytest.mark.parametrize("package", ["clp_kernels", "clp"])
def test_parts_import_what_is_to_their_left(package: str) -> None:
    order: dict[str, set[str]] = {}
    for _, *groups in (line for line in PARTS if line[0] == package):
        left: set[str] = set()
        for group in groups:
            left |= set(group.split())
            for one in group.split():
                order.setdefault(one, set()).update(left)
    wrong = []
    for path, own, module in edges(package):
        assert own[1] in order or own[1] in ROOT_FILES[package], f"{path} is in no part of the map"
        if own[1] in order and module[1] not in order[own[1]]:
            wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(module)}")
    assert not wrong


def test_ops_import_the_ops_that_they_are_made_of() -> None:
    wrong = []
    for path, own, module in edges("clp_kernels"):
        inside = own[1] == module[1] == "ops" and (ROOT / "clp_kernels/ops" / module[2]).is_dir()
        if inside and own[2] != module[2] and module[2] not in OPS.get(own[2], set()):
            wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(module)}")
    assert not wrong


@pytest.mark.parametrize("package", ["clp_kernels", "clp"])
def test_no_file_lies_beside_the_map(package: str) -> None:
    assert {p.stem for p in (ROOT / package).glob("*.py")} <= ROOT_FILES[package]


@pytest.mark.parametrize("library", ALONE)
def test_a_library_is_imported_in_one_place(library: str) -> None:
    found = offences("clp", {library}) + offences("clp_kernels", {library})
    assert not [line for line in found if not line.startswith(ALONE[library])]


@pytest.mark.parametrize(
    "package, forbidden",
    [
        ("clp_kernels", {"clp", "bench", "tests", "scripts"}),
        ("clp", {"bench", "tests", "scripts"}),
        ("bench", {"tests", "scripts"}),
    ],
)
def test_import_directions(package: str, forbidden: set[str]) -> None:
    """csrc <- clp_kernels <- clp; nothing imports bench or tests."""
    assert not offences(package, forbidden)


def test_clp_kernels_loads_no_model_library() -> None:
    heavy = {"transformers", "peft", "matplotlib", "accelerate", "datasets"}
    assert not offences("clp_kernels", heavy, at_import_time=True)


def test_testing_needs_only_torch_and_the_standard_library() -> None:
    tree = ast.parse((ROOT / "clp_kernels" / "testing.py").read_text(encoding="utf-8"))
    names = {m.split(".")[0] for m, _ in imports(tree, "clp_kernels")}
    assert names - sys.stdlib_module_names == {"torch"}


def declared(*extras: str) -> set[str]:
    """Names, normalised, of the distributions that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    return {normal(re.match(r"[\w.-]+", line)[0]) for names in lists for line in names}


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def imported(*packages: str) -> set[str]:
    """Names, normalised, of the distributions that the packages import anywhere."""
    providers = importlib.metadata.packages_distributions()
    here = {*PACKAGES, *sys.stdlib_module_names, *(p.stem for p in python_files(*PACKAGES))}
    modules = {
        module.split(".")[0]
        for path in python_files(*packages)
        for module, _ in imports(ast.parse(path.read_text(encoding="utf-8")), packages[0])
    }
    return {normal(providers.get(module, [module])[0]) for module in modules - here}


def test_what_is_imported_is_declared() -> None:
    """And nothing else. The code asks whether triton is there, which PyTorch brings on Linux."""
    assert imported("clp", "clp_kernels") - {"triton"} == declared()


def test_what_the_tools_import_is_declared() -> None:
    """`dev` also holds commands, plugins and stubs that nothing imports."""
    peers = {"cut-cross-entropy", "flashinfer", "liger-kernel", "vllm"}  # bench asks for them first
    assert imported(*PACKAGES) - peers <= declared("dev")


def test_the_import_scan_sees_what_it_must() -> None:
    source = """
import os
try:
    import clp.train as t
except ImportError:
    from tests.x import y
class A:
    from peft import B
def f():
    import bench.timing
    from . import z
"""
    tree = ast.parse(source)
    loaded = [m for m, _ in imports(tree, "clp", at_import_time=True)]
    assert loaded == ["os", "clp.train", "tests.x", "peft"]
    everything = [m for m, _ in imports(tree, "clp")]
    assert everything == [*loaded, "bench.timing", "clp"]


def test_kernels_are_plain_cpp() -> None:
    """csrc includes no PyTorch header and calls no Python of this project."""
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".cu", ".h", ".cuh"}]
    pattern = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/|module_::import\(|PyImport_')
    assert files
    assert not [p.name for p in files if pattern.search(p.read_text(encoding="utf-8"))]


def test_import_is_light() -> None:
    """In a fresh interpreter, `import clp_kernels` loads torch and nothing else that is heavy."""
    heavy = ["transformers", "peft", "triton", "matplotlib", "scipy", "accelerate", "clp"]
    code = f"import sys, clp_kernels; print([m for m in {heavy} if m in sys.modules])"
    done = python("-c", code, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_no_file_has_a_name_that_explains_nothing() -> None:
    nameless = re.compile(r"_?(utils?|common|helpers?|misc|base)\.py")
    assert not [p for p in python_files(*PACKAGES) if nameless.fullmatch(p.name)]
