"""`mixed_lora` on CUDA for the few tokens of a decoding step, forward only.

Unverified: the kernel (csrc/cuda/mixed_lora/mixed_lora.cu) has not run on a GPU yet. mixed_linear
uses the functions about tokens, their weights and the splits of in_features too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clp_kernels import native

# Above this many tokens a large tile of another kernel is the better choice.
MAX_TOKENS = 256

# Rows of the base matrix that a block reads, and the blocks that keep a large GPU's memory busy.
BLOCK_ROWS, ENOUGH_BLOCKS = 64, 96
# The blocks of a cluster that may share the sum over in_features, each with at least so many.
MAX_SPLITS, MIN_FEATURES = 8, 512
# Their blocks have 99 KB of shared memory, the kernels need 145 (Shape in
# csrc/cuda/mixed_rows.cuh).
TOO_SMALL = ((8, 6), (8, 9))


def splits(blocks: int, in_features: int, clusters: bool) -> int:
    """Into how many parts the sum over in_features goes, if there are `blocks` without it.

    Never a function of the number of tokens: the bits of a row depend on the parts.
    """
    parts = 1
    if clusters:
        while (
            parts < MAX_SPLITS
            and blocks * parts < ENOUGH_BLOCKS
            and in_features >= 2 * parts * MIN_FEATURES
        ):
            parts *= 2
    return parts


class Plan(NamedTuple):
    """Parts of the sum over in_features in x W^T and in x A^T."""

    base_splits: int
    shrink_splits: int


def plan(in_features: int, out_features: int, clusters: bool) -> Plan:
    """The splits of one call. clusters: whether the GPU has them (compute capability 9 on)."""
    blocks = -(-out_features // BLOCK_ROWS)
    return Plan(splits(blocks, in_features, clusters), splits(1, in_features, clusters))


def why_not(
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    invariant: bool,
) -> str | None:
    """None if `mixed_lora` can run, else a sentence."""
    return tokens_why_not(x, weights)


def tokens_why_not(x: Tensor, weights: Tensor) -> str | None:
    """None if the decode kernels can take these tokens, else a sentence."""
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, not on a GPU"
    if (missing := native.cuda_missing()) is not None:
        return missing
    capability = torch.cuda.get_device_capability(x.device)
    if capability in TOO_SMALL:
        return f"the cuda kernels need more shared memory than compute capability {capability} has"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the cuda kernels read bfloat16 and float16, not {x.dtype}"
    if weights.dtype != torch.float32:
        return f"the cuda kernels read float32 weights, not {weights.dtype}"
    in_features = x.shape[-1]
    if in_features % 8:
        return f"the cuda kernels need in_features to be a multiple of 8, it is {in_features}"
    tokens = x.shape[:-1].numel()
    if tokens > MAX_TOKENS:
        return f"the cuda kernels decode up to {MAX_TOKENS} tokens, there are {tokens}"
    return None


def mixed_lora(
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    invariant: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.mixed_lora` for at most 256 tokens of bfloat16 or float16.

    Checks nothing: shapes, dtypes and devices are those that the public function has checked, and
    `why_not` has returned None.

        y_t = x_t W^T + bias + sum_i weights[b(t), i] (x_t A_i^T) B_i^T

    Args:
        x: [B, ..., in], or [T, in] with example_ids; in_features a multiple of 8. What is not
            aligned to 16 bytes or has a strided last axis is copied, of base_weight too.
        base_weight: [out, in], x's dtype.
        lora_A, lora_B: [m, r, in] and [m, out, r], both x's dtype or both float32.
        weights: [B, m] float32, scaling folded in.
        bias: [out] in x's dtype, or None.
        example_ids: int32 or int64 [T], each in [0, B), or None.
        invariant: Changes nothing: a row's bits never depend on the other rows or on T.

    Returns:
        y [B, ..., out] in x's dtype, one rounding from float32, and u = x A^T [..., m*r] float32.

    Deterministic. A term of weight zero is left out, whatever its A and B contain; with weights of
    zero y has the bits of this kernel's own x W^T + bias. Reads nothing on the host and works under
    CUDA graph capture, on the current stream of x's device.
    """
    m, r, in_features = lora_A.shape
    out_features = base_weight.shape[0]
    y = x.new_empty(*x.shape[:-1], out_features)
    u = x.new_empty(*x.shape[:-1], m * r, dtype=torch.float32)
    if x.shape[:-1].numel() == 0:
        return y, u
    base_weight, lora_A = aligned(base_weight), aligned(lora_A.reshape(m * r, in_features))
    stride_m, stride_n, stride_r = lora_B.stride()
    native.cuda().mixed_lora(
        **token_arguments(x, weights, example_ids),
        base_weight=base_weight,
        base_stride=base_weight.stride(0),
        bias=None if bias is None else bias.contiguous(),
        lora_A=lora_A,
        A_stride=lora_A.stride(0),
        lora_B=lora_B,
        B_stride_m=stride_m,
        B_stride_n=stride_n,
        B_stride_r=stride_r,
        float32_lora=lora_A.dtype == torch.float32,
        N=out_features,
        r=r,
        **plan(in_features, out_features, has_clusters(x.device))._asdict(),
        y=y,
        u=u,
    )
    return y, u


def has_clusters(device: torch.device) -> bool:
    """Whether blocks of this GPU can read each other's shared memory."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def aligned(matrix: Tensor) -> Tensor:
    """The tensor, or a copy if its rows are not contiguous and aligned to 16 bytes."""
    *strides, last = matrix.stride()
    size = matrix.element_size()
    if (
        last == 1
        and all(stride * size % 16 == 0 for stride in strides)
        and matrix.data_ptr() % 16 == 0
    ):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def token_arguments(x: Tensor, weights: Tensor, example_ids: Tensor | None) -> dict[str, Any]:
    """The arguments of both C++ functions about the tokens, and where the kernels run."""
    tokens, in_features = x.shape[:-1].numel(), x.shape[-1]
    rows = aligned(x.reshape(tokens, in_features))
    return {
        "x": rows,
        "dtype": rows.dtype,
        "x_stride": rows.stride(0),
        "T": tokens,
        "K": in_features,
        "m": weights.shape[1],
        "weights": weights.contiguous(),
        "example_ids": None if example_ids is None else example_ids.contiguous(),
        "wide_ids": example_ids is not None and example_ids.dtype == torch.int64,
        "tokens_per_example": 1 if example_ids is not None else tokens // weights.shape[0],
        "device": x.device.index,
        "stream": torch.cuda.current_stream(x.device).cuda_stream,
    }
