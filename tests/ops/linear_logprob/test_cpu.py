"""linear_logprob on the CPU: blocks of every size against float64, each instruction set, plain and
mixed heads, gradients with a frozen and with a trained head, and what makes the backward compute
the logits again."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clp_kernels import linear_logprob, native, registry
from clp_kernels.ops import reference
from clp_kernels.ops.linear_logprob import (
    cpu as cpu_linear_logprob,
)
from clp_kernels.ops.linear_logprob import (
    cpu_backward as cpu_linear_logprob_backward,
)
from clp_kernels.testing import assert_within_budget, expanded, noncontiguous

pytestmark = pytest.mark.skipif(
    native.cpu_missing() is not None, reason="the CPU kernels are not built"
)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ISAS: list[str] = native.cpu().isas() if native.cpu_missing() is None else ["scalar"]
NAMES = ("logprobs", "entropy", "kl", "slope", "kl_slope")


def arguments(
    tokens: int, vocab_size: int, dim: int, dtype: torch.dtype, *, bias: bool, m: int = 0
) -> tuple[Any, ...]:
    """Of the op, with entropy, reference and slopes; every fourth token is ignored.

    m: experts of a mixed head, with weights of any sign for three examples; 0 for a plain head.
    """
    hidden, ref = (torch.randn(tokens, dim).to(dtype) for _ in range(2))
    shape = (m, vocab_size, dim) if m else (vocab_size, dim)
    head = (2 * torch.randn(shape) * dim**-0.5).to(dtype)
    targets = torch.randint(vocab_size, (tokens,))
    targets[3::4] = -100
    added = torch.randn(shape[:-1]).to(dtype) if bias else None
    weights, ids = (torch.randn(3, m), torch.randint(3, (tokens,))) if m else (None, None)
    temperature = torch.rand(tokens) + 0.5
    return hidden, head, targets, added, weights, ids, temperature, True, ref, True, False


def in_dtype(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    def to(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

    return tuple(map(to, args))


def outputs(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and kl from materialised logits in the dtype of the inputs."""
    hidden, head, targets, bias, weights, ids, temperature, _, ref, _, _ = args
    tau = temperature.to(hidden.dtype)[:, None]

    def logits(x: Tensor) -> Tensor:
        if weights is None:
            return torch.nn.functional.linear(x, head, bias)
        columns = weights.to(x.dtype)[ids]
        added = [None] * len(head) if bias is None else bias
        each = map(torch.nn.functional.linear, itertools.repeat(x), head, added)
        total: Tensor = sum(columns[:, i, None] * z for i, z in enumerate(each))
        return total

    logp, logq = (logits(x).div(tau).log_softmax(-1) for x in (hidden, ref))
    used = targets != -100
    picked = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0] * used
    p = logp.exp()
    kl = torch.where(p > 0, p * (logp - logq), 0).sum(-1) * used
    entropy = -torch.where(p > 0, p * logp, 0).sum(-1) * used
    return picked, entropy, kl


def plain(args: tuple[Any, ...]) -> list[Tensor]:
    """The outputs and slopes that the op should have."""
    hidden = args[0].detach().requires_grad_()
    picked, entropy, kl = outputs((hidden, *args[1:]))
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
    for bias, m in itertools.product((False, True), (0, 1, 3)):
        check(arguments(*sizes, dtype, bias=bias, m=m), isa)


@given(
    st.integers(12, 40),
    st.integers(12, 400),
    st.integers(8, 40),
    st.integers(1, 64),
    st.integers(1, 4000),
    st.integers(0, 3),
    st.integers(0, 2**20),
)
def test_blocks_of_any_size(
    tokens: int, vocab_size: int, dim: int, block: int, logits: int, m: int, seed: int
) -> None:
    torch.manual_seed(seed)
    args = arguments(tokens, vocab_size, dim, F32, bias=bool(seed % 2), m=m)
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
@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_masked_ids(isa: str, m: int) -> None:
    """A bias of -inf: whole blocks without an id, and one id alone."""
    args = list(arguments(20, 120, 8, F32, bias=True, m=m))
    if m:
        args[4] = torch.rand(3, m) + 0.1
    args[3][..., :80] = -torch.inf
    args[2] = torch.full((20,), 90)
    got = cpu_linear_logprob.linear_logprob(*args, isa=isa)
    wide = reference.linear_logprob(*in_dtype(tuple(args), F64))
    for name, a, b in zip(NAMES, got, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5, msg=name)
    args[3][:] = -torch.inf
    args[3][..., 90] = 0.0
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


