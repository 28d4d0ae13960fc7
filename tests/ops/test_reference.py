"""The reference ops against oracles that share no code with them, and gradcheck of every op."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
import transformers
from cases import PHILOX_ANSWERS, linear_plain, lora_plain
from torch import Tensor

import clp_kernels
from clp_kernels import linear_logprob, mix_logits, mixed_linear, mixed_lora
from clp_kernels.ops.linear_logprob import reference as head_reference
from clp_kernels.ops.mix_logits import reference as mix_reference
from clp_kernels.ops.mixed_linear import reference as linear_reference
from clp_kernels.ops.mixed_lora import reference as lora_reference
from clp_kernels.ops.sample import reference as sample_reference

F64 = torch.float64
sample = partial(clp_kernels.sample, backend="reference")
pytestmark = pytest.mark.usefixtures("one_thread")


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def close(got: Tensor, wanted: Tensor | list) -> None:
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=F64), rtol=1e-11, atol=1e-12)


# Oracles: scalar loops over Python floats, straight from the formulas of the docstrings.


def linear_loop(x: list[float], weight: list[list[float]]) -> list[float]:
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]


def lora_loop(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, weights: Tensor, bias: Tensor | None, ids: list
) -> Tensor:
    """x [T, in] -> [T, out]: every token, adapter, output and input by itself."""
    out = torch.zeros(x.shape[0], base.shape[0], dtype=F64)
    for t, b in enumerate(ids):
        for o in range(base.shape[0]):
            total = 0.0 if bias is None else bias[o].item()
            for k in range(x.shape[1]):
                total += x[t, k].item() * base[o, k].item()
            for i in range(A.shape[0]):
                for rank in range(A.shape[1]):
                    shrunk = sum(x[t, k].item() * A[i, rank, k].item() for k in range(x.shape[1]))
                    total += weights[b, i].item() * shrunk * B[i, o, rank].item()
            out[t, o] = total
    return out


def softmax_loop(z: list[float]) -> list[float]:
    top = max(z)
    terms = [math.exp(v - top) for v in z]
    return [t / sum(terms) for t in terms]


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 as in Salmon et al., SC 2011, on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        words = (high >> 32) ^ c[1] ^ k[0], high, (low >> 32) ^ c[3] ^ k[1], low
        c = [word & 0xFFFFFFFF for word in words]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


IDS = [0, 2, 2, 1, 0]


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_mixed_lora(with_bias: bool, invariant: bool) -> None:
    x, base, A, B = rand(5, 4), rand(3, 4), rand(2, 3, 4), rand(2, 3, 3)
    weights, bias = rand(3, 2), rand(3) if with_bias else None
    wanted = lora_loop(x, base, A, B, weights, bias, IDS)
    args = (x, base, A, B, weights, bias, torch.tensor(IDS), invariant)
    y, u = lora_reference.mixed_lora(lora_reference.Inputs(*args))
    close(y, wanted)
    shrunk = [[v for i in range(2) for v in linear_loop(row, A[i].tolist())] for row in x.tolist()]
    close(u, shrunk)


def test_mixed_lora_padded_layout_and_scaling() -> None:
    x, base, A, B = rand(2, 2, 3, 4), rand(3, 4), rand(2, 1, 4), rand(2, 3, 1)
    weights = rand(2, 2)
    for scaling in (torch.tensor([0.5, -3.0], dtype=F64), 2):
        y = mixed_lora(x, base, A, B, weights, scaling=scaling)
        wanted = lora_loop(x.view(12, 4), base, A, B, weights * scaling, None, [0] * 6 + [1] * 6)
        close(y.view(12, 3), wanted)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_mixed_linear(with_bias: bool, invariant: bool) -> None:
    x, experts, weights = rand(5, 4), rand(3, 2, 4), rand(3, 3)
    bias = rand(3, 2) if with_bias else None
    wanted = torch.zeros(5, 2, dtype=F64)
    for t, b in enumerate(IDS):
        for i in range(3):
            for o, product in enumerate(linear_loop(x[t].tolist(), experts[i].tolist())):
                extra = 0.0 if bias is None else bias[i, o].item()
                wanted[t, o] += weights[b, i].item() * (product + extra)
    args = (x, experts, weights, bias, torch.tensor(IDS), invariant)
    close(linear_reference.mixed_linear(linear_reference.Inputs(*args)), wanted)


def test_mix_logits() -> None:
    logits, weights = 3 * rand(2, 3, 5), torch.rand(3, 2, dtype=F64)
    for b in range(3):
        rows, w = logits[:, b].tolist(), weights[b].tolist()
        geometric = [w[0] * p + w[1] * q for p, q in zip(*rows, strict=True)]
        probs = [softmax_loop(row) for row in rows]
        mixture = [math.log(w[0] * p + w[1] * q) for p, q in zip(*probs, strict=True)]
        close(mix_reference.mix_logits(logits, weights, "geometric")[b], geometric)
        close(mix_reference.mix_logits(logits, weights, "probability")[b], mixture)


def test_mix_logits_of_minus_infinity() -> None:
    inf = math.inf
    logits = torch.tensor([[[-inf, -inf, 1.0]], [[2.0, -inf, 3.0]]], dtype=F64)
    rows = {
        (0.0, 1.0): [2.0, -inf, 3.0],
        (0.5, 0.5): [-inf, -inf, 2.0],
        (-1.0, 1.0): [-inf, -inf, 2.0],
        (0.0, 0.0): [0.0, 0.0, 0.0],
    }
    for row, wanted in rows.items():
        assert mix_logits(logits, torch.tensor([row], dtype=F64))[0].tolist() == wanted
    half = mix_logits(logits, torch.tensor([[0.5, 0.5]], dtype=F64), mode="probability")[0]
    q = softmax_loop([2.0, 3.0])
    close(half[[0, 2]], [math.log(0.5 * q[0]), math.log(0.5 + 0.5 * q[1])])
    assert half[1] == -inf
    nothing = mix_logits(logits, torch.zeros(1, 2, dtype=F64), mode="probability")
    assert (nothing == -inf).all()


@pytest.mark.parametrize("mixed", [False, True], ids=["one head", "mixed head"])
def test_linear_logprob(mixed: bool) -> None:
    hidden, ref_hidden = rand(2, 3, 4), rand(2, 3, 4)
    head, bias = (rand(2, 7, 4), rand(2, 7)) if mixed else (rand(7, 4), rand(7))
    weights = rand(2, 2) if mixed else None
    targets = torch.tensor([[0, 6, -100], [3, -100, 3]])
    # Exact in float32, the dtype in which temperatures travel.
    tau = torch.tensor([[0.5, 1.0, 2.0], [1.0, 4.0, 0.25]])
    extras = {"temperature": tau, "return_entropy": True, "ref_hidden": ref_hidden}
    got = linear_logprob(hidden, head, targets, bias=bias, weights=weights, **extras)
    for b in range(2):
        W, c = head, bias
        if weights is not None:
            W = sum(weights[b, i] * head[i] for i in range(2))
            c = sum(weights[b, i] * bias[i] for i in range(2))
        for t in range(3):
            products = (linear_loop(s[b, t].tolist(), W.tolist()) for s in (hidden, ref_hidden))
            added = [zip(product, c.tolist(), strict=True) for product in products]
            p, q = (softmax_loop([(v + e) / tau[b, t].item() for v, e in z]) for z in added)
            y = int(targets[b, t])
            wanted = [0.0, 0.0, 0.0]
            if y != -100:
                wanted[0] = math.log(p[y])
                wanted[1] = -sum(v * math.log(v) for v in p)
                wanted[2] = sum(v * math.log(v / u) for v, u in zip(p, q, strict=True))
            close(torch.stack([column[b, t] for column in got]), wanted)


def test_linear_logprob_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row chunks change neither the outputs nor the gradients (by default they are 2^22 logits)."""

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        shapes = ((3, 4, 5), (2, 9, 5), (2, 9), (3, 2))
        hidden, head, bias, weights = inputs = [rand(*s).requires_grad_() for s in shapes]
        targets = torch.randint(0, 9, (3, 4))
        extras = {"return_entropy": True, "ref_hidden": rand(3, 4, 5)}
        out = linear_logprob(hidden, head, targets, bias=bias, weights=weights, **extras)
        loss = sum((c * rand(3, 4)).sum() for c in out)
        return [*out, *torch.autograd.grad(loss, inputs)]

    whole = run()
    seen: list[int] = []

    def chunks(num_tokens: int, vocab_size: int) -> list[slice]:
        seen.append(num_tokens)
        return [slice(start, start + 5) for start in range(0, num_tokens, 5)]

    monkeypatch.setattr(head_reference, "chunks", chunks)
    for got, wanted in zip(run(), whole, strict=True):
        close(got, wanted)
    assert seen == [12, 12]


