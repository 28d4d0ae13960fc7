"""What the filters of `sample` compare: numbers as they were given, on every backend.

A token's `logprobs - filtered_logprobs` is the logarithm of the mass that is kept, so one draw
shows which ids stay.
"""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
import torch
from cases import CPU_KERNELS, F64, INF, ISAS
from decoding_alone import new_spread_policy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clp.engine.sampler import Sampler, SamplingParams
from clp_kernels import linear_logprob, sample
from clp_kernels.ops.sample import cpu as cpu_sample
from clp_kernels.ops.sample import reference
from clp_kernels.ops.sample.reference import Inputs


def public(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(z: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return sample(z, **({"seed": 3, "position": 5} | options), backend=backend)

    return run


def compiled(isa: str) -> Callable[..., tuple[Tensor, ...]]:
    """csrc/cpu/sample/sample.cpp of one instruction set; without the short way from Python."""

    def run(z: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return cpu_sample.sample(Inputs(z[None], None, "geometric", *by_row(z, options)), isa=isa)

    return run


def triton(z: Tensor, **options: Any) -> tuple[Tensor, ...]:
    backend = cases.interpreted("sample")
    result: tuple[Tensor, ...] = backend.sample(
        Inputs(z[None], None, "geometric", *by_row(z, options))
    )
    return result


def by_row(z: Tensor, options: dict[str, Any]) -> list[Tensor | None]:
    """temperature, top_k, top_p, min_p, seed and position as the backends take them."""

    def rows(value: Any) -> Tensor | None:
        if value is None or isinstance(value, Tensor):
            return value
        dtype = torch.int64 if isinstance(value, int) else F64
        return torch.full((len(z),), value, dtype=dtype)

    given = {"temperature": 1.0, "seed": 3, "position": 5} | options
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    return [rows(given.get(name)) for name in names]


DRAWS = [
    pytest.param(public("reference"), id="reference"),
    pytest.param(public("cpu"), id="cpu", marks=CPU_KERNELS),
    *(pytest.param(compiled(isa), id=isa, marks=CPU_KERNELS) for isa in ISAS),
    pytest.param(triton, id="triton"),
]
each_draw = pytest.mark.parametrize("draw", DRAWS)


def kept_mass(drawn: tuple[Tensor, ...]) -> list[float]:
    """The probability that the filters leave, by row."""
    return (drawn[1].double() - drawn[2].double()).exp().tolist()


@each_draw
def test_top_p_is_not_rounded(draw: Callable[..., tuple[Tensor, ...]]) -> None:
    """Above the 0.1s lie 0.800000004, which is less than the float32 next to 0.8, not than 0.8."""
    z = torch.tensor([[0.3, 0.1, 0.1, 0.5]]).log()
    exact = torch.tensor([0.8], dtype=F64)
    assert kept_mass(draw(z, top_p=0.8)) == pytest.approx([0.8])
    assert kept_mass(draw(z, top_p=exact)) == pytest.approx([0.8])
    assert kept_mass(draw(z, top_p=exact.float())) == pytest.approx([1.0])
    # What is below 1 is a filter, also where float32 has nothing between.
    z = torch.tensor([[0.0, -25.0]])
    token, _, left = draw(z, top_p=1 - 1e-10)
    assert token.item() == 0 and left.item() == 0


@each_draw
def test_min_p_is_not_rounded(draw: Callable[..., tuple[Tensor, ...]]) -> None:
    """The second id's ratio to the first lies between the number and the float32 next to it."""
    z = torch.tensor([[0.0, -0.7]])
    ratio = math.exp(z[0, 1].item())
    alone = 1 / (1 + ratio)
    above = torch.tensor([ratio * (1 + 1e-12)], dtype=F64)
    assert kept_mass(draw(z, min_p=ratio * (1 - 1e-12))) == pytest.approx([1.0], abs=1e-6)
    assert kept_mass(draw(z, min_p=above.item())) == pytest.approx([alone], abs=1e-6)
    assert kept_mass(draw(z, min_p=above)) == pytest.approx([alone], abs=1e-6)
    # A float32 tensor is what it is: here below the ratio.
    assert above.float().item() < ratio
    assert kept_mass(draw(z, min_p=above.float())) == pytest.approx([1.0], abs=1e-6)


@each_draw
def test_temperature_is_not_rounded(draw: Callable[..., tuple[Tensor, ...]]) -> None:
    """It decides where the logits are so large that float32's rounding of it moves z / t."""
    z = torch.tensor([[0.0, -1000.0 * math.log(2)]])
    t = 1000.0 * (1 + 2e-8)  # 1000 in float32
    ratio = math.exp(z[0, 1].item() / t)
    assert kept_mass(draw(z, temperature=t, min_p=ratio * (1 - 1e-10))) == pytest.approx([1.0])
    left = 1 / (1 + ratio)
    assert kept_mass(draw(z, temperature=t, min_p=ratio * (1 + 1e-10))) == pytest.approx([left])


@each_draw
def test_rows_keep_their_own_numbers(draw: Callable[..., tuple[Tensor, ...]]) -> None:
    """A row's filter is the same alone and beside rows with other filters."""
    z = torch.tensor([[0.3, 0.1, 0.1, 0.5]]).log().expand(3, 4).contiguous()
    rows = torch.tensor([0.8, 0.95, 0.5], dtype=F64)
    assert kept_mass(draw(z, top_p=rows)) == pytest.approx([0.8, 1.0, 0.5])
    assert kept_mass(draw(z[:1], top_p=0.8)) == pytest.approx([0.8])


# Values about which floats are dense or end.
TINY = [0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-38, 1e-30, -1e-17, 3e-8, -3e-8]
LARGE = [1.0, -1.0, 5.5, -90.0, 1e4, -1e10, 3.4e38, -3.4e38, -INF]
TEMPERATURES = [5e-324, 1e-45, 1e-30, 1e-12, 0.01, 0.7, 1.0, 3.0, 1e6, 1e38, 1e39, 1e250]
MIN_PS = [1.0, 1 - 2**-53, 1 - 1e-9, 0.5, 0.1, 1e-17, 1e-45, 1e-300, 5e-324]


def assert_as_defined(draw: Callable[..., tuple[Tensor, ...]], z: Tensor, **options: Any) -> None:
    wanted = public("reference")(z, **options)
    got = draw(z, **options)
    assert torch.equal(got[0], wanted[0])
    for a, b in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_draw
def test_min_p_takes_a_bounded_number_of_steps(draw: Callable[..., tuple[Tensor, ...]]) -> None:
    """Stepping through the floats about zero took 3 to 6 seconds a row: here 10 minutes."""
    tops, min_ps, temperatures = TINY, (1.0, 1 - 2**-53, 0.5), (1e-12, 1.0, 1e6, 1e39)
    rows = torch.tensor(list(itertools.product(tops, min_ps, temperatures)), dtype=F64)
    if draw is triton:  # which takes no steps, and 0.1 s for a row in its interpreter
        rows = rows[::11]
    z = torch.tensor([[0.0, -1.0, -2.0, -1e-3]]).repeat(len(rows), 1)
    z[:, 0] = rows[:, 0].float()
    seed, position = torch.arange(len(rows)), torch.arange(len(rows))
    options = {"min_p": rows[:, 1], "temperature": rows[:, 2], "seed": seed, "position": position}
    assert_as_defined(draw, z, **options)


@CPU_KERNELS
@given(
    st.lists(st.sampled_from(TINY + LARGE), min_size=1, max_size=6),
    st.sampled_from([*TINY, 2.0]),
    st.one_of(st.sampled_from(MIN_PS), st.floats(5e-324, 1.0)),
    st.one_of(st.sampled_from(TEMPERATURES), st.floats(1e-30, 1e300)),
    st.sampled_from([0, 0, 1, 2, 5]),
)
def test_filters_at_the_ends_of_the_floats(
    others: list[float], first: float, min_p: float, temperature: float, top_k: int
) -> None:
    z = torch.tensor([[first, *others]])
    for draw in (public("cpu"), *(compiled(isa) for isa in ISAS)):
        assert_as_defined(draw, z, min_p=min_p, temperature=temperature, top_k=top_k)


@each_draw
def test_what_differs_is_no_tie(draw: Callable[..., tuple[Tensor, ...]]) -> None:
    """Logits are compared: probabilities of logits 1e-17 apart are one float64."""
    z = torch.tensor([[-1e-17, 0.0], [-0.0, 0.0]])  # two numbers, and one
    for option in ({"top_k": 1}, {"top_p": 0.5}, {"min_p": 1.0}):
        drawn = draw(z, **option)
        assert drawn[0][0].item() == 1 and drawn[2][0].item() == 0, option
        assert kept_mass(drawn)[1] == 1, option


def test_tiny_temperatures_are_finite() -> None:
    """z / temperature stays in float64; the reference says what every backend gives."""
    z = torch.tensor([[3e38, 2e38, -3e38]])
    for temperature in (5e-324, 1e-300, sys.float_info.min):
        options = {"temperature": temperature, "seed": 1, "position": 2}
        token, full, left = sample(z, **options, backend="reference")
        assert (token.item(), full.item(), left.item()) == (0, 0.0, 0.0)


def test_temperature_of_linear_logprob_in_float64() -> None:
    """A number is not rounded to float32 beside float64 inputs."""
    h, W = torch.randn(5, 7, dtype=F64), torch.randn(11, 7, dtype=F64)
    y = torch.arange(5)
    got = linear_logprob(h, W, y, temperature=0.7).logprobs
    wanted = torch.log_softmax(h @ W.t() / 0.7, -1)[torch.arange(5), y]
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


def test_masks_of_the_reference_compare_logits() -> None:
    z, p = torch.tensor([[0.0, -1e-17, -0.5]], dtype=F64), torch.tensor([0.3], dtype=F64)
    assert reference.top_p_mask(z, p).tolist() == [[True, False, False]]


def test_a_sampler_keeps_the_numbers_of_its_requests() -> None:
    """Beside requests with other filters they are tensors by slot, and still not rounded."""
    sampler = Sampler(new_spread_policy(), max_batch_size=4)
    asked = [(0.7, 0.8, 0.1), (0.9, 0.95, 1e-300)]
    for temperature, top_p, min_p in asked:
        filters = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
        params = SamplingParams(max_tokens=3, ignore_eos=True, **filters)
        sampler.submit([5, 6, 7], [0.5, 0.5], params)
    sampler.step()
    slots = sampler.runner.state
    kept = torch.stack([slots.temperature, slots.top_p, slots.min_p])[:, :2]
    assert kept.t().tolist() == [list(numbers) for numbers in asked]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", *["cpu"] * bool(ISAS)])
def test_min_p_of_narrow_logits_about_zero(backend: str, dtype: torch.dtype) -> None:
    """Zeros of both signs are one value; the least subnormal is another."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    z = torch.tensor([[0.0, -0.0, -1.0], [-0.0, -least, -1.0], [least, 0.0, 0.0]]).to(dtype)
    z = torch.cat([z, torch.full((3, 3000), -INF, dtype=dtype)], 1)
    drawn = sample(z, min_p=1.0, seed=1, position=0, backend=backend)
    left = drawn[2].exp().tolist()
    assert left == pytest.approx([0.5, 1.0, 1.0], abs=1e-6)
    assert drawn[0].tolist()[1:] == [0, 0]


@pytest.mark.parametrize("backend", ["reference", *["cpu"] * bool(ISAS)])
def test_min_p_of_a_mixture_that_cancels(backend: str) -> None:
    """Of 50,000 tokens all tie at 0, and stay; beside a row without the filter."""
    z = torch.randn(1, 2, 50_000)
    logits = torch.cat([z, -z])
    weights, min_p = torch.full((2, 2), 0.5), torch.tensor([1.0, 0.0], dtype=F64)
    options = {"min_p": min_p, "seed": 1, "position": 0, "backend": backend}
    _, full, left = sample(logits, weights=weights, **options)
    torch.testing.assert_close(full, torch.full((2,), -math.log(50_000)))
    torch.testing.assert_close(left, full)


@each_draw
def test_top_p_at_the_mass_of_a_thousand_tokens(draw: Callable[..., tuple[Tensor, ...]]) -> None:
    z = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1)) * 3
    p = z[0].double().softmax(-1).sort(descending=True).values.tolist()
    for kept in (1, 9):
        mass = math.fsum(p[:kept])
        wanted = mass + p[kept]
        assert kept_mass(draw(z, top_p=mass * (1 - 1e-11))) == pytest.approx([mass], rel=1e-5)
        assert kept_mass(draw(z, top_p=mass * (1 + 1e-11))) == pytest.approx([wanted], rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", *["cpu"] * bool(ISAS)])
def test_numpys_numbers_are_what_they_are(backend: str) -> None:
    """np.float64(0.8) is 0.8, and np.float32(0.8) is the larger number that float32 has."""
    z = torch.tensor([[0.3, 0.1, 0.1, 0.5]]).log()
    for top_p, wanted in ((np.float64(0.8), 0.8), (np.float32(0.8), 1.0)):
        drawn = sample(z, top_p=top_p, seed=np.int64(3), position=0, backend=backend)
        assert kept_mass(drawn) == pytest.approx([wanted])


@each_draw
def test_the_order_is_temperature_top_k_top_p_min_p(
    draw: Callable[..., tuple[Tensor, ...]],
) -> None:
    """Each case has another result if two of them change places, or top-p is not renormalised."""
    z = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    cases: list[tuple[dict[str, Any], float]] = [
        ({"top_k": 2, "top_p": 0.5}, 0.4),  # 0.4 / 0.7 is more than 0.5
        ({"top_p": 0.75, "min_p": 0.45}, 0.9),  # of what min-p leaves, 0.7 / 0.9 would be more
        ({"temperature": 2.0, "min_p": 0.6}, sum(x**0.5 for x in (0.4, 0.3, 0.2))),  # 0.707
        ({"temperature": 0.5, "top_p": 0.5}, 0.4**2),
        ({"top_k": 3, "top_p": 0.7, "min_p": 0.7}, 0.7),
        ({"top_k": 9, "top_p": 1.0}, 1.0),  # more than there are
    ]
    for options, kept in cases:
        t = options.get("temperature", 1.0)
        whole = sum(x ** (1 / t) for x in (0.4, 0.3, 0.2, 0.1))
        assert kept_mass(draw(z, **options)) == pytest.approx([kept / whole]), options


@each_draw
def test_all_that_tie_stay_and_the_lowest_id_is_greedy(
    draw: Callable[..., tuple[Tensor, ...]],
) -> None:
    z = torch.tensor([[1.0, 2.0, 2.0, 2.0, -INF, 0.0]])
    three = 3 / (3 + math.exp(-1) + math.exp(-2))
    for options in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}, {"top_k": 2, "top_p": 1e-9}):
        assert kept_mass(draw(z, **options)) == pytest.approx([three]), options
    token, full, left = draw(z, temperature=0.0, top_k=1)
    assert (token.item(), left.item()) == (1, 0.0)
    assert full.item() == pytest.approx(math.log(three / 3), abs=1e-6)
    # A temperature close to 0 is not 0: each of the three is drawn.
    many = z.expand(40, 6).contiguous()
    drawn = draw(many, temperature=1e-5, seed=torch.arange(40), position=torch.zeros(40).long())
    assert set(drawn[0].tolist()) == {1, 2, 3}


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
@pytest.mark.parametrize("value", [[1], np.array([1, 1]), np.array(1)])
def test_lists_and_arrays_are_refused_by_name(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number or a tensor, got"):
        sample(torch.zeros(2, 4), seed=1, position=0, **{name: value})
