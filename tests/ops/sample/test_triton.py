"""The Triton kernels of sample in Triton's interpreter, held to the reference."""

import itertools
from typing import Any, NamedTuple

import cases
import pairwise
import pytest
import torch
from cases import BF16, F16, F32, GOOD_ROWS, INF, MODES, NAN, Draw
from launches import INTERPRETER, Witness, listed_keys, replace_kernels
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from clp_kernels import testing
from clp_kernels.ops.mix_logits import triton as mixing
from clp_kernels.ops.mix_logits import triton_kernels as mix_kernels
from clp_kernels.ops.sample import reference
from clp_kernels.ops.sample import triton as backend
from clp_kernels.ops.sample import triton_kernels as kernels
from clp_kernels.ops.sample.reference import Inputs

pytestmark = INTERPRETER
DTYPES = (F32, F16, BF16)


class Case(NamedTuple):
    dtype: torch.dtype
    mode: str
    m: int
    batch: int
    vocab_size: int
    kind: str
    filters: str
    temperature: float
    logits: str


# Three rows share a call, so each filter comes with three settings; the off ones among them.
TOP_K, TOP_P, MIN_P = (3, 0, 40), (0.6, 0.95, 1.0), (0.0, 0.3, 0.05)


def arguments(case: Case) -> Draw:
    g = torch.Generator().manual_seed(hash((*case[2:5], case.temperature)) % 2**31)
    shape = (case.m, case.batch, case.vocab_size)
    logits = 2 * torch.randn(shape, generator=g)
    if case.logits == "ties":
        logits = logits.round()
    elif case.logits == "masked":
        logits = logits.masked_fill(torch.rand(shape, generator=g) < 0.3, -INF)
        logits[:, :, -1] = 0.5
    elif case.logits == "gaps":
        logits = testing.noncontiguous(logits)
    elif case.logits == "sliced":
        logits = torch.nn.functional.pad(logits, (1, 2), value=NAN)[..., 1:-2]
    logits = logits.to(case.dtype)
    weights = None
    if case.kind != "none":
        weights = testing.weight_rows(case.kind, case.batch, case.m, generator=g)
        if case.mode == "probability":
            weights = weights.abs() + (weights.sum(-1, keepdim=True) == 0)
    given = {name: name in case.filters for name in ("top_k", "top_p", "min_p")}

    def rows(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        shift = case.vocab_size + case.m
        return torch.tensor([values[(b + shift) % 3] for b in range(case.batch)], dtype=dtype)

    return {
        "logits": logits,
        "weights": weights,
        "mode": case.mode,
        "temperature": torch.full((case.batch,), case.temperature, dtype=torch.float64),
        "top_k": rows(TOP_K, torch.int64) if given["top_k"] else None,
        "top_p": rows(TOP_P, torch.float64) if given["top_p"] else None,
        "min_p": rows(MIN_P, torch.float64) if given["min_p"] else None,
        "seed": torch.randint(-(2**63), 2**63 - 1, (case.batch,), generator=g),
        "position": torch.randint(0, 2**40, (case.batch,), generator=g),
    }


def sampled(count: int) -> list[Case]:
    axes = (
        DTYPES,
        ("geometric", "geometric", "probability"),
        (1, 2, 3, 5),
        (0, 1, 3),
        (1, 2, 7, 31, 64, 513, 3000),
        ("none", *testing.WEIGHT_KINDS),
        ("", "", "min_p", "top_k", "top_p", "top_k min_p", "top_k top_p", "top_k top_p min_p"),
        (0.0, 0.3, 1.0, 3.0),
        ("plain", "ties", "masked", "gaps", "sliced"),
    )

    def allowed(case: Case) -> bool:
        # The interpreter takes its time by the number of programs: eight a row and threshold.
        large = case.batch * max(case.vocab_size / 1000, 1) * case.filters.count("top") > 3
        return not large and (case.kind == "none") == (case.m == 1)

    return cases.sampled(Case, axes, count, 11, allowed)


def cost(case: Case) -> float:
    """The interpreter's time, roughly: programs, beside what every call takes."""
    return 2 + case.batch * max(case.vocab_size / 1000, 1) * (1 + 8 * case.filters.count("top"))


DRAWN = sampled(600)
COVERING = pairwise.covering(DRAWN, Case._fields, cost)


def assert_equals_reference(args: Draw) -> None:
    cases.assert_close_draws(backend.sample(Inputs(**args)), reference.sample(Inputs(**args)))


def test_sample_covers_every_value() -> None:
    pairwise.check_covers(COVERING, DRAWN, Case._fields)
    columns = list(zip(*COVERING, strict=True))
    assert [len(set(column)) for column in columns] == [3, 2, 4, 3, 7, 8, 7, 4, 5]


@pytest.mark.parametrize("case", COVERING, ids=cases.case_id)
def test_equals_reference(case: Case) -> None:
    assert_equals_reference(arguments(case))


def call(logits: Tensor, **changes: Any) -> Draw:
    """Draw of a call on logits [B, V] without weights, temperature 1, no filters."""
    batch = logits.shape[0]
    return {
        "logits": logits[None],
        "weights": None,
        "mode": "geometric",
        "temperature": torch.ones(batch, dtype=torch.float64),
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "seed": torch.arange(batch) - 5,
        "position": torch.arange(batch) + 2**33,
        **changes,
    }


@triton.jit
def words_kernel(seed_ptr, position_ptr, out_ptr, BLOCK: tl.constexpr):
    """The noise that `partials_kernel` adds, of the second slice."""
    noise = kernels.gumbel(kernels.philox_words(tl.load(seed_ptr), tl.load(position_ptr), 1, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), noise)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("position", [0, 2**32 - 1, 2**32, 2**62 + 12345])
def test_noise_is_the_references(seed: int, position: int) -> None:
    """Two uniforms that differ in the last bit differ by more than this in their noise."""
    seeds, positions = torch.tensor([seed]), torch.tensor([position])
    out = torch.empty(1024, dtype=torch.float64)
    words_kernel[(1,)](seeds, positions, out, BLOCK=1024)
    uniform = reference.philox_uniform(seeds, positions, 2048)[0, 1024:]
    # Undone: exp(-exp(-g)) is u, to an error far below 2^-32.
    words = ((-(-out).exp()).exp() * 2**32 - 0.5).round()
    assert torch.equal(words, uniform * 2**32 - 0.5)
    torch.testing.assert_close(out, reference.gumbel(uniform), rtol=1e-14, atol=1e-14)


def test_order_key_orders_float32() -> None:
    values = torch.cat([torch.randn(200), 10 ** (80 * torch.rand(100) - 42), torch.tensor([0.0])])
    values = torch.cat([values, -values, torch.tensor([-INF, INF, -3e38, 3e38])]).sort().values
    keys = cases.order_key(values)
    assert torch.equal(keys[1:] > keys[:-1], values[1:] > values[:-1])
    assert keys[0] >= 0 and keys[-1] < 2**32


@pytest.mark.parametrize("temperature", [0.3, 3.0])
@pytest.mark.parametrize("ties", [False, True])
def test_kept_sets_are_exactly_the_references(ties: bool, temperature: float) -> None:
    cases.check_kept_sets(backend, 700, ties, temperature, "cpu", alone=True)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, 4),
        ({"top_k": 5}, 6),
        ({"top_k": 100}, 8),
        ({"top_p": 0.3}, 1),
        ({"top_p": 0.42}, 4),
        ({"top_p": 1.0}, 8),
        # Of what top-k leaves, the first holds 0.4754.
        ({"top_k": 2, "top_p": 0.475}, 1),
        ({"top_k": 2, "top_p": 0.476}, 4),
    ],
    ids=str,
)
def test_ties_at_a_threshold_are_kept(filters: dict[str, float], kept: int) -> None:
    """Both zeros tie."""
    z = torch.tensor([[1.0, 0.0, -0.0, 0.0, -1.0, -1.0, -2.0, -INF]])
    row = backend.Rows(z[None], None, torch.ones(1))
    rows = torch.empty(2, 1, dtype=torch.float64)
    row.combine(row.partials(None), rows, None)
    least = None
    for name, value in filters.items():
        dtype = torch.int64 if name == "top_k" else torch.float32
        least = row.threshold(rows, least, **{name: torch.tensor([value], dtype=dtype)})
    assert (cases.order_key(z) >= least).sum() == kept


