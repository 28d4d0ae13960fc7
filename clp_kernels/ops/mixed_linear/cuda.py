"""`mixed_linear` on CUDA for the few tokens of a decoding step, forward only.

Unverified: the kernel (csrc/cuda/mixed_linear/mixed_linear.cu) has not run on a GPU yet.
"""

from torch import Tensor

from clp_kernels import native
from clp_kernels.ops.mixed_lora.cuda import (
    BLOCK_ROWS,
    aligned,
    has_clusters,
    splits,
    token_arguments,
    tokens_why_not,
)


def why_not(
    x: Tensor,
    expert_weight: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    invariant: bool,
) -> str | None:
    """None if `mixed_linear` can run, else a sentence."""
    return tokens_why_not(x, weights)


def mixed_linear(
    x: Tensor,
    expert_weight: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    invariant: bool,
) -> Tensor:
    """`reference.mixed_linear` for at most 256 tokens of bfloat16 or float16.

    Checks nothing: shapes, dtypes and devices are those that the public function has checked, and
    `why_not` has returned None.

        y_t = sum_i weights[b(t), i] (x_t W_i^T + bias_i)

    Args:
        x: [B, ..., in], or [T, in] with example_ids; in_features a multiple of 8. What is not
            aligned to 16 bytes or has a strided last axis is copied, of expert_weight too.
        expert_weight: [m, out, in], x's dtype.
        weights: [B, m] float32.
        bias: [m, out] in x's dtype, or None.
        example_ids: int32 or int64 [T], each in [0, B), or None.
        invariant: Changes nothing: a row's bits never depend on the other rows or on T.

    Returns:
        [B, ..., out] in x's dtype: products and their sum in the order of i in float32, one
        rounding.

    Deterministic. A term of weight zero is left out, whatever its matrix and bias contain. Reads
    nothing on the host and works under CUDA graph capture, on the current stream of x's device.
    """
    _, out_features, in_features = expert_weight.shape
    y = x.new_empty(*x.shape[:-1], out_features)
    if x.shape[:-1].numel() == 0:
        return y
    expert_weight = aligned(expert_weight)
    blocks = -(-out_features // BLOCK_ROWS)
    native.cuda().mixed_linear(
        **token_arguments(x, weights, example_ids),
        expert_weight=expert_weight,
        expert_stride=expert_weight.stride(0),
        row_stride=expert_weight.stride(1),
        bias=None if bias is None else bias.contiguous(),
        N=out_features,
        splits=splits(blocks, in_features, has_clusters(x.device)),
        y=y,
    )
    return y
