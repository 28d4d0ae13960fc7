"""Loading the compiled modules, and which instruction set and architecture they run on."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from cases import CPU_KERNELS, ISAS
from processes import python

from clp_kernels import native
from clp_kernels.ops.sample import cpu as cpu_sample
from clp_kernels.ops.sample import cuda as cuda_sample
from clp_kernels.ops.sample.reference import Inputs

pytestmark = CPU_KERNELS


def arguments() -> Inputs:
    """Of a draw of one row."""
    row = torch.ones(1, dtype=torch.int64)
    logits, temperature = torch.randn(1, 1, 5), torch.ones(1)
    return Inputs(logits, None, "geometric", temperature, None, None, None, row, row)


@pytest.mark.parametrize("isa", ISAS)
def test_environment_chooses_the_instruction_set(isa: str) -> None:
    code = "from clp_kernels import native; print(native.isa())"
    assert python("-c", code, CLP_KERNELS_CPU_ISA=isa).stdout.strip() == isa


def test_environment_rejects_an_unknown_instruction_set() -> None:
    code = "from clp_kernels import native; native.cpu_missing()"
    errors = python("-c", code, CLP_KERNELS_CPU_ISA="sse9").stderr
    known = "scalar, avx2, avx512, avx512_bf16"
    assert issubclass(native.BackendError, ValueError)
    assert f"BackendError: CLP_KERNELS_CPU_ISA must be one of {known}, got 'sse9'" in errors


def test_import_loads_no_compiled_module() -> None:
    code = (
        "import sys; from clp_kernels import native;"
        "print([n for n in sys.modules if n in ('clp_kernels._cpu', 'clp_kernels._cuda')])"
    )
    assert python("-c", code).stdout.strip() == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_missing_without_a_gpu() -> None:
    assert native.cuda_missing() == "PyTorch sees no CUDA device"
    with pytest.raises(RuntimeError, match="PyTorch sees no CUDA device"):
        cuda_sample.sample(arguments())


def test_each_gpu_has_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two unlike ones in a machine: what the current one lacks says nothing of the other."""
    capabilities = [(9, 0), (7, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    module = SimpleNamespace(ARCHITECTURES=("sm_80", "sm_90a"))
    monkeypatch.setattr(native, "load", lambda name: (module, None))
    old = "clp_kernels._cuda is built for sm_80, sm_90a, the GPU has capability (7, 0)"
    native.cuda_missing_on.cache_clear()
    try:
        for current in (0, 1):
            monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
            assert native.cuda_missing(torch.device("cuda:0")) is None
            assert native.cuda_missing(torch.device("cuda:1")) == old
            for device in (None, torch.device("cuda")):
                assert native.cuda_missing(device) == (old if current else None)
            assert native.cuda() is module
    finally:
        native.cuda_missing_on.cache_clear()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ModuleNotFoundError("No module named 'clp_kernels._cpu'"), "has not been built"),
        (ImportError("undefined symbol: x"), "does not load: undefined symbol: x"),
    ],
)
def test_missing_module_says_why(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, sentence: str
) -> None:
    monkeypatch.setattr(native.importlib, "import_module", Mock(side_effect=error))
    native.load.cache_clear()
    try:
        assert sentence in str(native.cpu_missing())
        with pytest.raises(RuntimeError, match=r"clp_kernels\._cpu"):
            cpu_sample.sample(arguments())
    finally:
        native.load.cache_clear()


def draw_by_name(**changed: object) -> None:
    _, given = cpu_sample.arguments(arguments())
    given |= {"num_threads": 1, "isa": ""} | changed
    native.cpu().sample(**{k: v for k, v in given.items() if v is not ...})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temprature": 1}, r"sample\(\) has no argument .temprature."),
        ({"top_k": ...}, r"sample\(\) needs the argument top_k"),
        ({"isa": ...}, r"sample\(\) needs the argument isa"),
        ({"probability": 1}, r"sample\(\) needs a bool as probability"),
        ({"dtype": torch.float64}, r"sample\(\) needs float32, bfloat16 or float16 as dtype"),
        ({"logits": [1.0]}, r"sample\(\) needs a tensor with storage, or None as logits"),
        ({"logits": torch.zeros(3, device="meta")}, r"sample\(\) needs a tensor with storage"),
        ({"m": "1"}, "integer"),
    ],
)
def test_arguments_are_bound_by_name(changed: dict[str, object], message: str) -> None:
    draw_by_name()
    with pytest.raises(TypeError, match=message):
        draw_by_name(**changed)
    with pytest.raises(TypeError, match=r"sample\(\) takes keyword arguments only"):
        native.cpu().sample(1)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (9, 1), False),
        ("sm_100", (10, 3), True),
        ("sm_100", (12, 0), False),
    ],
)
def test_architectures(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert native.runs_on(built, capability) == runs
