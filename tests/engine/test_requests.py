"""The sampler under bad input, failures in the middle of a step, and many requests: each request
stands or falls alone."""

import ctypes
import gc
import os
import random
import sys
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from decoding_alone import TOLERANCE, Alone, spread_policy, token_ids, without_end

import clp_kernels
from clp.engine.attention import Decode, Prefill
from clp.engine.detokenizer import Text
from clp.engine.sampler import Sampler, SamplingParams
from clp.engine.scheduler import Scheduler
from clp.engine.sequence import Request, Sequence

IDS = token_ids(300, 2)
# (prompt, weights, parameters, simplex): each is refused with a ValueError or TypeError.
BAD = [
    *[("Tom", "joy=1", {name: value}, True) for name, values in {
        "n": [0, -1, 1025, 1.0, True, None, 2**70],
        "max_tokens": [0, 2**21, "8", 1.0, True, 10**400, np.bool_(True), np.int64(0)],
        "top_k": [-2, 2**31, 1.5, None, b"1"],
        "temperature": [-1, float("nan"), float("inf"), 10**400, "hot", None, True, [1.0]],
        "top_p": [0, 1.1, float("nan"), None, {}],
        "min_p": [-0.1, 2, float("nan"), None],
        "seed": [1.0, "1", True, np.float64(1), float("inf")],
        "stop": [[""], ["a"] * 17, ["a" * 257], [1], [b"a"], b"a", 5, {"a": 1}, [None]],
        "stop_token_ids": [[-1], [1024], [2**70], [1.0], ["a"], [True], [1] * 257, b"ab", 5],
        "ignore_eos": [1, None, "yes"],
        "logprobs": [-1, 21, 1.5, True],
    }.items() for value in values],
    *[(prompt, "joy=1", {}, True) for prompt in [
        None, 5, 1.5, True, {}, {"prompt": "Tom"}, {1, 2}, b"Tom", bytearray(b"Tom"), object(),
        np.array([5.0, 6.0]), torch.tensor([[5, 6]]), [], (), [1024], [-1], [2**70], [10**400],
        [True], [1.0], ["Tom"], [None], [[5]], [np.float64(5)], "\ud800", "Tom \udfff", IDS,
        IDS[:250], "Tom " * 300,
    ]],
    *[("Tom", weights, {}, simplex) for weights, simplex in [
        ([float("nan"), 1.0], False), ([float("inf"), 0.0], False), ([1e308, 0.0], False),
        ([-1e39, 0.0], False), ([10**400, 0], False), ([2.0, 0.0], True), ([-0.5, 1.5], True),
        ([1.0], True), ([1.0, 0.0, 0.0], True), ([], True), ("speed=1", True), ("joy", True),
        ({"speed": 1}, True), ({1: 1.0}, True), ("joy=1,joy=0", True), ("\ud800=1", True),
        (None, True), (5, True), (b"\x00\x01", True), (np.array([1.0, 0.5]), True),
        ([None, 1.0], True), (["a", "b"], True), ([True, False], True), ({"joy": None}, True),
        (torch.zeros(2, 2), True), (torch.tensor(1.0), True), (object(), True),
        ({"joy": "1"}, True),
    ]],
]  # fmt: skip


def state(sampler):
    known = sampler.scheduler
    return [list(known.waiting), list(known.running), list(known.contents), sampler.cache_bytes]


@pytest.fixture
def sampler(one_thread):
    return Sampler(spread_policy(), max_batch_size=4, max_prefill_tokens=24)


@pytest.fixture(scope="module")
def busy():
    """A sampler with a request that is being decoded."""
    made = Sampler(spread_policy(), max_batch_size=4, max_prefill_tokens=24)
    made.submit(IDS[:20], "joy=1", SamplingParams(seed=1))
    made.step()
    return made


def with_blocks(count, **options):
    """A sampler whose cache has room for so many blocks of 16 tokens, of 2,048 bytes each."""
    return Sampler(spread_policy(), cache_gib=count * 16 * 2048 / 2**30, **options)


