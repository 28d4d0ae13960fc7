"""What is asked of the sampler and what it answers: prompts, parameters, completions."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from clp.data.conversation import encode_prompt, is_conversation

# Bounds on a single request, so that none can ask for all memory.
MOST_COMPLETIONS = 1024
MOST_TOKENS = 2**20
MOST_STOPS = 16
MOST_STOP_LENGTH = 256
MOST_STOP_IDS = 256
MOST_LOGPROBS = 20
# As in the kernels: quotients by it are finite.
LEAST_TEMPERATURE = 1e-30


def _is_number(value: Any, kind: type) -> bool:
    """Whether it is a number of the kind, Python's or NumPy's; bool does not count."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request; vLLM's names, and its None and -1 for what is off.

    A token is drawn from softmax(logits / temperature) after the filters: top-k, then top-p of what
    that leaves (renormalised), then min-p. This is transformers' order; vLLM applies min-p first.
    docs/sampling.md compares them.

    Attributes:
        max_tokens: Tokens per completion, at most 2^20. None: as many as the context and the
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
        stop_token_ids: Token ids that end a completion, beside the model's own; the text does not
            contain them. At most 256; None: none.
        ignore_eos: Continue after the model's end tokens.
        n: Completions per prompt, at most 1,024.
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
    stop: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None

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
        if isinstance(self.ignore_eos, np.bool_):
            object.__setattr__(self, "ignore_eos", bool(self.ignore_eos))
        if type(self.ignore_eos) is not bool:
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        self._check_list("stop", MOST_STOPS, "non-empty strings", str)
        lengths = [len(s) for s in self.stop or ()]
        if not all(0 < length <= MOST_STOP_LENGTH for length in lengths):
            raise ValueError(
                f"stop must hold non-empty strings of at most {MOST_STOP_LENGTH} characters, "
                f"got lengths {lengths}"
            )
        self._check_list("stop_token_ids", MOST_STOP_IDS, "token ids", int)

    def _check_list(self, name: str, most: int, what: str, kind: type) -> None:
        values = getattr(self, name)
        if kind is int and isinstance(values, Set):
            values = list(values)
        if isinstance(values, np.ndarray | Tensor) and values.ndim == 1:
            values = values.tolist()
        good = isinstance(values, Sequence) and not isinstance(values, (bytes, bytearray))
        if good:
            values = [int(v) if _is_number(v, Integral) else v for v in values]
            values = [str(v) if isinstance(v, str) else v for v in values]
        if not good or not all(type(v) is kind for v in values):
            raise ValueError(f"{name} must be a list of {what}, got {values!r}")
        if len(values) > most:
            raise ValueError(f"{name} must hold at most {most} {what}, got {len(values)}")
        object.__setattr__(self, name, tuple(values))


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        prompt_index, index: Which prompt of the call, and which of its n completions.
        text: Decoded without special tokens, up to a stop string, stop token or end token.
        token_ids: All sampled ids, an end token included.
        logprobs: log pi(token) at the sampling temperature, before the filters; one per token.
        finish_reason: "stop" (end token, stop token or stop string), "length", "abort" (cancelled)
            or "error".
        top_logprobs: For params.logprobs > 0, for each token the most likely ids and their
            log-probabilities, likeliest first, and behind them the token, if it is another.
        error: The reason, if finish_reason is "error".
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
            a character come later, once it is clear what they are.
        finish_reason: Set in the last item of a completion.
        error: The reason, if finish_reason is "error".
    """

    index: int
    token_id: int | None
    logprob: float | None
    text: str
    finish_reason: str | None = None
    error: str | None = None


def parse_prompt(prompt: Any, tokenizer: Any, vocab_size: int, name: str) -> list[int]:
    """The ids of a text or a conversation, or a checked copy of a list (an array, a tensor) of ids.

    `name` names the prompt in errors.

    Raises:
        TypeError: neither of these. ValueError: empty, too long to tokenize, half a surrogate pair,
            or ids outside the vocabulary.
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
    last = vocab_size - 1
    for token in ids:
        if type(token) is not int or not 0 <= token <= last:
            raise ValueError(f"{name} must hold token ids from 0 to {last}, got {token!r}")
    return ids
