"""bench sampler: lengths and counting, a gate that sees wrong tokens, tables and plot."""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import peers, timing
from bench.engine import engines, sampler, workload
from bench.engine.judge import Judge
from bench.engine.workload import Batch, Served
from bench.report import plot, rows, tables
from clp.policies.policy import Policy

CPU = torch.device("cpu")
TOY = timing.Protocol(warmup=0, repeats=2, least=1, seconds=0.0)
CASE = sampler.Case(6, (1, 3), completion_median=8, completions=(3, 14))
BAR = SimpleNamespace(update=lambda: None, set_postfix_str=lambda *_, **__: None)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return sampler.models("tiny", CPU)


@pytest.fixture(scope="module")
def judge(models) -> Judge:
    return Judge(*models)


@pytest.fixture
def work(models) -> workload.Workload:
    return workload.workload(6, 256, models[0].vocab_size, 8, (3, 14))


def test_lengths_are_unequal_within_their_ranges_and_the_same_each_time() -> None:
    made = workload.workload(64, 256, 1000, 64, (8, 256))
    assert made == workload.workload(64, 256, 1000, 64, (8, 256))
    pairs = list(zip(made.prompts, made.completions, strict=True))
    assert all(4 <= p <= 64 and c >= 8 for p, c in pairs)
    assert max(made.prompts) + max(made.completions) <= 256
    assert len(set(made.completions)) > 30 and made.tokens == sum(made.completions)
    assert 50 <= sorted(made.completions)[32] <= 80 and 12 <= sorted(made.prompts)[32] <= 20
    tight = workload.workload(64, 20, 1000, 64, (8, 256))
    assert max(tight.prompts) + max(tight.completions) == 20 and min(tight.completions) == 8
    with pytest.raises(ValueError, match="context must have room for 12 tokens, got 11"):
        workload.workload(2, 11, 1000, 64, (8, 256))


def test_every_run_has_new_prompts_of_the_same_lengths_and_dealt_rows(work) -> None:
    first, second = work.batch(0, 3), work.batch(1, 3)
    assert [len(p) for p in first.prompts] == [len(p) for p in second.prompts]
    assert all(a != b for a, b in zip(first.prompts, second.prompts, strict=True))
    assert first == work.batch(0, 3)
    others = [work.batch(*run).prompts for run in ((1, 3), (workload.GATE, 3), (0, 1))]
    assert all(first.prompts[i] != prompts[i] for prompts in others for i in range(6))
    assert len(set(first.weights)) == 3 and first.weights[:3] == first.weights[3:]
    assert first.seed + len(first.prompts) <= second.seed
    for row in workload.spread_weights(64):
        assert sum(row) == 1 and all(0 < w < 1 for w in row)
    assert workload.spread_weights(1) == [(0.5, 0.5)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[:-1], "1 completions for 2"),
        (lambda t: [t[0], t[1][:-1]], "request 1 has 2 tokens, expected 3"),
        (lambda t: [t[0], [*t[1], 4]], "request 1 has 4 tokens, expected 3"),
        (lambda t: [[9, 1], t[1]], "request 0 has ids past the vocabulary"),
    ],
)
def test_counting_sees_what_is_missing_or_too_much(change, message: str) -> None:
    batch = Batch([[1], [2]], [2, 3], [(0.5, 0.5)] * 2, 0)
    tokens = [[1, 2], [3, 4, 5]]
    workload.counted(Served(tokens, [0.1, 0.1]), batch, 9)
    with pytest.raises(AssertionError, match=message):
        workload.counted(Served(change(tokens), [0.1, 0.1]), batch, 9)


def test_percentile() -> None:
    assert workload.percentile([3.0, 1.0, 2.0, 4.0], 0.95) == 4.0
    assert workload.percentile([float(i) for i in range(100)], 0.95) == 94.0
    assert workload.percentile([1.0], 0.5) == 1.0


def test_greedy_tokens_of_all_engines_agree(models, work, judge) -> None:
    """With the weight rows ours are PEFT's merges', without them all three bases are the same."""
    pytest.importorskip("peft")
    policy, base = models
    bare = engines.Bare(base, policy.tokenizer)
    made = {
        "clp": (engines.Clp(policy, 6), True),
        "clp_no_adapters": (engines.Clp(bare, 6, weighted=False), False),
        "torch_generate_base": (engines.Generate(base), False),
        "peft_merged_generate": (engines.PeftMerged(policy, base), True),
        "transformers_cb": (engines.ContinuousBatching(base, 6, 80), False),
    }
    batch = work.batch(0, 3)
    tokens: dict[str, list[list[int]]] = {}
    for name, (engine, weighted) in made.items():
        served = engine.serve(batch, greedy=True)
        workload.counted(served, batch, work.vocab_size)
        assert judge.share(batch, served, weighted=weighted) <= 1
        assert all(first > 0 for first in served.first)
        if name == "peft_merged_generate":  # by row: one waits for the other
            assert len(set(served.first)) == 3
        tokens[name] = served.tokens
        engine.close()
    assert tokens["clp"] == tokens["peft_merged_generate"] != tokens["clp_no_adapters"]
    assert tokens["clp_no_adapters"] == tokens["torch_generate_base"] == tokens["transformers_cb"]


