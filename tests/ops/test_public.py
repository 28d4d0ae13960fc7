"""The public ops: the error budget over a grid, their algebra, invariance to the batch, errors."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BF16,
    F16,
    F32,
    F64,
    Results,
    gradients,
    judge,
    linear_plain,
    lora_plain,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from clp_kernels import (
    batch_invariant,
    linear_logprob,
    mix_logits,
    mixed_linear,
    mixed_lora,
    sample,
)
from clp_kernels.invariant import is_batch_invariant
from clp_kernels.testing import (
    WEIGHT_KINDS,
    assert_within_budget,
    expanded,
    noncontiguous,
    weight_rows,
)

DTYPES = (F32, BF16, F16)


# The budget itself: a gate that cannot fail is not a gate.


def test_budget_passes_and_fails() -> None:
    ref = torch.tensor([1.0, -2.0, 4.0], dtype=F64)
    same = (ref + 0.5e-3).float()
    assert assert_within_budget((ref + 0.9e-3).float(), ref, same) == pytest.approx(0.9, abs=0.01)
    with pytest.raises(AssertionError, match=r"index \[1\]: got -1\.9.*ence64 -2.*dtype -1\.99"):
        assert_within_budget((ref + torch.tensor([0, 1.1e-3, 0])).float(), ref, same)
    floor = 4e-6
    assert_within_budget((ref + 0.9 * floor).to(F64).float(), ref, ref.float())
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget((ref + 1.3 * floor).to(F64).float(), ref, ref.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_budget_sees_values_that_are_not_finite(bad: float) -> None:
    ref = torch.tensor([1.0, -math.inf], dtype=F64)
    assert assert_within_budget(ref.float(), ref, ref.float()) == 0
    with pytest.raises(AssertionError, match=r"index \[0\]"):
        assert_within_budget(torch.tensor([bad, -math.inf]), ref, ref.float())
    with pytest.raises(AssertionError, match=r"index \[1\]"):
        assert_within_budget(torch.tensor([1.0, 7.0]), ref, ref.float())


def test_budget_refuses_other_shapes_and_a_reference_in_low_precision() -> None:
    ref = torch.zeros(3, dtype=F64)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_within_budget(torch.zeros(1, 3), ref, torch.zeros(3))
    with pytest.raises(AssertionError, match="must be float64"):
        assert_within_budget(torch.zeros(3), ref.float(), torch.zeros(3))


def test_input_makers() -> None:
    for kind in WEIGHT_KINDS:
        rows = weight_rows(kind, 6, 3)
        assert rows.shape == (6, 3)
        assert rows.isfinite().all()
        if kind not in ("negative", "zero"):
            torch.testing.assert_close(rows.sum(-1), torch.ones(6))
            assert (rows >= 0).all()
        assert (len(rows.unique(dim=0)) == 1) == (kind in ("uniform", "all_equal"))
    assert (weight_rows("zero", 6, 3)[::2] == 0).all()
    assert (weight_rows("negative", 6, 3) < 0).any()
    with pytest.raises(ValueError, match="kind must be one of"):
        weight_rows("flat", 2, 2)
    t = torch.randn(2, 3, 4)
    assert torch.equal(noncontiguous(t), t)
    assert noncontiguous(t).stride() == (2, 8, 48)
    assert expanded(t, 1).stride()[1] == 0
    assert torch.equal(expanded(t, 1)[:, 2], t[:, 0])


# The grid. Each case runs three computations on the same rounded inputs: the public op, the
# definition in float64 and plain PyTorch in the inputs' dtype, and holds every output and every
# gradient to the budget. Cases with few elements are drawn several times and judged together,
# because the error of plain PyTorch on one element may be zero by luck.


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
    def draws(self) -> int:
        # A stride of zero leaves few distinct values.
        values = max(self.batch * self.m, 1) / (3 if self.strides == "expanded" else 1)
        return max(2, int(32 / values)) if self.batch and self.tokens else 1

    @property
    def leading(self) -> tuple[int, ...]:
        return {
            "rows": (self.batch,),
            "padded": (self.batch, self.tokens),
            "flat": (self.tokens,),
        }[self.layout]


def grid(op: str, count: int) -> list[Any]:
    """`count` cases sampled from the product of all axes, the same in every run."""
    axes = {
        "dtype": DTYPES,
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
        "mode": ("geometric", "probability"),
        "extras": (False, True),
    }
    rng = random.Random(op)
    cases = []
    while len(cases) < count:
        case = Case(op, **{name: rng.choice(values) for name, values in axes.items()})
        if case.layout == "flat" and case.batch == 0 < case.tokens:
            continue
        cases.append(pytest.param(case, id=f"{len(cases)}-{case}"))
    return cases


def draw(case: Case, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor in the case's dtype and stride pattern; values of float32, then rounded."""
    return strided(case, (torch.randn(*shape) * scale).to(dtype or case.dtype), dim=-1)


def strided(case: Case, t: Tensor, dim: int = 0) -> Tensor:
    if case.strides == "noncontiguous":
        return noncontiguous(t)
    return expanded(t, dim) if case.strides == "expanded" and t.dim() > 1 else t


def activations(case: Case) -> Tensor:
    return strided(case, torch.randn(*case.leading, case.in_features).to(case.dtype))


def logits_of(case: Case) -> Tensor:
    values = 3 * torch.randn(case.m, case.batch, case.out_features)
    return strided(case, values.to(case.dtype), dim=1)


