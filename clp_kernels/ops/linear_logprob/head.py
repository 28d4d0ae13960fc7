"""What the backends of linear_logprob share: the inputs, the mixed head and the last formulas."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels.ops.mixed_lora.reference import sum_per_example

# Tokens for which `outputs` reads rows of the head at a time.
_TARGETS = 2**11


class Inputs(NamedTuple):
    """Checked inputs of the forward and the backward, T tokens.

    hidden [T, d]; head_weight [V, d] with bias [V] or None, or [m, V, d] with bias [m, V] or None,
    weights [B, m] and example_ids [T]; targets int64 [T], of which -100 is ignored; temperature
    [T]; ref_hidden [T, d] or None; invariant: whether `batch_invariant()` is active.
    """

    hidden: Tensor
    head_weight: Tensor
    targets: Tensor
    bias: Tensor | None
    weights: Tensor | None
    example_ids: Tensor | None
    temperature: Tensor
    ref_hidden: Tensor | None
    invariant: bool

    def token_weights(self, tokens: slice = slice(None)) -> Tensor | None:
        """The weights of some tokens, [n, m]; None if the head is not mixed."""
        if self.weights is None or self.example_ids is None:
            return None
        return self.weights[self.example_ids[tokens].long()]


@dataclass(frozen=True)
class Head:
    """W = sum_i w_i W_i and its bias alike: experts [m, V, d], bias [m, V] or None.

    weights: [T, m], those of each token; None if m is 1 and nothing is mixed.
    """

    experts: Tensor
    bias: Tensor | None
    weights: Tensor | None

    @staticmethod
    def of(inputs: Inputs) -> "Head":
        """The head of a call."""
        weights = inputs.token_weights()
        if weights is not None:
            return Head(inputs.head_weight, inputs.bias, weights.float())
        return Head(
            inputs.head_weight[None], None if inputs.bias is None else inputs.bias[None], None
        )

    def part(self, tokens: slice, ids: slice) -> "Head":
        """That of some tokens and some ids, in float32."""
        return Head(
            self.experts[:, ids].float(),
            None if self.bias is None else self.bias[:, ids].float(),
            None if self.weights is None else self.weights[tokens],
        )

    def logits(self, h: Tensor) -> Tensor:
        """z = sum_i w_i (h W_i^T + bias_i).

        The products are scaled, as in the reference. Scaled states would spare a pass over the
        logits per expert; their sums round apart from plain PyTorch's, and in 1 of 60 cases of the
        error budget further than it allows, if one token's logits are large.
        """
        added = [None] * len(self.experts) if self.bias is None else list(self.bias)
        z = F.linear(h, self.experts[0], added[0])
        if self.weights is None:
            return z
        first, *columns = self.weights.t()[..., None]
        z.mul_(first)
        for column, expert, bias in zip(columns, self.experts[1:], added[1:], strict=True):
            z.addcmul_(F.linear(h, expert, bias), column)
        return z

    def add_product(self, total: Tensor, z: Tensor) -> None:
        """total += z W."""
        if self.weights is None:
            total.addmm_(z, self.experts[0])
            return
        for expert, column in zip(self.experts, self.weights.t()[..., None], strict=True):
            total.addcmul_(z @ expert, column)

    def rows_of(self, tokens: slice, ids: Tensor) -> Tensor:
        """W_id for a token and an id each, [n, d] in float32."""
        if self.weights is None:
            return self.experts[0][ids].float()
        each = zip(self.experts, self.weights[tokens].t()[..., None], strict=True)
        first, *others = (expert[ids].float() * column for expert, column in each)
        return sum(others, first)


def outputs(
    state: Tensor,
    head: Head,
    inputs: Inputs,
    return_entropy: bool,
    d_logprobs: Tensor,
    d_kl: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs, from the sums over the vocabulary (csrc/cpu/linear_logprob/linear_logprob.h).

    d_logprobs, d_kl: sum_v e_v W_v and sum_v e_v (z_v - z'_v - shift) W_v, [T, d] float32 or empty;
    the gradients with respect to hidden are made in their memory.
    """
    top, mass, weighted, apart, ref_top, ref_mass, shift, at_target = state.unbind(1)
    targets, tau = inputs.targets, inputs.temperature.float()
    t, ignored, dtype = tau.double(), targets == -100, head.experts.dtype

    def output(value: Tensor, wanted: bool = True) -> Tensor:
        empty = value.new_empty(0, dtype=torch.float32)
        return value.float().masked_fill_(ignored, 0.0) if wanted else empty

    log_mass = mass.log()
    logprobs = output((at_target - top) / t - log_mass)
    entropy = output(log_mass - weighted / mass * math.log(2), return_entropy)
    # log p - log q = (z - z' - shift) / t + offset
    offset = (ref_top - top + shift) / t + ref_mass.log() - log_mass
    exact_kl = apart / mass / t + offset
    if d_kl.numel():
        # sum_v p (log p - log q - kl) W_v / t, in place: two [T, d] are kept, not four.
        d_kl.mul_((1 / (mass * t * t)).float()[:, None])
        d_kl.addcmul_(d_logprobs, ((offset - exact_kl) / (mass * t)).float()[:, None])
        d_kl.masked_fill_(ignored[:, None], 0.0)
    if d_logprobs.numel():
        # (W_target - sum_v p W_v) / t
        d_logprobs.mul_((-1 / (mass * t)).float()[:, None])
        for begin in range(0, len(t), _TARGETS):
            some = slice(begin, begin + _TARGETS)
            wanted = head.rows_of(some, targets[some].clamp(min=0))
            d_logprobs[some].addcdiv_(wanted, tau[some, None])
        d_logprobs.masked_fill_(ignored[:, None], 0.0)
    kl = output(exact_kl, inputs.ref_hidden is not None)
    return logprobs, entropy, kl, d_logprobs.to(dtype), d_kl.to(dtype)


def gradients(
    inputs: Inputs,
    d_hidden: Tensor | None,
    d_experts: Tensor | None,
    d_bias: Tensor | None,
    d_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward returns, in the inputs' dtypes, empty for None; bias and experts come as in
    Head, d_weights [T, m] per token."""
    hidden, head_weight, weights = inputs.hidden, inputs.head_weight, inputs.weights
    if d_weights is not None and weights is not None:
        d_weights = sum_per_example(d_weights, len(weights), inputs.example_ids).to(weights.dtype)
    if d_experts is not None:
        d_experts = d_experts.view(head_weight.shape)
    if d_bias is not None:
        d_bias = d_bias.view(head_weight.shape[:-1])
    first, second, third = (
        hidden.new_empty(0) if d is None else d.to(hidden.dtype)
        for d in (d_hidden, d_experts, d_bias)
    )
    return first, second, third, hidden.new_empty(0) if d_weights is None else d_weights
