"""The Triton backend of linear_logprob in Triton's interpreter, held to float64."""

import itertools
from typing import Any, NamedTuple

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64, HEAD_NAMES, INF, NAN, case_id, cast, head_plain
from launches import INTERPRETER, Recorder, Witness, listed_keys

from clp_kernels import linear_logprob
from clp_kernels.ops.linear_logprob import reference
from clp_kernels.ops.linear_logprob import triton as backend
from clp_kernels.ops.linear_logprob.head import Inputs
from clp_kernels.testing import noncontiguous

pytestmark = INTERPRETER


class Case(NamedTuple):
    dtype: torch.dtype
    tokens: int
    vocab_size: int
    dim: int
    bias: str
    gaps: bool
    m: int = 0  # experts of a mixed head; 0: a plain one


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens and of ids, and several tiles in a block."""
    monkeypatch.setattr(backend, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(backend, "BACKWARD_TOKENS", 4)
    monkeypatch.setattr(backend, "BLOCK_LOGITS", 4 * 170)
    monkeypatch.setattr(backend, "BLOCK", 128)


def arguments(case: Case, draw: int = 0) -> Inputs:
    """With a reference policy; every fourth token is ignored.

    A mixed head's weights are of any sign for three examples, positive where ids are masked.
    """
    g = torch.Generator().manual_seed((hash(case[1:4]) + draw) % 2**31)
    sizes, ids = (case.tokens, case.dim), (case.vocab_size,)
    if case.m:
        ids = (case.m, *ids)
    hidden, ref = (torch.randn(sizes, generator=g).to(case.dtype) for _ in range(2))
    head = (2 * torch.randn(*ids, case.dim, generator=g) * case.dim**-0.5).to(case.dtype)
    bias = torch.randn(ids, generator=g).to(case.dtype)
    if case.bias == "rising":
        bias = torch.linspace(-60, 60, case.vocab_size).to(case.dtype).expand(ids)
    elif case.bias == "masked":
        # The first blocks and tiles have no id at all.
        bias[..., : 2 * case.vocab_size // 3] = -INF
    allowed = (bias.view(-1, case.vocab_size)[0] > -INF).nonzero()[:, 0]
    targets = allowed[torch.randint(len(allowed), (case.tokens,), generator=g)]
    targets[3::4] = -100
    tau = torch.rand(case.tokens, generator=g) + 0.5
    weights = torch.randn(3, case.m, generator=g)
    rows = torch.randint(3, (case.tokens,), generator=g)
    if case.bias == "masked":
        weights = weights.abs() + 0.1
    if case.gaps:
        hidden, head, ref, targets, tau, bias, weights, rows = map(
            noncontiguous, (hidden, head, ref, targets, tau, bias, weights, rows)
        )
    added = None if case.bias == "none" else bias
    mixture = (weights, rows) if case.m else (None, None)
    return Inputs(hidden, head, targets, added, *mixture, tau, ref, False)


def masked_plain(inputs: Inputs) -> list[torch.Tensor]:
    """head_plain without the ids whose bias is -inf: autograd makes NaN of -inf - -inf."""
    bias, targets = inputs.bias, inputs.targets
    if bias is None or bool(bias.isfinite().all()):
        return head_plain(inputs)
    vocab_size = bias.shape[-1]
    kept = (bias.reshape(-1, vocab_size)[0] > -INF).nonzero()[:, 0]
    place = torch.full((vocab_size,), -100).scatter_(0, kept, torch.arange(len(kept)))
    targets = torch.where(targets == -100, -100, place[targets.clamp(min=0)])
    head = inputs.head_weight[..., kept, :]
    return head_plain(inputs._replace(head_weight=head, targets=targets, bias=bias[..., kept]))


def check(*draws: Inputs) -> None:
    got = [backend.linear_logprob(args, True, True) for args in draws]
    cases.judge_head(got, list(draws), masked_plain)


def sampled(count: int) -> list[Case]:
    axes = (
        (F32, F16),
        (3, 4, 9),
        (31, 64, 127, 128, 129, 400, 600),
        (4, 24),
        ("none", "random", "rising", "masked"),
        (False, True),
    )
    return cases.sampled(Case, axes, count, 13)


def test_sample_covers_every_value() -> None:
    columns = list(zip(*sampled(30), strict=True))
    assert [len(set(column)) for column in columns] == [2, 3, 7, 2, 4, 2, 1]
    columns = list(zip(*mixed(), strict=True))
    assert [len(set(column)) for column in columns] == [2, 3, 7, 2, 4, 2, 2]


def mixed() -> list[Case]:
    return [case._replace(m=1 + 2 * (i % 2)) for i, case in enumerate(sampled(50)[30:])]


@pytest.mark.parametrize("case", [*sampled(30), *mixed()], ids=case_id)
def test_within_budget(case: Case) -> None:
    """Draws of a mixed head are judged as one: the largest error of few large logits is chance."""
    check(*(arguments(case, draw) for draw in range(3 if case.m else 1)))


def small(**changed: Any) -> Inputs:
    return arguments(Case(F32, 5, 400, 24, "random", False)._replace(**changed))


@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_logit_may_come_last_or_first(order: int) -> None:
    """Scaling down by more than float32 holds, and not at all."""
    inputs = small()._replace(bias=order * torch.linspace(-300, 300, 400))
    for target in (399 if order > 0 else 0, 200):
        check(inputs._replace(targets=torch.full((5,), target)))


def test_one_id_is_left() -> None:
    cases.check_one_id_is_left(backend, small(), 390)


@pytest.mark.parametrize("vocab_size", [1, 2, 3])
@pytest.mark.parametrize("bias", ["none", "rising", "masked"])
def test_few_ids(vocab_size: int, bias: str) -> None:
    """Outputs of about 0, for which there is no budget: W / t - p W / t is rounded."""
    args = arguments(Case(F32, 5, vocab_size, 4, bias, False))
    wide = masked_plain(cast(args, F64))
    for name, a, b in zip(HEAD_NAMES, backend.linear_logprob(args, True, True), wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_logits_stay_in_their_row(bad: float) -> None:
    inputs = small()
    clean = backend.linear_logprob(inputs, True, True)
    inputs.hidden[1] = bad
    inputs.hidden[3] = bad  # ignored
    others = [i for i in range(5) if i != 1]
    found = backend.linear_logprob(inputs, True, True)
    for name, got, want in zip(HEAD_NAMES, found, clean, strict=True):
        assert torch.equal(got[others], want[others]), name
        assert got[1].isnan().all(), name
    inputs = small()
    inputs.bias[:] = -INF
    assert backend.linear_logprob(inputs, True, True)[0][0].isnan()


def test_close_policies_have_an_accurate_gradient_of_kl() -> None:
    """The logits of one differ from those of the other by a large constant and by little else."""
    inputs = small(bias="none")
    inputs.head_weight[:, 0] = 1.0
    ref = inputs.hidden + 1e-2 * inputs.ref_hidden
    ref[:, 0] += 30.0
    check(inputs._replace(ref_hidden=ref))


def test_nothing_and_no_extras() -> None:
    inputs = small()
    hidden, head, targets, *_, tau, ref, _ = inputs
    few = Inputs(hidden[:0], head, targets[:0], None, None, None, tau[:0], ref[:0], False)
    none = backend.linear_logprob(few, True, True)
    assert [tuple(t.shape) for t in none] == [(0,), (0,), (0,), (0, 24), (0, 24)]
    full = backend.linear_logprob(inputs, True, True)
    for entropy, with_ref, grads in itertools.product((False, True), repeat=3):
        some = inputs._replace(ref_hidden=ref if with_ref else None)
        got = backend.linear_logprob(some, entropy, grads)
        wanted = (True, entropy, with_ref, grads, grads and with_ref)
        for there, part, complete in zip(wanted, got, full, strict=True):
            assert torch.equal(part, complete) if there else part.shape == (0,)
            assert part.dtype == complete.dtype


def test_large_weights_do_not_overflow_float16() -> None:
    """The products are scaled, not the states: 200 times a state of 400 is no float16."""
    inputs = small(dtype=F16, m=2, bias="none")
    weights = torch.tensor([[200.0, -199.0]]).expand(3, 2)
    inputs.hidden.mul_(100)
    inputs.head_weight.div_(100)
    for t in backend.linear_logprob(inputs._replace(weights=weights), True, True):
        assert t.isfinite().all()


@pytest.mark.parametrize("m", [0, 3])
def test_two_runs_give_the_same_bits(m: int) -> None:
    args = small(m=m)
    for a, b in zip(*(backend.linear_logprob(args, True, True) for _ in range(2)), strict=True):
        assert torch.equal(a, b)
    back = cases.head_backward(args)
    for a, b in zip(*(backend.linear_logprob_backward(*back) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_blocks_begin_at_whole_tiles_where_they_can() -> None:
    steps = {tokens: backend.blocks_of_ids(tokens, 700)[0].stop for tokens in (1, 5, 6, 680, 681)}
    assert steps == {1: 640, 5: 128, 6: 113, 680: 1, 681: 1}
    assert backend.blocks_of_ids(1, 700) == [slice(0, 640), slice(640, 700)]
    assert backend.blocks_of_ids(1, 0) == []


def test_every_launch_is_a_listed_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, seen = listed_keys(backend.variants((8, 0))), set[Any]()
    for name in ("block_kernel", "gradient_kernel"):
        monkeypatch.setattr(backend, name, Witness(getattr(backend, name), seen, run=True))
    flags = itertools.product((F32, F16, BF16), ("none", "random"), *[(False, True)] * 2, (0, 2))
    for dtype, bias, with_ref, grads, m in flags:
        inputs = arguments(Case(dtype, 2, 8, 4, bias, False, m))
        ref = inputs.ref_hidden if with_ref else None
        backend.linear_logprob(inputs._replace(ref_hidden=ref), True, grads)
        back = cases.head_backward(inputs, entropy=grads, kl=with_ref)
        backend.linear_logprob_backward(*back)
    assert seen == listed


# --- the backward --------------------------------------------------------------------------------


def check_backward(back: cases.HeadBackward) -> None:
    cases.judge_head_backward(backend.linear_logprob_backward(*back), back)


@pytest.mark.parametrize("case", [*sampled(45)[30:], *mixed()[:6]], ids=case_id)
def test_gradients_within_budget(case: Case) -> None:
    extras = {"entropy": case.dim == 4, "kl": case.tokens != 4}
    inputs, upstream, needs = cases.head_backward(arguments(case), **extras)
    if case.gaps:
        upstream = tuple(map(noncontiguous, upstream))
    if case.bias == "masked":
        needs[3] = False  # the weights multiply -inf
    got = backend.linear_logprob_backward(inputs, upstream, needs)
    bias = inputs.bias
    if bias is not None and case.bias == "masked":
        # As if the masked ids were not there: autograd makes NaN of -inf - -inf.
        kept = (bias.reshape(-1, case.vocab_size)[0] > -INF).nonzero()[:, 0]
        place = torch.full((case.vocab_size,), -100).scatter_(0, kept, torch.arange(len(kept)))
        targets = torch.where(inputs.targets == -100, -100, place[inputs.targets.clamp(min=0)])
        masked = torch.ones(case.vocab_size).index_fill(0, kept, 0).bool()
        assert not got[1][..., masked, :].any() and not got[2][..., masked].any()
        got = (got[0], got[1][..., kept, :].contiguous(), got[2][..., kept].contiguous(), got[3])
        head = inputs.head_weight[..., kept, :]
        inputs = inputs._replace(head_weight=head, targets=targets, bias=bias[..., kept])
    cases.judge_head_backward(got, (inputs, upstream, needs))


@pytest.mark.parametrize("needs", [*({i} for i in range(4)), {0, 2}, {1, 3}, set()], ids=str)
def test_gradients_that_are_asked_for(needs: set[int]) -> None:
    """Any choice of them, each with the bits that it has beside the others."""
    inputs, upstream, every = cases.head_backward(small(m=2))
    full = backend.linear_logprob_backward(inputs, upstream, every)
    asked = [i in needs for i in range(4)]
    some = backend.linear_logprob_backward(inputs, upstream, asked)
    for need, part, complete in zip(asked, some, full, strict=True):
        assert torch.equal(part, complete) if need else part.shape == (0,)


def test_gradients_of_no_tokens() -> None:
    for dtype in (F32, F16):
        inputs, upstream, needs = cases.head_backward(small(m=2, dtype=dtype))
        of_tokens = ("hidden", "targets", "example_ids", "temperature", "ref_hidden")
        none = inputs._replace(**{name: getattr(inputs, name)[:0] for name in of_tokens})
        upstream = tuple(u[:0] for u in upstream)
        got = backend.linear_logprob_backward(none, upstream, needs)
        assert [tuple(t.shape) for t in got] == [(0, 24), (2, 400, 24), (2, 400), (3, 2)]
        assert not any(t.any() for t in got)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["hidden", "upstream"])
def test_bad_numbers_stay_in_their_row(bad: float, where: str) -> None:
    inputs, upstream, needs = cases.head_backward(small(dtype=F16))
    clean = backend.linear_logprob_backward(inputs, upstream, needs)[0]
    for row in (1, 3):  # 3 is ignored
        (inputs.hidden if where == "hidden" else upstream[0])[row] = bad
    got = backend.linear_logprob_backward(inputs, upstream, needs)[0]
    others = [i for i in range(5) if i != 1]
    torch.testing.assert_close(got[others], clean[others], rtol=2e-3, atol=1e-6)
    assert not got[1].isfinite().any() and not got[3].any()


@pytest.mark.parametrize("scale", [1e-7, 1e4])
def test_float16_keeps_derivatives_of_any_size(scale: float) -> None:
    """The gradients of the head are in the loss's units: a mean over many tokens is not lost."""
    inputs, upstream, needs = cases.head_backward(small(dtype=F16))
    got = backend.linear_logprob_backward(inputs, upstream, needs)
    scaled = tuple(u * scale for u in upstream)
    wide = reference.linear_logprob_backward(*cast((inputs, scaled), F64), needs)
    for name, a, b in zip(cases.HEAD_LEAVES, got, wide, strict=True):
        if a.numel():
            near = 4e-3 * float(b.abs().max()) / scale
            torch.testing.assert_close(a.double(), b / scale, rtol=0, atol=near, msg=name)


