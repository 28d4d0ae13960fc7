"""The registered ops: opcheck, fakes that tell the truth, and torch.compile(fullgraph=True)."""

import shutil
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from clp_kernels import linear_logprob, mix_logits, mixed_linear, mixed_lora, sample
from clp_kernels.invariant import batch_invariant
from clp_kernels.testing import expanded, noncontiguous

op = torch.ops.clp_kernels
IDS = torch.tensor([0, 2, 2, 1, 0], dtype=torch.int32)
Cases = Iterator[tuple[str, str, tuple[Any, ...]]]

pytestmark = pytest.mark.usefixtures("one_thread")

# label: (shape of x, dtype, dtype of the adapters, example_ids, with bias, layout of every tensor)
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "padded": ((3, 2, 4), torch.float32, torch.float32, None, True, None),
    "flat": ((5, 4), torch.float32, torch.float32, IDS, False, None),
    "rows bf16": ((3, 4), torch.bfloat16, torch.float32, None, True, None),
    "all bf16": ((3, 2, 4), torch.bfloat16, torch.bfloat16, None, False, None),
    "4-d float64": ((2, 2, 3, 4), torch.float64, torch.float64, None, False, None),
    "no examples": ((0, 2, 4), torch.float32, torch.float32, None, True, None),
    "no tokens": ((3, 0, 4), torch.float16, torch.float16, None, True, None),
    "one token": ((1, 1, 4), torch.float32, torch.float32, None, False, None),
    "gaps": ((3, 2, 4), torch.float32, torch.float32, None, True, noncontiguous),
    "flat gaps": ((5, 4), torch.float32, torch.float32, IDS, True, noncontiguous),
    "4-d gaps": ((2, 2, 3, 4), torch.float32, torch.float32, None, True, noncontiguous),
    "stride 0": ((3, 2, 4), torch.float32, torch.float32, None, True, expanded),
}


def linear_cases() -> Cases:
    """mixed_lora, mixed_linear and their backwards: m = 2, r = 3, 4 to 5 features."""
    for label, (shape, dtype, lora_dtype, ids, with_bias, layout) in LAYOUTS.items():

        def rand(*size: int, dtype: torch.dtype = dtype, layout: Any = layout) -> Tensor:
            t = torch.randn(*size).to(dtype)
            return t if layout is None else layout(t)

        acc = torch.float64 if dtype == torch.float64 else torch.float32
        x, dy = rand(*shape), rand(*shape[:-1], 5)
        w = rand(3 if ids is not None else shape[0], 2, dtype=acc)
        W, A, B = rand(5, 4), rand(2, 3, 4, dtype=lora_dtype), rand(2, 5, 3, dtype=lora_dtype)
        c = rand(5) if with_bias else None
        experts, biases = rand(2, 5, 4), rand(2, 5) if with_bias else None
        u = torch.randn(*shape[:-1], 6, dtype=acc)
        for invariant in (False, True):
            name = f"{label}, invariant" if invariant else label
            yield name, "mixed_lora", (x, W, A, B, w, c, ids, invariant, "auto")
            yield name, "mixed_linear", (x, experts, w, biases, ids, invariant, "auto")
            for some in ([True] * 5, [True, False, True, True, False], [False] * 5):
                needs = [*some, some[0] and with_bias]
                back = (dy, x, W, A, B, w, ids, u, invariant, needs, "auto")
                yield f"{name}, {sum(needs)} gradients", "mixed_lora_backward", back
            for some in ([True] * 3, [False, False, True]):
                needs = [*some, some[0] and with_bias]
                back = (dy, x, experts, w, biases, ids, invariant, needs, "auto")
                yield f"{name}, {sum(needs)} gradients", "mixed_linear_backward", back


