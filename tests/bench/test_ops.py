"""bench at toy size: every case gives a valid row, a wrong provider none; rows are only added."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gpu, timing
from bench.ops import linear_logprob, mixed_lora, sample
from bench.report import plot, rows, tables
from clp_kernels import mix_logits, registry

CPU = torch.device("cpu")
ROOFS = timing.Roofs(bandwidth=1e6, flops={"float32": 1e9})
LORA = mixed_lora.Case(24, 12, 3, 4, 2, "float32")


def toy(case: sample.Case) -> sample.Case:
    vocab_size = case.vocab_size // 1000 + 7
    return dataclasses.replace(case, vocab_size=vocab_size, batch=min(case.batch, 3))


def a_row(provider: str = "cpu", p50: float = 2.0, **changes: str) -> rows.Row:
    row = dict.fromkeys(rows.FIELDS, "1") | {"date": "2026-11-20T00:00:00Z", "op": "sample"}
    row |= {"provider": provider, "case": '{"V": 7, "m": 1}', "p50_us": str(p50), "dirty": "no"}
    return row | changes


def test_every_case_emits_a_valid_row(monkeypatch, tmp_path: Path, measured) -> None:
    monkeypatch.setattr(sample, "SMALL", 100)  # both forms of the mix
    path, cases = tmp_path / "cpu.csv", [toy(c) for c in sample.cases() if c.top_p == 1]
    found, refused = measured(sample, cases, path)
    assert not refused and rows.read(path) == found
    names = ["floor", "torch", "torch_cdf", "torch_multinomial", "reference"]
    names += ["cpu"] if sample.native.cpu_missing() is None else []
    assert [row["provider"] for row in found] == names * len(cases)
    for row in found:
        assert tuple(row) == rows.FIELDS and row["op"] == "sample"
        assert set(json.loads(row["case"])) - {"mode"} == {"V", "m", "B", "dtype"}
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert row["provider"] == "floor" or 0 <= float(row["max_err_ratio"]) <= 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["date"])
    for start in range(0, len(found), len(names)):
        case = found[start : start + len(names)]
        fastest = min(float(row["p50_us"]) for row in case if row["provider"].startswith("torch"))
        ratios = [fastest / float(row["p50_us"]) for row in case]
        assert [float(row["ratio"]) for row in case] == pytest.approx(ratios, rel=0.01, abs=1e-3)


def test_filtered_and_logprob_cases_emit_valid_rows(tmp_path: Path, measured) -> None:
    """Every baseline passes its gate, and so do ours."""
    filtered = [toy(c) for c in sample.cases() if c.top_p < 1]
    filtered = [*filtered[::4], filtered[-1]]  # the last one mixes probabilities
    heads = [linear_logprob.Case(21, 70, 8, dtype) for dtype in ("float32", "bfloat16")]
    expected = {
        "sample": ["floor", "torch_sort", "torch_transformers", "reference", "cpu"],
        "linear_logprob": ["floor", "floor_bytes", "torch", "torch_cross_entropy", "torch_linear"],
    }
    expected["linear_logprob"] += ["cpu", "reference"]
    for subject, cases in ((sample, filtered), (linear_logprob, heads)):
        path = tmp_path / f"{subject.OP}.csv"
        found, refused = measured(subject, cases, path, memory=subject is linear_logprob)
        assert not refused and rows.read(path) == found
        names = [n for n in expected[subject.OP] if n != "cpu" or not sample.native.cpu_missing()]
        assert [row["provider"] for row in found] == names * len(cases)
        page = tables.tables(found)
        assert ("Peak memory" in page) == (subject is linear_logprob)
    assert {c.top_p for c in sample.cases()} == {1.0, 0.9}
    assert linear_logprob.Case(2048, 32_000, 512, "float32") in linear_logprob.cases("cpu", True)


def test_a_mixed_head_is_measured_against_the_sum_of_its_scaled_logits() -> None:
    case = linear_logprob.Case(24, 70, 8, "float32", experts=2)
    found = linear_logprob.providers(linear_logprob.inputs(case, CPU))
    names = ["torch", "reference"] if sample.native.cpu_missing() else ["torch", "cpu", "reference"]
    assert [provider.name for provider in found] == names
    for provider in found:
        assert provider.check(provider.run()) <= 1
    logprobs, gradient = found[-1].run()
    with pytest.raises(AssertionError, match="logprobs"):
        found[0].check((logprobs + 1e-3, gradient))


def test_a_token_that_the_filter_drops_is_refused() -> None:
    case = sample.Case(50, 2, 3, "float32", top_p=0.5)
    baseline = sample.providers(sample.inputs(case, CPU))[0]
    tokens, logprobs = baseline.run()
    data = sample.inputs(case, CPU)
    logp = torch.log_softmax(sample.mix(data), -1)
    least = logp.argmin(-1)
    with pytest.raises(AssertionError, match="does not keep"):
        baseline.check((least, logp.gather(1, least[:, None])[:, 0]))
    assert baseline.check((tokens, logprobs)) <= 1


def test_the_ladder_has_every_size() -> None:
    plain = [case for case in sample.cases() if case.top_p == 1]
    assert sum(case.mode == "probability" for case in plain) == 6
    fields = [case.fields() for case in plain if case.mode == "geometric"]
    assert not any("mode" in f for f in fields)
    sets = {key: {f[key] for f in fields} for key in ("V", "m", "B", "dtype")}
    dtypes = {"float32", "bfloat16"}
    assert sets == {"V": {512, 32_000, 151_936}, "m": {1, 2, 4}, "B": {1, 8, 32}, "dtype": dtypes}
    assert len(fields) == 54 and set(sample.cases(quick=True)) < set(sample.cases())
    assert sample.Case(10, 4, 2, "bfloat16").floor_bytes() == 160
    assert sample.Case(10, 4, 2, "bfloat16").floors(ROOFS) == {"floor": pytest.approx(160)}
    assert 1e8 < timing.copy_bandwidth(CPU, size=2**22) < 1e13


@pytest.mark.parametrize("mode", ["geometric", "probability"])
def test_baselines_draw_from_the_mixture(mode: str) -> None:
    """Each plain form draws with the right frequencies: 2,000 rows of one distribution."""
    weights = torch.tensor([[0.3, 0.7]]).repeat(2000, 1)
    logits = torch.randn(2, 1, 5).repeat(1, 2000, 1)
    z = mix_logits(logits[:, :1], weights[:1], mode=mode, backend="reference")
    wanted = torch.softmax(z[0], -1)
    rows = torch.zeros(2000, dtype=torch.int64)
    data = sample.Inputs(logits, weights, rows, rows, 1.0, mode)
    for draw in (sample.torch_gumbel, sample.torch_cdf, sample.torch_multinomial):
        tokens, logprobs = draw(data)
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


def provider(name: str, run, share: float = 0.0) -> timing.Provider:
    return timing.Provider(name, run, lambda _: share)


@pytest.fixture
def seconds_are_given(monkeypatch) -> None:
    """A provider's run gives the time that it is said to have taken."""
    monkeypatch.setattr(timing, "stopwatch", lambda device: lambda run: run())


