"""`mixed_linear` on CUDA for the few tokens of a decoding step, forward only.

Unverified: the kernel (csrc/cuda/mixed_linear/mixed_linear.cu) has not run on a GPU yet.
"""

from torch import Tensor

from clp_kernels import native
from clp_kernels.ops.mixed_linear.reference import Inputs
from clp_kernels.ops.mixed_lora.cuda import (
    BLOCK_ROWS,
    aligned,
    has_clusters,
    splits,
    token_arguments,
)
from clp_kernels.ops.mixed_lora.cuda import too_slow as too_slow
from clp_kernels.ops.mixed_lora.cuda import why_not as why_not


def mixed_linear(inputs: Inputs) -> Tensor:
    """`reference.mixed_linear` for bfloat16 or float16, made for the few tokens of a
    decoding step.

    Checks nothing: `why_not` has returned None. What is not aligned to 16 bytes or has a strided
    last axis is copied, of x and of expert_weight. Products and their sum in the order of i are in
    float32, rounded once. A row's bits never depend on the other rows or on T.

    Deterministic. A term of weight zero is left out, whatever its matrix and bias contain. Reads
    nothing on the host and works under CUDA graph capture, on the current stream of x's device.
    """
    x, expert_weight, _, bias, *_ = inputs
    _, out_features, in_features = expert_weight.shape
    y = x.new_empty(*x.shape[:-1], out_features)
    if x.shape[:-1].numel() == 0:
        return y
    expert_weight = aligned(expert_weight)
    blocks = -(-out_features // BLOCK_ROWS)
    native.cuda().mixed_linear(
        **token_arguments(inputs),
        expert_weight=expert_weight,
        expert_stride=expert_weight.stride(0),
        row_stride=expert_weight.stride(1),
        bias=None if bias is None else bias.contiguous(),
        N=out_features,
        splits=splits(blocks, in_features, has_clusters(x.device)),
        y=y,
    )
    return y
