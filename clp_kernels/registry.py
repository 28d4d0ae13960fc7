"""Registers ops with torch.library, chooses the backend of a call, and runs it.

Each op calls `register` in its own op.py, with its schema, its fake and its backends in the order
in which "auto" tries them. A backend that the caller names (or the environment variable
CLP_KERNELS_BACKEND) never falls back: it runs, or `select` raises with its reason. `auto` takes the
first whose `why_not` is None, if it is trusted: a GPU kernel has passed the self-test on this GPU,
and a CPU kernel has not failed it (CLP_KERNELS_TRUST, clp_kernels.selftest).

Schemas are functional (new outputs, contiguous). Gradients that are not needed come back as empty
tensors, because a schema cannot return an optional one.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clp_kernels import native, trust
from clp_kernels.native import BackendError

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
# What a name means for an op that has no kernels of it, so that a call that names a GPU backend has
# its gradients, and CLP_KERNELS_BACKEND serves a whole model. "auto" passes over these.
_INSTEAD = {"triton": "reference", "cuda": "triton"}


class CannotRun(BackendError):
    """The backend that is named exists, and does not run this call."""


def _none(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """An implementation of one op: `run(*args)`, and `why_not(*args)`: None or a sentence.

    fast_path: returns None, or a function that the public one tries first, on its unchecked
    arguments; that returns the result, or None to have the call checked and dispatched.
    too_slow: of a call that it can run: why "auto" takes another, or None.
    kernels_of: the backend whose kernels these are, if it is not `name` (see _INSTEAD).
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = _none
    fast_path: Callable[[], Callable[..., Any] | None] = _none
    too_slow: Callable[..., str | None] = _none
    kernels_of: str = ""


BACKENDS: dict[str, tuple[Backend, ...]] = {}

_LIBRARY = torch.library.Library("clp_kernels", "DEF")
_PACK: dict[str, Callable[..., tuple[Any, ...]]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def register(
    schema: str,
    fake: Callable[..., Any],
    *backends: Backend,
    pack: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Defines an op for the CPU and for CUDA, whose last argument names the backend.

    pack: makes the arguments of the backends' functions out of those of the schema, without the
    last; by default they are the same.
    """
    name = schema.split("(", 1)[0]
    table = {entry.name: entry for entry in backends}
    for absent, instead in _INSTEAD.items():
        if absent not in table:
            kernels_of = table[instead].kernels_of or instead
            table[absent] = replace(table[instead], name=absent, kernels_of=kernels_of)
    table["reference"] = table.pop("reference")  # it stays the last
    BACKENDS[name] = tuple(table.values())
    if pack is not None:
        _PACK[name] = pack
    _LIBRARY.define(schema)

    def run(*args: Any) -> Any:
        return _run(name, args)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"clp_kernels::{name}", fake, lib=_LIBRARY)


def triton_backend(module: str, op: str) -> Backend:
    """The function `op` of a Triton module, imported at its first use: that takes half a second."""

    def load() -> ModuleType:
        return importlib.import_module(module)

    def why_not(*args: Any) -> str | None:
        device = device_of(args)
        if device.type != "cuda" and not interpreting():
            return f"the tensors are on {device}, not on a GPU"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        reason: str | None = load().why_not(*args)
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
        if not torch.cuda.is_available() and not interpreting():
            return "PyTorch sees no GPU, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    return None


def requested(backend: str) -> str:
    """The backend a call asks for: its argument, or CLP_KERNELS_BACKEND if that is "auto"."""
    if backend not in NAMES:
        raise BackendError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}")
    if backend != "auto":
        return backend
    chosen = os.environ.get("CLP_KERNELS_BACKEND") or "auto"  # an empty value counts as none
    if chosen not in NAMES:
        raise BackendError(f"CLP_KERNELS_BACKEND must be one of {', '.join(NAMES)}, got {chosen!r}")
    return chosen


def select(op: str, backend: str, *args: Any) -> Backend:
    """The backend that runs `op` on these arguments, which are those of the backends' functions.

    Raises:
        BackendError: no backend has that name, or the one asked for cannot run this call; the
            message gives the reason.
    """
    wanted = requested(backend)
    table = BACKENDS[op]
    if wanted == "auto":
        reasons = []
        for entry in table:
            if entry.kernels_of:
                continue
            reason = entry.why_not(*args) or entry.too_slow(*args)
            reason = reason or trust.distrust(op, entry.name, device_of(args))
            if reason is None:
                return entry
            reasons.append(f"{entry.name}: {reason}")
        raise BackendError(f"no backend can run {op}: {'; '.join(reasons)}")
    for entry in table:
        if entry.name == wanted:
            reason = entry.why_not(*args)
            if reason is not None:
                named = "backend" if wanted == backend else "CLP_KERNELS_BACKEND: backend"
                raise CannotRun(f"{named} {wanted!r} cannot run {op}: {reason}")
            return entry
    known = ", ".join(entry.name for entry in table)
    raise BackendError(f"{op} has no {wanted!r} backend; it has: {known}")


def call(name: str, *args: Any) -> Any:
    """torch.ops.clp_kernels.<name>(*args), without the dispatcher where no mode is active.

    torch.compile, fake tensors, functorch and dispatch modes need the op. Plain tensors under
    no_grad do not, and a call through torch.library costs 7 us hot and 18 us in a decoding loop,
    as much as the low-rank part of a 2048-wide layer itself.
    """
    intercepted = (
        torch.compiler.is_compiling() or native.mode_active() or type(args[0]) not in _PLAIN
    )
    if intercepted:
        return getattr(torch.ops.clp_kernels, name)(*args)
    return _run(name, args)


def needed(grads: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    """The gradients for autograd: None in place of the empty tensors of a backward op."""
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def fake_gradients(inputs: list[Tensor | None], needs: list[bool]) -> tuple[Tensor, ...]:
    """What a backward op returns, for its fake: like each input, or empty if it is not needed."""
    first = next(t for t in inputs if t is not None)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else first.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def chosen(name: str, args: tuple[Any, ...]) -> tuple[Backend, tuple[Any, ...]]:
    """For a call of torch.ops.clp_kernels.<name>(*args): its backend, and that one's arguments.

    Raises: as `select`.
    """
    inputs = args[:-1]
    if name in _PACK:
        inputs = _PACK[name](*inputs)
    return select(name, args[-1], *inputs), inputs


def _run(name: str, args: tuple[Any, ...]) -> Any:
    backend, inputs = chosen(name, args)
    kernel, device = backend.run, args[0].device.type
    if torch.is_autocast_enabled(device):
        # Autocast applies in the layers; here it would round the float32 accumulators.
        with torch.autocast(device, enabled=False):
            return kernel(*inputs)
    return kernel(*inputs)


def interpreting() -> bool:
    """Whether Triton's kernels run as plain Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_of(args: tuple[Any, ...]) -> torch.device:
    """The device of the first tensor."""
    first = args[0]
    device: torch.device = (first if isinstance(first, Tensor) else first[0]).device
    return device
