"""`linear_logprob`: the public function, autograd, the registration and the table of backends."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clp_kernels import checks, registry
from clp_kernels.invariant import is_batch_invariant
from clp_kernels.ops.linear_logprob import cpu, reference
from clp_kernels.ops.linear_logprob.head import Inputs
from clp_kernels.registry import Backend, register, triton_backend


class LogProb(NamedTuple):
    """What `linear_logprob` returns: each in the targets' shape, None if it is not asked for."""

    logprobs: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def linear_logprob(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    ref_hidden: Tensor | None = None,
    backend: str = "auto",
) -> LogProb:
    """Per-token log-probability, entropy and exact KL from hidden states, without [T, V].

        z = (h W^T + bias) / temperature,  logprob = z_target - logsumexp(z)
        entropy = -sum_v p_v log p_v,      kl = sum_v p_v (log p_v - log q_v)

    q is the reference policy: the same head, bias and temperature on `ref_hidden`. With `weights`
    the head is mixed per example: W = sum_i weights[b, i] W_i (logit-conditioned CLP).

    Args:
        hidden: [..., d].
        head_weight: [V, d], or [m, V, d] with `weights`; hidden's dtype.
        targets: int64, hidden's leading shape; -100 is ignored (all outputs 0, no gradient).
        bias: [V], or [m, V] with `weights`.
        weights: [B, m] for hidden [B, ..., d].
        temperature: > 0: a number or a tensor that broadcasts to the targets.
        return_entropy: whether to compute the entropy.
        ref_hidden: hidden's shape: the reference policy's hidden states.
        backend: see `mixed_lora`.

    Returns:
        LogProb(logprobs, entropy, kl) in float32 (float64 for float64), in the targets' shape;
        entropy and kl are None where not asked for. [T, V] never exists: at most 2^22 logits at a
        time, in the CPU's backward 2^24, on a GPU 2^26; twice that with ref_hidden, and once more
        for a mixed head.

    Differentiable in hidden, head_weight, bias and weights (once), not in ref_hidden. A trained
    head moves the reference too, and kl's gradient says so: keep the head frozen where q must stay
    put. Deterministic.

    Cost, in products of T x V x d: with a frozen head the gradients of logprobs and kl with respect
    to hidden are made in the forward, while the logits are there (2 instead of 3 for logprobs, 4
    instead of 5 with kl), and kept as [T, d] each. With a trained head, or where the entropy is
    part of the loss, the backward makes the logits again: 4 products in all for logprobs, and 5
    where the logits of too few tokens could be kept (on the CPU V above 2^16, on a GPU more than
    2^23 logits of 2,048 tokens). A mixed head
    takes m products where a plain one takes one, and its gradient of weights one that the hidden
    states' needs anyway.

    Raises: as `mixed_lora`.
    """
    if not isinstance(hidden, Tensor) or hidden.dim() < 1:
        raise ValueError(f"hidden must be a tensor [..., d], got {checks.describe(hidden)}")
    checks.tensor("hidden", hidden, tuple(hidden.shape), None)
    dim = hidden.shape[-1]
    head_shape = (None, dim) if weights is None else (None, None, dim)
    checks.tensor("head_weight", head_weight, head_shape, hidden)
    checks.same_dtype("head_weight", head_weight, hidden.dtype)
    if bias is not None:
        checks.tensor("bias", bias, tuple(head_weight.shape[:-1]), hidden)
        checks.same_dtype("bias", bias, hidden.dtype)
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        raise TypeError(f"targets must be an int64 tensor, got {checks.describe(targets)}")
    if targets.shape != hidden.shape[:-1]:
        expected = list(hidden.shape[:-1])
        raise ValueError(f"targets must have shape {expected}, got {list(targets.shape)}")
    checks.same_device("targets", targets, hidden)
    checks.in_range("targets", targets, 0, head_weight.shape[-2], also=-100)
    if ref_hidden is not None:
        checks.tensor("ref_hidden", ref_hidden, tuple(hidden.shape), hidden)
        checks.same_dtype("ref_hidden", ref_hidden, hidden.dtype)
    ids = None
    if weights is not None:
        if hidden.dim() < 2:
            raise ValueError(f"hidden must be [B, ..., d] with weights, got {list(hidden.shape)}")
        batch = hidden.shape[0]
        weights = checks.weights(weights, batch, head_weight.shape[0], hidden)
        per_example = targets.numel() // max(batch, 1)
        ids = torch.arange(batch, device=hidden.device).repeat_interleave(per_example)
    tau = checks.broadcast_temperature(temperature, targets.shape, hidden)
    trained = any(t is not None and t.requires_grad for t in (head_weight, bias, weights))
    outputs = _LinearLogprob.apply(
        hidden.reshape(-1, dim),
        head_weight,
        targets.reshape(-1),
        bias,
        weights,
        ids,
        tau.reshape(-1),
        return_entropy,
        None if ref_hidden is None else ref_hidden.detach().reshape(-1, dim),
        torch.is_grad_enabled() and hidden.requires_grad and not trained,
        is_batch_invariant(),
        backend,
    )
    logprobs, entropy, kl = outputs
    return LogProb(
        logprobs.view(targets.shape),
        entropy.view(targets.shape) if return_entropy else None,
        kl.view(targets.shape) if ref_hidden is not None else None,
    )


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, _, hidden_grads = _pack(*args[:-1])
        *outputs, d_logprobs, d_kl = torch.ops.clp_kernels.linear_logprob(*args)
        ctx.save_for_backward(d_logprobs, d_kl, *inputs[:-1])
        ctx.hidden_grads, ctx.invariant, ctx.backend = hidden_grads, inputs.invariant, args[-1]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_logprobs, d_kl, *saved = ctx.saved_tensors
        inputs = Inputs._make([*saved, ctx.invariant])
        hidden = inputs.hidden
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
        if ctx.hidden_grads and grads[1] is None:
            terms = [
                each * upstream[:, None]
                for each, upstream in ((d_logprobs, grads[0]), (d_kl, grads[2]))
                if upstream is not None
            ]
            total = sum(terms[1:], terms[0])
            return (total.to(hidden.dtype), *[None] * 11)
        # The logits are made again: the head is trained, or the entropy is part of the loss.
        acc = checks.accumulator(hidden.dtype)
        present = (True, grads[1] is not None, grads[2] is not None)
        upstreams = [
            hidden.new_zeros(len(hidden) if there else 0, dtype=acc) if grad is None else grad
            for grad, there in zip(grads, present, strict=True)
        ]
        if not present[2]:  # the reference policy's logits are not needed again
            inputs = inputs._replace(ref_hidden=None)
        arguments = (*upstreams, *inputs, needs, ctx.backend)
        found = torch.ops.clp_kernels.linear_logprob_backward(*arguments)
        d_hidden, d_head, d_bias, d_weights = registry.needed(found, needs)
        return (d_hidden, d_head, None, d_bias, d_weights, *[None] * 7)