def test_linear_logprob_chunks_bound_the_logits() -> None:
    for tokens, vocab in ((1, 151_936), (8192, 151_936), (100_000, 32_000), (3, 2**23)):
        chunks = head_reference.chunks(tokens, vocab)
        covered = [t for c in chunks for t in range(tokens)[c]]
        assert covered == list(range(tokens))
        assert all((c.stop - c.start) * vocab <= max(2**22, vocab) for c in chunks)


SHAPES = {
    "mixed_lora": ((5, 4), (3, 4), (2, 2, 4), (2, 3, 2), (3, 2), (3,)),
    "mixed_linear": ((5, 4), (2, 3, 4), (3, 2), (2, 3)),
}


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_backward_op(name: str, invariant: bool) -> None:
    inputs, ids = [rand(*shape).requires_grad_() for shape in SHAPES[name]], torch.tensor(IDS)
    *matrices, weights, bias = inputs
    if name == "mixed_lora":
        y, u = lora_plain(*matrices, weights[ids], bias)
    else:
        y, u = linear_plain(*matrices, weights[ids], bias), None

    def backward(needs: list[bool]) -> tuple[Tensor, ...]:
        if name == "mixed_lora":
            call = lora_reference.Inputs(*inputs, ids, invariant)
            return lora_reference.mixed_lora_backward(call, dy, u, needs)
        call = linear_reference.Inputs(*inputs, ids, invariant)
        return linear_reference.mixed_linear_backward(call, dy, needs)

    dy, every = torch.randn_like(y), [True] * len(inputs)
    wanted = torch.autograd.grad(y, inputs, dy)
    with torch.no_grad():
        for got, grad in zip(backward(every), wanted, strict=True):
            close(got, grad)
        for i in range(len(inputs)):
            chosen = [j == i for j in range(len(inputs))]
            only = backward(chosen)
            assert [g.numel() > 0 for g in only] == chosen
            close(only[i], wanted[i])