def test_merging_and_taking_out_leaves_the_base_to_the_bit(models, work) -> None:
    pytest.importorskip("peft")
    engine = engines.PeftMerged(*models)
    first = engine.serve(work.batch(0, 3), greedy=True)
    for weight, base in engine.bases.items():
        assert torch.equal(weight, base)
    assert engine.serve(work.batch(0, 3), greedy=True).tokens == first.tokens
    assert engine.kept_bytes() == sum(base.nbytes for base in engine.bases.values()) > 0


def test_a_model_without_a_tokenizer_is_served(models, work, judge) -> None:
    policy, base = models
    ids = sampler.Ids(policy.vocab_size)
    batch = work.batch(0, 3)
    for model in (Policy(policy.model, ids, sampler.ADAPTERS, "random"), engines.Bare(base, ids)):
        engine = engines.Clp(model, 6, weighted=model.model is policy.model)
        served = engine.serve(batch, greedy=True)
        assert judge.share(batch, served, weighted=engine.weighted) <= 1


class Wrong(engines.Engine):
    """The right engine with one thing wrong."""

    def __init__(self, engine: engines.Engine, change: Any, on: str) -> None:
        self.engine, self.change, self.on = engine, change, on

    def serve(self, batch: Batch, greedy: bool) -> Served:
        if self.on == "batch":
            batch = self.change(batch)
        served = self.engine.serve(batch, greedy)
        return self.change(served) if self.on == "served" else served


@pytest.mark.parametrize(
    "on, change, message",
    [
        ("batch", lambda b: b._replace(weights=b.weights[1:] + b.weights[:1]), "greedy token"),
        ("batch", lambda b: b._replace(weights=[(0.5, 0.5)] * 6), "greedy token"),
        ("batch", lambda b: b._replace(lengths=[n - 1 for n in b.lengths]), "has . tokens, expect"),
        (
            "served",
            lambda s: s._replace(tokens=[[t[0] ^ 1, *t[1:]] for t in s.tokens]),
            "request 0, greedy token 0: .* allowed 0.0001",
        ),
    ],
)
def test_the_gate_refuses_a_wrong_engine(models, work, judge, on, change, message) -> None:
    right = engines.Clp(models[0], 6)
    for engine in (right, Wrong(right, change, on)):
        runner = sampler.Runner(sampler.Way("clp", engine, True), work, 3, judge, BAR)
        served = runner.run()
        if engine is right:
            assert 0 <= runner.check(served) <= 1
        else:
            with pytest.raises(AssertionError, match=message):
                runner.check(served)


def test_no_run_finds_its_prompts_in_the_cache(models, work, judge) -> None:
    """Timed runs and the gate's prefill all but the last token of every prompt, each time."""
    counts: list[int] = []
    policy = models[0]
    way = sampler.Way("clp", engines.Clp(policy, 6), True)

    def note(module: Any, args: Any, kwargs: Any) -> None:
        counts.append(kwargs["input_ids"].numel())

    handle = policy.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    runners = [sampler.Runner(way, work, count, judge, BAR) for count in (1, 3)]
    for runner in runners:
        runner.check(runner.run())
        runner.run()
    for runner in runners:
        runner.run()
    handle.remove()
    assert [number for number in counts if number > 6] == [sum(work.prompts) - 6] * 8


def test_a_16_bit_model_is_judged_by_its_own_rounding(models, work) -> None:
    policy, base = sampler.models("tiny", CPU)
    policy.model, base = policy.model.bfloat16(), base.bfloat16()
    judge, batch = Judge(policy, base), work.batch(0, 3)
    served = engines.Clp(policy, 6).serve(batch, greedy=True)
    assert judge.share(batch, served, weighted=True) <= 1
    wrong = served._replace(tokens=[[t ^ 1 for t in tokens] for tokens in served.tokens])
    with pytest.raises(AssertionError, match="greedy token"):
        judge.share(batch, wrong, weighted=True)


