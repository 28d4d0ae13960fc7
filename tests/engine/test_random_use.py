"""The sampler as a state machine: random requests, steps, cancels and streams in any order.

After every rule the slots, the queue and the memory are consistent; in the end every completion is
the one that the request gets alone, and every slot contains what its sequence says.
"""

from collections import Counter
from contextlib import nullcontext
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from decoding_alone import Alone, keys_and_values, spread_policy, token_ids
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import clp_kernels
from clp.engine.kv_cache import BLOCK
from clp.engine.sampler import Sampler, SamplingParams

IDS = token_ids(80, 2)
# Beginnings in common of 17 to 40 tokens and shorter ones, some prompts twice as likely.
PROMPTS = [
    IDS[:40], IDS[:40], [*IDS[:30], 7], IDS[:21], IDS[:21] + IDS[50:60], IDS[:70], IDS[:18],
    [*IDS[:9], 11], [5], [5, 6], "Tom had a red kite.", "Tom had a red kite. Mia",
]  # fmt: skip
WEIGHTS = [
    "joy=1", [0, 1], [0.5, 0.5], {"joy": 0.5, "brief": 0.5}, [1.0, 0.0], [1.5, -0.5],
    [0.2, 0.7], torch.tensor([1.0, -0.0]), [1e30, 1e30],
]  # fmt: skip
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10),
    temperature=st.sampled_from([1.0, 0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), (), ("e",), (" the", "ou", "\u00e9")]),
    stop_token_ids=st.sampled_from([(), (), tuple(range(200, 330))]),
    ignore_eos=st.booleans(),
    n=st.sampled_from([1, 1, 2, 3]),
    logprobs=st.sampled_from([0, 0, 3]),
)
# A failing example is not made smaller: that takes minutes, and its steps say enough.
WITHOUT_SHRINKING = settings(phases=[Phase.generate], stateful_step_count=25)
BAD = [
    ([], "joy=1", {}), ([1024], "joy=1", {}), ("a", [float("nan"), 1.0], {}), ("a", [1.0], {}),
    (IDS[:70], "joy=1", {"max_tokens": 200}), (IDS * 2, "joy=1", {"max_tokens": 100}),
    ("a", "joy=1", {"n": 0}), (None, "joy=1", {}), ("a", "joy=1", {"stop_token_ids": [5000]}),
]  # fmt: skip


