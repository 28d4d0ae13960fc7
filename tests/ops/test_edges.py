"""Axes of no length, and a default dtype that is not float32."""

import pytest
import torch
from cases import BF16, F16, F32, F64, same_bits
from torch import Tensor

from clp_kernels import linear_logprob, mix_logits, mixed_linear, mixed_lora, sample


def test_empty_batches() -> None:
    """B = 0 and T = 0 work forward and backward in every op."""
    w = torch.zeros(0, 2, requires_grad=True)
    W, A, C = torch.randn(5, 4), torch.randn(2, 3, 4), torch.randn(2, 5, 3).requires_grad_()
    for shape in ((0, 4), (0, 7, 4), (0, 0, 4)):
        x = torch.randn(shape)
        for y in (mixed_lora(x, W, A, C, w), mixed_linear(x[..., :3], C, w)):
            assert y.shape == (*shape[:-1], 5)
            assert torch.autograd.grad(y.sum(), w)[0].shape == (0, 2)
    rows = torch.rand(3, 2, requires_grad=True)
    y = mixed_lora(torch.randn(3, 0, 4), W, A, C, rows)
    assert (torch.autograd.grad(y.sum(), rows)[0] == 0).all()
    ids = torch.zeros(0, dtype=torch.int32)
    y = mixed_lora(torch.randn(0, 4), W, A, C, rows, example_ids=ids)
    assert (torch.autograd.grad(y.sum(), (rows, C))[0] == 0).all()
    z = mix_logits(torch.randn(2, 0, 6), w)
    assert torch.autograd.grad(z.sum(), w)[0].shape == (0, 2)
    assert [t.shape for t in sample(torch.randn(0, 6), seed=0, position=0)] == [(0,)] * 3
    none = torch.zeros(0, dtype=torch.long)
    out = linear_logprob(torch.randn(0, 4), W, none, return_entropy=True)
    assert out.logprobs.shape == (0,)
    assert out.entropy is not None and out.entropy.shape == (0,)
    out = linear_logprob(torch.randn(0, 2, 4), A, none.view(0, 2), weights=w)
    assert torch.autograd.grad(out.logprobs.sum(), w)[0].shape == (0, 2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "sizes", [(4, 0, 2, 3), (0, 4, 2, 3), (4, 5, 0, 3), (4, 0, 2, 0), (0, 0, 2, 3), (0, 4, 0, 3)]
)
def test_axes_of_no_length_have_gradients(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> None:
    """in_features, out_features, the rank, the batch: what is left is the formula's."""
    n_in, n_out, r, B = sizes
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x, W, A, up = made(B, 2, n_in), made(n_out, n_in), made(2, r, n_in), made(2, n_out, r)
    experts = made(2, n_out, n_in)
    w = torch.rand(B, 2, generator=generator).requires_grad_()
    leaves = (x, W, A, up, experts, w)

    def gradients(low_rank: torch.Tensor, mixed: torch.Tensor) -> list[torch.Tensor]:
        assert low_rank.shape == mixed.shape == (B, 2, n_out)
        loss = low_rank.double().square().sum() + mixed.double().square().sum()
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    got = gradients(
        mixed_lora(x, W, A, up, w, backend=backend),
        mixed_linear(x, experts, w, backend=backend),
    )
    X, base, down, B64, E, rows = (t.double() for t in leaves)
    update = torch.einsum("bsi,mri,mor,bm->bso", X, down, B64, rows)
    wanted = gradients(X @ base.t() + update, torch.einsum("bsi,moi,bm->bso", X, E, rows))
    for mine, theirs, leaf in zip(got, wanted, leaves, strict=True):
        assert mine.shape == leaf.shape and mine.dtype == leaf.dtype
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.1, atol=0.1)


def every_result() -> list[Tensor]:
    """Outputs and gradients of all ops, few and many tokens, float32 and bfloat16."""
    found: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        values = torch.randn(*shape, dtype=F32, generator=generator)
        return values.to(dtype).requires_grad_()

    def keep(*outputs: Tensor | None, of: list[Tensor]) -> None:
        given = [t for t in outputs if t is not None]
        found.extend(t.detach() for t in given)
        found.extend(torch.autograd.grad([t.sum() for t in given], of))

    for dtype in (F32, BF16):
        for tokens in (2, 40):
            x, weights = draw(tokens, 24, dtype=dtype), draw(tokens, 3)
            base, bias = draw(160, 24, dtype=dtype), draw(160, dtype=dtype)
            a, b = draw(3, 4, 24), draw(3, 160, 4)
            with torch.no_grad():
                found.append(mixed_lora(x, base, a, b, weights, bias=bias))
            y = mixed_lora(x, base, a, b, weights, bias=bias, scaling=2)
            keep(y, of=[x, base, a, b, weights, bias])
            experts = draw(3, 30, 24, dtype=dtype)
            keep(mixed_linear(x, experts, weights), of=[x, experts, weights])
            targets = torch.arange(tokens)
            head, other = draw(50, 24, dtype=dtype), draw(tokens, 24, dtype=dtype).detach()
            out = linear_logprob(x, head, targets, return_entropy=True, ref_hidden=other)
            keep(*out, of=[x, head])
            frozen = linear_logprob(x, head.detach(), targets, ref_hidden=other)
            keep(frozen.logprobs, frozen.kl, of=[x])
            mixed = linear_logprob(x, experts, targets % 30, weights=weights)
            keep(mixed.logprobs, of=[x, experts, weights])
        logits = draw(3, 5, 64, dtype=dtype)
        keep(mix_logits(logits, weights[:5]), of=[logits, weights])
        for view in (logits[0], logits[0, :, ::2], logits):
            one = weights[:5].detach() if view.dim() == 3 else None
            found += sample(view.detach(), weights=one, top_p=0.9, seed=1, position=1)
    return found


@pytest.mark.parametrize("dtype", [F64, BF16, F16])
def test_the_default_dtype_changes_no_bit(dtype: torch.dtype) -> None:
    """transformers sets it while it loads a model; a buffer of the kernels is float32 whatever it
    is, or they would write beyond its end."""
    wanted = every_result()
    torch.set_default_dtype(dtype)
    try:
        got = every_result()
    finally:
        torch.set_default_dtype(F32)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and same_bits(one, other)