def test_providers_take_turns_and_a_slow_one_leaves_early(seconds_are_given) -> None:
    calls: list[str] = []
    seconds = {"slow": 0.2, "fast": 1e-6}
    both = [provider(n, lambda n=n: calls.append(n) or seconds[n], 0.25) for n in seconds]
    times, refused = timing.measure(both, CPU, timing.Protocol(1, repeats=10, least=2, seconds=0.5))
    assert not refused
    assert [set(calls[i : i + 2]) for i in range(0, 10, 2)] == [{"slow", "fast"}] * 5
    assert calls[10:] == ["fast"] * 7  # both: gate, warm-up, 3 rounds; then the 10 are filled up
    assert times["slow"].p50_us == pytest.approx(200_000)
    assert times["fast"].max_err_ratio == 0.25 and times["fast"].peak_bytes is None


def small(case: mixed_lora.Case) -> mixed_lora.Case:
    """The same kind of case on a 24 x 24 layer, with at most 12 tokens of 3 examples."""
    batch = min(case.batch, 3)
    tokens = 12 if case.tokens > case.batch else batch
    return dataclasses.replace(case, features=24, tokens=tokens, batch=batch, r=2)


def ours(grad: bool, suffix: str = "") -> set[str]:
    """The backends that a 24 x 24 case on the CPU has, by the dispatch table itself."""
    case = dataclasses.replace(LORA, grad=grad)
    return {f"{b.name}{suffix}" for b in mixed_lora.backends(mixed_lora.inputs(case, CPU))}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("grad, graph", [(False, False), (True, False), (False, True)])
