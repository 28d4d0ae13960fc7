"""The sampler: continuous batching, with a weight row for each request.

A request waits until a slot is free; its prompt is prefilled, and from then on each step draws one
token for every row at once, whatever their weights, lengths and parameters. A row that is done
leaves its slot to the next request at the following step. `clp/engine/runner.py` is what runs on
the device, `clp/engine/kv_cache.py` the slots, `clp/engine/requests.py` what is asked and answered.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clp.data.conversation import Prompt
from clp.data.weights import WeightSpec, parse_rows, parse_weights
from clp.engine.kv_cache import Segment
from clp.engine.requests import (
    MOST_TOKENS,
    Completion,
    Request,
    Row,
    SamplingParams,
    StreamedToken,
    parse_prompt,
    stream_news,
)
from clp.engine.runner import Decoder
from clp.engine.turns import one_thread
from clp.policies.interface import Steerable
from clp_kernels.invariant import is_batch_invariant

# What a model's code and PyTorch raise in a forward pass (out of memory is a RuntimeError).
STEP_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
               MemoryError, AssertionError)  # fmt: skip
# A shorter common beginning is computed again: copying it is no cheaper.
LEAST_SHARED = 16


class _Wave(NamedTuple):
    """What one prefill does: tokens of rows, and rows that copy another's prompt after it."""

    parts: list[tuple[Row, Segment]]
    late: list[tuple[Row, Row]]


