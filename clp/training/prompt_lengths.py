"""The lengths of a training's prompts, looked at before it begins."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clp.data.conversation import encode_prompt
from clp.data.prompts import row_place
from clp.engine.requests import SamplingParams, parse_prompt
from clp.engine.sampler import Sampler
from clp.policies.policy import Policy


def fitting_rows(
    rows: Sequence[dict[str, Any]],
    policy: Policy,
    sampler: Sampler | None,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    path: str | Path | None = None,
    *,
    hint: str = "",
    setting: str = "max_completion_length",
) -> list[dict[str, Any]]:
    """The rows whose prompts fit the model's context together with a completion.

    Args:
        sampler: Whose cache the longest of them must fit; None: that is not looked at.
        max_prompt_length: Leaves out prompts of more tokens and says on standard error how many;
            None: a prompt that is too long is an error.
        path: The file that the rows are from, for messages; None for rows given in Python.
        hint: How prompts that are too long can be left out, for messages.
        setting: What the caller's max_completion_length comes from, for messages.

    Raises:
        ValueError: a prompt that is too long for the context or for the sampler's cache, without
            tokens, with tokens that the model does not have, or refused by the chat template, with
            its file and line; a max_prompt_length that is larger than what fits; no prompt that is
            left.
    """
    prefix = policy.conditioning.longest_prefix(policy.objectives, policy.tokenizer)
    most = policy.context_length - max_completion_length - prefix
    context = (
        f"the model's context of {policy.context_length} tokens less "
        f"{setting}={max_completion_length}" + (f" and {prefix} for the weights" if prefix else "")
    )
    if most < 1:
        raise ValueError(f"{setting} leaves no room for a prompt: {context} is {most}")
    if max_prompt_length is not None and max_prompt_length > most:
        raise ValueError(
            f"max_prompt_length must be at most {most} ({context}), got {max_prompt_length}"
        )
    # Shown only if it takes long.
    shown = tqdm(rows, desc="prompt lengths", unit="prompt", delay=2, leave=False)
    lengths: list[int] = []
    vocab_size = policy.vocab_size
    for i, row in enumerate(shown):
        try:
            ids = parse_prompt(row["prompt"], policy.tokenizer, vocab_size, "prompt")
        except ValueError as error:
            raise ValueError(f"{row_place(i, path)}: {error}") from error
        lengths.append(len(ids))
    limit = most if max_prompt_length is None else max_prompt_length
    fits = [length <= limit for length in lengths]
    dropped = fits.count(False)
    if dropped and max_prompt_length is None:
        first = fits.index(False)
        raise ValueError(
            f"{row_place(first, path)}: the prompt has {lengths[first]} tokens, at most {most} fit "
            f"({context}); {dropped} of {len(rows)} prompts are too long{hint}"
        )
    if dropped == len(rows):
        raise ValueError(f"all {len(rows)} prompts have more than {limit} tokens")
    if dropped:
        text = f"left out {dropped} of {len(rows)} prompts: they have more than {limit} tokens"
        tqdm.write(text, file=sys.stderr)
    if sampler is not None:
        longest = max((length, i) for i, length in enumerate(lengths) if fits[i])[1]
        _try(policy, sampler, rows[longest], max_completion_length, row_place(longest, path))
    return [row for row, fit in zip(rows, fits, strict=True) if fit]


def _try(policy: Policy, sampler: Sampler, row: Any, max_tokens: int, place: str) -> None:
    """Submits the longest prompt, to see that its keys and values fit the cache."""
    count, params = len(policy.objectives), SamplingParams(max_tokens=max_tokens)
    try:
        request = sampler.submit(row["prompt"], [1 / count] * count, params)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    sampler.cancel(request)


def tokens_digest(policy: Policy, rows: Sequence[dict[str, Any]]) -> str:
    """A digest of the vocabulary, the end tokens and the ids of the first 1,000 prompts."""
    tokenizer, found = policy.tokenizer, hashlib.sha256()
    found.update(repr(sorted(tokenizer.get_vocab().items())).encode(errors="surrogatepass"))
    found.update(repr(sorted(policy.end_ids)).encode())
    for row in rows[:1000]:
        found.update(repr(encode_prompt(row["prompt"], tokenizer)).encode())
    return found.hexdigest()
