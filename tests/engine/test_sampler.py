"""The sampler: seeds, batches, stops, lengths, bad input."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from decoding_alone import new_spread_policy, token_ids, without_end

import clp_kernels
from clp.engine.sampler import Sampler, SamplingParams, with_seeds

LONGEST = "One day, the old dog was at the lake with a friend."
PROMPTS = ["Tom had a red kite.", "Mia", LONGEST, "Sam"]
WEIGHTS = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]]


@pytest.fixture(scope="module")
def sampler(policy):
    return Sampler(policy)


def params(**changes):
    return SamplingParams(**({"max_tokens": 20, "seed": 3} | changes))


def alone_each(sampler, each):
    """Each prompt's number and completion, sampled by itself."""
    for i, one in enumerate(each):
        yield i, *sampler.generate([PROMPTS[i]], [WEIGHTS[i]], one)


def test_order_counts_and_fields(sampler):
    done = sampler.generate(PROMPTS, WEIGHTS, params(n=2))
    assert [(c.prompt_index, c.index) for c in done] == [(i, k) for i in range(4) for k in range(2)]
    for c in done:
        assert len(c.token_ids) == len(c.logprobs) <= 20
        assert c.finish_reason == ("length" if len(c.token_ids) == 20 else c.finish_reason)
        assert all(lp <= 0 for lp in c.logprobs)
    assert done[0].text != done[1].text


def drawn(sampler, **changes):
    return [c.token_ids for c in sampler.generate(PROMPTS, WEIGHTS, params(**changes))]


def test_same_seed_same_tokens_and_other_seed_other_tokens(sampler):
    first = drawn(sampler)
    assert first == drawn(sampler) != drawn(sampler, seed=4)


def test_completion_k_of_a_request_draws_with_seed_plus_k(sampler):
    many = sampler.generate(PROMPTS[:1], WEIGHTS[:1], params(n=3))
    for k in range(3):
        (one,) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], params(seed=3 + k))
        assert one.token_ids == many[k].token_ids


def test_weights_change_the_completion(sampler):
    texts = {c.text for c in sampler.generate([PROMPTS[0]] * 4, WEIGHTS, params())}
    assert len(texts) > 1


def test_alone_and_in_a_mixed_batch_are_the_same_bits_in_batch_invariant_mode(sampler):
    with clp_kernels.batch_invariant():
        together = sampler.generate(PROMPTS, WEIGHTS, params())
        reordered = sampler.generate(PROMPTS[::-1], WEIGHTS[::-1], params())[::-1]
        for i, alone in alone_each(sampler, [params()] * 4):
            for other in (together[i], reordered[i]):
                assert other.token_ids == alone.token_ids
                assert other.logprobs == alone.logprobs


def test_alone_and_in_a_mixed_batch_agree_to_rounding_without_the_mode(sampler):
    together = sampler.generate(PROMPTS, WEIGHTS, params(temperature=0))
    for i, alone in alone_each(sampler, [params(temperature=0)] * 4):
        assert alone.token_ids == together[i].token_ids
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=1e-4)


def test_logprobs_are_those_of_a_forward_pass(policy, sampler):
    for temperature in (1.0, 0.7):
        (done,) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], params(temperature=temperature))
        ids = policy.tokenizer(PROMPTS[0])["input_ids"]
        with torch.no_grad(), policy.steer(torch.tensor(WEIGHTS[:1])):
            logits = policy.model(torch.tensor([ids + done.token_ids])).logits[0] / temperature
        logp = torch.log_softmax(logits, -1)[len(ids) - 1 : -1]
        picked = logp.gather(-1, torch.tensor(done.token_ids)[:, None])[:, 0]
        assert done.logprobs == pytest.approx(picked.tolist(), abs=1e-4)


