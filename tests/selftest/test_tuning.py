"""Which path of mixed_lora is taken: measured, kept, looked up by Python and by the fast path."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CPU_KERNELS
from processes import python
from torch import nn

from clp_kernels import inject, native, trust
from clp_kernels.files import cache_folder
from clp_kernels.nn.mixed_lora import MixedLoRALinear
from clp_kernels.ops import choices
from clp_kernels.ops.mixed_lora import cpu
from clp_kernels.ops.mixed_lora.cpu import ANY, Limits, Size
from clp_kernels.ops.mixed_lora.op import mixed_lora
from clp_kernels.selftest import __main__ as command
from clp_kernels.selftest import tuning

pytestmark = CPU_KERNELS
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, with measuring on."""
    monkeypatch.setenv("CLP_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("CLP_KERNELS_TUNE", "1")
    monkeypatch.setattr(choices, "of_this_process", {})
    look_again()
    yield tmp_path
    monkeypatch.undo()
    look_again()


def look_again() -> None:
    choices.known.cache_clear()
    cpu.forget()


def size(features: int = 40, dtype: torch.dtype = F32) -> Size:
    return Size(dtype, dtype, features, 24, 8, torch.get_num_threads())


def paths_taken(monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype = F32) -> str:
    """Which path a checked call takes, by the functions that it calls."""
    seen: list[str] = []
    run_native = cpu.run_native

    def native_run(*args: Any, **options: Any) -> Any:
        seen.append("whole" if len(args) > 6 else "adapters" if args[5] is not None else "u")
        return run_native(*args, **options)

    x, W = torch.randn(tokens, 40).to(dtype), torch.randn(24, 40).to(dtype)
    A, B = torch.randn(2, 4, 40).to(dtype), torch.randn(2, 24, 4).to(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "run_native", native_run)
        y = mixed_lora(x, W, A.requires_grad_(), B, torch.ones(tokens, 2), backend="cpu")
    with torch.no_grad():  # the fast path, where it is taken
        fast = mixed_lora(x, W, A, B, torch.ones(tokens, 2), backend="cpu")
    assert torch.equal(fast, y)
    return seen[0] if seen and seen != ["u"] else "products"


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        (Limits(1, ANY, 0), ["whole"] * 3),
        (Limits(1, 0, ANY), ["adapters"] * 3),
        (Limits(1, 0, 0), ["products"] * 3),
        (Limits(1, 2, 9), ["whole", "adapters", "products"]),
        (Limits(1, 9, 2), ["whole", "whole", "products"]),
        (Limits(9, 20, 2), ["adapters", "whole", "products"]),
        (Limits(2, 9, 0), ["products", "whole", "products"]),
    ],
)
def test_a_call_takes_the_path_that_was_measured(
    limits: Limits, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python and C++ alike, to the bit."""
    choices.keep("mixed_lora", str(size()), list(limits))
    cpu.forget()
    assert [paths_taken(monkeypatch, tokens) for tokens in (1, 9, 40)] == wanted


def test_sizes_that_were_not_measured_keep_their_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = [paths_taken(monkeypatch, tokens) for tokens in (1, 9, 400)]
    for other in (size(41), size()._replace(rank=9), size()._replace(threads=99), size(40, BF16)):
        choices.keep("mixed_lora", str(other), [1, 0, 0])
    cpu.forget()
    assert [paths_taken(monkeypatch, tokens) for tokens in (1, 9, 400)] == rule
    choices.keep("mixed_lora", str(size()), [1, 0, 0])
    cpu.forget()
    assert [paths_taken(monkeypatch, tokens) for tokens in (1, 9, 400)] == ["products"] * 3


def test_bfloat16_is_not_rounded_by_products_that_the_processor_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "has_native_gemm", lambda dtype: dtype == F32)
    choices.keep("mixed_lora", str(size(40, BF16)), [1, 0, 0])
    cpu.forget()
    assert paths_taken(monkeypatch, 9, BF16) == "adapters"


def test_the_same_size_is_the_same_text_in_both_directions() -> None:
    for one in (size(), size(7, BF16), Size(BF16, F32, 8, 9, 10, 11)):
        choices.keep("mixed_lora", str(one), [2, 3, 4])
        cpu.forget()
        assert cpu.measured()[one] == Limits(2, 3, 4)


def times(*rows: tuple[float, ...]) -> dict[int, dict[str, float]]:
    names = ("whole", "adapters", "products")
    return {2**k: dict(zip(names, row, strict=False)) for k, row in enumerate(rows)}


@pytest.mark.parametrize(
    ("measured", "has_gemm", "limits"),
    [
        (times((1, 2, 3), (1, 2, 3), (3, 2, 3), (3, 3, 2)), True, Limits(1, 2, 5)),
        (times((2, 1, 3), (3, 2, 1)), True, Limits(1, 0, 1)),
        (times((2, 3, 1), (2, 3, 1)), True, Limits(1, 0, 0)),
        (times((1, 2, 3), (1, 2, 3)), True, Limits(1, 2, 2)),
        (times((1, 2), (1, 2)), False, Limits(1, ANY, ANY)),
        (times((1, 2), (1, 2), (2, 1)), False, Limits(1, 2, ANY)),
        # One that is slow by chance does not end a path: least is lost in all.
        (times((1, 2, 3), (1.1, 1, 3), (1, 2, 3), (9, 9, 1)), True, Limits(1, 5, 5)),
        # One token waits for memory, which another path may read faster.
        (times((2, 1, 3), (1, 2, 3), (1, 2, 3), (3, 2, 1)), True, Limits(2, 5, 5)),
        # The adapters' limit is that beside PyTorch's products, of calls that are not whole.
        (times((1, 3, 2), (1, 2, 3)), True, Limits(1, 2, 0)),
    ],
)
def test_limits_are_those_that_lose_least(
    measured: dict[int, Any], has_gemm: bool, limits: Limits
) -> None:
    assert tuning.limits_of(measured, has_gemm) == limits


def test_measuring_times_every_path_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TOKENS", (1, 2))
    monkeypatch.setattr(tuning, "ROTATED", 1)
    found = tuning.measure(size())
    assert found.keys() == {1, 2}
    for of in found.values():
        assert of.keys() == {"whole", "adapters", "products"}
        assert all(0 < taken < 1 and math.isfinite(taken) for taken in of.values())
    assert cpu.measured() == {}

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_timed", interrupt)
    cpu.choose(size(), Limits(1, 0, 0))
    with pytest.raises(KeyboardInterrupt):
        tuning.measure(size())
    assert cpu.measured() == {}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Size]:
    """As if measuring took no time; what was measured."""
    sizes: list[Size] = []

    def measure(size: Size, end: float = 0.0) -> dict[int, Any]:
        sizes.append(size)
        products = cpu.product_dtype(size.dtype, size.lora_dtype) == size.dtype
        return times((1, 2, 3), (3, 2, 1)) if products else times((1, 2), (3, 2))

    monkeypatch.setattr(tuning, "measure", measure)
    return sizes


def wide_layers(dtype: torch.dtype = F32) -> list[MixedLoRALinear]:
    model = nn.Sequential(nn.Linear(512, 600), nn.Linear(600, 512), nn.Linear(16, 16)).to(dtype)
    inject(model, ["a", "b"], r=4, target_modules=["0", "1", "2"])
    return [layer for layer in model if isinstance(layer, MixedLoRALinear)]


def test_the_large_layers_of_a_model_are_measured_once(timed: list[Size], folder: Path) -> None:
    threads = torch.get_num_threads()
    wanted = [Size(F32, F32, 512, 600, 8, threads), Size(F32, F32, 600, 512, 8, threads)]
    tuning.ensure(wide_layers())
    assert sorted(timed) == sorted(wanted, key=str)
    assert {*cpu.measured()} == {*wanted}
    tuning.ensure(wide_layers())
    choices.of_this_process.clear()  # as another process has it
    look_again()
    tuning.ensure(wide_layers())
    assert len(timed) == 2 and {*cpu.measured()} == {*wanted}
    tuning.ensure(wide_layers(BF16))  # with adapters in float32
    assert timed[2:] == [
        Size(BF16, F32, 512, 600, 8, threads),
        Size(BF16, F32, 600, 512, 8, threads),
    ]
    whole = json.loads((folder / choices.FILE.name).read_text())
    assert whole["format"] == 1 and len(whole["results"]) == 1


def test_no_size_is_begun_after_the_time_is_over(
    timed: list[Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "LIMIT", -1.0)
    tuning.ensure(wide_layers())
    assert timed == [] and cpu.measured() == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("CLP_KERNELS_TUNE", "0"), ("CLP_KERNELS_TRUST", "all"), ("CLP_KERNELS_TRUST", "none")],
)
def test_nothing_is_measured_or_read_if_it_is_not_wanted(
    name: str, value: str, timed: list[Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices.keep("mixed_lora", str(size()), [1, 0, 0])
    monkeypatch.setenv(name, value)
    trust.trust.cache_clear()
    look_again()
    try:
        tuning.ensure(wide_layers())
        assert timed == [] and cpu.measured() == {} and choices.fingerprint() is None
    finally:
        monkeypatch.undo()
        trust.trust.cache_clear()


def test_a_wrong_value_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLP_KERNELS_TUNE", "yes")
    with pytest.raises(ValueError, match="CLP_KERNELS_TUNE must be 0 or 1, got 'yes'"):
        choices.is_on()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2, "results": {}}', '{"format": 1, "results": []}',
     '{"format": 1, "results": {"a": []}}', '{"format": 1, "results": {"a": {"b": {"c": 3}}}}',
     '{"format": 1, "results": {"a": {"b": {"c": [true]}}}}'],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_ignored_and_made_anew(text: str, folder: Path) -> None:
    (folder / choices.FILE.name).write_text(text)
    with pytest.warns(RuntimeWarning, match="is ignored, it holds no measured choices"):
        assert choices.known("mixed_lora") == {}
        choices.keep("mixed_lora", str(size()), [1, 1, 2])
    choices.of_this_process.clear()
    look_again()
    assert choices.known("mixed_lora") == {str(size()): [1, 1, 2]}


@pytest.mark.parametrize("choice", [[1, 2], [1, 2, 3, 4], [1, -1, 2]])
@pytest.mark.parametrize("text", ["dtype=float32", "nonsense", "", "dtype=int8 lora_dtype=int8"])
def test_entries_that_are_no_sizes_or_limits_are_passed_over(text: str, choice: list[int]) -> None:
    choices.keep("mixed_lora", text, [1, 1, 2])
    choices.keep("mixed_lora", str(size()), choice)
    choices.keep("mixed_lora", str(size(7)), [1, 1, 2])
    cpu.forget()
    assert cpu.measured() == {size(7): Limits(1, 1, 2)}


def test_a_folder_that_cannot_be_written_to_leaves_the_choices_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLP_KERNELS_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(RuntimeWarning, match="measured choices are kept in this process alone"):
        choices.keep("mixed_lora", str(size()), [1, 1, 2])
    cpu.forget()
    assert cpu.measured() == {size(): Limits(1, 1, 2)}


def test_another_machine_or_version_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    choices.keep("mixed_lora", str(size()), [1, 1, 2])
    before = choices.fingerprint()
    choices.of_this_process.clear()
    look_again()
    assert choices.fingerprint() == before is not None
    monkeypatch.setattr(trust, "machine", lambda device, backend: "another")
    look_again()
    assert choices.fingerprint() is None
    choices.keep("mixed_lora", str(size()), [1, 2, 2])
    assert choices.fingerprint() not in (None, before)
    monkeypatch.undo()


def test_the_command_prints_a_table(
    timed: list[Size], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "common_sizes", lambda: [size(), size(40, BF16)])
    assert command.main(["--tune", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    gemm = native.has_native_gemm(BF16)
    assert lines[1].split()[-3:] == ["1", "1", "1"] and lines[1].startswith("dtype=float32")
    assert lines[2].split()[-3:] == ["1", "1", "1" if gemm else "any"] and len(timed) == 2
    command.main(["--tune", "--device", "cpu"])
    assert len(timed) == 4  # anew
    from clp_kernels import info

    assert info.collect()["measured sizes"] == f"2 of mixed_lora, {choices.fingerprint()}"
    assert (cache_folder() / choices.FILE.name).is_file()


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        ([], {"CLP_KERNELS_TUNE": "2"}, "CLP_KERNELS_TUNE must be 0 or 1, got '2'"),
        ([], {"CLP_KERNELS_TUNE": "0"}, "nothing is measured here"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    argv: list[str], environment: dict[str, str], message: str
) -> None:
    done = python("-m", "clp_kernels.selftest", "--tune", "--device", "cpu", *argv, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cuda"], "--tune measures on the CPU, got --device cuda"),
        (
            ["--device", "cpu", "--op", "sample"],
            "--tune measures mixed_lora, and takes no --op and no --backend",
        ),
    ],
)
def test_arguments_without_a_use_are_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if argv == ["--device", "cuda"] and not torch.cuda.is_available():
        message = "--device cuda: PyTorch sees 0 GPUs"
    with pytest.raises(SystemExit) as ended:
        command.main(["--tune", *argv])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert message in said.err


def test_a_sampler_has_its_models_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import clp

    asked: list[Any] = []
    monkeypatch.setattr(tuning, "ensure", asked.extend)
    policy = clp.Policy.create("tiny", ["joy", "brief"])
    clp.Sampler(policy)
    assert asked == [m for m in policy.model.modules() if isinstance(m, MixedLoRALinear)] != []


def test_runs_and_rows_are_marked_with_what_was_measured(tmp_path: Path) -> None:
    from tiny_runs import ROWS, config

    import clp
    from bench.report import rows

    def marks(name: str) -> list[Any]:
        run = tmp_path / name
        clp.CLPTrainer(args=config(run, rewards=["brevity"]), train_dataset=ROWS).lock.release()
        return [json.loads((run / "run.json").read_text())["tuning"],
                rows.provenance(torch.device("cpu"))["tuning"]]  # fmt: skip

    assert marks("a") == [None, ""]
    choices.keep("mixed_lora", str(size()), [1, 1, 2])
    assert marks("b") == [choices.fingerprint()] * 2
