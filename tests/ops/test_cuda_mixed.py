"""mixed_lora and mixed_linear on the backend "cuda" without a GPU: plans, reasons, errors."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import cases
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

OPS = {
    "mixed_lora": (mixed_lora, cuda_mixed_lora, lora_reference.Inputs),
    "mixed_linear": (mixed_linear, cuda_mixed_linear, linear_reference.Inputs),
}
each_op = pytest.mark.parametrize("op", OPS)


def arguments(op: str, tokens: int = 3, in_features: int = 16, **options: Any) -> dict[str, Any]:
    """Zeros for m = 2, r = 4 and 5 outputs, bfloat16 unless told otherwise."""
    sizes = {"in_features": in_features, "out_features": 5, "m": 2, "r": 4}
    case = SimpleNamespace(**sizes, bias=True, lora_dtype=None)

    def zeros(*shape: int, **_: Any) -> Tensor:
        return torch.zeros(shape, **{"dtype": torch.bfloat16, **options})

    made = {"x": zeros(tokens, in_features), **cases.mixed_tensors(op, case, zeros)}
    made["weights"] = torch.zeros(tokens, 2, device=options.get("device"))
    return {**made, "example_ids": None, "invariant": False}


def why_not(op: str, given: dict[str, Any]) -> str | None:
    _, backend, inputs = OPS[op]
    found: str | None = backend.why_not(inputs(**given))
    return found


def public(op: str, changed: dict[str, Any]) -> Any:
    """The public function on the arguments of a launcher."""
    given = {k: v for k, v in (arguments(op) | changed).items() if k != "invariant"}
    return OPS[op][0](**given, backend="cuda")


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


@each_op
def test_not_on_a_gpu(op: str) -> None:
    assert why_not(op, arguments(op)) == "the tensors are on cpu, not on a GPU"
    with pytest.raises(RuntimeError, match="the tensors are on cpu, not on a GPU"):
        public(op, {})


@each_op
def test_why_not(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = partial(arguments, op, device="cuda")
    with FakeTensorMode():
        ready = on_gpu()
        reason = "clp_kernels._cuda has not been built"
        monkeypatch.setattr(native, "cuda_missing", lambda *_: reason)
        assert why_not(op, ready) == reason
        monkeypatch.setattr(native, "cuda_missing", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        assert why_not(op, ready) == (
            "the cuda kernels need more shared memory than compute capability (8, 9) has"
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert why_not(op, ready) is None
        assert why_not(op, on_gpu(256)) is None
        assert why_not(op, on_gpu(dtype=torch.float16)) is None
        assert why_not(op, on_gpu(dtype=torch.float32)) == (
            "the cuda kernels read bfloat16 and float16, not torch.float32"
        )
        assert why_not(op, {**ready, "weights": ready["weights"].double()}) == (
            "the cuda kernels read float32 weights, not torch.float64"
        )
        assert why_not(op, on_gpu(in_features=12)) == (
            "the cuda kernels need in_features to be a multiple of 8, it is 12"
        )
        assert why_not(op, on_gpu(5000)) is None


@each_op
def test_too_slow(op: str) -> None:
    """What "auto" passes over, and a call that names the backend runs."""
    _, backend, inputs = OPS[op]
    ready = arguments(op)
    assert backend.too_slow(inputs(**ready)) is None
    assert backend.too_slow(inputs(**arguments(op, 32))) is None
    for given in (arguments(op, 33), {**ready, "x": torch.zeros(3, 11, 16).bfloat16()}):
        assert backend.too_slow(inputs(**given)) == (
            "the cuda kernels are for up to 32 tokens, there are 33"
        )
    matrix = "base_weight" if op == "mixed_lora" else "expert_weight"
    transposed = arguments(op)
    transposed[matrix] = transposed[matrix].mT.contiguous().mT
    assert backend.too_slow(inputs(**transposed)) == (
        f"the cuda kernels would copy {matrix} in each call: its rows are not contiguous, or not "
        "aligned to 16 bytes"
    )


BAD: dict[str, list[tuple[str, Tensor, type[Exception], str]]] = {
    "mixed_lora": [
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
    "mixed_linear": [
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
    ("op", "name", "value", "error", "message"),
    [(op, *bad) for op, every in BAD.items() for bad in every],
)
def test_errors(op: str, name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        public(op, {name: value})


def test_no_tokens_need_no_gpu() -> None:
    y, u = cuda_mixed_lora.mixed_lora(lora_reference.Inputs(**arguments("mixed_lora", 0)))
    assert y.shape == (0, 5) and u.shape == (0, 8) and u.dtype == torch.float32
    inputs = linear_reference.Inputs(**arguments("mixed_linear", 0))
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
