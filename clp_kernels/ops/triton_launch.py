"""What the Triton files of all ops share: layouts, reasons, lists of variants, loads of weights."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# How Triton writes a pointer to these dtypes in a signature.
KINDS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

# (name, kernel, signature, constexprs, options), as triton.compile and its ASTSource take them.
Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]


@triton.jit
def example_of(ids_ptr, t, in_range, tokens_per_example):
    """The example of each token: ids[t], or t // tokens_per_example where ids_ptr is None."""
    if ids_ptr is None:
        example = t // tokens_per_example
    else:
        example = tl.load(ids_ptr + t, mask=in_range, other=0).to(tl.int64)
    return example


@triton.jit
def weight_of(weights_ptr, example, i, wanted, batch_size, num_terms):
    """weights[example, i]; NaN where the example does not exist, 0 where it is not wanted."""
    exists = (example >= 0) & (example < batch_size)
    w = tl.load(weights_ptr + example * num_terms + i, mask=wanted & exists, other=float("nan"))
    return tl.where(wanted, w, 0.0)


# Under TRITON_INTERPRET=1 `triton.jit` gives another class, which runs on CPU tensors.
INTERPRETED = not isinstance(weight_of, triton.JITFunction)


def why_not(x: Tensor, *, dots: bool = False) -> str | None:
    """None if the kernels of an op run on inputs like x, else a sentence. dots: they use tl.dot."""
    if x.dtype == torch.float64:
        return "the triton kernels accumulate in float32, and the inputs are float64"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the inputs are on {x.device}, not on a GPU"
    if dots and INTERPRETED and x.dtype == torch.bfloat16:
        return "the Triton interpreter computes bfloat16 dots wrongly"
    return None


def capability_of(x: Tensor) -> tuple[int, int]:
    """Of x's GPU; the interpreter, which has none, plans for the oldest that is supported."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def unit_stride(t: Tensor) -> Tensor:
    """t itself if its last axis is dense (the kernels take the other strides), else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def matrix(t: Tensor) -> Tensor:
    """[..., size] as [tokens, size] with a dense last axis, copied only if the layout needs it."""
    return unit_stride(t.reshape(-1, t.shape[-1]))


def variant(
    kernel: Any, constexprs: dict[str, Any], options: dict[str, Any], types: dict[str, str]
) -> Variant:
    """The variant that a launch compiles. Arguments that are not named are int32.

    types: of the pointers, by argument without its _ptr; a pointer that is not named is None.
    """
    pointers = {f"{name}_ptr": kind for name, kind in types.items()}
    absent = [a for a in kernel.arg_names if a.endswith("_ptr") and a not in pointers]
    values = {**constexprs, **dict.fromkeys(absent)}
    signature = {
        arg: "constexpr" if arg in values else pointers.get(arg, "i32") for arg in kernel.arg_names
    }
    shown = {**types, **constexprs, **options}
    name = " ".join([kernel.__name__, *(f"{key}={value}" for key, value in shown.items())])
    return name, kernel, signature, values, options


def distinct(variants: list[Variant]) -> list[Variant]:
    """The variants, each name once, in order."""
    return list({one[0]: one for one in variants}.values())