@pytest.mark.parametrize("order", [1, -1])
def test_gradients_where_the_largest_logit_comes_last_or_first(order: int) -> None:
    inputs = small()._replace(bias=order * torch.linspace(-300, 300, 400))
    for target in (399 if order > 0 else 0, 200):
        check_backward(cases.head_backward(inputs._replace(targets=torch.full((5,), target))))


def test_a_loss_with_entropy_and_a_trained_head_runs_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the public op: no reference, and the gradients of plain PyTorch."""
    launched: list[str] = []
    for name in ("block_kernel", "gradient_kernel"):
        monkeypatch.setattr(backend, name, Recorder(name, getattr(backend, name), launched))
    inputs = small()
    leaves = {n: getattr(inputs, n).clone().requires_grad_() for n in cases.HEAD_LEAVES[:3]}
    given = {"temperature": inputs.temperature, "ref_hidden": inputs.ref_hidden}
    out = linear_logprob(
        targets=inputs.targets, return_entropy=True, backend="triton", **leaves, **given
    )
    upstream = [torch.linspace(-1, 2, 5) for _ in range(3)]
    got = torch.autograd.grad(list(out), list(leaves.values()), upstream)
    assert "gradient" in launched
    cases.judge_head_backward(
        (*got, torch.empty(0)), (inputs, tuple(upstream), [True, True, True, False])
    )


def test_who_runs_it() -> None:
    inputs = small(m=2)
    assert backend.why_not(inputs, True, True) is None
    assert "batch_invariant" in str(backend.why_not(inputs._replace(invariant=True), True, True))
    assert "float64" in str(backend.why_not(cast(inputs, F64), True, True))


def test_bfloat16_is_close() -> None:
    """The interpreter truncates where a GPU rounds, so no budget: the probabilities' dtype shows
    in the gradients with respect to hidden alone."""
    inputs = small(dtype=BF16)
    got = backend.linear_logprob(inputs, True, True)
    want = reference.linear_logprob(cast(inputs, F64), True, True)
    for i, (name, a, b) in enumerate(zip(HEAD_NAMES, got, want, strict=True)):
        near = 2e-6 if i < 3 else 2**-6
        torch.testing.assert_close(a.double(), b, rtol=near, atol=near, msg=name)
    back = cases.head_backward(inputs)
    grads = backend.linear_logprob_backward(*back)
    want = reference.linear_logprob_backward(*cast(back, F64))
    for name, a, b in zip(cases.HEAD_LEAVES, grads, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-6, atol=2**-6, msg=name)