def rows_and_ids(case: Case, allow_negative: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """weights [B, m] float32, example_ids or None, and the row of each token."""
    kind = case.kind if allow_negative or case.kind != "negative" else "dirichlet"
    weights = strided(case, weight_rows(kind, case.batch, case.m))
    if case.layout == "flat":
        # Unequal lengths, unsorted, and some examples without a token.
        ids = torch.randint(0, max(case.batch, 1), (case.tokens,), dtype=torch.int32)
        return weights, strided(case, ids), ids.long()
    each = case.tokens if case.layout == "padded" else 1
    return weights, None, torch.arange(case.batch).repeat_interleave(each)


def lora_definition(
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Adapter by adapter: the formula of the docstring. x [N, in], weights [N, m]."""
    y = x @ base_weight.t() if bias is None else x @ base_weight.t() + bias
    for i in range(lora_A.shape[0]):
        y = y + weights[:, i : i + 1] * ((x @ lora_A[i].t()) @ lora_B[i].t())
    return y


def mixed_lora_case(case: Case) -> tuple[Results, Results, Results]:
    lora_dtype = torch.float32 if case.lora_float32 else case.dtype
    n_in, n_out, m, r = case.in_features, case.out_features, case.m, case.r
    weights, ids, token_rows = rows_and_ids(case)
    inputs = {
        "x": activations(case),
        "base_weight": draw(case, n_out, n_in, scale=n_in**-0.5),
        "lora_A": draw(case, m, r, n_in, scale=n_in**-0.5, dtype=lora_dtype),
        "lora_B": draw(case, m, n_out, r, scale=r**-0.5, dtype=lora_dtype),
        "weights": weights,
    }
    if case.bias:
        inputs["bias"] = draw(case, n_out)
    if case.scaling == "tensor":
        inputs["scaling"] = strided(case, torch.rand(m) + 0.5)
    number = 1.75 if case.scaling == "number" else 1.0
    dy = {"y": draw(case, *case.leading, n_out)}

    def public(weights: Tensor, scaling: Any = number, **rest: Any) -> Results:
        return {"y": mixed_lora(**rest, weights=weights, scaling=scaling, example_ids=ids)}

    def plain(form: Callable[..., Tensor]) -> Callable[..., Results]:
        def run(x, weights, scaling=number, **rest):  # type: ignore[no-untyped-def]
            per_token = (weights * scaling)[token_rows]
            y = form(x=x.reshape(-1, n_in), weights=per_token, **rest)
            return {"y": y.view(*case.leading, n_out)}

        return run

    return (
        gradients(public, inputs, dy),
        gradients(plain(lora_definition), inputs, dy, F64),
        gradients(plain(concatenated), inputs, dy),
    )


def concatenated(**arguments: Tensor) -> Tensor:
    return lora_plain(**arguments)[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", grid("mixed_lora", 110))
def test_mixed_lora_budget(case: Case) -> None:
    judge([mixed_lora_case(case) for _ in range(case.draws)])


def mixed_linear_case(case: Case) -> tuple[Results, Results, Results]:
    n_in, n_out, m = case.in_features, case.out_features, case.m
    weights, ids, token_rows = rows_and_ids(case)
    inputs = {
        "x": activations(case),
        "expert_weight": draw(case, m, n_out, n_in, scale=n_in**-0.5),
        "weights": weights,
    }
    if case.bias:
        inputs["bias"] = draw(case, m, n_out)
    dy = {"y": draw(case, *case.leading, n_out)}

    def public(**tensors: Tensor) -> Results:
        return {"y": mixed_linear(**tensors, example_ids=ids)}

    def merged(x: Tensor, expert_weight: Tensor, weights: Tensor, bias: Any = None) -> Results:
        rows = weights[token_rows]
        y = torch.einsum("nm,moi,ni->no", rows, expert_weight, x.reshape(-1, n_in))
        y = y if bias is None else y + rows @ bias
        return {"y": y.view(*case.leading, n_out)}

    def looped(x: Tensor, expert_weight: Tensor, weights: Tensor, bias: Any = None) -> Results:
        y = linear_plain(x.reshape(-1, n_in), expert_weight, weights[token_rows], bias)
        return {"y": y.view(*case.leading, n_out)}

    return (
        gradients(public, inputs, dy),
        gradients(merged, inputs, dy, F64),
        gradients(looped, inputs, dy),
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", grid("mixed_linear", 60))
def test_mixed_linear_budget(case: Case) -> None:
    judge([mixed_linear_case(case) for _ in range(case.draws)])


def mix_logits_case(case: Case) -> tuple[Results, Results, Results]:
    if case.mode == "probability":
        # log is steep at 0; zero weights stand in test_reference.
        weights = 0.1 + torch.rand(case.batch, case.m)
    else:
        weights = rows_and_ids(case)[0]
    inputs = {"logits": logits_of(case), "weights": weights}
    dz = {"z": strided(case, torch.randn(case.batch, case.out_features).to(case.dtype))}

    def public(logits: Tensor, weights: Tensor) -> Results:
        return {"z": mix_logits(logits, weights, mode=case.mode)}

    def definition(logits: Tensor, weights: Tensor) -> Results:
        if case.mode == "geometric":
            return {"z": torch.einsum("bm,mbv->bv", weights, logits)}
        return {"z": torch.einsum("bm,mbv->bv", weights, logits.softmax(-1)).log()}

    def plain(logits: Tensor, weights: Tensor) -> Results:
        columns = weights.t()[:, :, None].to(logits.dtype)
        if case.mode == "geometric":
            return {"z": (columns * logits).sum(0)}
        return {"z": torch.logsumexp(columns.log() + logits.log_softmax(-1), dim=0)}

    return (
        gradients(public, inputs, dz),
        gradients(definition, inputs, dz, F64),
        gradients(plain, inputs, dz),
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", grid("mix_logits", 40))
def test_mix_logits_budget(case: Case) -> None:
    judge([mix_logits_case(case) for _ in range(case.draws)])


def linear_logprob_case(case: Case) -> tuple[Results, Results, Results]:
    dim, vocab, mixed = case.in_features, case.out_features + 1, case.layout != "flat"
    head = (case.m, vocab, dim) if mixed else (vocab, dim)
    inputs = {
        "hidden": activations(case),
        "head_weight": draw(case, *head, scale=2 * dim**-0.5),
    }
    if mixed:
        inputs["weights"] = rows_and_ids(case)[0]
    if case.bias:
        inputs["bias"] = draw(case, *head[:-1])
    ref_hidden = draw(case, *case.leading, dim)
    targets = torch.randint(0, vocab, case.leading)
    targets.masked_fill_(torch.rand(case.leading) < 0.2, -100)
    temperature = {"one": 1.0, "number": 0.75, "tensor": torch.rand(case.leading) + 0.5}[
        case.scaling
    ]
    token_rows = rows_and_ids(case)[2]
    names = ("logprobs", "entropy", "kl") if case.extras else ("logprobs",)
    upstream = {k: torch.randn(case.leading) for k in names}

    def public(**tensors: Tensor) -> Results:
        extras = {"return_entropy": True, "ref_hidden": ref_hidden} if case.extras else {}
        out = linear_logprob(**tensors, targets=targets, temperature=temperature, **extras)
        return {k: getattr(out, k) for k in names}

    def plain(
        hidden: Tensor, head_weight: Tensor, weights: Any = None, bias: Any = None
    ) -> Results:
        def log_softmax(states: Tensor) -> Tensor:
            rows = states.reshape(-1, dim).to(head_weight.dtype)
            if weights is None:
                z = F.linear(rows, head_weight, bias)
            else:
                z = linear_plain(rows, head_weight, weights[token_rows], bias)
            tau = torch.as_tensor(temperature).expand(case.leading).reshape(-1, 1)
            return (z / tau.to(z.dtype)).log_softmax(-1)

        logp, y = log_softmax(hidden), targets.reshape(-1)
        used, p = y != -100, log_softmax(hidden).exp()
        columns = {"logprobs": logp.gather(-1, y.clamp(min=0)[:, None])[:, 0]}
        if case.extras:
            columns["entropy"] = -(p * logp).sum(-1)
            columns["kl"] = (p * (logp - log_softmax(ref_hidden))).sum(-1)
        return {k: (v * used).view(case.leading) for k, v in columns.items()}

    return (
        gradients(public, inputs, upstream),
        gradients(plain, inputs, upstream, F64),
        gradients(plain, inputs, upstream),
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", grid("linear_logprob", 60))
def test_linear_logprob_budget(case: Case) -> None:
    judge([linear_logprob_case(case) for _ in range(case.draws)])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", grid("sample", 40))
def test_sample_budget(case: Case) -> None:
    """The token is the definition's in float64; the log-probabilities keep to the budget."""
    runs = []
    for _ in range(case.draws):
        logits = logits_of(case)
        weights = rows_and_ids(case, allow_negative=case.mode == "geometric")[0]
        if case.mode == "probability":
            weights = weights + 0.1
        if not case.extras:
            logits, weights = logits[0], None
        temperature = torch.rand(case.batch) + 0.5 if case.scaling == "tensor" else 0.75
        arguments = {
            "weights": weights,
            "mode": case.mode,
            "temperature": temperature,
            "seed": torch.arange(case.batch),
            "position": 5,
        }
        got = sample(logits, **arguments)
        wide = {
            k: v.double() if k == "weights" and v is not None else v for k, v in arguments.items()
        }
        definition = sample(logits.double(), **wide, backend="reference")

        def logprobs(dtype: torch.dtype, tokens: Tensor, z: Any, w: Any, tau: Any) -> Results:
            z = z.to(dtype)
            if w is not None:
                columns = w.t()[:, :, None].to(dtype)
                geometric = case.mode == "geometric"
                mixture = columns.log() + z.log_softmax(-1)
                z = (columns * z).sum(0) if geometric else mixture.logsumexp(0)
            tau = torch.as_tensor(tau).to(dtype).reshape(-1, 1)
            logp = (z / tau).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            return {"logprobs": logp, "filtered_logprobs": logp}

        assert torch.equal(got.tokens, definition.tokens)
        inputs = (got.tokens, logits, weights, temperature)
        runs.append(
            (
                {"logprobs": got.logprobs, "filtered_logprobs": got.filtered_logprobs},
                logprobs(F64, *inputs),
                logprobs(case.dtype, *inputs),
            )
        )
    judge(runs)


# Algebra, over drawn sizes (float64 where numbers are compared, all dtypes where bits are).


@dataclass
class Lora:
    """Inputs of mixed_lora for hypothesis: drawn sizes, values from a drawn seed."""

    x: Tensor
    base_weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    weights: Tensor
    bias: Tensor

    def __call__(self, **changed: Tensor) -> Tensor:
        return mixed_lora(**{**vars(self), **changed})


@st.composite
def loras(draw: Any, dtypes: tuple[torch.dtype, ...] = (F64,)) -> Lora:
    def size(top: int) -> int:
        return draw(st.integers(1, top))

    B, T, m, r, n_in, n_out = size(5), size(4), size(4), size(5), size(9), size(9)
    dtype = draw(st.sampled_from(dtypes))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=F64).to(dtype)

    weights = rand(B, m).to(F64 if dtype == F64 else torch.float32)
    return Lora(
        rand(B, T, n_in),
        rand(n_out, n_in),
        rand(m, r, n_in),
        rand(m, n_out, r),
        weights,
        rand(n_out),
    )


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@given(loras(), st.data())
def test_one_hot_row_is_the_single_adapter(case: Lora, data: Any) -> None:
    B, m = case.weights.shape
    picks = torch.tensor(data.draw(st.lists(st.integers(0, m - 1), min_size=B, max_size=B)))
    got = case(weights=F.one_hot(picks, m).double())
    for b, i in enumerate(picks.tolist()):
        merged = case.base_weight + case.lora_B[i] @ case.lora_A[i]
        close(got[b], F.linear(case.x[b], merged, case.bias))


@given(loras())
def test_linear_in_the_weights(case: Lora) -> None:
    other = torch.randn_like(case.weights)
    base = F.linear(case.x, case.base_weight, case.bias)
    mixed = case(weights=2 * case.weights - 3 * other)
    close(mixed - base, 2 * (case() - base) - 3 * (case(weights=other) - base))


@given(loras())
def test_equal_to_the_concatenated_rank_form(case: Lora) -> None:
    rows = case.weights.repeat_interleave(case.x.shape[1], 0)
    wanted = concatenated(**{**vars(case), "weights": rows})
    close(case(), wanted)


@given(loras(), st.randoms())
def test_order_of_adapters_does_not_matter(case: Lora, rng: random.Random) -> None:
    p = rng.sample(range(case.weights.shape[1]), case.weights.shape[1])
    close(case(weights=case.weights[:, p], lora_A=case.lora_A[p], lora_B=case.lora_B[p]), case())


@given(loras(), st.randoms())
def test_order_of_examples_does_not_matter(case: Lora, rng: random.Random) -> None:
    p = rng.sample(range(case.x.shape[0]), case.x.shape[0])
    close(case(x=case.x[p], weights=case.weights[p]), case()[p])


@given(loras())
def test_flat_tokens_are_the_padded_batch(case: Lora) -> None:
    B, T = case.x.shape[:2]
    order = torch.randperm(B * T)
    ids = torch.arange(B).repeat_interleave(T)[order]
    got = case(x=case.x.flatten(0, 1)[order], example_ids=ids)
    close(got, case().flatten(0, 1)[order])


@given(loras(), st.data())
def test_mixed_linear_of_merged_adapters_is_mixed_lora(case: Lora, data: Any) -> None:
    """On the simplex the two conditionings agree: W_i = W + B_i A_i."""
    experts = case.base_weight + case.lora_B @ case.lora_A
    weights = case.weights.softmax(-1)
    got = mixed_linear(case.x, experts, weights, bias=case.bias.expand(experts.shape[:2]))
    close(got, case(weights=weights))


@given(loras(dtypes=DTYPES), st.data())
def test_zero_row_is_the_bare_linear_to_the_bit(case: Lora, data: Any) -> None:
    """Also where an adapter holds infinity, the base gives -0.0, or the zero is negative."""
    B = case.weights.shape[0]
    zero = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)))
    weights = torch.where(zero[:, None], data.draw(st.sampled_from([0.0, -0.0])), case.weights)
    base_weight = case.base_weight.clone()
    base_weight[0] = 0
    lora_A = case.lora_A.clone()
    if data.draw(st.booleans()):
        lora_A[0, 0, 0] = math.inf
    for bias in (case.bias, torch.full_like(case.bias, -0.0), None):
        got = case(weights=weights, base_weight=base_weight, lora_A=lora_A, bias=bias)
        bare = F.linear(case.x, base_weight, bias)
        assert same_bits(got[zero], bare[zero])
    with batch_invariant():
        alone = case(weights=weights, lora_A=lora_A)
        nothing = case(weights=torch.zeros_like(weights))
        assert same_bits(alone[zero], nothing[zero])


