"""Which backend runs a call: the table, explicit choices, the environment, untested kernels."""

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clp_kernels import mix_logits, mixed_lora, native, registry, sample, trust
from clp_kernels.ops.linear_logprob.head import Inputs
from clp_kernels.ops.mixed_linear import reference as linear_reference
from clp_kernels.ops.mixed_lora import reference as lora_reference
from clp_kernels.ops.sample import cpu as cpu_sample
from clp_kernels.ops.sample import reference as sample_reference
from clp_kernels.registry import Backend, select

X, W = torch.randn(3, 4), torch.randn(5, 4)
A, B, ROWS = torch.randn(2, 1, 4), torch.randn(2, 5, 1), torch.rand(3, 2)
LORA = (lora_reference.Inputs(X, W, A, B, ROWS, None, None, False),)


def sample_arguments(
    m: int = 1, dtype: Any = None, mode: str = "geometric", device: str = "cpu", **filters: Tensor
) -> tuple[Any, ...]:
    logits = torch.randn(m, 3, 7).to(device, dtype)
    weights = ROWS[:, :m] if m > 1 else None
    each = (filters.get(name) for name in ("top_k", "top_p", "min_p"))
    numbers = torch.zeros(3, dtype=torch.int64)
    inputs = logits, weights, mode, torch.ones(3), *each, numbers, numbers
    return (sample_reference.Inputs(*inputs),)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if both compiled modules were here."""
    monkeypatch.setattr(native, "cpu_missing", lambda: None)
    monkeypatch.setattr(native, "cuda_missing", lambda *_: None)


K3 = torch.full((3,), 2)
HALF = torch.full((3,), 0.5)

# (arguments, the backend of "auto", what "cpu" says)
SAMPLE_TABLE: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "plain": ({}, "cpu", None),
    "bf16": ({"dtype": torch.bfloat16}, "cpu", None),
    "fp16": ({"dtype": torch.float16}, "cpu", None),
    "mixed": ({"m": 2}, "cpu", None),
    "probability": ({"m": 2, "mode": "probability"}, "cpu", None),
    "float64": ({"dtype": torch.float64}, "reference", "not torch.float64"),
    "meta": ({"device": "meta"}, "reference", "the logits are on meta"),
}


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("case", SAMPLE_TABLE)
def test_sample_table(case: str) -> None:
    changed, wanted, reason = SAMPLE_TABLE[case]
    arguments = sample_arguments(**changed)
    assert select("sample", "auto", *arguments).name == wanted
    if reason is None:
        assert select("sample", "cpu", *arguments).name == "cpu"
    else:
        with pytest.raises(RuntimeError, match=f"'cpu' cannot run sample: .*{reason}"):
            select("sample", "cpu", *arguments)
    with pytest.raises(RuntimeError, match="'cuda' cannot run sample: the logits are on"):
        select("sample", "cuda", *arguments)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("name, value", [("top_k", K3), ("top_p", HALF), ("min_p", HALF)])
def test_a_filter_is_run(name: str, value: Tensor) -> None:
    assert select("sample", "auto", *sample_arguments(**{name: value})).name == "cpu"


@pytest.fixture
def fast_path_anew() -> Iterator[None]:
    """It is decided once per process; here once more."""
    cpu_sample.fast_path.cache_clear()
    yield
    cpu_sample.fast_path.cache_clear()


@pytest.mark.usefixtures("fast_path_anew")
def test_sample_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_missing", lambda: "it has not been built")
    assert select("sample", "auto", *sample_arguments()).name == "reference"
    with pytest.raises(RuntimeError, match="'cpu' cannot run sample: it has not been built"):
        sample(torch.randn(3, 7), seed=0, position=0, backend="cpu")
    assert sample(torch.randn(3, 7), seed=0, position=0).tokens.shape == (3,)


@pytest.mark.parametrize("op", sorted(registry.BACKENDS))
def test_every_op_ends_in_the_reference(op: str) -> None:
    """`auto` always finds a backend: the reference is last and takes everything."""
    *others, last = registry.BACKENDS[op]
    assert last.name == "reference"
    assert last.why_not() is None
    module = importlib.import_module(f"clp_kernels.ops.{op.removesuffix('_backward')}.reference")
    assert last.run is getattr(module, op)
    assert all(e.name in registry.NAMES and e.name not in ("auto", "reference") for e in others)
    assert len({e.name for e in registry.BACKENDS[op]}) == len(registry.BACKENDS[op])


@pytest.mark.parametrize("op", sorted(registry.BACKENDS))
def test_every_op_and_its_backward_know_every_name(op: str) -> None:
    """So that a named backend has its gradients, and serves a whole model."""
    table = {entry.name: entry for entry in registry.BACKENDS[op]}
    assert set(table) == set(registry.NAMES) - {"auto"}
    for entry in table.values():
        if entry.kernels_of:
            own = table[entry.kernels_of]
            assert (entry.run, entry.why_not) == (own.run, own.why_not) and not own.kernels_of
    assert not table["triton"].kernels_of


def test_auto_passes_over_names_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    named = Backend("cuda", lambda *_: None, kernels_of="triton")
    rest = registry.BACKENDS["mixed_lora"][-1:]
    monkeypatch.setitem(registry.BACKENDS, "mixed_lora", (named, *rest))
    assert select("mixed_lora", "auto", *LORA).name == "reference"
    assert select("mixed_lora", "cuda", *LORA) is named


def test_auto_passes_over_what_is_too_slow_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Backend("cpu", lambda *_: None, too_slow=lambda *_: "many tokens")
    last = registry.BACKENDS["mixed_lora"][-1]
    monkeypatch.setitem(registry.BACKENDS, "mixed_lora", (slow, last))
    assert select("mixed_lora", "auto", *LORA).name == "reference"
    assert select("mixed_lora", "cpu", *LORA) is slow
    monkeypatch.setitem(registry.BACKENDS, "mixed_lora", (slow,))
    with pytest.raises(RuntimeError, match="no backend can run mixed_lora: cpu: many tokens"):
        select("mixed_lora", "auto", *LORA)


def test_every_op_of_the_library_has_a_row() -> None:
    schemas = torch._C._jit_get_all_schemas()
    ops = {s.name.split("::")[1] for s in schemas if s.name.startswith("clp_kernels::")}
    assert ops == set(registry.BACKENDS)


@pytest.mark.parametrize("op", sorted(registry.BACKENDS))
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
def test_a_named_backend_never_falls_back(op: str, backend: str) -> None:
    """It is the backend named, or an error that names it and the op."""
    targets = torch.zeros(3, dtype=torch.int64)
    head = Inputs(X, W, targets, None, None, None, torch.ones(3), None, False)
    others = {
        "sample": sample_arguments(),
        "mix_logits": (X,),
        "mix_logits_backward": (X,),
        "mixed_linear": (linear_reference.Inputs(X, W[None], ROWS, None, None, False),),
        "linear_logprob": (head, False, False),
        "linear_logprob_backward": (head, (torch.ones(3),) * 3, [True] * 4),
    }
    arguments = others.get(op, LORA)
    try:
        chosen = select(op, backend, *arguments)
    except RuntimeError as error:
        known = {entry.name for entry in registry.BACKENDS[op]}
        pattern = f"cannot run {op}: ." if backend in known else f"{op} has no '{backend}' backend"
        assert re.search(pattern, str(error))
        assert backend != "reference"
    else:
        assert chosen.name == backend


@pytest.mark.parametrize("name", ["numpy", "", "CPU", "reference "])
def test_unknown_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu"):
        select("mixed_lora", name, *LORA)
    if name == "":
        return  # in the environment it is no name: see the next test
    monkeypatch.setenv("CLP_KERNELS_BACKEND", name)
    with pytest.raises(ValueError, match="CLP_KERNELS_BACKEND must be one of auto, reference"):
        mixed_lora(X, W, A, B, ROWS)


def test_an_empty_environment_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sample(torch.zeros(3, 7), seed=0, position=0)
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "")
    assert registry.requested("auto") == "auto"
    assert torch.equal(sample(torch.zeros(3, 7), seed=0, position=0).tokens, wanted.tokens)
    if (fast_path := registry.BACKENDS["sample"][0].fast_path()) is not None:
        options = (None, "geometric", 1.0, 0, 1.0, 0.0, 0, 0, "auto")
        assert fast_path(torch.zeros(3, 7), *options) is not None


@pytest.mark.usefixtures("built")
def test_environment_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "reference")
    assert select("sample", "auto", *sample_arguments()).name == "reference"
    assert select("sample", "cpu", *sample_arguments()).name == "cpu"
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "cpu")
    assert select("sample", "reference", *sample_arguments()).name == "reference"
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "auto")
    assert select("sample", "auto", *sample_arguments()).name == "cpu"


def test_environment_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("mix_logits", "mixed_lora"):
        monkeypatch.setitem(registry.BACKENDS, op, registry.BACKENDS[op][-1:])
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="mix_logits has no 'triton' backend; it has: reference"):
        mix_logits(torch.randn(2, 3, 4), ROWS)
    with pytest.raises(RuntimeError, match="mixed_lora has no 'triton' backend"):
        mixed_lora(X, W, A, B, ROWS)
    assert mixed_lora(X, W, A, B, ROWS, backend="reference").shape == (3, 5)


# Kernels that the self-test has not tested, or found wrong.

GPU = torch.device("cuda:0")


@pytest.fixture
def gpu_kernel(kernels_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a kernel that could run everything before the reference of mixed_lora, on a "GPU"."""
    monkeypatch.setattr(registry, "device_of", lambda _: GPU)
    monkeypatch.setattr(trust, "machine", lambda device, backend: f"{device} {backend}")

    def install(name: str, with_reference: bool = True) -> None:
        def run(*_: Any) -> tuple[Tensor, Tensor]:
            return torch.full((3, 5), 7.0), torch.empty(0)

        entry = Backend(name, run, lambda *_: None)
        rest = registry.BACKENDS["mixed_lora"][-1:] if with_reference else ()
        monkeypatch.setitem(registry.BACKENDS, "mixed_lora", (entry, *rest))

    return install


