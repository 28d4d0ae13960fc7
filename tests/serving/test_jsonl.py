"""Lines of JSON to records, and whole files: killed and run again, as one run writes them."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from unittest.mock import Mock

import pytest
from steered_policies import policy_of
from tiny_runs import randomised, records
from tqdm import tqdm

from clp import cli
from clp.data.condition import Condition
from clp.data.json_lines import Line, read_lines
from clp.engine.requests import SamplingParams
from clp.engine.sampler import Sampler
from clp.serving import resumable_output
from clp.serving.jsonl import Defaults, check_defaults, line_seed, sample_file, sample_lines
from clp.serving.resumable_output import Source, completions_of, sidecar

DEFAULTS = Defaults(SamplingParams(max_tokens=4), "joy=0.5,brief=0.5", True)
LONGER = DEFAULTS._replace(params=SamplingParams(max_tokens=12))
NO_BAR = tqdm(disable=True)
ENDS = ("had a red kite.", "was sad.", "saw the lake", "ran")
ROWS = [
    {"prompt": f"{name} {end}", "weights": [w, 1 - w], "id": i, "n": 1 + i % 3}
    for i, (name, end, w) in enumerate(product(("Tom", "Mia", "Sam"), ENDS, (0.0, 0.25, 1.0)))
]


@pytest.fixture(scope="module")
def policy():
    return randomised(0.15, 5, r=2)


@pytest.fixture
def sampler(policy):
    return Sampler(policy, max_batch_size=2)


def lines(*rows):
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return read_lines(io.BytesIO("\n".join(text).encode()))


def sampled(sampler, *rows, defaults=DEFAULTS, base_seed=1):
    return list(sample_lines(sampler, lines(*rows), defaults, base_seed, NO_BAR))


@pytest.mark.parametrize(
    ("raw", "count"),
    [
        (b'{"prompt": "x"}', 3),
        (b'{"prompt": "x", "n": 5}', 5),
        (b'{"prompt": "\\"n\\""}', 3),
        (b'{"n": 0}', 3),
        (b'{"n": true}', 3),
        (b'{"n": 5', 3),
        (b'["n"]', 3),
    ],
)
def test_completions_of_a_line(raw, count):
    assert completions_of(Line(1, raw), 3) == count


def test_null_and_minus_one_are_off_and_any_integer_is_a_seed(sampler):
    plain, off, large = sampled(
        sampler,
        {"prompt": "Tom", "seed": 5},
        {"prompt": "Tom", "seed": 5, "top_k": -1, "stop": None, "stop_token_ids": None,
         "logprobs": None},
        {"prompt": "Tom", "seed": 5 + 2**70},
    )  # fmt: skip
    assert not plain.failed
    for other in (off, large):
        assert other.records[0]["token_ids"] == plain.records[0]["token_ids"]
    (end,) = sampled(sampler, {"prompt": [5] * 250, "max_tokens": None, "ignore_eos": True})
    assert len(end.records[0]["token_ids"]) == 6


def test_records_of_good_lines(sampler):
    one, two = sampled(
        sampler,
        {"prompt": "Tom", "id": {"x": [1, None]}},
        {"prompt": [5, 6], "weights": [0, 1], "n": 2, "logprobs": 3, "max_tokens": 2},
    )
    (record,) = one.records
    assert list(record)[:3] == ["line", "index", "finish_reason"]
    assert (record["line"], record["index"], record["id"]) == (1, 0, {"x": [1, None]})
    assert (record["prompt"], record["weights"]) == ("Tom", "joy=0.5,brief=0.5")
    assert len(record["token_ids"]) == len(record["logprobs"]) <= 4
    assert "top_logprobs" not in record and not one.failed
    assert [r["index"] for r in two.records] == [0, 1]
    for r in two.records:
        assert r["prompt"] == [5, 6] and r["weights"] == [0, 1] and "id" not in r
        for token, pairs in zip(r["token_ids"], r["top_logprobs"], strict=True):
            assert [i for i, _ in pairs[3:]] in ([], [token]) and token in dict(pairs)


BAD = [
    ("nonsense", "not JSON"),
    ('["a"]', "expected an object, got list"),
    ({}, '"prompt" is missing'),
    ({"prompt": []}, "empty"),
    ({"prompt": 7}, "prompt must be a text or a list"),
    ({"prompt": [5, 10**6]}, "token ids from 0"),
    ({"prompt": "x", "temprature": 1}, "'temprature'; did you mean 'temperature'?"),
    ({"prompt": "x", "weigths": 1}, "'weigths'; did you mean 'weights'?; there are prompt, wei"),
    ({"prompt": "x", "temperature": -1}, "temperature must"),
    ({"prompt": "x", "n": 0}, "n must"),
    ({"prompt": "x", "weights": {"joi": 1}}, "unknown objective 'joi'"),
    ({"prompt": "x", "weights": [10**400, 0]}, "joy must be finite"),
    ({"prompt": "x", "weights": None}, "weights must be"),
    ({"prompt": "x", "max_tokens": 100_000}, "context"),
    ({"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids"),
]


def test_bad_lines_say_what_is_wrong_and_the_others_go_on(sampler):
    rows = [row for row, _ in BAD]
    mixed = [row for bad in rows for row in (bad, {"prompt": "Tom"})]
    groups = sampled(sampler, *mixed)
    assert [g.line for g in groups] == list(range(1, len(mixed) + 1))
    for (row, message), bad, good in zip(BAD, groups[::2], groups[1::2], strict=True):
        assert message in bad.records[0]["error"], row
        assert len(bad.records) == 1 and bad.failed and not good.failed
    json.dumps([g.records for g in groups], allow_nan=False)


def test_a_bad_line_keeps_its_id(sampler):
    (group,) = sampled(sampler, {"prompt": [], "id": "a"})
    assert group.records[0]["id"] == "a"


def test_a_line_without_weights_and_no_default(sampler):
    defaults = DEFAULTS._replace(weights=None)
    rows = {"prompt": "x"}, {"prompt": "x", "weights": "joy=1"}
    bad, good = sampled(sampler, *rows, defaults=defaults)
    assert "no weights" in bad.records[0]["error"] and not good.failed


def test_a_line_has_its_own_strength_or_the_default_one():
    sampler = Sampler(policy_of("lora", kl_range=(0.05, 0.4)), max_batch_size=4)
    rows = [{"prompt": "Tom", "seed": 3} | kl for kl in ({}, {"kl": 0.05}, {"kl": 0.4}, {"kl": 1})]
    *good, bad = sampled(sampler, *rows, defaults=DEFAULTS._replace(kl=0.1))
    assert "kl must be in [0.05, 0.4]" in bad.records[0]["error"]
    assert [group.records[0]["kl"] for group in good] == [0.1, 0.05, 0.4]
    for group in good:
        (record,) = group.records
        condition, params = (
            Condition([0.5, 0.5], record["kl"]),
            SamplingParams(max_tokens=4, seed=3),
        )
        assert record["token_ids"] == sampler.generate(["Tom"], condition, params)[0].token_ids
    (plain,) = sampled(sampler, rows[0])
    assert "kl" not in plain.records[0]


def test_a_failed_forward_is_an_error_record_with_its_completion(sampler, failing):
    with failing(sampler.policy.model):
        (group,) = sampled(sampler, {"prompt": "Tom", "n": 2})
    assert [r["index"] for r in group.records] == [0, 1] and group.failed
    assert all(r["finish_reason"] == "error" for r in group.records)
    assert all("no memory" in r["error"] for r in group.records)


def test_seeds_of_lines(sampler):
    tom = {"prompt": "Tom", "max_tokens": 12}
    rows = [tom, tom, tom | {"seed": 5}, tom | {"seed": 5}]
    tokens = [g.records[0]["token_ids"] for g in sampled(sampler, *rows)]
    assert tokens[0] != tokens[1] and tokens[2] == tokens[3]
    # A line's tokens depend on its number and the base seed, not on where the reading began.
    behind = [g.records[0]["token_ids"] for g in sampled(sampler, "", *rows[:1])]
    assert behind == [tokens[1]]
    other = [g.records[0]["token_ids"] for g in sampled(sampler, tom, base_seed=2)]
    assert other[0] != tokens[0]
    given = DEFAULTS._replace(params=SamplingParams(max_tokens=12, seed=5))
    assert sampled(sampler, tom, defaults=given)[0].records[0]["token_ids"] == tokens[2]


def test_line_seed_is_fixed_and_leaves_room_for_the_completions():
    # The first 16 digits of `printf '0 1' | sha256sum`; a changed rule breaks resumed runs.
    assert line_seed(0, 1) == 0x5CC3A6551605A0B4 >> 2
    assert all(0 <= line_seed(2**62 - 1, i) < 2**62 for i in range(1, 100))


def test_lines_are_read_no_further_than_the_queue(sampler):
    """A line that takes long holds the output up, but not the memory."""
    read = 0

    def counted():
        nonlocal read
        for line in lines({"prompt": "Tom", "max_tokens": 60, "ignore_eos": True},
                          *[{"prompt": "Mia", "max_tokens": 1}] * 100):  # fmt: skip
            read += 1
            yield line

    groups = sample_lines(sampler, counted(), DEFAULTS, 0, NO_BAR)
    assert next(groups).line == 1
    assert read == 4 * sampler.max_batch_size
    assert [g.line for g in groups] == list(range(2, 102))


def test_dropped_halfway_leaves_the_sampler_empty(sampler):
    groups = sample_lines(sampler, lines(*[{"prompt": "Tom"}] * 20), DEFAULTS, 0, NO_BAR)
    next(groups)
    assert sampler.unfinished
    groups.close()
    assert not sampler.unfinished


def test_check_defaults(sampler):
    check_defaults(sampler, DEFAULTS, ["Tom", "Mia"])
    check_defaults(sampler, DEFAULTS._replace(weights=None))
    assert not sampler.unfinished
    with pytest.raises(ValueError, match="prompt 1: prompt has"):
        check_defaults(sampler, DEFAULTS, ["Tom", "x " * 10_000])
    for params, message in (
        (SamplingParams(max_tokens=10**6), "context"),
        (SamplingParams(stop_token_ids=[10**6]), "stop_token_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            check_defaults(sampler, DEFAULTS._replace(params=params))


def test_sources(tmp_path):
    made = Source.of_prompts(["a\nb", "\u20ac"])
    with made.open() as stream:
        assert [line.parse()["prompt"] for line in read_lines(stream)] == ["a\nb", "\u20ac"]
    path = tmp_path / "in.jsonl"
    path.write_bytes(made.text)
    assert Source.of_file(path).sha256() == made.sha256()
    for bad in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(ValueError, match="cannot be read"):
            Source.of_file(bad)


# Whole files


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    # Two lines are bad.
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "nonsense\n{}\n")
    return Source.of_file(path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def run(policy, source, output, defaults=LONGER, batch=4):
    return sample_file(source, output, defaults, lambda: Sampler(policy, max_batch_size=batch))


def assert_same(resumed, whole):
    """Equal but for the rounding of log-probabilities, which depends on the batch."""
    assert len(resumed) == len(whole)
    for a, b in zip(resumed, whole, strict=True):
        assert list(a) == list(b)
        assert a.get("logprobs", []) == pytest.approx(b.get("logprobs", []), abs=1e-4)
        assert a | {"logprobs": None} == b | {"logprobs": None}


def test_stopped_anywhere_it_goes_on_with_the_seeds_of_the_first_run(policy, source, out, capsys):
    assert run(policy, source, out) == 2
    whole, text = records(out), out.read_bytes()
    assert [r["line"] for r in whole if "error" in r] == [37, 38]
    assert [(r["line"], r["index"]) for r in whole] == [
        *((i + 1, k) for i, row in enumerate(ROWS) for k in range(row["n"])), (37, 0), (38, 0),
    ]  # fmt: skip
    for size in (1, len(text) // 3, len(text) // 2, len(text) - 1):
        out.write_bytes(text[:size])
        assert run(policy, source, out) == 2
        assert_same(records(out), whole)
        capsys.readouterr()
    # The bar counts what is there: nothing is left to do at its end.
    out.write_bytes(text[: len(text) // 2])
    run(policy, source, out)
    error = capsys.readouterr().err
    total = sum(row["n"] for row in ROWS) + 2
    assert f"{total}/{total}" in error and "tokens/s" in error
    assert "continuing after line" in error


def test_a_complete_output_loads_no_model(policy, source, out, capsys):
    run(policy, source, out)
    before = out.read_bytes()
    assert sample_file(source, out, LONGER, pytest.fail) == 2
    assert out.read_bytes() == before
    assert "is complete: nothing to do" in capsys.readouterr().err


def test_a_refused_output_loads_no_model_and_is_kept(policy, source, out):
    run(policy, source, out)
    before = out.read_bytes()
    other = LONGER._replace(params=SamplingParams(max_tokens=13))
    with pytest.raises(ValueError, match="max_tokens was 12 and is 13"):
        sample_file(source, out, other, pytest.fail)
    with source.path.open("a") as handle:
        handle.write('{"prompt": "more"}\n')
    with pytest.raises(ValueError, match="the input has other content"):
        sample_file(source, out, LONGER, pytest.fail)
    assert out.read_bytes() == before


def test_a_sampler_that_cannot_be_made_leaves_nothing(source, out, tmp_path):
    with pytest.raises(ValueError, match="no such policy"):
        sample_file(source, out, LONGER, Mock(side_effect=ValueError("no such policy")))
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_one_seed_for_all_lines(policy, out):
    """With a seed given, equal prompts and rows give equal completions."""
    defaults = LONGER._replace(params=SamplingParams(max_tokens=12, seed=4, n=2))
    run(policy, Source.of_prompts(["Tom", "Tom"]), out, defaults)
    first, second = records(out)[:2], records(out)[2:]
    assert [r["token_ids"] for r in first] == [r["token_ids"] for r in second]
    assert first[0]["token_ids"] != first[1]["token_ids"]


def test_the_terminal_gets_texts_and_standard_error_the_errors(policy, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "Tom"}\n{"prompt": []}\n{"prompt": [5, 6], "weights": "joy=1"}\n')
    assert run(policy, Source.of_file(path), None) == 1
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()
    assert first.startswith("[joy=0.5,brief=0.5] Tom")
    assert second.startswith(f"[joy=1] {policy.tokenizer.decode([5, 6])}")
    assert "line 2: prompt is empty" in shown.err


def test_an_input_without_lines(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"in\.jsonl holds no prompt"):
        sample_file(Source.of_file(path), None, LONGER, pytest.fail)


def test_killed_with_9_and_run_again_it_is_the_uninterrupted_run(
    policy, source, out, tmp_path, monkeypatch, capsys
):
    killed = tmp_path / "killed.jsonl"
    policy.save(tmp_path / "run")
    argv = [
        "clp", "sample", str(tmp_path / "run"), "--input", str(source.path), "--output",
        str(killed), "--weights", "joy=0.5,brief=0.5", "--max-tokens", "24", "--ignore-eos",
        "--max-batch-size", "2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "clp.cli", *argv[1:]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 240
        while not (killed.is_file() and killed.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    partial = killed.read_bytes()
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert "continuing after line" in shown and "lines that failed: 2" in shown
    # What the killed process had written stays, but for a group that was not complete.
    kept = [line for line in partial.splitlines(keepends=True) if line.endswith(b"\n")]
    assert killed.read_bytes().startswith(b"".join(kept[:-3]))
    assert len(records(killed)) > len(kept)
    # The same base seed, in one go.
    seed = json.loads(sidecar(killed).read_text())["base_seed"]
    monkeypatch.setattr(resumable_output.secrets, "randbits", lambda bits: seed)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    assert run(policy, source, out, LONGER._replace(params=params), batch=2) == 2
    assert_same(records(killed), records(out))
