"""Requests of unequal lengths for whole generation runs, and what comes back from one."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

PROMPT_MEDIAN, PROMPT_RANGE = 16, (4, 64)
SPREAD = 0.7  # sigma of both log-normals: a long completion is several times a short one
GATE = -1
Weights = tuple[float, float]


class Batch(NamedTuple):
    """The requests of one run: prompts (token ids), completion lengths, weights, a seed."""

    prompts: list[list[int]]
    lengths: list[int]
    weights: list[Weights]
    seed: int


class Served(NamedTuple):
    """What a run gives: each request's new tokens, and its seconds to the first of them."""

    tokens: list[list[int]]
    first: list[float]


@dataclass(frozen=True)
class Workload:
    """Lengths that every run of a measurement shares; token ids are new in each run.

    New ids, because engines keep the keys and values of earlier prompts: a second run over the
    same prompts would skip their prefill. Run k with n distinct weights is the same for all
    providers.

    Attributes:
        prompts, completions: Lengths by request.
        vocab_size: Ids are drawn below it.
    """

    prompts: tuple[int, ...]
    completions: tuple[int, ...]
    vocab_size: int

    @property
    def tokens(self) -> int:
        """The useful tokens of a run: the sum of the completions' lengths."""
        return sum(self.completions)

    def batch(self, run: int, weight_rows: int) -> Batch:
        """The requests of run number `run`, with `weight_rows` distinct weights in turn.

        Run GATE is the error gate's, whose prompts are not those of a timed run.
        """
        draw = random.Random(f"{run}, {weight_rows}")
        prompts = [[draw.randrange(self.vocab_size) for _ in range(n)] for n in self.prompts]
        distinct = spread_weights(weight_rows)
        weights = [distinct[i % weight_rows] for i in range(len(prompts))]
        return Batch(prompts, list(self.completions), weights, seed=run * len(prompts))


def workload(
    count: int, context: int, vocab_size: int, completion_median: int, completions: tuple[int, int]
) -> Workload:
    """Log-normal lengths, the same for equal arguments, clipped to ranges and to the context.

    The longest prompt and the longest completion fit the context together, so that a batch padded
    to both does.

    Args:
        count: Requests.
        context: Tokens of prompt and completion at most.
        vocab_size: Of the model.
        completion_median, completions: Of the completions' lengths: median, (least, most).

    Raises: ValueError if the context has no room for the shortest request.
    """
    least = PROMPT_RANGE[0] + completions[0]
    if context < least:
        raise ValueError(f"context must have room for {least} tokens, got {context}")
    draw = random.Random(0)

    def length(median: int, low: int, high: int) -> int:
        return min(max(round(draw.lognormvariate(math.log(median), SPREAD)), low), high)

    low, high = PROMPT_RANGE
    prompts = [
        length(PROMPT_MEDIAN, low, min(high, context - completions[0])) for _ in range(count)
    ]
    most = min(completions[1], context - max(prompts))
    lengths = [length(completion_median, completions[0], most) for _ in prompts]
    return Workload(tuple(prompts), tuple(lengths), vocab_size)


def spread_weights(count: int) -> list[Weights]:
    """Weights (t, 1 - t) on the simplex, evenly spread; one is (1/2, 1/2)."""
    shares = [(i + 0.5) / count for i in range(count)]
    return [(t, 1 - t) for t in shares]


def counted(served: Served, batch: Batch, vocab_size: int) -> None:
    """Raises AssertionError unless every request has as many tokens as it asked for, all valid."""
    got = [len(tokens) for tokens in served.tokens]
    assert len(got) == len(batch.lengths), f"{len(got)} completions for {len(batch.lengths)}"
    for i, (count, wanted) in enumerate(zip(got, batch.lengths, strict=True)):
        assert count == wanted, f"request {i} has {count} tokens, expected {wanted}"
    for i, tokens in enumerate(served.tokens):
        assert all(0 <= t < vocab_size for t in tokens), f"request {i} has ids past the vocabulary"
    assert len(served.first) == len(got), "a time to the first token is missing"


def percentile(values: Sequence[float], level: float) -> float:
    """The smallest value that at least `level` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(level * len(ordered)) - 1)]
