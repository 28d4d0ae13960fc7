"""The definition of mixed_linear in plain PyTorch, on any device: forward and backward.

Low-precision inputs accumulate in float32, float64 stays float64 ("acc" below). Formulas, shapes
and errors are documented on the public function in op.py, which has checked the arguments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from clp_kernels.checks import accumulator
from clp_kernels.ops.mixed_lora.reference import broadcast_weights, linear_of, sum_per_example


class Inputs(NamedTuple):
    """Checked inputs of the forward and the backward.

    x [B, ..., in], or [T, in] with example_ids, int32 or int64 [T]; expert_weight [m, out, in] and
    bias [m, out] or None in x's dtype; weights [B, m] float32 (float64 beside float64); invariant:
    whether `batch_invariant()` is active.
    """

    x: Tensor
    expert_weight: Tensor
    weights: Tensor
    bias: Tensor | None
    example_ids: Tensor | None
    invariant: bool


def mixed_linear(inputs: Inputs) -> Tensor:
    """y = sum_i w_i (x W_i^T + bias_i), accumulated in order i = 0, 1, ..., rounded once."""
    x, expert_weight, weights, bias, example_ids, invariant = inputs
    acc, linear = accumulator(x.dtype), linear_of(invariant)
    w = broadcast_weights(x, weights, example_ids).to(acc)
    y, x = x.new_zeros(*x.shape[:-1], expert_weight.shape[1], dtype=acc), x.to(acc)
    for i, expert in enumerate(expert_weight):
        product = linear(x, expert.to(acc))
        y = y + w[..., i : i + 1] * (product if bias is None else product + bias[i].to(acc))
    return y.to(expert_weight.dtype)


def mixed_linear_backward(
    inputs: Inputs, dy: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, expert_weight, weights, bias); empty where not needed."""
    x, expert_weight, weights, bias, example_ids, invariant = inputs
    acc, linear = accumulator(x.dtype), linear_of(invariant)
    w = broadcast_weights(x, weights, example_ids).to(acc)
    dy_acc, x_flat = dy.to(acc), x.to(acc).flatten(0, -2)
    scaled = [w[..., i : i + 1] * dy_acc for i in range(expert_weight.shape[0])]
    dx, d_expert, d_weights, d_bias = (x.new_empty(0) for _ in needs)
    if needs[0]:
        # Added in order: a sum over a stacked axis rounds by the shape of the batch.
        total = x.new_zeros(x.shape, dtype=acc)
        for s, expert in zip(scaled, expert_weight, strict=True):
            total = total + linear(s, expert.t().to(acc))
        dx = total.to(x.dtype)
    flat = [s.flatten(0, -2) for s in scaled]
    if needs[1]:
        d_expert = torch.stack([s.t() @ x_flat for s in flat]).to(expert_weight.dtype)
    if needs[2]:
        products = [linear(x.to(acc), expert.to(acc)) for expert in expert_weight]
        if bias is not None:
            products = [p + b.to(acc) for p, b in zip(products, bias, strict=True)]
        per_token = torch.stack([(dy_acc * p).sum(-1) for p in products], dim=-1)
        d_weights = sum_per_example(per_token, weights.shape[0], example_ids).to(weights.dtype)
    if needs[3]:
        d_bias = torch.stack([s.sum(0) for s in flat]).to(expert_weight.dtype)
    return dx, d_expert, d_weights, d_bias
