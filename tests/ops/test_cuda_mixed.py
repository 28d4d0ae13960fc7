"""mixed_lora and mixed_linear on the backend "cuda" without a GPU: plans, reasons, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clp_kernels import mixed_linear, mixed_lora, native
from clp_kernels.ops.mixed_linear import cuda as cuda_mixed_linear
from clp_kernels.ops.mixed_linear import reference as linear_reference
from clp_kernels.ops.mixed_lora import cuda as cuda_mixed_lora
from clp_kernels.ops.mixed_lora import reference as lora_reference
from clp_kernels.testing import noncontiguous


def arguments_of(tokens: int, options: dict[str, Any], **shapes: tuple[int, ...]) -> dict[str, Any]:
    """Zeros of these shapes between x and weights [tokens, 2], bfloat16 unless told otherwise."""
    options = {"dtype": torch.bfloat16, **options}
    made: dict[str, Any] = {name: torch.zeros(shape, **options) for name, shape in shapes.items()}
    made["weights"] = torch.zeros(tokens, 2, device=options.get("device"))
    return {**made, "example_ids": None, "invariant": False}


def lora_arguments(tokens: int = 3, in_features: int = 16, **options: Any) -> dict[str, Any]:
    """Of mixed_lora: m = 2, r = 4, 5 outputs."""
    return arguments_of(
        tokens, options, x=(tokens, in_features), base_weight=(5, in_features),
        lora_A=(2, 4, in_features), lora_B=(2, 5, 4), bias=(5,),
    )  # fmt: skip


def linear_arguments(tokens: int = 3, in_features: int = 16, **options: Any) -> dict[str, Any]:
    """Of mixed_linear: m = 2, 5 outputs."""
    return arguments_of(
        tokens, options, x=(tokens, in_features), expert_weight=(2, 5, in_features), bias=(2, 5)
    )


def public(op: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The public function on the arguments of a launcher."""
    return op(**{k: v for k, v in arguments.items() if k != "invariant"}, backend="cuda")


OPS: list[tuple[Callable[..., str | None], Callable[..., Any], Callable[..., dict[str, Any]]]] = [
    (
        lambda **args: cuda_mixed_lora.why_not(lora_reference.Inputs(**args)),
        mixed_lora,
        lora_arguments,
    ),
    (
        lambda **args: cuda_mixed_linear.why_not(linear_reference.Inputs(**args)),
        mixed_linear,
        linear_arguments,
    ),
]
IDS = ["mixed_lora", "mixed_linear"]


@pytest.mark.parametrize(
    ("in_features", "out_features", "wanted"),
    [
        (4096, 4096, (2, 8)),
        (4096, 1024, (8, 8)),
        (4096, 14_336, (1, 8)),
        (2048, 2048, (4, 4)),
        (1024, 4096, (2, 2)),
        (1016, 4096, (1, 1)),
        (8, 1, (1, 1)),
        (0, 0, (1, 1)),
    ],
)
def test_plan(in_features: int, out_features: int, wanted: tuple[int, int]) -> None:
    assert cuda_mixed_lora.plan(in_features, out_features, clusters=True) == wanted
    assert cuda_mixed_lora.plan(in_features, out_features, clusters=False) == (1, 1)


def test_splits_are_cluster_sizes() -> None:
    for blocks in range(1, 300):
        for in_features in range(0, 20_000, 248):
            parts = cuda_mixed_lora.splits(blocks, in_features, clusters=True)
            assert parts in (1, 2, 4, 8)
            assert parts == 1 or in_features >= parts * cuda_mixed_lora.MIN_FEATURES


@pytest.mark.parametrize(("why_not", "run", "arguments"), OPS, ids=IDS)
def test_not_on_a_gpu(why_not: Any, run: Any, arguments: Any) -> None:
    assert why_not(**arguments()) == "the tensors are on cpu, not on a GPU"
    with pytest.raises(RuntimeError, match="the tensors are on cpu, not on a GPU"):
        public(run, arguments())


