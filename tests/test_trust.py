"""Which kernels "auto" may take: the results of the self-test, and CLP_KERNELS_TRUST."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import python

from clp_kernels import files, native, trust
from clp_kernels.trust import Result

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
PASSED, WRONG = Result(None, 9, 1.5), Result("T9: y is out of its budget", 3, 0.5)
NEEDS_CPU = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(trust, "driver", lambda: "570.86.10")


@pytest.fixture
def read_again() -> Iterator[None]:
    """CLP_KERNELS_TRUST is read once per process; here at every test."""
    trust.trust.cache_clear()
    yield
    trust.trust.cache_clear()


def from_the_file(op: str, backend: str, device: torch.device) -> Result | None:
    """As another process finds it."""
    trust.of_this_process.clear()
    return trust.find(op, backend, device)


@pytest.mark.usefixtures("no_gpu_needed")
def test_results_are_found_by_op_backend_and_machine(kernels_cache: Path) -> None:
    trust.keep("sample", "cuda", GPU, PASSED)
    trust.keep("sample", "triton", GPU, WRONG)
    trust.keep("mixed_lora", "cuda", GPU, WRONG)
    assert from_the_file("sample", "cuda", GPU) == PASSED
    assert from_the_file("sample", "triton", GPU) == WRONG
    assert from_the_file("mixed_lora", "cuda", GPU) == WRONG
    assert from_the_file("mixed_lora", "triton", GPU) is None
    assert from_the_file("sample", "triton", CPU) is None
    trust.keep("sample", "triton", GPU, PASSED)
    assert from_the_file("sample", "triton", GPU) == PASSED
    assert [path.name for path in sorted(kernels_cache.iterdir())] == [
        "selftest.json", "selftest.lock",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_gpu_needed")
def test_another_gpu_driver_library_or_kernel_has_no_results(
    kernels_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust.keep("sample", "triton", GPU, PASSED)
    for owner, name, value in (
        (torch.cuda, "get_device_name", lambda _: "NVIDIA B200"),
        (torch.cuda, "get_device_capability", lambda _: (10, 0)),
        (trust, "driver", lambda: "570.86.11"),
        (trust, "version", lambda name: "9.9"),
        (trust, "__file__", str(tmp_path / "trust.py")),  # no sources lie there
    ):
        with monkeypatch.context() as other:
            other.setattr(owner, name, value)
            assert from_the_file("sample", "triton", GPU) is None, name
    assert from_the_file("sample", "triton", GPU) == PASSED


@NEEDS_CPU
def test_another_build_of_the_cpu_kernels_has_no_results(
    kernels_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust.keep("sample", "cpu", CPU, PASSED)
    module = native.cpu()
    with monkeypatch.context() as other:
        other.setattr(native, "isa", lambda: "scalar, or another")
        assert from_the_file("sample", "cpu", CPU) is None
    (tmp_path / "_cpu.so").write_bytes(b"another")
    with monkeypatch.context() as other:
        other.setattr(module, "__file__", str(tmp_path / "_cpu.so"))
        assert from_the_file("sample", "cpu", CPU) is None
    assert from_the_file("sample", "cpu", CPU) == PASSED


DAMAGED = {
    "empty": "",
    "truncated": '{"format": 1, "results": {"a',
    "binary": "\udcff",
    "a list": "[]",
    "deep": "[" * 100_000,
    "another layout": '{"format": 2, "results": {}}',
    "no results": '{"format": 1}',
    "an op that is a list": '{"format": 1, "results": {"a": []}}',
    "a result that is a text": '{"format": 1, "results": {"a": {"sample": {"cuda": "passed"}}}}',
    "huge seconds": '{"format": 1, "results": {"a": {"b": {"c": '
    '{"reason": null, "cases": 1, "seconds": 1' + 400 * "0" + "}}}}}",
    "a layout that is true": '{"format": true, "results": {}}',
    "no cases": '{"format": 1, "results": {"a": {"sample": {"cuda": {"reason": null}}}}}',
}


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning_and_made_anew(
    kind: str, kernels_cache: Path
) -> None:
    kernels_cache.mkdir()
    path = kernels_cache / "selftest.json"
    path.write_bytes(DAMAGED[kind].encode(errors="surrogateescape"))
    with pytest.warns(RuntimeWarning, match=r"selftest\.json is ignored") as caught:
        assert trust.find("sample", "cuda", GPU) is None
        assert trust.find("sample", "triton", GPU) is None
        trust.keep("sample", "cuda", GPU, PASSED)
    assert len(caught) == 1
    assert from_the_file("sample", "cuda", GPU) == PASSED
    assert json.loads(path.read_text())["format"] == 1


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_folder_that_cannot_be_written_to_leaves_results_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLP_KERNELS_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(RuntimeWarning, match="kept in this process alone") as caught:
        trust.keep("sample", "cuda", GPU, PASSED)
        trust.keep("sample", "triton", GPU, PASSED)
    assert len(caught) == 1
    assert trust.find("sample", "cuda", GPU) == trust.find("sample", "triton", GPU) == PASSED
    assert from_the_file("sample", "cuda", GPU) is None


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_result_that_is_not_for_the_disk_stays_in_this_process(kernels_cache: Path) -> None:
    trust.keep("sample", "cuda", GPU, WRONG, on_disk=False)
    assert trust.find("sample", "cuda", GPU) == WRONG
    assert from_the_file("sample", "cuda", GPU) is None


@pytest.mark.usefixtures("no_gpu_needed")
def test_the_interpreter_is_another_machine(
    kernels_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    trust.keep("sample", "triton", GPU, PASSED)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert from_the_file("sample", "triton", GPU) is None


def test_without_a_home_folder_ops_run_and_results_stay_in_this_process() -> None:
    """As a user id without an entry, in a container."""
    code = (
        "import pwd\n"
        "def no(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = no\n"
        "import torch; from clp_kernels import sample, trust, info\n"
        "from clp_kernels.trust import Result\n"
        "print(sample(torch.zeros(1, 3), seed=0, position=0).tokens.shape)\n"
        "info.collect()\n"
        "trust.keep('sample', 'cpu', torch.device('cpu'), Result(None, 1, 1.0))\n"
    )
    done = python("-c", code, HOME=None, CLP_KERNELS_CACHE=None, XDG_CACHE_HOME=None)
    assert (done.returncode, done.stdout) == (0, "torch.Size([1])\n"), done.stderr
    assert done.stderr.count("RuntimeWarning: ") == 1


def test_processes_that_write_at_once_end_with_one_whole_file(tmp_path: Path) -> None:
    code = (
        "import os, torch; from clp_kernels import trust; from clp_kernels.trust import Result\n"
        "cpu = torch.device('cpu')\n"
        "for child in range(3):\n"
        "    if os.fork() == 0:\n"
        "        for i in range(10):\n"
        "            trust.keep(f'op {child} {i}', 'triton', cpu, Result(None, i, 0))\n"
        "        os._exit(0)\n"
        "print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)))\n"
    )
    done = python("-c", code, CLP_KERNELS_CACHE=str(tmp_path))
    assert (done.stdout, done.stderr) == ("0 0 0\n", "")
    [ops] = json.loads((tmp_path / "selftest.json").read_text())["results"].values()
    assert set(ops) == {f"op {i} {j}" for i in range(3) for j in range(10)}


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CLP_KERNELS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.cache_folder() == tmp_path / ".cache" / "clp_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "clp_kernels"
    monkeypatch.setenv("CLP_KERNELS_CACHE", "~/mine")
    assert files.cache_folder() == tmp_path / "mine"


@pytest.mark.usefixtures("no_gpu_needed", "kernels_cache", "read_again")
@pytest.mark.filterwarnings("ignore:kernels of clp_kernels have not been tested")
@pytest.mark.parametrize("value", ["selftest", "all", "none", ""])
def test_trust(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLP_KERNELS_TRUST", value)
    trust.keep("passed", "cuda", GPU, PASSED)
    trust.keep("wrong", "cuda", GPU, WRONG)
    trust.keep("wrong", "cpu", CPU, WRONG)
    calls = [("passed", GPU), ("wrong", GPU), ("new", GPU), ("wrong", CPU), ("new", CPU)]
    taken = [(op, d.type) for op, d in calls if trust.distrust(op, d.type, d) is None]
    every, wanted = [(op, d.type) for op, d in calls], [("passed", "cuda"), ("new", "cpu")]
    assert taken == {"all": every, "none": []}.get(value, wanted)
    assert trust.distrust("new", "reference", GPU) is None
    assert trust.distrust("passed_backward", "cuda", GPU) == trust.distrust("passed", "cuda", GPU)


@pytest.mark.usefixtures("read_again")
def test_another_trust_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLP_KERNELS_TRUST", "some")
    with pytest.raises(ValueError, match="CLP_KERNELS_TRUST must be one of selftest, all, none"):
        trust.distrust("sample", "cpu", CPU)


@NEEDS_CPU
def test_none_computes_the_same_by_plain_pytorch() -> None:
    """Also on the fast paths, and in the attention of a sampler."""
    code = (
        "import torch, clp; from clp.engine import attention; from clp_kernels import native\n"
        "from clp_kernels import mixed_lora, sample\n"
        "calls = []\n"
        "run = attention.cpu_slot_attention.slot_attention\n"
        "attention.cpu_slot_attention.slot_attention = lambda *a: (calls.append(1), run(*a))[1]\n"
        "torch.manual_seed(0)\n"
        "sizes = (3, 8), (9, 8), (2, 4, 8), (2, 9, 4), (3, 2)\n"
        "y = mixed_lora(*(torch.rand(*s) for s in sizes))\n"
        "drawn = sample(torch.rand(4, 50), seed=3, position=1).tokens\n"
        "policy = clp.Policy.create('tiny', ['joy', 'brief'])\n"
        "done = clp.Sampler(policy).generate(['Once'], {'joy': 1, 'brief': 0},\n"
        "    clp.SamplingParams(max_tokens=8, temperature=0))\n"
        "print(round(y.double().sum().item(), 3), drawn.tolist(), done[0].token_ids)\n"
        "print(len(calls) > 0)\n"
    )
    plain, native_too = (python("-c", code, CLP_KERNELS_TRUST=value) for value in ("none", "all"))
    assert plain.returncode == native_too.returncode == 0, plain.stderr + native_too.stderr
    first, second = plain.stdout.splitlines(), native_too.stdout.splitlines()
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("False", "True")


@NEEDS_CPU
def test_a_cpu_kernel_that_has_failed_is_not_taken(tmp_path: Path) -> None:
    code = (
        "import torch; from clp_kernels import mixed_lora, registry, trust\n"
        "from clp_kernels.trust import Result\n"
        "trust.keep('mixed_lora', 'cpu', torch.device('cpu'), Result('it is wrong', 0, 0))\n"
        "args = [torch.rand(*s) for s in ((3, 8), (9, 8), (2, 4, 8), (2, 9, 4), (3, 2))]\n"
        "fast_path = registry.BACKENDS['mixed_lora'][0].fast_path()\n"
        "chosen, _ = registry.chosen('mixed_lora', (*args, None, None, False, 'auto'))\n"
        "print(fast_path, chosen.name)\n"
    )
    done = python("-c", code, CLP_KERNELS_CACHE=str(tmp_path))
    assert (done.stdout, done.stderr) == ("None reference\n", "")


def test_no_warning_on_the_cpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trust.distrust("sample", "cpu", CPU) is None