@pytest.mark.parametrize("m", [0, 2])
def test_two_runs_give_the_same_bits(m: int) -> None:
    args = arguments(70, 900, 32, F32, bias=True, m=m)
    for a, b in zip(*(cpu_linear_logprob.linear_logprob(*args) for _ in range(2)), strict=True):
        assert torch.equal(a, b)
    back = backward_arguments(args)
    runs = (cpu_linear_logprob_backward.linear_logprob_backward(*back, isa=isa) for isa in ISAS * 2)
    first = next(runs)
    for run in runs:
        assert all(map(torch.equal, first, run))


def test_layouts_of_no_dense_axis() -> None:
    args = arguments(30, 200, 16, F32, bias=True, m=3)
    gaps = [noncontiguous(a) if isinstance(a, Tensor) else a for a in args]
    gaps[0], gaps[6] = expanded(args[0]), expanded(args[6])
    dense = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in gaps)
    check(tuple(gaps))
    back = backward_arguments(dense)
    upstream = (expanded(back[0]), *map(noncontiguous, back[1:3]))
    check_backward((*upstream, *backward_arguments(tuple(gaps))[3:]))


def backward_arguments(
    args: tuple[Any, ...], *, entropy: bool = True, kl: bool = True
) -> tuple[Any, ...]:
    """Of the backward op, asking for all gradients, with upstream gradients of any sign."""
    hidden, head, targets, bias, weights, ids, temperature, _, ref, _, _ = args
    upstream = [torch.randn(len(hidden) if there else 0) for there in (True, entropy, kl)]
    needs = [True, True, bias is not None, weights is not None]
    states = (hidden, head, targets, bias, weights, ids, temperature)
    return (*upstream, *states, ref if kl else None, False, needs)


def plain_backward(back: tuple[Any, ...]) -> list[Tensor]:
    """The gradients asked for, by autograd from materialised logits."""
    upstream, (hidden, head, targets, bias, weights, ids, tau, ref, _, needs) = back[:3], back[3:]
    leaves = [
        t.detach().clone().requires_grad_() if need else t
        for t, need in zip((hidden, head, bias, weights), needs, strict=True)
    ]
    hidden, head, bias, weights = leaves
    other = hidden.detach() if ref is None else ref
    results = outputs((hidden, head, targets, bias, weights, ids, tau, True, other, True, False))
    total = sum((u * r).sum() for u, r in zip(upstream, results, strict=True) if u.numel())
    asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    return list(torch.autograd.grad(total, asked))


def check_backward(back: tuple[Any, ...], isa: str = "") -> None:
    got = cpu_linear_logprob_backward.linear_logprob_backward(*back, isa=isa)
    wide, same = plain_backward(in_dtype(back, F64)), plain_backward(back)
    needs = back[-1]
    for grad, need in zip(got, needs, strict=True):
        assert grad.numel() > 0 if need else grad.shape == (0,)
    asked = [i for i, need in enumerate(needs) if need]
    for i, *two in zip(asked, wide, same, strict=True):
        assert got[i].dtype == two[1].dtype and got[i].is_contiguous()
        assert_within_budget(got[i], *two, name=("hidden", "head", "bias", "weights")[i])


