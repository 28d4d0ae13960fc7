"""The public ops: what each computes, its checks, and autograd around the registered kernels.

mixed_lora -> _MixedLoRA (autograd) -> torch.ops.clp_kernels.mixed_lora (clp_kernels.ops) -> the
backend that clp_kernels.registry selects. The other ops follow the same path.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clp_kernels import checks, invariant, registry
from clp_kernels.invariant import is_batch_invariant
from clp_kernels.ops import schemas as ops

_op = torch.ops.clp_kernels


class Sample(NamedTuple):
    """What `sample` returns: tokens int64 [B]; logprobs and filtered_logprobs float32 [B]."""

    tokens: Tensor
    logprobs: Tensor
    filtered_logprobs: Tensor


class LogProb(NamedTuple):
    """What `linear_logprob` returns: each in the targets' shape, None where not asked for."""

    logprobs: Tensor
    entropy: Tensor | None
    kl: Tensor | None


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
    own row; not to "linear", which has cross terms.

    Args:
        x: [B, ..., in_features], one row of `weights` an example; or [T, in_features] with
            `example_ids`. float32, bfloat16, float16 or float64; any strides.
        base_weight: [out_features, in_features], x's dtype.
        lora_A: [m, r, in_features], x's dtype or float32.
        lora_B: [m, out_features, r], dtype of lora_A.
        weights: [B, m], any real numbers; m adapters.
        scaling: lora_alpha / r: a number or [m].
        bias: [out_features], x's dtype.
        example_ids: int32 or int64 [T]: the row of `weights` for each token.
        backend: "auto", "reference", "cpu", "triton" or "cuda". A named one never falls back.

    Returns:
        [B, ..., out_features] in x's dtype. The low-rank part accumulates in float32 (float64 for
        float64). A row of zeros in `weights`, and any row where all of lora_B is zero, gives the
        bits of F.linear(x, base_weight, bias) on the backends "cpu" and "reference".

    Differentiable in x, base_weight, lora_A, lora_B, weights, bias and scaling (once).
    Deterministic. Saved for the backward: the inputs and u = x A^T, [T, m*r].

    Raises:
        TypeError, ValueError: dtype, shape, device or value; the message names the argument.
        RuntimeError: a named backend cannot run this call; the message gives its reason.

    Source: Conditional Language Policy (arXiv:2407.15762), parameter-space conditioning with LoRA
    as the conditioned parameters; shrink and expand after Punica (arXiv:2310.18547).
    """
    # Few frames on the way: each costs microseconds where the caches are full of weights.
    if not torch.compiler.is_dynamo_compiling():
        fast_path = registry.BACKENDS["mixed_lora"][0].fast_path()
        if fast_path is not None:
            y = fast_path(
                x,
                base_weight,
                lora_A,
                lora_B,
                weights,
                scaling,
                bias,
                example_ids,
                backend,
                invariant.depth,
            )
            if y is not None:
                return y  # type: ignore[no-any-return]
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ValueError(f"x must be a tensor [B, ..., in] or [T, in], got {_describe(x)}")
    checks.tensor("x", x, x.shape, None)
    in_features = x.shape[-1]
    checks.tensor("base_weight", base_weight, (None, in_features), x)
    checks.same_dtype("base_weight", base_weight, x.dtype)
    checks.tensor("lora_A", lora_A, (None, None, in_features), x)
    m, r = lora_A.shape[:2]
    checks.tensor("lora_B", lora_B, (m, base_weight.shape[0], r), x)
    checks.same_dtype("lora_A", lora_A, x.dtype, torch.float32)
    checks.same_dtype("lora_B", lora_B, lora_A.dtype)
    weights = _check_rows(weights, m, x, example_ids)
    if bias is not None:
        checks.tensor("bias", bias, (base_weight.shape[0],), x)
        checks.same_dtype("bias", bias, x.dtype)
    checks.scaling(scaling, m, x)
    if not _is(scaling, 1):
        weights = weights * scaling
    return apply_mixed_lora(x, base_weight, lora_A, lora_B, weights, bias, example_ids, backend)


def apply_mixed_lora(
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    backend: str,
) -> Tensor:
    """`mixed_lora` without its checks, for the layers: weights float32 and already scaled."""
    args = (x, base_weight, lora_A, lora_B, weights, bias, example_ids, is_batch_invariant())
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in args[:6]]):
        return _MixedLoRA.apply(*args, backend)  # type: ignore[no-any-return]
    return ops.call("mixed_lora", *args, backend)[0]  # type: ignore[no-any-return]


class _MixedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, base_weight, lora_A, lora_B, weights, _, example_ids, invariant, backend = args
        y, u = _op.mixed_lora(*args)
        ctx.save_for_backward(x, base_weight, lora_A, lora_B, weights, example_ids, u)
        ctx.invariant, ctx.backend = invariant, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:6])
        saved = ctx.saved_tensors
        grads = _op.mixed_lora_backward(dy, *saved, ctx.invariant, needs, ctx.backend)
        return (*_asked(grads, needs), None, None, None)


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
        example_ids: int32 or int64 [T]: the row of `weights` for each token.
        backend: see `mixed_lora`.

    Returns:
        [B, ..., out_features] in x's dtype, accumulated in float32 in the order i = 0, 1, ...

    Differentiable in every tensor input but example_ids (once). Deterministic.
    Raises: as `mixed_lora`.
    Source: arXiv:2407.15762, full-, attention- and logit-conditioned CLP.
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ValueError(f"x must be a tensor [B, ..., in] or [T, in], got {_describe(x)}")
    checks.tensor("x", x, x.shape, None)
    checks.tensor("expert_weight", expert_weight, (None, None, x.shape[-1]), x)
    checks.same_dtype("expert_weight", expert_weight, x.dtype)
    m, out_features = expert_weight.shape[:2]
    weights = _check_rows(weights, m, x, example_ids)
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
        return _op.mixed_linear(*args)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:4])
        saved = ctx.saved_tensors
        grads = _op.mixed_linear_backward(dy, *saved, ctx.invariant, needs, ctx.backend)
        return (*_asked(grads, needs), None, None, None)


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
    rounding when the head is linear, with a bias when each row of weights sums to 1, and for any
    temperature. Not exact with a soft cap on the logits, with a head of its own for each policy,
    before a norm, or in probability mode. Of [m, B, S, d] give view(m, B, S * d).

    Args:
        logits: [m, B, V], or hidden states [m, B, d] (see above).
        weights: [B, m], any real numbers; >= 0 in probability mode.
        mode: "geometric" or "probability".
        backend: see `mixed_lora`.

    Returns:
        [B, V] in the logits' dtype, accumulated in float32 in the order i = 0, 1, ... Bitwise
        independent of the other rows.

    Differentiable in logits and weights (once); entries where z = -inf pass no gradient.
    Raises: as `mixed_lora`.
    Source: arXiv:2407.15762 section 6 (logit mixing); arXiv:2305.15065 (product of policies).
    """
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ValueError(f"logits must be a tensor [m, B, V], got {_describe(logits)}")
    checks.tensor("logits", logits, tuple(logits.shape), None)
    checks.mode(mode)
    weights = _check_mixture(weights, logits, mode)
    return _MixLogits.apply(logits, weights, mode, backend)  # type: ignore[no-any-return]