def refuse(sampler, bad):
    prompt, weights, changes, simplex = bad
    with pytest.raises((ValueError, TypeError)) as caught:
        sampler.submit(prompt, weights, SamplingParams(**changes), simplex=simplex)
    return str(caught.value)


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name_and_changes_nothing(busy, bad):
    before = state(busy)
    message = refuse(busy, bad)
    of_prompt = isinstance(bad[1], str) and bad[1] == "joy=1"
    name = next(iter(bad[2]), "prompt" if of_prompt else "weights")
    assert message.startswith(name) or f" {name}" in message
    assert state(busy) == before


@pytest.mark.parametrize("bad", [None, {}, {"n": 2}, 5, "seed=1", [SamplingParams()]])
def test_params_of_another_type_are_refused(sampler, bad):
    if bad is not None:
        with pytest.raises(TypeError, match="params of prompt must be SamplingParams"):
            sampler.submit("Tom", "joy=1", bad)
        with pytest.raises(TypeError, match="params of prompt 0 must be SamplingParams"):
            sampler.generate(["Tom"], "joy=1", [bad])
    assert sampler.unfinished == 0
    for prompts in ("Tom", b"Tom", None, 5, {"a"}, iter(["Tom"])):
        with pytest.raises(TypeError, match="prompts must be a list"):
            sampler.generate(prompts, "joy=1")


def test_a_request_that_can_never_fit_is_refused(one_thread):
    small = with_blocks(4, max_batch_size=3)
    with pytest.raises(ValueError, match=r"prompt has 60 tokens.*the cache of"):
        small.submit(IDS[:60], "joy=1", SamplingParams(max_tokens=6))
    assert small.unfinished == 0
    longest = small.submit(IDS[:60], "joy=1", SamplingParams(max_tokens=5, seed=1))
    small.finish([longest])
    Alone().check(longest)


def test_a_long_request_at_the_head_of_the_queue_gets_its_turn(one_thread):
    small = with_blocks(4, max_batch_size=3)
    brief = without_end(3)

    def more():
        return [small.submit([5 + i], "joy=1", brief) for i in range(3)]

    more()
    small.step()
    long = small.submit(IDS[:60], "joy=1", brief)
    for _ in range(12):
        more()  # they would fit beside those that run, but came later
        small.step()
    assert long.finished
    Alone().check(long)


def test_what_the_slots_hold_is_not_copied_when_the_policy_has_changed(sampler):
    policy = sampler.policy
    request = sampler.submit(IDS[:40], "joy=1", SamplingParams(max_tokens=8, seed=1))
    sampler.finish([request])
    parameters = list(policy.trainable_parameters().values())
    before = [p.detach().clone() for p in parameters]
    try:
        for p in parameters:
            p.data.mul_(1.3)
        changed = sampler.submit(IDS[:40], "joy=1", SamplingParams(max_tokens=8, seed=1))
        sampler.finish([changed])
        Alone().check(changed)
        assert changed.completions[0].token_ids != request.completions[0].token_ids
    finally:
        for p, old in zip(parameters, before, strict=True):
            p.data.copy_(old)


# One sequence fails


def good_ones(sampler, count, max_tokens=6, **changes):
    weights = [[0.25 * i, 1 - 0.25 * i] for i in range(count)]
    each = [without_end(max_tokens, seed=i, **changes) for i in range(count)]
    prompts = [IDS[i : i + 9 + 3 * i] for i in range(count)]
    return [sampler.submit(*one) for one in zip(prompts, weights, each, strict=True)]


def whole_and_right(*requests):
    reasons = {c.finish_reason for request in requests for c in request.completions}
    assert reasons <= {"stop", "length"}
    Alone(24).check(*requests)


def test_logits_that_are_not_finite_fail_one_sequence_and_leave_nothing_behind(sampler):
    first, *rest = good_ones(sampler, 3, max_tokens=20)
    params = SamplingParams(n=1, logprobs=2, stop=["a"])
    wild = sampler.submit(IDS[:20], [1e30, 1e30], params, simplex=False)
    for _ in range(3):
        sampler.step()
    assert [c.finish_reason for c in wild.completions] == ["error"]
    assert "not finite" in wild.completions[0].error
    assert all(t.isfinite().all() for t in sampler.runner.models[0].cache.tensors())
    assert sampler.runner.state.token.min() >= 0
    # A shorter sequence in the same slot, beside longer ones: what is behind its end is multiplied.
    later = sampler.submit([5], [0.0, 1.0], SamplingParams(seed=1, max_tokens=5))
    going = [first, *rest, later]
    sampler.finish(going)
    assert all(c.error is None for request in going for c in request.completions)
    Alone().check(*going)


