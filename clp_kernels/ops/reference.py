"""The definition of every op: a few lines of plain PyTorch, on any device.

Every other backend is held to these functions (clp_kernels.testing has the error budget). They
favour being checkable by eye over speed. Low-precision inputs accumulate in float32, float64 stays
float64 ("acc" below). Formulas, shapes and errors are documented on the public functions in
clp_kernels.ops.functional; the arguments here have been checked and normalised there.
"""

from collections.abc import Callable
from itertools import starmap

import torch
import torch.nn.functional as F
from torch import Tensor

INVARIANT_TILE = 16


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in tiles of 16 rows, so that a row's bits do not depend on the batch around it.

    A GEMM library picks its kernel by the number of rows, and by the layout and the alignment of
    each row; with calls of one shape, on contiguous rows of whole cache lines, it always picks the
    same (docs/log.md: without the zeros at the end of rows 67 of 600 odd shapes failed). Costs one
    call a tile and copies of x and, where it is transposed or of odd width, of the weight.
    """
    in_features = weight.shape[1]
    padded = -(-in_features // 32) * 32
    if padded != in_features or not weight.is_contiguous():
        weight = F.pad(weight, (0, padded - in_features)).contiguous()
    rows = x.flatten(0, -2)
    out = x.new_empty(rows.shape[0], weight.shape[0])
    for start in range(0, rows.shape[0], INVARIANT_TILE):
        part = rows[start : start + INVARIANT_TILE]
        # On an allocation of its own, which is aligned.
        tile = x.new_zeros(INVARIANT_TILE, padded)
        tile[: part.shape[0], :in_features] = part
        out[start : start + INVARIANT_TILE] = F.linear(tile, weight, bias)[: part.shape[0]]
    return out.view(*x.shape[:-1], weight.shape[0])


def _linear(invariant: bool) -> Callable[..., Tensor]:
    return tiled_linear if invariant else F.linear


def _rows_for(x: Tensor, weights: Tensor, example_ids: Tensor | None) -> Tensor:
    """weights [B, m] as [..., m], broadcastable against the leading axes of x."""
    if example_ids is not None:
        return weights[example_ids.long()]
    return weights.view(weights.shape[0], *([1] * (x.dim() - 2)), weights.shape[1])


def sum_per_example(per_token: Tensor, batch_size: int, example_ids: Tensor | None) -> Tensor:
    """Sums [..., m] over the tokens of each example -> [B, m], in a fixed order (no atomics)."""
    if example_ids is None:
        m = per_token.shape[-1]
        tokens = per_token.numel() // max(1, batch_size * m)
        return per_token.reshape(batch_size, tokens, m).sum(1)
    # Sorted by example, and summed segment by segment: a product with a membership matrix would
    # carry one example's NaN to all, and index_add is atomic on a GPU.
    order = example_ids.argsort(stable=True)
    bounds = torch.arange(batch_size + 1, device=example_ids.device, dtype=example_ids.dtype)
    offsets = torch.searchsorted(example_ids[order], bounds)
    return torch.segment_reduce(
        per_token[order], "sum", offsets=offsets, axis=0, unsafe=True, initial=0.0
    )


def mixed_lora(
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    invariant: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y [..., out] in x's dtype and u = x A^T [..., m*r], kept for the backward."""
    acc, linear = accumulator(x.dtype), _linear(invariant)
    m, r, in_features = lora_A.shape
    omega = _rows_for(x, weights, example_ids).to(acc)
    base = linear(x, base_weight, bias)
    u = linear(x.to(acc), lora_A.reshape(m * r, in_features).to(acc))
    z = (u.unflatten(-1, (m, r)) * omega[..., None]).flatten(-2)
    delta = linear(z, lora_B.transpose(0, 1).flatten(1).to(acc))
    mixed = delta.add_(base).to(x.dtype)
    # An all-zero row is the bare linear bit for bit, even where A holds inf or base is -0.0. Where
    # the rows can be looked at for free, a batch without such a row skips the pass over y.
    active = (omega != 0).any(-1, keepdim=True)
    if active.device.type == "cpu" and bool(active.all()):
        return mixed, u
    return torch.where(active, mixed, base), u


