"""JSON Lines of prompts to JSON Lines of completions, in order and in little memory."""

import hashlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from clp.data.condition import Condition
from clp.data.conversation import is_conversation, message_text, user_message
from clp.data.json_lines import Line, read_lines
from clp.data.names import closest
from clp.engine.requests import Completion, SamplingParams
from clp.engine.sampler import Sampler
from clp.engine.sequence import Request
from clp.serving.resumable_output import (
    Group,
    Run,
    Source,
    Start,
    completions_of,
    find_start,
    open_output,
    write_group,
)

# Requests that wait, run, or wait to be given out, in batches: enough that a free slot finds one.
QUEUED_BATCHES = 4

# The fields of a line that are no sampling parameters, and all of them.
_OWN_FIELDS = ("prompt", "weights", "kl", "id")
_FIELDS = (*_OWN_FIELDS, *(field.name for field in fields(SamplingParams)))


class Defaults(NamedTuple):
    """What a line that does not say otherwise is sampled with."""

    params: SamplingParams
    weights: str | None
    simplex: bool
    chat: bool = False
    kl: float | None = None

    def prompt(self, given: Any) -> Any:
        """What the sampler gets: with `chat` a text is the message of a user."""
        return [user_message(given)] if self.chat and isinstance(given, str) else given


