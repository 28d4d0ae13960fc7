"""Requests and their sequences: the state of each completion while it waits and is decoded."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clp.engine.detokenizer import Text, completion_text, special_texts
from clp.engine.requests import Completion, SamplingParams, StreamedToken


class Sequence:
    """One completion of a request while it waits and is decoded.

    Each decode step feeds one token and draws the next. Before the first one, all tokens of the
    prompt but the last are in the slot's cache.

    Attributes:
        request, index, seed: Which completion of which request, and the seed of its draws.
        slot: Its place in the cache, or None.
        key: Sequences of equal keys may copy each other's keys and values; set with the slot.
        prompt_cached: Tokens of the prompt that are in the cache.
        token_ids, logprobs, top_logprobs: What has been drawn.
        stop_text: The text so far, if there are stop strings.
        completion: The result, or None while the sequence is unfinished.
    """

    def __init__(self, request: "Request", index: int, seed: int) -> None:
        self.request, self.index, self.seed = request, index, seed
        self.slot: int | None = None
        self.key = b""
        self.prompt_cached = 0
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.stop_text = request.new_text() if request.params.stop else None
        self.completion: Completion | None = None

    @property
    def prefilled(self) -> bool:
        """Whether the sequence can take part in a decode step."""
        return self.prompt_cached >= self.request.prefill_length

    @property
    def cached(self) -> int:
        """Tokens in the cache: of the prompt, and all but the last of those drawn."""
        return self.prompt_cached + len(self.token_ids)

    @property
    def length(self) -> int:
        """Tokens of the prompt and drawn."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def last_id(self) -> int:
        """The last of them, which the next step feeds."""
        return self.token_ids[-1] if self.token_ids else self.request.prompt_ids[-1]

    def append(self, token: int, logprob: float, top: dict[int, float] | None) -> str | None:
        """Adds a drawn token; returns the finish_reason if the sequence ends with it.

        Raises: ModelError for what the tokenizer raises.
        """
        self.logprobs.append(logprob)
        if top is not None:
            self.top_logprobs.append(top)
        # From here on the token is drawn: `recover` completes or undoes the rest.
        self.token_ids.append(token)
        if self.stop_text is not None and token not in self.request.stop_ids:
            self.stop_text.add(token)
        return self.end_reason

    def recover(self) -> None:
        """Makes whole what an interruption of `append` (Ctrl-C) left half done.

        Raises: ModelError for what the tokenizer raises.
        """
        count = len(self.token_ids)
        del self.logprobs[count:], self.top_logprobs[count:]
        if self.stop_text is not None:
            text = self.request.new_text()
            for token in self.token_ids:
                if token not in self.request.stop_ids:
                    text.add(token)
            self.stop_text = text

    @property
    def end_reason(self) -> str | None:
        """The finish_reason that the tokens so far give, or None."""
        ids, request = self.token_ids, self.request
        if ids and ids[-1] in request.stop_ids:
            return "stop"
        if self.stop_text is not None and self.stop_text.stopped:
            return "stop"
        return "length" if len(ids) >= request.max_tokens else None

    def text(self, reason: str) -> str:
        """The completion's text, if it ends now for this reason.

        Raises: ModelError for what the tokenizer raises.
        """
        request, ids = self.request, self.token_ids
        if self.stop_text is not None and self.stop_text.stopped:
            return self.stop_text.text
        # The token that ended it does not belong to the text.
        shown = ids[:-1] if reason == "stop" and ids[-1] in request.stop_ids else ids
        return completion_text(request.tokenizer, request.prompt_ids, shown)

    def finish(self, text: str, reason: str, error: str | None = None) -> Completion:
        """Makes the completion."""
        request = self.request
        top = self.top_logprobs if request.params.logprobs else None
        which, drawn = (request.prompt_index, self.index), (self.token_ids, self.logprobs)
        self.completion = Completion(*which, text, *drawn, reason, top, error)
        return self.completion


@dataclass(eq=False)
class Request:
    """A submitted prompt and its n completions.

    Attributes:
        weights: [n], as the layers take them.
        stop_ids: Token ids that end a completion.
        cache_key: Equal for weights that give equal keys and values for equal tokens.
        max_tokens: That of params, or as many as there is room for.
        seed: Completion i draws with seed + i.
        prompt_index: Which prompt of the call.
    """

    tokenizer: Any = field(repr=False)
    prompt_ids: list[int]
    weights: Tensor
    params: SamplingParams
    stop_ids: frozenset[int]
    cache_key: bytes
    max_tokens: int
    seed: int
    prompt_index: int

    def __post_init__(self) -> None:
        self._special = special_texts(self.tokenizer) if self.params.stop else {}
        self.sequences = [Sequence(self, k, _as_int64(self.seed + k)) for k in range(self.params.n)]

    def new_text(self) -> Text:
        """The text of one of its completions, without tokens yet."""
        return Text(self.tokenizer, self.prompt_ids, self.params.stop or (), self._special)

    @property
    def prefill_length(self) -> int:
        """Tokens of the prompt that a prefill computes: the first decode step feeds the last."""
        return len(self.prompt_ids) - 1

    @property
    def cache_length(self) -> int:
        """Tokens that a completion may need in the cache: its last token is never fed."""
        return len(self.prompt_ids) + self.max_tokens - 1

    @property
    def finished(self) -> bool:
        """Whether all n completions are done."""
        return all(sequence.completion is not None for sequence in self.sequences)

    @property
    def completions(self) -> list[Completion]:
        """Those that are done, in order."""
        return [s.completion for s in self.sequences if s.completion is not None]


def _as_int64(seed: int) -> int:
    """The lowest 64 bits of a seed, as a signed number."""
    return (seed + 2**63) % 2**64 - 2**63


class SequenceStream:
    """Reads a sequence's tokens as they are drawn."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self._text = sequence.request.new_text()
        self._read = 0

    def read(self) -> list[StreamedToken]:
        """The tokens since the last call. Raises: ModelError for what the tokenizer raises."""
        sequence, text, found = self.sequence, self._text, []
        ids, done = sequence.token_ids, sequence.completion
        for i in range(self._read, len(ids)):
            last = i == len(ids) - 1 and done is not None
            last = last and done.finish_reason in ("stop", "length")  # type: ignore[union-attr]
            if not text.stopped and not (last and ids[i] in sequence.request.stop_ids):
                text.add(ids[i])
            if last:
                text.finish()
            reason = done.finish_reason if last and done is not None else None
            gain = text.take(last)
            found.append(StreamedToken(sequence.index, ids[i], sequence.logprobs[i], gain, reason))
        self._read = len(ids)
        if done is not None and done.finish_reason in ("abort", "error"):
            text.finish()
            gain = text.take(True)
            end = done.finish_reason, done.error
            found.append(StreamedToken(sequence.index, None, None, gain, *end))
        return found