def test_greedy_equals_transformers_generate(policy, sampler):
    done = sampler.generate(PROMPTS, WEIGHTS, params(temperature=0))
    for i, prompt in enumerate(PROMPTS):
        ids = policy.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with policy.steer(torch.tensor(WEIGHTS[i : i + 1])):
            out = policy.model.generate(ids, max_new_tokens=20, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == done[i].token_ids


def test_a_batch_larger_than_max_batch_size_is_the_same(policy, sampler):
    small = Sampler(policy, max_batch_size=2)
    assert drawn(small, temperature=0) == drawn(sampler, temperature=0)


def test_sequences_of_one_batch_have_their_own_parameters(sampler):
    changes = {"temperature": 0}, {"top_k": 1}, {"max_tokens": 1}, {"top_p": 0.5, "min_p": 0.1}
    each = [params(**one) for one in changes]
    done = sampler.generate(PROMPTS, WEIGHTS, each)
    for i, alone in alone_each(sampler, each):
        assert alone.token_ids == done[i].token_ids
    greedy = sampler.generate(PROMPTS[1:2], WEIGHTS[1:2], params(temperature=0))
    assert greedy[0].token_ids == done[1].token_ids


def test_stop_string_ends_the_text_before_it(sampler):
    (free,) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], params(seed=1))
    word = free.text.split()[2]
    (cut,) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], params(seed=1, stop=[word]))
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(word)]
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_a_stop_string_that_is_a_special_token_stops(policy, sampler):
    eos = policy.tokenizer.eos_token
    free = params(max_tokens=60, temperature=2.0, ignore_eos=True)
    everything = with_seeds(free, range(16))
    found = 0
    done = sampler.generate(PROMPTS[:1] * 16, "joy=1", everything)
    for c, one in zip(done, everything, strict=True):
        at = next((i for i, token in enumerate(c.token_ids) if token in policy.end_ids), None)
        assert eos not in c.text
        if at is None:
            continue
        found += 1
        (cut,) = sampler.generate(PROMPTS[:1], "joy=1", replace(one, stop=["zzzz", eos]))
        assert (cut.finish_reason, cut.token_ids) == ("stop", c.token_ids[: at + 1])
        # And as the model's own end, without the stop string.
        (end,) = sampler.generate(PROMPTS[:1], "joy=1", replace(one, ignore_eos=False))
        assert (end.text, end.token_ids) == (cut.text, cut.token_ids)
    assert found


def test_an_end_token_finishes_and_is_counted(policy, sampler):
    done = sampler.generate([PROMPTS[0]] * 8, "joy=1", with_seeds(params(max_tokens=200), range(8)))
    ended = [c for c in done if c.finish_reason == "stop"]
    assert ended
    for c in ended:
        assert c.token_ids[-1] in policy.end_ids
        assert not set(c.token_ids[:-1]) & policy.end_ids
        assert policy.tokenizer.eos_token not in c.text


def test_token_ids_as_prompts(policy, sampler):
    ids = policy.tokenizer(PROMPTS[0])["input_ids"]
    wanted = sampler.generate(PROMPTS[:1], WEIGHTS[:1], params())
    numpys = np.array(ids)
    same = [ids, tuple(ids), numpys, numpys.astype(np.uint16), list(numpys), torch.tensor(ids)]
    for prompt in same:
        assert sampler.generate([prompt], WEIGHTS[:1], params()) == wanted
    for bad in (numpys[None], torch.tensor([ids])):
        with pytest.raises(TypeError, match="prompt 0 must be a text or a list of token ids"):
            sampler.generate([bad], WEIGHTS[:1])
    for bad in (numpys * 1.0, numpys > 5, torch.tensor(ids) - 50, [numpys[0], True]):
        with pytest.raises(ValueError, match="prompt 0 must hold token ids from 0"):
            sampler.generate([bad], WEIGHTS[:1])


def test_without_a_seed_the_global_generator_decides(sampler):
    torch.manual_seed(1)
    first = drawn(sampler, seed=None)
    assert drawn(sampler, seed=None) != first
    torch.manual_seed(1)
    assert drawn(sampler, seed=None) == first


def test_none_and_minus_one_are_off_and_numpys_numbers_are_numbers():
    off = SamplingParams(top_k=-1, stop=None, stop_token_ids=None, logprobs=None, seed=None)
    assert off == SamplingParams()
    given = SamplingParams(
        max_tokens=np.int64(5), temperature=np.float32(0.5), top_k=np.int32(3),
        top_p=np.float64(0.5), min_p=np.float16(0.25), seed=np.int64(7), n=np.uint8(2),
        logprobs=np.int64(1), stop_token_ids=[np.int64(4)],
    )  # fmt: skip
    plain = SamplingParams(
        max_tokens=5, temperature=0.5, top_k=3, top_p=0.5, min_p=0.25, seed=7, n=2, logprobs=1,
        stop_token_ids=[4],
    )  # fmt: skip
    assert given == plain
    assert json.dumps(asdict(given)) == json.dumps(asdict(plain))