@given(loras(dtypes=DTYPES))
def test_two_runs_give_the_same_bits(case: Lora) -> None:
    def run() -> list[Tensor]:
        leaves = {k: t.detach().clone().requires_grad_() for k, t in vars(case).items()}
        y = case(**leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]

    for first, second in zip(run(), run(), strict=True):
        assert same_bits(first, second)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.sampled_from([F64, *DTYPES]))
def test_mix_logits_algebra(m: int, B: int, V: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(m, B, V)).to(dtype)
    one_hot = weight_rows("one_hot", B, m)
    picked = logits[torch.arange(B) % m, torch.arange(B)]
    assert same_bits(mix_logits(logits, one_hot), picked)
    probability = mix_logits(logits, one_hot, mode="probability").double()
    eps = torch.finfo(dtype).eps if dtype != F64 else 1e-7
    torch.testing.assert_close(probability, picked.double().log_softmax(-1), rtol=eps, atol=1e-6)
    wide, rows = logits.double(), weight_rows("dirichlet", B, m, dtype=F64)
    p = torch.randperm(m)
    for mode in ("geometric", "probability"):
        z = mix_logits(wide, rows, mode=mode)
        close(mix_logits(wide[p], rows[:, p], mode=mode), z)
        assert same_bits(mix_logits(wide, rows, mode=mode), z)
    close(mix_logits(wide, rows, mode="probability").exp().sum(-1), torch.ones(B, dtype=F64))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 20))
