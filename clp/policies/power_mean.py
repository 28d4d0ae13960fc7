"""The weighted power mean of distributions, as logits."""

import torch
from torch import Tensor


def power_mean(logits: Tensor, weights: Tensor, exponent: float) -> Tensor:
    """Mixes the logits of n distributions per example.

        z = (1/q) log sum_i weights[b, i] softmax(l_i)^q

    softmax(z) is the mean with exponent q, normalised. Where q < 0, a token to which one
    distribution of positive weight gives no probability has none. A term of weight zero is left
    out; weights that are all zero leave nothing, and give no finite z.

    Args:
        logits: [n, B, V].
        weights: [B, n], >= 0.
        exponent: q, not 0.

    Returns: [B, V], float32, or float64 for such logits. An example does not depend on the others.

    Source: MOD (arXiv:2406.18853) with q = -alpha: forward KL (1) and alpha-divergences.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    columns = weights.to(dtype).t()[:, :, None]
    terms = [
        torch.where(w == 0, -torch.inf, w.log() + exponent * torch.log_softmax(one.to(dtype), -1))
        for one, w in zip(logits, columns, strict=True)
    ]
    # Term by term: torch.logsumexp over a stacked axis rounds by the shape of the batch.
    top = terms[0]
    for term in terms[1:]:
        top = torch.maximum(top, term)
    safe = torch.where(top.isinf(), 0.0, top)
    total = torch.zeros_like(top)
    for term in terms:
        total = total + (term - safe).exp()
    return (safe + total.log()) / exponent
