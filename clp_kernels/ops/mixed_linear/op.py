"""`mixed_linear`: the public function, autograd, the registration and the table of backends."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clp_kernels import checks, registry
from clp_kernels.invariant import is_batch_invariant
from clp_kernels.ops.mixed_linear import cpu, cuda, reference
from clp_kernels.ops.mixed_linear.reference import Inputs
from clp_kernels.registry import Backend, register, triton_backend


def mixed_linear(
    x: Tensor,
    expert_weight: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    example_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer whose matrix is mixed per example from m full matrices.

        y_t = sum_i weights[b(t), i] * (x_t W_i^T + bias_i)

    Args:
        x: [B, ..., in_features], or [T, in_features] with `example_ids`.
        expert_weight: [m, out_features, in_features], x's dtype.
        weights: [B, m], any real numbers.
        bias: [m, out_features], x's dtype.
        example_ids: int32 or int64 [T]: the example, an index into `weights`, of each token.
        backend: see `mixed_lora`.

    Returns:
        [B, ..., out_features] in x's dtype, accumulated in float32 in the order i = 0, 1, ...

    Differentiable in every tensor input but example_ids (once). Deterministic.
    Raises: as `mixed_lora`.
    Source: arXiv:2407.15762, full-, attention- and logit-conditioned CLP.
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ValueError(f"x must be a tensor [B, ..., in] or [T, in], got {checks.describe(x)}")
    checks.tensor("x", x, x.shape, None)
    checks.tensor("expert_weight", expert_weight, (None, None, x.shape[-1]), x)
    checks.same_dtype("expert_weight", expert_weight, x.dtype)
    m, out_features = expert_weight.shape[:2]
    weights = checks.weights_for(x, weights, m, example_ids)
    if bias is not None:
        checks.tensor("bias", bias, (m, out_features), x)
        checks.same_dtype("bias", bias, x.dtype)
    args = (x, expert_weight, weights, bias, example_ids, is_batch_invariant(), backend)
    return _MixedLinear.apply(*args)  # type: ignore[no-any-return]


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:5])
        ctx.invariant, ctx.backend = args[5:]
        return torch.ops.clp_kernels.mixed_linear(*args)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:4])
        arguments = (dy, *ctx.saved_tensors, ctx.invariant, needs, ctx.backend)
        grads = torch.ops.clp_kernels.mixed_linear_backward(*arguments)
        return (*registry.needed(grads, needs), None, None, None)


def _fake(x, expert_weight, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], expert_weight.shape[1])


def _backward_pack(dy: Tensor, *args: Any) -> tuple[Inputs, Tensor, list[bool]]:
    """The inputs, dy and needs, out of the backward's schema."""
    return Inputs(*args[:-1]), dy, args[-1]


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, _, needs = _backward_pack(*args[:-1])
    d_bias = inputs.expert_weight.new_empty(inputs.expert_weight.shape[:2])
    return registry.fake_gradients([*inputs[:3], d_bias], needs)


register(
    "mixed_linear(Tensor x, Tensor expert_weight, Tensor weights, Tensor? bias,"
    " Tensor? example_ids, bool invariant, str backend) -> Tensor",
    _fake,
    Backend("cpu", cpu.mixed_linear, cpu.why_not),
    Backend("cuda", cuda.mixed_linear, cuda.why_not, too_slow=cuda.too_slow),
    triton_backend("clp_kernels.ops.mixed_linear.triton", "mixed_linear"),
    Backend("reference", reference.mixed_linear),
    pack=lambda *args: (Inputs(*args),),
)
register(
    "mixed_linear_backward(Tensor dy, Tensor x, Tensor expert_weight, Tensor weights,"
    " Tensor? bias, Tensor? example_ids, bool invariant, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    Backend("cpu", cpu.mixed_linear_backward, cpu.why_not),
    triton_backend("clp_kernels.ops.mixed_linear.triton", "mixed_linear_backward"),
    Backend("reference", reference.mixed_linear_backward),
    pack=_backward_pack,
)