def test_every_mixed_lora_case_emits_a_valid_row(tmp_path, measured, device, grad, graph) -> None:
    """The cases of both devices, at toy size and on the CPU."""
    cases = list(dict.fromkeys(map(small, mixed_lora.cases(device, grad=grad, graph=graph))))
    path = tmp_path / "cpu.csv"
    found, refused = measured(mixed_lora, cases, path, memory=grad)
    assert not refused and rows.read(path) == found
    plain = {"floor_bytes", "floor_flops", "base", "torch_loop", "torch_cat", "peft"}
    plain |= {"torch_cat_by_hand"} if grad else {"torch_stacked"}
    for case in cases:
        key = json.dumps(case.fields())
        by_name = {row["provider"]: row for row in found if row["case"] == key}
        equal = ours(grad, "_equal_rows") if case.equal_rows else set()
        assert set(by_name) == plain | ours(grad) | equal
        for name, row in by_name.items():
            assert tuple(row) == rows.FIELDS and row["op"] == "mixed_lora"
            compared = name != "base" and not name.startswith("floor")
            assert (row["extra_us"] != "") == (row["over_base"] != "") == compared
            assert (row["peak_bytes"] != "") == (grad and not name.startswith("floor"))
            assert name.startswith("floor") or 0 <= float(row["max_err_ratio"]) <= 1
        fastest = min(float(r["p50_us"]) for n, r in by_name.items() if rows.is_baseline(n))
        ratio = fastest / float(by_name["reference"]["p50_us"])
        assert float(by_name["reference"]["ratio"]) == pytest.approx(ratio, rel=0.02, abs=2e-3)


def test_the_mixed_lora_ladder_has_every_size() -> None:
    def sizes(cases: list[mixed_lora.Case]) -> set[tuple[int, int, str]]:
        return {(c.features, c.tokens, c.dtype) for c in cases if (c.m, c.r) == (4, 16)}

    both, tokens = ("float32", "bfloat16"), (1, 2, 4, 8, 16, 64, 256)
    forward = mixed_lora.cases("cpu")
    assert sizes(forward) == {(d, t, k) for d in (2048, 4096) for t in tokens for k in both}
    assert {(c.m, c.r) for c in forward} == {(4, 16), (2, 8)}
    assert {c.tokens for c in forward if c.equal_rows} == {8, 64}
    training = mixed_lora.cases("cpu", grad=True)
    small = {(d, 2048, k) for d in (1024, 2048) for k in both}
    assert sizes(training) == small | {(4096, 2048, "float32")}
    assert all(c.grad and c.batch == 8 for c in training)
    decode = sizes(mixed_lora.cases("cuda", graph=True))
    tokens = (1, 8, 16, 32, 64, 128, 256)
    assert decode == {(d, t, "bfloat16") for d in (2048, 4096, 8192) for t in tokens}
    assert sizes(mixed_lora.cases("cuda")) == {(4096, t, "bfloat16") for t in (2048, 8192)}
    assert sizes(mixed_lora.cases("cuda", grad=True)) == {(4096, 8192, "bfloat16")}
    for device, grad, graph in (("cpu", False, False), ("cpu", True, False), ("cuda", False, True)):
        every = mixed_lora.cases(device, grad=grad, graph=graph)
        assert set(mixed_lora.cases(device, grad=grad, graph=graph, quick=True)) < set(every)


