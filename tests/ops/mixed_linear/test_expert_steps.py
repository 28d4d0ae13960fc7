"""Experts one unit in the last place apart: a change of weights moves the output by what it should.

The judge is float64. `gain` is the length of the output's step along the true step, relative to
it: 0 where the step is lost, 1.67 where 0.6 of a step became a whole one. A mixture that is rounded
to the dtype before the last rounding (a merged matrix, or the experts' products) lies on one of the
experts.
"""

import pytest
import torch
from cases import BF16, CPU_KERNELS, F16, F32, F64, interpreted
from torch import Tensor

from clp_kernels import MixedLinear, batch_invariant, linear_logprob, mixed_linear, steer
from clp_kernels.nn.experts import MixedModule
from clp_kernels.ops.mixed_linear import cpu as cpu_mixed_linear
from clp_kernels.ops.mixed_linear import reference

BACKENDS = ["reference", pytest.param("cpu", marks=CPU_KERNELS)]
# From the first expert alone to a mixture on either side of the middle.
STEPS = [(0.7, 0.3), (0.4, 0.6)]


@pytest.fixture(params=[False, True], ids=["slow 16 bits", "fast 16 bits"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if PyTorch multiplied matrices in 16 bits at full speed here, and not."""
    monkeypatch.setattr(cpu_mixed_linear, "has_native_gemm", lambda _: request.param)


def experts(out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """[2, out, in]; the second is the next larger number everywhere, by one step of one size."""
    first = ((1 + torch.rand(out_features, in_features)) / 16).to(dtype)
    integers = torch.int32 if dtype == F32 else torch.int16
    return torch.stack([first, (first.view(integers) + 1).view(dtype)])


def rows(weights: tuple[float, float], tokens: int, equal: bool) -> Tensor:
    """Weights of all tokens; not equal: those of the first one differ from the others'."""
    every = torch.tensor([weights]).repeat(tokens, 1)
    if not equal:
        every[0] = torch.tensor([0.5, 0.5])
    return every


def gain(step: Tensor, true: Tensor) -> float:
    return float((step * true).sum() / true.square().sum())


def forward_gain(
    backend: str, dtype: torch.dtype, tokens: int, weights: tuple[float, float], equal: bool
) -> float:
    # 16 thousand outputs and more, whose rounding then averages out to 0.01.
    out_features = max(2**14 // tokens, 512)
    x, E = (0.5 + torch.rand(tokens, 64)).to(dtype), experts(out_features, 64, dtype)
    before, after = (rows(w, tokens, equal) for w in ((1.0, 0.0), weights))
    step = mixed_linear(x, E, after, backend=backend).double()
    step -= mixed_linear(x, E, before, backend=backend).double()
    exact = (x.double(), E.double())
    true = mixed_linear(*exact, after, backend="reference")
    true -= mixed_linear(*exact, before, backend="reference")
    return gain(step[1:], true[1:])


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("weights", STEPS, ids=str)
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_between_experts_arrives_whole(
    backend: str, dtype: torch.dtype, tokens: int, equal: bool, weights: tuple[float, float]
) -> None:
    assert forward_gain(backend, dtype, tokens, weights, equal) == pytest.approx(1, abs=0.03)


def test_a_step_between_experts_in_triton() -> None:
    interpreted("mixed_linear")
    for equal, weights in ((True, STEPS[0]), (False, STEPS[1])):
        assert forward_gain("triton", F16, 32, weights, equal) == pytest.approx(1, abs=0.03)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("weights", STEPS, ids=str)
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_the_gradient_of_x(
    backend: str, dtype: torch.dtype, equal: bool, weights: tuple[float, float]
) -> None:
    x, E = torch.zeros(64, 512, dtype=dtype), experts(64, 512, dtype)
    dy = (0.5 + torch.rand(64, 64)).to(dtype)

    def gradient(w: tuple[float, float], kind: torch.dtype, name: str) -> Tensor:
        leaf = x.to(kind).requires_grad_()
        y = mixed_linear(leaf, E.to(kind), rows(w, 64, equal), backend=name)
        return torch.autograd.grad(y, leaf, dy.to(kind))[0].double()

    step = gradient(weights, dtype, backend) - gradient((1.0, 0.0), dtype, backend)
    exact = (F64, "reference")
    true = gradient(weights, *exact) - gradient((1.0, 0.0), *exact)
    assert gain(step[1:], true[1:]) == pytest.approx(1, abs=0.03)


@pytest.mark.usefixtures("processor")
@CPU_KERNELS
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_decoding_and_prefill_agree(dtype: torch.dtype) -> None:
    """A token's bits are the same alone, among equal weights, among others, and invariant."""
    x, E, c = torch.randn(70, 96).to(dtype), torch.randn(3, 50, 96).to(dtype), torch.randn(3, 50)
    c, w = c.to(dtype), torch.tensor([[0.2, 0.5, 0.3]])
    alone = torch.cat([mixed_linear(t[None], E, w, bias=c, backend="cpu") for t in x])
    for tokens in (16, 17, 33, 70):
        equal = w.repeat(tokens, 1)
        mixed = torch.cat([equal[:-1], torch.rand(1, 3)])
        for weights, same in ((equal, tokens), (mixed, tokens - 1)):
            y = mixed_linear(x[:tokens], E, weights, bias=c, backend="cpu")
            assert torch.equal(y[:same], alone[:same])
    with batch_invariant():
        assert torch.equal(mixed_linear(x, E, w.repeat(70, 1), bias=c, backend="cpu"), alone)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("after", [(1.5, -0.5), (-0.3, 1.3), (0.6, 0.0)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_of_a_layer_beyond_the_experts(autocast: bool, after: tuple[float, float]) -> None:
    """Of matrix and bias, for a prefill [B, T, in], with weights off the simplex."""
    # The last step is none between the experts: the output shrinks to 0.6 of itself.
    E, c = experts(512, 64, BF16), experts(1, 512, BF16)[:, 0]
    layer = MixedLinear(E.float() if autocast else E, c.float() if autocast else c, ["a", "b"])
    x = (0.5 + torch.rand(3, 20, 64)).to(BF16)

    def step(x: Tensor, on: bool) -> Tensor:
        outputs = []
        for row in ((1.0, 0.0), after):
            with torch.no_grad(), steer(layer, [row] * 3), torch.autocast("cpu", BF16, on):
                outputs.append(layer(x).double())
        return outputs[1] - outputs[0]

    found = step(x.float() if autocast else x, autocast)
    layer.double()
    assert gain(found, step(x.double(), False)) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_the_logprobs_of_a_mixed_head(
    backend: str, dtype: torch.dtype, equal: bool
) -> None:
    """Its logits are not rounded to 16 bits either."""
    hidden, heads = torch.randn(64, 64).to(dtype), experts(512, 64, dtype)
    # A step of all entries alike would move all logits alike, and no log-probability.
    heads[1] = torch.where(torch.rand(512, 64) < 0.5, heads[0], heads[1])
    targets = torch.randint(512, (64,))

    def logprobs(row: tuple[float, float], kind: torch.dtype, name: str) -> Tensor:
        found = linear_logprob(
            hidden.to(kind), heads.to(kind), targets, weights=rows(row, 64, equal), backend=name
        )
        return found.logprobs.double()

    step = logprobs(STEPS[0], dtype, backend) - logprobs((1.0, 0.0), dtype, backend)
    exact = (torch.float64, "reference")
    true = logprobs(STEPS[0], *exact) - logprobs((1.0, 0.0), *exact)
    assert gain(step[1:], true[1:]) == pytest.approx(1, abs=0.03)


def test_the_reference_rounds_once() -> None:
    """The definition itself: float32 to the end."""
    x, E, w = torch.randn(9, 40).bfloat16(), torch.randn(2, 7, 40).bfloat16(), torch.rand(9, 2)
    inputs = reference.Inputs(x, E, w, None, None, False)
    wide = reference.mixed_linear(inputs._replace(x=x.float(), expert_weight=E.float()))
    assert torch.equal(reference.mixed_linear(inputs), wide.bfloat16())


class ScaledNorm(torch.nn.Module):
    """Rounds before it multiplies, as the norms of Llama and T5; its gate is a second input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width))
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = x.float() if x.dtype != F64 else x
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True)) + self.shift
        y = self.weight * wide.to(x.dtype)
        return y if gate is None else y * gate


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("weights", STEPS, ids=str)
@pytest.mark.parametrize(
    ("kind", "gated"), [(ScaledNorm, False), (ScaledNorm, True), (torch.nn.LayerNorm, False)]
)
def test_a_step_between_norms(
    kind: type[torch.nn.Module], gated: bool, dtype: torch.dtype, weights: tuple[float, float]
) -> None:
    tables = experts(1, 2048, dtype)[:, 0]
    norms = [kind(2048).to(dtype) for _ in tables]
    for norm, table in zip(norms, tables, strict=True):
        norm.weight = torch.nn.Parameter(table)
    x, gate = torch.randn(2, 1, 64, 2048).to(dtype).unbind()
    layer = MixedModule(norms, ["a", "b"])

    def step(*inputs: Tensor) -> Tensor:
        outputs = []
        for row in ((1.0, 0.0), weights):
            with torch.no_grad(), steer(layer, [row]):
                outputs.append(layer(*inputs))
        assert outputs[0].dtype == inputs[0].dtype
        return outputs[1].double() - outputs[0].double()

    inputs = [x, gate] if gated else [x]
    found = step(*inputs)
    layer.double()
    assert gain(found, step(*(one.double() for one in inputs))) == pytest.approx(1, abs=0.03)