@pytest.fixture(params=["kept", "again"])
def logits_between(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows of a few tokens are kept between the passes, or none."""
    monkeypatch.setattr(cpu_linear_logprob_backward, "KEPT_LOGITS", 3000)
    least = 1 if request.param == "kept" else 2**20
    monkeypatch.setattr(cpu_linear_logprob_backward, "KEPT_TOKENS", least)


@pytest.mark.usefixtures("small_blocks", "logits_between")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("sizes", [(33, 150, 24), (40, 17, 8), (17, 37, 64), (64, 301, 5)])
def test_gradients_of_each_instruction_set(
    isa: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    torch.manual_seed(sum(sizes))
    for bias, m, extras in itertools.product((False, True), (0, 1, 3), (False, True)):
        args = arguments(*sizes, dtype, bias=bias, m=m)
        check_backward(backward_arguments(args, entropy=extras, kl=extras), isa)


@given(
    st.integers(1, 40),
    st.integers(2, 400),
    st.integers(1, 4000),
    st.integers(0, 4000),
    st.integers(0, 3),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.integers(0, 2**20),
)
def test_gradients_by_blocks_of_any_size(
    tokens: int, vocab_size: int, logits: int, kept: int, m: int, needs: list[bool], seed: int
) -> None:
    """Any choice of gradients, and those not asked for are empty; the reference in float64."""
    torch.manual_seed(seed)
    args = arguments(tokens, vocab_size, 12, F32, bias=bool(seed % 2), m=m)
    *back, possible = backward_arguments(args, kl=bool(seed // 2 % 2))
    asked = [a and b for a, b in zip(needs, possible, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_linear_logprob, "BLOCK_LOGITS", logits)
        patch.setattr(cpu_linear_logprob_backward, "KEPT_LOGITS", kept)
        patch.setattr(cpu_linear_logprob_backward, "KEPT_TOKENS", 2)
        got = cpu_linear_logprob_backward.linear_logprob_backward(*back, asked)
    want = reference.linear_logprob_backward(*in_dtype(tuple(back), F64), asked)
    for a, b in zip(got, want, strict=True):
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5 * max(scale, 1.0))


@pytest.mark.usefixtures("small_blocks", "logits_between")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [0, 2])
def test_gradients_of_masked_ids(isa: str, m: int) -> None:
    """A bias of -inf gives an id no part in any gradient, NaN stays in its token's row, and an
    ignored token passes nothing on."""
    args = list(arguments(20, 120, 8, F32, bias=True, m=m))
    if m:
        args[4] = torch.rand(3, m) + 0.1
    args[2][args[2] != -100] = 90
    args[3][..., :80] = -torch.inf
    *back, _ = backward_arguments(tuple(args))
    needs = [True, True, True, False]
    run = cpu_linear_logprob_backward.linear_logprob_backward
    got = run(*back, needs, isa=isa)
    wide = reference.linear_logprob_backward(*in_dtype(tuple(back), F64), needs)
    for a, b in zip(got, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert not got[1][..., :80, :].any() and not got[2][..., :80].any()
    assert not got[0][3::4].any()
    back[3] = back[3].clone()
    back[3][1] = torch.nan
    bad = run(*back, needs, isa=isa)[0]
    assert bad[1].isnan().all() and torch.equal(bad[2:], got[0][2:])


@pytest.mark.usefixtures("small_blocks")
def test_gradients_where_the_largest_logit_comes_last_or_first() -> None:
    for order in (1, -1):
        args = list(arguments(20, 120, 4, F32, bias=True))
        args[3] = order * torch.linspace(-300, 300, 120)
        for target in (119 if order > 0 else 0, 60):
            args[2] = torch.full((20,), target)
            check_backward(backward_arguments(tuple(args)))


def test_gradients_of_no_tokens() -> None:
    *rest, needs = backward_arguments(arguments(8, 30, 4, F32, bias=True, m=2))
    none = [t[:0] if i in (0, 1, 2, 3, 5, 8, 9, 10) else t for i, t in enumerate(rest)]
    got = cpu_linear_logprob_backward.linear_logprob_backward(*none, needs)
    assert [tuple(t.shape) for t in got] == [(0, 4), (2, 30, 4), (2, 30), (3, 2)]
    assert not any(t.any() for t in got)


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
    backward = cpu_linear_logprob_backward.linear_logprob_backward

    def spy(*a: Any) -> Any:
        again.append(1)
        assert (a[10] is not None) == (a[2].numel() > 0) == ("kl" in which)
        return backward(*a)

    monkeypatch.setitem(
        registry.BACKENDS,
        "linear_logprob_backward",
        (registry.Backend("cpu", spy, lambda *_: None),),
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
    args = list(arguments(4, 10, 4, F32, bias=False, m=2))
    assert cpu_linear_logprob.why_not(*args) is None
    back = backward_arguments(tuple(args))
    assert cpu_linear_logprob_backward.why_not(*back) is None
    assert registry.select("linear_logprob_backward", "auto", *back).name == "cpu"
    invariant = (*back[:11], True, back[12])
    assert "batch_invariant" in str(cpu_linear_logprob_backward.why_not(*invariant))
    assert "batch_invariant" in str(cpu_linear_logprob.why_not(*args[:10], True))
    assert "float64" in str(cpu_linear_logprob.why_not(*in_dtype(tuple(args), F64)))