# gradcheck through the public functions: every differentiable input, alone and together.


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    for t in inputs:
        t.requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)


LAYOUTS = {
    "x [B, in]": ((3, 4), None),
    "x [B, T, in]": ((3, 2, 4), None),
    "x [T, in] with example_ids": ((5, 4), torch.tensor(IDS, dtype=torch.int32)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_mixed_lora(layout: str) -> None:
    shape, ids = LAYOUTS[layout]

    def run(x, W, A, B, weights, scaling, bias):  # type: ignore[no-untyped-def]
        return mixed_lora(x, W, A, B, weights, scaling=scaling, bias=bias, example_ids=ids)

    shapes = (shape, (3, 4), (2, 2, 4), (2, 3, 2), (3, 2), (2,), (3,))
    gradcheck(run, *(rand(*s) for s in shapes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_mixed_linear(layout: str) -> None:
    shape, ids = LAYOUTS[layout]

    def run(x, experts, weights, bias):  # type: ignore[no-untyped-def]
        return mixed_linear(x, experts, weights, bias=bias, example_ids=ids)

    gradcheck(run, rand(*shape), rand(2, 3, 4), rand(3, 2), rand(2, 3))


@pytest.mark.parametrize("mode", ["geometric", "probability"])
def test_gradcheck_mix_logits(mode: str) -> None:
    weights = torch.rand(3, 2, dtype=F64) + 0.1
    gradcheck(lambda z, w: mix_logits(z, w, mode=mode), rand(2, 3, 5), weights)


def test_gradcheck_mix_logits_beside_minus_infinity() -> None:
    """Entries where the mixture is -inf pass no gradient, and leave the others' alone."""
    hole = torch.tensor([False, True, False, False, True])

    def run(z: Tensor, w: Tensor) -> Tensor:
        return mix_logits(z.masked_fill(hole, -math.inf), w)[:, ~hole]

    gradcheck(run, rand(2, 3, 5), torch.rand(3, 2, dtype=F64) + 0.1)
    z = rand(2, 3, 5).masked_fill_(hole, -math.inf).requires_grad_()
    mix_logits(z, torch.rand(3, 2, dtype=F64)).sum().backward()
    assert z.grad is not None
    assert (z.grad[..., hole] == 0).all()
    assert (z.grad[..., ~hole] != 0).all()


@pytest.mark.parametrize("mode", ["geometric", "probability"])
@pytest.mark.parametrize("level", [-1e4, -1e9])
def test_mix_logits_gradient_at_vanishing_probability(mode: str, level: float) -> None:
    """A token masked by a large finite number has probability 0 in float32: no 0 / 0."""
    values = rand(2, 3, 5)
    values[..., 0] = level
    weights64 = torch.rand(3, 2, dtype=F64) + 0.1
    results = []
    for dtype in (torch.float32, F64):
        z, w = values.to(dtype).requires_grad_(), weights64.to(dtype).requires_grad_()
        p = mix_logits(z, w, mode=mode).softmax(-1)
        results.append(torch.autograd.grad((p * torch.arange(5)).sum(), (z, w)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixed", [False, True], ids=["one head", "mixed head"])
@pytest.mark.parametrize("outputs", ["logprobs", "entropy", "kl", "all"])
def test_gradcheck_linear_logprob(outputs: str, mixed: bool) -> None:
    """With an ignored target, a bias, and a temperature for each token."""
    targets = torch.tensor([[0, -100], [3, 2]])
    tau = torch.tensor([[0.5, 1.0], [4.0, 0.75]])
    ref = rand(2, 2, 3)
    shapes = [(2, 5, 3), (2, 5), (2, 2)] if mixed else [(5, 3), (5,)]

    def run(h, W, bias, *w):  # type: ignore[no-untyped-def]
        # The reference uses the same head, so its share of the gradient is part of the check.
        entropy, kl = (outputs in (name, "all") for name in ("entropy", "kl"))
        extras = {"return_entropy": entropy, "ref_hidden": ref if kl else None}
        weights = w[0] if w else None
        out = linear_logprob(h, W, targets, bias=bias, weights=weights, temperature=tau, **extras)
        if outputs == "all":
            return out.logprobs + 2 * out.entropy + 3 * out.kl
        return getattr(out, outputs)

    gradcheck(run, rand(2, 2, 3), *(rand(*s) for s in shapes))


def test_linear_logprob_ignored_targets_pass_no_gradient() -> None:
    hidden, ref = rand(4, 3).requires_grad_(), rand(4, 3).requires_grad_()
    targets = torch.tensor([1, -100, 0, -100])
    out = linear_logprob(hidden, rand(5, 3), targets, return_entropy=True, ref_hidden=ref)
    assert out.entropy is not None and out.kl is not None
    (out.logprobs + out.entropy + out.kl).sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[targets == -100] == 0).all()
    assert (hidden.grad[targets != -100] != 0).any(-1).all()
    assert ref.grad is None


@pytest.mark.parametrize("name", ["mixed_lora", "mixed_linear", "mix_logits", "linear_logprob"])
def test_second_derivatives_raise(name: str) -> None:
    """The docstrings say "differentiable (once)": a second time must not be silently wrong."""
    x = rand(2, 3).requires_grad_()
    y = {
        "mixed_lora": lambda: mixed_lora(x, rand(4, 3), rand(2, 1, 3), rand(2, 4, 1), rand(2, 2)),
        "mixed_linear": lambda: mixed_linear(x, rand(2, 4, 3), rand(2, 2)),
        "mix_logits": lambda: mix_logits(x[None], torch.rand(2, 1, dtype=F64), mode="probability"),
        "linear_logprob": lambda: linear_logprob(x, rand(5, 3), torch.tensor([0, 1])).logprobs,
    }[name]()
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|twice|second"):
        first.sum().backward()


def uniform_words(seed: int, position: int, vocab: int) -> list[int]:
    """The 32-bit words behind philox_uniform."""
    u = sample_reference.philox_uniform(torch.tensor([seed]), torch.tensor([position]), vocab)[0]
    words = u * 2**32 - 0.5
    assert (words == words.round()).all()
    return words.long().tolist()


@pytest.mark.parametrize("counter, key", PHILOX_ANSWERS)
def test_philox_oracle_meets_the_known_answers(counter: tuple, key: tuple) -> None:
    assert [f"{w:08x}" for w in philox4x32(counter, key)] == PHILOX_ANSWERS[counter, key].split()


def test_philox_known_answer() -> None:
    """Counter 0, key 0 is seed 0, position 0, tokens 0 to 3 (the others need a last word > 0)."""
    words = " ".join(f"{w:08x}" for w in uniform_words(0, 0, 4))
    assert words == PHILOX_ANSWERS[(0,) * 4, (0,) * 2]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, -(2**31) - 5, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, 7, 2**32 - 1, 2**32, 2**40 + 3])
def test_philox_uniform(seed: int, position: int) -> None:
    def words(value: int) -> tuple[int, int]:
        return value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF

    got = uniform_words(seed, position, 11)
    blocks = [philox4x32((i, *words(position), 0), words(seed)) for i in range(3)]
    assert got == [w for block in blocks for w in block][:11]


def test_philox_uniform_of_a_row_ignores_batch_and_vocabulary() -> None:
    seed, position = torch.tensor([5, -9, 2**50]), torch.tensor([0, 3, 2**33])
    whole = sample_reference.philox_uniform(seed, position, 1001)
    for b in range(3):
        alone = sample_reference.philox_uniform(seed[b : b + 1], position[b : b + 1], 17)
        assert torch.equal(alone[0], whole[b, :17])


def test_gumbel_at_both_ends() -> None:
    """-log(-log u) at the smallest and largest uniforms and around 1/2, to 15 digits."""
    words = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    u = (torch.tensor(words, dtype=F64) + 0.5) * 2.0**-32
    assert ((u > 0) & (u < 1)).all()
    with localcontext() as context:
        context.prec = 50
        exact = [-(-((Decimal(w) + Decimal("0.5")) / 2**32).ln()).ln() for w in words]
    got = sample_reference.gumbel(u)
    assert got.isfinite().all()
    wanted = torch.tensor([float(e) for e in exact], dtype=F64)
    torch.testing.assert_close(got, wanted, rtol=4e-15, atol=4e-15)


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-square statistic."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((counts.numel() - 1) / 2, dtype=F64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


DRAWS = 20_000


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_sample_draws_from_the_softmax(vary: str) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -0.5, 1.0])
    numbers = torch.arange(DRAWS)
    given = {"seed": 3, "position": 4, vary: numbers}
    out = sample(logits.expand(DRAWS, 6), temperature=1.5, **given)
    counts = torch.bincount(out.tokens, minlength=6).double()
    expected = DRAWS * torch.softmax(logits.double() / 1.5, -1)
    assert p_value(counts, expected) > 1e-3
    close(out.logprobs.double().unique().exp().sum() * 1e5 // 1, 1e5)
    # Draws at neighbouring positions (or seeds) are independent.
    pairs = torch.bincount(6 * out.tokens[::2] + out.tokens[1::2], minlength=36).double()
    expected_pairs = (expected[:, None] * expected[None]).flatten() / DRAWS / 2
    assert p_value(pairs, expected_pairs) > 1e-3


def test_p_value_sees_a_wrong_distribution() -> None:
    counts = torch.tensor([5300.0, 4700.0], dtype=F64)
    assert p_value(counts, torch.full((2,), 5000.0, dtype=F64)) < 1e-6
    assert p_value(counts - torch.tensor([290, -290]), torch.full((2,), 5000.0, dtype=F64)) > 0.1


def kept_sets(logits: Tensor, **filters: float | Tensor) -> Tensor:
    """Whether each token of each row is kept, seen from outside: drawn in 4,000 positions.

    Probabilities must be large enough to be seen; filtered_logprobs pins the mass exactly.
    """
    positions = torch.arange(4000)
    kept = torch.zeros(logits.shape, dtype=torch.bool)
    for b, row in enumerate(logits):
        per_row = {k: v[b].item() if isinstance(v, Tensor) else v for k, v in filters.items()}
        out = sample(row.expand(4000, -1), seed=b, position=positions, **per_row)
        kept[b, out.tokens] = True
        logp = torch.log_softmax(row.double() / per_row.get("temperature", 1.0), -1)
        renormalised = torch.log_softmax(logp.masked_fill(~kept[b], -math.inf), -1)
        torch.testing.assert_close(out.filtered_logprobs, renormalised[out.tokens].float())
        torch.testing.assert_close(out.logprobs, logp[out.tokens].float())
    return kept


FILTERS = [
    {"top_k": 3},
    {"top_k": 1},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"top_p": 0.97},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 0.5, "top_k": 6, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.9, "min_p": 0.3},
    {"temperature": 1.5, "top_p": 0.7, "min_p": 0.4},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_sample_filters_keep_what_transformers_keeps(filters: dict) -> None:
    # Tie-free, and no probability so small that 4,000 draws could miss it.
    logits = torch.stack([torch.randperm(9) * 0.37 - 1.5 for _ in range(4)])
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    chosen = [make(filters[name]) for name, make in warpers.items() if name in filters]
    chain = transformers.LogitsProcessorList(chosen)
    wanted = chain(torch.zeros(4, 1, dtype=torch.long), logits.clone()) > -math.inf
    assert torch.equal(kept_sets(logits, **filters), wanted)


def test_sample_filters_a_row_each() -> None:
    logits = (torch.randperm(7) * 0.5).expand(4, 7)
    filters = {
        "top_k": torch.tensor([1, 2, 0, 7]),
        "top_p": torch.tensor([1.0, 1.0, 0.5, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.5]),
        "temperature": torch.tensor([1.0, 2.0, 3.0, 1.0]),
    }
    got, together = kept_sets(logits, **filters), sample(logits, seed=7, position=8, **filters)
    for b in range(4):
        one = {name: values[b].item() for name, values in filters.items()}
        assert torch.equal(kept_sets(logits[b : b + 1], **one)[0], got[b])
        alone = sample(logits[b : b + 1], seed=7, position=8, **one)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))