class _MixLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        logits, weights, mode, backend = args
        ctx.save_for_backward(logits, weights)
        ctx.mode, ctx.backend = mode, backend
        return _op.mix_logits(logits, weights, mode, backend)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:2])
        grads = _op.mix_logits_backward(dz, *ctx.saved_tensors, ctx.mode, needs, ctx.backend)
        return (*_asked(grads, needs), None, None)


def sample(
    logits: Tensor,
    *,
    weights: Tensor | None = None,
    mode: str = "geometric",
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    position: int | Tensor,
    backend: str = "auto",
) -> Sample:
    """Mixes, filters and draws one token a row, with its log-probabilities.

        z = mix_logits(logits, weights, mode), or logits
        token = argmax_v( z_v / temperature + g_v ) over the kept v,  g_v = -log(-log u_v)

    u_v is Philox4x32-10 keyed by (seed_b, position_b, v): the same row, seed and position give the
    same token whatever else is in the batch, and the same uniforms on every backend. Filters in
    transformers' order: top-k, top-p over the renormalised rest, min-p. Ties at a filter's
    threshold are all kept; ties of the argmax go to the lowest index.

    Args:
        logits: [B, V], or [m, B, V] with `weights`.
        weights: [B, m]; see `mix_logits`.
        temperature: >= 0; 0 is greedy, and what is below 1e-30 counts as 1e-30. A number or [B],
            like all that follow.
        top_k: 0 is off. top_p: in (0, 1], 1 is off; an id stays if the ids that are more likely
            hold less than top_p. min_p: in [0, 1], 0 is off; an id stays if it is at least min_p
            times as likely as the likeliest. Temperature, top_p and min_p are compared in float64:
            a number is not rounded, and a tensor is what its own dtype holds.
        seed, position: int64; position is the index of the token in its sequence.
        backend: see `mixed_lora`.

    Returns:
        Sample(tokens int64, logprobs float32, filtered_logprobs float32), each [B]. `logprobs`:
        under softmax(z / temperature), before the filters (at temperature 0: under softmax(z)).
        `filtered_logprobs`: after the filters, renormalised (at temperature 0: 0).

    Not differentiable. Deterministic.

    Raises:
        TypeError, ValueError: as `mixed_lora`; also, on the CPU, for a row with NaN, +inf or no
            finite logit. On a GPU such a row gives token -1 and NaN.
        RuntimeError: a named backend cannot run this call.

    Source: Gumbel-max (Maddison et al., arXiv:1411.0030); Philox (Salmon et al., SC 2011).
    """
    if not torch.compiler.is_dynamo_compiling():
        fast_path = registry.BACKENDS["sample"][0].fast_path()
        if fast_path is not None:
            filters = (temperature, top_k, top_p, min_p)
            drawn = fast_path(logits, weights, mode, *filters, seed, position, backend)
            if drawn is not None:
                return Sample(*drawn)
    if not isinstance(logits, Tensor) or logits.dim() != (2 if weights is None else 3):
        wanted = "[B, V] (without weights)" if weights is None else "[m, B, V] (with weights)"
        raise ValueError(f"logits must be a tensor {wanted}, got {_describe(logits)}")
    checks.tensor("logits", logits, tuple(logits.shape), None)
    checks.mode(mode)
    stacked = logits.detach() if weights is not None else logits.detach()[None]
    if stacked.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least 1, got {list(logits.shape)}")
    if weights is not None:
        weights = _check_mixture(weights, stacked, mode).detach()
    batch = stacked.shape[1]
    integer = "an integer"
    rows = checks.per_row
    # float64, so that a number is compared as it was given.
    f64, i64 = torch.float64, torch.int64
    outputs = ops.call(
        "sample",
        stacked,
        weights,
        mode,
        rows("temperature", temperature, batch, logits, f64, "finite and >= 0"),
        # A filter that is switched off by a plain number costs nothing; a tensor is never read.
        None if _is(top_k, 0) else rows("top_k", top_k, batch, logits, i64, "0 (off) or positive"),
        None if _is(top_p, 1) else rows("top_p", top_p, batch, logits, f64, "in (0, 1]"),
        None if _is(min_p, 0) else rows("min_p", min_p, batch, logits, f64, "in [0, 1]"),
        rows("seed", seed, batch, logits, i64, integer),
        rows("position", position, batch, logits, i64, integer),
        backend,
    )
    result = Sample(*outputs)
    if checks.readable(result.tokens) and bool((result.tokens < 0).any()):
        row = int((result.tokens < 0).nonzero()[0])
        raise ValueError(f"logits row {row} must have a finite entry and no NaN or +inf")
    return result


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
    part of the loss, the backward makes the logits again: 4 products in all for logprobs; on the
    CPU 5 where V is above 2^16, because the logits of too few tokens could be kept. A mixed head
    takes m products where a plain one takes one, and its gradient of weights one that the hidden
    states' needs anyway.

    Raises: as `mixed_lora`.
    """
    if not isinstance(hidden, Tensor) or hidden.dim() < 1:
        raise ValueError(f"hidden must be a tensor [..., d], got {_describe(hidden)}")
    checks.tensor("hidden", hidden, tuple(hidden.shape), None)
    dim = hidden.shape[-1]
    head_shape = (None, dim) if weights is None else (None, None, dim)
    checks.tensor("head_weight", head_weight, head_shape, hidden)
    checks.same_dtype("head_weight", head_weight, hidden.dtype)
    if bias is not None:
        checks.tensor("bias", bias, tuple(head_weight.shape[:-1]), hidden)
        checks.same_dtype("bias", bias, hidden.dtype)
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        raise TypeError(f"targets must be an int64 tensor, got {_describe(targets)}")
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
        weights = checks.weight_rows(weights, batch, head_weight.shape[0], hidden)
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
        hidden, head, targets, bias, weights, ids, tau, _, ref, _, invariant, backend = args
        *outputs, slope, kl_slope = _op.linear_logprob(*args)
        saved = (slope, kl_slope, hidden, head, targets, bias, weights, ids, tau, ref)
        ctx.save_for_backward(*saved)
        ctx.sloped, ctx.invariant, ctx.backend = args[9], invariant, backend
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        slope, kl_slope, *saved, ref = ctx.saved_tensors
        hidden = saved[0]
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
        if ctx.sloped and grads[1] is None:
            terms = [
                each * upstream[:, None]
                for each, upstream in ((slope, grads[0]), (kl_slope, grads[2]))
                if upstream is not None
            ]
            total = sum(terms[1:], terms[0])
            return (total.to(hidden.dtype), *[None] * 11)
        # The logits again: the head is trained, or the entropy is part of the loss.
        acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        present = (True, grads[1] is not None, grads[2] is not None)
        upstreams = [
            hidden.new_zeros(len(hidden) if there else 0, dtype=acc) if grad is None else grad
            for grad, there in zip(grads, present, strict=True)
        ]
        # Where kl is only watched, the reference policy's logits are not needed again.
        ref = ref if present[2] else None
        arguments = (*upstreams, *saved, ref, ctx.invariant, needs, ctx.backend)
        d_hidden, d_head, d_bias, d_weights = _asked(_op.linear_logprob_backward(*arguments), needs)
        return (d_hidden, d_head, None, d_bias, d_weights, *[None] * 7)


def _check_rows(weights: Tensor, m: int, x: Tensor, example_ids: Tensor | None) -> Tensor:
    """weights for x [B, ..., in], or for x [T, in] with example_ids; as float32 or float64."""
    if example_ids is None:
        return checks.weight_rows(weights, x.shape[0], m, x)
    if x.dim() != 2:
        raise ValueError(f"x must be [T, in] when example_ids is given, got {list(x.shape)}")
    weights = checks.weight_rows(weights, None, m, x)
    checks.example_ids(example_ids, x.shape[0], weights.shape[0], x)
    return weights


def _check_mixture(weights: Tensor, logits: Tensor, mode: str) -> Tensor:
    rows = checks.weight_rows(weights, logits.shape[1], logits.shape[0], logits)
    if mode == "probability" and checks.readable(rows) and bool((rows < 0).any()):
        raise ValueError(f"weights must be >= 0 in probability mode, got {rows.min().item()}")
    return rows


def _asked(grads: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _is(value: object, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