class Engine(RuleBasedStateMachine):
    """Few slots, short prefills, little memory: everything has to be shared."""

    mode = False
    events: ClassVar[Counter] = Counter()
    alone: ClassVar[dict[int, Alone]] = {}

    @initialize(
        slots=st.integers(3, 5), tokens=st.sampled_from([5, 24]), blocks=st.sampled_from([6, 8, 20])
    )
    def start(self, slots, tokens, blocks):
        self.bound = blocks * BLOCK * 2048
        sizes = {"max_batch_size": slots, "max_prefill_tokens": tokens}
        self.sampler = Sampler(spread_policy(), cache_gib=self.bound / 2**30, **sizes)
        assert self.sampler.runner.bytes_per_token == 2048
        self.judge = self.alone.setdefault(tokens, Alone(tokens, self.mode))
        self.requests, self.streams, self.read, self.cancelled = [], {}, {}, []
        self._watch()

    def _watch(self):
        """Counts what happens inside; `events` shows that all of it is tried."""
        runner, count = self.sampler.runner, self.events
        resize, prefill = runner.resize, runner.prefill

        def counting(name, function):
            return lambda *args: (count.update([name]), function(*args))

        def resizing(*args):
            before = runner.slots, runner.capacity
            resize(*args)
            after = runner.slots, runner.capacity
            for name, old, new in zip(("slots", "length"), before, after, strict=True):
                count[f"more {name}"] += old < new
                count[f"fewer {name}"] += old > new

        def prefilling(parts):
            count["prefill of several"] += len(parts) > 1
            count["chunk"] += any(s.start > 0 for _, s in parts)
            ends = [(s.stop, sequence.request.prefill_length) for sequence, s in parts]
            count["unfinished chunk"] += any(stop < length for stop, length in ends)
            prefill(parts)

        for name in ("copy", "move", "copy_each"):
            setattr(runner, name, counting(name, getattr(runner, name)))
        runner.resize, runner.prefill = resizing, prefilling

    def step_once(self):
        with clp_kernels.batch_invariant() if self.mode else nullcontext():
            self.sampler.step()
        scheduler = self.sampler.scheduler
        free = self.sampler.max_batch_size - len(scheduler.running)
        self.events["waits"] += bool(free and scheduler.waiting)

    def state(self):
        scheduler = self.sampler.scheduler
        return list(scheduler.waiting), list(scheduler.running), self.sampler.cache_bytes

    @rule(prompt=st.sampled_from(PROMPTS), weights=st.sampled_from(WEIGHTS), params=PARAMS)
    def submit(self, prompt, weights, params):
        self.requests.append(self.sampler.submit(prompt, weights, params, simplex=False))

    @rule(prompt=st.sampled_from(PROMPTS[:6]), params=PARAMS, count=st.integers(2, 4))
    def submit_alike(self, prompt, params, count):
        for _ in range(count):
            self.submit(prompt, [0.5, 0.5], params)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), params=PARAMS, more=st.sampled_from([[], [9], IDS[70:75]]))
    def submit_what_goes_on(self, data, params, more):
        """The next turn of a conversation: a prompt, its completion, and more."""
        before = data.draw(st.sampled_from(self.requests))
        ids = (before.prompt_ids + before.sequences[0].token_ids + more)[:70]
        self.submit(ids, before.weights, params)

    @rule(bad=st.sampled_from(BAD))
    def submit_bad(self, bad):
        prompt, weights, changes = bad
        before = self.state()
        with pytest.raises((ValueError, TypeError)):
            self.sampler.submit(prompt, weights, SamplingParams(**changes))
        assert self.state() == before

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.step_once()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(self.requests))
        self.events["cancel"] += not request.finished
        self.sampler.cancel(request)
        assert request.finished
        self.cancelled.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.integers(1, 8))
    def read_stream(self, data, count):
        request = data.draw(st.sampled_from(self.requests))
        stream = self.streams.setdefault(id(request), self.sampler.stream(request))
        items = self.read.setdefault(id(request), [])
        # A step of the machine's mode, not of the stream's: it reads what is there.
        for _ in range(count):
            drawn = sum(len(s.token_ids) for s in request.sequences)
            if not request.finished and len(items) >= drawn:
                self.step_once()
            elif (item := next(stream, None)) is not None:
                items.append(item)

    @rule()
    def finish(self):
        waiting = 0
        while self.sampler.unfinished:
            self.step_once()
            waiting += 1
            # FIFO: whatever is queued, a step draws or fills; no request waits for ever.
            assert waiting < 2000
        self.check_slots()

    @invariant()
    def consistent(self):
        if not hasattr(self, "sampler"):
            return
        sampler, runner, scheduler = self.sampler, self.sampler.runner, self.sampler.scheduler
        running, waiting, state = scheduler.running, list(scheduler.waiting), runner.state
        # Nothing is lost, nothing is twice, nothing overtakes.
        unfinished = [s for q in self.requests for s in q.sequences if s.completion is None]
        assert sorted(map(id, unfinished)) == sorted(map(id, running + waiting))
        assert sampler.unfinished == len(unfinished)
        order = {id(s): i for i, s in enumerate(unfinished)}
        assert [order[id(s)] for s in waiting] == sorted(order[id(s)] for s in waiting)
        if running and waiting:
            assert max(order[id(s)] for s in running) < order[id(waiting[0])]
        assert all(s.slot is None for s in waiting)
        # Sequence i is in slot i; only the last are not prefilled.
        assert [s.slot for s in running] == list(range(len(running)))
        ready = [s.prefilled for s in running]
        assert ready == sorted(ready, reverse=True)
        assert len(running) <= runner.slots <= sampler.max_batch_size
        # The device has of each sequence what the sequence says.
        count = len(running)
        assert state.active.tolist() == [1] * count + [0] * (sampler.max_batch_size - count)
        assert not state.length[count:].any()
        assert state.token.min() >= 0
        assert (scheduler.slots, scheduler.capacity) == (runner.slots, runner.capacity)
        assert not scheduler.actions
        for i, sequence in enumerate(running):
            params = sequence.request.params
            assert scheduler.contents[i] is sequence
            assert int(state.token[i]) == sequence.last_id
            assert int(state.length[i]) == sequence.length - 1
            assert int(state.drawn[i]) == len(sequence.token_ids) == len(sequence.logprobs)
            assert int(state.seed[i]) == params.seed + sequence.index
            assert int(state.top_k[i]) == params.top_k
            assert state.weights[i].tolist() == sequence.request.weights.tolist()
            assert len(sequence.token_ids) < params.max_tokens
            if sequence.token_ids:
                assert sequence.cached == sequence.length - 1
        # Memory
        assert sampler.cache_bytes <= self.bound
        for slot, content in enumerate(scheduler.contents):
            assert content is None or (slot < runner.slots and content.cached <= runner.capacity)
            if content is None or content.token_ids:
                for tensor in runner.models[0].cache.tensors():
                    assert slot >= runner.slots or tensor[slot].isfinite().all()

    def check_slots(self):
        """The slots contain what their sequences say; a later request may copy it."""
        for slot, content in enumerate(self.sampler.scheduler.contents):
            if content is None:
                continue
            request = content.request
            ids = (request.prompt_ids + content.token_ids)[: content.cached]
            if not ids or request.weights.abs().max() > 1e10:
                continue
            wanted = keys_and_values(tuple(ids), tuple(request.weights.tolist()))
            cache = self.sampler.runner.models[0].cache
            for got, want in zip(cache.tensors(), wanted, strict=True):
                torch.testing.assert_close(got[slot, :, : len(ids)], want, atol=1e-3, rtol=1e-3)

    def teardown(self):
        if not hasattr(self, "sampler"):
            return
        self.check_slots()
        self.finish()
        for request in self.requests:
            self.judge.check(request)
            if id(request) in self.streams:
                items = self.read[id(request)] + list(self.streams[id(request)])
                for completion in request.completions:
                    own = [item for item in items if item.index == completion.index]
                    assert "".join(item.text for item in own) == completion.text
                    ids = [item.token_id for item in own if item.token_id is not None]
                    assert ids == completion.token_ids
                    assert own[-1].finish_reason == completion.finish_reason
            reasons = {c.finish_reason for c in request.completions}
            if request not in self.cancelled:
                assert "abort" not in reasons
            self.events.update(reasons)


def test_any_order_of_requests_gives_what_each_gets_alone(one_thread):
    Engine.events, Engine.alone = Counter(), {}
    run_state_machine_as_test(Engine, settings=settings(WITHOUT_SHRINKING, max_examples=15))
    for name in [
        "copy", "copy_each", "move", "more slots", "more length", "fewer slots", "fewer length",
        "prefill of several", "chunk", "unfinished chunk", "waits", "cancel",
        "stop", "length", "abort", "error",
    ]:  # fmt: skip
        assert Engine.events[name], (name, Engine.events)
    compared = sum(a.compared for a in Engine.alone.values())
    assert compared > 100
    assert sum(a.flips for a in Engine.alone.values()) <= 0.02 * compared


class InvariantEngine(Engine):
    """The same in batch_invariant(): to the bit."""

    mode = True


def test_any_order_gives_the_same_bits_in_batch_invariant_mode(one_thread):
    InvariantEngine.events, InvariantEngine.alone = Counter(), {}
    few = settings(WITHOUT_SHRINKING, max_examples=5, stateful_step_count=12)
    run_state_machine_as_test(InvariantEngine, settings=few)
    for name in ["copy", "move", "chunk", "waits"]:
        assert InvariantEngine.events[name], (name, InvariantEngine.events)
