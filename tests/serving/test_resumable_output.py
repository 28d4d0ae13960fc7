"""Where a run goes on, and what it refuses to go on with."""

import json

import pytest

from clp.serving.resumable_output import (
    Group,
    Run,
    Source,
    Start,
    find_start,
    open_output,
    sidecar,
    write_group,
)

RUN = Run("in", "policy", {"temperature": 1.0, "stop": ("a",), "n": 1})
# Line 2 is blank; line 3 is bad: one record where the bar expects three.
INPUT = b'{"prompt": "a"}\n\n{"n": 3}\n{"prompt": "b", "n": 3}\n{"prompt": "c"}\n'
GROUPS = [
    Group(1, [{"line": 1, "index": 0, "finish_reason": "stop", "text": "x"}]),
    Group(3, [{"line": 3, "index": 0, "error": "no prompt"}]),
    Group(4, [{"line": 4, "index": i, "finish_reason": "length", "text": "y"} for i in range(3)]),
    Group(5, [{"line": 5, "index": 0, "finish_reason": "error", "error": "memory", "text": ""}]),
]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    return Source.of_file(tmp_path / "in.jsonl")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def whole(path, source):
    """A complete output; its bytes."""
    with open_output(path, RUN, find_start(path, RUN, source, 1)) as handle:
        for group in GROUPS:
            write_group(handle, group)
    return path.read_bytes()


def test_a_new_output_changes_nothing_until_it_is_opened(path, source, tmp_path):
    start = find_start(path, RUN, source, 1)
    assert start == Start(start.base_seed) and 0 <= start.base_seed < 2**62
    assert start.base_seed != find_start(path, RUN, source, 1).base_seed
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    with open_output(path, RUN, start):
        meta = json.loads(sidecar(path).read_text())
        assert meta["base_seed"] == start.base_seed and meta["input_sha256"] == "in"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "in.jsonl", "out.jsonl", "out.jsonl.meta.json",
    ]  # fmt: skip


def test_a_complete_output_has_no_rest(path, source, whole):
    start = find_start(path, RUN, source, 1)
    assert not start.rest
    assert (start.line, start.completions, start.failed) == (5, 8, 2)
    assert start.end == start.size == len(whole)


def test_cut_anywhere_it_goes_on_at_the_first_group_that_is_missing(path, source, whole):
    ends, text = [], b""
    for group in GROUPS:
        text += b"".join(json.dumps(r).encode() + b"\n" for r in group.records)
        ends.append(len(text))
    assert text == whole
    seed = json.loads(sidecar(path).read_text())["base_seed"]
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        start = find_start(path, RUN, source, 1)
        done = sum(end <= size for end in ends)
        assert start.rest and start.base_seed == seed
        assert start.line == [0, 1, 3, 4][done]
        assert start.end == ([0, *ends][done])
        assert start.completions == [0, 1, 4, 7][done] and start.failed == (done >= 2)
        with open_output(path, RUN, start) as handle:
            assert path.read_bytes() == whole[: start.end]
            for group in GROUPS[done:]:
                write_group(handle, group)
        assert path.read_bytes() == whole


def test_a_group_is_in_the_file_as_soon_as_it_is_written(path, source):
    with open_output(path, RUN, find_start(path, RUN, source, 1)) as handle:
        for count, group in enumerate(GROUPS[:2], start=1):
            write_group(handle, group)
            assert path.read_bytes().count(b"\n") == count


def test_an_output_of_another_run_is_refused_and_kept(path, source, whole):
    meta = sidecar(path).read_text()
    for run, message in (
        (RUN._replace(input_sha256="x"), "the input has other content"),
        (RUN._replace(policy_sha256="x"), "the policy is another one"),
        (RUN._replace(options=RUN.options | {"temperature": 0.5}), "temperature was 1.0 and is 0"),
        (RUN._replace(options=RUN.options | {"stop": ()}), r"stop was \['a'\] and is \[\]"),
        (RUN._replace(options=RUN.options | {"more": 1}), "more was None and is 1"),
    ):
        with pytest.raises(ValueError, match=f"another run: {message}"):
            find_start(path, run, source, 1)
    assert path.read_bytes() == whole and sidecar(path).read_text() == meta


def test_an_output_without_sidecar_is_refused(path, source):
    path.write_text("mine\n")
    with pytest.raises(ValueError, match="not overwritten"):
        find_start(path, RUN, source, 1)
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "other format"])
def test_a_sidecar_that_is_none(path, source, whole, text):
    message = r"meta\.json(: not JSON| must be an object)"
    if text == "other format":
        text, message = sidecar(path).read_text().replace(": 1,", ": 2,", 1), "format 2, expected 1"
    sidecar(path).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_start(path, RUN, source, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace(b'"index": 1', b'"index": 2'), "completion 2 of line 4 is where 1 of"),
        (lambda t: t.replace(b'"line": 3', b'"line": 2'), "of line 2 is where 0 of line 3"),
        (lambda t: t[t.index(b"\n") + 1 :], "of line 3 is where 0 of line 1"),
        (lambda t: t + t[: t.index(b"\n") + 1], "goes on behind the end"),
        (lambda t: t.replace(b'{"line": 5', b'{"row": 5'), ":6 is not a record"),
        (lambda t: t + b"\0\0\0\n", ":7 is not a record"),
    ],
)
def test_an_output_that_was_edited_is_refused(path, source, whole, change, message):
    path.write_bytes(change(whole))
    with pytest.raises(ValueError, match=message):
        find_start(path, RUN, source, 1)


def test_two_processes_do_not_write_one_output(path, source, whole):
    path.write_bytes(whole[:50])
    start = find_start(path, RUN, source, 1)
    refused = pytest.raises(ValueError, match="being written by another process")
    with open_output(path, RUN, start), refused, open_output(path, RUN, start):
        pass
    path.write_bytes(whole)
    refused = pytest.raises(ValueError, match="changed by another process")
    with refused, open_output(path, RUN, start):
        pass
    assert path.read_bytes() == whole


def test_what_cannot_be_an_output(tmp_path, source):
    with pytest.raises(ValueError, match="must be a file"):
        find_start(tmp_path, RUN, source, 1)
    with pytest.raises(ValueError, match="none does not exist"):
        find_start(tmp_path / "none" / "out.jsonl", RUN, source, 1)
