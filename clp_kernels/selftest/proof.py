"""Holds the kernels of an op and backend to a case of the self-test.

A case runs the public op with the backend named, without gradients, as a sampler does, and with
them. Both are held to the error budget of `clp_kernels.testing` against the reference in float64;
drawn tokens are the reference's. Two runs give the same bits, and on a GPU so does the forward in a
CUDA graph. Inputs are drawn on the CPU from a seed and are the same everywhere.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from clp_kernels import registry
from clp_kernels.invariant import batch_invariant
from clp_kernels.ops.sample.op import sample
from clp_kernels.registry import CannotRun
from clp_kernels.selftest.cases import BF16, F16, F32, Case, SampleCase
from clp_kernels.testing import assert_within_budget, weight_rows

# Draws of a case that are judged together: plain PyTorch may be right by chance in one of them.
DRAWS = 4
# Of float32 against the reference: of log-probabilities, and of what a graph gives where cuBLAS
# has another workspace and adds up in another order; in 16 bits one rounding.
CLOSE = {F32: 1e-5, BF16: 2.0**-7, F16: 2.0**-7}


def prove(op: str, backend: str, device: torch.device, case: Any) -> bool:
    """Holds the kernels to one case; False if they do not run it (as CUDA does not float32).

    Raises:
        AssertionError: they are wrong; and whatever they raise.
    """
    if backend == "triton" and registry.interpreting() and case.name.startswith("bf16"):
        return False  # the interpreter cuts bfloat16 off instead of rounding it
    try:
        if isinstance(case, SampleCase):
            _prove_draws(case, backend, device)
        else:
            _prove(op, case, backend, device)
    except CannotRun:
        return False
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what a kernel does wrong shows here, in its case
    return True


class _Draw:
    """Draws the inputs of a case on the CPU."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator, self._device = torch.Generator().manual_seed(seed), device

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = F32) -> Tensor:
        values = torch.randn(*shape, generator=self._generator) * scale
        return values.to(self._device, dtype)

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self._generator).to(self._device)

    def weights(self, kind: str, batch: int, m: int) -> Tensor:
        return weight_rows(kind, batch, m, generator=self._generator, device=self._device)


def _prove(op: str, case: Case, backend: str, device: torch.device) -> None:
    gradients = case.gradients and _has_gradients(op, backend)
    names: list[str] = []
    columns: tuple[list[tuple[Tensor, ...]], ...] = ([], [], [])
    with batch_invariant() if case.invariant else nullcontext():
        for seed in range(DRAWS):
            tensors = case.tensors(_Draw(seed, device))
            got = _results(case, tensors, backend, gradients)
            again = _results(case, tensors, backend, gradients)
            for name, one, other in zip(got, got.values(), again.values(), strict=True):
                assert _same_bits(one, other), f"{name}: two runs give other bits"
            names = list(got)
            wide = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
            plain = (_results(case, given, "reference", gradients) for given in (wide, tensors))
            for column, results in zip(columns, (got, *plain), strict=True):
                column.append(tuple(results.values()))
            if seed == 0:
                _check_rows(case, tensors, backend)
                if device.type == "cuda":
                    _check_graph(case, tensors, backend, got)
    for i, name in enumerate(names):
        stacked = [torch.stack([row[i] for row in column]) for column in columns]
        assert stacked[0].dtype == stacked[2].dtype, f"{name}: {stacked[0].dtype}"
        assert_within_budget(*stacked, name=name)