def test_a_measurement_gives_rows_and_says_what_is_missing(models, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sampler.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(engines.Generate, "serve", refusing)
    found, refused, missing = sampler.measure(CASE, "some/tiny/", *models, TOY, 1e9)
    assert refused == {"torch_generate_base": "RuntimeError: no memory"}
    assert missing == {"peft_merged_generate": "peft is not installed", "vllm": "needs a GPU"}
    names = ["floor", "clp", "clp_no_adapters", "transformers_cb"]
    assert [row["provider"] for row in found] == names * 2
    cases = [json.loads(row["case"]) for row in found]
    assert [case["weight_rows"] for case in cases] == [1] * 4 + [3] * 4
    assert {case["model"] for case in cases} == {"tiny"} and cases[0]["N"] == 6
    assert found[2]["p50_us"] == found[6]["p50_us"] and found[1]["p50_us"] != found[5]["p50_us"]
    for row in found:
        assert tuple(row) == rows.FIELDS
        if row["provider"] != "floor":
            assert 0 < float(row["ttft_us"]) <= float(row["ttft_p95_us"]) < float(row["p80_us"])
            assert 0 <= float(row["max_err_ratio"]) <= 1 and int(row["peak_bytes"]) > 0
    lines = sampler.ratios(found)
    assert lines[0].endswith("not measured") and lines[1].endswith("not measured")
    few, most = (tables.rate(found[i]) for i in (1, 5))
    assert lines[2] == f"clp with 3 rows / clp with 1 rows: {most / few:.3f}"
    rows.append(tmp_path / "cpu.csv", found)
    assert rows.read(tmp_path / "cpu.csv") == found


def refusing(self: Any, batch: Batch, greedy: bool) -> Served:
    raise RuntimeError("no memory")


def test_the_command(models, monkeypatch, capsys) -> None:
    quick = dataclasses.replace(CASE, weight_rows=(1, 2))
    monkeypatch.setattr(sampler, "cases", lambda device, quick_: [quick])
    monkeypatch.setattr(sampler, "QUICK_PROTOCOL", TOY)
    monkeypatch.setattr(sampler, "models", lambda name, device: models)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e9)
    ways = sampler.ways

    def only_ours(*args: Any) -> Any:
        found, missing = ways(*args)
        return found[:2], missing

    monkeypatch.setattr(sampler, "ways", only_ours)
    assert command.main(["sampler", "--quick", "--no-save"]) == 0
    printed = capsys.readouterr().out
    assert "clp with 2 rows / clp with 1 rows: " in printed and "tokens per second" in printed
    assert "not measured: vllm: needs a GPU" in printed
    right = engines.Clp.serve

    def one_short(self: Any, batch: Batch, greedy: bool) -> Served:
        served = right(self, batch, greedy)
        return served._replace(tokens=[t[:-1] for t in served.tokens])

    monkeypatch.setattr(engines.Clp, "serve", one_short)
    assert command.main(["sampler", "--quick", "--no-save"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"REFUSED by the error gate: clp, 2 weight rows, .*: request 0 has", printed)


def test_a_model_that_cannot_be_loaded_is_a_sentence(capsys) -> None:
    assert command.main(["sampler", "--model", "no such model", "--no-save"]) == 2
    assert "--model: model 'no such model' is neither a folder" in capsys.readouterr().err


def test_the_ladder() -> None:
    assert sampler.cases("cpu", False) == [sampler.Case(64, (1, 4, 16, 64))]
    assert [case.requests for case in sampler.cases("cuda", False)] == [64, 256]
    assert max(sampler.cases("cuda", True)[0].completions) < 64


def rate_rows(*providers: str) -> list[rows.Row]:
    """Rows of 100 tokens: 1, 2, ... ms by place; PEFT's grow with the weight rows."""
    found = []
    for count in (1, 4, 16):
        for place, name in enumerate(providers, 1):
            case = {"model": "tiny", "dtype": "float32", "N": 6, "tokens": 100}
            slow = count if name == "peft_merged_generate" else 1
            row = dict.fromkeys(rows.FIELDS, "1") | {"op": "sampler", "provider": name}
            row |= {"case": json.dumps(case | {"weight_rows": count}), "dirty": "no"}
            row |= {"p50_us": str(1000.0 * place * slow), "date": "2026-11-28T00:00:00Z"}
            row |= {"ttft_us": "2000", "ttft_p95_us": "3000", "peak_bytes": "4000000"}
            if name == "floor":
                row |= {"ttft_us": "", "ttft_p95_us": "", "peak_bytes": ""}
            found.append(row)
    return found


NAMES = ("floor", "torch_generate_base", "peft_merged_generate", "transformers_cb", "clp")


def test_tables_and_page(tmp_path: Path, page) -> None:
    rows.append(tmp_path / "cpu.csv", rate_rows(*NAMES, "clp_no_adapters"))
    text, lines = page()
    assert "python -m bench sampler --device cpu --model tiny`" in text
    image = "![tokens per second against the number of distinct weights](results/sampler_cpu.png)"
    assert image in text
    head = "| model | dtype | N | tokens | weight_rows |"
    names = "torch_generate_base | peft_merged_generate | transformers_cb | clp | clp_no_adapters |"
    assert lines[0] == f"{head} floor | {names}"
    start = "| tiny | float32 | 6 | 100 | 4 |"
    assert lines[3] == f"{start} 100000 | 50000 | 8333 | 25000 | 20000 | 16667 |"
    assert lines[5] == f"{head} {names}" and lines[8] == start + " 2.0 / 3.0 |" * 5
    assert lines[13] == start + " 4.0 |" * 5


def test_the_plot_is_written(tmp_path: Path) -> None:
    rows.append(tmp_path / "cpu.csv", rate_rows(*NAMES, "clp_no_adapters"))
    rows.append(tmp_path / "cuda.csv", [])
    assert plot.write_plots(tmp_path) == [tmp_path / "sampler_cpu.png"]
    png = (tmp_path / "sampler_cpu.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000


def test_resident_growth() -> None:
    size = 64 * 2**20

    def call() -> None:
        kept = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.1)  # the growth is read each millisecond, if a core is free for it
        kept.add_(1)

    grown = timing.resident_growth(call)
    if grown is not None:
        assert 0.9 * size < grown < 1.5 * size
        assert timing.resident_growth(lambda: None) < 0.1 * size


class FakeVllm:
    """The parts of vLLM's engine that the peer calls."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.made: dict[str, list[int]] = {}

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert params.ignore_eos and not params.detokenize and prompt["prompt_token_ids"]
        self.left[request_id], self.made[request_id] = params.max_tokens, []

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        outputs = []
        for name in list(self.left):
            self.made[name].append(int(name))
            self.left[name] -= 1
            if not self.left[name]:
                del self.left[name]
            own = SimpleNamespace(token_ids=tuple(self.made[name]))
            outputs.append(SimpleNamespace(request_id=name, outputs=[own]))
        return outputs


def test_vllm_is_stepped_until_all_are_done(monkeypatch, work) -> None:
    """With a package in its place, of vLLM's names."""
    fake = SimpleNamespace(
        SamplingParams=SimpleNamespace,
        LLM=lambda **_: SimpleNamespace(llm_engine=FakeVllm()),
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = peers.Vllm(SimpleNamespace(save_pretrained=lambda folder: None), 6, 80)
    batch = work.batch(0, 1)
    served = engine.serve(batch, greedy=False)
    assert served.tokens == [[i] * n for i, n in enumerate(batch.lengths)]
    assert all(first > 0 for first in served.first) and engine.kept_bytes() is None
    assert peers.vllm_missing(CPU) == "needs a GPU"


def test_each_conditioning_is_timed_over_the_plain_model(monkeypatch, tmp_path, capsys):
    from bench.engine import training

    small = [training.Case("tiny", 2, 8, 3, 4)]
    monkeypatch.setattr(training, "cases", lambda quick: small)
    monkeypatch.setattr(training, "QUICK_PROTOCOL", timing.Protocol(0, 1, 1, 0))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert command.main(["training", "--quick"]) == 0
    found = rows.read(tmp_path / "cpu.csv")
    names = [n + e for n in training.CONDITIONINGS for e in ("", "_equal")]
    assert [row["provider"] for row in found] == ["base", *names]
    assert all(float(row["over_base"]) > 0 and int(row["peak_bytes"]) > 0 for row in found[1:])
    shown = capsys.readouterr().out
    assert "full 2.000" in shown and "cat extra" not in shown


def test_a_conditioning_whose_start_is_not_the_base_is_refused():
    from bench.engine import training

    zero = torch.zeros(2, 3)
    assert training.gate((zero, zero[0]), False, (zero, zero[0])) == 0
    for got in ((zero + 1e-3, zero[0]), (zero, zero[0] + 1e-3)):
        with pytest.raises(AssertionError):
            training.gate((zero, zero[0]), False, got)
    with pytest.raises(AssertionError, match="not finite"):
        training.gate((zero, zero[0]), True, (zero / 0, zero[0]))