def test_mixed_head_is_the_mixed_logits(m: int, B: int, V: int) -> None:
    """linear_logprob with weights against mix_logits and a softmax."""
    hidden, heads = torch.randn(B, 3, 6, dtype=F64), torch.randn(m, V, 6, dtype=F64)
    weights, targets = torch.randn(B, m, dtype=F64), torch.randint(0, V, (B, 3))
    got = linear_logprob(
        hidden, heads, targets, weights=weights, return_entropy=True, ref_hidden=hidden
    )
    logits = torch.einsum("btd,mvd->mbtv", hidden, heads).flatten(1, 2)
    logp = mix_logits(logits, weights.repeat_interleave(3, 0)).log_softmax(-1).view(B, 3, V)
    close(got.logprobs, logp.gather(-1, targets[..., None])[..., 0])
    assert got.entropy is not None
    close(got.entropy, -(logp.exp() * logp).sum(-1))
    assert got.kl is not None
    assert (got.kl == 0).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_mixed_hidden_states_are_the_mixed_logits(m: int, B: int, V: int, biased: bool) -> None:
    """Behind one linear head: the logits, what is drawn and its log-probability, all gradients."""
    head, bias = torch.randn(V, 6, dtype=F64), torch.randn(V, dtype=F64) if biased else None
    hidden = torch.randn(m, B, 6, dtype=F64).requires_grad_()
    # With a bias the rows have to sum to 1.
    rows = weight_rows("dirichlet", B, m, dtype=F64) if biased else torch.randn(B, m, dtype=F64)
    weights, dz = rows.requires_grad_(), torch.randn(B, V, dtype=F64)
    targets = torch.randint(0, V, (B,))
    logits = F.linear(hidden, head, bias)
    mixed = mix_logits(hidden, weights)
    z, wanted = F.linear(mixed, head, bias), mix_logits(logits, weights)
    close(z, wanted)
    grads = [
        torch.autograd.grad((t * dz).sum(), (hidden, weights), retain_graph=True)
        for t in (z, wanted)
    ]
    if biased:  # a step that leaves the simplex moves the sum of the bias too
        centred = [g[1] - g[1].mean(-1, keepdim=True) for g in grads]
        grads = [(g[0], c) for g, c in zip(grads, centred, strict=True)]
    for a, b in zip(*grads, strict=True):
        close(a, b)
    of_hidden = linear_logprob(mixed, head, targets, bias=bias, temperature=0.5).logprobs
    close(of_hidden, torch.log_softmax(wanted / 0.5, -1).gather(-1, targets[:, None])[:, 0])
    drawn = sample(logits, weights=weights, seed=3, position=4)
    assert torch.equal(sample(z, seed=3, position=4).tokens, drawn.tokens)


