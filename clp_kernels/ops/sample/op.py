"""`sample`: the public function, the registration and the table of backends."""

from typing import NamedTuple

import torch
from torch import Tensor

from clp_kernels import checks, registry
from clp_kernels.checks import is_number
from clp_kernels.ops.mix_logits.op import check_mixture
from clp_kernels.ops.sample import cpu, cuda, reference
from clp_kernels.registry import Backend, register, triton_backend


class Sample(NamedTuple):
    """What `sample` returns: tokens int64 [B]; logprobs and filtered_logprobs float32 [B]."""

    tokens: Tensor
    logprobs: Tensor
    filtered_logprobs: Tensor


def sample(
    logits: Tensor,
    *,
    weights: Tensor | None = None,
    mode: str = "geometric",
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    position: int | Tensor,
    backend: str = "auto",
) -> Sample:
    """Mixes, filters and draws one token per example, with its log-probabilities.

        z = mix_logits(logits, weights, mode), or logits
        token = argmax_v( z_v / temperature + g_v ) over the kept v,  g_v = -log(-log u_v)

    u_v is Philox4x32-10 keyed by (seed_b, position_b, v): the same logits, seed and position give
    the same token whatever else is in the batch, and the same uniforms on every backend. Filters in
    transformers' order: top-k, top-p over the renormalised rest, min-p. Ties at a filter's
    threshold are all kept; ties of the argmax go to the lowest index.

    Args:
        logits: [B, V], or [m, B, V] with `weights`.
        weights: [B, m]; see `mix_logits`.
        temperature: >= 0; 0 is greedy, and what is below 1e-30 counts as 1e-30. A number or [B],
            like all that follow.
        top_k: 0 is off. top_p: in (0, 1], 1 is off; an id stays if the ids that are more likely
            hold less than top_p. min_p: in [0, 1], 0 is off; an id stays if it is at least min_p
            times as likely as the likeliest. Temperature, top_p and min_p are compared in float64:
            a number is not rounded, and a tensor is what its own dtype holds.
        seed, position: int64; position is the index of the token in its sequence.
        backend: see `mixed_lora`.

    Returns:
        Sample(tokens int64, logprobs float32, filtered_logprobs float32), each [B]. `logprobs`:
        under softmax(z / temperature), before the filters (at temperature 0: under softmax(z)).
        `filtered_logprobs`: after the filters, renormalised (at temperature 0: 0).

    Not differentiable. Deterministic.

    Raises:
        TypeError, ValueError: as `mixed_lora`; also, on the CPU, for a row with NaN, +inf or no
            finite logit. On a GPU such a row gives token -1 and NaN.
        RuntimeError: a named backend cannot run this call.

    Source: Gumbel-max (Maddison et al., arXiv:1411.0030); Philox (Salmon et al., SC 2011).
    """
    if not torch.compiler.is_dynamo_compiling():
        fast_path = registry.BACKENDS["sample"][0].fast_path()
        if fast_path is not None:
            filters = (temperature, top_k, top_p, min_p)
            drawn = fast_path(logits, weights, mode, *filters, seed, position, backend)
            if drawn is not None:
                return Sample(*drawn)
    if not isinstance(logits, Tensor) or logits.dim() != (2 if weights is None else 3):
        wanted = "[B, V] (without weights)" if weights is None else "[m, B, V] (with weights)"
        raise ValueError(f"logits must be a tensor {wanted}, got {checks.describe(logits)}")
    checks.tensor("logits", logits, tuple(logits.shape), None)
    checks.mode(mode)
    stacked = logits.detach() if weights is not None else logits.detach()[None]
    if stacked.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least 1, got {list(logits.shape)}")
    if weights is not None:
        weights = check_mixture(weights, stacked, mode).detach()
    batch = stacked.shape[1]

    def rows(name: str, value: object, dtype: torch.dtype, ok: str) -> Tensor:
        return checks.per_example(name, value, batch, logits, dtype, ok)

    # float64, so that a number is compared as it was given.
    f64, i64 = torch.float64, torch.int64
    inputs = reference.Inputs(
        stacked,
        weights,
        mode,
        rows("temperature", temperature, f64, "finite and >= 0"),
        # A filter that is switched off by a plain number costs nothing; a tensor is never read.
        None if is_number(top_k, 0) else rows("top_k", top_k, i64, "0 (off) or positive"),
        None if is_number(top_p, 1) else rows("top_p", top_p, f64, "in (0, 1]"),
        None if is_number(min_p, 0) else rows("min_p", min_p, f64, "in [0, 1]"),
        rows("seed", seed, i64, "an integer"),
        rows("position", position, i64, "an integer"),
    )
    result = Sample(*registry.call("sample", *inputs, backend))
    if checks.readable(result.tokens) and bool((result.tokens < 0).any()):
        row = int((result.tokens < 0).nonzero()[0])
        raise ValueError(f"logits row {row} must have a finite entry and no NaN or +inf")
    return result


def _fake(logits, *_):  # type: ignore[no-untyped-def]
    batch_size = logits.shape[1]
    logprobs = logits.new_empty(batch_size, dtype=torch.float32)
    return logits.new_empty(batch_size, dtype=torch.int64), logprobs, torch.empty_like(logprobs)


register(
    "sample(Tensor logits, Tensor? weights, str mode, Tensor temperature, Tensor? top_k,"
    " Tensor? top_p, Tensor? min_p, Tensor seed, Tensor position, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
    Backend("cpu", cpu.sample, cpu.why_not, cpu.fast_path),
    Backend("cuda", cuda.sample, cuda.why_not),
    triton_backend("clp_kernels.ops.sample.triton", "sample"),
    Backend("reference", reference.sample),
    pack=lambda *args: (reference.Inputs(*args),),
)
