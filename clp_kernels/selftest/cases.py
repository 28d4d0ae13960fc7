"""The cases of the self-test: one for each template and tail of the kernels, for every backend.

A case runs a public op, forward and gradients, with the backend named. It is held to the error
budget of `clp_kernels.testing` against the reference in float64; drawn tokens are the reference's.
Two runs give the same bits, and on a GPU so does the forward in a CUDA graph. Inputs are drawn on
the CPU from a seed per case, and are therefore the same everywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clp_kernels import registry
from clp_kernels.invariant import batch_invariant
from clp_kernels.native import BackendError
from clp_kernels.ops.linear_logprob.op import linear_logprob
from clp_kernels.ops.mix_logits.op import mix_logits
from clp_kernels.ops.mixed_linear.op import mixed_linear
from clp_kernels.ops.mixed_lora.op import mixed_lora
from clp_kernels.ops.sample.op import sample
from clp_kernels.ops.slot_attention import cpu as slot_attention
from clp_kernels.testing import assert_within_budget, weight_rows

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Draws of a case that are judged together: plain PyTorch may be right by chance in one of them.
DRAWS = 4
# Of float32 against the reference: of log-probabilities, and of what a graph gives where cuBLAS
# has another workspace and adds up in another order; in 16 bits one rounding.
CLOSE = {F32: 1e-5, BF16: 2.0**-7, F16: 2.0**-7}

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One call. tensors(draw) makes the inputs by name; `fixed` are arguments without gradient.

    draw(*shape, scale=1, dtype=...) gives normal numbers. Of `tensors`, those that are not
    floating, or are named in `constants`, have no gradient.
    """

    name: str
    function: Function
    tensors: Callable[[Callable[..., Tensor]], dict[str, Tensor]]
    fixed: dict[str, Any] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    invariant: bool = False
    gradients: bool = True


# (tokens, in_features, out_features, m, r, kind of weights, how the tokens lie), over the tiles and
# tails of all backends: 8, 16, 32 and 64 rows, in_features that are no multiple of 16 or 64.
_LORA = (
    (1, 64, 8, 1, 4, "all_different", ""),
    (9, 168, 65, 2, 8, "negative", "ids"),
    (17, 896, 172, 3, 12, "zero", ""),
    (33, 72, 40, 4, 16, "one_hot", "examples"),
    (48, 320, 96, 2, 8, "zero", "no bias"),
    (19, 512, 200, 8, 64, "dirichlet", ""),
    (256, 128, 96, 2, 16, "all_equal", "ids"),
    (70, 264, 33, 5, 4, "all_different", "invariant"),
    (0, 64, 40, 2, 8, "uniform", ""),
)
# What only a GPU computes fast: sums over in_features in parts, and large tiles.
_LORA_LARGE = (
    (1, 4096, 1024, 4, 16, "all_different", ""),
    (16, 4096, 4096, 4, 16, "all_different", ""),
    (1024, 2048, 1024, 4, 16, "all_different", "ids"),
)
_LORA_DTYPES = ((BF16, BF16), (F32, F32), (F16, F16), (BF16, F32), (F16, F32))


def lora_cases(large: bool) -> Iterator[Case]:
    """Of mixed_lora."""
    for sizes in (*_LORA, *(_LORA_LARGE if large else ())):
        tokens, n_in, n_out, m, r, kind, layout = sizes
        for dtype, lora_dtype in _LORA_DTYPES:

            def tensors(
                draw: Any, sizes: Any = sizes, dtype: Any = dtype, lora_dtype: Any = lora_dtype
            ) -> dict[str, Tensor]:
                tokens, n_in, n_out, m, r, kind, layout = sizes
                scale = n_in**-0.5
                found = _tokens(draw, tokens, n_in, m, kind, layout, dtype)
                found["base_weight"] = draw(n_out, n_in, scale=scale, dtype=dtype)
                found["lora_A"] = draw(m, r, n_in, scale=scale, dtype=lora_dtype)
                found["lora_B"] = draw(m, n_out, r, scale=r**-0.5, dtype=lora_dtype)
                if layout != "no bias":
                    found["bias"] = draw(n_out, dtype=dtype)
                return found

            name = f"{_short(dtype, lora_dtype)} T{tokens} {n_in}x{n_out} m{m} r{r} {kind} {layout}"
            yield Case(
                name.strip(),
                lambda **given: (mixed_lora(**given),),
                tensors,
                {"scaling": 0.5},
                invariant=layout == "invariant",
            )


def linear_cases(large: bool) -> Iterator[Case]:
    """Of mixed_linear."""
    for sizes in (*_LORA, *(_LORA_LARGE if large else ())):
        tokens, n_in, n_out, m, _, kind, layout = sizes
        for dtype in (BF16, F32, F16):

            def tensors(draw: Any, sizes: Any = sizes, dtype: Any = dtype) -> dict[str, Tensor]:
                tokens, n_in, n_out, m, _, kind, layout = sizes
                found = _tokens(draw, tokens, n_in, m, kind, layout, dtype)
                found["expert_weight"] = draw(m, n_out, n_in, scale=n_in**-0.5, dtype=dtype)
                if layout != "no bias":
                    found["bias"] = draw(m, n_out, dtype=dtype)
                return found

            name = f"{_short(dtype)} T{tokens} {n_in}x{n_out} m{m} {kind} {layout}".strip()
            yield Case(
                name,
                lambda **given: (mixed_linear(**given),),
                tensors,
                invariant=layout == "invariant",
            )


