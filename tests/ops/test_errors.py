"""Every bad argument raises the documented type, and the message names it and what came."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import INF, NAN
from torch import Tensor

from clp_kernels import linear_logprob, mix_logits, mixed_linear, mixed_lora, sample

T3 = torch.tensor
OPS = ("mixed_lora", "mixed_linear", "mix_logits", "sample", "linear_logprob")


def valid(op: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    x, weights = torch.randn(3, 4), torch.rand(3, 2)
    base, A, B = torch.randn(5, 4), torch.randn(2, 1, 4), torch.randn(2, 5, 1)
    lora = {"x": x, "base_weight": base, "lora_A": A, "lora_B": B}
    numbers, states = {"seed": 1, "position": 0}, {"hidden": x, "targets": T3([0, -100, 5])}
    head = {"head_weight": torch.randn(6, 4), "bias": torch.randn(6)}
    head["ref_hidden"] = torch.randn(3, 4)
    linear = {"x": x, "expert_weight": torch.randn(2, 5, 4), "bias": torch.randn(2, 5)}
    mixture = {"logits": torch.randn(2, 3, 6), "weights": weights}
    heads = {"head_weight": torch.randn(2, 6, 4), "weights": weights}
    return {
        "mixed_lora": (mixed_lora, {**lora, "weights": weights, "bias": torch.randn(5)}),
        "mixed_linear": (mixed_linear, {**linear, "weights": weights}),
        "mix_logits": (mix_logits, mixture),
        "sample": (sample, {"logits": torch.randn(3, 6), **numbers}),
        "sample_mixed": (sample, {**mixture, **numbers}),
        "linear_logprob": (linear_logprob, {**states, **head}),
        "linear_logprob_mixed": (linear_logprob, {**states, **heads}),
    }[op]


def tampered(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t.view(-1)[-1] = value
    return t


# What can be wrong with any tensor argument: (exception, how to make it of a right one).
WRONG: dict[str, tuple[type[Exception], Callable[[Tensor], Any]]] = {
    "a list": (TypeError, lambda t: t.tolist()),
    "integers": (TypeError, lambda t: t.to(torch.int16)),
    "complex": (TypeError, lambda t: t.to(torch.complex64)),
    "one axis more": (ValueError, lambda t: t[None]),
    "one axis less": (ValueError, lambda t: t[0]),
    "longer last axis": (ValueError, lambda t: torch.cat([t, t[..., :1]], -1)),
    "longer first axis": (ValueError, lambda t: torch.cat([t, t[:1]])),
    "another device": (ValueError, lambda t: t.to("meta")),
}
TENSORS = {
    "mixed_lora": ("base_weight", "lora_A", "lora_B", "weights", "bias"),
    "mixed_linear": ("expert_weight", "weights", "bias"),
    "mix_logits": ("weights",),
    "sample_mixed": ("weights",),
    "linear_logprob": ("head_weight", "targets", "bias", "ref_hidden"),
    "linear_logprob_mixed": ("weights",),
}
# Free axes: another size there is another valid shape, and some other argument is at fault.
FREE = {"base_weight", "lora_A", "expert_weight", "head_weight"}
OTHER_DTYPE = FREE | {"lora_B", "bias", "ref_hidden"}


def wrong_tensors() -> Iterator[Any]:
    for op, names in TENSORS.items():
        for name in names:
            for how, (error, change) in WRONG.items():
                if how == "longer first axis" and name in FREE:
                    continue
                value = change(valid(op)[1][name])
                yield pytest.param(op, {name: value}, error, name, id=f"{op}: {name}: {how}")
            if name in OTHER_DTYPE:
                half = valid(op)[1][name].half()
                yield pytest.param(op, {name: half}, TypeError, name, id=f"{op}: {name}: half")
            if name == "weights":
                for bad in (NAN, INF, -INF):
                    value = tampered(valid(op)[1][name], bad)
                    yield pytest.param(op, {name: value}, ValueError, name, id=f"{op}: {bad}")


def case(op: str, error: type[Exception], **changed: Any) -> Any:
    name = list(changed)[-1]
    value = changed[name]
    shown = list(value.shape) if isinstance(value, Tensor) else value
    return pytest.param(op, changed, error, name, id=f"{op}: {name}: {shown}")


def per_row_cases(op: str, name: str, outside: tuple, integer: bool = False) -> Iterator[Any]:
    for value in ("x", None, 1j, [1, 1, 1], *([1.5, torch.ones(3)] if integer else [])):
        yield case(op, TypeError, **{name: value})
    dtype = torch.int64 if integer else torch.float32
    yield case(op, ValueError, **{name: torch.ones(2, dtype=dtype)})
    yield case(op, ValueError, **{name: torch.ones(3, 1, dtype=dtype)})
    yield case(op, ValueError, **{name: torch.ones(3, dtype=torch.int64, device="meta")})
    for value in outside:
        yield case(op, ValueError, **{name: value})
        if -(2**63) <= value < 2**63 or not integer:
            yield case(op, ValueError, **{name: tampered(torch.ones(3, dtype=dtype), value)})


# (op, exception, argument, values that raise it).
VALUES: list[tuple[str, type[Exception], str, tuple[Any, ...]]] = [
    ("mixed_lora", ValueError, "x", (torch.randn(4), [[1.0] * 4] * 3)),
    ("mixed_lora", TypeError, "x", (torch.ones(3, 4, dtype=torch.int64),)),
    ("mixed_linear", ValueError, "x", (torch.randn(4),)),
    ("mixed_linear", TypeError, "x", (torch.ones(3, 4, dtype=torch.bool),)),
    ("mixed_lora", ValueError, "scaling", (NAN, INF, T3([1.0, NAN]), torch.ones(3))),
    ("mixed_lora", ValueError, "scaling", (torch.ones(2, device="meta"),)),
    ("mixed_lora", TypeError, "scaling", ("x", None, T3([1, 2]))),
    ("mix_logits", ValueError, "logits", (torch.randn(3, 6), [[1.0]])),
    ("mix_logits", TypeError, "logits", (torch.ones(2, 3, 6, dtype=torch.int64),)),
    ("sample", ValueError, "logits", (torch.randn(6), torch.randn(2, 3, 6), torch.randn(3, 0))),
    ("sample", ValueError, "logits", ([[0.0]], torch.full((3, 6), -INF))),
    ("sample", ValueError, "logits", tuple(tampered(torch.randn(3, 6), bad) for bad in (NAN, INF))),
    ("sample", TypeError, "logits", (torch.ones(3, 6, dtype=torch.int64),)),
    ("sample_mixed", ValueError, "logits", (torch.randn(3, 6),)),
    ("linear_logprob", ValueError, "hidden", (torch.tensor(1.0), [1.0])),
    ("linear_logprob", TypeError, "hidden", (torch.ones(3, 4, dtype=torch.int64),)),
    ("linear_logprob", ValueError, "targets", tuple(T3([0, 1, y]) for y in (6, -1, -99, -101))),
    ("linear_logprob", TypeError, "targets", (T3([0, 1, 2], dtype=torch.int32),)),
    ("linear_logprob", ValueError, "temperature", (0.0, -1, NAN, INF, T3([1.0, 1.0, 0.0]))),
    ("linear_logprob", ValueError, "temperature", (torch.ones(2), torch.ones(3, 3))),
    ("linear_logprob", ValueError, "temperature", (torch.ones(3, device="meta"),)),
    ("linear_logprob", TypeError, "temperature", ("x", None)),
    *((op, ValueError, "backend", ("numpy", "")) for op in OPS),
]
for op in ("mix_logits", "sample_mixed"):
    VALUES.append((op, ValueError, "mode", ("max", None, 1)))
for op in ("mixed_lora", "mixed_linear"):
    other = torch.zeros(3), torch.zeros(3, dtype=torch.int16)
    wrong = T3([0, 1]), T3([[0, 1, 2]]), T3([0, 1, 3]), T3([0, -1, 2])
    meta = torch.zeros(3, dtype=torch.int64, device="meta")
    VALUES.append((op, TypeError, "example_ids", ([0, 1, 2], *other)))
    VALUES.append((op, ValueError, "example_ids", (*wrong, meta)))
BAD = [
    *wrong_tensors(),
    *(case(op, error, **{name: value}) for op, error, name, bad in VALUES for value in bad),
    case("mixed_lora", ValueError, example_ids=T3([0, 1, 2]), x=torch.randn(3, 2, 4)),
    case("linear_logprob_mixed", ValueError, targets=T3(0), hidden=torch.randn(4)),
    *(
        case(op, ValueError, mode="probability", weights=tampered(torch.rand(3, 2), -0.1))
        for op in ("mix_logits", "sample_mixed")
    ),
    *per_row_cases("sample", "temperature", (-0.5, NAN, INF)),
    *per_row_cases("sample", "top_k", (-1,), integer=True),
    *per_row_cases("sample", "top_p", (0.0, -0.1, 1.01, NAN)),
    *per_row_cases("sample", "min_p", (-0.1, 1.01, NAN)),
    *per_row_cases("sample", "seed", (2**63, -(2**63) - 1), integer=True),
    *per_row_cases("sample", "position", (2**63,), integer=True),
]


@pytest.mark.parametrize("op, changed, error, name", BAD)
def test_bad_arguments_are_named(
    op: str, changed: dict[str, Any], error: type[Exception], name: str
) -> None:
    function, arguments = valid(op)
    with pytest.raises(error, match=rf"^{name}\b.*(must|has no).*") as raised:
        function(**{**arguments, **changed})
    assert "got" in str(raised.value) or "logits row" in str(raised.value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_named_backend_that_cannot_run_raises_its_reason(
    op: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    function, arguments = valid(op)
    with pytest.raises(RuntimeError, match=rf"{backend}.*{op}|{op}.*{backend}"):
        function(**arguments, backend=backend)


@pytest.mark.parametrize("op", TENSORS)
def test_valid_arguments_are_valid(op: str) -> None:
    """Or the table of errors would prove nothing."""
    function, arguments = valid(op)
    out = function(**arguments)
    first = out[0] if isinstance(out, tuple) else out
    assert first.isfinite().all()