def _pack(*args: Any) -> tuple[Inputs, bool, bool]:
    """The inputs, return_entropy and hidden_grads, out of the forward's schema."""
    *tensors, return_entropy, ref_hidden, hidden_grads, invariant = args
    return Inputs._make([*tensors, ref_hidden, invariant]), return_entropy, hidden_grads


def _backward_pack(*args: Any) -> tuple[Inputs, tuple[Tensor, ...], list[bool]]:
    """The inputs, the gradients of the outputs and needs, out of the backward's schema."""
    return Inputs._make(args[3:-1]), args[:3], args[-1]


def _fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, return_entropy, hidden_grads = _pack(*args[:-1])
    hidden, tokens, has_ref = inputs.hidden, len(inputs.targets), inputs.ref_hidden is not None
    acc = checks.accumulator(hidden.dtype)
    sizes = (tokens, tokens if return_entropy else 0, tokens if has_ref else 0)
    shapes = (hidden.shape if on else (0,) for on in (hidden_grads, hidden_grads and has_ref))
    per_token = (hidden.new_empty(size, dtype=acc) for size in sizes)
    return (*per_token, *(hidden.new_empty(shape) for shape in shapes))


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, _, needs = _backward_pack(*args[:-1])
    d_bias = inputs.head_weight.new_empty(inputs.head_weight.shape[:-1])
    leaves = [inputs.hidden, inputs.head_weight, d_bias, inputs.weights]
    return registry.fake_gradients(leaves, needs)


register(
    "linear_logprob(Tensor hidden, Tensor head_weight, Tensor targets, Tensor? bias,"
    " Tensor? weights, Tensor? example_ids, Tensor temperature, bool return_entropy,"
    " Tensor? ref_hidden, bool hidden_grads, bool invariant, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    Backend("cpu", cpu.linear_logprob, cpu.why_not),
    triton_backend("clp_kernels.ops.linear_logprob.triton", "linear_logprob"),
    Backend("reference", reference.linear_logprob),
    pack=_pack,
)
register(
    "linear_logprob_backward(Tensor d_logprobs, Tensor d_entropy, Tensor d_kl, Tensor hidden,"
    " Tensor head_weight, Tensor targets, Tensor? bias, Tensor? weights, Tensor? example_ids,"
    " Tensor temperature, Tensor? ref_hidden, bool invariant, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    Backend("cpu", cpu.linear_logprob_backward, cpu.why_not),
    triton_backend("clp_kernels.ops.linear_logprob.triton", "linear_logprob_backward"),
    Backend("reference", reference.linear_logprob_backward),
    pack=_backward_pack,
)
