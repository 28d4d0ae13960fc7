"""What is asked of the sampler and what it answers: parameters, requests, completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from clp.data.conversation import encode_prompt, is_conversation
from clp.engine.detokenizer import Text, completion_text, special_texts

# Bounds on what a single request may ask for: beyond them it is an error, not an attack on memory.
MOST_COMPLETIONS = 1024
MOST_TOKENS = 2**20
MOST_STOPS = 16
MOST_STOP_LENGTH = 256
MOST_STOP_IDS = 256
MOST_LOGPROBS = 20
# As in the kernels: quotients by it are finite.
LEAST_TEMPERATURE = 1e-30


def _is_number(value: Any, kind: type) -> bool:
    """Whether it is one of the kind: Python's or NumPy's, no bool."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request; vLLM's names, and its None and -1 for what is off.

    A token is drawn from softmax(logits / temperature) after the filters: top-k, then top-p of what
    that leaves (renormalised), then min-p. This is transformers' order; vLLM applies min-p first.
    docs/sampling.md compares them.

    Attributes:
        max_tokens: Tokens a completion at most (2^20). None: as many as the context and the
            sampler's cache allow.
        temperature: 0 is greedy. From 1e-30 to 1e6 it is taken exactly, not raised to 0.01 as in
            vLLM; less counts as 1e-30.
        top_k: Keep the k most likely tokens, and what ties with the last of them. 0 or -1 is off.
        top_p: Keep the tokens whose strictly more likely tokens hold less than top_p together; so
            ties with the last one stay. At least 1e-9; 1 is off.
        min_p: Keep the tokens at least min_p times as likely as the most likely one. 0 is off.
        seed: Any integer; its lowest 64 bits count (two's complement). Completion i of the request
            draws with seed + i; None takes one from torch's generator. The same prompt, weights and
            seed give the same tokens in any batch (to the bit inside
            clp_kernels.batch_invariant()).
        stop: Strings that end a completion; the text ends before them. Special tokens take part
            with their text, though the completion's text leaves them out. The string that is
            complete first counts; of several that are complete at the same character, the first in
            the list. At most 16, of 256 characters; None: none.
        stop_token_ids: Token ids that end a completion, beside the model's own; they are no part of
            the text. At most 256; None: none.
        ignore_eos: Go on behind the model's end tokens.
        n: Completions a prompt, at most 1,024.
        logprobs: Give at each position the log-probabilities of this many most likely tokens, and
            of the one that was drawn if it is not among them; at most 20. 0 or None is off. All
            log-probabilities are those after the temperature and before the filters (at
            temperature 0: of softmax(logits)); vLLM's are before the temperature too.

    NumPy's numbers are taken as Python's.

    Raises: ValueError for a value out of these bounds.
    """

    max_tokens: int | None = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = field(default_factory=tuple)
    stop_token_ids: Sequence[int] = field(default_factory=tuple)
    ignore_eos: bool = False
    n: int = 1
    logprobs: int = 0

    def __post_init__(self) -> None:
        for name, off in {"stop": (), "stop_token_ids": (), "logprobs": 0}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, off)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        bounds = {
            "max_tokens": (1, MOST_TOKENS),
            "top_k": (-1, 2**31 - 1),
            "n": (1, MOST_COMPLETIONS),
            "logprobs": (0, MOST_LOGPROBS),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            if not _is_number(value, Integral) or not low <= value <= high:
                raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
            object.__setattr__(self, name, max(0, int(value)))  # top_k: -1 is off, as 0 is
        if self.seed is not None:
            if not _is_number(self.seed, Integral):
                raise ValueError(f"seed must be None or an integer, got {self.seed!r}")
            object.__setattr__(self, "seed", int(self.seed))
        ranges = {"temperature": (0.0, 1e6), "top_p": (1e-9, 1.0), "min_p": (0.0, 1.0)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not _is_number(value, Real) or not least <= value <= most:
                raise ValueError(f"{name} must be a number in [{least:g}, {most:g}], got {value!r}")
            if type(value) not in (int, float):
                object.__setattr__(self, name, float(value))
        if 0 < self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", LEAST_TEMPERATURE)
        if type(self.ignore_eos) is not bool:
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        self._check_list("stop", MOST_STOPS, "non-empty strings", str)
        if not all(0 < len(s) <= MOST_STOP_LENGTH for s in self.stop):
            raise ValueError(
                f"stop must hold non-empty strings of at most {MOST_STOP_LENGTH} characters, "
                f"got lengths {[len(s) for s in self.stop]}"
            )
        self._check_list("stop_token_ids", MOST_STOP_IDS, "token ids", int)

    def _check_list(self, name: str, most: int, what: str, kind: type) -> None:
        values = getattr(self, name)
        good = isinstance(values, Sequence) and not isinstance(values, (bytes, bytearray))
        if good and kind is int:
            values = [int(v) if _is_number(v, Integral) else v for v in values]
        if not good or not all(type(v) is kind for v in values):
            raise ValueError(f"{name} must hold {what}, got {values!r}")
        if len(values) > most:
            raise ValueError(f"{name} must hold at most {most} {what}, got {len(values)}")
        object.__setattr__(self, name, tuple(values))

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "SamplingParams":
        """From a mapping such as a line of JSON.

        Raises: ValueError for a name that is no parameter, or a bad value.
        """
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise ValueError(f"unknown sampling parameter {name!r}")
        return cls(**options)


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        prompt_index, index: Which prompt of the call, and which of its n completions.
        text: Decoded without special tokens, up to a stop string, stop token or end token.
        token_ids: All sampled ids, an end token included.
        logprobs: log pi(token) at the sampling temperature, before the filters; one a token.
        finish_reason: "stop" (end token, stop token or stop string), "length", "abort" (cancelled)
            or "error".
        top_logprobs: For params.logprobs > 0, for each token the most likely ids and their
            log-probabilities, likeliest first, and behind them the token, if it is another.
        error: Why, where finish_reason is "error".
    """

    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[dict[int, float]] | None = None
    error: str | None = None


@dataclass(frozen=True)
class StreamedToken:
    """A token of a request as it is drawn.

    Attributes:
        index: Which of the n completions.
        token_id, logprob: As in Completion; None in the last item of a completion that ends
            without a token of its own ("abort", "error").
        text: What the completion's text gains. A beginning of a stop string and the first bytes of
            a character are held back until it is clear what they are.
        finish_reason: Set in the last item of a completion.
        error: Why, where finish_reason is "error".
    """

    index: int
    token_id: int | None
    logprob: float | None
    text: str
    finish_reason: str | None = None
    error: str | None = None


class Row:
    """One completion while it is waiting or being decoded.

    `cached` of `ids` (the prompt and what has been drawn) are in the slot's cache. Before the first
    step that is all but the prompt's last token: each step feeds one token and draws the next.
    """

    def __init__(self, request: "Request", index: int, seed: int) -> None:
        self.request, self.index, self.seed = request, index, seed
        self.cached = 0
        self.key = b""  # what may share this row's cache; set when it gets a slot
        self.slot: int | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.stopping = request.new_text() if request.params.stop else None
        self.completion: Completion | None = None

    @property
    def prefilled(self) -> bool:
        """Whether the row can take part in a decoding step."""
        return self.cached >= len(self.request.prompt_ids) - 1

    @property
    def length(self) -> int:
        """Tokens of the prompt and drawn."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def last_id(self) -> int:
        """The last of them, which the next step feeds."""
        return self.token_ids[-1] if self.token_ids else self.request.prompt_ids[-1]

    @property
    def over(self) -> str | None:
        """The finish_reason that the tokens so far make, or None."""
        ids, request = self.token_ids, self.request
        if ids and ids[-1] in request.stop_ids:
            return "stop"
        if self.stopping is not None and self.stopping.stopped:
            return "stop"
        return "length" if len(ids) >= request.max_tokens else None

    def text(self, reason: str) -> str:
        """The completion's text, if it ends now for this reason."""
        request, ids = self.request, self.token_ids
        if self.stopping is not None and self.stopping.stopped:
            return self.stopping.text
        # The token that ended it is no part of the text.
        shown = ids[:-1] if reason == "stop" and ids[-1] in request.stop_ids else ids
        return completion_text(request.tokenizer, request.prompt_ids, shown)

    def finish(self, text: str, reason: str, error: str | None = None) -> Completion:
        """Makes the completion; the row is then done."""
        request = self.request
        top = self.top_logprobs if request.params.logprobs else None
        self.completion = Completion(
            request.prompt_index,
            self.index,
            text,
            self.token_ids,
            self.logprobs,
            reason,
            top,
            error,
        )
        return self.completion


class Request:
    """A submitted prompt: its n completions, as they come.

    Attributes:
        prompt_ids, params: What was asked.
        max_tokens: That of params, or what there is room for.
        weights: The row [m].
        rows: The n completions being decoded.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: list[int],
        weights: Tensor,
        params: SamplingParams,
        stop_ids: frozenset[int],
        cache_key: bytes,
        max_tokens: int,
        seed: int,
        prompt_index: int,
    ) -> None:
        self.tokenizer, self.prompt_ids, self.params = tokenizer, prompt_ids, params
        self.weights, self.cache_key = weights, cache_key
        self.prompt_index = prompt_index
        self.stop_ids = stop_ids
        self.max_tokens = max_tokens
        self._special = special_texts(tokenizer) if params.stop else {}
        self.rows = [Row(self, k, _as_int64(seed + k)) for k in range(params.n)]

    def new_text(self) -> Text:
        """The text of one of its completions, which has no token yet."""
        return Text(self.tokenizer, self.prompt_ids, self.params.stop, self._special)

    @property
    def length(self) -> int:
        """Tokens of the cache that a completion may need: its last token is never fed."""
        return len(self.prompt_ids) + self.max_tokens - 1

    @property
    def finished(self) -> bool:
        """Whether all n completions are done."""
        return all(row.completion is not None for row in self.rows)

    @property
    def completions(self) -> list[Completion]:
        """Those that are done, in order."""
        return [row.completion for row in self.rows if row.completion is not None]


def _as_int64(seed: int) -> int:
    """The lowest 64 bits of a seed, as a signed number."""
    return (seed + 2**63) % 2**64 - 2**63


def stream_news(row: Row, text: Text, seen: int) -> list[StreamedToken]:
    """What a stream has to tell of a row since `seen` of its tokens."""
    found = []
    ids, done = row.token_ids, row.completion
    for i in range(seen, len(ids)):
        last = done is not None and i == len(ids) - 1 and done.finish_reason in ("stop", "length")
        stop_token = last and ids[i] in row.request.stop_ids
        if not text.stopped and not stop_token:
            text.add(ids[i])
        if last:
            text.finish()
        gain = text.take(last)
        reason = done.finish_reason if last and done is not None else None
        found.append(StreamedToken(row.index, ids[i], row.logprobs[i], gain, reason))
    if done is not None and done.finish_reason in ("abort", "error"):
        text.finish()
        found.append(
            StreamedToken(row.index, None, None, text.take(True), done.finish_reason, done.error)
        )
    return found


def parse_prompt(prompt: Any, tokenizer: Any, vocab_size: int, name: str) -> list[int]:
    """The ids of a text or a conversation, or a checked copy of a list (an array, a tensor) of ids.

    `name` names the prompt in errors.

    Raises:
        TypeError: neither. ValueError: empty, too long to tokenize, half a surrogate pair, or ids
            outside the vocabulary.
    """
    if isinstance(prompt, str) or is_conversation(prompt):
        ids = encode_prompt(prompt, tokenizer, name)
    elif isinstance(prompt, (np.ndarray, Tensor)) and prompt.ndim == 1:
        ids = prompt.tolist()
    elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        ids = [int(token) if isinstance(token, np.integer) else token for token in prompt]
    else:
        came = type(prompt).__name__
        raise TypeError(f"{name} must be a text or a list of token ids or messages, got {came}")
    if not ids:
        raise ValueError(f"{name} is empty: it has no tokens")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(
                f"{name} must hold token ids from 0 to {vocab_size - 1}, got {token!r}"
            )
    return ids
