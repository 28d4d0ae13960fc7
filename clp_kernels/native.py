"""Loads the compiled modules once and launches their kernels.

`_cpu` and `_cuda` are imported when first asked for, `_cuda` only where PyTorch sees a GPU. Where a
module is missing, `cpu_missing` and `cuda_missing` say why in a sentence. The launchers take
pointers only after shapes, dtypes, devices and layout have been checked here; the values (NaN,
ranges) are the caller's business.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MODES = ("geometric", "probability")
_REBUILD = "reinstall from source with a C++17 compiler, and nvcc for the GPU"


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why it is missing)."""
    try:
        module = importlib.import_module(f"clp_kernels.{name}")
    except ModuleNotFoundError:
        return None, f"clp_kernels.{name} has not been built; {_REBUILD}"
    except ImportError as error:
        return None, f"clp_kernels.{name} does not load: {error}"
    if name == "_cpu":
        module.isa()  # raises where the environment names an instruction set that is not here
    return module, None


def cpu_missing() -> str | None:
    """None where the CPU kernels can run, else a sentence that says why not.

    Raises:
        ValueError: CLP_KERNELS_CPU_ISA names no instruction set, or one this machine lacks.
    """
    return _load("_cpu")[1]


@cache
def cuda_missing() -> str | None:
    """None where the CUDA kernels can run, else a sentence that says why not."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.version.cuda is None:
        return "this PyTorch drives its GPUs with ROCm, the kernels are CUDA"
    module, reason = _load("_cuda")
    if module is None:
        return reason
    capability = torch.cuda.get_device_capability()
    if not any(_runs_on(built, capability) for built in module.ARCHITECTURES):
        built_for = ", ".join(module.ARCHITECTURES)
        return f"clp_kernels._cuda is built for {built_for}, the GPU has capability {capability}"
    return None


def cpu() -> Any:
    """The module clp_kernels._cpu. Raises RuntimeError, with the reason, where it is missing."""
    module, reason = _load("_cpu")
    return _present(module, reason)


def cuda() -> Any:
    """The module clp_kernels._cuda. Raises RuntimeError, with the reason, where it is missing."""
    return _present(_load("_cuda")[0], cuda_missing())


def has_native_gemm(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of this dtype at full speed in PyTorch."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def _present(module: ModuleType | None, reason: str | None) -> Any:
    if reason is not None:
        raise RuntimeError(reason)
    return module


def _runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for "sm_80" runs there: same major, same or later minor ("sm_90a": equal)."""
    digits = built.removeprefix("sm_").rstrip("a")
    major, minor = int(digits[:-1]), int(digits[-1])
    if built.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def dtype_why_not(t: Tensor) -> str | None:
    """None where the compiled kernels read this dtype, else a sentence."""
    if t.dtype in DTYPES:
        return None
    return f"the compiled kernels read float32, bfloat16 and float16, not {t.dtype}"


def isa() -> str:
    """The instruction set of the CPU kernels in use: scalar, avx2, avx512 or avx512_bf16.

    Raises:
        RuntimeError: the CPU kernels are missing.
        ValueError: CLP_KERNELS_CPU_ISA names no instruction set, or one this machine lacks.
    """
    name: str = cpu().isa()
    return name


def sample_cpu(
    logits: Tensor,
    weights: Tensor | None,
    mode: str,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """`clp_kernels.sample` without filters, on CPU tensors.

    Args:
        logits: [m, B, V] float32, bfloat16 or float16. Any strides for m and B; copied where the
            last axis is not contiguous.
        weights: [B, m] float32, or None when m is 1.
        mode: "geometric" or "probability".
        temperature: [B] float32, finite and >= 0; 0 is greedy.
        seed, position: [B] int64.
        isa: an instruction set for this call (see `isa`); "" for the one in use.

    Returns:
        tokens int64 [B] (-1: a NaN or +inf, or nothing finite), logprobs float32 [B] (NaN there).

    Deterministic; a row's bits depend neither on the other rows, nor on the number of threads, nor
    on the instruction set.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the CPU kernels are missing.
    """
    module = cpu()
    logits, rows = _check_sample("cpu", logits, weights, mode, temperature, seed, position)
    tokens, logprobs = _outputs(logits)
    arguments = _sample_arguments(logits, mode, rows)
    outputs = (tokens.data_ptr(), logprobs.data_ptr())
    module.sample(*arguments, *outputs, torch.get_num_threads(), isa)
    return tokens, logprobs


def sample_cuda(
    logits: Tensor,
    weights: Tensor | None,
    mode: str,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `sample_cpu`, on CUDA tensors, mode "geometric" only; reads nothing on the host.

    Enqueued on the current stream of the logits' device; works under CUDA graph capture.
    """
    module = cuda()
    if mode != "geometric":
        raise ValueError(f'mode must be "geometric" on the GPU, got {mode!r}')
    logits, rows = _check_sample("cuda", logits, weights, mode, temperature, seed, position)
    tokens, logprobs = _outputs(logits)
    if logits.shape[1] == 0:
        return tokens, logprobs
    arguments = _sample_arguments(logits, mode, rows)
    size = module.sample_workspace(logits.shape[1], logits.shape[2])
    workspace = torch.empty(size, dtype=torch.uint8, device=logits.device)
    stream = torch.cuda.current_stream(logits.device).cuda_stream
    outputs = (tokens.data_ptr(), logprobs.data_ptr(), workspace.data_ptr())
    module.sample(*arguments, *outputs, logits.device.index, stream)
    return tokens, logprobs


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    batch = logits.shape[1]
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    return tokens, torch.empty(batch, dtype=torch.float32, device=logits.device)


def _check_sample(
    kind: str,
    logits: Tensor,
    weights: Tensor | None,
    mode: str,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Logits with a contiguous last axis, and (weights, temperature, seed, position) contiguous."""
    if logits.dim() != 3 or logits.shape[0] == 0 or logits.shape[2] == 0:
        raise ValueError(f"logits must be [m, B, V] with m and V > 0, got {list(logits.shape)}")
    if logits.device.type != kind:
        raise ValueError(f"logits must be on a {kind} device, got {logits.device}")
    if logits.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"logits must be one of {names}, got {logits.dtype}")
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    m, batch, vocab_size = logits.shape
    if weights is None and m != 1:
        raise ValueError(f"weights must be [B, m] where m > 1, got None with m = {m}")
    if vocab_size > 1 and logits.stride(2) != 1:
        logits = logits.contiguous()
    device = logits.device
    if weights is not None:
        weights = _rows("weights", weights, (batch, m), torch.float32, device)
    return logits, (
        weights,
        _rows("temperature", temperature, (batch,), torch.float32, device),
        _rows("seed", seed, (batch,), torch.int64, device),
        _rows("position", position, (batch,), torch.int64, device),
    )


def _rows(
    name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the logits, got {value.device}")
    return value if value.is_contiguous() else value.contiguous()


def _sample_arguments(
    logits: Tensor, mode: str, rows: tuple[Tensor | None, ...]
) -> tuple[Any, ...]:
    pointers = [0 if row is None else row.data_ptr() for row in rows]
    shape = (*logits.shape, logits.stride(0), logits.stride(1))
    head = (logits.data_ptr(), DTYPES[logits.dtype], *shape, pointers[0], mode == "probability")
    return (*head, *pointers[1:])
