"""`mixed_linear` on CUDA for the few tokens of a decoding step, forward only.

Unverified: the kernel (csrc/cuda/mixed_linear/mixed_linear.cu) has not run on a GPU yet.
"""

import torch
from torch import Tensor

from clp_kernels import checks, native
from clp_kernels.ops.mixed_lora.cuda import (
    BLOCK_ROWS,
    aligned,
    check_tokens,
    has_clusters,
    splits,
    tokens_argument,
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
    """None where `mixed_linear` can run, else a sentence."""
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

    Deterministic. A term of weight zero is left out, whatever its matrix and bias hold. Reads
    nothing on the host and works under CUDA graph capture, on the current stream of x's device.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: what `why_not` says.
    """
    checks.tensor("expert_weight", expert_weight, (None, None, x.shape[-1]), x)
    m, out_features, in_features = expert_weight.shape
    check_tokens(x, weights, example_ids, m)
    checks.same_dtype("expert_weight", expert_weight, x.dtype)
    if bias is not None:
        checks.tensor("bias", bias, (m, out_features), x)
        checks.same_dtype("bias", bias, x.dtype)
        bias = bias.contiguous()
    y = x.new_empty(*x.shape[:-1], out_features)
    tokens = x.shape[:-1].numel()
    if tokens == 0:
        return y
    module = native.cuda()
    rows, expert_weight = aligned(x.reshape(tokens, in_features)), aligned(expert_weight)
    weights = weights.contiguous()
    example_ids = None if example_ids is None else example_ids.contiguous()
    blocks = -(-out_features // BLOCK_ROWS)
    module.mixed_linear(
        tokens_argument(module, rows, weights, example_ids),
        expert_weight.data_ptr(),
        expert_weight.stride(0),
        expert_weight.stride(1),
        0 if bias is None else bias.data_ptr(),
        out_features,
        splits(blocks, in_features, has_clusters(x.device)),
        y.data_ptr(),
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return y