def _check_rows(case: Case, tensors: dict[str, Tensor], backend: str) -> None:
    """What holds of single rows, to the bit."""
    x, weights = tensors.get("x"), tensors.get("weights")
    if x is None or weights is None:
        return

    def run(**changed: Tensor) -> Tensor:
        with torch.no_grad():
            return case.function(**{**tensors, **changed}, **case.fixed, backend=backend)[0]

    ids = tensors.get("example_ids")
    if case.invariant:  # a row is the same in any batch
        y = run()
        for count in (1, len(x) // 2):
            part = {"x": x[:count]} | ({"weights": weights[:count]} if ids is None else {})
            part |= {} if ids is None else {"example_ids": ids[:count]}
            assert _same_bits(run(**part), y[:count]), f"{count} rows alone have other bits"
    if case.bare_rows:  # a row of zero weights is the base product, whatever is in the adapters
        spoiled = {name: torch.full_like(tensors[name], torch.nan) for name in ("lora_A", "lora_B")}
        zero = (weights == 0).all(1)
        zero = zero if ids is None else zero[ids.long()]
        base = run(weights=torch.zeros_like(weights))
        assert _same_bits(run(**spoiled)[zero], base[zero]), "an adapter of weight zero shows"


def _has_gradients(op: str, backend: str) -> bool:
    """Whether the backend has kernels of the gradients. A frozen head's are made in the forward."""
    if op == "linear_logprob":
        return True
    table = registry.BACKENDS.get(f"{op}_backward", ())
    return any(one.name == backend and not one.kernels_of for one in table)


def _results(
    case: Case, tensors: dict[str, Tensor], backend: str, gradients: bool
) -> dict[str, Tensor]:
    """The outputs without gradients and with them, and the gradients of their sum times fixed
    numbers."""
    with torch.no_grad():
        alone = case.function(**tensors, **case.fixed, backend=backend)
    found = {f"output {i}": t for i, t in enumerate(alone)}
    leaves = {
        name: t.detach().requires_grad_(gradients and name not in case.constants)
        if t.is_floating_point()
        else t
        for name, t in tensors.items()
    }
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    if not wanted:
        return found
    out = case.function(**leaves, **case.fixed, backend=backend)
    found |= {f"output {i} with gradients": t.detach() for i, t in enumerate(out)}
    draw = _Draw(DRAWS, out[0].device)
    upstream = [draw(*t.shape, dtype=t.dtype) for t in out]
    grads = torch.autograd.grad(
        list(out), [leaves[name] for name in wanted], upstream, materialize_grads=True,
        allow_unused=True,
    )  # fmt: skip
    return found | {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}


def _check_graph(
    case: Case, tensors: dict[str, Tensor], backend: str, wanted: dict[str, Tensor]
) -> None:
    """The forward in a CUDA graph, where nothing may be read on the host."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = case.function(**tensors, **case.fixed, backend=backend)
    graph.replay()
    for one, other in zip(out, wanted.values(), strict=False):
        tolerance = CLOSE[one.dtype]
        close = torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert close, "a CUDA graph gives another output"


def _prove_draws(case: SampleCase, backend: str, device: torch.device) -> None:
    """The reference's tokens, drawn on the CPU, and log-probabilities close to its float64 ones."""
    for seed in range(DRAWS):
        given = _sample_arguments(case, seed)
        there: dict[str, Any] = {
            k: t.to(device) if isinstance(t, Tensor) else t for k, t in given.items()
        }
        got, again = (sample(**there, backend=backend) for _ in range(2))
        for name, one, other in zip(got._fields, got, again, strict=True):
            assert _same_bits(one, other), f"{name}: two runs give other bits"
        wanted = sample(**given, backend="reference")
        same = torch.equal(got.tokens.cpu(), wanted.tokens)
        assert same, f"tokens are {got.tokens.tolist()}, the reference's {wanted.tokens.tolist()}"
        if case.mode == "probability":  # in float32 the reference itself is off by up to 2e-5
            wide = given | {"logits": given["logits"].double()}
            wanted = sample(**wide, backend="reference")
        for name, one, other in list(zip(got._fields, got, wanted, strict=True))[1:]:
            error = (one.cpu().double() - other.double()).abs().nan_to_num(0, torch.inf).max()
            assert error <= CLOSE[F32], f"{name} is off by {error.item():.3g}"
        if seed == 0 and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = sample(**there, backend=backend)
            graph.replay()
            assert torch.equal(captured.tokens, got.tokens), "a CUDA graph draws other tokens"


def _sample_arguments(case: SampleCase, seed: int) -> dict[str, Any]:
    draw, batch = _Draw(seed, torch.device("cpu")), case.batch

    def one_of(*values: float) -> Tensor:
        return torch.tensor(values)[draw.integers(len(values), batch)]

    shape = (batch, case.vocab_size) if case.m == 1 else (case.m, batch, case.vocab_size)
    logits = draw(*shape, scale=3)
    if case.ties:
        logits = (logits / 3).round()
    logits[..., 7::11] = -torch.inf  # as a mask of ids leaves them
    given: dict[str, Any] = {
        "logits": logits.to(case.dtype),
        "mode": case.mode,
        "temperature": torch.tensor([0.0, 0.3, 1.0, 3.0]).repeat(batch)[:batch],
        "seed": draw.integers(2**40, batch),
        "position": draw.integers(2**33, batch),
    }
    if case.m > 1:
        kind = "negative" if case.mode == "geometric" else "all_different"
        given["weights"] = draw.weights(kind, batch, case.m)
    filters = {
        "top_k": one_of(0, 1, 20, case.vocab_size, case.vocab_size + 9).long(),
        "top_p": one_of(1.0, 0.9, 0.5, 1e-6),
        "min_p": one_of(0.0, 1e-4, 0.05),
    }
    return given | {name: filters[name] for name in case.filters}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return torch.equal(*(t.contiguous().view(kinds[t.element_size()]) for t in (a, b)))