def mixed_lora_backward(
    dy: Tensor,
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    example_ids: Tensor | None,
    u: Tensor,
    invariant: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, base_weight, lora_A, lora_B, weights, bias); empty where not needed.

    With G = dy B and dU = G * omega:  dx = dy W + dU A,  dA = dU^T x,  dB = dy^T (U * omega),
    dweights[b, i] = sum over the tokens and rank of adapter i of G * U.
    """
    acc, linear = accumulator(x.dtype), _linear(invariant)
    m, r, in_features = lora_A.shape
    omega = _rows_for(x, weights, example_ids).to(acc)
    dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias = (x.new_empty(0) for _ in needs)
    dy_acc = dy.to(acc)
    dy_flat = dy_acc.flatten(0, -2)
    A = lora_A.reshape(m * r, in_features).to(acc)
    B = lora_B.transpose(0, 1).flatten(1).to(acc)
    g = linear(dy_acc, B.t().contiguous()).unflatten(-1, (m, r))
    du = (g * omega[..., None]).flatten(-2)
    if needs[0]:
        dx = linear(du, A.t().contiguous()).add_(linear(dy, base_weight.t())).to(x.dtype)
    if needs[1]:
        d_base = (dy_flat.t() @ x.to(acc).flatten(0, -2)).to(base_weight.dtype)
    if needs[2]:
        d_lora_A = du.flatten(0, -2).t() @ x.to(acc).flatten(0, -2)
        d_lora_A = d_lora_A.view(m, r, in_features).to(lora_A.dtype)
    if needs[3]:
        z = (u.unflatten(-1, (m, r)) * omega[..., None]).flatten(-2).flatten(0, -2)
        d_lora_B = (z.t() @ dy_flat).unflatten(0, (m, r)).transpose(1, 2)
        d_lora_B = d_lora_B.to(lora_B.dtype).contiguous()
    if needs[4]:
        per_token = (g * u.unflatten(-1, (m, r))).sum(-1)
        d_weights = sum_per_example(per_token, weights.shape[0], example_ids).to(weights.dtype)
    if needs[5]:
        d_bias = dy_flat.sum(0).to(base_weight.dtype)
    return dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias


def mixed_linear(
    x: Tensor,
    expert_weight: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    invariant: bool,
) -> Tensor:
    """y = sum_i omega_i (x W_i^T + bias_i), accumulated in order i = 0, 1, ..., rounded once."""
    acc, linear = accumulator(x.dtype), _linear(invariant)
    omega = _rows_for(x, weights, example_ids).to(acc)
    y, x = x.new_zeros(*x.shape[:-1], expert_weight.shape[1], dtype=acc), x.to(acc)
    for i, expert in enumerate(expert_weight):
        product = linear(x, expert.to(acc))
        y = y + omega[..., i : i + 1] * (product if bias is None else product + bias[i].to(acc))
    return y.to(expert_weight.dtype)


def mixed_linear_backward(
    dy: Tensor,
    x: Tensor,
    expert_weight: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    invariant: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, expert_weight, weights, bias); empty where not needed."""
    acc, linear = accumulator(x.dtype), _linear(invariant)
    omega = _rows_for(x, weights, example_ids).to(acc)
    dy_acc, x_flat = dy.to(acc), x.to(acc).flatten(0, -2)
    scaled = [omega[..., i : i + 1] * dy_acc for i in range(expert_weight.shape[0])]
    dx, d_expert, d_weights, d_bias = (x.new_empty(0) for _ in needs)
    if needs[0]:
        # Added in order: a sum over a stacked axis rounds by the shape of the batch.
        total = x.new_zeros(x.shape, dtype=acc)
        for s, w in zip(scaled, expert_weight, strict=True):
            total = total + linear(s, w.t().to(acc))
        dx = total.to(x.dtype)
    flat = [s.flatten(0, -2) for s in scaled]
    if needs[1]:
        d_expert = torch.stack([s.t() @ x_flat for s in flat]).to(expert_weight.dtype)
    if needs[2]:
        products = [linear(x.to(acc), w.to(acc)) for w in expert_weight]
        if bias is not None:
            products = [p + b.to(acc) for p, b in zip(products, bias, strict=True)]
        per_token = torch.stack([(dy_acc * p).sum(-1) for p in products], dim=-1)
        d_weights = sum_per_example(per_token, weights.shape[0], example_ids).to(weights.dtype)
    if needs[3]:
        d_bias = torch.stack([s.sum(0) for s in flat]).to(expert_weight.dtype)
    return dx, d_expert, d_weights, d_bias


def mix_logits(logits: Tensor, weights: Tensor, mode: str) -> Tensor:
    """[m, B, V], [B, m] -> [B, V] in the logits' dtype."""
    return _mix(logits, weights, mode).to(logits.dtype)


def _mix(logits: Tensor, weights: Tensor, mode: str) -> Tensor:
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
    """Gradients of (logits, weights). Entries where the mixture is -inf pass no gradient."""
    acc = accumulator(logits.dtype)
    columns = weights.to(acc).t()[:, :, None]
    mixed = _mix(logits, weights, mode)
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


