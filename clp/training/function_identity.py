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
from itertools import permutations
from pathlib import PurePath
from types import MethodType
from typing import Any

import numpy as np

from clp.training.held_objects import inside, is_found_by_name, plain_text

# Objects of one function that are looked at: some lead to everything in the process.
MOST_OBJECTS = 10_000
# Plain values of one object that count one by one too, not only together, and objects that are
# looked at before others.
MOST_PARTS = 100
# Parts of a function that are kept in a run's folder: those nearest to it.
MOST_DISTINCTIVE = 1024
NUMBERS = "~"


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

    A counter, a cache or a clock in it changes its own part alone, and the digests of all plain
    values beside it. A value in a list has its value for a place, because a list that was made of a
    set has another order in each process.
    """
    found, kept = dict[str, str](), dict[int, Any]()
    waiting, later = deque([("", function)]), deque[tuple[str, Any]]()
    while (waiting or later) and len(kept) < MOST_OBJECTS:
        place, value = (waiting or later).popleft()
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
        found[place] = _digest(shown)
        numbers = all(_is_number(named[name]) for name in texts)
        names = list(map(str, named))
        found[_hash(place, "in order")] = _digest(*names, *texts.values(), numbers=numbers)
        values = *sorted(names), *sorted(texts.values())
        found[_hash(place, "sorted")] = _digest(*values, numbers=numbers)
        if len(texts) <= MOST_PARTS:
            times = Counter[str]()
            for name, text in texts.items():
                times[text] += 1
                where = (name,) if isinstance(contents, dict) else ("value", text, times[text])
                found[_hash(place, *where)] = _digest(text, numbers=_is_number(named[name]))
        # A cache of many objects comes after what the function is made of.
        (waiting if len(named) <= MOST_PARTS else later).extend(
            (_hash(place, n), named[n]) for n, text in plain_ones.items() if text is None
        )
    return found


def distinctive(insides: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Of each function the parts that tell it from another one, at most MOST_DISTINCTIVE."""
    places = dict.fromkeys(place for parts in insides.values() for place in parts)
    held = {place: [parts.get(place) for parts in insides.values()] for place in places}
    telling = [place for place in places if len(set(held[place])) > 1]
    telling.sort(key=lambda place: min(_rank(a, b) for a in held[place] for b in held[place]))
    telling = telling[:MOST_DISTINCTIVE]
    return {
        name: {place: parts[place] for place in telling if place in parts}
        for name, parts in insides.items()
    }


def swapped(
    then: Mapping[str, dict[str, str]], now: Mapping[str, dict[str, str]]
) -> tuple[str, str] | None:
    """A name, and that under which its function of now was known then, if there is such a one.

    A function is another one's if a part that told the two apart is that one's, and what was there
    has come to another name. Nothing else is needed, because a text that it was given with
    its name may have stayed. So one that has changed, or was corrected, is none. Texts and code
    decide before texts that differ in digits alone, such as two servers or devices given in turn,
    and these before numbers, which a state comes to by chance: the first of the three in which both
    functions have kept something, or exchanged.
    """
    names = sorted(name for name in then if name in now)

    def is_others(name: str, other: str, rank: int) -> bool | None:
        """None if this rank does not say."""
        kept = gained = lost = False
        for place in then[name].keys() | then[other].keys():
            was, others = then[name].get(place), then[other].get(place)
            if was == others or _rank(was, others) != rank:
                continue
            given, beside = now[name].get(place), now[other].get(place)
            kept |= was is not None and (given, beside) == (was, others)
            if given == others and (
                now[name] == now[other]
                or any(now[n].get(place) == was != then[n].get(place) for n in names)
            ):
                # What is absent says nothing alone: a cache is empty at each start.
                gained |= others is not None
                lost |= was is not None
        return True if gained and lost else False if kept else None

    for name, other in permutations(names, 2):
        told = (is_others(name, other, rank) for rank in range(3))
        if next((one for one in told if one is not None), False):
            return name, other
    return None


def _rank(one: str | None, other: str | None) -> int:
    """Of two parts in one place: 0 for texts, 1 if they differ in digits or one is absent, 2 for
    numbers."""
    if all(part is None or part.startswith(NUMBERS) for part in (one, other)):
        return 2
    return int(one is None or other is None or one[:4] == other[:4])


def _digest(*texts: str, numbers: bool = False) -> str:
    """NUMBERS, or what the texts are without their digits, and the digest of the texts."""
    start = NUMBERS if numbers else _hash(*(re.sub(r"\d", "", text) for text in texts))[:4]
    return start + _hash(*texts)


def _hash(*texts: object) -> str:
    joined = "\n".join(map(str, texts)).encode(errors="surrogatepass")
    return hashlib.sha256(joined).hexdigest()[:12]


def _is_number(value: Any) -> bool:
    """Of a plain value: whether it is a number, True, False or None."""
    return value is None or issubclass(type(value), int | float | np.number | np.bool_)


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