class Sampler:
    """Samples from a policy; every sequence of a batch has its own weights and parameters.

    Not for several threads at once: a call raises RuntimeError while another thread's is under way.
    Several samplers of one model may run in as many threads; they take turns. Between steps the
    policy may be used and trained by others.

    Args:
        policy: A clp.Policy, or a clp.LogitMixture over several models.
        max_batch_size: Sequences decoded together.
        cache_gib: Memory for keys and values at most, in GiB. Sequences wait where it is short;
            a request that can never fit is refused. `cache_bytes` reports what is held.
        max_prefill_tokens: Tokens of prompts between two decoding steps at most, so that a long
            prompt does not hold up the others.

    Raises: ValueError for bad arguments, or a model whose attention the slots cannot serve.
    """

    def __init__(
        self,
        policy: Steerable,
        *,
        max_batch_size: int = 64,
        cache_gib: float = 4.0,
        max_prefill_tokens: int = 2048,
    ) -> None:
        for name, value in {
            "max_batch_size": max_batch_size, "max_prefill_tokens": max_prefill_tokens,
        }.items():  # fmt: skip
            if type(value) is not int or not 1 <= value <= MOST_TOKENS:
                raise ValueError(f"{name} must be an integer in [1, {MOST_TOKENS}], got {value!r}")
        if not isinstance(cache_gib, (int, float)) or not 0 < cache_gib < 2**20:
            raise ValueError(f"cache_gib must be a positive number, got {cache_gib!r}")
        self.policy = policy
        self.max_batch_size, self.max_prefill_tokens = max_batch_size, max_prefill_tokens
        self._decoder = Decoder(policy, max_batch_size, int(cache_gib * 2**30))
        self._waiting: deque[Row] = deque()
        # Row i is in slot i. All decode but the last ones, whose prompts are not yet prefilled.
        self._rows: list[Row] = []
        # What the slots' caches hold: (key, ids), also of rows that have gone.
        self._held: list[Row | None] = [None] * max_batch_size
        self._stepping = False
        self.using = threading.RLock()
        self.tokens_drawn = 0

    # Requests

    @one_thread
    def submit(
        self,
        prompt: Prompt,
        weights: WeightSpec,
        params: SamplingParams | None = None,
        *,
        simplex: bool = True,
    ) -> Request:
        """Queues a request. It runs as `step`, `stream` or `generate` run.

        Args:
            prompt: A text, a list of token ids, or a list of messages for the chat template.
            weights: A mapping from objective to weight, a string "joy=0.7,brief=0.3", or m numbers.
            params: How to sample.
            simplex: Refuse rows off the simplex (negative entries, sum other than 1).

        Raises:
            ValueError, TypeError: bad weights (see clp.data.weights.parse_weights), a prompt that
            is
                empty, outside the vocabulary, too long for the context with max_tokens, or for
                the cache; params that are no SamplingParams. The other requests go on.
        """
        row = parse_weights(weights, self.policy.objectives, simplex=simplex)
        params = SamplingParams() if params is None else params
        request = self._request(prompt, row, params, 0, "prompt")
        self._waiting.extend(request.rows)
        return request

    @one_thread
    def cancel(self, request: Request) -> None:
        """Ends what is not finished of a request with finish_reason "abort"; its slots are free."""
        for row in request.rows:
            self._end(row, "abort")

    @property
    def unfinished(self) -> int:
        """Completions that are waiting or being decoded."""
        return len(self._waiting) + len(self._rows)

    @property
    def cache_bytes(self) -> int:
        """Keys and values as they are allocated now."""
        return self._decoder.held_bytes

    def stream(self, request: Request) -> Iterator[StreamedToken]:
        """The tokens of a request as they are drawn; runs the sampler as far as needed.

        Streams of several requests may be read in turn; one that is dropped goes on unread.
        """
        seen = [0] * len(request.rows)
        texts = [request.new_text() for _ in request.rows]
        open_rows = set(range(len(request.rows)))
        while open_rows:
            news = []
            for k in sorted(open_rows):
                row = request.rows[k]
                news += stream_news(row, texts[k], seen[k])
                seen[k] = len(row.token_ids)
                if row.completion is not None:
                    open_rows.discard(k)
            yield from news
            if open_rows and not news:
                self.step()

    @one_thread
    def step(self) -> list[Completion]:
        """Fills free slots from the queue and draws one token for every row in a slot.

        Returns:
            The completions that this step finished. A row whose forward pass failed is finished
            with finish_reason "error"; the sampler goes on.
        """
        if self._stepping:
            self._recover()
        self._stepping = True
        done = self._fill()
        ready = [row for row in self._rows if row.prefilled]
        groups = [[row] for row in ready] if is_batch_invariant() else [ready] if ready else []
        ended: list[tuple[Row, str, str | None]] = []
        for group in groups:
            try:
                drawn = self._decoder.decode(group, group[0].slot or 0)
            except STEP_ERRORS as error:
                ended += [(row, "error", _reason(error)) for row in group]
                continue
            for i, (row, token, logprob) in enumerate(
                zip(group, drawn.tokens, drawn.logprobs, strict=True)
            ):
                if token < 0:
                    ended.append((row, "error", "the logits are not finite for these weights"))
                    continue
                row.cached += 1
                self.tokens_drawn += 1
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                if i in drawn.top:
                    row.top_logprobs.append(drawn.top[i])
                try:
                    if row.stopping and token not in row.request.stop_ids:
                        row.stopping.add(token)
                except STEP_ERRORS as error:  # of the tokenizer
                    ended.append((row, "error", _reason(error)))
                    continue
                if (reason := row.over) is not None:
                    ended.append((row, reason, None))
        # From the last slot down: the rows that move into holes are then those that go on.
        for row, reason, why in sorted(ended, key=lambda e: -(e[0].slot or 0)):
            done.append(self._end(row, reason, why))
        self._stepping = False
        return [completion for completion in done if completion is not None]

    @one_thread
    def generate(
        self,
        prompts: Sequence[Prompt],
        weights: WeightSpec | Sequence[WeightSpec],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        simplex: bool = True,
        progress: bool = False,
    ) -> list[Completion]:
        """Samples params.n completions for every prompt, in the order of the prompts.

        Args:
            prompts: Texts, lists of token ids, or lists of messages.
            weights: One row for all prompts, or one a prompt: a mapping from objective to weight,
                a string "joy=0.7,brief=0.3", or m numbers in the policy's order; or [B, m].
            params: One for all prompts, or one a prompt.
            simplex: Refuse rows off the simplex (negative entries, sum other than 1).
            progress: Show a progress bar, with tokens a second.

        Raises:
            ValueError, TypeError: as `submit`, naming the prompt, before anything runs; lists of
                unequal length; a text in place of the list of prompts.
            RuntimeError: a forward pass failed; the message names the first prompt and the reason.
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
        rows = parse_rows(weights, len(prompts), self.policy.objectives, simplex=simplex)
        if params is None:
            params = SamplingParams()
        if not isinstance(params, Sequence):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params must be one or {len(prompts)}, got {len(params)}")
        requests = [
            self._request(prompt, row, one, i, f"prompt {i}")
            for i, (prompt, row, one) in enumerate(zip(prompts, rows, params, strict=True))
        ]
        for request in requests:
            self._waiting.extend(request.rows)
        self.finish(requests, progress=progress)
        completions = [c for request in requests for c in request.completions]
        for c in completions:
            if c.error is not None:
                raise RuntimeError(f"prompt {c.prompt_index} failed: {c.error}")
        return completions

    @one_thread
    def finish(self, requests: Sequence[Request], *, progress: bool = False) -> None:
        """Runs until the requests are finished. Stopped halfway (Ctrl-C), they are cancelled."""
        begin, drawn = time.perf_counter(), self.tokens_drawn
        total, first = sum(len(request.rows) for request in requests), 0
        with tqdm(total=total, desc="sampling", unit="seq", disable=not progress) as bar:
            try:
                while first < len(requests):
                    bar.update(len(self.step()))
                    if progress:
                        rate = (self.tokens_drawn - drawn) / (time.perf_counter() - begin)
                        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                    while first < len(requests) and requests[first].finished:
                        first += 1
            finally:
                for request in requests[first:]:
                    self.cancel(request)

    # Scheduling

    def _request(
        self,
        prompt: Prompt,
        weights: Tensor,
        params: SamplingParams,
        prompt_index: int,
        name: str,
    ) -> Request:
        policy = self.policy
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params of {name} must be SamplingParams, got {type(params).__name__}")
        ids = parse_prompt(prompt, policy.tokenizer, policy.vocab_size, name)
        room = min(policy.context_length, self._decoder.longest + 1) - len(ids)
        most = params.max_tokens or max(1, min(room, MOST_TOKENS))
        length = len(ids) + most
        shape = f"{name} has {len(ids)} tokens; with max_tokens={most} it exceeds"
        if length > policy.context_length:
            raise ValueError(f"{shape} the context of {policy.context_length}")
        if not self._decoder.fits(1, length - 1):
            raise ValueError(f"{shape} the cache of {self._decoder.cache_bytes} bytes (cache_gib)")
        for token in params.stop_token_ids:
            if not 0 <= token < policy.vocab_size:
                raise ValueError(
                    f"stop_token_ids must be from 0 to {policy.vocab_size - 1}, got {token}"
                )
        ends = frozenset() if params.ignore_eos else policy.end_ids
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        return Request(
            policy.tokenizer,
            ids,
            weights,
            params,
            ends | frozenset(params.stop_token_ids),
            policy.cache_key(weights),
            most,
            seed,
            prompt_index,
        )

    def _fill(self) -> list[Completion | None]:
        """Prefills what fits of the queue into free slots; gives what failed."""
        failed: list[Completion | None] = []
        # Where nothing runs, the models may have changed since the caches were filled.
        if not self._rows and self._waiting and not self._decoder.renew():
            self._held = [None] * self.max_batch_size
        budget = self.max_prefill_tokens
        while budget > 0:
            running = len(self._rows)
            try:
                wave = self._wave(budget)
            except STEP_ERRORS as error:  # no memory for the slots: what they held is lost
                self._decoder.drop()
                self._held = [None] * self.max_batch_size
                rows = self._rows[::-1]
                if len(rows) == running and self._waiting:  # it is the next one's room that failed
                    rows.append(self._waiting[0])
                return failed + [self._end(row, "error", _reason(error)) for row in rows]
            if not wave.parts and not wave.late:
                break
            try:
                if wave.parts:
                    self._decoder.prefill(wave.parts)
                for row, segment in wave.parts:
                    row.cached = segment.stop
                if wave.late:
                    for _, row in wave.late:
                        row.cached = len(row.request.prompt_ids) - 1
                    self._decoder.spread(
                        [_slot(donor) for donor, _ in wave.late],
                        [_slot(row) for _, row in wave.late],
                        max(row.cached for _, row in wave.late),
                    )
            except STEP_ERRORS as error:
                hit = [row for row, _ in wave.parts] + [row for _, row in wave.late]
                for row in sorted(hit, key=_slot, reverse=True):
                    failed.append(self._end(row, "error", _reason(error)))
            if not is_batch_invariant():
                budget -= sum(s.stop - s.start for _, s in wave.parts)
        return failed

    def _wave(self, budget: int) -> _Wave:
        """Takes rows from the queue into slots: what one forward prefills, at most `budget` tokens.

        A prompt that has a beginning in common with what a slot holds (same weight row, same
        adapters) gets a copy. If that beginning is of this very wave, it waits for the next one, or
        for its end if it is the whole prompt. In batch_invariant() a wave is one prompt, and only
        whole prompts are shared: a prompt's bits depend on how it is cut.
        """
        parts: list[tuple[Row, Segment]] = []
        late: list[tuple[Row, Row]] = []
        planned: dict[int, int] = {}

        def take(row: Row) -> bool:
            """Plans the next tokens of a row; whether that is all of them."""
            missing = len(row.request.prompt_ids) - 1 - row.cached
            count = min(missing, budget)
            if count:
                parts.append((row, Segment(_slot(row), row.cached, row.cached + count)))
            planned[id(row)] = row.cached + count
            return count == missing

        alone = is_batch_invariant()
        for row in self._rows:
            if not row.prefilled:
                done = take(row)
                budget -= planned[id(row)] - row.cached
                if not done or alone:
                    return _Wave(parts, late)
        free = self._admissible()
        first = len(self._rows)
        for _ in range(free):
            if budget <= 0 or (alone and parts):
                break
            row = self._waiting[0]
            row.key = row.request.cache_key
            if alone:
                row.key += b"|" + repr(row.request.prompt_ids).encode()
            donor, shared = self._donor(row, planned)
            whole = shared == len(row.request.prompt_ids) - 1
            pending = donor is not None and shared > self._held[donor].cached  # type: ignore[union-attr]
            if pending and not whole:
                break
            self._waiting.popleft()
            row.slot = len(self._rows)
            self._rows.append(row)
            if pending:
                assert donor is not None
                giver = self._held[donor]
                assert giver is not None
                late.append((giver, row))
                self._held[row.slot] = row
                continue
            if donor is not None:
                if donor != row.slot:
                    self._decoder.copy(donor, row.slot, shared)
                row.cached = shared
            self._held[row.slot] = row
            complete = take(row)
            budget -= planned[id(row)] - row.cached
            if not complete:
                break
        if len(self._rows) > first:
            self._decoder.place(first, self._rows[first:])
        return _Wave(parts, late)

    def _admissible(self) -> int:
        """How many rows of the queue get slots now, in order; makes room for them."""
        count = len(self._rows)
        length = max((row.request.length for row in self._rows), default=0)
        fitting, longest = 0, length
        for row in itertools.islice(self._waiting, self.max_batch_size - count):
            longest = max(longest, row.request.length)
            if not self._decoder.fits(count + fitting + 1, longest):
                break
            fitting, length = fitting + 1, longest
        if fitting:
            self._decoder.reserve(count + fitting, length, self.max_batch_size)
            # A slot that has become shorter holds no more what a longer row left in it.
            for slot, held in enumerate(self._held):
                if slot >= self._decoder.slots or (held and held.cached > self._decoder.capacity):
                    self._held[slot] = None
        return fitting

    def _donor(self, row: Row, planned: dict[int, int]) -> tuple[int | None, int]:
        """The slot that holds most of the prompt's beginning, and how many tokens of it."""
        wanted, best, shared = row.request.prompt_ids[:-1], None, 0
        for slot, other in enumerate(self._held):
            if other is None or other.key != row.key:
                continue
            there = itertools.chain(other.request.prompt_ids, other.token_ids)
            count = min(planned.get(id(other), other.cached), len(wanted))
            same = 0
            for own, theirs in zip(wanted[:count], there, strict=False):
                if own != theirs:
                    break
                same += 1
            if same > shared:
                best, shared = slot, same
        if shared < len(wanted) and (shared < LEAST_SHARED or is_batch_invariant()):
            return None, 0
        return best, shared

    def _end(self, row: Row, reason: str, error: str | None = None) -> Completion | None:
        """Finishes a row, wherever it is; None if it was finished before."""
        if row.completion is not None:
            return None
        if row.slot is None:
            self._waiting.remove(row)
        else:
            # Whether keys are finite shows when the first token is drawn.
            self._leave(row.slot, spoilt=reason == "error" or not row.token_ids)
            row.slot = None
        try:
            text = row.text(reason)
        except STEP_ERRORS as failure:  # of the tokenizer
            text, reason, error = "", "error", _reason(failure)
        return row.finish(text, reason, error)

    def _leave(self, slot: int, spoilt: bool) -> None:
        """Frees a slot. The last decoding row moves into it, the row being prefilled into that."""
        if spoilt:
            # Attention weighs what it does not see with 0, and 0 * NaN is NaN.
            self._held[slot] = None
            if slot < self._decoder.slots:
                self._decoder.clear(slot)
        last = len(self._rows) - 1
        ready = last if not self._rows[last].prefilled else last + 1
        for source in (ready - 1, last):
            if source > slot:
                moved = self._rows[slot] = self._rows[source]
                self._decoder.move(source, slot, moved.cached)
                moved.slot, self._held[slot], self._held[source] = slot, moved, None
                if not moved.token_ids:
                    self._decoder.clear(source)
                slot = source
        self._rows.pop()
        self._decoder.vacate(slot)

    def _recover(self) -> None:
        """Puts the slots right after a step that was interrupted (Ctrl-C), from what rows know."""
        self._held = [*self._rows, *[None] * (self.max_batch_size - len(self._rows))]
        if self._rows:
            self._decoder.place(0, self._rows)
        for row in self._rows[::-1]:
            if (reason := row.over) is not None:
                self._end(row, reason)


def _slot(row: Row) -> int:
    assert row.slot is not None
    return row.slot


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def with_seeds(params: SamplingParams, seeds: Sequence[int]) -> list[SamplingParams]:
    """The same parameters with a seed for each prompt."""
    return [replace(params, seed=seed) for seed in seeds]
