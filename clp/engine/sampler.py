"""The sampler: continuous batching, with weights for each request.

A request waits until a slot is free. Then its prompt is prefilled, and from then on each step draws
one token for every sequence, whatever their weights, lengths and parameters. A sequence that ends
leaves its slot to the next request at the following step. `scheduler.py` decides who runs in which
slot, `runner.py` runs the model, `sequence.py` holds each completion's state.
"""

import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from clp.data.condition import Condition, parse_conditions
from clp.data.conversation import Prompt
from clp.data.weights import WeightSpec
from clp.engine.locks import one_thread
from clp.engine.model_error import NOT_FINITE, ModelError, NotFiniteError
from clp.engine.requests import MOST_TOKENS, Completion, SamplingParams, StreamedToken, parse_prompt
from clp.engine.runner import Runner
from clp.engine.scheduler import CopyEach, Scheduler
from clp.engine.sequence import Request, Sequence, SequenceStream
from clp.policies.interface import Steerable
from clp_kernels.invariant import is_batch_invariant


class Sampler:
    """Samples from a policy; every sequence of a batch has its own weights and parameters.

    One thread may use it at a time: a call raises RuntimeError while another thread's call runs.
    Several samplers of one model may run in as many threads; they take turns. Between steps the
    policy may be used and trained by others. After an exception that leaves `step`, such as Ctrl-C,
    the requests go on at the next step as if the interrupted one had not been.

    Args:
        policy: A clp.Policy, or a clp.LogitMixture over several models.
        max_batch_size: Sequences decoded together.
        cache_gib: Memory for keys and values at most, in GiB. Sequences wait if it is short; a
            request that can never fit is refused. `cache_bytes` reports what is allocated.
        max_prefill_tokens: Tokens of prompts between two decode steps at most, so that a long
            prompt does not delay the others.

    Attributes:
        scheduler: Who runs, who waits.
        runner: The model and its slots.
        tokens_drawn: Tokens drawn so far.

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
        counts = {"max_batch_size": max_batch_size, "max_prefill_tokens": max_prefill_tokens}
        for name, value in counts.items():
            if type(value) is not int or not 1 <= value <= MOST_TOKENS:
                raise ValueError(f"{name} must be an integer in [1, {MOST_TOKENS}], got {value!r}")
        if not isinstance(cache_gib, (int, float)) or not 0 < cache_gib < 2**20:
            raise ValueError(f"cache_gib must be a positive number, got {cache_gib!r}")
        self.policy = policy
        self.max_batch_size, self.max_prefill_tokens = max_batch_size, max_prefill_tokens
        self.runner = Runner(policy, max_batch_size, int(cache_gib * 2**30))
        self.scheduler = Scheduler(max_batch_size, self.runner.fits)
        self._stepping = False
        self.using = threading.RLock()
        self.tokens_drawn = 0

    # Requests

    @one_thread
    def submit(
        self,
        prompt: Prompt,
        weights: WeightSpec | Condition,
        params: SamplingParams | None = None,
        *,
        simplex: bool = True,
    ) -> Request:
        """Queues a request. It runs as `step`, `stream` or `generate` run.

        Args:
            prompt: A text, a list of token ids, or a list of messages for the chat template.
            weights: A mapping from objective to weight, a string "joy=0.7,brief=0.3", or m numbers;
                a clp.Condition for a KL strength beside them.
            params: How to sample.
            simplex: Refuse weights off the simplex (negative entries, sum other than 1).

        Raises:
            ValueError, TypeError: bad weights (see clp.data.condition.parse_condition); a prompt
                that is empty, outside the vocabulary, too long for the context with max_tokens, or
                for the cache; params of another type. The other requests go on.
        """
        parsed = self.policy.condition(weights, simplex=simplex)
        params = SamplingParams() if params is None else params
        request = make_request(
            self.policy, self.runner, _Limits(self.policy), prompt, parsed, params, 0, "prompt"
        )
        self.scheduler.add(request.sequences)
        return request

    @one_thread
    def cancel(self, request: Request) -> None:
        """Ends what is not finished of a request with finish_reason "abort"; its slots are free."""
        for sequence in request.sequences:
            if sequence.completion is None:
                self._end(sequence, "abort")
        self._apply_actions()

    @property
    def unfinished(self) -> int:
        """Completions that are waiting or being decoded."""
        return len(self.scheduler.waiting) + len(self.scheduler.running)

    @property
    def cache_bytes(self) -> int:
        """Keys and values as they are allocated now."""
        return self.runner.cache_bytes

    def stream(self, request: Request) -> Iterator[StreamedToken]:
        """The tokens of a request as they are drawn; runs the sampler as far as needed.

        Streams of several requests may be read in turn; if one is dropped, its request goes on.
        """
        streams = [SequenceStream(sequence) for sequence in request.sequences]
        while streams:
            tokens = [token for stream in streams for token in stream.read()]
            streams = [stream for stream in streams if stream.sequence.completion is None]
            yield from tokens
            if streams and not tokens:
                self.step()

    @one_thread
    def step(self) -> list[Completion]:
        """Fills free slots from the queue and draws one token for every sequence in a slot.

        Returns:
            The completions that this step finished. A sequence whose forward pass failed is
            finished with finish_reason "error"; the sampler goes on.
        """
        done = self._recover() if self._stepping else []
        self._stepping = True
        done += self._prefill()
        decoding = self.scheduler.decoding
        groups = [[s] for s in decoding] if is_batch_invariant() else [decoding]
        ended: list[tuple[Sequence, str, str | None]] = []
        for group in groups:
            if group:
                ended += self._decode(group)
        # From the last slot down: the sequences that move into free slots are those that go on.
        for sequence, reason, error in sorted(ended, key=lambda end: -(end[0].slot or 0)):
            done.append(self._end(sequence, reason, error))
        done += self._apply_actions()
        self._stepping = False
        return done

    @one_thread
    def generate(
        self,
        prompts: Seq[Prompt],
        weights: WeightSpec | Condition | Seq[WeightSpec | Condition],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        simplex: bool = True,
        progress: bool = False,
    ) -> list[Completion]:
        """Samples params.n completions for every prompt, in the order of the prompts.

        Args:
            prompts: Texts, lists of token ids, or lists of messages.
            weights: One for all prompts, or one per prompt: a mapping from objective to weight, a
                string "joy=0.7,brief=0.3", or m numbers in the policy's order; or [B, m]; or a
                clp.Condition, which has a KL strength too.
            params: One for all prompts, or one per prompt.
            simplex: Refuse weights off the simplex (negative entries, sum other than 1).
            progress: Show a progress bar, with tokens per second.

        Raises:
            ValueError, TypeError: as `submit`, naming the prompt, before anything runs; lists of
                unequal length; a text in place of the list of prompts.
            RuntimeError: a forward pass failed; the message names the first prompt and the reason.
                NotFiniteError, one of these: the logits are infinite or NaN.
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Seq):
            raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
        policy = self.policy
        parsed = parse_conditions(
            weights, len(prompts), policy.objectives, policy.kl_range, simplex=simplex
        )
        if params is None:
            params = SamplingParams()
        if not isinstance(params, Seq):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params must be one or {len(prompts)}, got {len(params)}")
        limits = _Limits(self.policy)
        requests = [
            make_request(policy, self.runner, limits, prompt, own, one, i, f"prompt {i}")
            for i, (prompt, own, one) in enumerate(zip(prompts, parsed, params, strict=True))
        ]
        for request in requests:
            self.scheduler.add(request.sequences)
        self.finish(requests, progress=progress)
        completions = [c for request in requests for c in request.completions]
        for c in completions:
            if c.error is not None:
                kind = NotFiniteError if c.error == NOT_FINITE else RuntimeError
                raise kind(f"prompt {c.prompt_index} failed: {c.error}")
        return completions

    @one_thread
    def finish(self, requests: Seq[Request], *, progress: bool = False) -> None:
        """Runs until the requests are finished. An interruption (Ctrl-C) cancels them."""
        begin, drawn = time.perf_counter(), self.tokens_drawn
        total, first = sum(len(request.sequences) for request in requests), 0
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

    # A step

    def _prefill(self) -> list[Completion]:
        """Prefills what fits of the queue into free slots; returns what failed."""
        scheduler = self.scheduler
        failed: list[Completion] = []
        # While nothing runs, the models may have changed since the caches were filled.
        if not scheduler.running and scheduler.waiting and not self.runner.renew():
            scheduler.forget()
        budget, invariant = self.max_prefill_tokens, is_batch_invariant()
        while budget > 0:
            batch = scheduler.next_batch(budget, invariant=invariant)
            if no_memory := self._apply_actions():
                return failed + no_memory
            if not batch.sequences:
                break
            try:
                if batch.parts:
                    self.runner.prefill(batch.parts)
            except ModelError as error:
                for sequence in sorted(batch.sequences, key=lambda s: -(s.slot or 0)):
                    failed.append(self._end(sequence, "error", str(error)))
            else:
                scheduler.prefilled(batch)
            failed += self._apply_actions()
            if not invariant:
                budget -= batch.tokens
        return failed

    def _decode(self, group: list[Sequence]) -> list[tuple[Sequence, str, str | None]]:
        """Draws a token for each of a group; returns those that end, with reason and error."""
        try:
            drawn = self.runner.decode(group, group[0].slot or 0)
        except ModelError as error:
            return [(sequence, "error", str(error)) for sequence in group]
        ended: list[tuple[Sequence, str, str | None]] = []
        each = zip(group, drawn.tokens, drawn.logprobs, strict=True)
        for i, (sequence, token, logprob) in enumerate(each):
            if token < 0:
                ended.append((sequence, "error", NOT_FINITE))
                continue
            self.tokens_drawn += 1
            try:
                reason = sequence.append(token, logprob, drawn.top.get(i))
            except ModelError as error:  # of the tokenizer
                ended.append((sequence, "error", str(error)))
                continue
            if reason is not None:
                ended.append((sequence, reason, None))
        return ended

    def _end(self, sequence: Sequence, reason: str, error: str | None = None) -> Completion:
        """Finishes a sequence, in its slot or in the queue."""
        # Whether its keys are finite shows when the first token is drawn.
        keep = reason != "error" and bool(sequence.token_ids)
        try:
            text = sequence.text(reason)
        except ModelError as failure:  # of the tokenizer
            text, reason, error = "", "error", str(failure)
        self.scheduler.remove(sequence, keep=keep)
        return sequence.finish(text, reason, error)

    def _apply_actions(self) -> list[Completion]:
        """Does to the slots what the scheduler has decided; returns what lack of memory ended."""
        actions = self.scheduler.actions
        ended: list[Completion] = []
        while actions:
            try:
                self.runner.apply(actions[0])
            except ModelError as error:
                if not isinstance(actions[0], CopyEach):
                    self.runner.resize(0, 0)
                for sequence in self.scheduler.no_memory():
                    ended.append(self._end(sequence, "error", str(error)))
            else:
                actions.popleft()
        return ended

    def _recover(self) -> list[Completion]:
        """Restores the slots after a step that was interrupted, from what the sequences know."""
        done = self._apply_actions()
        running = self.scheduler.running
        self.scheduler.forget()
        if running:
            self.runner.state.place(0, running)
        for sequence in running[::-1]:
            try:
                sequence.recover()
            except ModelError as error:  # of the tokenizer
                done.append(self._end(sequence, "error", str(error)))
                continue
            if (reason := sequence.end_reason) is not None:
                done.append(self._end(sequence, reason))
        return done + self._apply_actions()


