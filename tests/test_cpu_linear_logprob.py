"""linear_logprob on the CPU: blocks of every size against float64, each instruction set, gradients
with a frozen head, and what makes the backward compute the logits again."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clp_kernels import cpu_linear_logprob, dispatch, linear_logprob, native, reference
from clp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.skipif(
    native.cpu_missing() is not None, reason="the CPU kernels are not built"
)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ISAS: list[str] = native.cpu().isas() if native.cpu_missing() is None else ["scalar"]
NAMES = ("logprobs", "entropy", "kl", "slope", "kl_slope")


def arguments(
    tokens: int, vocab_size: int, dim: int, dtype: torch.dtype, *, bias: bool, scale: float = 2.0
) -> tuple[Any, ...]:
    """Of the op, with entropy, reference and slopes; every fourth token is ignored."""
    hidden, ref = (torch.randn(tokens, dim).to(dtype) for _ in range(2))
    head = (scale * torch.randn(vocab_size, dim) * dim**-0.5).to(dtype)
    targets = torch.randint(vocab_size, (tokens,))
    targets[3::4] = -100
    added = torch.randn(vocab_size).to(dtype) if bias else None
    temperature = torch.rand(tokens) + 0.5
    return hidden, head, targets, added, None, None, temperature, True, ref, True, False


def in_dtype(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    def to(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

    return tuple(map(to, args))


def plain(args: tuple[Any, ...]) -> list[Tensor]:
    """From materialised logits in the dtype of the inputs; slopes by autograd."""
    hidden, head, targets, bias, _, _, temperature, _, ref, _, _ = args
    hidden = hidden.detach().requires_grad_()
    tau = temperature.to(hidden.dtype)[:, None]
    logp, logq = (
        torch.nn.functional.linear(x, head, bias).div(tau).log_softmax(-1) for x in (hidden, ref)
    )
    used = targets != -100
    picked = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0] * used
    p = logp.exp()
    kl = torch.where(p > 0, p * (logp - logq), 0).sum(-1) * used
    entropy = -torch.where(p > 0, p * logp, 0).sum(-1) * used
    slopes = [torch.autograd.grad(o.sum(), hidden, retain_graph=True)[0] for o in (picked, kl)]
    return [t.detach() for t in (picked, entropy, kl, *slopes)]


def check(args: tuple[Any, ...], isa: str = "") -> None:
    got = cpu_linear_logprob.linear_logprob(*args, isa=isa)
    wide, same = plain(in_dtype(args, F64)), plain(args)
    for name, *three in zip(NAMES, got, wide, same, strict=True):
        assert_within_budget(*three, name=name)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear_logprob, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(cpu_linear_logprob, "BLOCK_LOGITS", 16 * 37)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("sizes", [(33, 150, 24), (40, 17, 8), (17, 37, 64), (64, 301, 5)])
def test_each_instruction_set(isa: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(sum(sizes))
    for bias in (False, True):
        check(arguments(*sizes, dtype, bias=bias), isa)


@given(
    st.integers(12, 40),
    st.integers(12, 400),
    st.integers(8, 40),
    st.integers(1, 64),
    st.integers(1, 4000),
    st.integers(0, 2**20),
)
def test_blocks_of_any_size(
    tokens: int, vocab_size: int, dim: int, block: int, logits: int, seed: int
) -> None:
    torch.manual_seed(seed)
    args = arguments(tokens, vocab_size, dim, F32, bias=bool(seed % 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_linear_logprob, "BLOCK_TOKENS", block)
        patch.setattr(cpu_linear_logprob, "BLOCK_LOGITS", logits)
        check(args)


@pytest.mark.usefixtures("small_blocks")
def test_the_largest_logit_may_come_last_or_first() -> None:
    """Scaling down by more than float32 holds, and not at all."""
    for order in (1, -1):
        args = list(arguments(20, 120, 4, F32, bias=True))
        args[3] = order * torch.linspace(-300, 300, 120)
        args[2] = torch.full((20,), 119 if order > 0 else 0)
        check(tuple(args))
        args[2] = torch.full((20,), 60)
        logprobs = cpu_linear_logprob.linear_logprob(*args)[0]
        torch.testing.assert_close(logprobs.double(), plain(in_dtype(tuple(args), F64))[0])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("isa", ISAS)
def test_masked_ids(isa: str) -> None:
    """A bias of -inf: whole blocks without an id, one id alone, and one the reference lacks."""
    args = list(arguments(20, 120, 8, F32, bias=True))
    args[3][:80] = -torch.inf
    args[2] = torch.full((20,), 90)
    got = cpu_linear_logprob.linear_logprob(*args, isa=isa)
    wide = reference.linear_logprob(*in_dtype(tuple(args), F64))
    for name, a, b in zip(NAMES, got, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5, msg=name)
    args[3][:] = -torch.inf
    args[3][90] = 0.0
    logprobs, entropy, kl, slope, kl_slope = cpu_linear_logprob.linear_logprob(*args, isa=isa)
    for values in (logprobs, entropy, kl, slope, kl_slope):
        assert values.abs().max() < 1e-6


def test_no_tokens_and_no_extras() -> None:
    args = arguments(8, 30, 4, F32, bias=False)
    hidden, head, targets, *_, ref, _, _ = args
    few = (hidden[:0], head, targets[:0], None, None, None, torch.ones(0), True, ref[:0])
    none = cpu_linear_logprob.linear_logprob(*few, True, False)
    assert [tuple(t.shape) for t in none] == [(0,), (0,), (0,), (0, 4), (0, 4)]
    bare = cpu_linear_logprob.linear_logprob(*args[:7], False, None, False, False)
    assert [t.numel() for t in bare] == [8, 0, 0, 0, 0]
    full = cpu_linear_logprob.linear_logprob(*args)
    assert torch.equal(bare[0], full[0])


def test_two_runs_give_the_same_bits() -> None:
    args = arguments(70, 900, 32, F32, bias=True)
    for a, b in zip(*(cpu_linear_logprob.linear_logprob(*args) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def loss_of(args: tuple[Any, ...], which: str, **changed: Any) -> tuple[Tensor, Tensor]:
    hidden, head, targets, bias, _, _, temperature, _, ref, _, _ = args
    hidden = hidden.detach().requires_grad_()
    out = linear_logprob(
        hidden,
        changed.get("head", head),
        targets,
        bias=bias,
        temperature=temperature,
        return_entropy=True,
        ref_hidden=ref,
    )
    parts = {"logprobs": out.logprobs, "entropy": out.entropy, "kl": out.kl}
    weights = torch.linspace(-1, 2, len(hidden))
    total = sum((weights * parts[name]).sum() for name in which.split())
    return torch.autograd.grad(total, hidden)[0], total.detach()


@pytest.mark.parametrize(
    "which", ["logprobs", "kl", "entropy", "logprobs kl", "logprobs entropy kl"]
)
def test_gradients_with_a_frozen_and_with_a_trained_head(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, made in the forward or by computing the logits again: only where they must be."""
    args = arguments(30, 200, 16, F32, bias=True)
    again = []
    backward = reference.linear_logprob_backward

    def spy(*a: Any) -> Any:
        again.append(1)
        return backward(*a)

    monkeypatch.setitem(
        dispatch.BACKENDS,
        "linear_logprob_backward",
        (dispatch.Backend("reference", spy, lambda *_: None),),
    )
    frozen, value = loss_of(args, which)
    assert len(again) == ("entropy" in which)
    trained, same = loss_of(args, which, head=args[1].clone().requires_grad_())
    assert len(again) == ("entropy" in which) + 1
    assert torch.equal(value, same)
    torch.testing.assert_close(frozen, trained, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        out = linear_logprob(args[0].clone().requires_grad_(), args[1], args[2])
    assert not out.logprobs.requires_grad


def test_who_runs_it() -> None:
    args = list(arguments(4, 10, 4, F32, bias=False))
    assert cpu_linear_logprob.why_not(*args) is None
    assert "mixed" in str(cpu_linear_logprob.why_not(*args[:4], torch.ones(1, 1), *args[5:]))
    assert "batch_invariant" in str(cpu_linear_logprob.why_not(*args[:10], True))
    assert "float64" in str(cpu_linear_logprob.why_not(*in_dtype(tuple(args), F64)))