def _tokens(
    draw: Any, tokens: int, n_in: int, m: int, kind: str, layout: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """x and weights, and example_ids if the layout has them."""
    if layout == "ids":  # unsorted, and some examples have no token
        ids = draw.integers(5, tokens).int()
        return {
            "x": draw(tokens, n_in, dtype=dtype),
            "weights": draw.weights(kind, 5, m),
            "example_ids": ids,
        }
    examples, each = (3, tokens // 3) if layout == "examples" else (tokens, 1)
    return {
        "x": draw(examples, each, n_in, dtype=dtype),
        "weights": draw.weights(kind, examples, m),
    }


def mixture_cases(large: bool) -> Iterator[Case]:
    """Of mix_logits."""
    sizes = [(1, 1, 1), (2, 9, 31), (3, 17, 513), (5, 3, 4099), (2, 4, 1024)]
    for m, batch, vocab_size in (*sizes, *([(4, 16, 151_936)] if large else [])):
        for mode in ("geometric", "probability"):
            for dtype in (BF16, F32, F16):

                def tensors(
                    draw: Any,
                    m: int = m,
                    batch: int = batch,
                    vocab_size: int = vocab_size,
                    mode: str = mode,
                    dtype: Any = dtype,
                ) -> dict[str, Tensor]:
                    logits = draw(m, batch, vocab_size, scale=3, dtype=dtype)
                    kind = "zero" if mode == "geometric" else "all_different"
                    return {"logits": logits, "weights": draw.weights(kind, batch, m)}

                name = f"{_short(dtype)} m{m} B{batch} V{vocab_size} {mode}"
                yield Case(name, lambda **given: (mix_logits(**given),), tensors, {"mode": mode})


def head_cases(large: bool) -> Iterator[Case]:
    """Of linear_logprob: with a frozen head, and with a trained one and the entropy."""
    sizes = [(1, 31, 8), (9, 1023, 24), (17, 1280, 64), (33, 1281, 72), (130, 4099, 128)]
    for tokens, vocab_size, dim in (*sizes, *([(700, 151_936, 256)] if large else [])):
        for dtype in (BF16, F32, F16):
            for trained in (False, True):

                def tensors(
                    draw: Any,
                    tokens: int = tokens,
                    vocab_size: int = vocab_size,
                    dim: int = dim,
                    dtype: Any = dtype,
                    trained: bool = trained,
                ) -> dict[str, Tensor]:
                    heads = (2,) if trained and tokens > 1 else ()
                    targets = draw.integers(vocab_size, tokens)
                    targets[3::4] = -100
                    found = {
                        "hidden": draw(tokens, dim, dtype=dtype),
                        "head_weight": draw(*heads, vocab_size, dim, scale=dim**-0.5, dtype=dtype),
                        "targets": targets,
                        "temperature": draw(tokens).abs() + 0.5,
                        "ref_hidden": draw(tokens, dim, dtype=dtype),
                    }
                    if tokens % 3 == 0:
                        found["bias"] = draw(*heads, vocab_size, dtype=dtype)
                    if heads:
                        found["weights"] = draw.weights("negative", tokens, 2)
                    return found

                constants: tuple[str, ...] = ("temperature", "ref_hidden")
                if not trained:
                    constants += ("head_weight", "bias", "weights")
                kind = "trained head" if trained else "frozen head"
                yield Case(
                    f"{_short(dtype)} T{tokens} V{vocab_size} d{dim} {kind}",
                    _logprob,
                    tensors,
                    {"return_entropy": trained},
                    constants,
                )


def _logprob(**given: Any) -> tuple[Tensor, ...]:
    return tuple(one for one in linear_logprob(**given) if one is not None)


def attention_cases(large: bool) -> Iterator[Case]:
    """Of slot_attention, which the sampler calls on the CPU."""
    for batch, heads, group, dim, window in (
        (1, 1, 1, 8, None),
        (3, 2, 4, 20, None),
        (9, 2, 1, 64, 5),
    ):
        for dtype in (BF16, F32, F16):

            def tensors(
                draw: Any,
                batch: int = batch,
                heads: int = heads,
                group: int = group,
                dim: int = dim,
                dtype: Any = dtype,
            ) -> dict[str, Tensor]:
                shapes = {"q": (batch, heads * group, 1), "k": (batch, heads, 1)}
                shapes |= {"v": (batch, heads, 1), "keys": (batch + 2, heads, 40)}
                shapes["values"] = shapes["keys"]
                found = {name: draw(*shape, dim, dtype=dtype) for name, shape in shapes.items()}
                return found | {"lengths": draw.integers(40, batch)}

            name = f"{_short(dtype)} B{batch} H{heads * group}/{heads} d{dim} window {window}"
            yield Case(name, _attend, tensors, {"window": window}, gradients=False)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    window: int | None, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The output and the written keys and values."""
    keys, values = keys.clone(), values.clone()
    if backend == "cpu":
        out = slot_attention.slot_attention(q, k, v, keys, values, lengths, 1, None, window)
        return out, keys, values
    rows = []
    for b, n in enumerate(lengths.tolist()):
        keys[b + 1, :, n], values[b + 1, :, n] = k[b, :, 0], v[b, :, 0]
        first = 0 if window is None else max(0, n + 1 - window)
        group = q.shape[1] // k.shape[1]
        seen = [t[b + 1, :, first : n + 1].repeat_interleave(group, 0) for t in (keys, values)]
        scores = (q[b] @ seen[0].transpose(1, 2)) * q.shape[-1] ** -0.5
        rows.append((scores.softmax(-1) @ seen[1]).transpose(0, 1))
    return torch.stack(rows), keys, values


@dataclass(frozen=True)
class SampleCase:
    """One call of `sample`; logits of spread 3, or whole ones, among which many tie."""

    m: int
    batch: int
    vocab_size: int
    dtype: torch.dtype
    mode: str
    filters: tuple[str, ...]
    ties: bool = False

    @property
    def name(self) -> str:
        parts = [_short(self.dtype), f"m{self.m} B{self.batch} V{self.vocab_size}", self.mode]
        return " ".join([*parts, *self.filters, *(["ties"] if self.ties else [])])


def sample_cases(large: bool) -> Iterator[SampleCase]:
    """Of sample."""
    every = ("top_k", "top_p", "min_p")
    sizes = [(1, 1, 1), (1, 9, 31), (2, 2, 1000), (5, 4, 4099)]
    for m, batch, vocab_size in (*sizes, *([(2, 8, 151_936)] if large else [])):
        for dtype in (BF16, F32, F16):
            for filters in ((), every, ("top_p",)):
                yield SampleCase(m, batch, vocab_size, dtype, "geometric", filters)
        for filters in ((), every):
            yield SampleCase(m, batch, vocab_size, F32, "probability", filters)
    for filters in (("top_k",), ("top_p",)):
        yield SampleCase(1, 24, 5000, F32, "geometric", filters, ties=True)


CASES: dict[str, Callable[[bool], Iterator[Any]]] = {
    "mixed_lora": lora_cases,
    "mixed_linear": linear_cases,
    "mix_logits": mixture_cases,
    "linear_logprob": head_cases,
    "sample": sample_cases,
    "slot_attention": attention_cases,
}


def backends(op: str) -> list[str]:
    """The backends that have kernels of an op, and may be tested."""
    if op == "slot_attention":  # not a public op
        return ["cpu"]
    entries = registry.BACKENDS[op]
    return [one.name for one in entries if one.name != "reference" and not one.kernels_of]


def cases(op: str, device: torch.device) -> list[Any]:
    """Those of an op on this device."""
    return list(CASES[op](device.type == "cuda"))


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
    except BackendError:
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
            if seed == 0 and device.type == "cuda":
                _check_graph(case, tensors, backend, [got[name] for name in names])
    for i, name in enumerate(names):
        stacked = [torch.stack([row[i] for row in column]) for column in columns]
        assert stacked[0].dtype == stacked[2].dtype, f"{name}: {stacked[0].dtype}"
        assert_within_budget(*stacked, name=name)


def _has_gradients(op: str, backend: str) -> bool:
    """Whether the backend has kernels of the gradients. A frozen head's are made in the forward."""
    if op == "linear_logprob":
        return True
    table = registry.BACKENDS.get(f"{op}_backward", ())
    return any(one.name == backend and not one.kernels_of for one in table)


def _results(
    case: Case, tensors: dict[str, Tensor], backend: str, gradients: bool
) -> dict[str, Tensor]:
    """The outputs, and the gradients of their sum times fixed numbers."""
    leaves = {
        name: t.detach().requires_grad_(gradients and name not in case.constants)
        if t.is_floating_point()
        else t
        for name, t in tensors.items()
    }
    with torch.set_grad_enabled(gradients):
        out = case.function(**leaves, **case.fixed, backend=backend)
    found = {f"output {i}": t.detach() for i, t in enumerate(out)}
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    if not wanted:
        return found
    draw = _Draw(DRAWS, out[0].device)
    upstream = [draw(*t.shape, dtype=t.dtype) for t in out]
    grads = torch.autograd.grad(
        list(out), [leaves[name] for name in wanted], upstream, materialize_grads=True,
        allow_unused=True,
    )  # fmt: skip
    return found | {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}


def _check_graph(
    case: Case, tensors: dict[str, Tensor], backend: str, wanted: list[Tensor]
) -> None:
    """The forward in a CUDA graph, where nothing may be read on the host."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = case.function(**tensors, **case.fixed, backend=backend)
    graph.replay()
    for one, other in zip(out, wanted, strict=False):
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


def _short(*dtypes: torch.dtype) -> str:
    names = {F32: "f32", BF16: "bf16", F16: "f16"}
    return "+".join(dict.fromkeys(names[dtype] for dtype in dtypes))
