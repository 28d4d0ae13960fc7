"""`mixed_lora`: the public function, autograd, the registration and the table of backends."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from clp_kernels import checks, invariant, registry
from clp_kernels.ops.mixed_lora import cpu, cuda, reference
from clp_kernels.ops.mixed_lora.reference import Inputs
from clp_kernels.registry import Backend, register, triton_backend


def mixed_lora(
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    example_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer plus a per-example weighted sum of LoRA updates, in one pass.

        y_t = x_t W^T + bias + sum_i weights[b(t), i] * scaling_i * (x_t A_i^T) B_i^T

    Equal to PEFT's add_weighted_adapter(combination_type="cat"), the exact sum, for each example's
    own weights; not to "linear", which has cross terms.

    Args:
        x: [B, ..., in_features], with weights[b] for example b; or [T, in_features] with
            `example_ids`. float32, bfloat16, float16 or float64; any strides.
        base_weight: [out_features, in_features], x's dtype.
        lora_A: [m, r, in_features], x's dtype or float32.
        lora_B: [m, out_features, r], dtype of lora_A.
        weights: [B, m], any real numbers; m adapters.
        scaling: lora_alpha / r: a number or [m].
        bias: [out_features], x's dtype.
        example_ids: int32 or int64 [T]: the example, an index into `weights`, of each token.
        backend: "auto", "reference", "cpu", "triton" or "cuda". A named one never falls back: it
            runs the call or raises. Of what it has no kernels for (such as the gradients in
            "cuda"), it means the backend that `python -m clp_kernels.info` names.

    Returns:
        [B, ..., out_features] in x's dtype. The low-rank part accumulates in float32 (float64 for
        float64). An example with weights of zero, and every example if all of lora_B is zero, gets
        the bits of F.linear(x, base_weight, bias) on the backends "cpu" and "reference".

    Differentiable in x, base_weight, lora_A, lora_B, weights, bias and scaling (once).
    Deterministic. Saved for the backward: the inputs and u = x A^T, [T, m*r].

    Raises:
        TypeError, ValueError: dtype, shape, device or value; the message names the argument.
        RuntimeError: a named backend cannot run this call; the message gives its reason.

    Source: Conditional Language Policy (arXiv:2407.15762), parameter-space conditioning with LoRA
    as the conditioned parameters; shrink and expand after Punica (arXiv:2310.18547).
    """
    # Tried first, and from here: each frame costs microseconds if the caches are full of weights.
    if not torch.compiler.is_dynamo_compiling():
        fast_path = registry.BACKENDS["mixed_lora"][0].fast_path()
        if fast_path is not None:
            y = fast_path(
                x, base_weight, lora_A, lora_B, weights, scaling, bias, example_ids, backend,
                invariant.depth,
            )  # fmt: skip
            if y is not None:
                return y  # type: ignore[no-any-return]
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ValueError(f"x must be a tensor [B, ..., in] or [T, in], got {checks.describe(x)}")
    checks.tensor("x", x, x.shape, None)
    in_features = x.shape[-1]
    checks.tensor("base_weight", base_weight, (None, in_features), x)
    checks.same_dtype("base_weight", base_weight, x.dtype)
    checks.tensor("lora_A", lora_A, (None, None, in_features), x)
    m, r = lora_A.shape[:2]
    checks.tensor("lora_B", lora_B, (m, base_weight.shape[0], r), x)
    checks.same_dtype("lora_A", lora_A, x.dtype, torch.float32)
    checks.same_dtype("lora_B", lora_B, lora_A.dtype)
    weights = checks.weights_for(x, weights, m, example_ids)
    if bias is not None:
        checks.tensor("bias", bias, (base_weight.shape[0],), x)
        checks.same_dtype("bias", bias, x.dtype)
    scaling = checks.scaling(scaling, m, x)
    if not checks.is_number(scaling, 1):
        weights = weights * scaling
    mode = invariant.is_batch_invariant()
    inputs = Inputs(x, base_weight, lora_A, lora_B, weights, bias, example_ids, mode)
    return apply_mixed_lora(inputs, backend)


def apply_mixed_lora(inputs: Inputs, backend: str) -> Tensor:
    """`mixed_lora` without its checks, for the layers."""
    recorded = torch.is_grad_enabled() and any(
        [t is not None and t.requires_grad for t in inputs[:6]]
    )
    # PyTorch then raises: there is no formula for the tangents, which would be lost without a word.
    if recorded or forward_ad._current_level >= 0:
        return _MixedLoRA.apply(*inputs, backend)  # type: ignore[no-any-return]
    return registry.call("mixed_lora", *inputs, backend)[0]  # type: ignore[no-any-return]


class _MixedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, base_weight, lora_A, lora_B, weights, _, example_ids, invariant, backend = args
        y, u = torch.ops.clp_kernels.mixed_lora(*args)
        ctx.save_for_backward(x, base_weight, lora_A, lora_B, weights, example_ids, u)
        ctx.invariant, ctx.backend = invariant, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:6])
        arguments = (dy, *ctx.saved_tensors, ctx.invariant, needs, ctx.backend)
        grads = torch.ops.clp_kernels.mixed_lora_backward(*arguments)
        return (*registry.needed(grads, needs), None, None, None)


def _fake(x, base_weight, lora_A, *_):  # type: ignore[no-untyped-def]
    m, r, _in = lora_A.shape
    u = x.new_empty(*x.shape[:-1], m * r, dtype=checks.accumulator(x.dtype))
    return x.new_empty(*x.shape[:-1], base_weight.shape[0]), u


def _backward_pack(dy: Tensor, *args: Any) -> tuple[Inputs, Tensor, Tensor, list[bool]]:
    """The inputs, dy, u and needs, out of the backward's schema."""
    *tensors, example_ids, u, invariant, needs = args
    return Inputs._make([*tensors, None, example_ids, invariant]), dy, u, needs


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, _, _, needs = _backward_pack(*args[:-1])
    bias = inputs.base_weight.new_empty(inputs.base_weight.shape[0])
    return registry.fake_gradients([*inputs[:5], bias], needs)


register(
    "mixed_lora(Tensor x, Tensor base_weight, Tensor lora_A, Tensor lora_B, Tensor weights,"
    " Tensor? bias, Tensor? example_ids, bool invariant, str backend) -> (Tensor, Tensor)",
    _fake,
    Backend("cpu", cpu.mixed_lora, cpu.why_not, cpu.fast_path),
    Backend("cuda", cuda.mixed_lora, cuda.why_not, too_slow=cuda.too_slow),
    triton_backend("clp_kernels.ops.mixed_lora.triton", "mixed_lora"),
    Backend("reference", reference.mixed_lora),
    pack=lambda *args: (Inputs(*args),),
)
register(
    "mixed_lora_backward(Tensor dy, Tensor x, Tensor base_weight, Tensor lora_A, Tensor lora_B,"
    " Tensor weights, Tensor? example_ids, Tensor u, bool invariant, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    Backend("cpu", cpu.mixed_lora_backward, cpu.why_not),
    triton_backend("clp_kernels.ops.mixed_lora.triton", "mixed_lora_backward"),
    Backend("reference", reference.mixed_lora_backward),
    pack=_backward_pack,
)
