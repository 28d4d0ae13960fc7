"""Lines of JSON to requests, and their completions to records, in order and in little memory."""

import hashlib
import io
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from clp.data.json_lines import Line
from clp.engine.requests import MOST_COMPLETIONS, Completion, SamplingParams
from clp.engine.sampler import Sampler
from clp.engine.sequence import Request

# Requests that wait, run, or wait to be given out, in batches: enough that a free slot finds one.
QUEUED_BATCHES = 4


class Source(NamedTuple):
    """Where the lines are: a file, or prompts held in memory as lines {"prompt": ...}."""

    name: str
    path: Path | None
    text: bytes = b""

    @classmethod
    def of_prompts(cls, prompts: Sequence[str]) -> "Source":
        """A line for each prompt."""
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        return cls("the prompts", None, text.encode())

    @classmethod
    def of_file(cls, path: str | Path) -> "Source":
        """The lines of a file, which is read twice: a pipe will not do.

        Raises: ValueError where it is no file that can be read.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"input {path} cannot be read: it is no file (a pipe will not do)")
        return cls(str(path), path)

    def open(self) -> io.BytesIO | io.BufferedReader:
        """From the beginning."""
        return io.BytesIO(self.text) if self.path is None else self.path.open("rb")

    def sha256(self) -> str:
        """Of the content, in hex."""
        with self.open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def completions_of(line: Line, n: int) -> int:
    """Completions that a line asks for: its own "n", else `n` (for a bad line too)."""
    if b'"n"' not in line.raw:
        return n
    try:
        own = line.parse().get("n")
    except ValueError:
        return n
    return own if type(own) is int and 1 <= own <= MOST_COMPLETIONS else n


class Defaults(NamedTuple):
    """What holds for lines that do not say otherwise."""

    params: SamplingParams
    weights: str | None
    simplex: bool


def check_defaults(
    sampler: Sampler, defaults: Defaults, prompts: Sequence[str | Sequence[int]] = ()
) -> None:
    """Raises ValueError where no line could be served with the defaults, or not these prompts.

    Without prompts a single token stands for the shortest there is.
    """
    corner = [1.0] + [0.0] * (len(sampler.policy.objectives) - 1)
    weights = corner if defaults.weights is None else defaults.weights
    for i, prompt in enumerate(prompts or [[0]]):
        try:
            sampler.cancel(
                sampler.submit(prompt, weights, defaults.params, simplex=defaults.simplex)
            )
        except (ValueError, TypeError) as error:
            where = f"prompt {i}: " if prompts else ""
            raise ValueError(f"{where}{error}") from error


def line_seed(base_seed: int, line: int) -> int:
    """The seed of a line for which none is given: 62 bits of SHA-256 of "base_seed line"."""
    return int.from_bytes(hashlib.sha256(f"{base_seed} {line}".encode()).digest()[:8], "big") >> 2


class Group(NamedTuple):
    """A line's records: its n completions, or the one that says what is wrong with it."""

    line: int
    records: list[dict[str, Any]]

    @property
    def failed(self) -> bool:
        """Whether there is an error among them."""
        return any("error" in record for record in self.records)


class _Pending(NamedTuple):
    line: Line
    completions: int
    row: dict[str, Any]  # as parsed, with the weights; {} where that failed
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
        kept |= {key: self.row[key] for key in ("prompt", "weights")}
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
    sampler: Sampler,
    lines: Iterator[Line],
    defaults: Defaults,
    base_seed: int,
    bar: "tqdm[Any]",
) -> Iterator[Group]:
    """The groups of the lines, in order, as they are completed.

    At most QUEUED_BATCHES * max_batch_size completions are asked for and not yet given out (or one
    line's, if that is more). A bad line becomes a record with "error"; the others go on.

    Args:
        sampler: With nothing else to do.
        lines: {"prompt": text, token ids or messages} with optional "weights", "id" (any JSON
            value, copied to the records) and the fields of SamplingParams.
        defaults: For what a line does not give.
        base_seed: A line without a seed, where the defaults have none, draws with `line_seed`.
        bar: Advances by completions.

    Records: "line", "index", "finish_reason", ["error"], ["id"], "prompt" and "weights" as given,
    "text", "token_ids", "logprobs", ["top_logprobs": for each token pairs (id, log-probability)];
    for a bad line "line", "index" 0, "error", ["id"].
    """
    pending: deque[_Pending] = deque()
    held, begin, drawn = 0, time.perf_counter(), sampler.tokens_drawn
    limit = QUEUED_BATCHES * sampler.max_batch_size
    try:
        while True:
            while held < limit and (line := next(lines, None)) is not None:
                pending.append(entry := _submit(sampler, line, defaults, base_seed))
                held += entry.completions
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
                held -= entry.completions
                yield entry.group()
    finally:
        for entry in pending:
            if entry.request is not None:
                sampler.cancel(entry.request)


def _submit(sampler: Sampler, line: Line, defaults: Defaults, base_seed: int) -> _Pending:
    row: dict[str, Any] = {}
    try:
        row = line.parse()
        own = {k: v for k, v in row.items() if k not in ("prompt", "weights", "id")}
        params = SamplingParams.parse(asdict(defaults.params) | own)
        if params.seed is None:
            params = replace(params, seed=line_seed(base_seed, line.number))
        if "prompt" not in row:
            raise ValueError('"prompt" is missing')
        if "weights" not in row:
            if defaults.weights is None:
                raise ValueError('no weights: give --weights, or "weights" in the line')
            row["weights"] = defaults.weights
        request = sampler.submit(row["prompt"], row["weights"], params, simplex=defaults.simplex)
    except (ValueError, TypeError) as error:
        return _Pending(line, completions_of(line, defaults.params.n), row, None, str(error))
    return _Pending(line, params.n, row, request)
