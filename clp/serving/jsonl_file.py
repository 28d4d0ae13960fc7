"""Sampling for the lines of a file: into one that a killed run continues, or onto the terminal."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from clp.data.json_lines import read_lines
from clp.engine.sampler import Sampler
from clp.serving.jsonl import Defaults, Group, Source, completions_of, sample_lines
from clp.serving.resumable_output import Run, Start, find_start, open_output, write_group


def sample_file(
    source: Source,
    output: Path | None,
    defaults: Defaults,
    make_sampler: Callable[[], Sampler],
    *,
    policy_sha256: str = "",
    base_model: str | None = None,
) -> int:
    """Samples for every line, in order, and writes what clp.serving.jsonl.sample_lines describes.

    Run again with the same arguments, it continues behind what is written, with the seeds of the
    first run; where everything is written it says so. Changing max_batch_size, cache_gib or the
    device in between is allowed: log-probabilities then differ by rounding.

    Args:
        source: The lines.
        output: JSON Lines; clp/serving/resumable_output.py writes a second file beside it. None:
        the
            terminal, where errors go to standard error.
        defaults: What holds for lines that do not say otherwise.
        make_sampler: Called when it is clear that there is something to do, before anything is
            written.
        policy_sha256, base_model: Which policy it is, recorded with the output.

    Returns: How many lines failed, those of earlier runs included.
    Raises: ValueError for an input without lines, or an output of another run.
    """
    n = defaults.params.n
    with source.open() as stream:
        total = sum(completions_of(line, n) for line in read_lines(stream, source.name))
    if not total:
        raise ValueError(f"{source.name} holds no prompt")
    options = asdict(defaults.params) | {
        "weights": defaults.weights, "simplex": defaults.simplex, "base_model": base_model,
    }  # fmt: skip
    run = Run(source.sha256(), policy_sha256, options)
    if output is None:
        sampler = make_sampler()
        return _sample(sampler, source, defaults, Start.new(), total, _printer(sampler))
    start = find_start(output, run, source, n)
    if not start.rest:
        tqdm.write(f"{output} is complete: nothing to do", file=sys.stderr)
        return start.failed
    sampler = make_sampler()
    if start.line:
        tqdm.write(f"{output}: going on behind line {start.line}", file=sys.stderr)
    with open_output(output, run, start) as handle:
        return _sample(sampler, source, defaults, start, total, lambda g: write_group(handle, g))


def _sample(
    sampler: Sampler,
    source: Source,
    defaults: Defaults,
    start: Start,
    total: int,
    give: Callable[[Group], None],
) -> int:
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


def _printer(sampler: Sampler) -> Callable[[Group], None]:
    def show(group: Group) -> None:
        for record in group.records:
            if "error" in record:
                tqdm.write(f"line {record['line']}: {record['error']}", file=sys.stderr)
                continue
            prompt = record["prompt"]
            if not isinstance(prompt, str):
                prompt = sampler.policy.tokenizer.decode(prompt)
            # Through tqdm, which takes the bar out of the way.
            tqdm.write(f"[{record['weights']}] {prompt}{record['text']}")

    return show