@pytest.mark.parametrize(("why_not", "run", "arguments"), OPS, ids=IDS)
def test_why_not(why_not: Any, run: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        ready = arguments(device="cuda")
        monkeypatch.setattr(native, "cuda_missing", lambda: "clp_kernels._cuda has not been built")
        assert why_not(**ready) == "clp_kernels._cuda has not been built"
        monkeypatch.setattr(native, "cuda_missing", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        assert why_not(**ready) == (
            "the cuda kernels need more shared memory than compute capability (8, 9) has"
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert why_not(**ready) is None
        assert why_not(**arguments(256, device="cuda")) is None
        assert why_not(**arguments(device="cuda", dtype=torch.float16)) is None
        assert why_not(**arguments(device="cuda", dtype=torch.float32)) == (
            "the cuda kernels read bfloat16 and float16, not torch.float32"
        )
        assert why_not(**{**ready, "weights": ready["weights"].double()}) == (
            "the cuda kernels read float32 weights, not torch.float64"
        )
        assert why_not(**arguments(in_features=12, device="cuda")) == (
            "the cuda kernels need in_features to be a multiple of 8, it is 12"
        )
        assert why_not(**arguments(257, device="cuda")) == (
            "the cuda kernels decode up to 256 tokens, there are 257"
        )
        stacked = {**ready, "x": torch.zeros(3, 86, 16, dtype=torch.bfloat16, device="cuda")}
        assert why_not(**stacked) == "the cuda kernels decode up to 256 tokens, there are 258"


BAD: dict[Callable[..., Any], list[tuple[str, Tensor, type[Exception], str]]] = {
    mixed_lora: [
        ("weights", torch.zeros(2, 2), ValueError, r"weights must have shape \[3, 2\]"),
        ("weights", torch.zeros(3, 3), ValueError, r"weights must have shape \[3, 2\]"),
        ("lora_A", torch.zeros(8, 16).bfloat16(), ValueError, "lora_A must have shape"),
        ("base_weight", torch.zeros(5, 8).bfloat16(), ValueError, "base_weight must have shape"),
        ("base_weight", torch.zeros(5, 16), TypeError, "base_weight must be torch.bfloat16"),
        ("lora_A", torch.zeros(2, 4, 8).bfloat16(), ValueError, "lora_A must have shape"),
        ("lora_A", torch.zeros(2, 4, 16).half(), TypeError, "lora_A must be torch.bfloat16 or"),
        ("lora_B", torch.zeros(2, 4, 4).bfloat16(), ValueError, r"lora_B must have .* \[2, 5, 4\]"),
        ("lora_B", torch.zeros(2, 5, 4), TypeError, "lora_B must be torch.bfloat16"),
        ("bias", torch.zeros(6).bfloat16(), ValueError, r"bias must have shape \[5\]"),
        ("bias", torch.zeros(5), TypeError, "bias must be torch.bfloat16"),
        ("example_ids", torch.zeros(2, dtype=torch.int32), ValueError, "example_ids must have"),
        ("example_ids", torch.zeros(3, dtype=torch.int16), TypeError, "example_ids must be int32"),
        ("example_ids", torch.tensor([0, 3, 1]), ValueError, r"example_ids must lie in \[0, 3\)"),
    ],
    mixed_linear: [
        ("weights", torch.zeros(3, 3), ValueError, r"weights must have shape \[3, 2\]"),
        ("expert_weight", torch.zeros(5, 16).bfloat16(), ValueError, "expert_weight must have"),
        ("expert_weight", torch.zeros(2, 5, 8).bfloat16(), ValueError, "expert_weight must have"),
        ("expert_weight", torch.zeros(2, 5, 16), TypeError, "expert_weight must be torch.bfloat16"),
        ("bias", torch.zeros(5).bfloat16(), ValueError, r"bias must have shape \[2, 5\]"),
        ("bias", torch.zeros(2, 5), TypeError, "bias must be torch.bfloat16"),
        ("example_ids", torch.zeros(3, dtype=torch.int16), TypeError, "example_ids must be int32"),
    ],
}


@pytest.mark.parametrize(
    ("run", "name", "value", "error", "message"),
    [(run, *case) for run, cases in BAD.items() for case in cases],
)
def test_errors(run: Any, name: str, value: Any, error: type[Exception], message: str) -> None:
    arguments = lora_arguments() if run is mixed_lora else linear_arguments()
    with pytest.raises(error, match=message):
        public(run, {**arguments, name: value})


def test_no_tokens_need_no_gpu() -> None:
    y, u = cuda_mixed_lora.mixed_lora(lora_reference.Inputs(**lora_arguments(0)))
    assert y.shape == (0, 5) and u.shape == (0, 8) and u.dtype == torch.float32
    inputs = linear_reference.Inputs(**linear_arguments(0))
    assert cuda_mixed_linear.mixed_linear(inputs).shape == (0, 5)


def test_aligned_copies_only_what_needs_it() -> None:
    matrix = torch.randn(6, 32).bfloat16()
    for whole in (matrix, matrix[1:], matrix[:, :16], matrix[:, 8:24], matrix[:1].expand(4, 32)):
        assert cuda_mixed_lora.aligned(whole) is whole
    wide = torch.randn(6, 36).bfloat16()
    for part in (matrix[:, 1:], matrix.t(), noncontiguous(matrix), wide[:, :32], wide[:, 4:]):
        copy = cuda_mixed_lora.aligned(part)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0
        assert torch.equal(copy, part)
    float32 = torch.randn(6, 4)
    assert cuda_mixed_lora.aligned(float32) is float32
