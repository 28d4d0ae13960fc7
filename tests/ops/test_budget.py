"""Every public op on sampled cases: outputs and gradients within the error budget.

Each case runs three computations on the same rounded inputs: the public op, and plain PyTorch in
float64 and in the inputs' dtype. Cases with few elements are drawn several times and judged
together, because the error of plain PyTorch on one element may be zero by luck.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64, MODES, Runs
from torch import Tensor

from clp_kernels import linear_logprob, mix_logits, sample
from clp_kernels.ops.linear_logprob.head import Inputs as HeadInputs
from clp_kernels.testing import WEIGHT_KINDS, expanded, noncontiguous, weight_rows


@dataclass(frozen=True)
class Case:
    op: str
    dtype: torch.dtype
    layout: str  # "rows" x [B, in], "padded" x [B, T, in], "flat" x [T, in] with example_ids
    batch: int
    tokens: int
    in_features: int
    out_features: int
    m: int
    r: int
    kind: str
    strides: str
    bias: bool
    scaling: str
    lora_float32: bool
    mode: str
    extras: bool

    def __str__(self) -> str:
        name = f"{self.dtype}".removeprefix("torch.")
        sizes = f"B{self.batch}-T{self.tokens}-{self.in_features}to{self.out_features}"
        return f"{self.op}-{name}-{self.layout}-{sizes}-m{self.m}-r{self.r}-{self.kind}"

    @property
    def lora_dtype(self) -> torch.dtype:
        return F32 if self.lora_float32 else self.dtype

    @property
    def draws(self) -> int:
        # A stride of zero leaves few distinct values.
        values = max(self.batch * self.m, 1) / (3 if self.strides == "expanded" else 1)
        return max(2, int(32 / values)) if self.batch and self.tokens else 1

    @property
    def leading(self) -> tuple[int, ...]:
        padded = (self.batch, self.tokens)
        return {"rows": padded[:1], "padded": padded, "flat": padded[1:]}[self.layout]

    def strided(self, t: Tensor, dim: int = 0) -> Tensor:
        if self.strides == "noncontiguous":
            return noncontiguous(t)
        return expanded(t, dim) if self.strides == "expanded" and t.dim() > 1 else t

    def draw(self, *shape: int, scale: float = 1.0, dtype: Any = None, dim: int = -1) -> Tensor:
        """Values of float32, then rounded, in the stride pattern."""
        return self.strided((torch.randn(*shape) * scale).to(dtype or self.dtype), dim)

    def rows_and_ids(self, allow_negative: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
        """weights [B, m] float32, example_ids or None, and the row of each token."""
        kind = self.kind if allow_negative or self.kind != "negative" else "dirichlet"
        weights = self.strided(weight_rows(kind, self.batch, self.m))
        if self.layout == "flat":
            # Unequal lengths, unsorted, and some examples without a token.
            ids = torch.randint(0, max(self.batch, 1), (self.tokens,), dtype=torch.int32)
            return weights, self.strided(ids), ids.long()
        each = self.tokens if self.layout == "padded" else 1
        return weights, None, torch.arange(self.batch).repeat_interleave(each)


def grid(op: str, count: int) -> list[Any]:
    """`count` cases sampled from the product of all axes, the same in every run."""
    axes = {
        "dtype": (F32, BF16, F16),
        "layout": ("rows", "padded", "padded", "flat", "flat"),
        "batch": (0, 1, 1, 1, 3, 3, 3, 5, 5, 5),
        "tokens": (0, 1, 2, 7, 17, 64),
        "in_features": (1, 8, 64, 172),
        "out_features": (1, 8, 64, 172),
        "m": (1, 2, 3, 5),
        "r": (1, 4, 8, 16),
        "kind": WEIGHT_KINDS,
        "strides": ("contiguous", "noncontiguous", "expanded"),
        "bias": (False, True),
        "scaling": ("one", "number", "tensor"),
        "lora_float32": (False, True),
        "mode": MODES,
        "extras": (False, True),
    }
    rng = random.Random(op)
    found: list[Any] = []
    while len(found) < count:
        case = Case(op, **{name: rng.choice(values) for name, values in axes.items()})
        if case.layout == "flat" and case.batch == 0 < case.tokens:
            continue
        found.append(pytest.param(case, id=f"{len(found)}-{case}"))
    return found


def mixed_case(case: Case) -> Runs:
    """Of mixed_lora or mixed_linear."""
    weights, ids, token_rows = case.rows_and_ids()
    inputs = {"x": case.draw(*case.leading, case.in_features, dim=0), "weights": weights}
    inputs |= cases.mixed_tensors(case.op, case, case.draw)
    if case.op == "mixed_lora" and case.scaling == "tensor":
        inputs["scaling"] = case.strided(torch.rand(case.m) + 0.5)
    dy = case.draw(*case.leading, case.out_features)
    return cases.mixed_runs(case.op, inputs, dy, token_rows, case.scaling, example_ids=ids)


def logits_of(case: Case) -> Tensor:
    return case.draw(case.m, case.batch, case.out_features, scale=3, dim=1)


def mix_logits_case(case: Case) -> Runs:
    if case.mode == "probability":
        # log is steep at 0; zero weights stand in test_reference.
        weights = 0.1 + torch.rand(case.batch, case.m)
    else:
        weights = case.rows_and_ids()[0]
    inputs = {"logits": logits_of(case), "weights": weights}
    dz = {"z": case.draw(case.batch, case.out_features, dim=0)}

    def public(**tensors: Tensor) -> dict[str, Tensor]:
        return {"z": mix_logits(**tensors, mode=case.mode)}

    def plain(logits: Tensor, weights: Tensor) -> dict[str, Tensor]:
        return {"z": cases.mixture_plain(logits, weights, case.mode)}

    return cases.three_runs(public, plain, inputs, dz)


def linear_logprob_case(case: Case) -> Runs:
    dim, vocab, mixed = case.in_features, case.out_features + 1, case.layout != "flat"
    head = (case.m, vocab, dim) if mixed else (vocab, dim)
    inputs = {
        "hidden": case.draw(*case.leading, dim, dim=0),
        "head_weight": case.draw(*head, scale=2 * dim**-0.5),
    }
    if mixed:
        inputs["weights"] = case.rows_and_ids()[0]
    if case.bias:
        inputs["bias"] = case.draw(*head[:-1])
    ref_hidden = case.draw(*case.leading, dim)
    targets = torch.randint(0, vocab, case.leading)
    targets.masked_fill_(torch.rand(case.leading) < 0.2, -100)
    temperatures = {"one": 1.0, "number": 0.75, "tensor": torch.rand(case.leading) + 0.5}
    temperature = temperatures[case.scaling]
    token_rows = case.rows_and_ids()[2]
    names = ("logprobs", "entropy", "kl") if case.extras else ("logprobs",)
    upstream = {k: torch.randn(case.leading) for k in names}

    def public(**tensors: Tensor) -> dict[str, Tensor]:
        extras = {"return_entropy": True, "ref_hidden": ref_hidden} if case.extras else {}
        out = linear_logprob(**tensors, targets=targets, temperature=temperature, **extras)
        return {k: getattr(out, k) for k in names}

    def plain(hidden, head_weight, weights=None, bias=None):  # type: ignore[no-untyped-def]
        states, ref = (t.reshape(-1, dim).to(head_weight.dtype) for t in (hidden, ref_hidden))
        tau = torch.as_tensor(temperature).expand(case.leading).flatten()
        given = (states, head_weight, targets.flatten(), bias, weights, token_rows, tau, ref)
        outputs = cases.head_outputs(HeadInputs(*given, invariant=False))
        return {k: v.view(case.leading) for k, v in zip(names, outputs, strict=False)}

    return cases.three_runs(public, plain, inputs, upstream)


def sample_case(case: Case) -> Runs:
    """The token is the definition's in float64; the log-probabilities keep to the budget."""
    logits = logits_of(case)
    weights = case.rows_and_ids(allow_negative=case.mode == "geometric")[0]
    if case.mode == "probability":
        weights = weights + 0.1
    if not case.extras:
        logits, weights = logits[0], None
    temperature = torch.rand(case.batch) + 0.5 if case.scaling == "tensor" else 0.75
    options = {"mode": case.mode, "temperature": temperature, "position": 5}
    options["seed"] = torch.arange(case.batch)
    got = sample(logits, weights=weights, **options)
    wide = None if weights is None else weights.double()
    definition = sample(logits.double(), weights=wide, **options, backend="reference")
    assert torch.equal(got.tokens, definition.tokens)

    def logprobs(dtype: torch.dtype) -> dict[str, Tensor]:
        z = logits.to(dtype)
        if weights is not None:
            z = cases.mixture_plain(z, weights, case.mode)
        tau = torch.as_tensor(temperature).to(dtype).reshape(-1, 1)
        logp = (z / tau).log_softmax(-1).gather(-1, got.tokens[:, None])[:, 0]
        return {"logprobs": logp, "filtered_logprobs": logp}

    return got._asdict(), logprobs(F64), logprobs(case.dtype)


CASES: dict[str, tuple[Callable[[Case], Runs], int]] = {
    "mixed_lora": (mixed_case, 110),
    "mixed_linear": (mixed_case, 60),
    "mix_logits": (mix_logits_case, 40),
    "linear_logprob": (linear_logprob_case, 60),
    "sample": (sample_case, 40),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", [c for op, (_, count) in CASES.items() for c in grid(op, count)])
def test_budget(case: Case) -> None:
    make, _ = CASES[case.op]
    cases.judge([make(case) for _ in range(case.draws)])