def test_empty_batches() -> None:
    """B = 0 and T = 0 work forward and backward in every op."""
    w = torch.zeros(0, 2, requires_grad=True)
    W, A, C = torch.randn(5, 4), torch.randn(2, 3, 4), torch.randn(2, 5, 3).requires_grad_()
    for shape in ((0, 4), (0, 7, 4), (0, 0, 4)):
        x = torch.randn(shape)
        for y in (mixed_lora(x, W, A, C, w), mixed_linear(x[..., :3], C, w)):
            assert y.shape == (*shape[:-1], 5)
            assert torch.autograd.grad(y.sum(), w)[0].shape == (0, 2)
    rows = torch.rand(3, 2, requires_grad=True)
    y = mixed_lora(torch.randn(3, 0, 4), W, A, C, rows)
    assert (torch.autograd.grad(y.sum(), rows)[0] == 0).all()
    ids = torch.zeros(0, dtype=torch.int32)
    y = mixed_lora(torch.randn(0, 4), W, A, C, rows, example_ids=ids)
    assert (torch.autograd.grad(y.sum(), (rows, C))[0] == 0).all()
    z = mix_logits(torch.randn(2, 0, 6), w)
    assert torch.autograd.grad(z.sum(), w)[0].shape == (0, 2)
    assert [t.shape for t in sample(torch.randn(0, 6), seed=0, position=0)] == [(0,)] * 3
    out = linear_logprob(
        torch.randn(0, 4), W, torch.zeros(0, dtype=torch.long), return_entropy=True
    )
    assert out.logprobs.shape == (0,)
    assert out.entropy is not None
    assert out.entropy.shape == (0,)
    out = linear_logprob(torch.randn(0, 2, 4), A, torch.zeros(0, 2, dtype=torch.long), weights=w)
    assert torch.autograd.grad(out.logprobs.sum(), w)[0].shape == (0, 2)


# Invariance to the batch, to the bit.

SIZES = (2, 3, 5, 8, 15, 16, 17, 31, 32, 33)


def invariance_cases(
    dtype: torch.dtype,
) -> Iterator[tuple[str, Callable[..., tuple[Tensor, ...]], Any]]:
    """(name, function of rows [n, ...], rows of 33 examples) for the ops that need the mode."""
    for T, n_in, n_out, m, r in ((1, 64, 172, 2, 4), (1, 172, 64, 5, 16), (3, 64, 64, 1, 1)):

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype)

        x, w, dy = rand(33, T, n_in), torch.randn(33, m), rand(33, T, n_out)
        W, A, B, c = rand(n_out, n_in), rand(m, r, n_in), rand(m, n_out, r), rand(n_out)
        experts, biases = rand(m, n_out, n_in), rand(m, n_out)
        targets, ref = torch.randint(0, n_out, (33, T)), rand(33, T, n_in)

        def with_dx(function, x, *rows):  # type: ignore[no-untyped-def]
            x = x.detach().requires_grad_()
            outputs = function(x, *rows[:-1])
            loss = sum(
                (o * rows[-1][..., 0].float() if o.dim() == 2 else o * rows[-1]).sum()
                for o in outputs
            )
            return *outputs, torch.autograd.grad(loss, x)[0]

        def lora(x, w, W=W, A=A, B=B, c=c):  # type: ignore[no-untyped-def]
            return (mixed_lora(x, W, A, B, w, bias=c),)

        def linear(x, w, experts=experts, biases=biases):  # type: ignore[no-untyped-def]
            return (mixed_linear(x, experts, w, bias=biases),)

        def head(x, t, ref, W=W, c=c):  # type: ignore[no-untyped-def]
            return tuple(linear_logprob(x, W, t, bias=c, return_entropy=True, ref_hidden=ref))

        def heads(x, t, ref, w, E=experts, c=biases):  # type: ignore[no-untyped-def]
            return tuple(
                linear_logprob(x, E, t, bias=c, weights=w, return_entropy=True, ref_hidden=ref)
            )

        shape = f"T={T} {n_in} to {n_out} m={m}"
        yield f"mixed_lora {shape}", lambda *rows, f=lora: with_dx(f, *rows), (x, w, dy)
        yield f"mixed_linear {shape}", lambda *rows, f=linear: with_dx(f, *rows), (x, w, dy)
        yield f"head {shape}", lambda *rows, f=head: with_dx(f, *rows), (x, targets, ref, dy)
        yield (
            f"mixed head {shape}",
            lambda *rows, f=heads: with_dx(f, *rows),
            (x, targets, ref, w, dy),
        )


def varying_results(
    function: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...]
) -> list[str]:
    """Runs each row alone and in shuffled batches; names the outputs of which some bits differ."""
    alone = [function(*(t[b : b + 1] for t in rows)) for b in range(33)]
    varying = []
    for n in SIZES:
        order = torch.randperm(33)[:n]
        together = function(*(t[order] for t in rows))
        for k, whole in enumerate(together):
            wanted = torch.cat([alone[b][k] for b in order.tolist()])
            if not same_bits(whole, wanted):
                varying.append(f"output {k} in a batch of {n}")
    return varying


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_rows_keep_their_bits(dtype: torch.dtype) -> None:
    """Alone and in batches of 2 to 33, at any position: outputs and the gradient of x."""
    with batch_invariant():
        found = {name: varying_results(f, rows) for name, f, rows in invariance_cases(dtype)}
    assert not {name: varying for name, varying in found.items() if varying}


