"""The decoder: memory within its bound, and the padded step that CUDA captures, on the CPU."""

import pytest
import torch
from decoding_alone import new_spread_policy
from hypothesis import given
from hypothesis import strategies as st

from clp.engine.runner import FILTERS, Decoder, Drawn, _bucket, _same
from clp.engine.sampler import Sampler, SamplingParams

BYTES = 4 * 2 * 2 * 32 * 4  # tiny: layers, keys and values, heads, width, float32
ROWS = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]]


@pytest.fixture(scope="module")
def policy():
    return new_spread_policy()


def prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 1024, (n,), generator=generator).tolist() for n in lengths]


def test_bucket():
    sizes = [_bucket(n) for n in range(1, 130)]
    assert sizes[:8] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert [_bucket(n) for n in (9, 16, 17, 63, 64, 65, 96, 97)] == [
        16, 16, 24, 64, 64, 96, 96, 128,
    ]  # fmt: skip
    assert sizes == sorted(sizes) and all(s >= n for n, s in enumerate(sizes, start=1))


def test_same():
    assert _same([0.5, 0.5]) == 0.5 and _same([0]) == 0
    assert _same([0.5, 0.4]) is None


# Memory


def test_bytes_of_a_token_and_what_is_held(policy):
    decoder = Decoder(policy, 8, 2**20)
    assert decoder.bytes_per_token == BYTES
    assert decoder.held_bytes == 0 and decoder.slots == 0  # the check leaves nothing
    decoder.reserve(2, 17, 8)
    assert decoder.slots == 3 and decoder.held_bytes == 3 * 32 * BYTES
    decoder.reserve(3, 5, 8)  # there is room
    assert decoder.held_bytes == 3 * 32 * BYTES
    decoder.drop()
    assert decoder.held_bytes == 0


@given(
    bound=st.integers(0, 40 * 16),
    asked=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 200)), max_size=6),
    spare=st.booleans(),
)
def test_what_is_held_never_exceeds_the_bound(policy, bound, asked, spare):
    decoder = Decoder(policy, 8, bound * BYTES)
    decoder.spare = int(spare)
    for slots, length in asked:
        fits = (slots + spare) * -(-length // 16) * 16 <= bound
        assert decoder.fits(slots, length) == fits
        if fits:
            decoder.reserve(slots, length, 8)
            assert slots <= decoder.slots <= 8 and decoder.caches[0].capacity >= length
            assert decoder.caches[0].slots == decoder.slots + spare
        assert decoder.held_bytes <= bound * BYTES


@pytest.mark.parametrize("spare", [0, 1])
def test_a_sampler_stays_within_its_bound_and_finishes(policy, spare):
    bound = 180 * BYTES
    sampler = Sampler(policy, max_batch_size=8, cache_gib=bound / 2**30)
    sampler._decoder.spare = spare
    lengths, most = [3, 40, 5, 70, 3, 3, 20, 3, 60, 2], 0
    requests = [
        sampler.submit(p, ROWS[i % 4], SamplingParams(max_tokens=8, ignore_eos=True, seed=i))
        for i, p in enumerate(prompts(lengths))
    ]
    while sampler.unfinished:
        sampler.step()
        assert sampler.cache_bytes <= bound
        most = max(most, sampler.cache_bytes)
    assert most > bound / 2
    assert all(len(r.completions[0].token_ids) == 8 for r in requests)
    with pytest.raises(ValueError, match="exceeds the cache"):
        sampler.submit(prompts([120])[0], ROWS[0], SamplingParams(max_tokens=100))


# The padded step


class PaddedDecoder(Decoder):
    """Runs on the CPU what CUDA captures: padded sizes and lengths, rows that have gone."""

    def decode(self, rows, first=0):
        count = len(rows)
        params = [row.request.params for row in rows]
        filters = tuple(_same([getattr(p, name) for p in params]) for name in FILTERS)
        longest = max(row.cached for row in rows) + 1
        size, length, chosen = self._padded(count, longest, filters)
        self.sizes.append((count, size, length))
        held = [t[count : self.slots].clone() for c in self.caches for t in c.tensors()]
        state = self._ints[:, count:].clone()
        drawn, _ = self._step(slice(0, size), length, False, chosen, self.home(size))
        now = [t[count : self.slots] for c in self.caches for t in c.tensors()]
        assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
        # Token, length, position and seed of a row behind them; `alive` is the step's own.
        assert torch.equal(state[[0, 1, 2, 3]], self._ints[[0, 1, 2, 3], count:])
        return Drawn(drawn.tokens[:count].tolist(), drawn.logprobs[:count].tolist(), {})


def padded(policy, **options):
    sampler = Sampler(policy, **options)
    sampler._decoder.__class__ = PaddedDecoder
    sampler._decoder.spare, sampler._decoder.sizes = 1, []
    return sampler


def each(count, **changes):
    return [
        SamplingParams(max_tokens=3 + 5 * (i % 4), ignore_eos=True, seed=i, **changes)
        for i in range(count)
    ]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}])
def test_a_padded_step_draws_the_same_and_touches_no_other_slot(policy, changes):
    texts, rows = prompts([3, 9, 1, 20, 5, 30]), [ROWS[i % 4] for i in range(6)]
    sampler = padded(policy, max_batch_size=8)
    done = sampler.generate(texts, rows, each(6, **changes))
    wanted = Sampler(policy, max_batch_size=8).generate(texts, rows, each(6, **changes))
    for ours, theirs in zip(done, wanted, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert any(size > count for count, size, _ in sampler._decoder.sizes)
    assert any(size == count for count, size, _ in sampler._decoder.sizes)


def test_a_padded_step_leaves_a_prompt_alone_that_is_half_prefilled(policy):
    """The row behind the decoding ones is within the padded size, and has a token to feed."""
    sampler = padded(policy, max_batch_size=8, max_prefill_tokens=8)
    texts, rows = prompts([5, 4, 3, 60, 50]), [ROWS[i % 4] for i in range(5)]
    params = [SamplingParams(max_tokens=14, ignore_eos=True, seed=i) for i in range(5)]
    done = sampler.generate(texts, rows, params)
    halves = [count for count, size, _ in sampler._decoder.sizes if count == 3 and size == 4]
    assert halves
    wanted = Sampler(policy).generate(texts, rows, params)
    assert [c.token_ids for c in done] == [c.token_ids for c in wanted]


def test_a_row_that_failed_leaves_a_token_that_can_be_fed(policy):
    sampler = padded(policy, max_batch_size=8)
    requests = [
        sampler.submit(p, w, SamplingParams(max_tokens=6, ignore_eos=True, seed=i), simplex=False)
        for i, (p, w) in enumerate(
            zip(prompts([3, 4, 5, 6]), [*ROWS[:2], ROWS[2], [1e30, 1e30]], strict=True)
        )
    ]
    while sampler.unfinished:
        sampler.step()
    assert [r.completions[0].finish_reason for r in requests] == ["length"] * 3 + ["error"]
    wanted = Sampler(policy).generate(
        prompts([3, 4, 5, 6])[:3], ROWS[:3],
        [SamplingParams(max_tokens=6, ignore_eos=True, seed=i) for i in range(3)],
    )  # fmt: skip
    assert [r.completions[0].token_ids for r in requests[:3]] == [c.token_ids for c in wanted]
