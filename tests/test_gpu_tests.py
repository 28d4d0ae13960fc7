"""What of tests/gpu can be held without a GPU: its tests of errors, and its names."""

import ast
import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import gpu
from clp_kernels import native, registry

FOLDER = Path(__file__).parent / "gpu"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _error_tests() -> list[Any]:
    """(module, arguments) of each test_errors, with what it is parametrized with."""
    found = []
    for path in sorted(FOLDER.glob("test_*.py")):
        if "def test_errors" in path.read_text(encoding="utf-8"):
            marks = getattr(_module(path.stem).test_errors, "pytestmark", [])
            given = [list(mark.args[1]) for mark in marks if mark.name == "parametrize"]
            found += [(path.stem, (value,)) for values in given for value in values]
            found += [] if given else [(path.stem, ())]
    return found


@pytest.mark.parametrize("name, arguments", _error_tests())
def test_errors_of_the_gpu_tests_come(
    name: str, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are raised before a kernel runs: fake tensors stand in for those of a GPU."""
    module = _module(name)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(native, "cuda_missing", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))

    def choose(op: str, *args: Any) -> None:
        """As a tensor of a GPU, and not to the op's fake: the backend is chosen."""
        registry.chosen(op, args)
        raise AssertionError("no error before the kernel")

    for op in registry.BACKENDS:
        monkeypatch.setattr(torch.ops.clp_kernels, op, partial(choose, op))
    mode = FakeTensorMode()

    def on_gpu(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device="cuda")

    make = "inputs" if hasattr(module, "inputs") else "on_gpu"
    made = getattr(module, make)

    def inputs(*args: Any, **options: Any) -> dict[str, Any]:
        return {key: on_gpu(value) for key, value in made(*args, **options).items()}

    monkeypatch.setattr(module, make, inputs)
    with mode:
        module.test_errors(*arguments)


def test_no_graph_is_captured_under_the_sanitizer() -> None:
    """Which runs without PyTorch's allocator, that a capture needs: names tell them apart."""
    assert "not graph" in gpu.SANITIZED
    found = []
    for path in sorted(FOLDER.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            source = ast.get_source_segment(text, node) or ""
            captures = "CUDAGraph(" in source or "assert_graph_replays(" in source
            if isinstance(node, ast.FunctionDef) and captures:
                found.append(node.name)
    assert len(found) >= 5 and all("graph" in name for name in found)
