"""Which backends exist, the order in which "auto" tries them, and why one is not used.

`BACKENDS[op]` is the whole table. A backend named by the caller (or by the environment variable
CLP_KERNELS_BACKEND) never falls back: it runs, or `select` raises with its reason. `auto` takes
the first whose `why_not` is None. GPU kernels are additionally held back from `auto` until their
tests have passed on a GPU of that architecture: VERIFIED lists those runs.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from clp_kernels import native
from clp_kernels.ops import reference
from clp_kernels.ops.linear_logprob import (
    cpu as cpu_linear_logprob,
)
from clp_kernels.ops.linear_logprob import (
    cpu_backward as cpu_linear_logprob_backward,
)
from clp_kernels.ops.mix_logits import cpu as cpu_mix_logits
from clp_kernels.ops.mixed_linear import cpu as cpu_mixed_linear
from clp_kernels.ops.mixed_linear import cuda as cuda_mixed_linear
from clp_kernels.ops.mixed_lora import cpu as cpu_mixed_lora
from clp_kernels.ops.mixed_lora import cuda as cuda_mixed_lora
from clp_kernels.ops.sample import cpu as cpu_sample
from clp_kernels.ops.sample import cuda as cuda_sample

# (op, backend, compute capability) of every GPU kernel whose tests have passed on hardware, with
# the rows in bench/results/ that show it. Empty: no GPU kernel has run on a GPU yet.
VERIFIED: frozenset[tuple[str, str, tuple[int, int]]] = frozenset()

NAMES = ("auto", "reference", "cpu", "triton", "cuda")


class BackendError(RuntimeError, ValueError):
    """The backend that a call or the environment names does not exist, or cannot run the call."""


def _never() -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """An implementation of one op: `run(*args)`, and `why_not(*args)`: None or a sentence.

    fast_path: returns None, or a function that the public one tries first, on its unchecked
    arguments; that returns the result, or None to have the call checked and dispatched.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    fast_path: Callable[[], Callable[..., Any] | None] = _never


def _always(*_: Any) -> str | None:
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _reference(op: str) -> Backend:
    return Backend("reference", getattr(reference, op), _always)


def _compiled(name: str, module: ModuleType, op: str) -> Backend:
    """An op of clp_kernels.<name>_<op>, which also says why it cannot run."""
    return Backend(name, getattr(module, op), module.why_not)


def _triton(module: str, op: str) -> Backend:
    """The same in Triton, imported at its first use: the import takes half a second."""

    def load() -> ModuleType:
        return importlib.import_module(f"clp_kernels.{module}")

    def why_not(x: torch.Tensor, *rest: Any) -> str | None:
        if x.device.type != "cuda" and not _interpreting():
            return f"the tensors are on {x.device}, not on a GPU"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        reason: str | None = load().why_not(x, *rest)
        return reason

    return Backend("triton", lambda *args: getattr(load(), op)(*args), why_not)


def missing(backend: str) -> str | None:
    """Why a backend of the table runs nothing on this machine and in this build, or None.

    What one call lacks (a device, a dtype, a size) `Backend.why_not` says.
    """
    if backend == "cpu":
        return native.cpu_missing()
    if backend == "cuda":
        return native.cuda_missing()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not _interpreting():
            return "PyTorch sees no GPU, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    return None


BACKENDS: dict[str, tuple[Backend, ...]] = {
    "mixed_lora": (
        Backend("cpu", cpu_mixed_lora.mixed_lora, cpu_mixed_lora.why_not, cpu_mixed_lora.fast_path),
        _compiled("cuda", cuda_mixed_lora, "mixed_lora"),
        _triton("triton_mixed_lora", "mixed_lora"),
        _reference("mixed_lora"),
    ),
    "mixed_lora_backward": (
        _compiled("cpu", cpu_mixed_lora, "mixed_lora_backward"),
        _triton("triton_mixed_lora", "mixed_lora_backward"),
        _reference("mixed_lora_backward"),
    ),
    "mixed_linear": (
        _compiled("cpu", cpu_mixed_linear, "mixed_linear"),
        _compiled("cuda", cuda_mixed_linear, "mixed_linear"),
        _triton("triton_mixed_linear", "mixed_linear"),
        _reference("mixed_linear"),
    ),
    "mixed_linear_backward": (
        _compiled("cpu", cpu_mixed_linear, "mixed_linear_backward"),
        _triton("triton_mixed_linear", "mixed_linear_backward"),
        _reference("mixed_linear_backward"),
    ),
    "mix_logits": (
        _compiled("cpu", cpu_mix_logits, "mix_logits"),
        _triton("triton_mix_logits", "mix_logits"),
        _reference("mix_logits"),
    ),
    "mix_logits_backward": (
        _compiled("cpu", cpu_mix_logits, "mix_logits_backward"),
        _triton("triton_mix_logits", "mix_logits_backward"),
        _reference("mix_logits_backward"),
    ),
    "sample": (
        Backend("cpu", cpu_sample.sample, cpu_sample.why_not, cpu_sample.fast_path),
        _compiled("cuda", cuda_sample, "sample"),
        _triton("triton_sample", "sample"),
        _reference("sample"),
    ),
    "linear_logprob": (
        _compiled("cpu", cpu_linear_logprob, "linear_logprob"),
        _triton("triton_linear_logprob", "linear_logprob"),
        _reference("linear_logprob"),
    ),
    "linear_logprob_backward": (
        _compiled("cpu", cpu_linear_logprob_backward, "linear_logprob_backward"),
        _reference("linear_logprob_backward"),
    ),
}


def requested(backend: str) -> str:
    """The backend a call asks for: its argument, or CLP_KERNELS_BACKEND where that is "auto"."""
    if backend not in NAMES:
        raise BackendError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}")
    if backend != "auto":
        return backend
    chosen = os.environ.get("CLP_KERNELS_BACKEND") or "auto"  # an empty value is as none
    if chosen not in NAMES:
        raise BackendError(f"CLP_KERNELS_BACKEND must be one of {', '.join(NAMES)}, got {chosen!r}")
    return chosen


def select(op: str, backend: str, *args: Any) -> Backend:
    """The backend that runs `op` on these (normalised) arguments.

    Raises:
        BackendError: no backend has that name, or the one asked for cannot run this call; the
            message gives the reason.
    """
    wanted = requested(backend)
    table = BACKENDS[op]
    if wanted == "auto":
        for entry in table:
            if entry.why_not(*args) is None and _unverified(op, entry.name, args) is None:
                return entry
        reasons = "; ".join(
            f"{entry.name}: {entry.why_not(*args) or _unverified(op, entry.name, args)}"
            for entry in table
        )
        raise BackendError(f"no backend can run {op}: {reasons}")
    for entry in table:
        if entry.name == wanted:
            reason = entry.why_not(*args)
            if reason is not None:
                named = "backend" if wanted == backend else "CLP_KERNELS_BACKEND: backend"
                raise BackendError(f"{named} {wanted!r} cannot run {op}: {reason}")
            return entry
    known = ", ".join(entry.name for entry in table)
    raise BackendError(f"{op} has no {wanted!r} backend; it has: {known}")


def _unverified(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why "auto" holds back a GPU kernel, or None."""
    if backend not in ("triton", "cuda"):
        return None
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cpu" and _interpreting():
        return "Triton's interpreter is for tests; name backend='triton' to use it"
    capability = torch.cuda.get_device_capability(device)
    if (op, backend, capability) in VERIFIED:
        return None
    return f"not verified on compute capability {capability}; name backend={backend!r} to use it"
