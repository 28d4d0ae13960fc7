"""The cases of the self-test: that they pass here, and that a wrong kernel fails them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from cases import CPU_KERNELS, interpreted
from torch import Tensor

from clp_kernels import registry
from clp_kernels.ops.slot_attention import cpu as slot_attention
from clp_kernels.selftest import cases, proof
from clp_kernels.testing import FLOOR

CPU = torch.device("cpu")
OPS = [op for op in registry.BACKENDS if not op.endswith("_backward")]


def first_failure(op: str, backend: str = "cpu", of: list[Any] | None = None) -> str | None:
    for case in cases.cases(op, CPU) if of is None else of:
        try:
            proof.prove(op, backend, CPU, case)
        except AssertionError as error:
            return str(error)
    return None


def test_every_op_and_its_backends_with_kernels_are_tested() -> None:
    assert set(cases.CASES) == {*OPS, "slot_attention"}
    for op in OPS:
        tested = cases.backends(op)
        assert tested == [e.name for e in registry.BACKENDS[op][:-1] if not e.kernels_of]
    for op in cases.CASES:
        for device in (CPU, torch.device("cuda")):
            names = [case.name for case in cases.cases(op, device)]
            assert len(set(names)) == len(names) >= 9


@CPU_KERNELS
@pytest.mark.parametrize("op", cases.CASES)
def test_the_cpu_kernels_pass(op: str, set_threads: Callable[[int], None]) -> None:
    """On two threads; most other tests run on one."""
    set_threads(2)
    assert first_failure(op) is None


def test_a_backend_that_cannot_run_a_case_is_not_asked_to() -> None:
    assert not proof.prove("sample", "cuda", CPU, cases.cases("sample", CPU)[0])


def _changed(output: int, change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """Makes the functions of a backend whose output of this number is changed."""

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*args: Any) -> Any:
            found = run(*args)
            outputs = list(found) if isinstance(found, tuple) else [found]
            if outputs[output].numel():
                outputs[output] = change(outputs[output])
            return tuple(outputs) if isinstance(found, tuple) else outputs[0]

        return wrong

    return wrap


def _last_is_off(t: Tensor) -> Tensor:
    """By a hundredth of the largest entry, and at least a hundred times the floor."""
    assert FLOOR[t.dtype] <= 1e-3
    out = t.clone()
    out.view(-1)[-1] += 0.1 * (1 + t.abs().max())
    return out


def _random_bits(t: Tensor) -> Tensor:
    return t + t.new_tensor(torch.rand(()).item()) * 2.0**-6 * t


def _next_token(t: Tensor) -> Tensor:
    return (t + 1) % 2


WRONG = [
    ("mixed_lora", "mixed_lora", 0, _last_is_off, "output 0 is out of its error budget"),
    ("mixed_lora", "mixed_lora_backward", 0, _last_is_off, "gradient of x is out of its"),
    ("mixed_lora", "mixed_lora_backward", 4, _last_is_off, "gradient of weights is out of its"),
    ("mixed_lora", "mixed_lora", 0, _random_bits, "output 0: two runs give other bits"),
    ("mixed_linear", "mixed_linear", 0, _last_is_off, "output 0 is out of its error budget"),
    ("mixed_linear", "mixed_linear_backward", 1, _last_is_off, "gradient of expert_weight is out"),
    ("mix_logits", "mix_logits", 0, _last_is_off, "output 0 is out of its error budget"),
    ("mix_logits", "mix_logits_backward", 1, _last_is_off, "gradient of weights is out of its"),
    ("linear_logprob", "linear_logprob", 0, _last_is_off, "output 0 is out of its error budget"),
    ("linear_logprob", "linear_logprob", 3, _last_is_off, "gradient of hidden is out of its"),
    ("linear_logprob", "linear_logprob_backward", 1, _last_is_off, "gradient of head_weight is"),
    ("sample", "sample", 0, _next_token, "the reference's"),
    ("sample", "sample", 1, _last_is_off, "logprobs is off by"),
    ("sample", "sample", 2, _last_is_off, "filtered_logprobs is off by"),
]


@CPU_KERNELS
@pytest.mark.parametrize(
    ("op", "table", "output", "change", "message"),
    WRONG,
    ids=[f"{w[1]}-{w[2]}-{w[3].__name__}" for w in WRONG],
)
def test_a_wrong_kernel_fails(
    op: str,
    table: str,
    output: int,
    change: Callable[[Tensor], Tensor],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *rest = registry.BACKENDS[table]
    assert first.name == "cpu"
    wrong = replace(first, run=_changed(output, change)(first.run), fast_path=lambda: None)
    monkeypatch.setitem(registry.BACKENDS, table, (wrong, *rest))
    failure = first_failure(op)
    assert failure is not None and message in failure


def _wrong_if(condition: Callable[[Any], bool]) -> Callable[..., Any]:
    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(inputs: Any, *args: Any) -> Any:
            found = run(inputs, *args)
            if not condition(inputs):
                return found
            return tuple(t + 1 for t in found) if isinstance(found, tuple) else found + 1

        return wrong

    return wrap


def _tokens(inputs: Any) -> int:
    return int(inputs.x.numel() // inputs.x.shape[-1])


CONDITIONS: dict[str, Callable[[Any], bool]] = {
    "a few tokens": lambda i: 2 <= _tokens(i) <= 8,
    "many tokens": lambda i: _tokens(i) > 200,
    "int64 ids": lambda i: i.example_ids is not None and i.example_ids.dtype == torch.int64,
    "no bias": lambda i: i.bias is None,
    "ids without a bias": lambda i: i.example_ids is not None and i.bias is None,
    "gaps": lambda i: not i.x.is_contiguous(),
    "in_features": lambda i: i.x.shape[-1] % 8 != 0,
    "out_features": lambda i: i[1].shape[-2] % 8 != 0,
    "several tokens of an example": lambda i: (
        i.example_ids is None and _tokens(i) > len(i.weights) > 0
    ),
    "batch_invariant": lambda i: i.invariant and _tokens(i) <= 64,
    "batch_invariant with ids": lambda i: i.invariant and i.example_ids is not None,
}


@cache
def calls(op: str) -> dict[str, list[Any]]:
    """The cases with a call of each condition: a kernel that is wrong there is right in others."""
    first, *rest = registry.BACKENDS[op]
    found: dict[str, list[Any]] = {name: [] for name in CONDITIONS}
    seen: set[str] = set()

    def noting(inputs: Any, *args: Any) -> Any:
        seen.update(name for name, condition in CONDITIONS.items() if condition(inputs))
        return first.run(inputs, *args)

    entry = replace(first, run=noting, fast_path=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BACKENDS, op, (entry, *rest))
        patch.setattr(proof, "DRAWS", 1)  # all draws make the same calls
        patch.setattr(proof, "assert_within_budget", lambda *args, **names: None)
        for case in cases.cases(op, CPU):
            seen.clear()
            proof.prove(op, "cpu", CPU, case)
            for name in seen:
                found[name].append(case)
    return found


@CPU_KERNELS
@pytest.mark.parametrize("op", ["mixed_lora", "mixed_linear"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_kernel_that_is_wrong_in_some_calls_fails(
    op: str, condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *rest = registry.BACKENDS[op]
    where = calls(op)[condition]
    run = _wrong_if(CONDITIONS[condition])(first.run)
    wrong = replace(first, run=run, fast_path=lambda: None)
    monkeypatch.setitem(registry.BACKENDS, op, (wrong, *rest))
    assert first_failure(op, of=where) is not None


def _depends_on_the_batch(inputs: Any, y: Tensor) -> Tensor:
    return y * (1 + 1e-7 * (_tokens(inputs) % 3)) if inputs.invariant else y


def _shows_an_adapter_of_weight_zero(inputs: Any, y: Tensor) -> Tensor:
    return y + 0 * inputs.lora_A.sum().to(y.dtype)


@CPU_KERNELS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_depends_on_the_batch, "rows alone have other bits"),
        (_shows_an_adapter_of_weight_zero, "an adapter of weight zero shows"),
    ],
)
def test_rows_that_are_wrong_to_the_bit_fail(
    change: Callable[[Any, Tensor], Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(inputs: Any) -> Any:
        y, u = first.run(inputs)
        return change(inputs, y), u

    first, *rest = registry.BACKENDS["mixed_lora"]
    wrong = replace(first, run=run, fast_path=lambda: None)
    monkeypatch.setitem(registry.BACKENDS, "mixed_lora", (wrong, *rest))
    failure = first_failure("mixed_lora")
    assert failure is not None and message in failure


@CPU_KERNELS
@pytest.mark.parametrize("op", ["mixed_lora", "sample"])
def test_a_wrong_fast_path_fails(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what calls without gradients take."""
    first, *rest = registry.BACKENDS[op]
    taken = first.fast_path()
    assert taken is not None

    def wrong(*args: Any) -> Any:
        found = taken(*args)
        if found is None:
            return None
        return (found[0] * 0, *found[1:]) if isinstance(found, tuple) else found + 1

    entry = replace(first, fast_path=lambda: wrong)
    monkeypatch.setitem(registry.BACKENDS, op, (entry, *rest))
    assert first_failure(op) is not None


@CPU_KERNELS
def test_a_wrong_attention_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap = _changed(0, _last_is_off)
    monkeypatch.setattr(slot_attention, "slot_attention", wrap(slot_attention.slot_attention))
    failure = first_failure("slot_attention")
    assert failure is not None and "output 0 is out of its error budget" in failure


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("op", OPS)
def test_triton_in_its_interpreter_goes_the_same_way(op: str) -> None:
    """One case of each op: the interpreter takes seconds for it."""
    interpreted(op)
    case = next(case for case in cases.cases(op, CPU) if case.name.startswith("f32"))
    assert proof.prove(op, "triton", CPU, case)
