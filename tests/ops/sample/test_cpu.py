"""`sample` in C++ against the reference, on every instruction set this machine has."""

from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import numpy as np
import pytest
import torch
from cases import BF16, CPU_KERNELS, DTYPES, F32, FINITE_ROWS, GOOD_ROWS, INF, ISAS, NAN, Draw
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import clp_kernels
from clp_kernels import mix_logits, native, registry
from clp_kernels.ops.sample import cpu as cpu_sample
from clp_kernels.ops.sample import reference
from clp_kernels.ops.sample.reference import Inputs

pytestmark = CPU_KERNELS


def draw(args: Draw, isa: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Without filters the two log-probabilities are equal, but for greedy rows."""
    tokens, logprobs, filtered = cpu_sample.sample(Inputs(**args), isa=isa)
    if args["top_k"] is args["top_p"] is args["min_p"] is None:
        greedy = (args["temperature"] == 0) & (tokens >= 0)
        assert torch.equal(filtered.nan_to_num(7), logprobs.masked_fill(greedy, 0.0).nan_to_num(7))
    return tokens, logprobs, filtered


def assert_equals_reference(args: Draw, atol: float = 1e-6, rtol: float = 1e-6) -> None:
    """The reference's tokens, and the same bits on every instruction set.

    atol, rtol: of filtered_logprobs; logprobs are held to 1e-6.
    """
    wanted, first = reference.sample(Inputs(**args)), draw(args, ISAS[0])
    cases.assert_close_draws((*first[:2], wanted[2]), wanted, atol=1e-6)
    cases.assert_close_draws(first, wanted, atol, rtol)
    for isa in ISAS[1:]:
        assert all(map(cases.same_bits, draw(args, isa), first)), isa


@pytest.mark.parametrize(("counter", "key"), cases.PHILOX_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    found = native.cpu().philox(list(counter), list(key))
    assert " ".join(f"{word:08x}" for word in found) == cases.PHILOX_ANSWERS[counter, key]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 0x243F6A8885A308D3])
@pytest.mark.parametrize("position", [0, 7, 2**32 - 1, 2**32, 2**63 - 1])
def test_uniform_bits(isa: str, seed: int, position: int) -> None:
    out = np.empty(1003)
    native.cpu().uniform(seed, position, len(out), out.ctypes.data, isa)
    wanted = reference.philox_uniform(torch.tensor([seed]), torch.tensor([position]), len(out))
    assert out.tobytes() == wanted.numpy().tobytes()
    assert 0 < out.min() < out.max() < 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "low", "high", "exact"),
    [("exp2", -126, 0, np.exp2), ("exponential", -87.3, 88, np.exp)],
)
def test_error_of_exponentials(
    isa: str, name: str, low: float, high: float, exact: Callable[..., Any]
) -> None:
    """What csrc/cpu/simd.h says of them: 1.2 ulp."""
    x = np.linspace(low, high, 500_003, dtype=np.float32)
    out = np.empty_like(x)
    getattr(native.cpu(), name)(x.ctypes.data, len(x), out.ctypes.data, isa)
    wanted = exact(x.astype(np.float64))
    ulp = np.spacing(wanted.astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(out - wanted) / ulp) < 1.25


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 7, 31, 64, 257, 1000, 4099])
def test_sample_equals_reference(vocab_size: int, dtype: torch.dtype) -> None:
    for m in range(1, 6):
        for batch in (0, 1, 2, 4, 9):
            assert_equals_reference(cases.draw_inputs(m, batch, vocab_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_large_vocabulary(dtype: torch.dtype) -> None:
    assert_equals_reference(cases.draw_inputs(4, 4, 151_936, dtype))


@given(
    m=st.integers(1, 9),
    batch=st.integers(0, 6),
    vocab_size=st.integers(1, 9000),
    dtype=st.sampled_from(DTYPES),
    masked=st.floats(0, 1),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**32),
)
def test_sample_property(
    m: int, batch: int, vocab_size: int, dtype: torch.dtype, masked: float, spread: float, seed: int
) -> None:
    """Any shape, any share of -inf, flat and steep rows, some weights zero."""
    torch.manual_seed(seed)
    args = cases.draw_inputs(m, batch, vocab_size, dtype)
    hidden = torch.rand(batch, vocab_size) < masked
    args["logits"] = (args["logits"] * spread).masked_fill(hidden, -INF)
    if m > 1:
        args["weights"] *= torch.rand(batch, m) < 0.7
    assert_equals_reference(args)


def wide(args: Draw) -> tuple[Tensor, ...]:
    """The reference from logits in float64: its own float32 rounding of z is about 1e-6."""
    return reference.sample(Inputs(**{**args, "logits": args["logits"].double()}))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab_size", [1, 31, 4099, 20_000])
def test_probability_mode(isa: str, vocab_size: int) -> None:
    for m in (1, 2, 5):
        args = cases.draw_inputs(m, 8, vocab_size, mode="probability")
        args["weights"] = torch.rand(8, m) * (torch.rand(8, m) < 0.8)
        args["weights"][:, 0] += 0.1
        args["logits"][:, :, vocab_size // 2 :][..., 1:] = -INF
        cases.assert_close_draws(draw(args, isa), wide(args), atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_probability_mode_far_apart(isa: str) -> None:
    """Probabilities below float32's range keep their logarithm, large logits their differences."""
    args = cases.draw_inputs(2, 1, 3, mode="probability")
    args["logits"] = torch.tensor([[[1000.0, 800.0, 799.0]], [[-500.0, -900.0, -900.5]]])
    args["weights"][:], args["temperature"][:] = 0.5, 40.0
    cases.assert_close_draws(draw(args, isa), wide(args), atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_probability_mode_keeps_close_logits_apart(isa: str) -> None:
    """A normaliser of log(100,000) = 11.5 must not round away a difference of one ulp at 1."""
    args = cases.draw_inputs(1, 1, 100_000, mode="probability")
    args["logits"][:], args["weights"], args["temperature"][:] = 0.0, torch.ones(1, 1), 0.0
    args["logits"][..., 7], args["logits"][..., 9] = 1.0, 1.0 + 2.0**-23
    assert draw(args, isa)[0].item() == 9


@pytest.mark.parametrize("scale", [1e4, 1e9, 1e17, 3e38])
def test_huge_logits(scale: float) -> None:
    assert_equals_reference(cases.huge_draws(scale))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("margin", "wins"), [(1e-3, 510), (-1e-3, 0)])
def test_largest_noise_is_not_pruned(isa: str, margin: float, wins: int) -> None:
    args = cases.largest_noise_draw(margin)
    assert reference.sample(Inputs(**args))[0].item() == wins
    assert draw(args, isa)[0].item() == wins
    # With a filter that keeps them all, because they tie.
    args["top_k"] = torch.tensor([400])
    assert draw(args, isa)[0].item() == wins


@pytest.mark.parametrize("mode", ["geometric", "probability"])
@pytest.mark.parametrize("isa", ISAS)
def test_bad_rows(isa: str, mode: str) -> None:
    args = cases.bad_draws(9000, batch=7, mode=mode)
    args["logits"][0, 5, 4096:] = -INF
    args["logits"][0, 5, 8999] = NAN  # the only entry of its slice that is not -inf
    for temperature in (1.0, 0.0):
        args["temperature"][:] = temperature
        tokens, logprobs, _ = draw(args, isa)
        assert (tokens >= 0).tolist() == [*GOOD_ROWS[:5], False, True]
        assert torch.equal(logprobs.isnan(), tokens < 0)
        assert tokens[3] >= 8990
        assert torch.equal(tokens, reference.sample(Inputs(**args))[0])


def test_weights_and_infinities() -> None:
    args = cases.infinite_draws()
    assert (reference.sample(Inputs(**args))[0] >= 0).tolist() == FINITE_ROWS
    assert_equals_reference(args)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ties_take_the_lowest_index(isa: str, temperature: float) -> None:
    args = cases.draw_inputs(2, 1, 9000, BF16)
    args["logits"][:, :, [8100, 4097, 8999]] = 100.0
    args["weights"][:], args["temperature"][:] = 1.0, temperature
    tokens = reference.sample(Inputs(**args))[0]
    assert torch.equal(draw(args, isa)[0], tokens)
    assert temperature > 0 or tokens.item() == 4097


@pytest.mark.parametrize("mode", ["geometric", "probability"])
@pytest.mark.parametrize("isa", ISAS)
def test_row_bits_are_its_own(isa: str, mode: str, set_threads: Callable[[int], None]) -> None:
    """Neither the batch, nor the threads, nor padding between rows changes a row."""
    args = cases.draw_inputs(3, 5, 20_011, mode=mode)
    set_threads(1)
    whole = draw(args, isa)
    for threads in (2, 3, 7):
        set_threads(threads)
        assert all(map(torch.equal, draw(args, isa), whole))
    orders = [torch.tensor([4, 0, 3]), slice(2, 3)]
    cases.check_row_bits(partial(draw, isa=isa), args, orders)


def test_layouts_that_are_copied() -> None:
    """A last axis that is not contiguous, and expanded or strided rows."""
    args = cases.draw_inputs(2, 3, 50)
    wanted = reference.sample(Inputs(**args))
    args["logits"] = args["logits"].transpose(1, 2).contiguous().transpose(1, 2)
    args["weights"] = args["weights"].t().contiguous().t()
    args["seed"] = torch.stack([args["seed"], args["seed"]], 1)[:, 0]
    cases.assert_close_draws(draw(args), wanted, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["geometric", "probability"])
def test_draws_follow_the_softmax(isa: str, mode: str) -> None:
    """Chi-square of 40,000 draws over positions and over seeds."""
    count, weights = 40_000, torch.tensor([[0.3, 0.7]])
    one = 1.5 * torch.randn(2, 1, 130)
    z = mix_logits(one.double(), weights.double(), mode=mode)[0]
    probabilities = torch.softmax(z / 0.8, -1).numpy()
    counter, args = torch.arange(count), cases.draw_inputs(2, count, 1, mode=mode)
    args |= {"logits": one.expand(2, count, 130), "weights": weights.expand(count, 2)}
    args["temperature"][:] = 0.8
    for seed, position in ((torch.full((count,), 3), counter), (counter, torch.full((count,), 9))):
        tokens = draw({**args, "seed": seed, "position": position}, isa)[0]
        seen = np.bincount(tokens.numpy(), minlength=130)
        assert stats.chisquare(seen, probabilities * count).pvalue > 1e-3


def filtered(m: int, batch: int, vocab_size: int, kind: str, dtype: torch.dtype) -> Draw:
    """Arguments of a draw with random filters, some of them off, some rows greedy."""
    logits = 3 * torch.randn(m, batch, vocab_size)
    if kind == "ties":
        logits = logits.round()
    if kind == "masked":
        logits[..., torch.rand(vocab_size) < 0.6] = -INF
        logits[..., vocab_size // 2] = 1.0
    if kind == "flat":
        logits *= 0.01
    if kind == "far":  # most of it beyond the last bin of the histogram
        logits *= 100
    if kind == "edges":  # between two of its bins at temperature 1, where it rounds
        logits = (8 * logits).floor() / 16 + 1 / 32
    off = torch.rand(3, batch) < 0.25
    top_k = torch.randint(1, vocab_size + 3, (batch,))
    top_k = torch.where(torch.rand(batch) < 0.7, top_k.clamp(max=40), top_k)
    top_p, min_p = torch.rand(batch).clamp(min=1e-4), torch.rand(batch) ** 3
    filters = {
        "top_k": top_k.masked_fill(off[0], 0),
        "top_p": top_p.masked_fill(off[1], 1.0),
        "min_p": min_p.masked_fill(off[2], 0.0),
    }
    given = dict(zip(filters, (torch.rand(3) < 0.7).tolist(), strict=True))
    return {
        "logits": logits.to(dtype),
        "weights": None if m == 1 else torch.randn(batch, m),
        "mode": "geometric",
        "temperature": torch.tensor([0.7, 1.0, 0.0, 3.0]).repeat(batch)[:batch],
        **{name: values if given[name] else None for name, values in filters.items()},
        "seed": torch.randint(-(2**63), 2**63 - 1, (batch,)),
        "position": torch.randint(2**40, (batch,)),
    }


KINDS = ("spread", "ties", "masked", "flat", "far", "edges")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 64, 65, 1000, 4096, 4097, 13_001])
def test_filters(vocab_size: int, kind: str) -> None:
    torch.manual_seed(vocab_size)
    for m in (1, 2, 5):
        for dtype in DTYPES:
            args = filtered(m, 5, vocab_size, kind, dtype)
            assert_equals_reference(args, atol=2e-6, rtol=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 700), st.sampled_from(KINDS))