def test_without_max_tokens_the_context_is_the_end(policy, sampler):
    free = params(max_tokens=None, ignore_eos=True)
    for prompt in ([5] * 250, [5] * 255):
        (c,) = sampler.generate([prompt], "joy=1", free)
        assert len(prompt) + len(c.token_ids) == policy.context_length == 256
        assert c.finish_reason == "length"
    with pytest.raises(ValueError, match="exceeds the context of 256"):
        sampler.generate([[5] * 256], "joy=1", free)
    # The cache has room for 4 blocks of 16 tokens; the last token is never fed.
    tight = Sampler(policy, cache_gib=4 * 16 * 2048 / 2**30)
    (c,) = tight.generate([[5] * 20], "joy=1", free)
    assert 20 + len(c.token_ids) == 65


def test_any_integer_is_a_seed_and_its_lowest_64_bits_count(sampler):
    def draw(seed, n=1):
        one = params(seed=seed, n=n)
        return [c.token_ids for c in sampler.generate(PROMPTS[:1], WEIGHTS[:1], one)]

    for seed in (3, -1, 2**63 - 1, -(2**63)):
        assert draw(seed) == draw(seed + 2**64) == draw(seed - 2**90)
    assert draw(2**63) == draw(-(2**63)) and draw(2**64 + 5) == draw(5)
    assert draw(3**700) == draw(3**700 % 2**64) != draw(0)
    assert draw(2**63 - 1, n=3)[1:] == draw(-(2**63), n=2)


def test_logprobs_are_of_the_most_likely_and_of_the_token_drawn(policy, sampler):
    hot = params(temperature=1.5, logprobs=3, ignore_eos=True)
    done = sampler.generate(PROMPTS, WEIGHTS, hot)
    sizes = set()
    for c in done:
        for token, logprob, top in zip(c.token_ids, c.logprobs, c.top_logprobs, strict=True):
            sizes.add(len(top))
            assert top[token] == pytest.approx(logprob, abs=1e-5)
            assert list(top.values()) == sorted(top.values(), reverse=True)
            assert len(top) == 3 or list(top)[3:] == [token]
    assert sizes == {3, 4}


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-300])
def test_a_tiny_temperature_is_finite_and_greedy(sampler, temperature):
    greedy = sampler.generate(PROMPTS, WEIGHTS, params(temperature=0))
    for changes in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}):
        tiny = params(temperature=temperature, logprobs=2, **changes)
        for c, wanted in zip(sampler.generate(PROMPTS, WEIGHTS, tiny), greedy, strict=True):
            assert c.token_ids == wanted.token_ids
            assert all(math.isfinite(p) for top in c.top_logprobs for p in top.values())
            if temperature < 1e-5:
                assert c.logprobs == pytest.approx([0.0] * len(c.logprobs), abs=1e-6)