def test_batch_invariant_flat_tokens_keep_their_bits() -> None:
    x, W, A, B = (
        torch.randn(40, 64),
        torch.randn(48, 64),
        torch.randn(3, 4, 64),
        torch.randn(3, 48, 4),
    )
    weights, ids = torch.randn(5, 3), torch.randint(0, 5, (40,))
    with batch_invariant():
        whole = mixed_lora(x, W, A, B, weights, example_ids=ids)
        for t in range(40):
            row = weights[ids[t]][None]
            assert same_bits(mixed_lora(x[t : t + 1], W, A, B, row)[0], whole[t])


@pytest.mark.parametrize("vocab", [32_768, 50_257])
def test_batch_invariant_linear_logprob_of_a_large_vocabulary(vocab: int) -> None:
    """One row of 2^15 entries and more: PyTorch splits the sum of a single row between threads."""
    hidden, ref, head = torch.randn(4, 8), torch.randn(4, 8), torch.randn(vocab, 8)
    targets = torch.randint(0, vocab, (4,))
    with batch_invariant():
        whole = linear_logprob(hidden, head, targets, return_entropy=True, ref_hidden=ref)
        for b in range(4):
            one = slice(b, b + 1)
            alone = linear_logprob(
                hidden[one], head, targets[one], return_entropy=True, ref_hidden=ref[one]
            )
            for name in ("logprobs", "entropy", "kl"):
                assert same_bits(getattr(alone, name), getattr(whole, name)[one]), (name, b)


def test_the_mode_is_needed() -> None:
    """Without it some shape rounds differently in another batch size, on this machine."""
    found: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, function, rows in invariance_cases(dtype):
            if varying := varying_results(function, rows):
                found[name.split(" ")[0]] = varying
    for T, n_in, n_out in product((1, 4), (512, 1024), (256, 1024)):
        if "mixed_lora" in found:
            break
        x, W = torch.randn(33, T, n_in), torch.randn(n_out, n_in)
        A, B = torch.randn(2, 4, n_in), torch.randn(2, n_out, 4)

        def run(x: Tensor, w: Tensor, W: Tensor = W, A: Tensor = A, B: Tensor = B) -> tuple[Tensor]:
            return (mixed_lora(x, W, A, B, w),)

        if varying := varying_results(run, (x, torch.randn(33, 2))):
            found["mixed_lora"] = varying
    assert "mixed_lora" in found, (
        "batch_invariant() may be needless: every shape tried gave the same bits without it"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["geometric", "probability"])
@pytest.mark.parametrize("m", [1, 3, 5])
def test_mix_logits_rows_keep_their_bits(mode: str, m: int, dtype: torch.dtype) -> None:
    for vocab in (1, 7, 33, 1000, 40_000):
        logits, weights = (4 * torch.randn(m, 33, vocab)).to(dtype), torch.rand(33, m) + 0.01
        sizes = (1, 2, 33) if vocab > 1000 else (1, *SIZES)
        whole = mix_logits(logits, weights, mode=mode)
        for n in sizes:
            rows = torch.randperm(33)[:n]
            part = mix_logits(logits[:, rows], weights[rows], mode=mode)
            assert same_bits(part, whole[rows]), f"vocabulary {vocab}, batch of {n}"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mode", ["none", "geometric", "probability"])
@pytest.mark.parametrize("filtered", [False, True])
def test_sample_rows_keep_their_bits(mode: str, filtered: bool, backend: str) -> None:
    for m, vocab in ((1, 7), (3, 33), (5, 1000), (5, 40_000)):
        logits, weights = 4 * torch.randn(m, 33, vocab), torch.rand(33, m)
        rows = {
            "temperature": torch.rand(33) + 0.3,
            "seed": torch.randint(-(2**62), 2**62, (33,)),
            "position": torch.arange(33),
        }
        if filtered:
            rows |= {
                "top_k": torch.randint(0, 9, (33,)),
                "top_p": torch.rand(33) / 2 + 0.5,
                "min_p": torch.rand(33) / 5,
            }

        def run(b: Tensor, logits: Tensor = logits, w: Tensor = weights, rows: Any = rows) -> tuple:
            mixture = {} if mode == "none" else {"weights": w[b], "mode": mode}
            z = logits[0, b] if mode == "none" else logits[:, b]
            return sample(z, **mixture, **{k: v[b] for k, v in rows.items()}, backend=backend)

        whole = run(torch.arange(33))
        for n in (1, 2, 16, 17):
            b = torch.randperm(33)[:n]
            for part, wanted in zip(run(b), whole, strict=True):
                assert same_bits(part, wanted[b]), f"vocabulary {vocab}, m {m}, batch of {n}"


def test_batch_invariant_nests() -> None:
    with batch_invariant():
        with pytest.raises(KeyError), batch_invariant():
            raise KeyError
        assert is_batch_invariant()
    assert not is_batch_invariant()


NAN, INF, T3 = math.nan, math.inf, torch.tensor

# Errors: every bad argument raises the documented type, and the message names it and what came.


