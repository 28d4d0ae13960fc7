"""`mix_logits` and its gradients on the CPU: launches csrc/cpu/mix_logits/mix_logits.cpp."""

from typing import Any

import torch
from torch import Tensor

from clp_kernels import native


def why_not(tensor: Tensor, *_: object) -> str | None:
    """Why this backend cannot run a call whose first argument is `tensor`, or None."""
    if tensor.device.type != "cpu":
        return f"the logits are on {tensor.device}, not on the CPU"
    return native.cpu_missing() or native.dtype_why_not(tensor)


def mix_logits(logits: Tensor, weights: Tensor, mode: str, isa: str = "") -> Tensor:
    """[m, B, V], weights [B, m] float32 -> [B, V] in the logits' dtype; as reference.mix_logits.

    Logits in float32, bfloat16 or float16, copied if the last axis is not contiguous. isa: an
    instruction set for this call (see native.isa); "" for the one in use.

    float32 within, rounded once. Geometric: the reference's bits. Probability: a weight below 0
    makes its row NaN; it needs m V floats for each thread; a weight below 1e-30 of its row's sum
    loses precision at ids that only its term allows; -inf without a term (m = 0), for which the
    reference raises.
    Deterministic; a row's bits depend neither on the other rows, nor on the number of threads, nor
    on the instruction set.

    Raises:
        ValueError: an unknown instruction set.
        RuntimeError: the CPU kernels are missing.
    """
    z = logits.new_empty(logits.shape[1:])
    given = mixture_arguments(logits, weights, mode)
    native.cpu().mix_logits(**given, z=z, num_threads=torch.get_num_threads(), isa=isa)
    return z


def mix_logits_backward(
    dz: Tensor, logits: Tensor, weights: Tensor, mode: str, needs: list[bool], isa: str = ""
) -> tuple[Tensor, Tensor]:
    """As reference.mix_logits_backward.

    d_logits [m, B, V] in the logits' dtype, d_weights [B, m] float32 from float64 sums. Ids where z
    is -inf pass no gradient, and there dz may be anything. Arguments, precision, memory, errors
    and determinism as mix_logits.
    """
    m, batch_size, _ = logits.shape
    d_logits = logits.new_empty(logits.shape if needs[0] else (0,))
    d_weights = weights.new_empty(batch_size, m) if needs[1] else logits.new_empty(0)
    if logits.numel() == 0 or not any(needs):
        # Without ids the sums are empty; with neither asked for there is nothing to fill.
        return d_logits, d_weights.zero_()
    native.cpu().mix_logits_backward(
        **mixture_arguments(logits, weights, mode),
        num_threads=torch.get_num_threads(),
        isa=isa,
        dz=dz.contiguous(),
        d_logits=d_logits if needs[0] else None,
        d_weights=d_weights if needs[1] else None,
    )
    return d_logits, d_weights


def mixture_arguments(logits: Tensor, weights: Tensor | None, mode: str) -> dict[str, Any]:
    """The arguments of the C++ functions, those of `sample` too, about what is mixed."""
    if logits.shape[2] > 1 and logits.stride(2) != 1:
        logits = logits.contiguous()
    m, batch, vocab_size = logits.shape
    return {
        "logits": logits,
        "dtype": logits.dtype,
        "m": m,
        "B": batch,
        "V": vocab_size,
        "stride_m": logits.stride(0),
        "stride_b": logits.stride(1),
        "weights": None if weights is None else weights.contiguous(),
        "probability": mode == "probability",
    }