@pytest.mark.parametrize("filters", [{"top_p": 0.0}, {"top_p": NAN}, {"min_p": 1.0}], ids=str)
def test_the_most_probable_id_is_always_kept(filters: dict[str, float]) -> None:
    z = torch.tensor([[-3.0, 2.0, 1.5, -INF]])
    args = call(z, **{name: torch.tensor([value]) for name, value in filters.items()})
    tokens, logprobs, filtered = backend.sample(Inputs(**args))
    assert (tokens.item(), filtered.item()) == (1, 0.0)
    torch.testing.assert_close(logprobs[0], z.log_softmax(-1)[0, 1])


def test_two_filters_over_several_slices_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """9,001 ids: nine slices, and three programs of up to eight tiles for each digit."""
    # Partials in several portions, as in the largest vocabularies.
    monkeypatch.setattr(backend, "COMBINE_BLOCK", 4)
    monkeypatch.setattr(kernels, "CHUNK", tl.constexpr(2))
    args = call(
        torch.randn(2, 9001).mul(2).round(decimals=1),
        top_k=torch.tensor([500, 0]),
        top_p=torch.tensor([0.7, 0.9]),
        min_p=torch.tensor([0.0, 0.001]),
    )
    assert_equals_reference(args)


@pytest.mark.parametrize("filtered", [False, True])
def test_rows_and_runs_have_the_same_bits(filtered: bool) -> None:
    args = arguments(
        Case(torch.float32, "geometric", 3, 4, 1100, "all_different", "", 1.0, "plain")
    )
    if filtered:
        args["top_p"] = torch.tensor([0.5, 0.9, 1.0, 0.2])
    cases.check_row_bits(lambda args: backend.sample(Inputs(**args)), args, [[0], [3, 1]])