def check_defaults(
    sampler: Sampler, defaults: Defaults, prompts: Sequence[str | Sequence[int]] = ()
) -> None:
    """Raises ValueError if no line could be served with the defaults, or one of the prompts not.

    Without prompts a single token, or with `chat` a message, stands for the shortest possible one.
    """
    shortest: list[Any] = ["a"] if defaults.chat else [[0]]
    corner = [1.0] + [0.0] * (len(sampler.policy.objectives) - 1)
    weights = corner if defaults.weights is None else defaults.weights
    for i, prompt in enumerate(prompts or shortest):
        try:
            request = sampler.submit(
                defaults.prompt(prompt), Condition(weights, defaults.kl), defaults.params,
                simplex=defaults.simplex,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            where = f"prompt {i}: " if prompts else ""
            raise ValueError(f"{where}{error}") from error
        sampler.cancel(request)


def line_seed(base_seed: int, line: int) -> int:
    """The seed of a line for which none is given: 62 bits of SHA-256 of "base_seed line"."""
    return int.from_bytes(hashlib.sha256(f"{base_seed} {line}".encode()).digest()[:8], "big") >> 2


class _Pending(NamedTuple):
    line: Line
    completions: int
    row: dict[str, Any]  # as parsed, with the weights; {} if that failed
    request: Request | None
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.request is None or self.request.finished

    def group(self) -> Group:
        number = self.line.number
        kept = {key: self.row[key] for key in ("id",) if key in self.row}
        if self.request is None:
            return Group(number, [{"line": number, "index": 0, "error": self.error} | kept])
        kept |= {key: self.row[key] for key in ("prompt", "weights", "kl") if key in self.row}
        records = [_record(number, c, kept) for c in self.request.completions]
        return Group(number, records)


def _record(line: int, c: Completion, kept: dict[str, Any]) -> dict[str, Any]:
    # clp/serving/resumable_output.py knows records by their first three keys.
    record: dict[str, Any] = {"line": line, "index": c.index, "finish_reason": c.finish_reason}
    if c.error is not None:
        record["error"] = c.error
    record |= kept | {"text": c.text, "token_ids": c.token_ids, "logprobs": c.logprobs}
    if c.top_logprobs is not None:
        # Pairs, because JSON's keys are strings; a token that is ruled out has no finite one.
        record["top_logprobs"] = [
            [[token, logprob] for token, logprob in top.items() if math.isfinite(logprob)]
            for top in c.top_logprobs
        ]
    return record


def sample_lines(
    sampler: Sampler, lines: Iterator[Line], defaults: Defaults, base_seed: int, bar: "tqdm[Any]"
) -> Iterator[Group]:
    """The groups of the lines, in order, as they are completed.

    At most QUEUED_BATCHES * max_batch_size completions are asked for and not yet given out (or one
    line's, if that is more). A bad line becomes a record with "error"; the others go on.

    Args:
        sampler: Without other requests.
        lines: {"prompt": text, token ids or messages} with optional "weights", "kl", "id" (any JSON
            value, copied to the records) and the fields of SamplingParams.
        base_seed: If neither a line nor the defaults have a seed, the line draws with `line_seed`.
        bar: Advances by completions.

    Records: "line", "index", "finish_reason", ["error"], ["id"], and as given "prompt", "weights",
    ["kl"]; then "text", "token_ids", "logprobs", ["top_logprobs": for each token pairs (id,
    log-probability)]. Of a bad line: "line", "index" 0, "error", ["id"].
    """
    pending: deque[_Pending] = deque()
    asked, begin, drawn = 0, time.perf_counter(), sampler.tokens_drawn
    limit = QUEUED_BATCHES * sampler.max_batch_size
    try:
        while True:
            while asked < limit and (line := next(lines, None)) is not None:
                pending.append(entry := _submit(sampler, line, defaults, base_seed))
                asked += entry.completions
                if entry.request is None:
                    bar.update(entry.completions)
            if not pending:
                return
            if not pending[0].finished:
                bar.update(len(sampler.step()))
                rate = (sampler.tokens_drawn - drawn) / (time.perf_counter() - begin)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            while pending and pending[0].finished:
                entry = pending.popleft()
                asked -= entry.completions
                yield entry.group()
    finally:
        for entry in pending:
            if entry.request is not None:
                sampler.cancel(entry.request)


def _submit(sampler: Sampler, line: Line, defaults: Defaults, base_seed: int) -> _Pending:
    row: dict[str, Any] = {}
    try:
        row = line.parse()
        for name in row:
            if name not in _FIELDS:
                hint = closest(name, _FIELDS)
                raise ValueError(f"unknown field {name!r}{hint}; there are {', '.join(_FIELDS)}")
        own = {k: v for k, v in row.items() if k not in _OWN_FIELDS}
        params = replace(defaults.params, **own)
        if params.seed is None:
            params = replace(params, seed=line_seed(base_seed, line.number))
        if "prompt" not in row:
            raise ValueError('"prompt" is missing')
        if "weights" not in row:
            if defaults.weights is None:
                raise ValueError('no weights: give --weights, or "weights" in the line')
            row["weights"] = defaults.weights
        prompt = defaults.prompt(row["prompt"])
        if defaults.kl is not None:
            row.setdefault("kl", defaults.kl)
        condition = Condition(row["weights"], row.get("kl"))
        request = sampler.submit(prompt, condition, params, simplex=defaults.simplex)
    except (ValueError, TypeError) as error:
        return _Pending(line, completions_of(line, defaults.params.n), row, None, str(error))
    return _Pending(line, params.n, row, request)


def sample_file(
    source: Source,
    output: Path | None,
    defaults: Defaults,
    make_sampler: Callable[[], Sampler],
    *,
    policy_sha256: str = "",
    base_model: str | None = None,
) -> int:
    """Samples for every line, in order, and writes the records of `sample_lines`.

    Called again with the same arguments, it continues after what is written, with the seeds of the
    first run; if everything is written it says so. Changing max_batch_size, cache_gib or the
    device in between is allowed: log-probabilities then differ by rounding.

    Args:
        output: JSON Lines; clp/serving/resumable_output.py writes a second file beside it. None:
            the terminal, where errors go to standard error.
        make_sampler: Called before anything is written, if there is something to sample.
        policy_sha256, base_model: Which policy it is, recorded with the output.

    Returns: How many lines failed, those of earlier runs included.
    Raises: ValueError for an input without lines, or an output of another run.
    """
    n = defaults.params.n
    with source.open() as stream:
        total = sum(completions_of(line, n) for line in read_lines(stream, source.name))
    if not total:
        raise ValueError(f"{source.name} holds no prompt")

    def sample(sampler: Sampler, start: Start, give: Callable[[Group], None]) -> int:
        failed = start.failed
        with (
            source.open() as stream,
            tqdm(total=total, initial=start.completions, desc="sampling", unit="seq") as bar,
        ):
            lines = (line for line in read_lines(stream) if line.number > start.line)
            for group in sample_lines(sampler, lines, defaults, start.base_seed, bar):
                give(group)
                failed += group.failed
        return failed

    if output is None:
        sampler = make_sampler()
        return sample(sampler, Start.new(), partial(_show, sampler.policy.tokenizer, defaults.chat))
    options = asdict(defaults.params) | {"weights": defaults.weights, "simplex": defaults.simplex}
    if defaults.chat:
        options["chat"] = True
    if defaults.kl is not None:
        options["kl"] = defaults.kl
    run = Run(source.sha256(), policy_sha256, options | {"base_model": base_model})
    start = find_start(output, run, source, n)
    if not start.rest:
        tqdm.write(f"{output} is complete: nothing to do", file=sys.stderr)
        return start.failed
    sampler = make_sampler()
    if start.line:
        tqdm.write(f"{output}: continuing after line {start.line}", file=sys.stderr)
    with open_output(output, run, start) as handle:
        return sample(sampler, start, partial(write_group, handle))


def _show(tokenizer: Any, chat: bool, group: Group) -> None:
    for record in group.records:
        if "error" in record:
            tqdm.write(f"line {record['line']}: {record['error']}", file=sys.stderr)
            continue
        prompt = record["prompt"]
        if is_conversation(prompt):
            prompt = message_text(prompt)
        elif not isinstance(prompt, str):
            prompt = tokenizer.decode(prompt)
        # An answer is not the continuation of a message. Through tqdm, which takes the bar away.
        between = "\n" if chat or is_conversation(record["prompt"]) else ""
        tqdm.write(f"[{record['weights']}] {prompt}{between}{record['text']}")
