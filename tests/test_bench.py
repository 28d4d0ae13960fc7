"""bench at toy size: every case gives a valid row, a wrong provider none; rows are only added."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gpu, rows, sample, tables, timing

CPU = torch.device("cpu")
TOY = timing.Protocol(warmup=1, repeats=2, least=1, seconds=1)


def toy(case: sample.Case) -> sample.Case:
    vocab_size = case.vocab_size // 1000 + 7
    return dataclasses.replace(case, vocab_size=vocab_size, batch=min(case.batch, 3))


def a_row(provider: str = "cpu", p50: float = 2.0, **changes: str) -> rows.Row:
    row = dict.fromkeys(rows.FIELDS, "1") | {"date": "2026-11-20T00:00:00Z", "op": "sample"}
    row |= {"provider": provider, "case": '{"V": 7, "m": 1}', "p50_us": str(p50), "dirty": "no"}
    return row | changes


def test_every_case_emits_a_valid_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sample, "SMALL", 100)  # both forms of the mix
    path, cases = tmp_path / "cpu.csv", [toy(case) for case in sample.cases()]
    found, refused = command.ladder(cases, CPU, TOY, bandwidth=1e6, save=path)
    assert not refused and rows.read(path) == found
    names = ["floor", "torch", "torch_cdf", "torch_multinomial", "reference"]
    names += ["cpu"] if sample.native.cpu_missing() is None else []
    assert [row["provider"] for row in found] == names * len(cases)
    for row in found:
        assert tuple(row) == rows.FIELDS and row["op"] == "sample"
        assert set(json.loads(row["case"])) == {"V", "m", "B", "dtype"}
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert row["provider"] == "floor" or 0 <= float(row["max_err_ratio"]) <= 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["date"])
    for start in range(0, len(found), len(names)):
        case = found[start : start + len(names)]
        fastest = min(float(row["p50_us"]) for row in case if row["provider"].startswith("torch"))
        ratios = [fastest / float(row["p50_us"]) for row in case]
        assert [float(row["ratio"]) for row in case] == pytest.approx(ratios, rel=0.01, abs=1e-3)


def test_the_ladder_has_every_size() -> None:
    fields = [case.fields() for case in sample.cases()]
    sets = {key: {f[key] for f in fields} for key in ("V", "m", "B", "dtype")}
    assert sets == {
        "V": {512, 32_000, 151_936}, "m": {1, 4}, "B": {1, 8, 32}, "dtype": {"float32", "bfloat16"},
    }  # fmt: skip
    assert len(fields) == 36 and set(sample.cases(quick=True)) < set(sample.cases())
    assert sample.Case(10, 4, 2, "bfloat16").floor_bytes() == 160
    assert 1e8 < timing.copy_bandwidth(CPU, size=2**22) < 1e13


def test_baselines_draw_from_the_mixture() -> None:
    """Each plain form draws with the right frequencies: 2,000 rows of one distribution."""
    weights = torch.tensor([[0.3, 0.7]]).repeat(2000, 1)
    logits = torch.randn(2, 1, 5).repeat(1, 2000, 1)
    wanted = torch.softmax(sample.mix(logits, weights)[0], -1)
    for draw in (sample.torch_gumbel, sample.torch_cdf, sample.torch_multinomial):
        tokens, logprobs = draw(logits, weights)
        assert (torch.bincount(tokens, minlength=5) / 2000 - wanted).abs().max() < 0.05
        torch.testing.assert_close(logprobs, wanted.log()[tokens])


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (lambda tokens, logprobs: ((tokens + 1) % 50, logprobs), "drew other tokens"),
        (lambda tokens, logprobs: (tokens, logprobs + 1e-3), "out of its error budget"),
        (lambda tokens, logprobs: (tokens, logprobs * torch.nan), "out of its error budget"),
    ],
)
def test_a_wrong_provider_is_refused(monkeypatch, capsys, wrong, reason: str) -> None:
    right = sample.providers

    def with_a_wrong_one(data, *, compiled):
        found = right(data, compiled=compiled)
        model = found[-1]
        return [*found, dataclasses.replace(model, name="wrong", run=lambda: wrong(*model.run()))]

    monkeypatch.setattr(sample, "providers", with_a_wrong_one)
    monkeypatch.setattr(sample, "cases", lambda quick: [sample.Case(50, 4, 3, "float32")])
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e9)
    assert command.main(["sample", "--quick", "--no-save"]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"REFUSED by the error gate: wrong.*{reason}", printed)
    assert "| wrong |" not in printed


@pytest.mark.parametrize("token", [-1, 50])
def test_a_baseline_that_leaves_the_vocabulary_is_refused(token: int) -> None:
    baseline = sample.providers(sample.inputs(sample.Case(50, 4, 3, "float32"), CPU))[0]
    with pytest.raises(AssertionError, match="ids of the vocabulary"):
        baseline.check((torch.tensor([0, token, 1]), torch.zeros(3)))


def test_providers_take_turns_and_a_slow_one_leaves_early(monkeypatch) -> None:
    calls: list[str] = []

    def provider(name: str, seconds: float) -> timing.Provider:
        return timing.Provider(name, lambda: calls.append(name) or seconds, lambda _: 0.25)

    monkeypatch.setattr(timing, "stopwatch", lambda device: lambda run: run())
    both = [provider("slow", 0.2), provider("fast", 1e-6)]
    times, refused = timing.measure(both, CPU, timing.Protocol(1, repeats=10, least=2, seconds=0.5))
    assert not refused
    assert [set(calls[i : i + 2]) for i in range(0, 10, 2)] == [{"slow", "fast"}] * 5
    assert calls[10:] == ["fast"] * 7  # both: gate, warm-up, 3 rounds; then the 10 are filled up
    assert times["slow"].p50_us == pytest.approx(200_000)
    assert times["fast"].max_err_ratio == 0.25 and times["fast"].peak_bytes is None


def test_rows_are_only_added(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.csv"
    rows.append(path, [a_row("torch"), a_row("cpu")])
    before = path.read_bytes()
    rows.append(path, [a_row("cpu", p50=3.0, machine="a, b")])
    assert path.read_bytes().startswith(before)
    assert [row["p50_us"] for row in rows.read(path)] == ["2.0", "2.0", "3.0"]
    assert rows.read(path)[2]["machine"] == "a, b"
    path.write_text("date,commit\n2026,abc\n")
    with pytest.raises(ValueError, match=r"cpu\.csv has the columns \['date', 'commit'\]"):
        rows.append(path, [a_row()])
    assert path.read_text() == "date,commit\n2026,abc\n"


def test_provenance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine column names the model alone; outside a checkout $GIT_COMMIT is the commit."""
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    shared = rows.provenance(CPU)
    assert (shared["commit"], shared["dirty"]) == ("abc123", "unknown")
    assert shared["machine"].endswith(f", {os.cpu_count()} cores")
    assert os.uname().nodename not in shared["machine"]


