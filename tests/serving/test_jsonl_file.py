"""A whole file: killed in the middle and run again, it is what one run would have written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from clp import cli
from clp.engine.sampler import Sampler, SamplingParams
from clp.policies.lora import Policy
from clp.serving import resumable_output
from clp.serving.jsonl import Defaults, sample_file
from clp.serving.resumable_output import Source, sidecar
from clp_kernels.nn.mixed_lora import steered_layers

DEFAULTS = Defaults(SamplingParams(max_tokens=12), "joy=0.5,brief=0.5", True)
ROWS = [
    {"prompt": f"{name} {what}", "weights": [w, 1 - w], "id": i, "n": 1 + i % 3}
    for i, (name, what, w) in enumerate(
        (name, what, w)
        for name in ("Tom", "Mia", "Sam")
        for what in ("had a red kite.", "was sad.", "saw the lake", "ran")
        for w in (0.0, 0.25, 1.0)
    )
]


@pytest.fixture(scope="module")
def policy():
    made = Policy.create("tiny", ["joy", "brief"], r=2)
    generator = torch.Generator().manual_seed(5)
    for layer in steered_layers(made.model).values():
        layer.lora_B.data.normal_(0, 0.15, generator=generator)
    return made


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    # Two lines are bad.
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "nonsense\n{}\n")
    return Source.of_file(path)


def run(policy, source, output, defaults=DEFAULTS, batch=4):
    return sample_file(source, output, defaults, lambda: Sampler(policy, max_batch_size=batch))


def no_sampler():
    raise AssertionError("there is nothing to sample")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(resumed, whole):
    """Equal but for the rounding of log-probabilities, which depends on the batch."""
    assert len(resumed) == len(whole)
    for a, b in zip(resumed, whole, strict=True):
        assert list(a) == list(b)
        assert a.get("logprobs", []) == pytest.approx(b.get("logprobs", []), abs=1e-4)
        assert a | {"logprobs": None} == b | {"logprobs": None}


def test_stopped_anywhere_it_goes_on_with_the_seeds_of_the_first_run(
    policy, source, tmp_path, capsys
):
    out = tmp_path / "out.jsonl"
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
    assert "going on behind line" in error


def test_a_complete_output_loads_no_model(policy, source, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    run(policy, source, out)
    before = out.read_bytes()
    assert sample_file(source, out, DEFAULTS, no_sampler) == 2
    assert out.read_bytes() == before
    assert "is complete: nothing to do" in capsys.readouterr().err


def test_a_refused_output_loads_no_model_and_is_kept(policy, source, tmp_path):
    out = tmp_path / "out.jsonl"
    run(policy, source, out)
    before = out.read_bytes()
    other = DEFAULTS._replace(params=SamplingParams(max_tokens=13))
    with pytest.raises(ValueError, match="max_tokens was 12 and is 13"):
        sample_file(source, out, other, no_sampler)
    with source.path.open("a") as handle:
        handle.write('{"prompt": "more"}\n')
    with pytest.raises(ValueError, match="the input has other content"):
        sample_file(source, out, DEFAULTS, no_sampler)
    assert out.read_bytes() == before


def test_a_sampler_that_cannot_be_made_leaves_nothing(source, tmp_path):
    def broken():
        raise ValueError("no such policy")

    with pytest.raises(ValueError, match="no such policy"):
        sample_file(source, tmp_path / "out.jsonl", DEFAULTS, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_one_seed_for_all_lines(policy, tmp_path):
    """With a seed given, equal prompts and rows give equal completions."""
    out = tmp_path / "out.jsonl"
    defaults = DEFAULTS._replace(params=SamplingParams(max_tokens=12, seed=4, n=2))
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
        sample_file(Source.of_file(path), None, DEFAULTS, no_sampler)


def test_killed_with_9_and_run_again_it_is_the_uninterrupted_run(
    policy, source, tmp_path, monkeypatch, capsys
):
    killed, out = tmp_path / "killed.jsonl", tmp_path / "out.jsonl"
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
    assert "going on behind line" in shown and "lines that failed: 2" in shown
    # What the killed process had written stays, but for a group that was not complete.
    kept = [line for line in partial.splitlines(keepends=True) if line.endswith(b"\n")]
    assert killed.read_bytes().startswith(b"".join(kept[:-3]))
    assert len(records(killed)) > len(kept)
    # The same base seed, in one go.
    seed = json.loads(sidecar(killed).read_text())["base_seed"]
    monkeypatch.setattr(resumable_output.secrets, "randbits", lambda bits: seed)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    assert run(policy, source, out, DEFAULTS._replace(params=params), batch=2) == 2
    assert_same(records(killed), records(out))