@pytest.mark.filterwarnings("ignore:kernels of clp_kernels have not been tested")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_auto_excludes_untested_kernels(name: str, gpu_kernel: Callable[..., None]) -> None:
    gpu_kernel(name)
    assert select("mixed_lora", "auto", *LORA).name == "reference"
    assert (mixed_lora(X, W, A, B, ROWS) != 7).all()
    # Named, it runs.
    assert select("mixed_lora", name, *LORA).name == name
    assert (mixed_lora(X, W, A, B, ROWS, backend=name) == 7).all()
    # A result of another op, backend or GPU says nothing, and a failure excludes it too.
    passed = trust.Result(None, 9, 1.0)
    trust.keep("mixed_linear", name, GPU, passed)
    trust.keep("mixed_lora", "cpu", GPU, passed)
    trust.keep("mixed_lora", name, torch.device("cuda:1"), passed)
    assert select("mixed_lora", "auto", *LORA).name == "reference"
    trust.keep("mixed_lora", name, GPU, trust.Result("T9: y is wrong", 3, 1.0))
    assert select("mixed_lora", "auto", *LORA).name == "reference"
    trust.keep("mixed_lora", name, GPU, passed)
    assert select("mixed_lora", "auto", *LORA).name == name
    assert (mixed_lora(X, W, A, B, ROWS) == 7).all()


