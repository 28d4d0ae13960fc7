"""mix_logits as callers see it: its algebra, also with linear_logprob and sample behind it."""

import torch
import torch.nn.functional as F
from cases import DTYPES, F64, close, same_bits
from hypothesis import given
from hypothesis import strategies as st

from clp_kernels import linear_logprob, mix_logits, sample
from clp_kernels.testing import weight_rows


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.sampled_from([F64, *DTYPES]))
def test_mix_logits_algebra(m: int, B: int, V: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(m, B, V)).to(dtype)
    one_hot = weight_rows("one_hot", B, m)
    picked = logits[torch.arange(B) % m, torch.arange(B)]
    assert same_bits(mix_logits(logits, one_hot), picked)
    probability = mix_logits(logits, one_hot, mode="probability").double()
    eps = torch.finfo(dtype).eps if dtype != F64 else 1e-7
    torch.testing.assert_close(probability, picked.double().log_softmax(-1), rtol=eps, atol=1e-6)
    wide, rows = logits.double(), weight_rows("dirichlet", B, m, dtype=F64)
    p = torch.randperm(m)
    for mode in ("geometric", "probability"):
        z = mix_logits(wide, rows, mode=mode)
        close(mix_logits(wide[p], rows[:, p], mode=mode), z)
        assert same_bits(mix_logits(wide, rows, mode=mode), z)
    close(mix_logits(wide, rows, mode="probability").exp().sum(-1), torch.ones(B, dtype=F64))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 20))
def test_mixed_head_is_the_mixed_logits(m: int, B: int, V: int) -> None:
    """linear_logprob with weights against mix_logits and a softmax."""
    hidden, heads = torch.randn(B, 3, 6, dtype=F64), torch.randn(m, V, 6, dtype=F64)
    weights, targets = torch.randn(B, m, dtype=F64), torch.randint(0, V, (B, 3))
    got = linear_logprob(
        hidden, heads, targets, weights=weights, return_entropy=True, ref_hidden=hidden
    )
    logits = torch.einsum("btd,mvd->mbtv", hidden, heads).flatten(1, 2)
    logp = mix_logits(logits, weights.repeat_interleave(3, 0)).log_softmax(-1).view(B, 3, V)
    close(got.logprobs, logp.gather(-1, targets[..., None])[..., 0])
    assert got.entropy is not None
    close(got.entropy, -(logp.exp() * logp).sum(-1))
    assert got.kl is not None
    assert (got.kl == 0).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_mixed_hidden_states_are_the_mixed_logits(m: int, B: int, V: int, biased: bool) -> None:
    """Behind one linear head: the logits, what is drawn and its log-probability, all gradients."""
    head, bias = torch.randn(V, 6, dtype=F64), torch.randn(V, dtype=F64) if biased else None
    hidden = torch.randn(m, B, 6, dtype=F64).requires_grad_()
    # With a bias the rows have to sum to 1.
    rows = weight_rows("dirichlet", B, m, dtype=F64) if biased else torch.randn(B, m, dtype=F64)
    weights, dz = rows.requires_grad_(), torch.randn(B, V, dtype=F64)
    targets = torch.randint(0, V, (B,))
    logits = F.linear(hidden, head, bias)
    mixed = mix_logits(hidden, weights)
    z, wanted = F.linear(mixed, head, bias), mix_logits(logits, weights)
    close(z, wanted)
    grads = [
        torch.autograd.grad((t * dz).sum(), (hidden, weights), retain_graph=True)
        for t in (z, wanted)
    ]
    if biased:  # a step that leaves the simplex moves the sum of the bias too
        centred = [g[1] - g[1].mean(-1, keepdim=True) for g in grads]
        grads = [(g[0], c) for g, c in zip(grads, centred, strict=True)]
    for a, b in zip(*grads, strict=True):
        close(a, b)
    of_hidden = linear_logprob(mixed, head, targets, bias=bias, temperature=0.5).logprobs
    close(of_hidden, torch.log_softmax(wanted / 0.5, -1).gather(-1, targets[:, None])[:, 0])
    drawn = sample(logits, weights=weights, seed=3, position=4)
    assert torch.equal(sample(z, seed=3, position=4).tokens, drawn.tokens)
