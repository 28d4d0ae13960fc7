"""The definition of mixed_lora in plain PyTorch, on any device: forward and backward.

The other backends are tested against the reference.py of their op (clp_kernels.testing has the
error budget), which is written to be checked by eye, not for speed. Low-precision inputs accumulate
in float32, float64 stays float64 ("acc" below). Formulas, shapes and errors are documented on the
public function in op.py, which has checked the arguments.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels.checks import accumulator

INVARIANT_TILE = 16


class Inputs(NamedTuple):
    """Checked inputs of the forward and the backward.

    x [B, ..., in], or [T, in] with example_ids, int32 or int64 [T]; base_weight [out, in] and bias
    [out] or None, which the backward does not read, in x's dtype; lora_A [m, r, in] and lora_B
    [m, out, r], both in x's dtype or both float32; weights [B, m] float32 (float64 beside float64)
    with the scaling folded in; invariant: whether `batch_invariant()` is active.
    """

    x: Tensor
    base_weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    weights: Tensor
    bias: Tensor | None
    example_ids: Tensor | None
    invariant: bool


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in tiles of 16 tokens, so that a token's bits do not depend on the batch.

    A GEMM library picks its kernel by the number of rows, and by the layout and the alignment of
    each row; with calls of one shape, on contiguous rows of whole cache lines, it always picks the
    same (docs/log.md: without the zeros at the end of rows 67 of 600 odd shapes failed). Costs one
    call per tile and copies of x and, if it is transposed or of odd width, of the weight.
    """
    in_features = weight.shape[1]
    padded = -(-in_features // 32) * 32
    if padded != in_features or not weight.is_contiguous():
        weight = F.pad(weight, (0, padded - in_features)).contiguous()
    rows = x.flatten(0, -2)
    out = x.new_empty(rows.shape[0], weight.shape[0])
    for start in range(0, rows.shape[0], INVARIANT_TILE):
        part = rows[start : start + INVARIANT_TILE]
        # On an allocation of its own, which is aligned.
        tile = x.new_zeros(INVARIANT_TILE, padded)
        tile[: part.shape[0], :in_features] = part
        out[start : start + INVARIANT_TILE] = F.linear(tile, weight, bias)[: part.shape[0]]
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_of(invariant: bool) -> Callable[..., Tensor]:
    """The product with a matrix, inside or outside of `batch_invariant()`."""
    return tiled_linear if invariant else F.linear


def broadcast_weights(x: Tensor, weights: Tensor, example_ids: Tensor | None) -> Tensor:
    """weights [B, m] as [..., m], broadcastable against the leading axes of x."""
    if example_ids is not None:
        return weights[example_ids.long()]
    return weights.view(weights.shape[0], *([1] * (x.dim() - 2)), weights.shape[1])


def sum_per_example(per_token: Tensor, batch_size: int, example_ids: Tensor | None) -> Tensor:
    """Sums [..., m] over the tokens of each example -> [B, m], in a fixed order (no atomics)."""
    if example_ids is None:
        m = per_token.shape[-1]
        tokens = per_token.numel() // max(1, batch_size * m)
        return per_token.reshape(batch_size, tokens, m).sum(1)
    # Sorted by example, and summed segment by segment: a product with a membership matrix would
    # carry one example's NaN to all, and index_add is atomic on a GPU.
    order = example_ids.argsort(stable=True)
    bounds = torch.arange(batch_size + 1, device=example_ids.device, dtype=example_ids.dtype)
    offsets = torch.searchsorted(example_ids[order], bounds)
    return torch.segment_reduce(
        per_token[order], "sum", offsets=offsets, axis=0, unsafe=True, initial=0.0
    )


def mixed_lora(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns y [..., out] in x's dtype and u = x A^T [..., m*r], kept for the backward."""
    x, base_weight, lora_A, lora_B, weights, bias, example_ids, invariant = inputs
    acc, linear = accumulator(x.dtype), linear_of(invariant)
    m, r, in_features = lora_A.shape
    w = broadcast_weights(x, weights, example_ids).to(acc)
    base = linear(x, base_weight, bias)
    u = linear(x.to(acc), lora_A.reshape(m * r, in_features).to(acc))
    z = (u.unflatten(-1, (m, r)) * w[..., None]).flatten(-2)
    delta = linear(z, lora_B.transpose(0, 1).flatten(1).to(acc))
    mixed = delta.add_(base).to(x.dtype)
    # Weights that are all zero give the bare linear bit for bit, even if A holds inf or base is
    # -0.0. On the CPU, where the weights can be read for free, a batch without such an example
    # skips the pass over y.
    active = (w != 0).any(-1, keepdim=True)
    if active.device.type == "cpu" and bool(active.all()):
        return mixed, u
    return torch.where(active, mixed, base), u


def mixed_lora_backward(
    inputs: Inputs, dy: Tensor, u: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, base_weight, lora_A, lora_B, weights, bias); empty where not needed.

    With w the weights of each token, G = dy B and dU = G * w:
        dx = dy W + dU A,  dA = dU^T x,  dB = dy^T (U * w),
        dweights[b, i] = sum over the tokens and rank of adapter i of G * U.
    """
    x, base_weight, lora_A, lora_B, weights, _, example_ids, invariant = inputs
    acc, linear = accumulator(x.dtype), linear_of(invariant)
    m, r, in_features = lora_A.shape
    w = broadcast_weights(x, weights, example_ids).to(acc)
    dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias = (x.new_empty(0) for _ in needs)
    dy_acc = dy.to(acc)
    dy_flat = dy_acc.flatten(0, -2)
    A = lora_A.reshape(m * r, in_features).to(acc)
    B = lora_B.transpose(0, 1).flatten(1).to(acc)
    g = linear(dy_acc, B.t().contiguous()).unflatten(-1, (m, r))
    du = (g * w[..., None]).flatten(-2)
    if needs[0]:
        dx = linear(du, A.t().contiguous()).add_(linear(dy, base_weight.t())).to(x.dtype)
    if needs[1]:
        d_base = (dy_flat.t() @ x.to(acc).flatten(0, -2)).to(base_weight.dtype)
    if needs[2]:
        d_lora_A = du.flatten(0, -2).t() @ x.to(acc).flatten(0, -2)
        d_lora_A = d_lora_A.view(m, r, in_features).to(lora_A.dtype)
    if needs[3]:
        z = (u.unflatten(-1, (m, r)) * w[..., None]).flatten(-2).flatten(0, -2)
        d_lora_B = (z.t() @ dy_flat).unflatten(0, (m, r)).transpose(1, 2)
        d_lora_B = d_lora_B.to(lora_B.dtype).contiguous()
    if needs[4]:
        per_token = (g * u.unflatten(-1, (m, r))).sum(-1)
        d_weights = sum_per_example(per_token, weights.shape[0], example_ids).to(weights.dtype)
    if needs[5]:
        d_bias = dy_flat.sum(0).to(base_weight.dtype)
    return dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias
