"""Triton kernels of mix_logits, forward and backward. Unverified on a GPU.

Geometric mixing is one pass over the logits in each direction. Probability mixing first takes the
log-sum-exp of each source row (one more pass), and its backward one sum over each row before the
gradient of the logits (another). Rows are cut into slices of BLOCK ids, whatever the batch: a
row's bits do not depend on the other rows. No atomics: two runs give the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from clp_kernels.ops import triton_launch
from clp_kernels.ops.mix_logits import triton_kernels as kernels
from clp_kernels.ops.triton_launch import KINDS, Variant, unit_stride, variant

# Ids a program works on, and partials that are combined at a time. Unmeasured starting points.
BLOCK = 1024
COMBINE_BLOCK = 256
# The mixture is rounded product by product, as the reference rounds it.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def slices_of(vocab_size: int) -> int:
    """Programs per row. By the vocabulary alone: a row's sums do not depend on the batch."""
    return -(-vocab_size // BLOCK)


def why_not(logits: Tensor, *_: Any) -> str | None:
    """Why these kernels cannot run a call whose first argument is `logits` (or dz), or None."""
    return triton_launch.why_not(logits)


def mix_logits(logits: Tensor, weights: Tensor, mode: str) -> Tensor:
    """[m, B, V], weights [B, m] float32 -> [B, V] in the logits' dtype; as reference.mix_logits.

    float32, bfloat16 and float16; float32 accumulation in the order of i, one rounding. A term of
    weight zero is left out, whatever it holds. Deterministic, and bitwise independent of the other
    rows. Reads nothing on the host.
    """
    return mixture(logits, weights, mode, logits.dtype)


def mixture(logits: Tensor, weights: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    """mix_logits in a dtype to choose: float32 is the mixture before its rounding."""
    _, batch_size, vocab_size = logits.shape
    out = logits.new_empty(batch_size, vocab_size, dtype=dtype)
    if out.numel() == 0:
        return out
    logits = unit_stride(logits)
    with torch.cuda.device_of(logits):
        kernels.mix_kernel[(batch_size * slices_of(vocab_size),)](
            weights_ptr=weights.contiguous(),
            log_norms_ptr=_log_norms(logits) if mode == "probability" else None,
            out_ptr=out,
            **logits_arguments(logits),
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return out


def mix_logits_backward(
    dz: Tensor, logits: Tensor, weights: Tensor, mode: str, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """As reference.mix_logits_backward.

    d_logits [m, B, V] in the logits' dtype, d_weights [B, m] in the weights'; what is not needed is
    empty and launches nothing. Ids where z is -inf pass no gradient, and there dz may hold
    anything. Deterministic, each row by itself.
    """
    m, batch_size, vocab_size = logits.shape
    d_logits = logits.new_empty(logits.shape) if needs[0] else logits.new_empty(0)
    d_weights = weights.new_empty(batch_size, m) if needs[1] else logits.new_empty(0)
    if logits.numel() == 0 or not any(needs):
        # Without ids the sums are empty; if neither is needed there is nothing to fill.
        return d_logits, d_weights.zero_()
    logits, slices = unit_stride(logits), slices_of(vocab_size)
    probability = mode == "probability"
    sums, parts = None, None
    if needs[1] or probability:
        parts = logits.new_empty(slices, batch_size, m, dtype=torch.float32)
        sums = d_weights if needs[1] else parts.new_empty(batch_size, m)
    with torch.cuda.device_of(logits):
        inputs = {
            "dz_ptr": dz.contiguous(),
            "weights_ptr": weights.contiguous(),
            "log_norms_ptr": _log_norms(logits) if probability else None,
            **logits_arguments(logits),
        }

        def launch(ratio_sums: Tensor | None, out: Tensor | None, parts: Tensor | None) -> None:
            kernels.gradients_kernel[(batch_size * slices,)](
                **inputs,
                ratio_sums_ptr=ratio_sums,
                d_logits_ptr=out,
                parts_ptr=parts,
                BLOCK=BLOCK,
                **OPTIONS,
            )

        launch(None, d_logits if needs[0] and not probability else None, parts)
        if sums is not None:
            kernels.sum_slices_kernel[(batch_size * m,)](
                parts_ptr=parts, out_ptr=sums, size=batch_size * m, slices=slices,
                BLOCK=COMBINE_BLOCK, **OPTIONS,
            )  # fmt: skip
        if needs[0] and probability:
            launch(sums, d_logits, None)
    return d_logits, d_weights


def logits_arguments(logits: Tensor) -> dict[str, Any]:
    """The arguments by which a kernel reads logits [m, B, V] whose last axis is dense."""
    m, batch_size, vocab_size = logits.shape
    return {
        "logits_ptr": logits,
        "vocab_size": vocab_size,
        "term_stride": logits.stride(0),
        "row_stride": logits.stride(1),
        "batch_size": batch_size,
        "num_terms": m,
        "slices": slices_of(vocab_size),
    }


def _log_norms(logits: Tensor) -> Tensor:
    """[2, m, B] float32: of each source row the maximum m, and log sum exp(l - m)."""
    m, batch_size, vocab_size = logits.shape
    rows, slices = m * batch_size, slices_of(vocab_size)
    parts = logits.new_empty(2, m, batch_size, slices, dtype=torch.float32)
    log_norms = logits.new_empty(2, m, batch_size, dtype=torch.float32)
    kernels.row_sums_kernel[(rows * slices,)](
        parts_ptr=parts, **logits_arguments(logits), BLOCK=BLOCK, **OPTIONS
    )
    kernels.log_norms_kernel[(rows,)](
        parts_ptr=parts, log_norms_ptr=log_norms, rows=rows, slices=slices,
        BLOCK=COMBINE_BLOCK, **OPTIONS,
    )  # fmt: skip
    return log_norms


def variants(capability: tuple[int, int]) -> list[Variant]:
    """Every kernel variant that these functions launch, on any GPU.

    The geometric gradients come with both outputs: without one, a kernel leaves out a store.
    """
    fp32, found = "*fp32", []
    fixed, combine = ({"BLOCK": BLOCK}, OPTIONS), ({"BLOCK": COMBINE_BLOCK}, OPTIONS)
    for kind in KINDS.values():
        inputs = {"logits": kind, "weights": fp32}
        norms = {**inputs, "log_norms": fp32}
        for types in (inputs, norms):
            found.append(variant(kernels.mix_kernel, *fixed, {**types, "out": kind}))
        gradients = (
            {**inputs, "d_logits": kind, "parts": fp32},
            {**norms, "parts": fp32},
            {**norms, "ratio_sums": fp32, "d_logits": kind},
        )
        for types in gradients:
            found.append(variant(kernels.gradients_kernel, *fixed, {**types, "dz": kind}))
        sums = {"logits": kind, "parts": fp32}
        found.append(variant(kernels.row_sums_kernel, *fixed, sums))
    parts = {"parts": fp32}
    found.append(variant(kernels.log_norms_kernel, *combine, {**parts, "log_norms": fp32}))
    found.append(variant(kernels.sum_slices_kernel, *combine, {**parts, "out": fp32}))
    return found
