"""Prompts: texts, or as in TRL conversations: lists of messages {"role": ..., "content": text}."""

import reprlib
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import jinja2
import numpy as np
from torch import Tensor

# A longer prompt is an error: a tokenizer would take minutes.
MOST_CHARACTERS = 2**24
Messages = list[dict[str, Any]]
# What the sampler takes: a text, token ids, or messages.
Prompt = str | Sequence[int] | np.ndarray | Tensor | Sequence[Mapping[str, Any]]


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, and not a text or a list of token ids."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], dict)


def user_message(text: str) -> dict[str, Any]:
    """A message of the user's."""
    return {"role": "user", "content": text}


def check_conversation(prompt: Any, name: str) -> None:
    """Raises ValueError, naming `name`, unless every message has a role and a content of text."""
    for i, message in enumerate(prompt):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(
                    f'{name}: message {i} must be an object with "role" and "content" of text, '
                    f"got {reprlib.repr(message)}"
                )


def prompt_text(prompt: str | Messages, tokenizer: Any, name: str = "prompt") -> str:
    """The text that a model continues: a text itself, a conversation by the tokenizer's template.

    The template adds the beginning of the assistant's message, as in TRL.

    Raises:
        ValueError: a message without a role or content of text, a tokenizer without a chat
            template, or a conversation that the template refuses; the error names `name`.
    """
    if isinstance(prompt, str):
        return prompt
    check_conversation(prompt, name)
    if tokenizer.chat_template is None:
        lacks = "the model's tokenizer has no chat template"
        raise ValueError(f"{name} is a conversation, and {lacks}; give a text")
    try:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        # The others are Python's, for what a template computes: 1 / 0, "a" + 1, "{}".format().
        raise ValueError(f"{name}: the tokenizer's chat template refuses it: {error}") from error
    return str(text)


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a prompt that is a text; the same for sampling, training and evaluation.

    They are those of `tokenizer(text)`, with what it puts before every text (a BOS token), but

    - once: a text that begins with the BOS token, as chat templates write it, does not get another;
    - without what it puts after every text (an EOS token), because the completion follows. An EOS
      token in the text itself stays.
    """
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Of a text that is a special token itself, what stands before it could not be told apart.
    inner = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for front in range(len(whole) - len(inner) + 1):
        if whole[front : front + len(inner)] == inner:
            prefix = whole[:front]
            pairs = zip(prefix, plain, strict=False)
            there = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            return prefix + plain[there:]
    return list(tokenizer(text)["input_ids"])


def encode_prompt(prompt: str | Messages, tokenizer: Any, name: str = "prompt") -> list[int]:
    """The token ids that a model continues; the same for sampling, training and evaluation.

    A text is encoded by `encode`. The special tokens of a conversation are
    those that the template writes, as in transformers' `apply_chat_template`.

    Raises:
        ValueError: as prompt_text; a text too long to tokenize, or with half a surrogate pair.
    """
    text = prompt_text(prompt, tokenizer, name)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name} must have at most {MOST_CHARACTERS} characters, got {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be a text of whole characters: {error}") from None
    if isinstance(prompt, str):
        return encode(tokenizer, text)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def message_text(text_or_messages: str | Messages) -> str:
    """A text itself; of a conversation (a prompt or a completion) the last message's content."""
    if isinstance(text_or_messages, str):
        return text_or_messages
    return str(text_or_messages[-1]["content"])