def test_filters_of_drawn_sizes(seed: int, vocab_size: int, kind: str) -> None:
    torch.manual_seed(seed)
    args = filtered(1 + seed % 3, 1 + seed % 4, vocab_size, kind, F32)
    assert_equals_reference(args, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_filters_at_a_large_vocabulary(isa: str) -> None:
    """Few and many ids kept, so both ways of drawing; the reference's tokens from its uniforms."""
    torch.manual_seed(5)
    logits = torch.randn(1, 6, 151_936) * torch.tensor([1.0, 2.0, 4.0])[:, None].repeat(2, 1)
    args = cases.draw_inputs(1, 6, 1) | {
        "logits": logits,
        "temperature": torch.ones(6),
        "top_k": torch.tensor([0, 0, 0, 100_000, 7, 5000]),
        "top_p": torch.tensor([0.95, 0.95, 0.3, 1.0, 0.9, 0.5]),
        "seed": torch.arange(6),
        "position": torch.arange(6) + 2**33,
    }
    cases.assert_close_draws(
        draw(args, isa), reference.sample(Inputs(**args)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["none", "top_k", "top_p", "min_p", "all"])
def test_a_million_filtered_draws(name: str) -> None:
    """Chi-square against the definition over 10^6 draws, and exactly its support."""
    logits = torch.tensor([2.0, 1.5, 1.5, 1.0, 0.7, 0.2, -0.1, -0.5, -1.0, -1.5])[None, None]
    one = {"top_k": torch.tensor([7]), "top_p": torch.tensor([0.8]), "min_p": torch.tensor([0.15])}
    chosen = [one[key] if name in (key, "all") else None for key in one]
    draws = 10**6
    args = cases.draw_inputs(1, draws, 1) | {
        "logits": logits.expand(1, draws, -1),
        "temperature": torch.tensor([0.9]).expand(draws),
        **{key: t if t is None else t.expand(draws) for key, t in zip(one, chosen, strict=True)},
        "seed": torch.zeros(draws, dtype=torch.int64),
        "position": torch.arange(draws),
    }
    counts = torch.bincount(cpu_sample.sample(Inputs(**args))[0], minlength=10)
    scaled = logits[0].double() / torch.tensor([0.9]).double()
    logp = torch.log_softmax(scaled, -1)
    kept = torch.ones_like(logp, dtype=torch.bool)
    if chosen[0] is not None:
        kept &= reference.top_k_mask(logp, chosen[0])
    if chosen[1] is not None:
        kept &= reference.top_p_mask(logp.masked_fill(~kept, -INF), chosen[1])
    if chosen[2] is not None:
        kept &= logp >= logp.amax() + chosen[2].double().log()
    assert torch.equal(counts > 0, kept[0])
    p = torch.softmax(logp.masked_fill(~kept, -INF), -1)[0]
    wanted = p[kept[0]].numpy() * 10**6
    assert stats.chisquare(counts[kept[0]].numpy(), wanted).pvalue > 1e-4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["geometric", "probability"])
def test_filtered_row_bits_are_its_own(
    isa: str, mode: str, set_threads: Callable[[int], None]
) -> None:
    torch.manual_seed(1)
    args = filtered(3, 7, 20_011, "spread", F32)
    args |= {"weights": args["weights"].abs(), "mode": mode}
    set_threads(1)
    whole = draw(args, isa)
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        for rows in (list(range(7)), [4, 0, 3], [6], [5, 1]):
            for again, all_rows in zip(draw(cases.draw_rows(args, rows), isa), whole, strict=True):
                assert torch.equal(again, all_rows[rows])


@pytest.mark.parametrize("isa", ISAS)
def test_bad_rows_with_filters(isa: str) -> None:
    args = cases.bad_draws(9000)
    args["logits"][0, 3, 1:], args["logits"][0, 3, 0] = -INF, 1.0
    args["logits"][0, 4, :-1] = 1.0
    args["temperature"][:], args["top_k"] = 1.0, torch.full((6,), 3)
    tokens, logprobs, filtered_logprobs = draw(args, isa)
    assert (tokens >= 0).tolist() == GOOD_ROWS[:6]
    assert tokens[3] == 0 and logprobs[3] == 0 and filtered_logprobs[3] == 0
    for values in (logprobs, filtered_logprobs):
        assert torch.equal(values.isnan(), tokens < 0)


def test_an_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="isa must be one of"):
        draw(cases.draw_inputs(2, 3, 5), "mmx")


