"""The cases of the self-test: that they pass here, and that a wrong kernel fails them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CPU_KERNELS, interpreted
from torch import Tensor

from clp_kernels import registry
from clp_kernels.ops.slot_attention import cpu as slot_attention
from clp_kernels.selftest import cases
from clp_kernels.testing import FLOOR

CPU = torch.device("cpu")
OPS = [op for op in registry.BACKENDS if not op.endswith("_backward")]


def first_failure(op: str, backend: str = "cpu") -> str | None:
    for case in cases.cases(op, CPU):
        try:
            cases.prove(op, backend, CPU, case)
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
def test_the_cpu_kernels_pass(op: str) -> None:
    assert first_failure(op) is None


def test_a_backend_that_cannot_run_a_case_is_not_asked_to() -> None:
    assert not cases.prove("sample", "cuda", CPU, cases.cases("sample", CPU)[0])


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
    assert cases.prove(op, "triton", CPU, case)
