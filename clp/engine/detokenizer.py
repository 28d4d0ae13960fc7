"""Token ids to text: the text of a completion as it comes."""

from collections.abc import Mapping, Sequence
from typing import Any

from clp.engine.model_error import model_errors

# Tokens that a token is decoded after, at least; twice as many at most.
CONTEXT = 8
# Tokens of a character, at most: bytes of UTF-8.
CHARACTER = 4


def special_texts(tokenizer: Any) -> dict[int, str]:
    """Token id -> text of the tokens that a completion's text may leave out."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = tokenizer.added_tokens_decoder.items()
    return {i: str(token) for i, token in added if token.special} | dict(named)


class Text:
    """The text of a completion, token by token, without special tokens, up to a stop string.

    Tokens are decoded after the last few of the prompt, because tokenizers treat the first token of
    a text differently (they drop a space). The first of these few begins a character: of a run of
    byte tokens that is not whole, some tokenizers decode nothing.

    Stop strings are searched in the text with special tokens written out. The one that is complete
    first ends the text before it; of several that are complete at the same character, the first in
    the list.

    Args:
        special: What `special_texts` gives; needed for stop strings only.

    Attributes:
        text: Decoded so far, up to a stop string.
        stopped: Whether it has met one.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        special: Mapping[int, str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._window, self._shown = _context(tokenizer, prompt_ids)
        self._whole: list[int] = []  # lengths of the window at which no character was incomplete
        self._stop, self._special = stop, special or {}
        self._written = ""  # decoded so far, special tokens written out
        self._hidden: list[tuple[int, int]] = []  # where these begin and end in it
        self.text = ""
        self._taken = 0  # characters of `text` that `take` has returned
        self.stopped = False

    def decode(self, ids: list[int]) -> str:
        """The text of tokens. Raises: ModelError for what the tokenizer raises."""
        return _decode(self.tokenizer, ids)

    def add(self, token: int) -> bool:
        """Adds a token; whether the text now holds a stop string (and ends before it)."""
        if token in self._special and not self.decode([token]):
            before = len(self._written)
            self._written += self._special[token]
            self._hidden.append((before, len(self._written)))
            return self.search(before)
        self._window.append(token)
        whole = self.decode(self._window)
        if whole.endswith("\ufffd"):
            return False  # the first bytes of a character
        gain, self._shown = whole[len(self._shown) :], whole
        self._whole.append(len(self._window))
        if len(self._window) > 2 * CONTEXT:
            self._shorten()
        before = len(self._written)
        self.text += gain
        self._written += gain
        return self.search(before)

    def _shorten(self) -> None:
        """Drops tokens that end before the last CONTEXT ones, where a character ends."""
        first = max((n for n in self._whole if n <= len(self._window) - CONTEXT), default=0)
        self._window = self._window[first:]
        self._whole = [n - first for n in self._whole if n > first]
        self._shown = self.decode(self._window)

    def search(self, before: int) -> bool:
        """Whether the text has met a stop string that ends after the first `before` characters."""
        ends = [
            (at + len(s), place, at)
            for place, s in enumerate(self._stop)
            if (at := self._written.find(s, max(0, before - len(s) + 1))) >= 0
        ]
        if ends:
            self.text, self.stopped = self.text[: self._visible(min(ends)[2])], True
        return self.stopped

    def _visible(self, end: int) -> int:
        """How many of the first `end` characters written do not belong to special tokens."""
        return end - sum(min(b, end) - a for a, b in self._hidden if a < end)

    def finish(self) -> None:
        """No token follows: an incomplete character becomes a replacement character."""
        whole = self.decode(self._window)
        if not self.stopped and whole.endswith("\ufffd"):
            self.text += whole[len(self._shown) :]

    def take(self, last: bool) -> str:
        """What is new since the last call and cannot become a stop string any more."""
        end = len(self.text)
        if not (last or self.stopped):
            begun = max((_overlap(self._written, s) for s in self._stop), default=0)
            end = self._visible(len(self._written) - begun)
        new = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def completion_text(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens after a prompt, without special tokens.

    Raises: ModelError for what the tokenizer raises.
    """
    context, before = _context(tokenizer, prompt_ids)
    whole = _decode(tokenizer, context + list(ids))
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, list(ids))


def _context(tokenizer: Any, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
    """The last few tokens of a prompt, the first of which begins a character, and their text."""
    starts = range(
        max(0, len(prompt_ids) - CONTEXT), max(-1, len(prompt_ids) - CONTEXT - CHARACTER), -1
    )
    found = []
    for start in starts:
        context = list(prompt_ids[start:])
        text = _decode(tokenizer, context)
        found.append((text.count("\ufffd"), context, text))
        if not found[-1][0]:
            break
    _, context, text = min(found, key=lambda one: one[0])
    return context, text


def _decode(tokenizer: Any, ids: list[int]) -> str:
    with model_errors():
        return str(tokenizer.decode(ids, skip_special_tokens=True))