@pytest.mark.parametrize("end", ["cancel", "error"])
def test_a_sequence_that_ends_before_its_first_token_leaves_nothing_behind(sampler, end):
    """Its keys may be not finite without a step having shown it; also where it has moved from."""
    others = good_ones(sampler, 2, max_tokens=30)
    brief = sampler.submit([5], "joy=1", without_end(3))
    sampler.step()
    wild = sampler.submit(IDS[:60], [1e30, 1e30], SamplingParams(), simplex=False)
    sampler.step()
    running = sampler.scheduler.running
    assert (running[3].request, running[3].cached) == (wild, 24)
    sampler.step()  # the third is done: the sequence that is being prefilled moves
    assert brief.finished and running[2].request is wild
    if end == "cancel":
        sampler.cancel(wild)
    else:
        while not wild.finished:
            sampler.step()
    later = [sampler.submit([5 + i], "joy=1", SamplingParams(seed=1, max_tokens=4)) for i in (0, 1)]
    sampler.finish([*others, *later])
    assert all(c.error is None for request in [*others, *later] for c in request.completions)
    Alone().check(*others, *later)


def test_a_slot_that_was_cut_is_not_copied_when_it_has_grown_again(one_thread):
    """Sequences that share the memory of a long one shorten its slot, also before they take it."""
    small = with_blocks(8, max_batch_size=4, max_prefill_tokens=5)
    one = without_end(2)
    beside = small.submit([5], "joy=1", without_end(60))
    long = small.submit(IDS[:60], "joy=1", one)
    small.finish([long])
    assert small.scheduler.contents[1] is long.sequences[0] and small.runner.capacity == 64
    small.cancel(beside)
    brief = [small.submit(IDS[100 + i : 110 + i], "joy=1", one) for i in range(3)]
    small.step()
    assert small.runner.capacity == 16
    for request in brief:
        small.cancel(request)
    again = small.submit(IDS[:60], "joy=1", one)
    small.finish([again])
    Alone().check(again)


# Exceptions inside a step


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


