"""The definition of linear_logprob in plain PyTorch, on any device: forward and backward.

Low-precision inputs accumulate in float32, float64 stays float64 ("acc" below). Formulas, shapes
and errors are documented on the public function in op.py, which has checked the arguments.
"""

import torch
from torch import Tensor

from clp_kernels.checks import accumulator
from clp_kernels.ops.linear_logprob.head import Inputs, gradients
from clp_kernels.ops.mixed_linear.reference import Inputs as LinearInputs
from clp_kernels.ops.mixed_linear.reference import mixed_linear
from clp_kernels.ops.mixed_lora.reference import linear_of


def chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    """Chunks of tokens with at most 2^22 logits (16 MB in float32), so [T, V] never exists."""
    step = max(1, 2**22 // max(vocab_size, 1))
    return [slice(start, start + step) for start in range(0, num_tokens, step)]


def linear_logprob(
    inputs: Inputs, return_entropy: bool, hidden_grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy and kl, each [T] or empty, and with `hidden_grads` their gradients
    d logprobs / d hidden and d kl / d hidden, [T, d] in hidden's dtype, or empty."""
    hidden, acc = inputs.hidden, accumulator(inputs.hidden.dtype)
    logprobs, entropy, kl = [], [], []
    for tokens in chunks(hidden.shape[0], inputs.head_weight.shape[-2]):
        logp, logq = _log_probabilities(inputs, tokens)
        y = inputs.targets[tokens]
        ignored = y == -100
        picked = logp.gather(-1, y.masked_fill(ignored, 0)[:, None])[:, 0]
        logprobs.append(picked.masked_fill(ignored, 0.0))
        p = logp.exp()
        if return_entropy:
            terms = -p * logp.clamp(min=-1e30)
            entropy.append(_token_sums(terms, inputs.invariant).masked_fill(ignored, 0.0))
        if logq is not None:
            gap = torch.where(p > 0, logp - logq, 0.0)
            kl.append(_token_sums(p * gap, inputs.invariant).masked_fill(ignored, 0.0))
    columns = (logprobs, entropy, kl)
    first, second, third = (torch.cat([hidden.new_empty(0, dtype=acc), *c]) for c in columns)

    def gradient(of: Tensor) -> Tensor:
        """The backward with an upstream gradient of one for every token."""
        one, other = (torch.full_like(c, float(c is of)) for c in (first, third))
        upstream = (one, hidden.new_empty(0), other)
        return linear_logprob_backward(inputs, upstream, [True, False, False, False])[0]

    d_logprobs = gradient(first) if hidden_grads else hidden.new_empty(0)
    has_ref = inputs.ref_hidden is not None
    d_kl = gradient(third) if hidden_grads and has_ref else hidden.new_empty(0)
    return first, second, third, d_logprobs, d_kl


def _token_sums(terms: Tensor, invariant: bool) -> Tensor:
    """Sums [T, V] -> [T]. torch splits a long sum among threads only if there are few of them."""
    if not invariant or terms.shape[0] == 0:
        return terms.sum(-1)
    return torch.stack([row.sum() for row in terms])


def _log_probabilities(inputs: Inputs, tokens: slice) -> tuple[Tensor, Tensor | None]:
    """log p and log q of some tokens, [n, V]."""
    w = inputs.token_weights(tokens)
    tau = inputs.temperature[tokens].to(accumulator(inputs.hidden.dtype))[:, None]

    def log_softmax(states: Tensor) -> Tensor:
        return torch.log_softmax(_logits(inputs, states[tokens], w) / tau, dim=-1)

    ref = inputs.ref_hidden
    return log_softmax(inputs.hidden), None if ref is None else log_softmax(ref)


def _logits(inputs: Inputs, states: Tensor, w: Tensor | None) -> Tensor:
    """Logits [n, V] of states [n, d], by the head, or by the experts with the weights w [n, m]."""
    acc = accumulator(states.dtype)
    head = inputs.head_weight.to(acc)
    bias = None if inputs.bias is None else inputs.bias.to(acc)
    if w is None:
        return linear_of(inputs.invariant)(states.to(acc), head, bias)
    ids = torch.arange(states.shape[0], device=states.device)
    return mixed_linear(LinearInputs(states.to(acc), head, w, bias, ids, inputs.invariant))


def linear_logprob_backward(
    inputs: Inputs, upstream: tuple[Tensor, ...], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, head_weight, bias, weights); the logits are made again by chunks.

    upstream: the gradients of logprobs, entropy and kl; the last two may be empty.

    With p = softmax(z / tau), q the reference's softmax and H the entropy:
        dz   = ( d_logprob (onehot - p) - d_entropy p (log p + H) + d_kl p (log p/q - KL) ) / tau
        dz_q = d_kl (q - p) / tau, which reaches the shared head, its bias and weights
    """
    d_logprobs, d_entropy, d_kl = upstream
    hidden, head_weight, targets, bias, _, _, temperature, ref_hidden, invariant = inputs
    acc, linear = accumulator(hidden.dtype), linear_of(invariant)
    experts = head_weight if head_weight.dim() == 3 else head_weight[None]
    d_hidden = hidden.new_zeros(hidden.shape, dtype=acc)
    d_head = experts.new_zeros(experts.shape, dtype=acc) if needs[1] else None
    d_bias = experts.new_zeros(experts.shape[:2], dtype=acc) if needs[2] else None
    d_w = hidden.new_zeros(hidden.shape[0], experts.shape[0], dtype=acc) if needs[3] else None
    for tokens in chunks(hidden.shape[0], head_weight.shape[-2]):
        logp, logq = _log_probabilities(inputs, tokens)
        p, y, w = logp.exp(), targets[tokens], inputs.token_weights(tokens)
        ignored = (y == -100)[:, None]
        dz = -d_logprobs[tokens, None] * p
        dz.scatter_add_(-1, y[:, None].masked_fill(ignored, 0), d_logprobs[tokens, None].to(acc))
        if d_entropy.numel():
            finite = logp.clamp(min=-1e30)
            entropy = -(p * finite).sum(-1, keepdim=True)
            dz = dz - d_entropy[tokens, None] * p * (finite + entropy)
        if logq is not None and d_kl.numel():
            gap = torch.where(p > 0, logp - logq, 0.0)
            dz = dz + d_kl[tokens, None] * p * (gap - (p * gap).sum(-1, keepdim=True))
        pairs = [(dz, hidden)]
        if logq is not None and ref_hidden is not None:
            pairs.append((d_kl[tokens, None] * (logq.exp() - p), ref_hidden))
        for raw, states in pairs:
            d_logits = (raw / temperature[tokens].to(acc)[:, None]).masked_fill(ignored, 0.0)
            h = states[tokens].to(acc)
            for i, expert in enumerate(experts.to(acc)):
                scaled = d_logits if w is None else d_logits * w[:, i, None].to(acc)
                if states is hidden:
                    d_hidden[tokens] += linear(scaled, expert.t())
                if d_head is not None:
                    d_head[i] += scaled.t() @ h
                if d_bias is not None:
                    d_bias[i] += scaled.sum(0)
                if d_w is not None:
                    b_i = None if bias is None else bias[i].to(acc)
                    d_w[tokens, i] += (d_logits * linear(h, expert, b_i)).sum(-1)
    return gradients(inputs, d_hidden if needs[0] else None, d_head, d_bias, d_w)
