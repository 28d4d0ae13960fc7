"""The scheduler by itself: random submits, steps, ends and cancels, without a model."""

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from clp.engine.kv_cache import BLOCK, rounded
from clp.engine.requests import SamplingParams
from clp.engine.scheduler import (
    LEAST_SHARED,
    Clear,
    Copy,
    CopyEach,
    Move,
    Place,
    Resize,
    Scheduler,
    Vacate,
)
from clp.engine.sequence import Request

IDS = list(range(100, 180))
PROMPTS = [IDS[:40], IDS[:40], [*IDS[:30], 7], IDS[:21], IDS[:17], IDS[:60], [5], [5, 6], IDS[9:]]


def request(ids, key=b"a", max_tokens=4, n=1):
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return Request(None, ids, None, params, frozenset(), key, max_tokens, 1, 0)


class Slots:
    """What the slots contain if the actions are done: (key, token ids), or None after zeros."""

    def __init__(self):
        self.contents, self.capacity, self.free = [], 0, set()

    def apply(self, action):
        match action:
            case Resize(slots, capacity):
                kept = [c and (c[0], c[1][:capacity]) for c in self.contents[:slots]]
                self.contents, self.capacity = kept + [None] * (slots - len(kept)), capacity
            case Copy(source, target, tokens) | Move(source, target, tokens):
                self.copy(source, target, tokens)
            case CopyEach(sources, targets, tokens):
                for source, target in zip(sources, targets, strict=True):
                    self.copy(source, target, tokens)
            case Place(first, sequences):
                assert [s.slot for s in sequences] == list(range(first, first + len(sequences)))
            case Clear(slot):
                self.contents[slot] = None
            case Vacate(slot):
                assert slot < len(self.contents)

    def copy(self, source, target, tokens):
        key, ids = self.contents[source] or (None, [])
        self.contents[target] = (key, ids[:tokens])

    def write(self, slot, key, start, ids):
        """A forward writes tokens from position `start` on, behind those that it attends to."""
        before = self.contents[slot][1][:start] if self.contents[slot] else []
        assert len(before) == start and start + len(ids) <= self.capacity
        assert not start or self.contents[slot][0] == key
        self.contents[slot] = (key, before + ids)


class Machine(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 5), budget=st.sampled_from([3, 24, 200]),
        blocks=st.sampled_from([5, 8, 30]), alone=st.booleans(),
    )  # fmt: skip
    def start(self, slots, budget, blocks, alone):
        self.limit, self.budget, self.alone = blocks * BLOCK, budget, alone
        self.scheduler = Scheduler(slots, lambda k, n: k * rounded(n) <= self.limit)
        self.slots, self.submitted, self.ended = Slots(), [], set()
        self.interrupted = False

    def apply(self):
        actions = self.scheduler.actions
        while actions:
            if isinstance(actions[0], Copy):
                self.check_copy(actions[0])
            self.slots.apply(actions.popleft())

    def unfinished(self):
        return [s for r in self.submitted for s in r.sequences if id(s) not in self.ended]

    @rule(
        ids=st.sampled_from(PROMPTS), key=st.sampled_from([b"a", b"b"]), n=st.integers(1, 3),
        max_tokens=st.integers(1, 6),
    )  # fmt: skip
    def submit(self, ids, key, n, max_tokens):
        made = request(ids, key, max_tokens, n)
        if self.scheduler.fits(1, made.cache_length):
            self.submitted.append(made)
            self.scheduler.add(made.sequences)

    @rule(fails=st.sampled_from([False, False, False, True]), until=st.integers(1, 3))
    def step(self, fails, until):
        budget = self.budget
        for _ in range(until):
            if budget <= 0:
                break
            queue = list(self.scheduler.waiting)
            batch = self.scheduler.next_batch(budget, invariant=self.alone)
            # First come, first served.
            admitted = len(queue) - len(self.scheduler.waiting)
            assert queue[admitted:] == list(self.scheduler.waiting)
            assert queue[:admitted] == self.scheduler.running[-admitted or None :][:admitted]
            assert batch.tokens <= budget
            assert len({id(s) for s in batch.sequences}) == len(batch.sequences)
            assert not self.alone or len(batch.parts) <= 1
            self.apply()
            if fails and batch.sequences:
                for s in sorted(batch.sequences, key=lambda s: -s.slot):
                    self.end(s, keep=False)
                self.apply()
                break
            for s, (slot, start, stop) in batch.parts:
                assert slot == s.slot and start == s.prompt_cached < stop
                self.slots.write(slot, s.key, start, s.request.prompt_ids[start:stop])
            for source, s in batch.copies:
                wanted = s.request.prompt_ids[:-1]
                assert self.slots.contents[source][0] == s.key
                assert self.slots.contents[source][1][: len(wanted)] == wanted
            self.scheduler.prefilled(batch)
            self.apply()
            if not batch.sequences:
                break
            budget -= batch.tokens
        decoding = self.scheduler.decoding
        assert [s.slot for s in decoding] == list(range(len(decoding)))
        over = []
        for s in decoding:
            ids = s.request.prompt_ids + s.token_ids
            self.slots.write(s.slot, s.key, s.cached, ids[s.cached : s.cached + 1])
            if s.append(len(ids), 0.0, None):
                over.append(s)
        for s in reversed(over):
            self.end(s, keep=True)
        self.apply()

    def check_copy(self, action):
        """A prefix is copied only from a slot that has it under the same key."""
        target = self.scheduler.running[action.target]
        key, ids = self.slots.contents[action.source]
        wanted = target.request.prompt_ids[:-1]
        assert key == target.key and ids[: action.tokens] == wanted[: action.tokens]
        assert action.tokens == len(wanted) or (action.tokens >= LEAST_SHARED and not self.alone)

    def end(self, sequence, keep):
        self.scheduler.remove(sequence, keep=keep)
        self.ended.add(id(sequence))

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def cancel(self, data):
        sequence = data.draw(st.sampled_from(self.unfinished()))
        self.end(sequence, keep=bool(sequence.token_ids))
        self.apply()

    @rule(copies=st.booleans())
    def lose_memory(self, copies):
        """The first Resize, or the first Copy, of the next batch fails; without one, Ctrl-C comes
        between the actions and the forward."""
        self.scheduler.next_batch(self.budget, invariant=self.alone)
        actions, before = self.scheduler.actions, self.unfinished()
        while actions and not isinstance(actions[0], Copy if copies else Resize):
            self.slots.apply(actions.popleft())
        if actions:
            self.slots.contents, self.slots.capacity = [], 0
            for s in self.scheduler.no_memory():
                assert id(s) not in self.ended
                self.end(s, keep=False)
            actions.clear()
            assert not self.scheduler.running
            assert list(self.scheduler.waiting) == self.unfinished()
            assert len(self.unfinished()) < len(before)
        else:
            self.interrupted = True
            self.scheduler.forget()

    @invariant()
    def consistent(self):
        if not hasattr(self, "scheduler"):
            return
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        # Nothing is lost, nothing is twice; the running ones have come first.
        assert sorted(map(id, running + waiting)) == sorted(map(id, self.unfinished()))
        assert waiting == self.unfinished()[len(running) :]
        # Compact in slots 0 to k - 1; those that decode are the first.
        assert [s.slot for s in running] == list(range(len(running)))
        assert all(s.slot is None for s in waiting)
        decoding = self.scheduler.decoding
        assert decoding == running[: len(decoding)] and all(s.prefilled for s in decoding)
        assert self.interrupted or not any(s.prefilled for s in running[len(decoding) :])
        # Memory
        scheduler = self.scheduler
        assert scheduler.slots * scheduler.capacity <= self.limit
        assert len(running) <= scheduler.slots <= scheduler.max_slots
        assert all(s.request.cache_length <= scheduler.capacity for s in running)
        assert (len(self.slots.contents), self.slots.capacity) == (
            scheduler.slots, scheduler.capacity
        )  # fmt: skip
        # The slots contain what the scheduler says.
        for slot, s in enumerate(scheduler.contents):
            if s is not None and s.cached:
                key, ids = self.slots.contents[slot]
                assert key == s.key
                assert ids[: s.cached] == (s.request.prompt_ids + s.token_ids)[: s.cached]
        assert scheduler.contents[: len(running)] == running

    def teardown(self):
        if hasattr(self, "scheduler"):
            for _ in range(2000):
                if not self.unfinished():
                    return
                self.step(False, 3)
            raise AssertionError("a request waits for ever")