@contextmanager
def failing(owner, name, at, error):
    """The `at`-th call of a function from now on raises; gives the list of its calls so far."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise error
        return original(*args, **kwargs)

    with patch.object(owner, name, wrapped):
        yield calls


def test_an_error_of_a_model_without_a_text_ends_its_sequences_alone(sampler):
    first = good_ones(sampler, 1, max_tokens=3)
    layer = spread_policy().model.model.layers[2].mlp
    with failing(layer, "forward", 1, Unprintable()):
        sampler.step()
    assert first[0].completions[0].error == "Unprintable: <exception str() failed>"
    again = good_ones(sampler, 2, max_tokens=3)
    sampler.finish(again)
    whole_and_right(*again)


ERRORS = [RuntimeError("no kernel"), MemoryError(), torch.OutOfMemoryError("2 GiB"), IndexError(3)]


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_a_failed_forward_ends_the_sequences_of_that_forward_alone(sampler, at):
    layer = spread_policy().model.model.layers[2].mlp
    groups, runner = [], sampler.runner
    plan, decode = sampler.scheduler.next_batch, runner.decode

    def planning(budget, **mode):
        batch = plan(budget, **mode)
        if batch.parts:  # and the sequences that would have copied it
            groups.append(batch.sequences)
        return batch

    sampler.scheduler.next_batch = planning
    runner.decode = lambda group, first: (groups.append(list(group)), decode(group, first))[1]
    requests = good_ones(sampler, 4, n=2)
    error = ERRORS[at % len(ERRORS)]
    with failing(layer, "forward", at, error):
        sampler.finish(requests)
    hit = {id(sequence) for sequence in groups[at - 1]}
    assert hit
    for completion, failed in [(s.completion, id(s) in hit) for q in requests for s in q.sequences]:
        assert (completion.finish_reason == "error") == failed
        assert not failed or completion.error == f"{type(error).__name__}: {error}"
    # Usable, and what the failed sequences left is not copied.
    again = good_ones(sampler, 4)
    for request in again:
        sampler.finish([request])
        assert request.completions[0].error is None
    Alone(24).check(*requests, *again)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_the_same_prompt_after_a_failed_forward_is_computed_again(sampler, at):
    """The slot was cleared: a copy of it, or what it holds of the same prompt, would be zeros."""
    params = without_end(6)
    hit = sampler.submit(IDS[:24], "joy=1", params)
    with failing(spread_policy().model.model.layers[2].mlp, "forward", at, RuntimeError("once")):
        sampler.finish([hit])
    assert hit.completions[0].error == "RuntimeError: once"
    again = [sampler.submit(IDS[:24], "joy=1", params) for _ in range(2)]
    sampler.finish(again)
    Alone().check(*again)


def counts_of_copies(sampler):
    """The tokens of each copy between slots from now on."""
    copied, copy = [], sampler.runner.copy
    sampler.runner.copy = lambda a, b, count: (copied.append(count), copy(a, b, count))
    return copied


@pytest.mark.parametrize("more", [[], [9], IDS[70:90]])
@pytest.mark.parametrize("ended", [False, True])
def test_the_next_turn_copies_the_last_one_but_its_last_token(sampler, ended, more):
    """The last token drawn is not in the cache: nothing has fed it yet."""
    before = sampler.submit(IDS[:24], "joy=1", without_end(9))
    for _ in range(9 if ended else 5):
        sampler.step()
    assert before.finished is ended
    ids = before.prompt_ids + before.sequences[0].token_ids + more
    copied = counts_of_copies(sampler)
    after = sampler.submit(ids, "joy=1", SamplingParams(max_tokens=9, seed=1))
    sampler.finish([before, after])
    assert copied[:1] == ([] if ended else [28])  # of one that is done, in its own slot
    Alone().check(after)


def test_in_batch_invariant_mode_only_whole_prompts_are_copied(sampler):
    """A prompt's bits depend on how it is cut into forwards."""
    copied, params = counts_of_copies(sampler), without_end(4)
    prompts = [IDS[:40], IDS[:30], [*IDS[:39], 5, 6], IDS[:40]]
    with clp_kernels.batch_invariant():
        requests = [sampler.submit(ids, "joy=1", params) for ids in prompts]
        sampler.step()
        assert copied == [39]
        assert all(sequence.token_ids for sequence in sampler.scheduler.running)
        sampler.finish(requests)
    Alone(24, invariant=True).check(*requests)


@pytest.mark.parametrize("at", range(1, 5))
def test_a_failed_resize_ends_the_sequences_of_that_step(sampler, at):
    requests, hit = [], []
    with failing(sampler.runner.models[0].cache, "resize", at, MemoryError("slots")) as calls:
        for i in range(6):  # each longer than those before: the slots grow
            params = SamplingParams(max_tokens=9, seed=1)
            requests.append(sampler.submit(IDS[: 12 * i + 5], "joy=1", params))
            sampler.step()
            if len(calls) >= at and not hit:
                hit = [r for r in requests if r.finished and r.completions[0].error]
                assert hit and hit[-1] is requests[-1]
        sampler.finish(requests)
    failed = [r for r in requests if r.completions[0].error]
    assert failed == hit
    assert {r.completions[0].error for r in hit} == {"MemoryError: slots"}
    again = good_ones(sampler, 4)
    sampler.finish(again)
    Alone(24).check(*requests, *again)


def test_a_failed_copy_does_not_end_the_next_one_in_the_queue(sampler):
    requests = [sampler.submit(IDS[:30], "joy=1", SamplingParams(max_tokens=9, seed=1))]
    sampler.step()
    sampler.step()
    with failing(sampler.runner, "copy", 1, torch.OutOfMemoryError("copy")):
        for ids in (IDS[:28], IDS[50:60]):
            requests.append(sampler.submit(ids, "joy=1", SamplingParams(max_tokens=3, seed=1)))
        sampler.finish(requests)
    errors = [r.completions[0].error for r in requests]
    assert errors == ["OutOfMemoryError: copy", "OutOfMemoryError: copy", None]
    Alone().check(requests[2])


