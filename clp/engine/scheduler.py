"""Which sequence runs in which slot, and what is prefilled next: bookkeeping without tensors.

The scheduler decides, and lists in `actions` what must be done to the slots for it. The sampler
hands the actions to the runner, in order, before each forward.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from clp.engine.kv_cache import Segment, rounded
from clp.engine.sequence import Sequence

# A shorter common prefix is computed again: to copy it takes as long.
LEAST_SHARED = 16


class Resize(NamedTuple):
    """The cache gets so many slots of so many tokens; what fits is kept."""

    slots: int
    capacity: int


class Copy(NamedTuple):
    """The first `tokens` tokens of a slot are copied into another."""

    source: int
    target: int
    tokens: int


class CopyEach(NamedTuple):
    """The first `tokens` tokens of each source slot are copied into its target slot."""

    sources: list[int]
    targets: list[int]
    tokens: int


class Place(NamedTuple):
    """Sequences begin in the slots from `first` on."""

    first: int
    sequences: list[Sequence]


class Move(NamedTuple):
    """A sequence with so many cached `tokens` moves into another slot."""

    source: int
    target: int
    tokens: int


class Clear(NamedTuple):
    """Zeros are written into a slot."""

    slot: int


class Vacate(NamedTuple):
    """A slot is free."""

    slot: int


# Each may be repeated as long as the next one has not begun: Ctrl-C may come in the middle.
Action = Resize | Copy | CopyEach | Place | Move | Clear | Vacate


class PrefillBatch(NamedTuple):
    """What one forward prefills.

    Attributes:
        parts: Sequences and the tokens of their prompts.
        copies: Sequences that copy their whole prompt from a source slot after the forward.
    """

    parts: list[tuple[Sequence, Segment]]
    copies: list[tuple[int, Sequence]]

    @property
    def tokens(self) -> int:
        """Tokens of the forward."""
        return sum(segment.stop - segment.start for _, segment in self.parts)

    @property
    def sequences(self) -> list[Sequence]:
        """All of its sequences."""
        return [s for s, _ in self.parts] + [s for _, s in self.copies]


class Scheduler:
    """Requests in the order of their submission, in at most `max_slots` slots.

    Args:
        max_slots: Sequences that run together at most.
        fits: (slots, tokens per slot) -> whether there is memory for them.

    Attributes:
        waiting: Sequences without a slot, first come, first served.
        running: Sequence i is in slot i. Those whose prompts are not yet prefilled are the last.
        contents: By slot, the sequence whose keys and values it has, also after that has ended.
        slots, capacity: Slots of the cache and tokens per slot, once the actions are done.
        actions: What is to be done to the slots, in order. The caller takes each out when done.
    """

    def __init__(self, max_slots: int, fits: Callable[[int, int], bool]) -> None:
        self.max_slots, self.fits = max_slots, fits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.contents: list[Sequence | None] = [None] * max_slots
        self.slots = self.capacity = 0
        self.actions: deque[Action] = deque()

    @property
    def decoding(self) -> list[Sequence]:
        """The sequences that take part in a decode step, in the slots from 0 on.

        After an interrupted step a sequence that could decode may be behind one that is not
        prefilled, and waits for it.
        """
        return list(itertools.takewhile(lambda sequence: sequence.prefilled, self.running))

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Puts sequences at the end of the queue."""
        self.waiting.extend(sequences)

    # Prefill

    def next_batch(self, budget: int, *, invariant: bool = False) -> PrefillBatch:
        """The next prefill batch, of at most `budget` tokens; admits sequences from the queue.

        A prompt that has a prefix in common with what a slot contains (under the same key) copies
        it from there. If that prefix is of this very batch, the sequence waits for the next batch,
        or for the end of this one if it is the whole prompt. With `invariant` a batch is one
        prompt, and only whole prompts are copied: a prompt's bits depend on how it is cut.
        """
        batch = PrefillBatch([], [])
        cached: dict[int, int] = {}  # by slot, tokens in the cache after this batch

        def take(sequence: Sequence, slot: int) -> bool:
            """Plans the next tokens of a prompt; whether that is all of them."""
            nonlocal budget
            missing = sequence.request.prefill_length - sequence.prompt_cached
            count = min(missing, budget)
            stop = cached[slot] = sequence.prompt_cached + count
            if count:
                batch.parts.append((sequence, Segment(slot, sequence.prompt_cached, stop)))
            budget -= count
            return count == missing

        for slot, sequence in enumerate(self.running):
            if not sequence.prefilled and (not take(sequence, slot) or invariant):
                return batch
        first = len(self.running)
        for _ in range(self._make_room()):
            if budget <= 0 or (invariant and batch.parts):
                break
            sequence = self.waiting[0]
            sequence.key = sequence.request.cache_key
            if invariant:
                sequence.key += b"|" + repr(sequence.request.prompt_ids).encode()
            source, shared = self._shared_prefix(sequence, cached, invariant)
            whole = shared == sequence.request.prefill_length
            content = None if source is None else self.contents[source]
            pending = content is not None and shared > content.cached
            if pending and not whole:
                break
            self.waiting.popleft()
            slot = sequence.slot = len(self.running)
            self.running.append(sequence)
            self.contents[slot] = sequence
            if source is not None and pending:
                batch.copies.append((source, sequence))
                continue
            if source is not None:
                if source != slot:
                    self.actions.append(Copy(source, slot, shared))
                sequence.prompt_cached = shared
            if not take(sequence, slot):
                break
        if len(self.running) > first:
            self.actions.append(Place(first, self.running[first:]))
        return batch

    def prefilled(self, batch: PrefillBatch) -> None:
        """The forward of a batch has run."""
        for sequence, segment in batch.parts:
            sequence.prompt_cached = segment.stop
        if batch.copies:
            sources = [source for source, _ in batch.copies]
            targets = [sequence.slot for _, sequence in batch.copies if sequence.slot is not None]
            most = max(sequence.request.prefill_length for _, sequence in batch.copies)
            # First: after Ctrl-C between the two, keys that nobody copied would count as cached.
            self.actions.append(CopyEach(sources, targets, most))
            for _, sequence in batch.copies:
                sequence.prompt_cached = sequence.request.prefill_length

    def _shared_prefix(
        self, sequence: Sequence, cached: dict[int, int], invariant: bool
    ) -> tuple[int | None, int]:
        """The slot with the longest prefix of the prompt, and its number of tokens."""
        wanted = sequence.request.prompt_ids[:-1]
        best, shared = None, 0
        for slot, content in enumerate(self.contents):
            if content is None or content.key != sequence.key:
                continue
            ids = itertools.chain(content.request.prompt_ids, content.token_ids)
            count = min(cached.get(slot, content.cached), len(wanted))
            same = 0
            for own, other in zip(wanted[:count], ids, strict=False):
                if own != other:
                    break
                same += 1
            if same > shared:
                best, shared = slot, same
        if shared < len(wanted) and (shared < LEAST_SHARED or invariant):
            return None, 0
        return best, shared

    # Memory

    def _make_room(self) -> int:
        """How many sequences of the queue get slots now, in order; makes room for them."""
        count = len(self.running)
        length = max((s.request.cache_length for s in self.running), default=0)
        admitted, longest = 0, length
        for sequence in itertools.islice(self.waiting, self.max_slots - count):
            longest = max(longest, sequence.request.cache_length)
            if not self.fits(count + admitted + 1, longest):
                break
            admitted, length = admitted + 1, longest
        if admitted:
            self.reserve(count + admitted, length)
        return admitted

    def reserve(self, slots: int, length: int) -> None:
        """At least so many slots of at least so many tokens, which must fit.

        The number of slots grows by half more than asked for, as far as memory allows.
        """
        capacity = max(self.capacity, rounded(length))
        if not self.fits(slots, capacity):
            capacity = rounded(length)  # the longer sequences have ended
        wanted = self.slots
        if slots > wanted:
            wanted = min(self.max_slots, slots + slots // 2)
        while wanted > slots and not self.fits(wanted, capacity):
            wanted -= 1
        if (wanted, capacity) == (self.slots, self.capacity):
            return
        self.slots, self.capacity = wanted, capacity
        self.actions.append(Resize(wanted, capacity))
        for slot, content in enumerate(self.contents):
            # A slot that has become shorter has lost the end of a longer sequence.
            if slot >= wanted or (content is not None and content.cached > capacity):
                self.contents[slot] = None

    def no_memory(self) -> list[Sequence]:
        """The next action has failed for lack of memory; the sequences that must end for it.

        If the action is CopyEach, those are its targets. Else the cache is lost, and with it all
        sequences up to the one that room was made for; those admitted after it wait again.
        """
        action = self.actions.popleft()
        if isinstance(action, CopyEach):
            return [self.running[slot] for slot in sorted(action.targets, reverse=True)]
        last = next((a.first for a in self.actions if isinstance(a, Place)), len(self.running))
        if isinstance(action, Copy):
            last = action.target
        self.actions.clear()
        self.slots = self.capacity = 0
        self.contents = [None] * self.max_slots
        for sequence in self.running[:last:-1]:
            sequence.slot, sequence.prompt_cached = None, 0
            self.waiting.appendleft(sequence)
        del self.running[last + 1 :]
        return self.running[::-1]

    # Ends

    def remove(self, sequence: Sequence, *, keep: bool) -> None:
        """Takes a sequence out of the queue or its slot.

        The last decoding sequence moves into the slot, and the last of all into that one's.

        Args:
            keep: Whether others may copy its keys and values; else the slot is cleared.
        """
        slot = sequence.slot
        if slot is None:
            self.waiting.remove(sequence)
            return
        if not keep:
            # Attention multiplies what it does not see by 0, and 0 * NaN is NaN.
            self.contents[slot] = None
            if slot < self.slots:
                self.actions.append(Clear(slot))
        last = ready = len(self.running) - 1
        while ready >= 0 and not self.running[ready].prefilled:
            ready -= 1
        for source in (ready, last):
            if source > slot:
                moved = self.running[slot] = self.running[source]
                self.actions.append(Move(source, slot, moved.cached))
                moved.slot, self.contents[slot], self.contents[source] = slot, moved, None
                if not moved.token_ids:  # whether its keys are finite is not known yet
                    self.actions.append(Clear(source))
                slot = source
        self.running.pop()
        sequence.slot = None
        self.actions.append(Vacate(slot))

    def forget(self) -> None:
        """Nothing is copied from a sequence that has ended."""
        self.contents = [*self.running, *[None] * (self.max_slots - len(self.running))]
