"""The Triton backend of linear_logprob in Triton's interpreter, held to float64.

It shows indexing, masks and the order of sums, not what a GPU does with them.
"""

import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from clp_kernels.ops import reference
from clp_kernels.ops.linear_logprob import triton as backend
from clp_kernels.testing import assert_within_budget, noncontiguous

pytestmark = [
    pytest.mark.skipif(not backend.INTERPRETED, reason="TRITON_INTERPRET=1 was not set at import"),
    pytest.mark.usefixtures("one_thread"),
    # The interpreter warns where a test means inf and NaN to appear.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = ("logprobs", "entropy", "kl", "slope", "kl_slope")
NAN, INF = float("nan"), float("inf")
Arguments = tuple[Any, ...]


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
    monkeypatch.setattr(backend, "BLOCK_LOGITS", 4 * 170)
    monkeypatch.setattr(backend, "BLOCK", 128)


def arguments(case: Case, draw: int = 0) -> Arguments:
    """Of the op, with entropy, reference and slopes; every fourth token is ignored.

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
    return hidden, head, targets, added, *mixture, tau, True, ref, True, False


def in_dtype(args: Arguments, dtype: torch.dtype) -> Arguments:
    def to(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

    return tuple(map(to, args))


def plain(args: Arguments) -> list[Tensor]:
    """From materialised logits in the dtype of the inputs; slopes by autograd."""
    hidden, head, targets, bias, weights, ids, temperature, _, ref, _, _ = args
    hidden = hidden.detach().requires_grad_()
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
    entropy = -torch.where(p > 0, p * logp.clamp(min=-1e4), 0).sum(-1) * used
    slopes = [torch.autograd.grad(o.sum(), hidden, retain_graph=True)[0] for o in (picked, kl)]
    return [t.detach() for t in (picked, entropy, kl, *slopes)]


def masked_plain(args: Arguments) -> list[Tensor]:
    """plain without the ids whose bias is -inf: autograd makes NaN of -inf - -inf."""
    bias = args[3]
    if bias is None or bool(bias.isfinite().all()):
        return plain(args)
    vocab_size = bias.shape[-1]
    kept = (bias.reshape(-1, vocab_size)[0] > -INF).nonzero()[:, 0]
    place = torch.full((vocab_size,), -100).scatter_(0, kept, torch.arange(len(kept)))
    targets = torch.where(args[2] == -100, -100, place[args[2].clamp(min=0)])
    return plain((args[0], args[1][..., kept, :], targets, bias[..., kept], *args[4:]))


def check(*draws: Arguments) -> None:
    got = [backend.linear_logprob(*args) for args in draws]
    for results in got:
        for i, (name, result) in enumerate(zip(NAMES, results, strict=True)):
            assert result.dtype == (F32 if i < 3 else draws[0][0].dtype), name
            assert result.is_contiguous(), name
    wide = [masked_plain(in_dtype(args, F64)) for args in draws]
    same = [masked_plain(args) for args in draws]
    trios = (map(torch.cat, zip(*runs, strict=True)) for runs in (got, wide, same))
    for name, *three in zip(NAMES, *trios, strict=True):
        assert_within_budget(*three, name=name)


def sampled(count: int) -> list[Case]:
    rng = random.Random(13)
    axes: tuple[tuple[Any, ...], ...] = (
        (F32, F16),
        (3, 4, 9),
        (31, 64, 127, 128, 129, 400, 600),
        (4, 24),
        ("none", "random", "rising", "masked"),
        (False, True),
    )
    cases: list[Case] = []
    while len(cases) < count:
        case = Case(*(rng.choice(axis) for axis in axes))
        if case not in cases:
            cases.append(case)
    return cases


def case_id(case: Case) -> str:
    return "-".join(str(v).removeprefix("torch.") for v in case)


def test_sample_covers_every_value() -> None:
    columns = list(zip(*sampled(30), strict=True))
    assert [len(set(column)) for column in columns] == [2, 3, 7, 2, 4, 2, 1]
    columns = list(zip(*mixed(), strict=True))
    assert [len(set(column)) for column in columns] == [2, 3, 7, 2, 4, 2, 2]


@pytest.mark.parametrize("case", sampled(30), ids=case_id)
def test_within_budget(case: Case) -> None:
    check(arguments(case))


def mixed() -> list[Case]:
    return [case._replace(m=1 + 2 * (i % 2)) for i, case in enumerate(sampled(50)[30:])]


@pytest.mark.parametrize("case", mixed(), ids=case_id)
def test_mixed_head_within_budget(case: Case) -> None:
    """Three draws are judged as one: the largest error of few large logits is chance."""
    check(*(arguments(case, draw) for draw in range(3)))


def small(**changed: Any) -> Arguments:
    return arguments(Case(F32, 5, 400, 24, "random", False)._replace(**changed))


@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_logit_may_come_last_or_first(order: int) -> None:
    """Scaling down by more than float32 holds, and not at all."""
    args = list(small())
    args[3] = order * torch.linspace(-300, 300, 400)
    for target in (399 if order > 0 else 0, 200):
        args[2] = torch.full((5,), target)
        check(tuple(args))


def test_one_id_is_left() -> None:
    args = list(small())
    args[3][:] = -INF
    args[3][390] = 0.0
    args[2] = torch.full((5,), 390)
    logprobs, entropy, kl, slope, kl_slope = backend.linear_logprob(*args)
    assert not logprobs.any() and not kl.any() and entropy.abs().max() < 1e-6
    assert slope.abs().max() < 1e-6 and kl_slope.abs().max() < 1e-6


@pytest.mark.parametrize("vocab_size", [1, 2, 3])
@pytest.mark.parametrize("bias", ["none", "rising", "masked"])
def test_few_ids(vocab_size: int, bias: str) -> None:
    """Outputs of about 0, for which there is no budget: W / t - p W / t is rounded."""
    args = arguments(Case(F32, 5, vocab_size, 4, bias, False))
    wide = masked_plain(in_dtype(args, F64))
    for name, a, b in zip(NAMES, backend.linear_logprob(*args), wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_logits_stay_in_their_row(bad: float) -> None:
    args = small()
    clean = backend.linear_logprob(*args)
    args[0][1] = bad
    args[0][3] = bad  # ignored
    others = [i for i in range(5) if i != 1]
    for name, got, want in zip(NAMES, backend.linear_logprob(*args), clean, strict=True):
        assert torch.equal(got[others], want[others]), name
        assert got[1].isnan().all(), name
    args = small()
    args[3][:] = -INF
    assert backend.linear_logprob(*args)[0][0].isnan()


def test_close_policies_have_an_accurate_slope_of_kl() -> None:
    """The logits of one differ from those of the other by a large constant and by little else."""
    args = list(small(bias="none"))
    hidden, head, ref = args[0].clone(), args[1].clone(), args[8].clone()
    head[:, 0] = 1.0
    ref[:] = hidden + 1e-2 * ref
    ref[:, 0] += 30.0
    args[1], args[8] = head, ref
    check(tuple(args))


def test_nothing_and_no_extras() -> None:
    args = small()
    hidden, head, targets, *_, ref, _, _ = args
    few = (hidden[:0], head, targets[:0], None, None, None, torch.ones(0), True, ref[:0])
    none = backend.linear_logprob(*few, True, False)
    assert [tuple(t.shape) for t in none] == [(0,), (0,), (0,), (0, 24), (0, 24)]
    full = backend.linear_logprob(*args)
    for entropy, with_ref, slopes in itertools.product((False, True), repeat=3):
        other = ref if with_ref else None
        got = backend.linear_logprob(*args[:7], entropy, other, slopes, False)
        wanted = (True, entropy, with_ref, slopes, slopes and with_ref)
        for there, part, complete in zip(wanted, got, full, strict=True):
            assert torch.equal(part, complete) if there else part.shape == (0,)
            assert part.dtype == complete.dtype


def test_large_weights_do_not_overflow_float16() -> None:
    """The products are scaled, not the states: 200 times a state of 400 is no float16."""
    args = list(small(dtype=F16, m=2, bias="none"))
    args[0] = 100 * args[0]
    args[1] = args[1] / 100
    args[4] = torch.tensor([[200.0, -199.0]]).expand(3, 2)
    for t in backend.linear_logprob(*args):
        assert t.isfinite().all()


@pytest.mark.parametrize("m", [0, 3])
def test_two_runs_give_the_same_bits(m: int) -> None:
    args = small(m=m)
    for a, b in zip(*(backend.linear_logprob(*args) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_blocks_begin_at_whole_tiles_where_they_can() -> None:
    steps = {tokens: backend._ids_of_a_block(tokens) for tokens in (1, 5, 6, 680, 681)}
    assert steps == {1: 640, 5: 128, 6: 113, 680: 1, 681: 1}


class Witness:
    """Stands for a kernel: notes the variant that a launch would compile, and runs the kernel."""

    def __init__(self, kernel: Any, seen: set[Any]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            kinds = {**backend.KINDS, torch.int64: "*i64", F64: "*fp64"}
            options = {k: v for k, v in arguments.items() if k in backend.OPTIONS}
            types, constexprs = dict[str, str](), dict[str, Any]()
            for name, value in arguments.items():
                if isinstance(value, Tensor):
                    types[name] = kinds[value.dtype]
                elif value is None or name.isupper():
                    constexprs[name] = value
            self.seen.add(variant_key(types, constexprs, options))
            self.kernel[grid](**arguments)

        return launch


def variant_key(*parts: dict[str, Any]) -> Any:
    return tuple(frozenset(part.items()) for part in parts)


def test_every_launch_is_a_listed_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, seen = backend.variants((8, 0)), set[Any]()
    assert len({name for name, *_ in listed}) == len(listed)
    monkeypatch.setattr(backend, "block_kernel", Witness(backend.block_kernel, seen))
    flags = itertools.product((F32, F16, BF16), ("none", "random"), *[(False, True)] * 2, (0, 2))
    for dtype, bias, with_ref, slopes, m in flags:
        args = arguments(Case(dtype, 2, 8, 4, bias, False, m))
        backend.linear_logprob(*args[:8], args[8] if with_ref else None, slopes, False)
    assert seen == {
        variant_key(
            {name: kind for name, kind in signature.items() if kind.startswith("*")},
            constexprs,
            options,
        )
        for _, _, signature, constexprs, options in listed
    }


def test_who_runs_it() -> None:
    args = small(m=2)
    assert backend.why_not(*args) is None
    assert "batch_invariant" in str(backend.why_not(*args[:10], True))
    assert "float64" in str(backend.why_not(*in_dtype(args, F64)))


def test_bfloat16_is_close() -> None:
    """The interpreter truncates where a GPU rounds, so no budget: the probabilities' dtype shows
    in the slopes alone."""
    args = small(dtype=BF16)
    got, want = backend.linear_logprob(*args), reference.linear_logprob(*in_dtype(args, F64))
    for i, (name, a, b) in enumerate(zip(NAMES, got, want, strict=True)):
        near = 2e-6 if i < 3 else 2**-6
        torch.testing.assert_close(a.double(), b, rtol=near, atol=near, msg=name)
