"""A range of KL strengths. Without torch: the command line's help must not wait for it."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

# Nearer to 0 or 1, alpha / (1 - alpha) or its inverse loses its digits in float32.
SMALLEST = 1e-6


class KLRange(NamedTuple):
    """The strengths alpha, from low to high, that a policy is trained on (CLPConfig.kl_range)."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The geometric mean, around which log-uniform draws are symmetric."""
        return math.sqrt(self.low * self.high)

    @classmethod
    def parse(cls, value: Any, name: str = "kl_range") -> "KLRange":
        """From two numbers. Raises: ValueError unless SMALLEST <= low < high <= 1 - SMALLEST."""
        numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
        plain = [isinstance(v, Real) and not isinstance(v, bool) for v in numbers]
        least, most = SMALLEST, 1 - SMALLEST
        if plain != [True, True] or not least <= numbers[0] < numbers[1] <= most:
            raise ValueError(
                f"{name} must be two numbers, {least:g} <= low < high <= {most}, got {value!r}"
            )
        return cls(float(numbers[0]), float(numbers[1]))
