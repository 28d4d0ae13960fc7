"""Text to tokens and back: the text of a completion as its tokens come, up to a stop string."""

from collections.abc import Sequence
from typing import Any


class Text:
    """The text of a completion, token by token.

    Tokens are decoded behind the last few of the prompt, because tokenizers treat the first token
    of a text in its own way (a space dropped).

    Args:
        tokenizer: transformers' tokenizer.
        prompt_ids: The prompt.
        stop: Strings that end the text.
    """

    _CONTEXT = 8  # tokens of the prompt: enough for a character of several byte tokens

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decode = tokenizer.decode
        self._window = list(prompt_ids[-self._CONTEXT :])
        self._shown = self._text(self._window)
        self._stop = stop
        self.text = ""  # decoded so far, up to a stop string
        self.given = 0  # characters of `text` that `take` has handed out
        self.stopped = False

    def _text(self, ids: list[int]) -> str:
        return str(self._decode(ids, skip_special_tokens=True))

    def add(self, token: int) -> bool:
        """Adds a token; whether the text now holds a stop string (and ends before it)."""
        self._window.append(token)
        whole = self._text(self._window)
        if whole.endswith("\ufffd"):
            return False  # the first bytes of a character
        gain = whole[len(self._shown) :]
        searched = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += gain
        self._window = self._window[-self._CONTEXT :]
        self._shown = self._text(self._window)
        cuts = [at for s in self._stop if (at := self.text.find(s, searched)) >= 0]
        if cuts:
            self.text, self.stopped = self.text[: min(cuts)], True
        return self.stopped

    def finish(self) -> None:
        """No token follows: bytes that are no character become a replacement character."""
        whole = self._text(self._window)
        if not self.stopped and whole.endswith("\ufffd"):
            self.text += whole[len(self._shown) :]

    def take(self, last: bool) -> str:
        """What is new since the last call and cannot become a stop string any more."""
        end = len(self.text)
        if not last:
            end -= max((_overlap(self.text, s) for s in self._stop), default=0)
        new = self.text[self.given : end]
        self.given = max(self.given, end)
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def completion_text(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens behind a prompt, without special tokens."""
    context = list(prompt_ids[-Text._CONTEXT :])
    before = tokenizer.decode(context, skip_special_tokens=True)
    whole = tokenizer.decode(context + list(ids), skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
