"""Who may import whom, what `import clp_kernels` loads, and that the README's commands exist."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("clp_kernels", "clp", "bench", "tests", "scripts")


def python_files(*packages: str) -> list[Path]:
    return sorted(p for package in packages for p in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST, package: str, *, at_import_time: bool) -> Iterator[tuple[str, int]]:
    """(module, line) of every import; with `at_import_time`, of those outside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield package if node.level else origin, node.lineno
        elif at_import_time and isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        ):
            continue
        else:
            yield from imports(node, package, at_import_time=at_import_time)


def offences(package: str, forbidden: set[str], *, at_import_time: bool) -> list[str]:
    found = []
    for path in python_files(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module, line in imports(tree, package, at_import_time=at_import_time):
            if module.split(".")[0] in forbidden:
                found.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    return found


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
    assert not offences(package, forbidden, at_import_time=False)


def test_clp_kernels_loads_no_model_library() -> None:
    heavy = {"transformers", "peft", "matplotlib", "accelerate", "datasets"}
    assert not offences("clp_kernels", heavy, at_import_time=True)


def test_testing_needs_only_torch_and_the_standard_library() -> None:
    tree = ast.parse((ROOT / "clp_kernels" / "testing.py").read_text(encoding="utf-8"))
    names = {m.split(".")[0] for m, _ in imports(tree, "clp_kernels", at_import_time=False)}
    assert names - sys.stdlib_module_names == {"torch"}


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
    everything = [m for m, _ in imports(tree, "clp", at_import_time=False)]
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
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_no_file_has_a_name_that_explains_nothing() -> None:
    nameless = re.compile(r"_?(utils?|common|helpers?|misc|base)\.py")
    assert not [p for p in python_files(*PACKAGES) if nameless.fullmatch(p.name)]


# The README.


def commands(markdown: str) -> list[list[str]]:
    """Each command of the ```bash blocks as words, without prompts, comments and variables."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", markdown, flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split, words = True, []
            for token in [*lexer, ";"]:
                if token and set(token) <= set("&|;()"):
                    while words and re.fullmatch(r"\w+=.*", words[0]):
                        words.pop(0)
                    if words:
                        found.append(words)
                    words = []
                else:
                    words.append(token)
    return found


def unknown(words: list[str]) -> str | None:
    """What a command names that is not there: a make target, a clp command or a module."""
    from clp.cli import COMMANDS

    program = words[0].rsplit("/", 1)[-1]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([\w.-]+):(?!=)", makefile, flags=re.M))
        asked = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
        return next((t for t in asked if t not in targets), None)
    if program == "clp" and len(words) > 1 and not words[1].startswith("-"):
        return None if words[1] in COMMANDS else words[1]
    if program.startswith("python") and words[1:2] == ["-m"]:
        path = ROOT / words[2].replace(".", "/")
        if path.parts[len(ROOT.parts)] not in PACKAGES:
            return None
        here = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        return None if here else words[2]
    return None


def test_readme_commands_exist() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README.md yet")
    found = commands(readme.read_text(encoding="utf-8"))
    assert found, "README.md shows no command in a ```bash block"
    assert not [words for words in found if unknown(words)]


def test_the_readme_scan_sees_what_it_must() -> None:
    text = """
```bash
make dev           # the environment
$ SEED=1 make demo RUN=runs/a && .venv/bin/clp sample runs/a "Once; a time" \\
    --weights joy=1
```
```python
make nothing
```
"""
    sample = [".venv/bin/clp", "sample", "runs/a", "Once; a time", "--weights", "joy=1"]
    assert commands(text) == [["make", "dev"], ["make", "demo", "RUN=runs/a"], sample]
    assert [unknown(words) for words in commands(text)] == [None, None, None]
    assert unknown(["make", "-s", "nothing"]) == "nothing"
    assert unknown(["clp", "fly", "runs/a"]) == "fly"
    assert unknown(["python", "-m", "clp_kernels.nothing"]) == "clp_kernels.nothing"
    assert unknown(["python", "-m", "clp_kernels.info"]) is None
    assert unknown(["python", "-m", "pip", "install", "."]) is None
