"""The definition of sample in plain PyTorch, on any device: the mixture, the filters and the draw.

Low-precision inputs accumulate in float32, float64 stays float64 ("acc" below). Formulas, shapes
and errors are documented on the public function in op.py, which has checked the arguments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from clp_kernels.checks import accumulator
from clp_kernels.ops.mix_logits.reference import mix


class Inputs(NamedTuple):
    """Checked inputs of a draw.

    logits [m, B, V] of any strides; weights [B, m] float32 (float64 beside float64 logits), or None
    if m is 1; mode "geometric" or "probability"; the others [B], a filter that is off None:
    temperature, finite and >= 0, of which 0 is greedy, top_p and min_p float64; top_k, seed and
    position int64.
    """

    logits: Tensor
    weights: Tensor | None
    mode: str
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    seed: Tensor
    position: Tensor


def philox_uniform(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Philox4x32-10 uniforms (x + 0.5) / 2^32 as float64 [B, V], keyed by (seed, position, id).

    Key = the low and high word of seed; counter = (id // 4, low and high word of position, 0);
    lane = id % 4. Independent of batch, tile and device. Source: Salmon et al., SC 2011.
    """
    word = 0xFFFFFFFF
    blocks = torch.arange((vocab_size + 3) // 4, device=seed.device)[None]
    zero = torch.zeros_like(blocks) + torch.zeros_like(seed)[:, None]
    c0, c3 = blocks + zero, zero
    c1, c2 = (position & word)[:, None] + zero, ((position >> 32) & word)[:, None] + zero
    k0, k1 = (seed & word)[:, None], ((seed >> 32) & word)[:, None]
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps both 32-bit halves exact.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & word) ^ c1 ^ k0,
            p1 & word,
            ((p0 >> 32) & word) ^ c3 ^ k1,
            p0 & word,
        )
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    lanes = torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :vocab_size]
    return (lanes.double() + 0.5) * 2.0**-32


def gumbel(uniform: Tensor) -> Tensor:
    """-log(-log u) in float64. 1 - u is exact, so log1p keeps full precision where u nears 1."""
    return -torch.where(uniform > 0.5, -torch.log1p(-(1 - uniform)), -torch.log(uniform)).log()


def sample(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """tokens int64, logprobs and filtered_logprobs float32, each [B]; -1 and NaN on a bad row.

    A temperature below 1e-30 counts as 1e-30, but for 0.
    """
    logits, weights, mode, temperature, top_k, top_p, min_p, seed, position = inputs
    z = logits[0].to(accumulator(logits.dtype)) if weights is None else mix(logits, weights, mode)
    z = z.double()
    greedy = temperature == 0
    tau = torch.where(greedy, 1.0, temperature.double().clamp(min=1e-30))[:, None]
    scaled = z / tau
    logp = torch.log_softmax(scaled, dim=-1)
    kept = torch.ones_like(logp, dtype=torch.bool)
    if top_k is not None:
        kept &= top_k_mask(z, top_k)
    if top_p is not None:
        kept &= top_p_mask(scaled.masked_fill(~kept, -torch.inf), top_p)
    if min_p is not None:
        kept &= (z - z.amax(-1, keepdim=True)) / tau >= min_p.double().log()[:, None]
    filtered = torch.log_softmax(logp.masked_fill(~kept, -torch.inf), dim=-1)
    perturbed = scaled + gumbel(philox_uniform(seed, position, z.shape[-1]))
    score = torch.where(greedy[:, None], z, perturbed.masked_fill(~kept, -torch.inf))
    tokens = score.argmax(-1)
    best = z.amax(-1)
    bad = ~best.isfinite()
    logprobs = logp.gather(-1, tokens[:, None])[:, 0]
    filtered_logprobs = filtered.gather(-1, tokens[:, None])[:, 0].masked_fill(greedy, 0.0)
    return (
        tokens.masked_fill(bad, -1),
        logprobs.masked_fill(bad, torch.nan).float(),
        filtered_logprobs.masked_fill(bad, torch.nan).float(),
    )


def top_k_mask(z: Tensor, top_k: Tensor) -> Tensor:
    """The k largest and whatever ties with the k-th; k = 0 keeps all."""
    ordered = z.sort(-1, descending=True).values
    k = torch.where(top_k == 0, z.shape[-1], top_k.long().clamp(max=z.shape[-1]))
    return z >= ordered.gather(-1, k[:, None] - 1)


def top_p_mask(z: Tensor, top_p: Tensor) -> Tensor:
    """Every token of which the tokens of larger z hold less than top_p of the mass softmax(z).

    Logits are compared, not probabilities: two of them may round to one probability.
    """
    ordered = z.sort(-1, descending=True).values
    p = torch.softmax(ordered, dim=-1)
    above = p.cumsum(-1) - p
    count = (above < top_p.double()[:, None]).sum(-1, keepdim=True).clamp(min=1)
    return (z >= ordered.gather(-1, count - 1)) | (top_p >= 1)[:, None]
