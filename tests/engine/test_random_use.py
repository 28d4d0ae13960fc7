"""The sampler as a state machine: random requests, steps, cancels and streams in any order.

After every rule the slots, the queue and the memory are consistent; in the end every completion is
the one that the request gets alone, and every slot holds what its row says.
"""

from collections import Counter
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from decoding_alone import Alone, keys_and_values, spread_policy
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

IDS = torch.randint(3, 1000, (80,), generator=torch.Generator().manual_seed(2)).tolist()
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
        policy = spread_policy()
        self.bound = blocks * BLOCK * 2048
        self.sampler = Sampler(
            policy, max_batch_size=slots, cache_gib=self.bound / 2**30, max_prefill_tokens=tokens
        )
        assert self.sampler._decoder.bytes_per_token == 2048
        self.judge = self.alone.setdefault(tokens, Alone(tokens, self.mode))
        self.requests, self.streams, self.read, self.cancelled = [], {}, {}, []
        self._watch()

    def _watch(self):
        """Counts what happens inside; `events` shows that all of it is tried."""
        decoder, count = self.sampler._decoder, self.events
        copy, move, reserve = decoder.copy, decoder.move, decoder.reserve
        prefill, spread = decoder.prefill, decoder.spread

        def copying(source, target, tokens):
            count["copy"] += 1
            copy(source, target, tokens)

        def spreading(*args):
            count["spread"] += 1
            spread(*args)

        def moving(source, target, tokens):
            count["move"] += 1
            move(source, target, tokens)

        def reserving(*args):
            before = decoder.slots, decoder.capacity
            reserve(*args)
            for name, old, new in zip(
                ("slots", "length"), before, (decoder.slots, decoder.capacity), strict=True
            ):
                count[f"more {name}"] += old < new
                count[f"fewer {name}"] += old > new

        def prefilling(parts):
            count["prefill of several"] += len(parts) > 1
            count["chunk"] += any(s.start > 0 for _, s in parts)
            count["unfinished chunk"] += any(
                s.stop < len(row.request.prompt_ids) - 1 for row, s in parts
            )
            prefill(parts)

        decoder.copy, decoder.move, decoder.spread = copying, moving, spreading
        decoder.reserve, decoder.prefill = reserving, prefilling

    def step_once(self):
        if self.mode:
            with clp_kernels.batch_invariant():
                self.sampler.step()
        else:
            self.sampler.step()
        free = self.sampler.max_batch_size - len(self.sampler._rows)
        self.events["waits"] += bool(free and self.sampler._waiting)

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
        ids = (before.prompt_ids + before.rows[0].token_ids + more)[:70]
        self.submit(ids, before.weights, params)

    @rule(bad=st.sampled_from(BAD))
    def submit_bad(self, bad):
        prompt, weights, changes = bad
        before = list(self.sampler._waiting), list(self.sampler._rows), self.sampler.cache_bytes
        with pytest.raises((ValueError, TypeError)):
            self.sampler.submit(prompt, weights, SamplingParams(**changes))
        after = list(self.sampler._waiting), list(self.sampler._rows), self.sampler.cache_bytes
        assert after == before

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
            if not request.finished and len(items) >= sum(len(r.token_ids) for r in request.rows):
                self.step_once()
                continue
            item = next(stream, None)
            if item is not None:
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
        sampler, decoder = self.sampler, self.sampler._decoder
        rows, waiting = sampler._rows, list(sampler._waiting)
        # Nothing is lost, nothing is twice, nothing overtakes.
        unfinished = [r for q in self.requests for r in q.rows if r.completion is None]
        assert sorted(map(id, unfinished)) == sorted(map(id, rows + waiting))
        assert sampler.unfinished == len(unfinished)
        order = {id(r): i for i, r in enumerate(unfinished)}
        assert [order[id(r)] for r in waiting] == sorted(order[id(r)] for r in waiting)
        if rows and waiting:
            assert max(order[id(r)] for r in rows) < order[id(waiting[0])]
        assert all(r.slot is None for r in waiting)
        # Row i is in slot i; only the last are not prefilled.
        assert [r.slot for r in rows] == list(range(len(rows)))
        ready = [r.prefilled for r in rows]
        assert ready == sorted(ready, reverse=True)
        assert len(rows) <= decoder.slots <= sampler.max_batch_size
        # The device knows of each row what the row says.
        count = len(rows)
        assert decoder.alive.tolist() == [1] * count + [0] * (sampler.max_batch_size - count)
        assert not decoder.length[count:].any()
        assert decoder.token.min() >= 0
        for i, row in enumerate(rows):
            params = row.request.params
            assert sampler._held[i] is row
            assert int(decoder.token[i]) == row.last_id
            assert int(decoder.length[i]) == row.length - 1
            assert int(decoder.drawn[i]) == len(row.token_ids) == len(row.logprobs)
            assert int(decoder.seed[i]) == params.seed + row.index
            assert int(decoder.top_k[i]) == params.top_k
            assert decoder.weights[i].tolist() == row.request.weights.tolist()
            assert len(row.token_ids) < params.max_tokens
            if row.token_ids:
                assert row.cached == row.length - 1
        # Memory
        assert sampler.cache_bytes <= self.bound
        for slot, held in enumerate(sampler._held):
            assert held is None or (slot < decoder.slots and held.cached <= decoder.capacity)
            if held is None or held.token_ids:
                for tensor in decoder.caches[0].tensors():
                    assert slot >= decoder.slots or tensor[slot].isfinite().all()

    def check_slots(self):
        """What the slots hold is what their rows say; a later request may copy it."""
        for slot, row in enumerate(self.sampler._held):
            ids = () if row is None else (row.request.prompt_ids + row.token_ids)[: row.cached]
            if not ids or row.request.weights.abs().max() > 1e10:
                continue
            wanted = keys_and_values(tuple(ids), tuple(row.request.weights.tolist()))
            for got, want in zip(self.sampler._decoder.caches[0].tensors(), wanted, strict=True):
                torch.testing.assert_close(
                    got[slot, :, : len(ids)],
                    want,
                    atol=1e-3,
                    rtol=1e-3,
                )

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
    run_state_machine_as_test(Engine, settings=settings(WITHOUT_SHRINKING, max_examples=30))
    for name in [
        "copy", "spread", "move", "more slots", "more length", "fewer slots", "fewer length",
        "prefill of several", "chunk", "unfinished chunk", "waits", "cancel",
        "stop", "length", "abort", "error",
    ]:  # fmt: skip
        assert Engine.events[name], (name, Engine.events)
    flips = sum(a.flips for a in Engine.alone.values())
    compared = sum(a.compared for a in Engine.alone.values())
    assert compared > 100
    assert flips <= 0.02 * compared


class InvariantEngine(Engine):
    """The same in batch_invariant(): to the bit."""

    mode = True


def test_any_order_gives_the_same_bits_in_batch_invariant_mode(one_thread):
    InvariantEngine.events, InvariantEngine.alone = Counter(), {}
    run_state_machine_as_test(
        InvariantEngine,
        settings=settings(WITHOUT_SHRINKING, max_examples=5, stateful_step_count=12),
    )
    for name in ["copy", "move", "chunk", "waits"]:
        assert InvariantEngine.events[name], (name, InvariantEngine.events)
