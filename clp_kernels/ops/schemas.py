"""Every op's schema and fake, registered once with torch.library, and the way to call one.

A kernel is found in two steps: the op's name here, then its row in clp_kernels.registry.BACKENDS.
Schemas are functional (new outputs, contiguous). Gradients not asked for come back as empty
tensors, because a schema cannot return an optional one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clp_kernels import native, registry
from clp_kernels.ops import reference

_LIBRARY = torch.library.Library("clp_kernels", "DEF")


def _register(schema: str, fake: Callable[..., Any]) -> None:
    """Defines an op whose last argument names the backend, for the CPU and for CUDA."""
    _LIBRARY.define(schema)
    name = schema.split("(", 1)[0]

    def run(*args: Any) -> Any:
        return _run(name, args)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"clp_kernels::{name}", fake, lib=_LIBRARY)


def _run(name: str, args: tuple[Any, ...]) -> Any:
    inputs = args[:-1]
    kernel = registry.select(name, args[-1], *inputs).run
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device):
        # Autocast is the layer's business; in here it would round the float32 accumulators.
        with torch.autocast(device, enabled=False):
            return kernel(*inputs)
    return kernel(*inputs)


def call(name: str, *args: Any) -> Any:
    """torch.ops.clp_kernels.<name>(*args), without the dispatcher where nobody watches it.

    torch.compile, fake tensors, functorch and dispatch modes need the op. Plain tensors under
    no_grad do not, and the way through torch.library costs 7 us hot and 18 us in a decoding loop,
    as much as the low-rank part of a 2048-wide layer itself.
    """
    watched = torch.compiler.is_compiling() or native.mode_active() or type(args[0]) not in _PLAIN
    if watched:
        return getattr(torch.ops.clp_kernels, name)(*args)
    return _run(name, args)


_PLAIN = (Tensor, torch.nn.Parameter)


def _gradients(inputs: list[Tensor | None], needs: list[bool]) -> tuple[Tensor, ...]:
    first = next(t for t in inputs if t is not None)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else first.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def _mixed_lora_fake(x, base_weight, lora_A, *_):  # type: ignore[no-untyped-def]
    m, r, _in = lora_A.shape
    u = x.new_empty(*x.shape[:-1], m * r, dtype=reference.accumulator(x.dtype))
    return x.new_empty(*x.shape[:-1], base_weight.shape[0]), u


def _mixed_lora_backward_fake(  # type: ignore[no-untyped-def]
    dy, x, base_weight, lora_A, lora_B, weights, example_ids, u, invariant, needs, backend
):
    bias = base_weight.new_empty(base_weight.shape[0])
    return _gradients([x, base_weight, lora_A, lora_B, weights, bias], needs)


def _mixed_linear_fake(x, expert_weight, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], expert_weight.shape[1])


def _mixed_linear_backward_fake(  # type: ignore[no-untyped-def]
    dy, x, expert_weight, weights, bias, example_ids, invariant, needs, backend
):
    d_bias = expert_weight.new_empty(expert_weight.shape[:2])
    return _gradients([x, expert_weight, weights, d_bias], needs)


def _mix_logits_fake(logits, *_):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[1:])


def _mix_logits_backward_fake(dz, logits, weights, mode, needs, backend):  # type: ignore[no-untyped-def]
    return _gradients([logits, weights], needs)


def _sample_fake(logits, *_):  # type: ignore[no-untyped-def]
    batch_size = logits.shape[1]
    logprobs = logits.new_empty(batch_size, dtype=torch.float32)
    return logits.new_empty(batch_size, dtype=torch.int64), logprobs, torch.empty_like(logprobs)


def _linear_logprob_fake(  # type: ignore[no-untyped-def]
    hidden, head_weight, targets, bias, weights, example_ids, temperature, return_entropy,
    ref_hidden, slopes, invariant, backend,
):  # fmt: skip
    acc = reference.accumulator(hidden.dtype)
    full, empty = targets.shape[0], 0
    has_ref = ref_hidden is not None
    sizes = (full, full if return_entropy else empty, full if has_ref else empty)
    rows = (hidden.shape if wanted else (0,) for wanted in (slopes, slopes and has_ref))
    per_token = (hidden.new_empty(size, dtype=acc) for size in sizes)
    return (*per_token, *(hidden.new_empty(shape) for shape in rows))


def _linear_logprob_backward_fake(  # type: ignore[no-untyped-def]
    d_logprobs, d_entropy, d_kl, hidden, head_weight, targets, bias, weights, example_ids,
    temperature, ref_hidden, invariant, needs, backend,
):  # fmt: skip
    d_bias = head_weight.new_empty(head_weight.shape[:-1])
    return _gradients([hidden, head_weight, d_bias, weights], needs)


_register(
    "mixed_lora(Tensor x, Tensor base_weight, Tensor lora_A, Tensor lora_B, Tensor weights,"
    " Tensor? bias, Tensor? example_ids, bool invariant, str backend) -> (Tensor, Tensor)",
    _mixed_lora_fake,
)
_register(
    "mixed_lora_backward(Tensor dy, Tensor x, Tensor base_weight, Tensor lora_A, Tensor lora_B,"
    " Tensor weights, Tensor? example_ids, Tensor u, bool invariant, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mixed_lora_backward_fake,
)
_register(
    "mixed_linear(Tensor x, Tensor expert_weight, Tensor weights, Tensor? bias,"
    " Tensor? example_ids, bool invariant, str backend) -> Tensor",
    _mixed_linear_fake,
)
_register(
    "mixed_linear_backward(Tensor dy, Tensor x, Tensor expert_weight, Tensor weights,"
    " Tensor? bias, Tensor? example_ids, bool invariant, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _mixed_linear_backward_fake,
)
_register(
    "mix_logits(Tensor logits, Tensor weights, str mode, str backend) -> Tensor",
    _mix_logits_fake,
)
_register(
    "mix_logits_backward(Tensor dz, Tensor logits, Tensor weights, str mode, bool[] needs,"
    " str backend) -> (Tensor, Tensor)",
    _mix_logits_backward_fake,
)
_register(
    "sample(Tensor logits, Tensor? weights, str mode, Tensor temperature, Tensor? top_k,"
    " Tensor? top_p, Tensor? min_p, Tensor seed, Tensor position, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _sample_fake,
)
_register(
    "linear_logprob(Tensor hidden, Tensor head_weight, Tensor targets, Tensor? bias,"
    " Tensor? weights, Tensor? example_ids, Tensor temperature, bool return_entropy,"
    " Tensor? ref_hidden, bool slopes, bool invariant, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_logprob_fake,
)
_register(
    "linear_logprob_backward(Tensor d_logprobs, Tensor d_entropy, Tensor d_kl, Tensor hidden,"
    " Tensor head_weight, Tensor targets, Tensor? bias, Tensor? weights, Tensor? example_ids,"
    " Tensor temperature, Tensor? ref_hidden, bool invariant, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_logprob_backward_fake,
)
