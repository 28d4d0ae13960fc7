"""Lines of JSON to records: what is read, what is refused, in which order, with which seeds."""

import io
import json

import pytest
from tqdm import tqdm

from clp.data.json_lines import Line, read_lines
from clp.engine.sampler import Sampler, SamplingParams
from clp.policies.lora import Policy
from clp.serving.jsonl import (
    Defaults,
    Source,
    check_defaults,
    completions_of,
    line_seed,
    sample_lines,
)

DEFAULTS = Defaults(SamplingParams(max_tokens=4), "joy=0.5,brief=0.5", True)


@pytest.fixture(scope="module")
def policy():
    return Policy.create("tiny", ["joy", "brief"], r=2)


@pytest.fixture
def sampler(policy):
    return Sampler(policy, max_batch_size=2)


def lines(*rows):
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return read_lines(io.BytesIO("\n".join(text).encode()))


def sampled(sampler, *rows, defaults=DEFAULTS, base_seed=1):
    with tqdm(disable=True) as bar:
        return list(sample_lines(sampler, lines(*rows), defaults, base_seed, bar))


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
    ({"prompt": "x", "temprature": 1}, "'temprature'"),
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
    bad, good = sampled(
        sampler, {"prompt": "x"}, {"prompt": "x", "weights": "joy=1"}, defaults=defaults
    )
    assert "no weights" in bad.records[0]["error"] and not good.failed


def test_a_failed_forward_is_an_error_record_with_its_completion(sampler, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(sampler.policy.model), "forward", fail)
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

    with tqdm(disable=True) as bar:
        groups = sample_lines(sampler, counted(), DEFAULTS, 0, bar)
        assert next(groups).line == 1
        assert read == 4 * sampler.max_batch_size
        assert [g.line for g in groups] == list(range(2, 102))


def test_dropped_halfway_leaves_the_sampler_empty(sampler):
    with tqdm(disable=True) as bar:
        groups = sample_lines(sampler, lines(*[{"prompt": "Tom"}] * 20), DEFAULTS, 0, bar)
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
