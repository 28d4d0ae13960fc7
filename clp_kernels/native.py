"""Loads the compiled modules once and launches their kernels.

`_cpu` and `_cuda` are imported when first asked for, `_cuda` only if PyTorch sees a GPU. If a
module is missing, `cpu_missing` and `cuda_missing` say why in a sentence. Their functions take
tensors (None for a null pointer), dtypes and numbers by name, and check none of them: shapes,
dtypes, devices and values are what the public ops have checked.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of clp::DType
_REBUILD = "reinstall from source with a C++17 compiler, and nvcc for the GPU"


class BackendError(RuntimeError, ValueError):
    """The backend that a call or the environment names does not exist, or cannot run the call."""


@cache
def load(name: str) -> tuple[ModuleType | None, str | None]:
    """A compiled module by name, once: (module, None), or (None, why it is missing).

    Raises:
        BackendError: CLP_KERNELS_CPU_ISA names no instruction set, or one this machine lacks.
    """
    try:
        module = importlib.import_module(f"clp_kernels.{name}")
        module.use_torch(_torch_objects())
    except ModuleNotFoundError:
        return None, f"clp_kernels.{name} has not been built; {_REBUILD}"
    except ImportError as error:
        return None, f"clp_kernels.{name} does not load: {error}"
    if name == "_cpu":
        try:
            module.isa()
        except ValueError as error:  # the environment names an instruction set that is not here
            raise BackendError(str(error)) from None
    return module, None


_dispatch_modes = torch._C._len_torch_dispatch_stack
_interpreter = torch._C._functorch.peek_interpreter_stack


def mode_active() -> bool:
    """Whether a dispatch mode, a functorch transform or forward-mode differentiation is active,
    which have to see every op."""
    return _dispatch_modes() > 0 or _interpreter() is not None or forward_ad._current_level >= 0


def _torch_objects() -> dict[str, Any]:
    """What csrc/bindings uses of PyTorch."""
    names = ("Tensor", "get_num_threads", "is_grad_enabled", "is_autocast_enabled")
    dtypes = ("float32", "bfloat16", "float16", "int64")
    return {
        **{name: getattr(torch, name) for name in (*names, *dtypes)},
        "Parameter": torch.nn.Parameter,
        "linear": torch.nn.functional.linear,
        "mode_active": mode_active,
    }


def cpu_missing() -> str | None:
    """None if the CPU kernels can run, else a sentence that says why not.

    Raises:
        BackendError: CLP_KERNELS_CPU_ISA names no instruction set, or one this machine lacks.
    """
    return load("_cpu")[1]


def cuda_missing(device: torch.device | None = None) -> str | None:
    """None if the CUDA kernels can run on a GPU (default: the current one), or why not."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    index = None if device is None else device.index
    return cuda_missing_on(torch.cuda.current_device() if index is None else index)


@cache
def cuda_missing_on(index: int) -> str | None:
    """`cuda_missing` for one GPU of this process."""
    if torch.version.cuda is None:
        return "this PyTorch drives its GPUs with ROCm, the kernels are CUDA"
    module, reason = load("_cuda")
    if module is None:
        return reason
    capability = torch.cuda.get_device_capability(index)
    if not any(runs_on(built, capability) for built in module.ARCHITECTURES):
        built_for = ", ".join(module.ARCHITECTURES)
        return f"clp_kernels._cuda is built for {built_for}, the GPU has capability {capability}"
    return None


def cpu() -> Any:
    """The module clp_kernels._cpu. Raises RuntimeError, with the reason, if it is missing."""
    return _present("_cpu", cpu_missing())


def cuda() -> Any:
    """The module clp_kernels._cuda. Raises RuntimeError, with the reason, if it is missing."""
    return _present("_cuda", load("_cuda")[1] if torch.cuda.is_available() else cuda_missing())


def has_native_gemm(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of this dtype at full speed in PyTorch."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def _present(name: str, missing: str | None) -> Any:
    if missing is not None:
        raise RuntimeError(missing)
    return load(name)[0]


def runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for "sm_80" runs there: same major, same or later minor ("sm_90a": equal)."""
    digits = built.removeprefix("sm_").rstrip("a")
    major, minor = int(digits[:-1]), int(digits[-1])
    if built.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def dtype_why_not(t: Tensor) -> str | None:
    """None if the compiled kernels read this dtype, else a sentence."""
    if t.dtype in DTYPES:
        return None
    return f"the compiled kernels read float32, bfloat16 and float16, not {t.dtype}"


def isa() -> str:
    """The instruction set of the CPU kernels in use: scalar, avx2, avx512 or avx512_bf16.

    Raises:
        RuntimeError: the CPU kernels are missing.
        BackendError: CLP_KERNELS_CPU_ISA names no instruction set, or one this machine lacks.
    """
    name: str = cpu().isa()
    return name