class Tokenizer:
    """The policy's tokenizer, but its `decode` fails at the call numbers in `at`."""

    def __init__(self, inner, at):
        self.inner, self.at, self.calls = inner, at, 0

    def __call__(self, text):
        return self.inner(text)

    def decode(self, *args, **kwargs):
        self.calls += 1
        if self.calls in self.at:
            raise OverflowError("no such id")
        return self.inner.decode(*args, **kwargs)


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_a_tokenizer_that_fails_ends_the_sequence_whose_text_it_was(sampler, monkeypatch, stop):
    requests = good_ones(sampler, 4, stop=stop)
    tokenizer = Tokenizer(spread_policy().tokenizer, ())
    for request in requests:
        request.tokenizer = tokenizer
        for sequence in request.sequences:
            if sequence.stop_text is not None:
                sequence.stop_text.tokenizer = tokenizer
    tokenizer.at = {2, 21} if stop else {3}
    sampler.finish(requests)
    failed = [r.completions[0].error for r in requests if r.completions[0].error]
    assert failed == ["OverflowError: no such id"] * (2 if stop else 1)
    assert sampler.unfinished == 0
    Alone().check(*requests)


@pytest.mark.parametrize("where", ["prefill", "decode", "copy", "decode after it"])
def test_ctrl_c_in_generate_leaves_its_requests_nowhere_and_the_others_right(sampler, where):
    """Other requests of the sampler go on as if the step had not been."""
    other = good_ones(sampler, 2, max_tokens=12)
    sampler.step()
    sampler.step()
    if where == "decode after it":  # the step has drawn; the sequences do not have the tokens yet
        owner, name, at = sampler.runner, "top_logprobs", 2
    elif where == "copy":
        owner, name, at = sampler.runner, "copy_each", 1
    elif where == "prefill":
        owner, name, at = spread_policy().model.model.layers[2].mlp, "forward", 1
    else:  # in the third layer of the fourth step
        owner, name, at = Decode, "attend", 3 * spread_policy().model.config.num_hidden_layers + 3
    # The second copies the first's prompt.
    prompts = [IDS[:30], IDS[:30], IDS[40:60]]
    with failing(owner, name, at, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        sampler.generate(prompts, [0.25, 0.75], SamplingParams(seed=1))
    assert [s for q in other for s in q.sequences if not s.completion] == [
        *sampler.scheduler.running, *sampler.scheduler.waiting
    ]  # fmt: skip
    after = [sampler.submit(p, [0.25, 0.75], SamplingParams(seed=1, max_tokens=5)) for p in prompts]
    sampler.finish([*other, *after])
    whole_and_right(*other, *after)


def test_a_sequence_that_was_done_when_ctrl_c_came_draws_no_more(sampler):
    (last,) = good_ones(sampler, 1, max_tokens=3)
    sampler.step()
    sampler.step()
    stopped = failing(sampler.scheduler, "remove", 1, KeyboardInterrupt())
    with stopped, pytest.raises(KeyboardInterrupt):
        sampler.step()
    assert not last.finished
    sampler.finish([last])
    Alone().check(last)


def test_ctrl_c_between_two_lines_loses_no_token_no_text_and_no_copy():
    """At every line of what a step writes down, when it comes to it first and last; then the
    sampler goes on."""
    written = (Scheduler.prefilled, Sequence.append, Text.add, Text.search)
    codes = {function.__code__ for function in written}
    params = [
        SamplingParams(max_tokens=8, seed=1, n=2, stop=["the", " a"]),
        without_end(6, seed=3, logprobs=2),
        SamplingParams(max_tokens=7, seed=4, stop=["e"]),
    ]

    def run(at):
        """What the requests get if line `at` is not reached, and the lines that there were."""
        seen, sampler = [], Sampler(spread_policy(), max_batch_size=3)

        def trace(frame, event, arg):
            if frame.f_code not in codes:
                return None
            if event == "line":
                seen.append((frame.f_code, frame.f_lineno))
                if len(seen) == at:
                    raise KeyboardInterrupt
            return trace

        ids = [IDS[:20], IDS[:20], IDS[30:34]]
        requests = [sampler.submit(i, [0.5, 0.5], p) for i, p in zip(ids, params, strict=True)]
        before = sys.gettrace()
        while sampler.unfinished:
            sys.settrace(trace)
            try:
                sampler.step()
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)
        return [c for request in requests for c in request.completions], seen

    wanted, lines = run(0)
    assert len(lines) > 100 and {c.finish_reason for c in wanted} == {"stop", "length"}
    last = {line: at for at, line in enumerate(lines, 1)}
    first = {line: len(lines) - at for at, line in enumerate(reversed(lines))}
    assert {code for code, _ in first} == codes
    for at in sorted({*first.values(), *last.values()}):
        got, _ = run(at)
        for mine, other in zip(got, wanted, strict=True):
            assert (mine.token_ids, mine.text) == (other.token_ids, other.text), at
            assert mine.finish_reason == other.finish_reason
            assert mine.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
            assert len(mine.top_logprobs or ()) == len(other.top_logprobs or ())