def logits_cases() -> Cases:
    """mix_logits, its backward, and sample: m = 2, V = 7."""
    layouts = (
        (3, torch.float32, noncontiguous),
        (3, torch.float32, expanded),
        (0, torch.float32, noncontiguous),
        (1, torch.bfloat16, noncontiguous),
    )
    for mode, (batch, dtype, layout) in product(("geometric", "probability"), layouts):
        label = f"{mode} {dtype} B={batch} {layout.__name__}"
        logits, w = layout(torch.randn(2, batch, 7).to(dtype)), layout(torch.rand(batch, 2))
        yield label, "mix_logits", (logits, w, mode, "auto")
        dz = layout(torch.randn(batch, 7).to(dtype))
        for needs in ([True, True], [True, False], [False, True]):
            back = (dz, logits, w, mode, needs, "auto")
            yield f"{label}, {needs}", "mix_logits_backward", back
        tau, k, p = torch.ones(batch), torch.ones(batch).long(), torch.full((batch,), 0.5)
        numbers = (torch.arange(batch), torch.arange(batch))
        for backend in ("auto", "reference"):
            plain = (logits, w, mode, tau, None, None, None, *numbers, backend)
            yield f"{label}, no filters, {backend}", "sample", plain
        filtered = (logits, w, mode, tau, k, p, p, *numbers, "auto")
        yield f"{label}, filters", "sample", filtered
        alone = (logits[:1], None, mode, tau, None, p, None, *numbers, "auto")
        yield f"{label}, no weights", "sample", alone


def logprob_cases() -> Cases:
    """linear_logprob and its backward: d = 4, V = 6."""
    sizes = ((4, torch.float32), (0, torch.float32), (2, torch.bfloat16))
    extras = ((False, False), (True, False), (True, True))
    for mixed, (n, dtype), (extra, invariant) in product((False, True), sizes, extras):
        hidden, ref = noncontiguous(torch.randn(2, n, 4).to(dtype))
        head = torch.randn(*((2, 6, 4) if mixed else (6, 4))).to(dtype)
        c = torch.randn(head.shape[:-1]).to(dtype) if extra else None
        w, ids = (torch.rand(2, 2), torch.tensor([0, 1, 1, 0])[:n]) if mixed else (None, None)
        targets, other = torch.tensor([0, -100, 5, 3])[:n], ref if extra else None
        states = (hidden, head, targets, c, w, ids, torch.ones(n))
        label = f"mixed={mixed} {dtype} N={n} extras={extra} invariant={invariant}"
        for hidden_grads in (False, True):
            yield label, "linear_logprob", (*states, extra, other, hidden_grads, invariant, "auto")
        upstream = [torch.randn(n if on else 0) for on in (True, extra, extra)]
        needs = [True, not invariant, extra, mixed]
        back = (*upstream, *states, other, invariant, needs, "auto")
        yield label, "linear_logprob_backward", back


torch.manual_seed(0)
CASES = [
    pytest.param(name, args, id=f"{name}: {label}")
    for generate in (linear_cases, logits_cases, logprob_cases)
    for label, name, args in generate()
]


def registered() -> set[str]:
    return {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("clp_kernels::")
    }


def test_every_registered_op_is_here() -> None:
    assert {case.values[0] for case in CASES} == registered()


CHEAP = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name, args", CASES)
def test_opcheck(name: str, args: tuple[Any, ...]) -> None:
    """Outputs that do not alias inputs, inputs that stay as they are, a fake that agrees."""
    torch.library.opcheck(getattr(op, name).default, args, test_utils=CHEAP)


# A few of each op: 0.2 s a case. Among them None optionals, an empty batch, bf16 and gaps.
TRACED = [
    case
    for name in sorted(registered())
    for case in [c for c in CASES if c.values[0] == name][:: 8 if "backward" in name else 5]
]


@pytest.mark.parametrize("name, args", TRACED)
def test_opcheck_aot_dispatch_with_dynamic_shapes(name: str, args: tuple[Any, ...]) -> None:
    dynamic = ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(getattr(op, name).default, args, test_utils=dynamic)


