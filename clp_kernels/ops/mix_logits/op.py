"""`mix_logits`: the public function, autograd, the registration and the table of backends."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clp_kernels import checks, registry
from clp_kernels.ops.mix_logits import cpu, reference
from clp_kernels.registry import Backend, register, triton_backend


def mix_logits(
    logits: Tensor, weights: Tensor, *, mode: str = "geometric", backend: str = "auto"
) -> Tensor:
    """Mixes the logits of m policies per example: a product of experts, or a mixture.

        geometric:    z = sum_i weights[b, i] l_i
        probability:  z = log sum_i weights[b, i] softmax(l_i)

    A term of weight zero is left out (0 * -inf is 0); a used -inf gives -inf in geometric mode.

    Hidden states instead of logits: where the m policies share one linear head, geometric mixing
    before the head gives the same z from one product in place of m,

        sum_i w_i (h_i W^T + bias) = (sum_i w_i h_i) W^T + (sum_i w_i) bias

    so F.linear(mix_logits(hidden, weights), W) and linear_logprob(mix_logits(hidden, weights), W,
    targets), with hidden [m, B, d] as it enters the head (behind the last norm). Exact up to
    rounding when the head is linear, with a bias when the weights of each example sum to 1, and for
    any temperature. Not exact with a soft cap on the logits, with a head of its own for each
    policy, before a norm, or in probability mode. Of [m, B, S, d] give view(m, B, S * d).

    Args:
        logits: [m, B, V], or hidden states [m, B, d] (see above).
        weights: [B, m], any real numbers; >= 0 in probability mode.
        mode: "geometric" or "probability".
        backend: see `mixed_lora`.

    Returns:
        [B, V] in the logits' dtype, accumulated in float32 in the order i = 0, 1, ... Bitwise
        independent of the other examples.

    Differentiable in logits and weights (once); entries where z = -inf pass no gradient.
    Raises: as `mixed_lora`.
    Source: arXiv:2407.15762 section 6 (logit mixing); arXiv:2305.15065 (product of policies).
    """
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ValueError(f"logits must be a tensor [m, B, V], got {checks.describe(logits)}")
    checks.tensor("logits", logits, tuple(logits.shape), None)
    checks.mode(mode)
    weights = check_mixture(weights, logits, mode)
    return _MixLogits.apply(logits, weights, mode, backend)  # type: ignore[no-any-return]


class _MixLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        logits, weights, mode, backend = args
        ctx.save_for_backward(logits, weights)
        ctx.mode, ctx.backend = mode, backend
        return torch.ops.clp_kernels.mix_logits(*args)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:2])
        arguments = (dz, *ctx.saved_tensors, ctx.mode, needs, ctx.backend)
        grads = torch.ops.clp_kernels.mix_logits_backward(*arguments)
        return (*registry.needed(grads, needs), None, None)


def check_mixture(weights: Tensor, logits: Tensor, mode: str) -> Tensor:
    """The weights for logits [m, B, V], as float32 or float64. Raises as `mix_logits`."""
    checked = checks.weights(weights, logits.shape[1], logits.shape[0], logits)
    if mode == "probability" and checks.readable(checked) and bool((checked < 0).any()):
        raise ValueError(f"weights must be >= 0 in probability mode, got {checked.min().item()}")
    return checked


def _fake(logits, *_):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[1:])


def _backward_fake(dz, logits, weights, mode, needs, backend):  # type: ignore[no-untyped-def]
    return registry.fake_gradients([logits, weights], needs)


register(
    "mix_logits(Tensor logits, Tensor weights, str mode, str backend) -> Tensor",
    _fake,
    Backend("cpu", cpu.mix_logits, cpu.why_not),
    triton_backend("clp_kernels.ops.mix_logits.triton", "mix_logits"),
    Backend("reference", reference.mix_logits),
)
register(
    "mix_logits_backward(Tensor dz, Tensor logits, Tensor weights, str mode, bool[] needs,"
    " str backend) -> (Tensor, Tensor)",
    _backward_fake,
    Backend("cpu", cpu.mix_logits_backward, cpu.why_not),
    triton_backend("clp_kernels.ops.mix_logits.triton", "mix_logits_backward"),
    Backend("reference", reference.mix_logits_backward),
)
