"""What tells functions given in Python apart when a run is resumed: their names and their insides.

The name of a function must be that of before. What it computes may have changed (it was corrected,
or what it reads is a state); it is compared only to see whether two functions were swapped.
"""

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import PurePath
from types import MethodType
from typing import Any

import numpy as np

from clp.training.held_objects import inside, is_found_by_name, plain_text

# Objects of one function that are looked at: some lead to everything in the process.
MOST_OBJECTS = 10_000
# Plain values of one object that count one by one too, not only together.
MOST_PARTS = 100
# Parts of a function that are kept in a run's folder: those nearest to it.
MOST_DISTINCTIVE = 256
WEAK = "~"


def plain(value: Any) -> Any:
    """A value as JSON has it: equal for equal ones, in whatever order a mapping holds its keys."""
    kind = type(value)  # not isinstance or the object's own: it may pose as another, or answer all
    if value is None or issubclass(kind, str | int | float):
        return value
    if issubclass(kind, Mapping):
        return {"keys": sorted([repr(k), plain(v)] for k, v in value.items())}
    if issubclass(kind, list | tuple):
        return [plain(one) for one in value]
    if issubclass(kind, set | frozenset):
        return {"set": sorted(json.dumps(plain(one)) for one in value)}
    if is_dataclass(kind):
        return {kind.__name__: plain(vars(value))}
    if hasattr(kind, "tolist"):
        return plain(value.tolist())
    return {kind.__name__: _without_address(value)}


def name_of(function: Any) -> str:
    """The name of a function or of an object's class, and the plain values that a partial binds.

    Texts, which may be secret, count by their digests; of other values that it binds, such as a
    cache that fills, the kind alone.
    """
    kind = type(function)
    if issubclass(kind, partial):
        keywords = {name: _kind(value) for name, value in function.keywords.items()}
        bound = json.dumps([list(map(_kind, function.args)), keywords], sort_keys=True)
        return f"{name_of(function.func)} with {bound}"
    if kind is MethodType:
        return name_of(function.__func__)
    try:  # not getattr: an object may answer to any name
        return str(object.__getattribute__(function, "__qualname__"))
    except AttributeError:
        return kind.__qualname__


def insides_of(function: Any) -> dict[str, str]:
    """Digests of the function's parts, by digests of their places in it: its code, what it is bound
    to, what its closure and its file's names hold, and what these hold.

    A counter, a cache or a clock in it changes its own part alone. A value in a list has its value
    for a place, because a list that was made of a set has another order in each process. Digests of
    numbers alone begin with WEAK: a state comes to be that of another function by chance. Those of
    other values begin with that of the value without its digits.
    """
    found, kept = dict[str, str](), dict[int, Any]()
    waiting = deque([("", function)])
    while waiting and len(kept) < MOST_OBJECTS:
        place, value = waiting.popleft()
        again = id(value) in kept
        kept[id(value)] = value  # so that no id is given twice
        shown, contents = (type(value).__qualname__, []) if again else inside(value)
        named: dict[Any, Any] = (
            dict(contents) if isinstance(contents, dict) else dict(enumerate(contents))
        )
        if not is_found_by_name(type(value)):
            named["class"] = type(value)
        # Plain values here and now: Python may share them.
        plain_ones = {name: plain_text(one) for name, one in named.items()}
        texts = {name: text for name, text in plain_ones.items() if text is not None}
        weak = WEAK * all(_is_number(named[name]) for name in texts)
        found[place] = _hash(shown)
        found[_hash(place, "in order")] = weak + _hash(*named, *texts.values())
        found[_hash(place, "sorted")] = weak + _hash(
            *sorted(map(str, named)), *sorted(texts.values())
        )
        if len(texts) <= MOST_PARTS:
            times = Counter[str]()
            for name, text in texts.items():
                times[text] += 1
                where = (name,) if isinstance(contents, dict) else ("value", text, times[text])
                stem = WEAK if _is_number(named[name]) else _hash(re.sub(r"\d", "", text))[:4]
                found[_hash(place, *where)] = stem + _hash(text)
        waiting.extend(
            (_hash(place, n), named[n]) for n, text in plain_ones.items() if text is None
        )
    return found


def distinctive(insides: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Of each function the parts that tell it from another one, at most MOST_DISTINCTIVE."""
    places = dict.fromkeys(place for parts in insides.values() for place in parts)
    telling = [p for p in places if len({parts.get(p) for parts in insides.values()}) > 1]
    telling.sort(key=lambda p: all(_is_weak(parts[p]) for parts in insides.values() if p in parts))
    telling = telling[:MOST_DISTINCTIVE]
    return {
        name: {place: parts[place] for place in telling if place in parts}
        for name, parts in insides.items()
    }


def swapped(
    then: Mapping[str, dict[str, str]], now: Mapping[str, dict[str, str]]
) -> tuple[str, str] | None:
    """A name, and that under which its function of now was known then, if there is such a one.

    A function is another one's if as many of the parts that told the two apart are that one's as
    are its own (a text that it was given with its name is not all that it is); if only numbers and
    digits in texts told them apart, if more are. And that of then under its name must be given
    under another name now. So one that has changed, or was corrected, is none.
    """

    def is_others(name: str, other: str) -> bool:
        own, others, given = then[name], then[other], now[name]
        strong, weak = [0, 0], [0, 0]  # of its own and of the other's
        # What is absent says nothing: a cache is empty at each start.
        for place in given.keys() & (own.keys() | others.keys()):
            if own.get(place) != others.get(place):
                numbered = own.get(place, "")[:4] == others.get(place, "")[:4]
                votes = weak if numbered or _is_weak(given[place]) else strong
                for i, parts in enumerate((own, others)):
                    votes[i] += given[place] == parts.get(place)
        return strong[1] >= strong[0] if any(strong) else weak[1] > weak[0]

    names = sorted(name for name in then if name in now)
    moved = [(n, o) for n in names for o in names if n != o and is_others(n, o)]
    held = {other for _, other in moved}
    for name, other in moved:
        if name in held or now[name] == now[other]:
            return name, other
    return None


def _hash(*texts: object) -> str:
    joined = "\n".join(map(str, texts)).encode(errors="surrogatepass")
    return hashlib.sha256(joined).hexdigest()[:12]


def _is_number(value: Any) -> bool:
    """Of a plain value: whether it is a number, True, False or None."""
    return value is None or issubclass(type(value), int | float | np.number | np.bool_)


def _is_weak(digest: str) -> bool:
    return digest.startswith(WEAK)


def _kind(value: Any) -> Any:
    kind = type(value)
    if issubclass(kind, np.generic):
        value = value.item()
    if issubclass(kind, PurePath):
        value = str(value)
    kind = type(value)  # not isinstance: an object may pose as another
    if issubclass(kind, str):
        return f"text {hashlib.sha256(value.encode(errors='surrogatepass')).hexdigest()[:12]}"
    plain_number = issubclass(kind, int | float) and not _is_huge(value)
    return value if value is None or plain_number else kind.__name__


def _is_huge(value: Any) -> bool:
    """Whether Python refuses to write the integer: more than 4,300 digits."""
    return isinstance(value, int) and value.bit_length() > 14_000


def _without_address(value: Any) -> str:
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))
