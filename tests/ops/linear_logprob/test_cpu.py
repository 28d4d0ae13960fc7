"""linear_logprob on the CPU: blocks of every size against float64, each instruction set, plain and
mixed heads, gradients with a frozen and with a trained head, and what makes the backward compute
the logits again."""

import itertools
from typing import Any

import cases
import pytest
import torch
from cases import BF16, CPU_KERNELS, F16, F32, F64, HEAD_NAMES, ISAS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clp_kernels import linear_logprob, registry
from clp_kernels.ops.linear_logprob import cpu, reference
from clp_kernels.ops.linear_logprob.head import Inputs
from clp_kernels.testing import expanded, noncontiguous

pytestmark = CPU_KERNELS


def check(inputs: Inputs, isa: str = "") -> None:
    cases.judge_head([cpu.linear_logprob(inputs, True, True, isa)], [inputs])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(cpu, "BLOCK_LOGITS", 16 * 37)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("sizes", [(33, 150, 24), (40, 17, 8), (17, 37, 64), (64, 301, 5)])
def test_each_instruction_set(isa: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(sum(sizes))
    for bias, m in itertools.product((False, True), (0, 1, 3)):
        check(cases.head_inputs(*sizes, dtype, bias=bias, m=m), isa)


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
    inputs = cases.head_inputs(tokens, vocab_size, dim, F32, bias=bool(seed % 2), m=m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK_TOKENS", block)
        patch.setattr(cpu, "BLOCK_LOGITS", logits)
        check(inputs)


@pytest.mark.usefixtures("small_blocks")
def test_the_largest_logit_may_come_last_or_first() -> None:
    """Scaling down by more than float32 holds, and not at all."""
    for order in (1, -1):
        bias = order * torch.linspace(-300, 300, 120)
        inputs = cases.head_inputs(20, 120, 4, F32, bias=True)._replace(bias=bias)
        check(inputs._replace(targets=torch.full((20,), 119 if order > 0 else 0)))
        inputs = inputs._replace(targets=torch.full((20,), 60))
        logprobs = cpu.linear_logprob(inputs, True, True)[0]
        torch.testing.assert_close(logprobs.double(), cases.head_plain(cases.cast(inputs, F64))[0])


def masked_inputs(m: int) -> Inputs:
    """A bias of -inf for the first 80 of 120 ids."""
    inputs = cases.head_inputs(20, 120, 8, F32, bias=True, m=m)
    inputs.bias[..., :80] = -torch.inf
    return inputs._replace(weights=torch.rand(3, m) + 0.1) if m else inputs


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_masked_ids(isa: str, m: int) -> None:
    """A bias of -inf: whole blocks without an id, and one id alone."""
    inputs = masked_inputs(m)._replace(targets=torch.full((20,), 90))
    got = cpu.linear_logprob(inputs, True, True, isa)
    wide = reference.linear_logprob(cases.cast(inputs, F64), True, True)
    for name, a, b in zip(HEAD_NAMES, got, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5, msg=name)
    inputs.bias[:] = -torch.inf
    inputs.bias[..., 90] = 0.0
    for values in cpu.linear_logprob(inputs, True, True, isa):
        assert values.abs().max() < 1e-6


def test_no_tokens_and_no_extras() -> None:
    inputs = cases.head_inputs(8, 30, 4, F32, bias=False)
    hidden, head, targets, *_, tau, ref, _ = inputs
    few = Inputs(hidden[:0], head, targets[:0], None, None, None, tau[:0], ref[:0], False)
    none = cpu.linear_logprob(few, True, True)
    assert [tuple(t.shape) for t in none] == [(0,), (0,), (0,), (0, 4), (0, 4)]
    bare = cpu.linear_logprob(inputs._replace(ref_hidden=None), False, False)
    assert [t.numel() for t in bare] == [8, 0, 0, 0, 0]
    full = cpu.linear_logprob(inputs, True, True)
    assert torch.equal(bare[0], full[0])


@pytest.mark.parametrize("m", [0, 2])
def test_two_runs_give_the_same_bits(m: int) -> None:
    inputs = cases.head_inputs(70, 900, 32, F32, bias=True, m=m)
    for a, b in zip(*(cpu.linear_logprob(inputs, True, True) for _ in range(2)), strict=True):
        assert torch.equal(a, b)
    back = cases.head_backward(inputs)
    runs = (cpu.linear_logprob_backward(*back, isa) for isa in ISAS * 2)
    first = next(runs)
    for run in runs:
        assert all(map(torch.equal, first, run))


def test_layouts_of_no_dense_axis() -> None:
    inputs = cases.head_inputs(30, 200, 16, F32, bias=True, m=3)
    gaps = Inputs(*(noncontiguous(t) if isinstance(t, Tensor) else t for t in inputs))
    gaps = gaps._replace(hidden=expanded(inputs.hidden), temperature=expanded(inputs.temperature))
    check(gaps)
    _, (first, *others), needs = cases.head_backward(gaps)
    check_backward((gaps, (expanded(first), *map(noncontiguous, others)), needs))


def check_backward(back: cases.HeadBackward, isa: str = "") -> None:
    cases.judge_head_backward(cpu.linear_logprob_backward(*back, isa), back)


@pytest.fixture(params=["kept", "again"])
def logits_between(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows of a few tokens are kept between the passes, or none."""
    monkeypatch.setattr(cpu, "KEPT_LOGITS", 3000)
    least = 1 if request.param == "kept" else 2**20
    monkeypatch.setattr(cpu, "KEPT_TOKENS", least)


@pytest.mark.usefixtures("small_blocks", "logits_between")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("sizes", [(33, 150, 24), (40, 17, 8), (17, 37, 64), (64, 301, 5)])
def test_gradients_of_each_instruction_set(
    isa: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    torch.manual_seed(sum(sizes))
    for bias, m, extras in itertools.product((False, True), (0, 1, 3), (False, True)):
        inputs = cases.head_inputs(*sizes, dtype, bias=bias, m=m)
        check_backward(cases.head_backward(inputs, entropy=extras, kl=extras), isa)


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
    inputs = cases.head_inputs(tokens, vocab_size, 12, F32, bias=bool(seed % 2), m=m)
    *back, possible = cases.head_backward(inputs, kl=bool(seed // 2 % 2))
    asked = [a and b for a, b in zip(needs, possible, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK_LOGITS", logits)
        patch.setattr(cpu, "KEPT_LOGITS", kept)
        patch.setattr(cpu, "KEPT_TOKENS", 2)
        got = cpu.linear_logprob_backward(*back, asked)
    want = reference.linear_logprob_backward(*cases.cast(back, F64), asked)
    for a, b in zip(got, want, strict=True):
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5 * max(scale, 1.0))


@pytest.mark.usefixtures("small_blocks", "logits_between")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [0, 2])
def test_gradients_of_masked_ids(isa: str, m: int) -> None:
    """A bias of -inf gives an id no part in any gradient, NaN stays in its token's row, and an
    ignored token passes nothing on."""
    inputs = masked_inputs(m)
    inputs.targets[inputs.targets != -100] = 90
    inputs, upstream, _ = cases.head_backward(inputs)
    needs = [True, True, True, False]
    run = cpu.linear_logprob_backward
    got = run(inputs, upstream, needs, isa)
    wide = reference.linear_logprob_backward(*cases.cast((inputs, upstream), F64), needs)
    for a, b in zip(got, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert not got[1][..., :80, :].any() and not got[2][..., :80].any()
    assert not got[0][3::4].any()
    inputs.hidden[1] = torch.nan
    bad = run(inputs, upstream, needs, isa)[0]
    assert bad[1].isnan().all() and torch.equal(bad[2:], got[0][2:])


@pytest.mark.usefixtures("small_blocks")
def test_gradients_where_the_largest_logit_comes_last_or_first() -> None:
    for order in (1, -1):
        bias = order * torch.linspace(-300, 300, 120)
        inputs = cases.head_inputs(20, 120, 4, F32, bias=True)._replace(bias=bias)
        for target in (119 if order > 0 else 0, 60):
            targets = torch.full((20,), target)
            check_backward(cases.head_backward(inputs._replace(targets=targets)))


def test_gradients_of_no_tokens() -> None:
    inputs, upstream, needs = cases.head_backward(cases.head_inputs(8, 30, 4, F32, bias=True, m=2))
    of_tokens = ("hidden", "targets", "example_ids", "temperature", "ref_hidden")
    none = inputs._replace(**{name: getattr(inputs, name)[:0] for name in of_tokens})
    got = cpu.linear_logprob_backward(none, tuple(u[:0] for u in upstream), needs)
    assert [tuple(t.shape) for t in got] == [(0, 4), (2, 30, 4), (2, 30), (3, 2)]
    assert not any(t.any() for t in got)


def loss_of(inputs: Inputs, which: str, **changed: Tensor) -> tuple[Tensor, Tensor]:
    hidden, head, targets, bias, _, _, tau, ref, _ = inputs
    hidden, head = hidden.detach().requires_grad_(), changed.get("head", head)
    options = {"bias": bias, "temperature": tau, "return_entropy": True, "ref_hidden": ref}
    out = linear_logprob(hidden, head, targets, **options)
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
    args = cases.head_inputs(30, 200, 16, F32, bias=True)
    again = []

    def spy(inputs: Inputs, upstream: tuple[Tensor, ...], needs: list[bool]) -> Any:
        again.append(1)
        assert (inputs.ref_hidden is not None) == (upstream[2].numel() > 0) == ("kl" in which)
        return cpu.linear_logprob_backward(inputs, upstream, needs)

    monkeypatch.setitem(
        registry.BACKENDS,
        "linear_logprob_backward",
        (registry.Backend("cpu", spy, lambda *_: None),),
    )
    frozen, value = loss_of(args, which)
    assert len(again) == ("entropy" in which)
    trained, same = loss_of(args, which, head=args.head_weight.clone().requires_grad_())
    assert len(again) == ("entropy" in which) + 1
    assert torch.equal(value, same)
    torch.testing.assert_close(frozen, trained, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        out = linear_logprob(args.hidden.clone().requires_grad_(), *args[1:3])
    assert not out.logprobs.requires_grad


def test_who_runs_it() -> None:
    inputs = cases.head_inputs(4, 10, 4, F32, bias=False, m=2)
    assert cpu.why_not(inputs, True, True) is None
    back = cases.head_backward(inputs)
    entry = registry.select("linear_logprob_backward", "auto", *back)
    assert entry.name == "cpu" and entry.why_not(*back) is None
    invariant = inputs._replace(invariant=True)
    assert "batch_invariant" in str(entry.why_not(invariant, *back[1:]))
    assert "batch_invariant" in str(cpu.why_not(invariant, True, True))
    assert "float64" in str(cpu.why_not(cases.cast(inputs, F64), True, True))