def test_mixed_lora_floors() -> None:
    case = mixed_lora.Case(10, 6, 2, 3, 2, "float32")
    assert case.floor_bytes() == 4 * (100 + 2 * 60 + 2 * 60)  # W; A and B; x and y
    assert case.floor_flops() == 2 * 6 * (100 + 2 * 60)
    train = dataclasses.replace(case, grad=True)
    assert train.floor_bytes() == case.floor_bytes() + 4 * (100 + 4 * 60 + 3 * 60)
    assert train.floor_flops() == 2 * 6 * (2 * 100 + 6 * 60)
    assert case.floors(ROOFS)["floor_bytes"] == pytest.approx(case.floor_bytes())
    assert case.floors(ROOFS)["floor_flops"] == pytest.approx(case.floor_flops() / 1e3)
    assert 1e6 < timing.gemm_rate(CPU, torch.float32, size=64) < 1e13


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("options", [[], ["--grad"]])
def test_large_bfloat16_is_left_out_where_the_processor_has_no_product(
    monkeypatch, capsys, native: bool, options: list[str]
) -> None:
    """The largest case goes, with a line that says so, and only it."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    args = command.parser().parse_args(["mixed_lora", *options])
    _, cases, _ = command.plan(args)
    left = set(mixed_lora.cases("cpu", grad=args.grad)) - set(cases)
    assert len(capsys.readouterr().out.splitlines()) == len(left) == (0 if native else 1)
    assert all(c.dtype == "bfloat16" for c in left)


def test_each_path_of_the_triton_kernel_is_a_provider(monkeypatch) -> None:
    """In Triton's interpreter, which tests/conftest.py chooses where there is no GPU."""
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        pytest.skip("triton is not installed, or compiles for a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = mixed_lora.providers(mixed_lora.inputs(LORA, CPU))
    assert {"triton", "triton_fused", "triton_split"} <= {provider.name for provider in found}
    for provider in found:
        assert provider.check(provider.run()) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grad", [False, True])
def test_torch_compile_of_a_baseline(monkeypatch, grad: bool, dtype: str) -> None:
    """Compiled by a backend that needs no compiler, so that the call stays the one that is used."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda form, mode: compile(form, backend="aot_eager"))
    case = dataclasses.replace(LORA, dtype=dtype, grad=grad)
    found = mixed_lora.providers(mixed_lora.inputs(case, CPU), compiled=True)
    compiled = next(p for p in found if p.name == "torch_cat_compiled")
    assert compiled.check(compiled.run()) <= 1


@pytest.mark.parametrize("grad", [False, True])
def test_the_mixed_lora_gate_refuses_each_wrong_output(grad: bool) -> None:
    """Those of the reference, one wrong at a time."""
    data = mixed_lora.inputs(dataclasses.replace(LORA, grad=grad), CPU)
    reference = next(p for p in mixed_lora.providers(data) if p.name == "reference")
    right = tuple(t.detach() for t in reference.run())
    names = mixed_lora.NAMES if grad else ("y",)
    for i, name in zip(range(len(right)), names, strict=True):
        for change in (lambda t: t * 1.05, lambda t: t.flip(0), lambda t: t * torch.nan):
            with pytest.raises(AssertionError, match=f"^{name} "):
                reference.check((*right[:i], change(right[i]), *right[i + 1 :]))


def test_the_gate_refuses_an_adapter_left_out_or_the_rows_of_another_example() -> None:
    """Of every kind of provider: the wrong weights, the layout of its gradients unchanged."""
    case = dataclasses.replace(LORA, grad=True, equal_rows=True)
    data = mixed_lora.inputs(case, CPU)
    right = mixed_lora.providers(data)
    lacking = data.weights * torch.tensor([1.0, 1.0, 1.0, 0.0])
    for weights in (lacking, data.weights.flip(0)):
        wrong = mixed_lora.providers(dataclasses.replace(data, weights=weights))
        for provider, other in zip(right, wrong, strict=True):
            if provider.name != "base":
                with pytest.raises(AssertionError, match="out of its error budget"):
                    provider.check(other.run())


def test_large_outputs_are_judged_on_some_rows_and_must_be_finite(monkeypatch) -> None:
    monkeypatch.setattr(mixed_lora, "JUDGED", 24 * 3)
    data = mixed_lora.inputs(LORA, CPU)
    cat = next(p for p in mixed_lora.providers(data) if p.name == "torch_cat")
    output = cat.run()[0]  # rows 0, 4 and 8 of 12
    assert cat.check((output,)) <= 1
    output[7, 3] = torch.inf
    with pytest.raises(AssertionError, match="y must be finite"):
        cat.check((output,))
    output[7, 3], output[8, 3] = 0.0, 100.0
    with pytest.raises(AssertionError, match="y is out of its error budget at index \\[2, 3\\]"):
        cat.check((output,))


def test_a_wrong_mixed_lora_is_refused_on_the_command_line(monkeypatch, capsys) -> None:
    """A backend that leaves the adapters out, under the name of one that the CPU does not have."""

    def bare(inputs):
        return inputs.x @ inputs.base_weight.t(), inputs.x.new_empty(0)

    wrong = registry.Backend("triton", bare, lambda *_: None)
    table = (wrong, registry.BACKENDS["mixed_lora"][-1])
    monkeypatch.setitem(registry.BACKENDS, "mixed_lora", table)
    case = mixed_lora.Case(24, 3, 3, 4, 2, "float32")
    monkeypatch.setattr(mixed_lora, "cases", lambda *_, **__: [case])
    monkeypatch.setattr(timing, "roofs", lambda *_: ROOFS)
    assert command.main(["mixed_lora", "--quick", "--no-save"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"REFUSED by the error gate: triton.*y is out of its error budget", printed)
    assert "| triton " not in printed and "torch_cat" in printed


def test_differences_are_taken_round_by_round(seconds_are_given) -> None:
    """Times whose medians say 7.2 and 4.6; the pairs say 0.2 and 1.1."""
    seconds = {"base": [0.0, 1.0, 2.0, 9.0], "torch_cat": [0.0, 1.1, 10.0, 9.2]}  # gate, 3 rounds
    left = {name: iter(times) for name, times in seconds.items()}
    both = [provider(name, lambda n=name: next(left[n])) for name in seconds]
    times, _ = timing.measure(both, CPU, timing.Protocol(warmup=0, repeats=3, least=3, seconds=99))
    assert times["torch_cat"].extra_us == pytest.approx(0.2e6)
    assert times["torch_cat"].over_base == pytest.approx(1.1)
    assert times["base"].extra_us is None and times["base"].over_base is None


def test_the_base_stays_as_long_as_the_slowest(seconds_are_given) -> None:
    calls: list[str] = []
    seconds = {"base": 1.0, "torch_cat": 0.01}
    both = [provider(n, lambda n=n: calls.append(n) or seconds[n]) for n in seconds]
    timing.measure(both, CPU, timing.Protocol(warmup=0, repeats=20, least=2, seconds=0.5))
    assert calls.count("base") == calls.count("torch_cat") == 21  # the gate and every round


def test_a_provider_that_cannot_run_is_refused() -> None:
    def fail() -> None:
        raise RuntimeError("no kernel image is available")

    providers = [provider("triton", fail), provider("torch_cat", lambda: 1)]
    times, refused = timing.measure(providers, CPU, timing.Protocol(warmup=1, repeats=2, least=1))
    assert set(times) == {"torch_cat"}
    assert refused == {"triton": "RuntimeError: no kernel image is available"}


class OutOfResources(Exception):
    """As Triton's, which is no RuntimeError."""


@pytest.mark.parametrize("error", [OutOfResources("shared memory"), AttributeError("absent"),
                                   TypeError("argument"), ImportError("module"), KeyError("x"),
                                   torch.OutOfMemoryError("2 GiB"), MemoryError("2 GiB")],
                         ids=lambda error: type(error).__name__)  # fmt: skip
@pytest.mark.parametrize("at", [1, 2, 4, 8])
def test_whatever_a_provider_raises_refuses_it_alone(at: int, error: Exception) -> None:
    """In its gate, in a warm-up, in a timed call, or while its memory is measured."""
    calls = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == at:
            raise error

    providers = [provider("base", lambda: 1), provider("triton", fail), provider("cuda", lambda: 1)]
    protocol = timing.Protocol(warmup=2, repeats=4, least=4, seconds=60)
    times, refused = timing.measure(providers, CPU, protocol, memory=True)
    assert len(calls) == at
    assert set(times) == {"base", "cuda"} and times["cuda"].over_base is not None
    assert refused == {"triton": f"{type(error).__name__}: {error}"}


def test_a_base_that_fails_later_leaves_the_others() -> None:
    left = [1, 1, 1]
    providers = [provider("base", left.pop), provider("cuda", lambda: 1)]
    times, refused = timing.measure(providers, CPU, timing.Protocol(warmup=1, repeats=4, least=4))
    assert set(times) == {"cuda"} and times["cuda"].over_base is None
    assert refused == {"base": "IndexError: pop from empty list"}


def test_ctrl_c_ends_a_measurement() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.measure([provider("cuda", stop)], CPU, timing.Protocol(warmup=0, repeats=1))


def test_peak_memory_on_the_cpu() -> None:
    """Of a function whose peak is known: what is freed in between counts, what was there not."""
    size = 2**20
    before = torch.zeros(size)

    def call() -> torch.Tensor:
        a = before + 1  # 4 MB
        b = a.double()  # + 8 MB: the peak
        del a
        return b[: size // 2] * 2  # + 4 MB, while b is allocated: 12 MB again

    assert timing.peak_bytes_cpu(call) == pytest.approx(12 * size, abs=1000)
    assert timing.peak_bytes_cpu(lambda: before.view(-1, 2)) < 1000
    x = torch.zeros(size, requires_grad=True)

    def train() -> tuple[torch.Tensor, torch.Tensor]:
        y = x * x
        return y, torch.autograd.grad(y, x, before)[0]

    assert timing.peak_bytes_cpu(train) >= 8 * size


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


@pytest.mark.parametrize("count", rows.OLDER)
def test_rows_from_before_the_last_columns_stay_as_they_are(tmp_path: Path, count: int) -> None:
    """Read with the new columns empty; rewritten once, when a row is added, and then only added."""
    path, old = tmp_path / "cpu.csv", rows.FIELDS[:count]
    lacking = len(rows.FIELDS) - count
    first = '1,2,no,"A, 2 cores"' + ",x" * (len(old) - 4)
    lines = [",".join(old), first, ",".join("abc" * 7)[: 2 * count - 1]]
    assert all(len(line.split(",")) >= len(old) for line in lines)
    path.write_text("\n".join(lines) + "\n")
    before = rows.read(path)
    assert [row[rows.FIELDS[-1]] for row in before] == ["", ""]
    assert before[0]["machine"] == "A, 2 cores"
    assert path.read_text().splitlines() == lines  # reading changes nothing
    rows.append(path, [a_row("cpu", over_base="1.05")])
    after = path.read_text().splitlines()
    assert after[0] == ",".join(rows.FIELDS)
    assert after[1:3] == [line + "," * lacking for line in lines[1:]]
    assert rows.read(path) == [*before, a_row("cpu", over_base="1.05")]
    rows.append(path, [a_row("torch")])
    assert path.read_text().splitlines()[:4] == after
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.csv"]


def test_provenance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine column names the model alone; outside a checkout $GIT_COMMIT is the commit."""
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    shared = rows.provenance(CPU)
    assert (shared["commit"], shared["dirty"]) == ("abc123", "unknown")
    assert shared["machine"].endswith(f", {os.cpu_count()} cores")
    assert os.uname().nodename not in shared["machine"]


def test_results_page_shows_the_latest_rows(tmp_path: Path, page) -> None:
    old = a_row("cpu", p50=9999, machine="A")
    rest = [a_row("floor", 0.5, machine="A"), a_row("torch", 8, machine="A")]
    new = a_row("cpu", p50=2, ratio="4.00", machine="A", commit="c2", dirty="yes")
    lone = a_row("cpu", 7, machine="A", case='{"V": 8}', ratio="")
    rows.append(tmp_path / "cpu.csv", [old, *rest, new, lone, a_row("cpu", 7, machine="B")])
    text, lines = page()
    assert text.index("## `sample` on A,") < text.index("## `sample` on B,")
    assert "9999" not in text and "commit 1, c2+ " in text
    assert "python -m bench sample --device cpu" in text
    assert lines[0] == "| V | m | floor | torch | cpu | cpu speed-up | cpu / floor |"
    assert lines[2] == "| 7 | 1 | 0.5 | 8.0 [1.0, 1.0] | 2.0 [1.0, 1.0] | 4.00 | 4.0 |"
    assert lines[3] == "| 8 | | | | 7.0 [1.0, 1.0] | | |"


def mixed_rows(*providers: str, **changes: str) -> list[rows.Row]:
    """Rows of a small ladder: extra time 10 us for each place in the list."""
    found = []
    for size, tokens in ((8, 1), (8, 4), (16, 1), (16, 4)):
        case = {"mode": "forward", "d": size, "T": tokens, "B": tokens, "m": 4, "r": 16}
        key = json.dumps(case | {"dtype": "float32"})
        for place, name in enumerate(("base", *providers)):
            row = a_row(name, 100 + 10 * place, op="mixed_lora", case=key, peak_bytes="")
            over = {"extra_us": str(10 * place), "over_base": str(1 + place / 10)}
            found.append(row | (over if place else {"extra_us": "", "over_base": ""}) | changes)
    return found


def test_results_of_mixed_lora(tmp_path: Path, page) -> None:
    found = mixed_rows("cpu", "torch_cat", "peft", "reference")
    grad = json.dumps({"mode": "forward+backward", "d": 8, "T": 9})
    both = [a_row("base", op="mixed_lora", case=grad, peak_bytes="2000000", over_base="")]
    both += [a_row("cpu", op="mixed_lora", case=grad, peak_bytes="2200000", extra_us="-3.0")]
    both += [a_row("torch_cat", op="mixed_lora", case=grad, peak_bytes="")]
    rows.append(tmp_path / "cpu.csv", [*found, *both])
    text, lines = page()
    assert "python -m bench mixed_lora --device cpu`" in text
    assert "--device cpu --grad`" in text and "](results/mixed_lora_cpu.png)" in text
    head = "| d | T | B | m | r | dtype | base | torch_cat | peft | reference | cpu |"
    assert lines[0] == f"{head} cat extra / cpu's | cpu / cat |"
    assert lines[2] == (
        "| 8 | 1 | 1 | 4 | 16 | float32 | 100 [1.0, 1.0] | 1.200 (20.0) | 1.300 (30.0)"
        " | 1.400 (40.0) | 1.100 (10.0) | 2.00 | 0.917 |"
    )
    assert lines[-4].endswith("| 1.000 (-3.0) | all | 1.000 |")  # faster than the base itself
    assert lines[-3] == "| d | T | base MB | torch_cat | cpu |"
    assert lines[-1] == "| 8 | 9 | 2.0 | | 1.10 |"


def test_the_plot_is_written(tmp_path: Path) -> None:
    """A panel for each d and dtype, a line and a label for each provider; of the newest machine."""
    names = ("torch_cat", "torch_loop", "peft", "reference", "cpu", "triton", "triton_split")
    rows.append(tmp_path / "cpu.csv", [*mixed_rows(*names), a_row()])
    rows.append(tmp_path / "cuda.csv", [a_row()])  # nothing of mixed_lora
    assert plot.write_plots(tmp_path) == [tmp_path / "mixed_lora_cpu.png"]
    png = (tmp_path / "mixed_lora_cpu.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000


def test_results_command(monkeypatch) -> None:
    """The plots first: the page shows those that are there."""
    calls: list[str] = []
    monkeypatch.setattr(plot, "write_plots", lambda: calls.append("plots"))
    monkeypatch.setattr(tables, "write_results", lambda: calls.append("page"))
    assert command.main(["results"]) == 0 and calls == ["plots", "page"]


def test_labels_keep_their_distance() -> None:
    placed = plot.spread([("b", 0.5), ("a", 0.49), ("c", 0.9)])
    assert placed == [("a", 0.49), ("b", pytest.approx(0.49 + plot.GAP)), ("c", 0.9)]
    assert plot.apart([("1", 0.0), ("2", 0.01), ("3", 0.2)]) == [("1", 0.0), ("3", 0.2)]


def test_gpu_without_a_gpu_and_without_the_development_packages(tmp_path: Path) -> None:
    """Exit status 2 and one sentence; and tests/gpu can be collected there."""
    for package in ("hypothesis", "transformers", "peft", "scipy", "tqdm"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('blocked')\n")
    blocked = {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    how = {"cwd": rows.ROOT, "env": os.environ | blocked | {"CUDA_VISIBLE_DEVICES": ""}}
    commands = ([sys.executable, "-m", "bench.gpu"], [*gpu.PYTEST, "tests/gpu", "--collect-only"])
    bare, tests = [subprocess.run(c, capture_output=True, text=True, **how) for c in commands]
    assert (bare.returncode, bare.stdout) == (2, "")
    assert bare.stderr == "bench.gpu needs an NVIDIA GPU, and this PyTorch sees none.\n"
    assert tests.returncode == 0, tests.stdout + tests.stderr


class Gpu:
    """Stages in place of those that need a GPU: what `main` does with them."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.csv, self.out = tmp_path / "results" / "cuda.csv", tmp_path / "out"
        self.out.mkdir()
        row = dict.fromkeys(rows.FIELDS, "1") | {"date": "2026-11-20T00:00:00Z", "op": "sample"}
        write = (
            "import sys; from pathlib import Path; from bench.report import rows; "
            f"rows.append(Path({str(self.csv)!r}), [{row!r} | dict(case=sys.argv[1])])"
        )
        out_of_resources = (
            "from triton.runtime.errors import OutOfResources; "
            "raise OutOfResources(300000, 232448, 'shared memory')"
        )
        python = [sys.executable, "-c"]
        bench = [*python, write]
        here = tmp_path / "test_there.py"
        here.write_text("def test_passes(): pass\ndef test_fails(): assert False\n")
        hangs = [*python, "import time; print('begins', flush=True); time.sleep(60)"]
        self.stages = [
            gpu.Stage("build", [*python, "pass"], 20, 1, ()),
            gpu.Stage("selftest", [*python, out_of_resources], 20, 1, ("build",)),
            gpu.Stage("first", [*bench, '{"B": 1}'], 30, 1, ("build",)),
            gpu.Stage("hangs", hangs, 1.5, 1, ("build",)),
            gpu.Stage("tests, there", [*gpu.PYTEST, str(here)], 60, 1, ("build",)),
            gpu.Stage("second", [*bench, '{"B": 2}'], 30, 1, ("build",)),
        ]
        monkeypatch.setattr(gpu, "stages", lambda sanitizer: self.stages)
        monkeypatch.setattr(rows, "RESULTS", self.csv.parent)
        monkeypatch.setattr(gpu, "LOGS", self.csv.parent / "gpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(rows, "machine", lambda device: "a GPU")
        monkeypatch.setenv("OUT", str(self.out))


def test_gpu_stages_that_fail_or_hang_leave_the_others_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Gpu(tmp_path, monkeypatch)
    assert gpu.main([]) == 1
    summary = capsys.readouterr().out.split("a GPU, torch")[1]
    found = {line.split("  ")[0]: line for line in summary.splitlines()}
    for name, verdict in {"build": "passed", "selftest": "FAILED", "first": "passed",
                          "hangs": "FAILED", "tests, there": "FAILED",
                          "second": "passed"}.items():  # fmt: skip
        assert verdict in found[name]
    assert "stopped after 2 s" in found["hangs"]
    assert [row["case"] for row in rows.read(made.csv)] == ['{"B": 1}', '{"B": 2}']
    assert "OutOfResources" in (made.out / "selftest.log").read_text()
    assert "begins" in (made.out / "hangs.log").read_text()
    assert 'tests="2"' in (made.out / "tests_there.xml").read_text()
    assert (made.out / "cuda.csv").read_bytes() == made.csv.read_bytes()


def test_gpu_runs_one_stage_and_prints_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Gpu(tmp_path, monkeypatch)
    assert gpu.main(["--stage", "second"]) == 0
    assert [row["case"] for row in rows.read(made.csv)] == ['{"B": 2}']
    capsys.readouterr()
    assert gpu.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(made.stages) + 2 and lines[4].split() == ["hangs", "2", "s", "1", "s"]
    with pytest.raises(SystemExit):
        gpu.main(["--stage", "nope"])
    assert "invalid choice: 'nope'" in capsys.readouterr().err


def gpu_tests() -> list[Path]:
    return sorted((rows.ROOT / "tests" / "gpu").glob("test_*.py"))


def test_gpu_stages(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = {stage.name: stage for stage in gpu.stages("/bin/compute-sanitizer")}
    names = list(planned)
    assert names[:6] == ["build", "load", "selftest", "mixed_lora, graph", "mixed_lora",
                         "mixed_lora, grad"]  # fmt: skip
    assert names[-2:] == ["memcheck", "racecheck"]
    assert not {"memcheck", "racecheck"} & {stage.name for stage in gpu.stages(None)}
    # If each of these hangs, there is time for the next.
    needed = [planned[name] for name in names[: names.index("linear_logprob") + 1]]
    assert sum(stage.limit for stage in needed) <= gpu.DEADLINE
    assert sum(stage.expected for stage in planned.values()) <= gpu.DEADLINE < 8 * 60
    assert all(stage.expected < stage.limit for stage in planned.values())
    files = {stage.command[-1] for name, stage in planned.items() if name.startswith("tests, ")}
    assert files == {f"tests/gpu/{path.name}" for path in gpu_tests()}
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    bare = gpu.perform(dataclasses.replace(planned["sampler"], needs="not_there"), set(), 100)
    assert (bare.ok, bare.note) == (None, "skipped: not_there is not installed")
    assert gpu.exit_status([bare]) == 0
    left_out = gpu.perform(planned["sample"], {"build"}, 100)
    late = gpu.perform(planned["build"], set(), 0)
    assert left_out.note == "not run: load did not pass" and late.note.startswith("not run")

    def outcome(code: str, *words: str, time_left: float = 30) -> gpu.Outcome:
        stage = gpu.Stage("it, too", [sys.executable, "-c", code, *words], 120, 1, ())
        return gpu.perform(stage, set(), time_left)

    good = outcome("print('hello')")
    assert good.ok and "hello" in capfd.readouterr().out
    log = (tmp_path / "it_too.log").read_text()
    assert log.startswith("$ ") and "\nhello\n(it, too: exit status 0" in log
    slow = outcome("import time; time.sleep(30)", time_left=0.3)
    bare = outcome("import sys; sys.exit('No module named pytest')")
    unable = outcome("import sys; sys.exit('Error: Device not supported')", "--error-exitcode")
    assert (slow.ok, bare.ok, unable.ok) == (False, False, None) and slow.seconds < 10
    assert bare.note == "pytest is not installed: no test ran"
    statuses = [gpu.exit_status([good, other]) for other in (good, unable, slow, left_out, late)]
    assert statuses == [0, 0, 1, 1, 1]
