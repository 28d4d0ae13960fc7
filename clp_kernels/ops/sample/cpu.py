"""`sample` on the CPU: launches csrc/cpu/sample/sample.cpp."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clp_kernels import native, trust
from clp_kernels.ops.mix_logits.cpu import mixture_arguments
from clp_kernels.ops.sample.reference import Inputs


def why_not(inputs: Inputs) -> str | None:
    """None if the kernel can run, else a sentence."""
    if inputs.logits.device.type != "cpu":
        return f"the logits are on {inputs.logits.device}, not on the CPU"
    return native.cpu_missing() or native.dtype_why_not(inputs.logits)


def sample(inputs: Inputs, isa: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """As reference.sample, of float32, bfloat16 or float16; isa: see native.isa, "" for the one in
    use. Logits whose last axis is not contiguous are copied.

    Deterministic; a row's bits depend neither on the other rows, nor on the number of threads, nor
    on the instruction set. A row without filters is read once; with filters its mixed logits are
    written, to 20 V bytes that each thread keeps, and read four times. V < 10^8.

    Raises:
        ValueError: an unknown instruction set.
        RuntimeError: the CPU kernels are missing.
    """
    outputs, named = arguments(inputs)
    native.cpu().sample(**named, num_threads=torch.get_num_threads(), isa=isa)
    return outputs


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """The outputs, and the arguments that the C++ functions of both devices share."""
    batch, device = inputs.logits.shape[1], inputs.logits.device
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    logprobs, filtered = (torch.empty(batch, dtype=torch.float32, device=device) for _ in range(2))
    by_row = ("temperature", "seed", "position", "top_k", "top_p", "min_p")
    named = {
        **mixture_arguments(inputs.logits, inputs.weights, inputs.mode),
        **{name: _wide(getattr(inputs, name)) for name in by_row},
        "tokens": tokens,
        "logprobs": logprobs,
        "filtered_logprobs": filtered,
    }
    return (tokens, logprobs, filtered), named


def _wide(values: Tensor | None) -> Tensor | None:
    """Contiguous, in float64 if floating."""
    if values is None:
        return None
    return (values.double() if values.is_floating_point() else values).contiguous()


@cache
def fast_path() -> Callable[..., tuple[Tensor, Tensor, Tensor] | None] | None:
    """csrc/bindings/fast_path.cpp: a function of the public arguments, or None without it.

    It returns the outputs, or None if the call has to be checked and dispatched.
    """
    if native.cpu_missing() or trust.distrust("sample", "cpu", torch.device("cpu")):
        return None
    return native.cpu().sample_fast_path  # type: ignore[no-any-return]