TIED = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]])


@pytest.mark.parametrize(
    "filters, kept",
    [
        ({"top_k": 2}, {1, 2, 3, 5}),
        ({"top_k": 4}, {1, 2, 3, 5}),
        ({"top_k": 5}, {0, 1, 2, 3, 5}),
        # p = 0.437 for token 1, 0.161 for each of the three ties, 0.059 for token 0.
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.5}, {1, 2, 3, 5}),
        ({"top_p": 0.86}, {1, 2, 3, 5}),
        ({"top_p": 0.93}, {0, 1, 2, 3, 5}),
        ({"min_p": math.exp(-1.0) - 1e-6}, {1, 2, 3, 5}),
        ({"min_p": math.exp(-1.0) + 1e-6}, {1}),
    ],
    ids=str,
)
def test_sample_filters_keep_all_ties(filters: dict, kept: set[int]) -> None:
    """Ties at a filter's threshold are all kept."""
    assert set(kept_sets(TIED, **filters)[0].nonzero().flatten().tolist()) == kept


def test_sample_greedy() -> None:
    """Temperature 0: the largest logit, the lowest index on ties, whatever the filters."""
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-1.0, -5.0, 0.0]])
    for filters in ({}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 0.9}):
        for seed in range(5):
            out = sample(logits, temperature=0, seed=seed, position=seed, **filters)
            assert out.tokens.tolist() == [1, 0, 2]
            assert out.filtered_logprobs.tolist() == [0.0, 0.0, 0.0]
            wanted = torch.log_softmax(logits.double(), -1)[torch.arange(3), out.tokens]
            torch.testing.assert_close(out.logprobs, wanted.float())
    mixed = sample(logits, temperature=torch.tensor([0.0, 1.0, 0.0]), seed=1, position=2)
    assert mixed.tokens[[0, 2]].tolist() == [1, 2]


def test_sample_never_draws_minus_infinity() -> None:
    logits = torch.full((3000, 8), -math.inf)
    logits[:, 5] = 0.0
    logits[:1500, 2] = -4.0
    out = sample(logits, seed=torch.arange(3000), position=1)
    assert set(out.tokens[:1500].tolist()) == {2, 5}
    assert set(out.tokens[1500:].tolist()) == {5}
    assert (out.logprobs[1500:] == 0).all()


@pytest.mark.parametrize("mode", ["geometric", "probability"])
def test_sample_mixes(mode: str) -> None:
    """sample(logits, weights) is sample(mix_logits(logits, weights)) in one pass."""
    logits, weights = 2 * rand(3, 50, 20), torch.rand(50, 3, dtype=F64)
    seed = torch.arange(50)
    got = sample(logits, weights=weights, mode=mode, seed=seed, position=9, top_p=0.8)
    two = sample(mix_logits(logits, weights, mode=mode), seed=seed, position=9, top_p=0.8)
    assert torch.equal(got.tokens, two.tokens)
    torch.testing.assert_close(got.logprobs, two.logprobs)
    torch.testing.assert_close(got.filtered_logprobs, two.filtered_logprobs)
    assert len(set(got.tokens.tolist())) > 5
