"""Prompt files: rows and errors with line numbers."""

import pytest

from clp.prompts import HELDOUT_PROMPTS, TRAIN_PROMPTS, check_prompts, columns, load_prompts


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
        (
            '{"text": "a"}',
            r'p\.jsonl:1: "prompt" must be a non-empty string or a list .*, got None',
        ),
        ('{"prompt": ""}', r'p\.jsonl:1: "prompt" must be'),
        ('{"prompt": 3}', r'p\.jsonl:1: "prompt" must be'),
        ('{"prompt": "a", "x": 1}\n{"prompt": "b"}', r"p\.jsonl:2: columns differ .* in x"),
        ("\n\n", "holds no prompt"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path, text))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_prompts(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        load_prompts(tmp_path / "b.jsonl")


def test_rows_given_in_python_are_checked_too():
    with pytest.raises(ValueError, match=r"train_dataset\[1\]"):
        check_prompts([{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(ValueError, match="holds no prompt"):
        check_prompts([])


def test_the_embedded_prompts_are_disjoint():
    train = {r["prompt"] for r in load_prompts(TRAIN_PROMPTS)}
    heldout = {r["prompt"] for r in load_prompts(HELDOUT_PROMPTS)}
    assert len(heldout) >= 64 and len(train) >= 256
    assert not train & heldout