def sample(
    logits: Tensor,
    weights: Tensor | None,
    mode: str,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [m, B, V] -> tokens int64, logprobs, filtered_logprobs [B]; token -1 on a bad row.

    temperature, top_p, min_p float64; a temperature below 1e-30 counts as 1e-30, but for 0.
    """
    z = logits[0].to(accumulator(logits.dtype)) if weights is None else _mix(logits, weights, mode)
    z = z.double()
    greedy = temperature == 0
    tau = torch.where(greedy, 1.0, temperature.double().clamp(min=1e-30))[:, None]
    scaled = z / tau
    logp = torch.log_softmax(scaled, dim=-1)
    kept = torch.ones_like(logp, dtype=torch.bool)
    if top_k is not None:
        kept &= _top_k_mask(z, top_k)
    if top_p is not None:
        kept &= _top_p_mask(scaled.masked_fill(~kept, -torch.inf), top_p)
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


def _top_k_mask(z: Tensor, top_k: Tensor) -> Tensor:
    """The k largest and whatever ties with the k-th; k = 0 keeps all."""
    ordered = z.sort(-1, descending=True).values
    k = torch.where(top_k == 0, z.shape[-1], top_k.long().clamp(max=z.shape[-1]))
    return z >= ordered.gather(-1, k[:, None] - 1)


def _top_p_mask(z: Tensor, top_p: Tensor) -> Tensor:
    """Every token of which the tokens of larger z hold less than top_p of the mass softmax(z).

    Logits are compared, not probabilities: two of them may round to one probability.
    """
    ordered = z.sort(-1, descending=True).values
    p = torch.softmax(ordered, dim=-1)
    above = p.cumsum(-1) - p
    count = (above < top_p.double()[:, None]).sum(-1, keepdim=True).clamp(min=1)
    return (z >= ordered.gather(-1, count - 1)) | (top_p >= 1)[:, None]


def _head_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, omega: Tensor | None, invariant: bool
) -> Tensor:
    """Logits [N, V] of a head [V, d], or of a weight-mixed head [m, V, d] with omega [N, m]."""
    acc, linear = accumulator(hidden.dtype), _linear(invariant)
    if omega is None:
        return linear(hidden.to(acc), head.to(acc), None if bias is None else bias.to(acc))
    return mixed_linear(
        hidden.to(acc),
        head.to(acc),
        omega,
        None if bias is None else bias.to(acc),
        torch.arange(hidden.shape[0], device=hidden.device),
        invariant,
    )


def _chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    """Row chunks of at most 2^22 logits (16 MB in float32), so [T, V] never exists."""
    step = max(1, 2**22 // max(vocab_size, 1))
    return [slice(start, start + step) for start in range(0, num_tokens, step)]


def linear_logprob(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    example_ids: Tensor | None,
    temperature: Tensor,
    return_entropy: bool,
    ref_hidden: Tensor | None,
    slopes: bool,
    invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, d], targets [N] (-100: ignored) -> logprobs, entropy, kl, each [N] or empty, and
    with `slopes` d logprobs / d hidden and d kl / d hidden, [N, d] in hidden's dtype, or empty."""
    acc = accumulator(hidden.dtype)
    logprobs, entropy, kl = [], [], []
    for rows in _chunks(hidden.shape[0], head_weight.shape[-2]):
        logp, logq = _chunk_logp(
            hidden,
            head_weight,
            bias,
            weights,
            example_ids,
            temperature,
            ref_hidden,
            invariant,
            rows,
        )
        y = targets[rows]
        ignored = y == -100
        picked = logp.gather(-1, y.masked_fill(ignored, 0)[:, None])[:, 0]
        logprobs.append(picked.masked_fill(ignored, 0.0))
        p = logp.exp()
        if return_entropy:
            terms = -p * logp.clamp(min=-1e30)
            entropy.append(_row_sums(terms, invariant).masked_fill(ignored, 0.0))
        if logq is not None:
            gap = torch.where(p > 0, logp - logq, 0.0)
            kl.append(_row_sums(p * gap, invariant).masked_fill(ignored, 0.0))
    columns = (logprobs, entropy, kl)
    first, second, third = (torch.cat([hidden.new_empty(0, dtype=acc), *c]) for c in columns)

    def slope(of: Tensor) -> Tensor:
        """The backward with an upstream gradient of one for every token."""
        upstream = [torch.ones_like(c) if c is of else torch.zeros_like(c) for c in (first, third)]
        return linear_logprob_backward(
            upstream[0],
            hidden.new_empty(0),
            upstream[1],
            hidden,
            head_weight,
            targets,
            bias,
            weights,
            example_ids,
            temperature,
            ref_hidden,
            invariant,
            [True, False, False, False],
        )[0]

    by_logprob = slope(first) if slopes else hidden.new_empty(0)
    by_kl = slope(third) if slopes and ref_hidden is not None else hidden.new_empty(0)
    return first, second, third, by_logprob, by_kl


def _row_sums(terms: Tensor, invariant: bool) -> Tensor:
    """Sums [N, V] -> [N]. torch splits a long row among threads only where there are few rows."""
    if not invariant or terms.shape[0] == 0:
        return terms.sum(-1)
    return torch.stack([row.sum() for row in terms])


def _chunk_logp(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    example_ids: Tensor | None,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    invariant: bool,
    rows: slice,
) -> tuple[Tensor, Tensor | None]:
    omega = None
    if weights is not None and example_ids is not None:
        omega = weights[example_ids[rows].long()]
    tau = temperature[rows].to(accumulator(hidden.dtype))[:, None]
    logits = _head_logits(hidden[rows], head_weight, bias, omega, invariant)
    logp = torch.log_softmax(logits / tau, dim=-1)
    if ref_hidden is None:
        return logp, None
    ref = _head_logits(ref_hidden[rows], head_weight, bias, omega, invariant)
    return logp, torch.log_softmax(ref / tau, dim=-1)


def linear_logprob_backward(
    d_logprobs: Tensor,
    d_entropy: Tensor,
    d_kl: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    example_ids: Tensor | None,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    invariant: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, head_weight, bias, weights), logits recomputed chunk by chunk.

    With p = softmax(z / tau), q the reference's softmax and H the entropy:
        dz   = ( d_logprob (onehot - p) - d_entropy p (log p + H) + d_kl p (log p/q - KL) ) / tau
        dz_q = d_kl (q - p) / tau, which reaches the shared head, its bias and weights
    """
    acc = accumulator(hidden.dtype)
    experts = head_weight if head_weight.dim() == 3 else head_weight[None]
    d_hidden = hidden.new_zeros(hidden.shape, dtype=acc)
    d_head = experts.new_zeros(experts.shape, dtype=acc) if needs[1] else None
    d_bias = experts.new_zeros(experts.shape[:2], dtype=acc) if needs[2] else None
    d_omega = hidden.new_zeros(hidden.shape[0], experts.shape[0], dtype=acc) if needs[3] else None
    for rows in _chunks(hidden.shape[0], head_weight.shape[-2]):
        logp, logq = _chunk_logp(
            hidden,
            head_weight,
            bias,
            weights,
            example_ids,
            temperature,
            ref_hidden,
            invariant,
            rows,
        )
        p, y = logp.exp(), targets[rows]
        ignored = (y == -100)[:, None]
        dz = -d_logprobs[rows, None] * p
        dz.scatter_add_(-1, y[:, None].masked_fill(ignored, 0), d_logprobs[rows, None].to(acc))
        if d_entropy.numel():
            finite = logp.clamp(min=-1e30)
            entropy = -(p * finite).sum(-1, keepdim=True)
            dz = dz - d_entropy[rows, None] * p * (finite + entropy)
        if logq is not None and d_kl.numel():
            gap = torch.where(p > 0, logp - logq, 0.0)
            dz = dz + d_kl[rows, None] * p * (gap - (p * gap).sum(-1, keepdim=True))
        pairs = [(dz, hidden)]
        if logq is not None and ref_hidden is not None:
            pairs.append((d_kl[rows, None] * (logq.exp() - p), ref_hidden))
        for raw, states in pairs:
            d_logits = (raw / temperature[rows].to(acc)[:, None]).masked_fill(ignored, 0.0)
            h = states[rows].to(acc)
            for i, expert in enumerate(experts.to(acc)):
                scaled = d_logits
                if weights is not None and example_ids is not None:
                    scaled = d_logits * weights[example_ids[rows].long(), i, None].to(acc)
                if states is hidden:
                    d_hidden[rows] += _linear(invariant)(scaled, expert.t())
                if d_head is not None:
                    d_head[i] += scaled.t() @ h
                if d_bias is not None:
                    d_bias[i] += scaled.sum(0)
                if d_omega is not None:
                    b_i = None if bias is None else bias[i].to(acc)
                    d_omega[rows, i] += (d_logits * _linear(invariant)(h, expert, b_i)).sum(-1)
    out_hidden, out_head, out_bias, out_weights = (hidden.new_empty(0) for _ in needs)
    if needs[0]:
        out_hidden = d_hidden.to(hidden.dtype)
    if d_head is not None:
        out_head = d_head.view(head_weight.shape).to(head_weight.dtype)
    if d_bias is not None:
        out_bias = d_bias.view(head_weight.shape[:-1]).to(head_weight.dtype)
    if d_omega is not None and weights is not None:
        out_weights = sum_per_example(d_omega, weights.shape[0], example_ids).to(weights.dtype)
    return out_hidden, out_head, out_bias, out_weights