# The fast path: it takes plain inputs, and returns None for all others.


def quick(**changed: Any) -> tuple[Tensor, ...] | None:
    """cpu_sample.fast_path on plain inputs of three rows, some changed."""
    return cases.taken(cpu_sample, quick_arguments(**changed))


def quick_arguments(**changed: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    arguments: dict[str, Any] = {
        "logits": torch.randn(2, 3, 50, generator=g),
        "weights": torch.rand(3, 2, generator=g),
        "mode": "geometric",
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.01,
        "seed": 5,
        "position": torch.tensor([1, 2, 3]),
        "backend": "auto",
    }
    return cases.changed(arguments, changed)


OFF = {"top_k": 0, "top_p": 1, "min_p": 0.0}
TAKEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "named": {"backend": "cpu"},
    "no filters": OFF,
    "each filter off": {name: OFF[name] for name in ("top_k", "min_p")},
    "one policy": {"logits": lambda t: t[0], "weights": None},
    "one weight": {"logits": lambda t: t[:1], "weights": torch.full((3, 1), 2.0)},
    "a mixture": {"mode": "probability"},
    "negative weights": {"weights": lambda t: -t},
    "greedy": {"temperature": 0},
    "rows": {
        "temperature": torch.tensor([0.0, 1.0, 2.0]),
        "top_k": torch.tensor([0, 3, 60]),
        "top_p": torch.tensor([1.0, 0.5, 0.1]),
        "min_p": torch.tensor([0.0, 0.2, 1.0]),
        "seed": torch.tensor([-(2**63), 0, 2**63 - 1]),
    },
    "rows in float64": {
        "temperature": torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64),
        "top_p": torch.tensor([1.0, 0.8, 0.1], dtype=torch.float64),
        "min_p": torch.tensor([0.0, 0.2, 1e-300], dtype=torch.float64),
    },
    "a temperature beyond float32": {"temperature": 1e39},
    "bfloat16": {"logits": lambda t: t.bfloat16()},
    "float16": {"logits": lambda t: t.half()},
    "a gradient": {"logits": lambda t: t.requires_grad_()},
}
REFUSED: dict[str, dict[str, Any]] = {
    "another backend": {"backend": "reference"},
    "an unknown backend": {"backend": 3},
    "an unknown mode": {"mode": "arithmetic"},
    "no mode": {"mode": None},
    "strides": {"logits": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)},
    "strides of weights": {"weights": torch.ones(1, 2).expand(3, 2)},
    "float64": {"logits": lambda t: t.double()},
    "weights in float64": {"weights": lambda t: t.double()},
    "no weights": {"weights": None},
    "weights for one policy": {"logits": lambda t: t[0]},
    "too few weight rows": {"weights": lambda t: t[:2]},
    "no rows": {"logits": lambda t: t[:, :0], "weights": lambda t: t[:0]},
    "no ids": {"logits": lambda t: t[..., :0]},
    "a list": {"logits": lambda t: t.tolist()},
    "meta": {"logits": lambda t: t.to("meta")},
    "NaN weights": {"weights": torch.full((3, 2), NAN)},
    "negative weights of a mixture": {"weights": lambda t: -t, "mode": "probability"},
    "a boolean": {"top_k": True},
    "a temperature below 0": {"temperature": -0.1},
    "no temperature": {"temperature": None},
    "an infinite temperature": {"temperature": torch.tensor([1.0, INF, 1.0])},
    "top_k below 0": {"top_k": -1},
    "a broken top_k": {"top_k": 2.0},
    "top_k of 32 bits": {"top_k": torch.ones(3, dtype=torch.int32)},
    "top_p of 0": {"top_p": 0.0},
    "top_p above 1": {"top_p": torch.tensor([0.5, 0.5, 1.5])},
    "min_p above 1": {"min_p": 1.1},
    "a seed beyond 64 bits": {"seed": 2**63},
    "positions of another shape": {"position": torch.tensor([1, 2])},
    "a bad row": {"logits": lambda t: t.index_fill(1, torch.tensor([1]), NAN)},
}


