"""The cases of the self-test: for each template and tail of the kernels, in each dtype."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clp_kernels import registry
from clp_kernels.ops.linear_logprob.op import linear_logprob
from clp_kernels.ops.mix_logits.op import mix_logits
from clp_kernels.ops.mixed_linear.op import mixed_linear
from clp_kernels.ops.mixed_lora.op import mixed_lora
from clp_kernels.ops.slot_attention import cpu as slot_attention
from clp_kernels.testing import noncontiguous

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
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
    bare_rows: bool = False  # mixed_lora: rows of zero weights are the base product


# (tokens, in_features, out_features, m, r, kind of weights, words), over the tiles and tails of all
# backends: 8, 16, 32 and 64 rows, in_features that are no multiple of 8, 16 or 64. Words: ids, wide
# (int64 ids), examples (several tokens each), bare (no bias), gaps (no input is contiguous), frozen
# (the matrix and the bias have no gradient, as in training), input (x has none), invariant.
_LORA = (
    (1, 64, 8, 1, 4, "all_different", "frozen"),
    (1, 2048, 130, 4, 16, "all_different", "bare frozen"),
    (5, 256, 40, 2, 8, "negative", "frozen"),
    (9, 168, 65, 2, 8, "negative", "ids"),
    (17, 896, 172, 3, 12, "zero", "frozen input"),
    (33, 72, 40, 3, 16, "one_hot", "examples"),
    (48, 320, 96, 2, 8, "zero", "bare"),
    (19, 512, 200, 8, 64, "dirichlet", "frozen"),
    (256, 128, 96, 2, 16, "all_equal", "ids wide bare frozen"),
    (12, 37, 21, 3, 5, "negative", "examples gaps frozen"),
    (11, 136, 30, 2, 7, "zero", "ids wide gaps"),
    (70, 264, 33, 5, 4, "all_different", "invariant frozen"),
    (7, 96, 24, 2, 8, "negative", "ids bare invariant"),
    (0, 64, 40, 2, 8, "uniform", "frozen"),
)
# What only a GPU computes fast: sums over in_features in parts, and large tiles.
_LORA_LARGE = (
    (1, 4096, 1024, 4, 16, "all_different", "frozen"),
    (16, 4096, 4096, 4, 16, "all_different", "frozen"),
    (1024, 2048, 1024, 4, 16, "all_different", "ids frozen"),
)
_LORA_DTYPES = ((BF16, BF16), (F32, F32), (F16, F16), (BF16, F32), (F16, F32))


def lora_cases(large: bool) -> Iterator[Case]:
    """Of mixed_lora."""
    for sizes in (*_LORA, *(_LORA_LARGE if large else ())):
        tokens, n_in, n_out, m, r, kind, words = sizes
        for dtype, lora_dtype in _LORA_DTYPES:

            def tensors(
                draw: Any, sizes: Any = sizes, dtype: Any = dtype, lora_dtype: Any = lora_dtype
            ) -> dict[str, Tensor]:
                tokens, n_in, n_out, m, r, kind, words = sizes
                scale = n_in**-0.5
                found = _tokens(draw, tokens, n_in, m, kind, words, dtype)
                found["base_weight"] = draw(n_out, n_in, scale=scale, dtype=dtype)
                found["lora_A"] = draw(m, r, n_in, scale=scale, dtype=lora_dtype)
                found["lora_B"] = draw(m, n_out, r, scale=r**-0.5, dtype=lora_dtype)
                if "bare" not in words.split():
                    found["bias"] = draw(n_out, dtype=dtype)
                return _laid_out(found, words)

            name = f"{_short(dtype, lora_dtype)} T{tokens} {n_in}x{n_out} m{m} r{r} {kind} {words}"
            yield Case(
                name.strip(),
                lambda **given: (mixed_lora(**given),),
                tensors,
                {"scaling": 0.5},
                _constants(words, "base_weight"),
                "invariant" in words.split(),
                bare_rows=kind == "zero",
            )


def linear_cases(large: bool) -> Iterator[Case]:
    """Of mixed_linear."""
    for sizes in (*_LORA, *(_LORA_LARGE if large else ())):
        tokens, n_in, n_out, m, _, kind, words = sizes
        for dtype in (BF16, F32, F16):

            def tensors(draw: Any, sizes: Any = sizes, dtype: Any = dtype) -> dict[str, Tensor]:
                tokens, n_in, n_out, m, _, kind, words = sizes
                found = _tokens(draw, tokens, n_in, m, kind, words, dtype)
                found["expert_weight"] = draw(m, n_out, n_in, scale=n_in**-0.5, dtype=dtype)
                if "bare" not in words.split():
                    found["bias"] = draw(m, n_out, dtype=dtype)
                return _laid_out(found, words)

            name = f"{_short(dtype)} T{tokens} {n_in}x{n_out} m{m} {kind} {words}".strip()
            yield Case(
                name,
                lambda **given: (mixed_linear(**given),),
                tensors,
                {},
                _constants(words, "expert_weight"),
                "invariant" in words.split(),
            )


def _tokens(
    draw: Any, tokens: int, n_in: int, m: int, kind: str, words: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """x and weights, and example_ids if the words ask for them."""
    if "ids" in words.split():  # unsorted, and some examples have no token
        ids = draw.integers(5, tokens)
        return {
            "x": draw(tokens, n_in, dtype=dtype),
            "weights": draw.weights(kind, 5, m),
            "example_ids": ids if "wide" in words.split() else ids.int(),
        }
    examples, each = (3, tokens // 3) if "examples" in words.split() else (tokens, 1)
    return {
        "x": draw(examples, each, n_in, dtype=dtype),
        "weights": draw.weights(kind, examples, m),
    }


def _laid_out(tensors: dict[str, Tensor], words: str) -> dict[str, Tensor]:
    gaps = "gaps" in words.split()
    return {k: noncontiguous(t) for k, t in tensors.items()} if gaps else tensors


def _constants(words: str, matrix: str) -> tuple[str, ...]:
    frozen = (matrix, "bias") if "frozen" in words.split() else ()
    return (*frozen, "x") if "input" in words.split() else frozen


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
                    logits[..., 7::11] = -torch.inf  # as a mask of ids leaves them
                    return {"logits": logits, "weights": draw.weights(kind, batch, m)}

                name = f"{_short(dtype)} m{m} B{batch} V{vocab_size} {mode}"
                yield Case(name, lambda **given: (mix_logits(**given),), tensors, {"mode": mode})


def head_cases(large: bool) -> Iterator[Case]:
    """Of linear_logprob: with a frozen head, and with a trained one and the entropy."""
    sizes = [(1, 31, 8), (9, 1023, 24), (17, 1280, 64), (33, 1281, 72), (70, 2051, 128)]
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
                    if tokens == 17:  # neither is asked for
                        del found["temperature"], found["ref_hidden"]
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
                    {"return_entropy": trained != (tokens == 33)},
                    constants,
                )


def _logprob(**given: Any) -> tuple[Tensor, ...]:
    return tuple(one for one in linear_logprob(**given) if one is not None)


def attention_cases(large: bool) -> Iterator[Case]:
    """Of slot_attention, which the sampler calls on the CPU."""
    for batch, heads, group, dim, window, scale in (
        (1, 1, 1, 8, None, None),
        (3, 2, 4, 20, None, 0.3),
        (9, 2, 1, 64, 5, None),
        (2, 2, 2, 128, None, None),
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
                slots = (batch + 2, heads, 300)
                found = {
                    "q": draw(batch, heads * group, 1, dim, dtype=dtype),
                    "k": draw(batch, heads, 1, dim, dtype=dtype),
                    "v": draw(batch, heads, 1, dim + 8, dtype=dtype),
                    "keys": draw(*slots, dim, dtype=dtype),
                    "values": draw(*slots, dim + 8, dtype=dtype),
                    "lengths": draw.integers(300, batch),
                }
                if group == 4:
                    found |= {name: noncontiguous(found[name]) for name in ("q", "k", "v")}
                return found

            name = f"{_short(dtype)} B{batch} H{heads * group}/{heads} d{dim} window {window}"
            fixed = {"window": window, "scale": scale}
            yield Case(name, _attend, tensors, fixed, gradients=False)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    window: int | None, scale: float | None, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The output and the written keys and values."""
    keys, values = keys.clone(), values.clone()
    if backend == "cpu":
        out = slot_attention.slot_attention(q, k, v, keys, values, lengths, 1, scale, window)
        return out, keys, values
    rows = []
    for b, n in enumerate(lengths.tolist()):
        keys[b + 1, :, n], values[b + 1, :, n] = k[b, :, 0], v[b, :, 0]
        first = 0 if window is None else max(0, n + 1 - window)
        group = q.shape[1] // k.shape[1]
        seen = [t[b + 1, :, first : n + 1].repeat_interleave(group, 0) for t in (keys, values)]
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        scores = (q[b] @ seen[0].transpose(1, 2)) * factor
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


def _short(*dtypes: torch.dtype) -> str:
    names = {F32: "f32", BF16: "bf16", F16: "f16"}
    return "+".join(dict.fromkeys(names[dtype] for dtype in dtypes))
