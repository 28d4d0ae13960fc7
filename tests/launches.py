"""Marks of the tests of Triton kernels, stand-ins that note their launches, and the variants.

A test module that imports this one is skipped if triton is not installed. The interpreter shows
indexing, masks, thresholds and the order of sums, not what a GPU does with them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from clp_kernels.ops.triton_launch import INTERPRETED

INTERPRETER = [
    pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 was not set at import"),
    # Small matrices: waking a second thread costs more than it brings.
    pytest.mark.usefixtures("one_thread"),
    # The interpreter warns where a test means inf and NaN to appear.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
TRITON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 hides the GPU"),
    pytest.mark.usefixtures("poisoned"),
]
KINDS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


class Recorder:
    """Notes the name of its kernel at a launch, and launches it."""

    def __init__(self, name: str, kernel: Any, launched: list[str]) -> None:
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 1
        self.launched.append(self.name.removesuffix("_kernel"))
        return self.kernel[grid]


class Witness:
    """Notes the variant that a launch would compile, and launches the kernel if `run` says so."""

    def __init__(self, kernel: Any, seen: set[Any], run: bool = False) -> None:
        self.kernel, self.seen, self.run = kernel, seen, run

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 1

        def launch(**arguments: Any) -> None:
            types, constexprs, options = {}, {}, {}
            for name, value in arguments.items():
                if name in OPTIONS:
                    options[name] = value
                elif value is None or name.isupper():
                    constexprs[name] = value
                elif isinstance(value, Tensor):
                    types[name] = KINDS[value.dtype]
            self.seen.add(variant_key(self.kernel.__name__, types, constexprs, options))
            if self.run:
                self.kernel[grid](**arguments)

        return launch


def variant_key(name: str, *parts: dict[str, Any]) -> Any:
    return (name, *(frozenset(part.items()) for part in parts))


def listed_keys(variants: list[Any]) -> set[Any]:
    """The keys of a list of variants, whose names must differ."""
    assert len({name for name, *_ in variants}) == len(variants)
    return {
        variant_key(
            kernel.__name__,
            {name: kind for name, kind in signature.items() if kind.startswith("*")},
            constexprs,
            options,
        )
        for _, kernel, signature, constexprs, options in variants
    }


def replace_kernels(
    monkeypatch: pytest.MonkeyPatch, module: Any, by: Callable[[str, Any], Any]
) -> None:
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, by(name, getattr(module, name)))