@pytest.mark.parametrize("case", TAKEN)
def test_fast_path_gives_what_the_checked_call_gives(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = quick_arguments(**TAKEN[case])
    drawn = quick(**TAKEN[case])
    assert drawn is not None
    checked_call = registry.Backend("cpu", cpu_sample.sample, cpu_sample.why_not)
    monkeypatch.setitem(registry.BACKENDS, "sample", (checked_call,))
    wanted = clp_kernels.sample(arguments.pop("logits"), **arguments)
    for a, b in zip(drawn, wanted, strict=True):
        assert a.dtype == b.dtype and not a.requires_grad
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", REFUSED)
def test_fast_path_refuses(case: str) -> None:
    assert quick(**REFUSED[case]) is None


def test_fast_path_leaves_calls_under_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.check_modes(cpu_sample, quick_arguments, monkeypatch)


def test_fast_path_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function tries it before all else, with its arguments in this order."""
    arguments = quick_arguments()
    logits = arguments.pop("logits")
    wanted = clp_kernels.sample(logits, **arguments)
    seen: list[tuple[Any, ...]] = []

    def watch(*given: Any) -> tuple[Tensor, ...] | None:
        seen.append(given)
        return quick()

    row = registry.Backend("cpu", cpu_sample.sample, cpu_sample.why_not, lambda: watch)
    monkeypatch.setitem(registry.BACKENDS, "sample", (row,))
    for a, b in zip(clp_kernels.sample(logits, **arguments), wanted, strict=True):
        assert torch.equal(a, b)
    assert seen == [(logits, *arguments.values())]
