"""Lines of JSON as they come in files: what ends a line, what is refused, and how it is said."""

import bz2
import gzip
import io
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clp.data import json_lines as module
from clp.data.json_lines import MOST_NESTING, parse_json, read_lines


def test_read_lines_counts_blank_lines_and_gives_the_others():
    found = list(read_lines(io.BytesIO(b'{"a": 1}\n\n  \r\n{"a": 2}')))
    assert [(line.number, line.parse()) for line in found] == [(1, {"a": 1}), (4, {"a": 2})]


def test_a_byte_order_mark_is_no_error_in_the_first_line_only():
    mark = "\ufeff".encode()
    first, second = read_lines(io.BytesIO(mark + b'{"a": 1}\n' + mark + b'{"a": 2}\n'))
    assert first.parse() == {"a": 1}
    with pytest.raises(ValueError, match="not JSON"):
        second.parse()


def test_an_endless_line_is_cut_and_the_next_one_is_read(monkeypatch):
    monkeypatch.setattr(module, "MOST_LINE_BYTES", 100)
    big = json.dumps({"prompt": "x" * 3_000_000})
    found = list(read_lines(io.BytesIO(f'{big}\n{{"prompt": "y"}}'.encode())))
    assert [line.number for line in found] == [1, 2] and len(found[0].raw) == 101
    with pytest.raises(ValueError, match="longer than 100 bytes"):
        found[0].parse()
    assert found[1].parse() == {"prompt": "y"}


SURROGATE = r"\\ud[0-9a-f]{3} is half of a surrogate pair"
DEEPEST = "[" * MOST_NESTING + "]" * MOST_NESTING
TOO_DEEP = "nested too deeply: more than 100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "NaN is not a finite"),
        ("[-Infinity]", "-Infinity is not a finite"),
        ("1e999", "1e999 is not a finite"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' is given twice"),
        ("[" * 200_000, "nested too deeply"),
        ("1" * 5000, "an integer of 5000 digits is beyond the limit of 4300"),
        ("[-" + "1" * 4301 + "]", "an integer of 4301 digits"),
        ("", "Expecting value"),
        ('"a\x0bb"', "not JSON: Invalid control character at character 3"),
        (b'"a\xff"', "not JSON: byte 3 is not UTF-8"),
        (r'"\ud800"', SURROGATE),
        (r'{"\udc00": 1}', SURROGATE),
        (r'[[{"a": "x\udfff"}]]', SURROGATE),
        ('"\udcff"', SURROGATE),
        (f"[{DEEPEST}]", TOO_DEEP),
        ('{"a":' * 900 + "1" + "}" * 900, TOO_DEEP),
        ('{"a":[' * 100_000, TOO_DEEP),
    ],
)
def test_json_is_strict(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@pytest.mark.parametrize("character", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
def test_only_a_newline_ends_a_line(character):
    rows = [{"prompt": f"a{character}b"}, {"prompt": "c"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    found = list(read_lines(io.BytesIO(text.encode())))
    assert [line.number for line in found] == [1, 2]
    assert [line.parse() for line in found] == rows


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.floats(allow_nan=False,
       allow_infinity=False)), max_size=5), st.booleans(), st.booleans())  # fmt: skip
def test_what_is_written_is_read(rows, ascii_only, last_end):
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    stream = io.BytesIO((text + "\n" * last_end).encode())
    assert [line.parse() for line in read_lines(stream)] == rows


def test_an_empty_file_with_a_byte_order_mark_holds_no_line():
    assert list(read_lines(io.BytesIO("\ufeff\n\n".encode()))) == []


@pytest.mark.parametrize(
    ("data", "what"),
    [(gzip.compress(b"{}", mtime=0), "gzip"), (bz2.compress(b"{}"), "bzip2"),
     (lzma.compress(b"{}"), "xz"), ("{}".encode("utf-16"), "UTF-16"),
     ("{}".encode("utf-32"), "UTF-32"), ("\ufeff{}".encode("utf-32-be"), "UTF-32")],
)  # fmt: skip
def test_what_is_no_text_is_named(data, what):
    with pytest.raises(ValueError, match=f"^in.jsonl cannot be read: it is .*{what}"):
        list(read_lines(io.BytesIO(data), "in.jsonl"))


def test_nesting_and_surrogates_that_are_accepted():
    """Nesting has a bound below that of Python."""
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"
    value = parse_json(DEEPEST)
    repr(value), json.dumps(value, indent=2)
    wide = "[" + "[1]," * 1000 + "[1]]"
    assert len(parse_json(wide)) == 1001


def test_many_distinct_keys_cost_little():
    names = [f'"k{i}": 1' for i in range(50_000)]
    with pytest.raises(ValueError, match="'k49999' is given twice"):
        parse_json("{" + ", ".join([*names, '"k49999": 2']) + "}")