class _Limits:
    """What every request is checked by. transformers takes long to find it in a configuration:
    once per request would be a tenth of the demo's training step."""

    def __init__(self, policy: Steerable) -> None:
        self.vocab_size, self.context_length = policy.vocab_size, policy.context_length
        self.end_ids = policy.end_ids


def make_request(
    policy: Steerable,
    runner: Runner,
    limits: _Limits,
    prompt: Prompt,
    condition: Tensor,
    params: SamplingParams,
    prompt_index: int,
    name: str,
) -> Request:
    """A checked request; `name` names the prompt in errors. Raises: as Sampler.submit."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params of {name} must be SamplingParams, got {type(params).__name__}")
    ids = parse_prompt(prompt, policy.tokenizer, limits.vocab_size, name)
    ids = policy.conditioned_prompt(ids, condition)
    room = min(limits.context_length, runner.max_length + 1) - len(ids)
    most = params.max_tokens or max(1, min(room, MOST_TOKENS))
    length = len(ids) + most
    shape = f"{name} has {len(ids)} tokens; with max_tokens={most} it exceeds"
    if length > limits.context_length:
        raise ValueError(f"{shape} the context of {limits.context_length}")
    if not runner.fits(1, length - 1):
        raise ValueError(f"{shape} the cache of {runner.max_cache_bytes} bytes (cache_gib)")
    last = limits.vocab_size - 1
    stops = params.stop_token_ids or ()
    for token in stops:
        if not 0 <= token <= last:
            raise ValueError(f"stop_token_ids must be from 0 to {last}, got {token}")
    ends = frozenset() if params.ignore_eos else limits.end_ids
    stop_ids = ends | frozenset(stops)
    seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
    key, own = policy.cache_key(condition), policy.layer_weights(condition)
    return Request(policy.tokenizer, ids, own, params, stop_ids, key, most, seed, prompt_index)


def with_seeds(params: SamplingParams, seeds: Seq[int]) -> list[SamplingParams]:
    """The same parameters with a seed for each prompt."""
    return [replace(params, seed=seed) for seed in seeds]