FAULTS = {
    "a fault of Python's": AttributeError("a fault"),
    "which PyTorch reports": RuntimeError("a fault"),
    "which an op refuses": ValueError("a fault"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", ["next_batch", "prefilled", "remove", "apply", "top_logprobs",
                                  "place", "advance", "vacate", "copy", "resize"])  # fmt: skip
def test_a_fault_of_the_sampler_is_raised_and_ends_no_request(sampler, name, fault):
    """The sampler goes on as after Ctrl-C."""
    requests = good_ones(sampler, 2, max_tokens=5)
    sampler.step()
    requests += good_ones(sampler, 3, max_tokens=3, n=2)
    runner = sampler.runner
    owner = next(o for o in (sampler.scheduler, runner, runner.state) if hasattr(o, name))
    with failing(owner, name, 1, fault), pytest.raises(type(fault), match="a fault"):
        while sampler.unfinished:
            sampler.step()
    assert not any(c.error for request in requests for c in request.completions)
    sampler.finish(requests)
    whole_and_right(*requests)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("plan", [Prefill, Decode])
def test_a_fault_of_the_attention_is_raised_and_ends_no_request(sampler, plan, recorded):
    """Though a model calls it, whose own errors end the sequences of the forward."""
    source = "def attend(plan, *_): plan.cash.layer(0)"
    exec(source, module := {"__name__": "clp.engine.attention"})
    requests = good_ones(sampler, 2, max_tokens=5)
    sampler.runner.models[0].recording_is_valid &= recorded
    with (
        patch.object(plan, "attend", module["attend"]),
        pytest.raises(AttributeError, match="cash"),
    ):
        while sampler.unfinished:
            sampler.step()
    assert not any(c.error for request in requests for c in request.completions)
    sampler.finish(requests)
    whole_and_right(*requests)


def test_a_fault_of_a_draw_is_raised(sampler):
    """It is not taken for logits that are not finite."""
    requests = good_ones(sampler, 2, max_tokens=5)
    state = sampler.runner.state
    sampler.step()
    right, state.seed = state.seed, state.seed[:, None]
    with pytest.raises(ValueError, match="seed must be a number or have shape"):
        while sampler.unfinished:
            sampler.step()
    state.seed = right
    sampler.finish(requests)
    whole_and_right(*requests)


# Streams


def random_stops(rng, text):
    """Stop strings: pieces of the text that will come, near misses, and others."""
    found = []
    for _ in range(rng.randint(0, 3)):
        if text and rng.random() < 0.7:
            at = rng.randrange(len(text))
            piece = text[at : at + rng.randint(1, 6)]
            found.append(piece + rng.choice(["", "", "\u00e9x", "<eos>"]))
        else:
            found.append(rng.choice(["zq", "\n", "\u6f22", " the the", "<eos>", "<eos> ", "bos>"]))
    return found


