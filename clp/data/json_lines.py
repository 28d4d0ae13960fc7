"""JSON and JSON Lines written by users: one strict reader for prompts, inputs and cards.

A line ends at "\\n" (or "\\r\\n") and nowhere else: U+2028, U+0085 and the like are characters of a
text. Files are UTF-8, with or without a byte order mark.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

# A longer line is an error, and is not read into memory: 2^20 token ids are 8 MB of text.
MOST_LINE_BYTES = 2**26
# Python itself nests a few hundred values, but not in every place: writing one back, or showing it
# in a message, has less of the stack left than reading it had.
MOST_NESTING = 100
# Python's own bound, whose error speaks of a function of Python.
MOST_DIGITS = 4300
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What files begin with that are not UTF-8 text.
_OTHERS = {
    b"\x1f\x8b": "compressed by gzip", b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2", b"\xfd7zXZ\x00": "compressed by xz", b"PK\x03\x04": "a zip file",
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip


class Line(NamedTuple):
    """A line that is not blank; of one beyond MOST_LINE_BYTES only the beginning."""

    number: int  # from 1, blank ones counted
    raw: bytes

    def parse(self) -> dict[str, Any]:
        """The object. Raises: ValueError if the line is not one."""
        if len(self.raw) > MOST_LINE_BYTES:
            raise ValueError(f"longer than {MOST_LINE_BYTES} bytes")
        found = parse_json(self.raw)
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {type(found).__name__}")
        return found


def read_lines(stream: BinaryIO, name: str = "the input") -> Iterator[Line]:
    """The lines that are not blank, one at a time.

    Raises: ValueError with the name if the stream is compressed, UTF-16 or UTF-32.
    """
    number = 0
    while raw := stream.readline(MOST_LINE_BYTES + 1):
        number += 1
        rest = raw
        while not rest.endswith(b"\n") and (rest := stream.readline(2**20)):
            pass
        if number == 1:
            for beginning, what in _OTHERS.items():
                if raw.startswith(beginning):
                    raise ValueError(f"{name} cannot be read: it is {what}, not UTF-8 text")
            raw = raw.removeprefix(_BYTE_ORDER_MARK)
        if raw.strip():
            yield Line(number, raw)


def read_json(path: Path) -> Any:
    """The value in a file.

    Raises: OSError if it cannot be read; ValueError as parse_json, with the path.
    """
    try:
        return parse_json(path.read_bytes().removeprefix(_BYTE_ORDER_MARK))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """A value in strict JSON, such as can be written back, shown and sent to a tokenizer.

    Args:
        text: Bytes are UTF-8.

    Raises: ValueError for what is not JSON, NaN, Infinity, a number that is infinite as a float, a
        key that is given twice, half of a surrogate pair, or values nested deeper than
        MOST_NESTING.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        found = json.loads(
            text, parse_constant=_finite, parse_float=_finite, parse_int=_int,
            object_pairs_hook=_distinct,
        )  # fmt: skip
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise ValueError(f"not JSON: {what} at character {error.pos + 1}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON: byte {error.start + 1} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"nested too deeply: more than {MOST_NESTING} levels") from None
    # Most lines have neither, and need no search: half a surrogate comes from an escape, or from a
    # terminal whose bytes are not UTF-8.
    if text.count("[") + text.count("{") > MOST_NESTING or "\\u" in text or not text.isascii():
        _check_value(found)
    return found


def _check_value(value: Any) -> None:
    waiting = [(value, 1)]
    while waiting:
        one, depth = waiting.pop()
        if isinstance(one, str):
            if not one.isascii():
                try:
                    one.encode()
                except UnicodeEncodeError as error:
                    half = f"\\u{ord(one[error.start]):04x}"
                    raise ValueError(f"{half} is half of a surrogate pair") from None
        elif isinstance(one, dict | list):
            if depth > MOST_NESTING:
                raise ValueError(f"nested too deeply: more than {MOST_NESTING} levels")
            inner = [*one, *one.values()] if isinstance(one, dict) else one
            waiting += [(item, depth + 1) for item in inner]


def _int(text: str) -> int:
    if (digits := len(text.lstrip("-"))) > MOST_DIGITS:
        raise ValueError(f"an integer of {digits} digits is beyond the limit of {MOST_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice!r} is given twice")
    return found