def test_no_prompts_no_completions(sampler):
    assert sampler.generate([], []) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.generate(PROMPTS, WEIGHTS[:2]), "given once or for all 4 prompts"),
        (lambda s: s.generate(PROMPTS, "joy=1", [params()]), "params must be one or 4"),
        (lambda s: s.generate(["a"], {"speed": 1.0}), "unknown objective 'speed'"),
        (lambda s: s.generate(["a"], [float("nan"), 1.0]), "finite"),
        (lambda s: s.generate([[]], "joy=1"), "prompt 0 is empty"),
        (lambda s: s.generate(["a"], "joy=1", params(max_tokens=10_000)), "exceeds the context"),
        (lambda s: Sampler(s.policy, max_batch_size=0), "max_batch_size"),
    ],
)
def test_bad_requests(sampler, call, message):
    with pytest.raises(ValueError, match=message):
        call(sampler)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"n": 0}, {"top_k": -2}, {"temperature": -0.1},
        {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -1}, {"stop": [""]},
        {"seed": True}, {"seed": 1.0}, {"temperature": "hot"},
    ],
)  # fmt: skip
def test_bad_sampling_parameters(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        SamplingParams(**changes)


def test_the_end_token_among_the_stop_tokens_ends_in_spite_of_ignore_eos(policy, sampler):
    free = with_seeds(params(max_tokens=60, temperature=2.0, ignore_eos=True), range(8))
    done = sampler.generate(PROMPTS[:1] * 8, "joy=1", free)
    ends, found = sorted(policy.end_ids), 0
    stopped = [replace(one, stop_token_ids=ends) for one in free]
    for c, cut in zip(done, sampler.generate(PROMPTS[:1] * 8, "joy=1", stopped), strict=True):
        at = next((i for i, token in enumerate(c.token_ids) if token in ends), None)
        found += at is not None
        assert cut.token_ids == c.token_ids[: None if at is None else at + 1]
        assert cut.finish_reason == ("length" if at is None else "stop")
    assert found


def test_a_stop_at_the_last_token_is_a_stop(policy, sampler):
    (free,) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], params(max_tokens=5, ignore_eos=True))
    last = replace(params(max_tokens=5, ignore_eos=True), stop_token_ids=free.token_ids[4:])
    (cut,) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], last)
    assert (cut.token_ids, cut.finish_reason) == (free.token_ids, "stop")
    word = free.text[-2:]
    assert free.text.index(word) == len(free.text) - 2
    (cut,) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], replace(last, stop_token_ids=(), stop=word))
    assert (cut.text, cut.token_ids) == (free.text[:-2], free.token_ids)
    assert cut.finish_reason == "stop"


def test_logprobs_do_not_know_the_filters(sampler):
    """At any temperature; at 0 they are those of temperature 1."""
    tight = {"top_k": 2, "top_p": 0.5, "min_p": 0.5}
    first = {}
    for temperature in (0, 0.5, 1):
        for name, filters in (("free", {}), ("tight", tight)):
            one = params(max_tokens=1, temperature=temperature, logprobs=5, **filters)
            (c,) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], one)
            first[temperature, name] = list(c.top_logprobs[0].items())[:5]
        assert first[temperature, "tight"] == first[temperature, "free"]
    assert dict(first[0, "free"]) == pytest.approx(dict(first[1, "free"]), abs=1e-6)
    cold, warm = ([v for _, v in first[t, "free"]] for t in (0.5, 1))
    assert [a - cold[0] for a in cold] == pytest.approx([2 * (a - warm[0]) for a in warm], abs=1e-4)


def test_the_seed_of_a_completion_wraps_and_is_keyed_by_its_place(sampler):
    (one, two) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], params(seed=2**64 - 1, n=2))
    (zero,) = sampler.generate(PROMPTS[:1], WEIGHTS[:1], params(seed=0))
    assert two.token_ids == zero.token_ids != one.token_ids
    # Without a seed: PyTorch's generator, and a seed for each request and completion.
    torch.manual_seed(7)
    free = sampler.generate(PROMPTS[:1] * 3, WEIGHTS[:1] * 3, params(seed=None, n=2))
    torch.manual_seed(7)
    again = sampler.generate(PROMPTS[:1] * 3, WEIGHTS[:1] * 3, params(seed=None, n=2))
    assert free == again and len({tuple(c.token_ids) for c in free}) == 6


def test_a_model_that_gains_a_layer_goes_on_as_a_new_samplers():
    """The keys of the new layer are made in a forward, and copied outside of one."""
    policy = new_spread_policy()
    layers, config = policy.model.model.layers, policy.model.config
    policy.model.model.layers, config.num_hidden_layers = layers[:3], 3
    sampler = Sampler(policy, max_batch_size=2)
    prompts = [token_ids(n, n) for n in (4, 5, 6, 7)] * 2
    sampler.generate(prompts[:2], [[0.5, 0.5]] * 2, without_end(4, seed=1))
    policy.model.model.layers, config.num_hidden_layers = layers, 4
    asked = prompts, [[0.5, 0.5]] * 8, without_end(6, seed=1)
    got = sampler.generate(*asked)
    wanted = Sampler(policy, max_batch_size=2).generate(*asked)
    assert [c.token_ids for c in got] == [c.token_ids for c in wanted]