@pytest.mark.parametrize("name, args", CASES)
def test_fake_is_like_the_real_output(name: str, args: tuple[Any, ...]) -> None:
    """Shape, strides and dtype; and outputs are contiguous, as the schema file promises."""
    function = getattr(op, name)
    real = function(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    pairs = [(real, fake)] if isinstance(real, Tensor) else zip(real, fake, strict=True)
    for got, promised in pairs:
        assert (got.shape, got.dtype) == (promised.shape, promised.dtype)
        assert got.is_contiguous()
        if got.numel() > 0:
            assert got.stride() == promised.stride()


def compiled_cases() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Each public function with the tensors that get gradients."""
    x, flat, W = torch.randn(3, 2, 4), torch.randn(5, 4), torch.randn(6, 4)
    A, B, w, c = torch.randn(2, 3, 4), torch.randn(2, 6, 3), torch.randn(3, 2), torch.randn(6)
    experts, biases = torch.randn(2, 6, 4), torch.randn(2, 6)
    logits, positive, scaling = torch.randn(2, 3, 7), torch.rand(3, 2), torch.rand(2)
    targets, ref = torch.tensor([[0, -100], [5, 2], [1, 1]]), torch.randn(3, 2, 4)

    def head(hidden, W, c, **more):  # type: ignore[no-untyped-def]
        return linear_logprob(
            hidden, W, targets, bias=c, return_entropy=True, ref_hidden=ref, temperature=0.5, **more
        )

    return {
        "mixed_lora": (
            lambda x, W, A, B, w, s, c: mixed_lora(x, W, A, B, w, scaling=s, bias=c),
            [x, W, A, B, w, scaling, c],
        ),
        "mixed_lora flat": (
            lambda x, A, B, w: mixed_lora(x, W, A, B, w, scaling=2.0, example_ids=IDS),
            [flat, A, B, w],
        ),
        "mixed_linear": (lambda x, e, w, c: mixed_linear(x, e, w, bias=c), [x, experts, w, biases]),
        "mixed_linear flat": (
            lambda x, e, w: mixed_linear(x, e, w, example_ids=IDS),
            [flat, experts, w],
        ),
        "mix_logits": (mix_logits, [logits, w]),
        "mix_logits probability": (
            lambda z, w: mix_logits(z, w, mode="probability"),
            [logits, positive],
        ),
        "linear_logprob": (head, [x, W, c]),
        "linear_logprob mixed": (
            lambda h, e, c, w: head(h, e, c, weights=w),
            [x, experts, biases, w],
        ),
        "sample": (
            lambda z, w: sample(z, weights=w, seed=3, position=torch.arange(3), temperature=0.7),
            [logits, positive],
        ),
        "sample filtered": (
            lambda z: sample(z, seed=3, position=4, top_k=3, top_p=0.9, min_p=torch.zeros(3)),
            [logits[0]],
        ),
    }


def run(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs and, where there are any, the gradients of a weighted sum of them."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    weighted = [(o * torch.arange(o.numel()).view_as(o)).sum() for o in outputs if o.requires_grad]
    return [*outputs, *(torch.autograd.grad(sum(weighted), leaves) if weighted else ())]


@pytest.mark.parametrize("name", compiled_cases())
def test_compile_fullgraph(name: str) -> None:
    """Forward and backward in one graph each, equal to eager."""
    function, inputs = compiled_cases()[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(run(compiled, inputs), run(function, inputs), strict=True):
        torch.testing.assert_close(got, wanted)


def test_compile_sees_the_batch_invariant_mode() -> None:
    """The mode is guarded on: the same compiled function runs inside and outside of it."""
    torch._dynamo.reset()
    graphs = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        calls = [
            n for n in graph.graph.nodes if n.target is op.mixed_lora or "clp" in str(n.target)
        ]
        graphs.append([a for n in calls for a in n.args if isinstance(a, bool)])
        return graph.forward

    A, B, W = torch.randn(2, 3, 4), torch.randn(2, 6, 3), torch.randn(6, 4)
    compiled = torch.compile(lambda x, w: mixed_lora(x, W, A, B, w), fullgraph=True, backend=record)
    x, w = torch.randn(3, 4), torch.randn(3, 2)
    compiled(x, w)
    with batch_invariant():
        compiled(x, w)
    compiled(x, w)
    assert graphs == [[False], [True]]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    """Inductor holds the strides of every op's outputs to its fake."""
    function, inputs = compiled_cases()["mixed_lora"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: function(*t).relu(), fullgraph=True)
    eager = run(lambda *t: function(*t).relu(), inputs)
    for got, wanted in zip(run(compiled, inputs), eager, strict=True):
        torch.testing.assert_close(got, wanted)
