"""`mixed_linear` on the CPU.

Few tokens: csrc/cpu/mixed_linear/mixed_linear.cpp reads each matrix once and scales the products in
registers. Many tokens in float32: PyTorch's products, one expert at a time into one sum; if all
weights of the batch are equal, the matrices are merged once and there is one product. In 16 bits
always the C++ kernel, which sums in float32 and rounds once. PyTorch's products and a merged matrix
would be rounded to 16 bits before that, and a mixture of experts that are one unit in the last
place apart would be one of them (docs/decisions.md, 2026-11-29). In batch_invariant() always the
C++ kernel, whose rows do not depend on one another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels import native
from clp_kernels.native import has_native_gemm
from clp_kernels.ops.mixed_linear import reference
from clp_kernels.ops.mixed_linear.reference import Inputs
from clp_kernels.ops.mixed_lora.cpu import run_native, token_weights
from clp_kernels.ops.mixed_lora.cpu import why_not as why_not
from clp_kernels.ops.mixed_lora.reference import sum_per_example

# Rows up to which the C++ kernel is faster than PyTorch's products in the inputs' dtype
# (docs/log.md, 2026-11-24).
NATIVE_ROWS = 16

# Columns up to which the C++ kernel is as fast as PyTorch's 16-bit products where the processor has
# such: 0.4 to 1.1 of their time, at 2048 columns 1.4 (docs/log.md, 2026-11-28).
NATIVE_COLUMNS = 256

# tokens * in_features * out_features up to which no product in 16 bits is PyTorch's: over few
# elements a rounding more is not averaged out, and float32 is as fast.
SMALL_WORK = 2**16


def mixed_linear(inputs: Inputs) -> Tensor:
    """As reference.mixed_linear."""
    x, expert_weight, weights, bias, example_ids, invariant = inputs
    out_features = expert_weight.shape[1]
    rows = x.flatten(0, -2)
    tokens = rows.shape[0]
    y: Tensor
    if tokens * out_features == 0:
        y = x.new_zeros(tokens, out_features)
    elif invariant or tokens <= NATIVE_ROWS or x.dtype != torch.float32:
        y = mix_products(inputs._replace(x=rows))
    elif bool((weights == weights[:1]).all()):
        y = merged(rows, expert_weight, weights[0], bias)
    else:
        per_token = token_weights(weights, example_ids, tokens)
        y = torch.zeros(tokens, out_features, dtype=torch.float32)
        for i, expert in enumerate(expert_weight):
            product = F.linear(rows, expert, None if bias is None else bias[i])
            y.addcmul_(product, per_token[:, i, None])
    return y.view(*x.shape[:-1], out_features)


def _has_gemm(x: Tensor, out_features: int) -> bool:
    """Whether PyTorch's products of x run in its dtype: at full speed, and not too small for it."""
    if x.dtype == torch.float32:
        return True
    return has_native_gemm(x.dtype) and x.numel() * out_features > SMALL_WORK


def mix_products(inputs: Inputs, isa: str = "") -> Tensor:
    """The C++ kernel: sum_i weights[b(t), i] (x_t W_i^T + bias_i) for x [T, in] with T > 0.

    B divides T, if there are no example_ids. isa: an instruction set for this call, "" for the one
    in use. A term of weight zero is left out. A row's bits depend on neither the other rows nor the
    number of threads.
    """
    x, expert_weight, weights, bias, example_ids, _ = inputs
    m, out_features, in_features = expert_weight.shape
    tokens = x.shape[0]
    if in_features > 1 and x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(tokens, out_features)
    native.cpu().mixed_linear(
        x=x,
        x_stride=x.stride(0),
        expert_weight=expert_weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        dtype=x.dtype,
        weights=weights.contiguous(),
        example_ids=None if example_ids is None else example_ids.contiguous(),
        wide_ids=example_ids is not None and example_ids.dtype == torch.int64,
        tokens_per_example=1 if example_ids is not None else tokens // weights.shape[0],
        y=y,
        T=tokens,
        K=in_features,
        N=out_features,
        m=m,
        num_threads=torch.get_num_threads(),
        isa=isa,
    )
    return y


def merged(x: Tensor, expert_weight: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    """One product with sum_i row[i] W_i in float32, for a batch whose weights are all equal."""
    weight = torch.zeros(expert_weight.shape[1:], dtype=torch.float32)
    for w, expert in zip(row, expert_weight, strict=True):
        weight.addcmul_(expert, w)
    return F.linear(x, weight, None if bias is None else row @ bias)


def mixed_linear_backward(
    inputs: Inputs, dy: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.mixed_linear_backward, one expert at a time."""
    x, expert_weight, weights, bias, example_ids, invariant = inputs
    m, out_features, _ = expert_weight.shape
    if invariant or x.numel() == 0 or dy.numel() == 0:
        return reference.mixed_linear_backward(inputs, dy, needs)
    gemm_dtype = x.dtype if _has_gemm(x, out_features) else torch.float32
    rows = x.flatten(0, -2).to(gemm_dtype)
    dy_rows = dy.flatten(0, -2).to(gemm_dtype)
    tokens = rows.shape[0]
    per_token = token_weights(weights, example_ids, tokens)
    dx, d_expert, d_weights, d_bias = (x.new_empty(0) for _ in needs)
    total = torch.zeros(rows.shape if needs[0] else 0, dtype=torch.float32)
    dots = torch.empty(tokens, m, dtype=torch.float32)
    if needs[1]:
        d_expert = torch.empty_like(expert_weight, memory_format=torch.contiguous_format)
    if needs[3]:
        d_bias = x.new_empty(m, out_features)
    for i, expert in enumerate(expert_weight):
        expert, column = expert.to(gemm_dtype), per_token[:, i, None]
        if needs[0]:
            # In float32, for the reason that the forward has.
            total.addcmul_(dy_rows.float() @ expert.float(), column)
        if needs[2]:
            product = _product(rows, expert, None if bias is None else bias[i].to(gemm_dtype))
            dots[:, i] = (product * dy_rows).sum(-1)
        if needs[1] or needs[3]:
            scaled = dy_rows * column
        if needs[1]:
            d_expert[i] = scaled.to(gemm_dtype).t() @ rows
        if needs[3]:
            # PyTorch's sum goes by halves; a product with the column of ones would go one by one.
            d_bias[i] = scaled.sum(0, dtype=torch.float32)
    if needs[0]:
        dx = total.to(x.dtype).view(x.shape)
    if needs[2]:
        d_weights = sum_per_example(dots, weights.shape[0], example_ids)
    return dx, d_expert, d_weights, d_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in float32, of which the gradient of a weight is the sum over the columns.

    PyTorch's product rounds to 8 bits in bfloat16. Over many columns that averages out; over few
    it does not, and there the C++ kernel keeps float32.
    """
    if x.dtype == torch.float32 or len(weight) > NATIVE_COLUMNS:
        return F.linear(x, weight, bias).float()
    product = run_native(x, weight[None], None, None, None, None)
    return product if bias is None else product.add_(bias)
