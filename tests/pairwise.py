"""Of many drawn cases a few that have every pair of values which the many have."""

import heapq
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any


def pairs(case: Any, axes: Sequence[str]) -> set[tuple[Any, ...]]:
    """Each two axes with the case's values of them."""
    return {(a, getattr(case, a), b, getattr(case, b)) for a, b in combinations(axes, 2)}


def covering(
    drawn: Sequence[Any], axes: Sequence[str], cost: Callable[[Any], float] = lambda case: 1
) -> list[Any]:
    """Takes the case with the most new pairs for its cost until no pair is left; in drawn order."""
    each = [pairs(case, axes) for case in drawn]
    left = set().union(*each)
    heap = [(-len(each[i]) / cost(case), i) for i, case in enumerate(drawn)]
    heapq.heapify(heap)
    chosen = []
    while left:
        _, i = heapq.heappop(heap)
        new = -len(each[i] & left) / cost(drawn[i])
        if heap and new > heap[0][0]:  # others have taken some of its pairs
            heapq.heappush(heap, (new, i))
            continue
        chosen.append(i)
        left -= each[i]
    return [drawn[i] for i in sorted(chosen)]


def check_covers(chosen: Sequence[Any], drawn: Sequence[Any], axes: Sequence[str]) -> None:
    """That no pair of values of the drawn cases is missing."""
    have = set().union(*(pairs(case, axes) for case in chosen))
    assert have == set().union(*(pairs(case, axes) for case in drawn))
