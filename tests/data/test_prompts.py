"""Prompt files: rows and errors with line numbers."""

import gzip

import pytest

from clp.data.prompts import (
    ARGUMENTS,
    HELDOUT_PROMPTS,
    TRAIN_PROMPTS,
    check_prompts,
    columns,
    load_prompts,
)


def write(tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    return path


def test_rows_and_columns(tmp_path):
    path = write(tmp_path, '{"prompt": "a", "reference": "x"}\n\n{"prompt": "b", "reference": "y"}')
    rows = load_prompts(path)
    assert [r["prompt"] for r in rows] == ["a", "b"]
    assert columns(rows) == {"reference": ["x", "y"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', r"p\.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n\n[1]', r"p\.jsonl:3: expected an object, got list"),
        ('{"text": "a"}', r'p\.jsonl:1: "prompt" is missing, got text'),
        ('{"prompt": ""}', r'p\.jsonl:1: "prompt" must be'),
        ('{"prompt": 3}', r'p\.jsonl:1: "prompt" must be'),
        (
            '{"prompt": "a", "x": 1}\n{"prompt": "b"}',
            r"p\.jsonl:2: each row .* this one lacks 'x'$",
        ),
        ('{"prompt": "a", "x": 1}\n{"prompt": "b", "y": 1}', r"this one lacks 'x' and has 'y' too"),
        ("\n\n", "holds no prompt"),
        ('{"prompt": "a", "completions": 1}', r"p\.jsonl:1: the column 'completions' must have"),
        ('{"prompt": "a", "x": NaN}', r"p\.jsonl:1: NaN is not a finite"),
        ('{"prompt": "a", "x": 1e999}', r"p\.jsonl:1: 1e999 is not a finite"),
        ('{"prompt": "a", "prompt": "b"}', r"p\.jsonl:1: 'prompt' is given twice"),
        ('{"prompt": "a"}\n{"prompt": "\\ud800"}', r"p\.jsonl:2: .* half of a surrogate pair"),
        ("[" * 200_000, r"p\.jsonl:1: nested too deeply"),
        ('{"prompt": "a", "x": [{"y": 1, "y": 2}]}', r"p\.jsonl:1: 'y' is given twice"),
        ('{"prompt": "a"}\n\x1a', r"p\.jsonl:2: not JSON"),
        ('[\n  {"prompt": "a"}\n]', r"p\.jsonl:1: not JSON"),
        ('{"prompt": "a"},\n{"prompt": "b"}', r"p\.jsonl:1: not JSON"),
        ("\x00" * 512, r"p\.jsonl:1: not JSON"),
        ('{"prompt": "a", "x": %s}' % ("1" * 5000), r"p\.jsonl:1: .*5000 digits"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}'))
    for path in (tmp_path / "none.jsonl", tmp_path, tmp_path / "b.jsonl", tmp_path / "z.jsonl.gz"):
        with pytest.raises(ValueError, match=rf"prompts file {path} cannot be read"):
            load_prompts(path)


def test_line_ends_of_a_text_are_characters(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c\u0085"}'.encode())
    assert [r["prompt"] for r in load_prompts(path)] == ["a\u2028b", "c\x85"]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    write(tmp_path, '{"prompt": "a"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_prompts("~/p.jsonl") == [{"prompt": "a"}]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_columns_that_reward_functions_are_given_anyway_are_refused(name):
    with pytest.raises(ValueError, match=rf"train_dataset\[0\]: the column '{name}' must have"):
        check_prompts([{"prompt": "a", name: 1}])
    check_prompts([{"prompt": "a", "completion": 1, "reference": "x"}])


def test_rows_may_come_from_any_iterable_of_dictionaries():
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    for given in (tuple(rows), iter(rows), (row for row in rows), dict(enumerate(rows)).values()):
        assert check_prompts(given) == rows


@pytest.mark.parametrize(
    "given",
    [{"prompt": ["a", "b"]}, "a", None, 5, type("DataFrame", (list,), {"iloc": 0})(["prompt"])],
)
def test_tables_by_columns_are_refused_by_kind(given):
    wanted = f"must hold dictionaries, one per prompt, got {type(given).__name__}"
    with pytest.raises(ValueError, match=wanted):
        check_prompts(given)


def test_rows_given_in_python_are_checked_too():
    with pytest.raises(ValueError, match=r"train_dataset\[1\]"):
        check_prompts([{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(ValueError, match="holds no prompt"):
        check_prompts([])
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: columns must have names, got 3"):
        check_prompts([{"prompt": "a", 3: 1}])
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: .* half of a surrogate pair"):
        check_prompts([{"prompt": "a\udcff"}])
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: .* half of a surrogate pair"):
        check_prompts([{"prompt": [{"role": "user", "content": "a\ud800"}]}])


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("utf-16", "UTF-16"), ("utf-32", "UTF-"), ("utf-16-le", r":1: not JSON"),
     ("utf-16-be", r":1: not JSON"), ("utf-32-be", r":1: not JSON")],
)  # fmt: skip
def test_wider_encodings_are_refused(tmp_path, encoding, message):
    """As PowerShell and Excel write them, with a byte order mark and without."""
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"prompt": "a"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=rf"p\.jsonl.*{message}"):
        load_prompts(path)


def test_the_line_ends_of_old_macs_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r{"prompt": "b"}\r')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: not JSON"):
        load_prompts(path)
    path.write_bytes(b'{"prompt": "a"}\r\n \t\r\n\r\n{"prompt": "b"}\r\n\r\n')
    assert load_prompts(path) == [{"prompt": "a"}, {"prompt": "b"}]


def test_the_embedded_prompts_are_disjoint():
    train = {r["prompt"] for r in load_prompts(TRAIN_PROMPTS)}
    heldout = {r["prompt"] for r in load_prompts(HELDOUT_PROMPTS)}
    assert len(heldout) >= 64 and len(train) >= 256
    assert not train & heldout