def valid(op: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    x, weights = torch.randn(3, 4), torch.rand(3, 2)
    base, A, B = torch.randn(5, 4), torch.randn(2, 1, 4), torch.randn(2, 5, 1)
    lora = {"x": x, "base_weight": base, "lora_A": A, "lora_B": B}
    numbers, states = {"seed": 1, "position": 0}, {"hidden": x, "targets": T3([0, -100, 5])}
    head = {
        "head_weight": torch.randn(6, 4),
        "bias": torch.randn(6),
        "ref_hidden": torch.randn(3, 4),
    }
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
    for value in ("x", None, 1j, [1, 1, 1], *([1.5] if integer else [])):
        yield case(op, TypeError, **{name: value})
    yield case(op, ValueError, **{name: torch.ones(2, dtype=torch.int64 if integer else None)})
    yield case(op, ValueError, **{name: torch.ones(3, 1, dtype=torch.int64 if integer else None)})
    yield case(op, ValueError, **{name: torch.ones(3, dtype=torch.int64, device="meta")})
    if integer:
        yield case(op, TypeError, **{name: torch.ones(3)})
    for value in outside:
        yield case(op, ValueError, **{name: value})
        if -(2**63) <= value < 2**63 or not integer:
            rows = torch.ones(3, dtype=torch.int64 if integer else torch.float32)
            yield case(op, ValueError, **{name: tampered(rows, value)})


BAD = [
    *wrong_tensors(),
    case("mixed_lora", ValueError, x=torch.randn(4)),
    case("mixed_lora", TypeError, x=torch.ones(3, 4, dtype=torch.int64)),
    case("mixed_lora", ValueError, x=[[1.0] * 4] * 3),
    case("mixed_linear", ValueError, x=torch.randn(4)),
    case("mixed_linear", TypeError, x=torch.ones(3, 4, dtype=torch.bool)),
    *(case("mixed_lora", ValueError, scaling=s) for s in (NAN, INF, T3([1.0, NAN]), torch.ones(3))),
    *(case("mixed_lora", TypeError, scaling=s) for s in ("x", None, T3([1, 2]))),
    case("mixed_lora", ValueError, scaling=torch.ones(2, device="meta")),
    *(
        case(op, error, example_ids=ids)
        for op in ("mixed_lora", "mixed_linear")
        for error, ids in (
            (TypeError, [0, 1, 2]),
            (TypeError, torch.zeros(3)),
            (TypeError, torch.zeros(3, dtype=torch.int16)),
            (ValueError, T3([0, 1])),
            (ValueError, T3([[0, 1, 2]])),
            (ValueError, T3([0, 1, 3])),
            (ValueError, T3([0, -1, 2])),
            (ValueError, torch.zeros(3, dtype=torch.int64, device="meta")),
        )
    ),
    case("mixed_lora", ValueError, example_ids=T3([0, 1, 2]), x=torch.randn(3, 2, 4)),
    *(case("mix_logits", ValueError, logits=z) for z in (torch.randn(3, 6), [[1.0]])),
    case("mix_logits", TypeError, logits=torch.ones(2, 3, 6, dtype=torch.int64)),
    *(
        case(op, ValueError, mode=s)
        for op in ("mix_logits", "sample_mixed")
        for s in ("max", None, 1)
    ),
    *(
        case(op, ValueError, mode="probability", weights=tampered(torch.rand(3, 2), -0.1))
        for op in ("mix_logits", "sample_mixed")
    ),
    *(
        case("sample", ValueError, logits=z)
        for z in (torch.randn(6), torch.randn(2, 3, 6), torch.randn(3, 0), [[0.0]])
    ),
    case("sample_mixed", ValueError, logits=torch.randn(3, 6)),
    case("sample", TypeError, logits=torch.ones(3, 6, dtype=torch.int64)),
    *(case("sample", ValueError, logits=tampered(torch.randn(3, 6), bad)) for bad in (NAN, INF)),
    case("sample", ValueError, logits=torch.full((3, 6), -INF)),
    *per_row_cases("sample", "temperature", (-0.5, NAN, INF)),
    *per_row_cases("sample", "top_k", (-1,), integer=True),
    *per_row_cases("sample", "top_p", (0.0, -0.1, 1.01, NAN)),
    *per_row_cases("sample", "min_p", (-0.1, 1.01, NAN)),
    *per_row_cases("sample", "seed", (2**63, -(2**63) - 1), integer=True),
    *per_row_cases("sample", "position", (2**63,), integer=True),
    *(case("linear_logprob", ValueError, hidden=h) for h in (torch.tensor(1.0), [1.0])),
    case("linear_logprob", TypeError, hidden=torch.ones(3, 4, dtype=torch.int64)),
    case("linear_logprob_mixed", ValueError, targets=T3(0), hidden=torch.randn(4)),
    *(case("linear_logprob", ValueError, targets=T3([0, 1, y])) for y in (6, -1, -99, -101)),
    case("linear_logprob", TypeError, targets=T3([0, 1, 2], dtype=torch.int32)),
    *(
        case("linear_logprob", ValueError, temperature=t)
        for t in (0.0, -1, NAN, INF, torch.ones(2), T3([1.0, 1.0, 0.0]))
    ),
    *(
        case("linear_logprob", ValueError, temperature=t)
        for t in (torch.ones(3, 3), torch.ones(3, device="meta"))
    ),
    *(case("linear_logprob", TypeError, temperature=t) for t in ("x", None)),
    *(
        case(op, ValueError, backend=b)
        for op in ("mixed_lora", "mixed_linear", "mix_logits", "sample", "linear_logprob")
        for b in ("numpy", "")
    ),
]


@pytest.mark.parametrize("op, changed, error, name", BAD)
def test_bad_arguments_are_named(
    op: str, changed: dict[str, Any], error: type[Exception], name: str
) -> None:
    function, arguments = valid(op)
    with pytest.raises(error, match=rf"^{name}\b.*(must|has no).*") as raised:
        function(**{**arguments, **changed})
    assert "got" in str(raised.value) or "logits row" in str(raised.value)


@pytest.mark.parametrize(
    "op", ["mixed_lora", "mixed_linear", "mix_logits", "sample", "linear_logprob"]
)
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


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 0, 2, 3), (0, 4, 2, 3), (4, 5, 0, 3), (4, 0, 2, 0),
                                   (0, 0, 2, 3), (0, 4, 0, 3)])  # fmt: skip
