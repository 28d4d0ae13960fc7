"""`mixed_lora` on CUDA for the few tokens of a decoding step, forward only.

Unverified: the kernel (csrc/cuda/mixed_lora/mixed_lora.cu) has not run on a GPU yet. mixed_linear
uses the functions about tokens, their weights and the splits of in_features too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clp_kernels import native
from clp_kernels.ops.mixed_lora.reference import Inputs

# Above this many tokens "auto" takes another backend: W is read again for each 64 tokens, and with
# 64 only one block fits a multiprocessor. An estimate, not measured.
MAX_TOKENS = 32

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


def why_not(inputs: Any) -> str | None:
    """None if the decode kernels of this op, or of mixed_linear, can run, else a sentence."""
    x, weights = inputs.x, inputs.weights
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, not on a GPU"
    if (missing := native.cuda_missing(x.device)) is not None:
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
    return None


def too_slow(inputs: Any) -> str | None:
    """Of a call that these kernels, or those of mixed_linear, can run: why another is faster."""
    tokens = inputs.x.shape[:-1].numel()
    if tokens > MAX_TOKENS:
        return f"the cuda kernels are for up to {MAX_TOKENS} tokens, there are {tokens}"
    name = inputs._fields[1]  # base_weight or expert_weight
    if not is_aligned(inputs[1]):
        return (
            f"the cuda kernels would copy {name} in each call: its rows are not contiguous, or not "
            "aligned to 16 bytes"
        )
    return None


def mixed_lora(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`reference.mixed_lora` for bfloat16 or float16, made for the few tokens of a decoding step.

    Checks nothing: `why_not` has returned None. What is not aligned to 16 bytes or has a strided
    last axis is copied, of x and of the matrices. y is rounded once from float32. A row's bits
    never depend on the other rows or on T.

    Deterministic. A term of weight zero is left out, whatever its A and B contain; with weights of
    zero y has the bits of this kernel's own x W^T + bias. Reads nothing on the host and works under
    CUDA graph capture, on the current stream of x's device.
    """
    x, base_weight, lora_A, lora_B, _, bias, *_ = inputs
    m, r, in_features = lora_A.shape
    out_features = base_weight.shape[0]
    y = x.new_empty(*x.shape[:-1], out_features)
    u = x.new_empty(*x.shape[:-1], m * r, dtype=torch.float32)
    if x.shape[:-1].numel() == 0:
        return y, u
    base_weight, lora_A = aligned(base_weight), aligned(lora_A.reshape(m * r, in_features))
    stride_m, stride_n, stride_r = lora_B.stride()
    native.cuda().mixed_lora(
        **token_arguments(inputs),
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


def is_aligned(matrix: Tensor) -> bool:
    """Whether its rows are contiguous and aligned to 16 bytes."""
    *strides, last = matrix.stride()
    sizes = [stride * matrix.element_size() for stride in strides]
    return last == 1 and all(size % 16 == 0 for size in (*sizes, matrix.data_ptr()))


def aligned(matrix: Tensor) -> Tensor:
    """The tensor, or a copy if `is_aligned` is not so."""
    if is_aligned(matrix):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def token_arguments(inputs: Any) -> dict[str, Any]:
    """The arguments of both ops' C++ functions about the tokens, and where the kernels run."""
    x, weights, example_ids = inputs.x, inputs.weights, inputs.example_ids
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