def test_environment_names_an_untested_kernel(
    gpu_kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_kernel("triton")
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "triton")
    assert select("mixed_lora", "auto", *LORA).name == "triton"


@pytest.mark.filterwarnings("ignore:kernels of clp_kernels have not been tested")
def test_no_backend_left_gives_every_reason(gpu_kernel: Callable[..., None]) -> None:
    gpu_kernel("cuda", with_reference=False)
    wanted = "no backend can run mixed_lora: cuda: not tested on cuda:0 yet; run python -m"
    with pytest.raises(RuntimeError, match=wanted):
        select("mixed_lora", "auto", *LORA)
    trust.keep("mixed_lora", "cuda", GPU, trust.Result("T9: y is wrong", 3, 1.0))
    with pytest.raises(RuntimeError, match="cuda: failed its self-test: T9: y is wrong"):
        select("mixed_lora", "auto", *LORA)


def test_untested_kernels_warn_once_with_the_command(gpu_kernel: Callable[..., None]) -> None:
    gpu_kernel("cuda")
    with pytest.warns(RuntimeWarning, match="python -m clp_kernels.selftest --device cuda:0"):
        mixed_lora(X, W, A, B, ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed_lora(X, W, A, B, ROWS)
        select("mixed_lora_backward", "auto", *LORA)


def test_first_backend_that_can_run_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def entry(name: str, reason: str | None) -> Backend:
        def why_not(*args: Any) -> str | None:
            asked.append((name, len(args)))
            return reason

        return Backend(name, lambda *_: None, why_not)

    table = (entry("cuda", "no GPU"), entry("cpu", None), entry("reference", None))
    monkeypatch.setitem(registry.BACKENDS, "mixed_lora", table)
    assert select("mixed_lora", "auto", *LORA).name == "cpu"
    assert asked == [("cuda", len(LORA)), ("cpu", len(LORA))]
    with pytest.raises(RuntimeError, match=r"^backend 'cuda' cannot run mixed_lora: no GPU"):
        select("mixed_lora", "cuda", *LORA)
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"^CLP_KERNELS_BACKEND: backend 'cuda' cannot run"):
        select("mixed_lora", "auto", *LORA)


def test_backward_keeps_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for op in ("mixed_lora", "mixed_lora_backward"):
        run = registry.BACKENDS[op][-1].run

        def spy(*args: Any, op: str = op, run: Callable[..., Any] = run) -> Any:
            used.append(op)
            return run(*args)

        entries = (Backend("cpu", spy, lambda *_: None), registry.BACKENDS[op][-1])
        monkeypatch.setitem(registry.BACKENDS, op, entries)
    rows = ROWS.clone().requires_grad_()
    mixed_lora(X, W, A, B, rows, backend="cpu").sum().backward()
    assert used == ["mixed_lora", "mixed_lora_backward"]
    assert rows.grad is not None