@pytest.mark.parametrize("round_", range(6))
def test_streams_tell_the_completions_text(sampler, round_):
    """Interleaved, dropped and cancelled; stops that nearly match; characters of several tokens."""
    rng = random.Random(round_)
    tokenizer = spread_policy().tokenizer
    begun = ["Tom \u6f22\u5b57\u00e9 ", "\U0001f388\U0001f388 a", "One day, the old dog"]
    requests, streams, read = [], [], []
    for _ in range(6):
        ids = tokenizer(rng.choice(begun))["input_ids"]
        ids = ids[: rng.randint(1, len(ids))]  # may end inside a character
        params = {
            "max_tokens": rng.randint(1, 14), "seed": rng.randrange(3), "n": rng.randint(1, 3),
            # Hot: bytes of half characters are likely.
            "temperature": rng.choice([1.0, 3.0]), "ignore_eos": rng.random() < 0.5,
            "stop_token_ids": rng.sample(range(1024), rng.choice([0, 100])),
        }  # fmt: skip
        weights = [rng.choice([0.0, 0.5, 1.0])] * 2
        weights[1] = 1 - weights[0]
        # What comes without stops, to cut stops from.
        free = sampler.submit(ids, weights, SamplingParams(**params))
        sampler.finish([free])
        stop = random_stops(rng, free.completions[0].text)
        requests.append(sampler.submit(ids, weights, SamplingParams(**params, stop=stop)))
        streams.append(sampler.stream(requests[-1]))
        read.append([])
    alive, cancelled, dropped = list(range(6)), rng.randrange(6), rng.randrange(6)
    while alive:
        i = rng.choice(alive)
        for _ in range(rng.randint(1, 4)):
            item = next(streams[i], None)
            if item is None:
                alive.remove(i)
                break
            read[i].append(item)
        if i == cancelled and len(read[i]) > 3:
            sampler.cancel(requests[i])
        if i == dropped and i in alive:
            streams[i].close()
            alive.remove(i)
    sampler.finish(requests)
    for i, request in enumerate(requests):
        for c in request.completions:
            items = [item for item in read[i] if item.index == c.index]
            text = "".join(item.text for item in items)
            if i == dropped:
                assert c.text.startswith(text)
                continue
            assert text == c.text, (request.params.stop, c)
            assert [x.token_id for x in items if x.token_id is not None] == c.token_ids
            assert [x.finish_reason for x in items[:-1]] == [None] * (len(items) - 1)
            assert items[-1].finish_reason == c.finish_reason
            assert not any(s in text for s in request.params.stop)


# Many


def resident():
    """Bytes of this process in memory, after freed memory has gone back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def living():
    """How many sequences, requests and tensors there are."""
    gc.collect()
    kinds = (Sequence, Request, torch.Tensor)
    return [sum(issubclass(type(o), kind) for o in gc.get_objects()) for kind in kinds]


def test_thousands_of_requests_a_tenth_of_them_bad_leave_no_memory_behind(one_thread):
    """CLP_REQUESTS=10000 runs more of them (2,000 otherwise)."""
    count = int(os.environ.get("CLP_REQUESTS", "2000"))
    rng = random.Random(0)
    sampler = with_blocks(128, max_batch_size=64)
    answered = refused = wild = 0

    def some(number):
        nonlocal answered, refused, wild
        open_requests = []
        for i in range(number):
            if i % 10 == 0:
                refuse(sampler, rng.choice(BAD))
                refused += 1
                continue
            first = rng.random()
            finite = rng.random() > 0.01
            open_requests.append((finite, sampler.submit(
                IDS[(at := rng.randrange(40)) : at + rng.randint(1, 20)],
                rng.choice([[first, 1 - first], "joy=1", [2.0, -1.0]]) if finite else [1e30, 1e30],
                SamplingParams(
                    max_tokens=rng.randint(1, 4), temperature=rng.choice([0, 1.0]), n=1,
                    top_k=rng.choice([0, 5]), top_p=rng.choice([1, 0.9]), seed=i,
                    min_p=rng.choice([0, 0.1]), logprobs=rng.choice([0, 0, 2]),
                    stop=rng.choice([(), (), ("e",)]), stop_token_ids=rng.choice([(), (7,)]),
                ),
                simplex=False,
            )))  # fmt: skip
        while sampler.unfinished:
            sampler.step()
        for finite, request in open_requests:
            (c,) = request.completions
            assert (c.error is None) == finite, c
            assert c.finish_reason in (("stop", "length") if finite else ("error",))
            answered, wild = answered + finite, wild + (not finite)

    some(count // 5)
    memory, objects = resident(), living()
    for _ in range(8):
        some(count // 10)
        # A request and its sequences refer to each other: between collections thousands wait for
        # one, and not all of their memory is given back.
        after = resident()
    later = living()
    assert answered + refused + wild == count // 5 + 8 * (count // 10)
    assert (refused, sampler.unfinished) == (count // 10, 0)
    assert after <= 1.02 * memory
    # Sequences that slots contain, at most one each, with their requests' weights.
    slots = sampler.max_batch_size
    assert all(b - a <= slots for a, b in zip(objects, later, strict=True)), (objects, later)
    print(f"{answered} answered, {refused} refused, {wild} not finite; memory {after / memory:.4f}")