TestScheduler = Machine.TestCase
# A failing example is not made smaller: that takes minutes, and its steps say enough.
TestScheduler.settings = settings(phases=[Phase.generate], max_examples=150, stateful_step_count=30)


def filled(prompts, **options):
    """A scheduler whose sequences have been prefilled, and the sequences."""
    scheduler = Scheduler(4, lambda slots, length: True)
    sequences = [s for ids in prompts for s in request(ids, **options).sequences]
    scheduler.add(sequences)
    scheduler.prefilled(scheduler.next_batch(1000))
    scheduler.actions.clear()
    return scheduler, sequences


def test_the_last_decoding_sequence_moves_into_a_free_slot_and_the_last_of_all_into_its():
    scheduler, (a, b, c) = filled([IDS[:9], IDS[20:29], IDS[40:49]])
    for s in (a, b, c):
        s.append(5, 0.0, None)
    (d,) = request(IDS[:60], b"b").sequences
    scheduler.add([d])
    scheduler.prefilled(scheduler.next_batch(20))
    scheduler.actions.clear()
    assert not d.prefilled
    scheduler.remove(a, keep=True)
    assert list(scheduler.actions) == [Move(2, 0, 9), Move(3, 2, 20), Clear(3), Vacate(3)]
    assert scheduler.running == [c, b, d] == scheduler.contents[:3]


def test_copies_of_a_prompt_wait_for_the_end_of_its_forward():
    scheduler = Scheduler(4, lambda slots, length: True)
    scheduler.add(request(IDS[:30], n=3).sequences)
    batch = scheduler.next_batch(1000)
    assert batch.tokens == 29 and [source for source, _ in batch.copies] == [0, 0]
    scheduler.prefilled(batch)
    assert scheduler.actions[-1] == CopyEach([0, 0], [1, 2], 29)
    assert len(scheduler.decoding) == 3


@pytest.mark.parametrize("keep", [True, False])
def test_a_sequence_that_has_ended_is_a_source_if_it_is_kept(keep):
    scheduler, (a,) = filled([IDS[:30]])
    a.append(5, 0.0, None)
    scheduler.remove(a, keep=keep)
    other, same = request(IDS[:30], b"b").sequences[0], request(IDS[:30]).sequences[0]
    scheduler.add([other, same])
    batch = scheduler.next_batch(1000)
    # The other one takes the slot, and with it the keys and values.
    assert batch.tokens == 58
    scheduler, (a, b) = filled([IDS[:30], IDS[30:40]])
    a.append(5, 0.0, None)
    b.append(5, 0.0, None)
    scheduler.remove(b, keep=keep)
    scheduler.remove(a, keep=keep)
    scheduler.actions.clear()
    (again,) = request(IDS[30:40]).sequences
    scheduler.add([again])
    assert scheduler.next_batch(1000).tokens == (0 if keep else 9)
    assert (Copy(1, 0, 9) in scheduler.actions) == keep