def test_axes_of_no_length_have_gradients(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> None:
    """in_features, out_features, the rank, the batch: what is left is the formula's."""
    n_in, n_out, r, B = sizes
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x, W, A, up = made(B, 2, n_in), made(n_out, n_in), made(2, r, n_in), made(2, n_out, r)
    experts = made(2, n_out, n_in)
    w = torch.rand(B, 2, generator=generator).requires_grad_()
    leaves = (x, W, A, up, experts, w)

    def gradients(low_rank: torch.Tensor, mixed: torch.Tensor) -> list[torch.Tensor]:
        assert low_rank.shape == mixed.shape == (B, 2, n_out)
        loss = low_rank.double().square().sum() + mixed.double().square().sum()
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    got = gradients(
        mixed_lora(x, W, A, up, w, backend=backend),
        mixed_linear(x, experts, w, backend=backend),
    )
    X, base, down, B64, E, rows = (t.double() for t in leaves)
    update = torch.einsum("bsi,mri,mor,bm->bso", X, down, B64, rows)
    wanted = gradients(X @ base.t() + update, torch.einsum("bsi,moi,bm->bso", X, E, rows))
    for mine, theirs, leaf in zip(got, wanted, leaves, strict=True):
        assert mine.shape == leaf.shape and mine.dtype == leaf.dtype
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.1, atol=0.1)


# What the environment of a call must not change.


def every_result() -> list[Tensor]:
    """Outputs and gradients of all ops, few and many tokens, float32 and bfloat16."""
    found: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        values = torch.randn(*shape, dtype=F32, generator=generator)
        return values.to(dtype).requires_grad_()

    def keep(*outputs: Tensor | None, of: list[Tensor]) -> None:
        given = [t for t in outputs if t is not None]
        found.extend(t.detach() for t in given)
        found.extend(torch.autograd.grad([t.sum() for t in given], of))

    for dtype in (F32, BF16):
        for tokens in (2, 40):
            x, weights = draw(tokens, 24, dtype=dtype), draw(tokens, 3)
            base, bias = draw(160, 24, dtype=dtype), draw(160, dtype=dtype)
            a, b = draw(3, 4, 24), draw(3, 160, 4)
            with torch.no_grad():
                found.append(mixed_lora(x, base, a, b, weights, bias=bias))
            y = mixed_lora(x, base, a, b, weights, bias=bias, scaling=2)
            keep(y, of=[x, base, a, b, weights, bias])
            experts = draw(3, 30, 24, dtype=dtype)
            keep(mixed_linear(x, experts, weights), of=[x, experts, weights])
            targets = torch.arange(tokens)
            head, other = draw(50, 24, dtype=dtype), draw(tokens, 24, dtype=dtype).detach()
            out = linear_logprob(x, head, targets, return_entropy=True, ref_hidden=other)
            keep(*out, of=[x, head])
            frozen = linear_logprob(x, head.detach(), targets, ref_hidden=other)
            keep(frozen.logprobs, frozen.kl, of=[x])
            mixed = linear_logprob(x, experts, targets % 30, weights=weights)
            keep(mixed.logprobs, of=[x, experts, weights])
        logits = draw(3, 5, 64, dtype=dtype)
        keep(mix_logits(logits, weights[:5]), of=[logits, weights])
        for view in (logits[0], logits[0, :, ::2], logits):
            one = weights[:5].detach() if view.dim() == 3 else None
            found += sample(view.detach(), weights=one, top_p=0.9, seed=1, position=1)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, BF16, F16])
def test_the_default_dtype_changes_no_bit(dtype: torch.dtype) -> None:
    """transformers sets it while it loads a model; a buffer of the kernels is float32 whatever it
    is, or they would write beyond its end."""
    wanted = every_result()
    torch.set_default_dtype(dtype)
    try:
        got = every_result()
    finally:
        torch.set_default_dtype(F32)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and same_bits(one, other)


@pytest.mark.parametrize("scaling", [2**64, -(10**30), 10**400, -(10**400)])
@pytest.mark.parametrize("grad", [False, True])
def test_integers_of_any_size_as_scaling(scaling: int, grad: bool) -> None:
    args = [torch.ones(1, 160), torch.ones(160, 160), torch.ones(2, 4, 160), torch.ones(2, 160, 4)]
    args[2].requires_grad_(grad)
    weights = torch.ones(1, 2)
    if abs(scaling) > 10**300:
        with pytest.raises(ValueError, match=r"scaling must be finite, got -?inf"):
            mixed_lora(*args, weights, scaling=scaling)
    else:
        got = mixed_lora(*args, weights, scaling=scaling)
        assert torch.equal(got, mixed_lora(*args, weights, scaling=float(scaling)))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_tensors_without_memory_are_read_by_no_kernel(backend: str) -> None:
    """Zeros that PyTorch does not store, and a tensor whose storage was freed."""
    m, n = 2, 160
    inputs = {
        "x": torch.randn(1, n), "base_weight": torch.randn(n, n), "lora_A": torch.randn(m, 4, n),
        "lora_B": torch.randn(m, n, 4), "weights": torch.randn(1, m), "bias": torch.randn(n),
    }  # fmt: skip
    for name, tensor in inputs.items():
        zeros = torch._efficientzerotensor(tensor.shape)
        freed = tensor.clone()
        freed.untyped_storage().resize_(0)
        wanted = mixed_lora(**(inputs | {name: torch.zeros_like(tensor)}), backend="reference")
        for missing in (zeros, freed):
            try:
                got = mixed_lora(**(inputs | {name: missing}), backend=backend)
            except (TypeError, RuntimeError):
                continue
            assert missing is zeros
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["x", "base_weight", "lora_A", "lora_B", "weights", "bias"])
def test_forward_mode_differentiation_is_refused(name: str, grad: bool) -> None:
    """There is no formula for tangents; they must not be lost, nor those of the base alone kept."""
    n = 160  # large enough for the fast path's own base product
    inputs = {
        "x": torch.randn(2, n), "base_weight": torch.randn(n, n), "lora_A": torch.randn(2, 4, n),
        "lora_B": torch.randn(2, n, 4), "weights": torch.randn(2, 2), "bias": torch.randn(n),
    }  # fmt: skip
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            mixed_lora(**(inputs | {name: dual}))
