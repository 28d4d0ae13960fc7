"""`sample` on the CPU: launches csrc/cpu/sample/sample.cpp."""

from collections.abc import Callable

import torch
from torch import Tensor

from clp_kernels import native


def why_not(logits: Tensor, *_: object) -> str | None:
    """None if the kernel can run, else a sentence."""
    if logits.device.type != "cpu":
        return f"the logits are on {logits.device}, not on the CPU"
    return native.cpu_missing() or native.dtype_why_not(logits)


def sample(
    logits: Tensor,
    weights: Tensor | None,
    mode: str,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.sample: tokens int64, logprobs, filtered_logprobs float32 [B]; bad row: -1, NaN.

    Args:
        logits: [m, B, V] float32, bfloat16 or float16. Any strides for m and B; copied if the
            last axis is not contiguous.
        weights: [B, m] float32, or None when m is 1.
        mode: "geometric" or "probability".
        temperature: [B] float64 (or float32), finite and >= 0; 0 is greedy.
        top_k int64, top_p and min_p as temperature: [B] or None.
        seed, position: [B] int64.
        isa: an instruction set for this call (see native.isa); "" for the one in use.

    Deterministic; a row's bits depend neither on the other rows, nor on the number of threads, nor
    on the instruction set. A row without filters is read once; with filters its mixed logits are
    written, to 20 V bytes that each thread keeps, and read four times. V < 10^8.

    Raises:
        ValueError: an unknown instruction set.
        RuntimeError: the CPU kernels are missing.
    """
    outputs, arguments = native.sample_arguments(
        logits, weights, mode, temperature, top_k, top_p, min_p, seed, position
    )
    native.cpu().sample(**arguments, num_threads=torch.get_num_threads(), isa=isa)
    return outputs


def fast_path() -> Callable[..., tuple[Tensor, Tensor, Tensor] | None] | None:
    """csrc/bindings/fast_path.cpp: a function of the public arguments, or None without it.

    It returns the outputs, or None if the call has to be checked and dispatched.
    """
    if native.cpu_missing() is not None:
        return None
    return native.cpu().sample_fast_path  # type: ignore[no-any-return]
