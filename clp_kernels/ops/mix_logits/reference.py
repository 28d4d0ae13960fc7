"""The definition of mix_logits in plain PyTorch, on any device: forward and backward.

Low-precision inputs accumulate in float32, float64 stays float64 ("acc" below). Formulas, shapes
and errors are documented on the public function in op.py, which has checked the arguments.
"""

from itertools import starmap

import torch
from torch import Tensor

from clp_kernels.checks import accumulator


def mix_logits(logits: Tensor, weights: Tensor, mode: str) -> Tensor:
    """[m, B, V], [B, m] -> [B, V] in the logits' dtype."""
    return mix(logits, weights, mode).to(logits.dtype)


def mix(logits: Tensor, weights: Tensor, mode: str) -> Tensor:
    """mix_logits before the last rounding. A term of weight zero is left out, so 0 * -inf is 0."""
    acc = accumulator(logits.dtype)
    columns = weights.to(acc).t()[:, :, None]
    if mode == "probability":
        terms = list(starmap(_log_term, zip(logits.to(acc), columns, strict=True)))
        # Term by term: torch.logsumexp over a stacked axis rounds by the shape of the batch.
        top = terms[0]
        for term in terms[1:]:
            top = torch.maximum(top, term)
        safe = torch.where(top == -torch.inf, 0.0, top)
        total = torch.zeros_like(top)
        for term in terms:
            total = total + (term - safe).exp()
        return safe + total.log()
    mixed = torch.zeros(logits.shape[1:], dtype=acc, device=logits.device)
    blocked = torch.zeros(logits.shape[1:], dtype=torch.bool, device=logits.device)
    for l_i, w_i in zip(logits.to(acc), columns, strict=True):
        mixed = mixed + torch.where(w_i == 0, 0.0, w_i * l_i)
        blocked = blocked | ((w_i != 0) & (l_i == -torch.inf))
    return mixed.masked_fill(blocked, -torch.inf)


def _log_term(l_i: Tensor, w_i: Tensor) -> Tensor:
    """log(w_i softmax(l_i)), -inf where w_i is zero."""
    return torch.where(w_i == 0, -torch.inf, w_i.log() + torch.log_softmax(l_i, dim=-1))


def mix_logits_backward(
    dz: Tensor, logits: Tensor, weights: Tensor, mode: str, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (logits, weights); empty where not needed.

        geometric:    d_logits_i = dz w_i,  d_weights_i = sum_v dz l_i
        probability:  d_logits_i = w_i (dz r_i - softmax(l_i) d_weights_i),
                      d_weights_i = sum_v dz r_i,  r_i = softmax(l_i) / exp(z)

    Entries where the mixture is -inf pass no gradient.
    """
    acc = accumulator(logits.dtype)
    columns = weights.to(acc).t()[:, :, None]
    mixed = mix(logits, weights, mode)
    dz = torch.where(mixed == -torch.inf, 0.0, dz.to(acc))
    d_logits, d_weights = [], []
    for l_i, w_i in zip(logits.to(acc), columns, strict=True):
        if mode == "probability":
            log_p = torch.log_softmax(l_i, dim=-1)
            # In log space: both probabilities may be below the smallest float.
            ratio = torch.where(mixed == -torch.inf, 0.0, (log_p - mixed).exp())
            share = torch.where(w_i == 0, 0.0, dz * w_i * ratio)
            d_logits.append(share - log_p.exp() * share.sum(-1, keepdim=True))
            d_weights.append((dz * ratio).sum(-1))
        else:
            d_logits.append(dz * w_i)
            d_weights.append((dz * torch.where(l_i == -torch.inf, 0.0, l_i)).sum(-1))
    return (
        torch.stack(d_logits).to(logits.dtype) if needs[0] else logits.new_empty(0),
        torch.stack(d_weights, dim=1).to(weights.dtype) if needs[1] else logits.new_empty(0),
    )