@pytest.mark.parametrize("filtered", [False, True])
def test_bad_rows(filtered: bool) -> None:
    args = cases.bad_draws(1500, filters="top_p" if filtered else "")
    args["temperature"] = torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0, 0.0])
    assert (backend.sample(Inputs(**args))[0] >= 0).tolist() == GOOD_ROWS[:6]
    assert_equals_reference(args)


@pytest.mark.parametrize("temperature", [-1.0, NAN, INF])
def test_a_bad_temperature_is_a_bad_row(temperature: float) -> None:
    tokens, *logprobs = backend.sample(
        Inputs(**call(torch.randn(1, 7), temperature=torch.tensor([temperature])))
    )
    assert tokens.tolist() == [-1]
    assert all(t.isnan().all() for t in logprobs)


@pytest.mark.parametrize("scale", [1e4, 1e17, 3e38])
def test_huge_logits(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the noise is lost in the sum, the lowest of the largest ids wins."""
    # One slice at a time, as where there are more than COMBINE_BLOCK.
    monkeypatch.setattr(backend, "COMBINE_BLOCK", 1)
    args = cases.huge_draws(scale, 1100)
    assert_equals_reference(args)
    assert_equals_reference({**args, "top_p": torch.tensor([0.5, 0.5, 0.5, 1.0])})


def test_weights_of_zero_and_infinities() -> None:
    assert_equals_reference(cases.infinite_draws())


def test_no_rows() -> None:
    got = backend.sample(Inputs(**call(torch.empty(0, 5), top_k=torch.empty(0, dtype=torch.int64))))
    assert [(t.shape, t.dtype) for t in got] == [
        ((0,), torch.int64),
        ((0,), torch.float32),
        ((0,), torch.float32),
    ]


def test_every_launch_is_a_listed_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    known, mixed = (listed_keys(module.variants((8, 0))) for module in (backend, mixing))
    seen = set[Any]()
    for module in (kernels, mix_kernels):
        replace_kernels(monkeypatch, module, lambda _, kernel: Witness(kernel, seen))
    filters = {
        "top_k": torch.ones(2, dtype=torch.int64), "top_p": torch.ones(2).double(),
        "min_p": torch.ones(2).double(),
    }  # fmt: skip
    names = [set(c) for n in range(4) for c in itertools.combinations(filters, n)]
    for dtype, mode, chosen in itertools.product(DTYPES, MODES, names):
        logits = torch.randn(2, 2, 40).to(dtype)
        args = call(logits[0], mode=mode, **{k: v for k, v in filters.items() if k in chosen})
        backend.sample(Inputs(**args))
        backend.sample(Inputs(**{**args, "logits": logits, "weights": torch.rand(2, 2)}))
    assert known <= seen, known - seen
    assert seen - known <= mixed, seen - known - mixed


def test_why_not() -> None:
    logits = torch.randn(2, 3)
    assert backend.why_not(Inputs(**call(logits))) is None
    assert "float64" in str(backend.why_not(Inputs(**call(logits.double()))))