def test_results_page_shows_the_latest_rows(tmp_path: Path) -> None:
    old = a_row("cpu", p50=9999, machine="A")
    rest = [a_row("floor", 0.5, machine="A"), a_row("torch", 8, machine="A")]
    new = a_row("cpu", p50=2, ratio="4.00", machine="A", commit="c2", dirty="yes")
    lone = a_row("cpu", 7, machine="A", case='{"V": 8}', ratio="")
    rows.append(tmp_path / "cpu.csv", [old, *rest, new, lone, a_row("cpu", 7, machine="B")])
    tables.write_results(tmp_path, tmp_path / "RESULTS.md")
    page = re.sub(" +", " ", (tmp_path / "RESULTS.md").read_text())
    assert page.index("## `sample` on A,") < page.index("## `sample` on B,")
    assert "9999" not in page and "commit 1, c2+ " in page
    assert "python -m bench sample --device cpu" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert lines[0] == "| V | m | floor | torch | cpu | cpu speed-up | cpu / floor |"
    assert lines[2] == "| 7 | 1 | 0.5 | 8.0 [1.0, 1.0] | 2.0 [1.0, 1.0] | 4.00 | 4.0 |"
    assert lines[3] == "| 8 | | | | 7.0 [1.0, 1.0] | | |"


def test_gpu_without_a_gpu_and_without_the_development_packages(tmp_path: Path) -> None:
    """Exit status 2 and one sentence; and tests/gpu can be collected there."""
    for package in ("hypothesis", "transformers", "peft", "scipy", "tqdm"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('blocked')\n")
    blocked = {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    how = {"cwd": rows.ROOT, "env": os.environ | blocked | {"CUDA_VISIBLE_DEVICES": ""}}
    commands = ([sys.executable, "-m", "bench.gpu"], [*gpu.PYTEST, "--collect-only"])
    bare, tests = [subprocess.run(c, capture_output=True, text=True, **how) for c in commands]
    assert (bare.returncode, bare.stdout) == (2, "")
    assert bare.stderr == "bench.gpu needs an NVIDIA GPU, and this PyTorch sees none.\n"
    assert tests.returncode == 0, tests.stdout + tests.stderr


def test_gpu_stages(capfd: pytest.CaptureFixture[str]) -> None:
    planned = {stage.name: stage for stage in gpu.stages("/bin/compute-sanitizer")}
    assert list(planned)[:5] == ["build", "load", "tests", "memcheck", "racecheck"]
    assert not {"memcheck", "racecheck"} & {stage.name for stage in gpu.stages(None)}
    left_out = gpu.perform(planned["sample"], {"build", "load"}, 100)
    late = gpu.perform(planned["build"], set(), 0)
    assert left_out.note == "not run: tests did not pass" and late.note.startswith("not run")

    def outcome(code: str, *words: str, time_left: float = 30) -> gpu.Outcome:
        return gpu.perform(gpu.Stage("it", [sys.executable, "-c", code, *words]), set(), time_left)

    good = outcome("print('hello')")
    assert good.ok and "hello" in capfd.readouterr().out
    slow = outcome("import time; time.sleep(30)", time_left=0.3)
    bare = outcome("import sys; sys.exit('No module named pytest')")
    unable = outcome("import sys; sys.exit('Error: Device not supported')", "--error-exitcode")
    assert (slow.ok, bare.ok, unable.ok) == (False, False, None) and slow.seconds < 10
    assert bare.note == "pytest is not installed: no test ran"
    statuses = [gpu.exit_status([good, other]) for other in (good, unable, slow, left_out, late)]
    assert statuses == [0, 0, 1, 1, 1]
