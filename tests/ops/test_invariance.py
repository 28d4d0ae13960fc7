"""Invariance to the batch, to the bit: of every op in batch_invariant(), or always."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import cases
import pytest
import torch
from cases import BF16, F16, F32, MODES, same_bits
from torch import Tensor

from clp_kernels import linear_logprob, mix_logits, mixed_linear, mixed_lora, sample
from clp_kernels.invariant import batch_invariant, is_batch_invariant

SIZES = (2, 3, 5, 8, 15, 16, 17, 31, 32, 33)
Rows = dict[str, Tensor]
Results = tuple[Tensor, ...]


def with_dx(function: Callable[..., Any], dy: Tensor, **rows: Tensor) -> Results:
    """The outputs, and the gradient of the first argument."""
    first, x = next(iter(rows.items()))
    rows[first] = x = x.detach().requires_grad_()
    outputs = function(**rows)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    loss = sum((o * (dy[..., 0].float() if o.dim() == 2 else dy)).sum() for o in outputs)
    return *outputs, torch.autograd.grad(loss, x)[0]


def invariance_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Results], Rows]]:
    """(name, function of rows [n, ...], rows of 33 examples) for the ops that need the mode."""
    for T, n_in, n_out, m, r in ((1, 64, 172, 2, 4), (1, 172, 64, 5, 16), (3, 64, 64, 1, 1)):

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype)

        x, w, dy = rand(33, T, n_in), torch.randn(33, m), rand(33, T, n_out)
        W, A, B, c = rand(n_out, n_in), rand(m, r, n_in), rand(m, n_out, r), rand(n_out)
        experts, biases = rand(m, n_out, n_in), rand(m, n_out)
        targets, ref = torch.randint(0, n_out, (33, T)), rand(33, T, n_in)
        lora = partial(mixed_lora, base_weight=W, lora_A=A, lora_B=B, bias=c)
        linear = partial(mixed_linear, expert_weight=experts, bias=biases)
        head = partial(linear_logprob, head_weight=W, bias=c, return_entropy=True)
        heads = partial(linear_logprob, head_weight=experts, bias=biases, return_entropy=True)
        mixed, states = {"x": x, "weights": w}, {"hidden": x, "targets": targets, "ref_hidden": ref}
        for name, function, rows in (
            ("mixed_lora", lora, mixed),
            ("mixed_linear", linear, mixed),
            ("head", head, states),
            ("mixed head", heads, {**states, "weights": w}),
        ):
            shape = f"T={T} {n_in} to {n_out} m={m}"
            yield f"{name} {shape}", partial(with_dx, function), {**rows, "dy": dy}


def varying_results(function: Callable[..., Results], rows: Rows) -> list[str]:
    """Runs each row alone and in shuffled batches; names the outputs of which some bits differ."""

    def of(index: Any) -> Results:
        return function(**{name: t[index] for name, t in rows.items()})

    alone = [of(slice(b, b + 1)) for b in range(33)]
    varying = []
    for n in SIZES:
        order = torch.randperm(33)[:n]
        for k, whole in enumerate(of(order)):
            wanted = torch.cat([alone[b][k] for b in order.tolist()])
            if not same_bits(whole, wanted):
                varying.append(f"output {k} in a batch of {n}")
    return varying


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_batch_invariant_rows_keep_their_bits(dtype: torch.dtype) -> None:
    """Alone and in batches of 2 to 33, at any position: outputs and the gradient of x."""
    with batch_invariant():
        found = {name: varying_results(f, rows) for name, f, rows in invariance_cases(dtype)}
    assert not {name: varying for name, varying in found.items() if varying}


def test_batch_invariant_flat_tokens_keep_their_bits() -> None:
    x, W = torch.randn(40, 64), torch.randn(48, 64)
    A, B = torch.randn(3, 4, 64), torch.randn(3, 48, 4)
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
            extras = {"return_entropy": True, "ref_hidden": ref[one]}
            alone = linear_logprob(hidden[one], head, targets[one], **extras)
            for name, got, wanted in zip(whole._fields, alone, whole, strict=True):
                assert same_bits(got, wanted[one]), (name, b)


def test_the_mode_is_needed() -> None:
    """Without it some shape rounds differently in another batch size, on this machine."""
    found: dict[str, list[str]] = {}
    for dtype in (F32, BF16):
        for name, function, rows in invariance_cases(dtype):
            if varying := varying_results(function, rows):
                found[name.split(" ")[0]] = varying
    for T, n_in, n_out in product((1, 4), (512, 1024), (256, 1024)):
        if "mixed_lora" in found:
            break
        x, W = torch.randn(33, T, n_in), torch.randn(n_out, n_in)
        A, B = torch.randn(2, 4, n_in), torch.randn(2, n_out, 4)
        lora = partial(mixed_lora, base_weight=W, lora_A=A, lora_B=B)
        rows = {"x": x, "weights": torch.randn(33, 2)}
        if varying := varying_results(lambda lora=lora, **rows: (lora(**rows),), rows):
            found["mixed_lora"] = varying
    assert "mixed_lora" in found, (
        "batch_invariant() may be needless: every shape tried gave the same bits without it"
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("mode", MODES)
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
@pytest.mark.parametrize("mode", ["none", *MODES])
@pytest.mark.parametrize("filtered", [False, True])
def test_sample_rows_keep_their_bits(mode: str, filtered: bool, backend: str) -> None:
    for m, vocab in ((1, 7), (3, 33), (5, 1000), (5, 40_000)):
        args: cases.Draw = {"logits": 4 * torch.randn(m, 33, vocab)}
        mixture = {"weights": torch.rand(33, m), "mode": mode}
        args |= {} if mode == "none" else mixture
        args |= {"temperature": torch.rand(33) + 0.3, "position": torch.arange(33)}
        args["seed"] = torch.randint(-(2**62), 2**62, (33,))
        if filtered:
            args["top_k"] = torch.randint(0, 9, (33,))
            args |= {"top_p": torch.rand(33) / 2 + 0.5, "min_p": torch.rand(33) / 5}

        def run(rows: Any, args: cases.Draw = args) -> tuple[Tensor, ...]:
            given = cases.draw_rows(args, rows)
            if mode == "none":
                given["logits"] = given["logits"][0]
            return sample(**given, backend=backend)

        whole = run(slice(None))
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
