"""Input lines, and output in JSON Lines that a killed run continues.

Beside out.jsonl there is out.jsonl.meta.json, written before the first line. It says which run the
lines belong to: SHA-256 of the input and of the policy's clp.json, the options that change the
output, and the seed from which those of the lines are made. Lines are written in the order of the
input, in groups: the completions of one input line.
"""

import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clp.data.json_lines import Line, read_json, read_lines
from clp.engine.requests import MOST_COMPLETIONS
from clp_kernels.files import lock_file, write_whole

FORMAT = 1
# How every record begins (clp/serving/jsonl.py): that of a bad line has an error as third key.
_RECORD = re.compile(rb'\{"line": (\d+), "index": (\d+), "(error|finish_reason)": "(\w*)')


class Source(NamedTuple):
    """The input lines: a file, or prompts in memory as lines {"prompt": ...}."""

    name: str
    path: Path | None
    text: bytes = b""

    @classmethod
    def of_prompts(cls, prompts: Sequence[str]) -> "Source":
        """One line per prompt."""
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        return cls("the prompts", None, text.encode())

    @classmethod
    def of_file(cls, path: str | Path) -> "Source":
        """The lines of a file, which is read twice: a pipe will not do.

        Raises: ValueError if it is not a file.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"input {path} cannot be read: it is not a file (a pipe will not do)")
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


class Group(NamedTuple):
    """A line's records: its n completions, or one that says what is wrong with the line."""

    line: int
    records: list[dict[str, Any]]

    @property
    def failed(self) -> bool:
        """Whether there is an error among them."""
        return any("error" in record for record in self.records)


class Run(NamedTuple):
    """What makes the output what it is."""

    input_sha256: str
    policy_sha256: str
    options: Mapping[str, Any]  # JSON values


class Start(NamedTuple):
    """Where a run begins or goes on.

    Attributes:
        base_seed: The run's seed.
        line: The last input line whose group is complete in the file; 0 if there is none.
        completions: Those that the lines up to this one ask for.
        failed: Lines among them that failed.
        end: The file's bytes that are kept.
        size: Its bytes as they were found.
        rest: Whether the input has lines after `line`.
    """

    base_seed: int
    line: int = 0
    completions: int = 0
    failed: int = 0
    end: int = 0
    size: int = 0
    rest: bool = True

    @classmethod
    def new(cls) -> "Start":
        """The beginning of a run, with its own seed."""
        return cls(secrets.randbits(62))


def sidecar(path: Path) -> Path:
    """The file that says which run `path` belongs to."""
    return path.with_name(path.name + ".meta.json")


def find_start(path: Path, run: Run, source: Source, n: int) -> Start:
    """Where a run that writes `path` begins; changes nothing.

    A line that does not say otherwise asks for n completions.

    Raises: ValueError if there is a file that this run did not write, naming what differs.
    """
    if not path.parent.is_dir():
        raise ValueError(f"output {path}: the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        raise ValueError(f"output {path} must be a file")
    if not path.exists() or not path.stat().st_size:
        return Start.new()
    base_seed = _recorded_seed(path, run)
    with path.open("rb") as written, source.open() as stream:
        return _walk(path, written, read_lines(stream), base_seed, n)


@contextmanager
def open_output(path: Path, run: Run, start: Start) -> Iterator[BinaryIO]:
    """The file, cut to what `start` keeps and open at its end; a new one gets its sidecar first.

    Raises: ValueError if another process writes it, or has done so since `find_start`.
    """
    handle = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    with handle:
        if not lock_file(handle.fileno()):
            raise ValueError(f"output {path} is being written by another process")
        if os.fstat(handle.fileno()).st_size != start.size:
            raise ValueError(f"output {path} has been changed by another process")
        if not start.size:
            meta = {"format": FORMAT, **run._asdict(), "base_seed": start.base_seed}
            write_whole(sidecar(path), f"{json.dumps(meta, indent=2)}\n".encode())
        handle.truncate(start.end)
        handle.seek(start.end)
        yield handle


def write_group(handle: BinaryIO, group: Group) -> None:
    """Appends a line's records; from then on they survive the end of the process."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in group.records)
    handle.write(text.encode())
    handle.flush()


def _recorded_seed(path: Path, run: Run) -> int:
    """The base seed of the sidecar. Raises: ValueError if it is not this run's."""
    meta = sidecar(path)
    try:
        found = read_json(meta)
    except FileNotFoundError:
        raise ValueError(
            f"output {path} exists, and no {meta.name} says that a run can go on with it; it is "
            "not overwritten"
        ) from None
    kinds = {"format": int, "input_sha256": str, "policy_sha256": str, "options": dict,
             "base_seed": int}  # fmt: skip
    if not isinstance(found, dict) or any(type(found.get(k)) is not t for k, t in kinds.items()):
        raise ValueError(f"{meta} must be an object with {', '.join(kinds)}")
    if found["format"] != FORMAT:
        raise ValueError(f"{meta} has format {found['format']}, expected {FORMAT}")
    differences = []
    if found["input_sha256"] != run.input_sha256:
        differences.append("the input has other content")
    if found["policy_sha256"] != run.policy_sha256:
        differences.append("the policy is another one")
    then, now = found["options"], json.loads(json.dumps(run.options))
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            differences.append(f"{name} was {then.get(name)!r} and is {now.get(name)!r}")
    if differences:
        raise ValueError(
            f"output {path} belongs to another run: {'; '.join(differences)}. Name another output, "
            f"or delete {path.name} and {sidecar(path).name} to start over"
        )
    return int(found["base_seed"])


class _Record(NamedTuple):
    line: int
    completion: int
    bad_line: bool
    failed: bool
    end: int  # bytes of the file up to its end


def _records(path: Path, written: BinaryIO) -> Iterator[_Record]:
    """The complete records of an output; a last line without its end is not counted."""
    end = 0
    for number, raw in enumerate(written, start=1):
        if not raw.endswith(b"\n"):
            return
        match = _RECORD.match(raw)
        if match is None or not raw.endswith(b"}\n"):
            raise ValueError(f"{path}:{number} is not a record of a sampling run")
        end += len(raw)
        line, index, third, value = match.groups()
        bad = third == b"error"
        yield _Record(int(line), int(index), bad, bad or value == b"error", end)


def _walk(path: Path, written: BinaryIO, lines: Iterator[Line], base_seed: int, n: int) -> Start:
    """Follows input and output side by side to the first group that is not complete."""
    size = os.fstat(written.fileno()).st_size
    at = Start(base_seed, size=size)
    records = _records(path, written)
    for line in lines:
        count, failed, record = completions_of(line, n), False, None
        for index in range(count):
            record = next(records, None)
            if record is None:
                return at
            if (record.line, record.completion) != (line.number, index):
                raise ValueError(
                    f"output {path} does not follow its input: completion {record.completion} of "
                    f"line {record.line} is where {index} of line {line.number} belongs"
                )
            failed |= record.failed
            if record.bad_line:
                break
        assert record is not None
        at = Start(
            base_seed, line.number, at.completions + count, at.failed + failed, record.end, size
        )
    if next(records, None) is not None:
        raise ValueError(f"output {path} goes on behind the end of its input")
    return at._replace(rest=False)
