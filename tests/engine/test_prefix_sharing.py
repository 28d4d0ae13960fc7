"""Prompts with a common prefix are prefilled once, for sequences that may share it."""

import contextlib

import pytest
from decoding_alone import new_spread_policy, token_ids, without_end

import clp_kernels
from clp.engine.sampler import Sampler
from clp_kernels.nn.mixed_lora import steered_layers


@pytest.fixture
def policy():
    return new_spread_policy()


class Counting:
    """A sampler, and how many tokens its runner prefilled since the last look."""

    def __init__(self, policy, **options):
        self.sampler, self.count = Sampler(policy, **options), 0
        prefill = self.sampler.runner.prefill

        def counted(parts):
            self.count += sum(s.stop - s.start for _, s in parts)
            prefill(parts)

        self.sampler.runner.prefill = counted

    def take(self):
        count, self.count = self.count, 0
        return count


def params(max_tokens=6, **changes):
    return without_end(max_tokens, **changes)


def fresh(policy, ids, weights, one):
    return Sampler(policy).generate([ids], [weights], one, simplex=False)


def agree(ours, theirs, exact=False):
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == (b.logprobs if exact else pytest.approx(b.logprobs, abs=1e-5))


@pytest.mark.parametrize("exact", [False, True])
def test_the_same_prompt_and_weights_again_prefills_nothing(policy, exact):
    with clp_kernels.batch_invariant() if exact else contextlib.nullcontext():
        counting, ids = Counting(policy), token_ids(30)
        first = counting.sampler.generate([ids], [[0.5, 0.5]], params())
        assert counting.take() == 29  # the last token goes through the decoding step
        again = counting.sampler.generate([ids], [[0.5, 0.5]], params(seed=9))
        assert counting.take() == 0
        agree(first, fresh(policy, ids, [0.5, 0.5], params()), exact)
        agree(again, fresh(policy, ids, [0.5, 0.5], params(seed=9)), exact)


def test_other_weights_share_nothing_and_minus_zero_is_zero(policy):
    counting, ids = Counting(policy), token_ids(30)
    counting.sampler.generate([ids], [[1.0, 0.0]], params())
    assert counting.take() == 29
    counting.sampler.generate([ids], [[1.0, -0.0]], params())
    assert counting.take() == 0
    other = counting.sampler.generate([ids], [[0.9, 0.1]], params())
    assert counting.take() == 29
    agree(other, fresh(policy, ids, [0.9, 0.1], params()))


def test_other_adapters_share_nothing(policy):
    counting, ids = Counting(policy), token_ids(30)
    counting.sampler.generate([ids], [[0.5, 0.5]], params())
    counting.take()
    next(iter(steered_layers(policy.model).values())).lora_B.data[1, 0, 0] += 0.5
    done = counting.sampler.generate([ids], [[0.5, 0.5]], params())
    assert counting.take() == 29
    agree(done, fresh(policy, ids, [0.5, 0.5], params()))


@pytest.mark.parametrize(("common", "computed"), [(15, 39), (16, 23), (30, 9), (39, 0)])
def test_a_common_beginning_of_at_least_16_tokens_is_copied(policy, common, computed):
    counting = Counting(policy)
    first = token_ids(60)
    second = first[:common] + token_ids(40 - common, seed=2)
    if common < 39:
        assert second[common] != first[common]
    counting.sampler.generate([first], [[0.5, 0.5]], params())
    counting.take()
    done = counting.sampler.generate([second], [[0.5, 0.5]], params())
    assert counting.take() == computed
    agree(done, fresh(policy, second, [0.5, 0.5], params()))


def test_a_source_that_has_drawn_past_the_shared_part(policy):
    counting, ids = Counting(policy), token_ids(30)
    long = counting.sampler.submit(ids, [0.5, 0.5], params(max_tokens=40))
    for _ in range(20):
        counting.sampler.step()
    counting.take()
    same = counting.sampler.submit(ids, [0.5, 0.5], params(seed=2))
    # The conversation goes on: the prompt and what was drawn, of which all but one are cached.
    behind = ids + long.sequences[0].token_ids[:12] + [7, 8]
    more = counting.sampler.submit(behind, [0.5, 0.5], params(seed=3))
    counting.sampler.finish([long, same, more])
    assert counting.take() == 1
    agree(long.completions, fresh(policy, ids, [0.5, 0.5], params(max_tokens=40)))
    agree(same.completions, fresh(policy, ids, [0.5, 0.5], params(seed=2)))
    agree(more.completions, fresh(policy, behind, [0.5, 0.5], params(seed=3)))


@pytest.mark.parametrize("budget", [2048, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_n_completions_of_one_batch_prefill_their_prompt_once(policy, exact, budget):
    with clp_kernels.batch_invariant() if exact else contextlib.nullcontext():
        counting, ids = Counting(policy, max_prefill_tokens=budget), token_ids(30)
        done = counting.sampler.generate([ids], [[0.5, 0.5]], params(n=5))
        assert counting.take() == 29
        for k in range(5):
            if not exact or budget == 2048:
                agree([done[k]], fresh(policy, ids, [0.5, 0.5], params(seed=1 + k)), exact)


def test_a_cancelled_sequence_is_a_source_once_its_keys_have_been_seen_to_be_finite(policy):
    """That is when it has drawn a token."""
    counting, ids = Counting(policy, max_prefill_tokens=20), token_ids(60)
    for steps, found in ((1, 0), (3, 59)):
        first = counting.sampler.submit(ids, [0.5, 0.5], params())
        for _ in range(steps):
            counting.sampler.step()
        assert counting.take() == min(20 * steps, 59)
        counting.sampler.cancel(first)
        done = counting.sampler.generate([ids], [[0.5, 0.5]], params())
        assert counting.take() == 59 - found
        agree(done, fresh(policy, ids, [0.5, 0.5], params()))
        ids = ids[::-1]


def test_a_sequence_that_failed_is_not_a_source(policy):
    counting, ids = Counting(policy), token_ids(30)
    weights = [1e30, 1e30]
    for _ in range(2):
        request = counting.sampler.submit(ids, weights, params(), simplex=False)
        counting.sampler.finish([request])
        assert request.completions[0].finish_reason == "error"
        assert counting.take() == 29
    done = counting.sampler.generate([ids], [[0.5, 0.5]], params())
    agree(done, fresh(policy, ids, [0.5, 0.5], params()))
