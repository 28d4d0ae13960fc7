"""Triton kernels of mixed_linear: per-example mixtures of m full matrices. Unverified on a GPU.

    y_t = sum_i w_i(t) (x_t W_i^T + bias_i),    w_i(t) = weights[example of token t, i]

Three products carry the work, and no copy of x, y or dy per expert is ever written:

- forward and dx are one kernel: a program owns an output tile and adds the experts in the order
  i = 0, 1, ..., each product accumulated in float32 and scaled in registers, one rounding at the
  end. dx reads W transposed.
- d_weights needs no product of its own: dy_t . (x_t W_i^T) = x_t . (dy_t W_i), and dy_t W_i is
  what the dx kernel holds before it scales. Each tile writes its part of that dot.
- d_expert scales the rows of dy while loading them, and feeds the product a high and a low part of
  each, so that it rounds no more than the output does.

Where a grid would be too small, the inner axis is split into parts that write float32 planes;
`sum_planes_kernel` adds them in order. No atomics: two runs give the same bits.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from clp_kernels.ops import triton_launch
from clp_kernels.ops.mixed_linear import triton_kernels as kernels
from clp_kernels.ops.mixed_linear.reference import Inputs
from clp_kernels.ops.triton_launch import (
    KINDS,
    Variant,
    capability_of,
    distinct,
    matrix,
    unit_stride,
    variant,
)

# Token counts up to which each small tile is used; above the last one the large tile is.
DECODE_BUCKETS = (16, 64)
SPLIT_TOKENS = 256
# A grid is split until it has about two programs for each multiprocessor of a large GPU.
MIN_PROGRAMS = 256
MAX_SPLITS = 8
_BIAS_BLOCKS = {"BLOCK_T": 32, "BLOCK_OUT": 64}
_SUM_BLOCK = 512
_EXAMPLE_BLOCK = 512


@dataclass(frozen=True)
class Tile:
    """Block sizes and compiler options of one launch."""

    block_t: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_T": self.block_t, "BLOCK_OUT": self.block_out, "BLOCK_IN": self.block_in}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Plan:
    """What every launch of one call uses.

    The forward's inner axis and the tokens of d_expert are cut into so many splits. `d_weights`
    is the product of the backward if d_weights is needed, `dx` if only dx is.
    """

    forward: Tile
    forward_splits: int
    dx: Tile
    d_weights: Tile
    d_expert: Tile
    token_splits: int


def plan(
    tokens: int,
    in_features: int,
    out_features: int,
    m: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    invariant: bool,
) -> Plan:
    """Block sizes of a call. Every number is an unmeasured starting point.

    The forward's choice does not depend on m: a one-hot row has the bits of its expert alone.
    With `invariant` nothing depends on `tokens`, so a row's bits do not either.
    """
    full = dtype == torch.float32
    if full:
        # Without tensor cores, each thread holding its operands: larger tiles spill.
        small, medium = Tile(16, 32, 32, 4, 4), Tile(32, 32, 32, 8, 3)
        decode, narrow, large = medium, medium, medium
        d_expert = Tile(16, 64, 64, 8, 3)
    else:
        small, medium = Tile(16, 32, 128, 4, 4), Tile(64, 64, 64, 4, 3)
        decode, narrow = Tile(64, 32, 64, 4, 4), Tile(128, 64, 64, 8, 3)
        # Two accumulators of 128 x 128 leave registers to spare on sm_90 only.
        large = Tile(128, 128, 64, 8, 4) if capability[0] == 9 else narrow
        d_expert = Tile(64, 128, 128 if capability >= (9, 0) else 64, 8, 3)
    # Beside dx the product of d_weights holds x: in the medium tile it spills on sm_80.
    if invariant:
        return Plan(medium, 1, medium, decode, d_expert, 1)
    if tokens <= DECODE_BUCKETS[0]:
        forward, dx, d_weights = small, medium, decode
    elif tokens <= DECODE_BUCKETS[1]:
        forward, dx, d_weights = decode, medium, decode
    elif tokens <= SPLIT_TOKENS:
        forward, dx, d_weights = narrow, narrow, narrow
    else:
        forward, dx, d_weights = large, large, narrow
    forward_splits = 1
    if tokens <= SPLIT_TOKENS:
        programs = triton.cdiv(tokens, forward.block_t) * triton.cdiv(
            out_features, forward.block_out
        )
        forward_splits = _splits(programs, triton.cdiv(in_features, forward.block_in))
    programs = (
        m
        * triton.cdiv(out_features, d_expert.block_out)
        * triton.cdiv(in_features, d_expert.block_in)
    )
    token_splits = _splits(programs, triton.cdiv(tokens, d_expert.block_t))
    return Plan(forward, forward_splits, dx, d_weights, d_expert, token_splits)


def _splits(programs: int, steps: int) -> int:
    """The power of two that fills the GPU and leaves every part at least four steps."""
    splits = 1
    while splits < MAX_SPLITS and programs * splits < MIN_PROGRAMS and steps >= 8 * splits:
        splits *= 2
    return splits


def why_not(inputs: Inputs, *_: object) -> str | None:
    """Why these kernels cannot run a call, forward or backward, or None."""
    return triton_launch.why_not(inputs.x, dots=True)


def mixed_linear(inputs: Inputs) -> Tensor:
    """As reference.mixed_linear.

    float32, bfloat16 and float16; float32 accumulation, one rounding. Deterministic; with
    `invariant` a row's bits do not depend on the other rows. An expert of weight zero adds nothing
    even where it holds inf or NaN. A token whose example does not exist gives NaN.
    """
    x = inputs.x
    y = x.new_empty(*x.shape[:-1], inputs.expert_weight.shape[1])
    if y.numel() == 0:
        return y
    call = _Call(inputs)
    splits = call.plan.forward_splits
    planes = y if splits == 1 else _planes(y, splits)
    with torch.cuda.device_of(x):
        call.product(call.plan.forward, x, planes, splits=splits, bias=inputs.bias)
        if splits > 1:
            _sum_planes(planes, y)
    return y


def mixed_linear_backward(
    inputs: Inputs, dy: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, expert_weight, weights, bias), as reference.mixed_linear_backward.

        dx = sum_i w_i dy W_i          d_weights[b, i] = sum_t x_t . (dy_t W_i) + dy_t . bias_i
        d_expert_i = sum_t w_i dy_t^T x_t        d_bias_i = sum_t w_i dy_t

    What is not needed is empty and launches nothing. Deterministic. NaN in one example reaches
    neither the rows of dx nor those of d_weights of another.
    """
    x, expert_weight, weights, bias, _, _ = inputs
    call = _Call(inputs)
    dx, d_expert, d_weights, d_bias = (x.new_empty(0) for _ in needs)
    dots = None
    if needs[0]:
        dx = x.new_empty(x.shape)
    if needs[1]:
        d_expert = x.new_empty(expert_weight.shape)
    if needs[2]:
        d_weights = weights.new_empty(weights.shape)
        # A plane for each tile of in_features, and one for the bias.
        planes = triton.cdiv(call.in_features, call.plan.d_weights.block_out) + (bias is not None)
        dots = x.new_empty(planes, call.m, call.tokens, dtype=torch.float32)
    if needs[3]:
        d_bias = x.new_empty(expert_weight.shape[:2])
    with torch.cuda.device_of(x):
        if x.numel() > 0 and (needs[0] or needs[2]):
            out = dx if needs[0] else None
            tile = call.plan.dx if dots is None else call.plan.d_weights
            call.product(tile, dy, out, transposed=True, other=x, dots=dots)
        if dots is not None:
            if bias is not None:
                call.bias_dot(dy, bias, dots[-1])
            call.sum_per_example(dots, d_weights)
        if d_expert.numel() > 0:
            call.expert_gradient(dy, x, d_expert)
        if d_bias.numel() > 0:
            call.bias_gradient(dy, d_bias)
    return dx, d_expert, d_weights, d_bias


class _Call:
    """The arguments that the launches of one call share, in the layout the kernels read."""

    def __init__(self, inputs: Inputs) -> None:
        x, expert_weight, weights, _, example_ids, invariant = inputs
        self.m, self.out_features, self.in_features = expert_weight.shape
        self.tokens = x.shape[:-1].numel()
        sizes = (self.tokens, self.in_features, self.out_features, self.m)
        self.plan = plan(*sizes, x.dtype, capability_of(x), invariant)
        self.experts = unit_stride(expert_weight)
        self.ids = None if example_ids is None else example_ids.int().contiguous()
        self.tokens_per_example = self.tokens // max(1, weights.shape[0])
        self.rows = {
            "weights_ptr": weights.contiguous(),
            "ids_ptr": self.ids,
            "num_tokens": self.tokens,
            "batch_size": weights.shape[0],
            "tokens_per_example": self.tokens_per_example,
            "num_experts": self.m,
        }

    def product(
        self,
        tile: Tile,
        a: Tensor,
        out: Tensor | None,
        *,
        splits: int = 1,
        bias: Tensor | None = None,
        transposed: bool = False,
        other: Tensor | None = None,
        dots: Tensor | None = None,
    ) -> None:
        """out[split] = sum_i w_i (a W_i^T + bias_i), or dots[plane, i] = other . (a W_i)."""
        in_size, out_size = self.in_features, self.out_features
        if transposed:
            in_size, out_size = out_size, in_size
        a, other = matrix(a), matrix(other) if other is not None and dots is not None else None
        tiles = triton.cdiv(self.tokens, tile.block_t) * triton.cdiv(out_size, tile.block_out)
        kernels.mixed_product_kernel[(tiles * splits,)](
            x_ptr=a,
            expert_ptr=self.experts,
            bias_ptr=None if bias is None else bias.contiguous(),
            other_ptr=other,
            out_ptr=out,
            dots_ptr=dots,
            in_size=in_size,
            out_size=out_size,
            x_stride=a.stride(0),
            expert_stride=self.experts.stride(0),
            matrix_stride=self.experts.stride(1),
            other_stride=0 if other is None else other.stride(0),
            splits=splits,
            TRANSPOSED=transposed,
            **self.rows,
            **tile.blocks(),
            **tile.options(),
        )

    def bias_dot(self, dy: Tensor, bias: Tensor, out: Tensor) -> None:
        """out[i, t] = dy_t . bias_i."""
        if out.numel() == 0:
            return
        dy = matrix(dy)
        kernels.bias_dot_kernel[(triton.cdiv(self.tokens, _BIAS_BLOCKS["BLOCK_T"]) * self.m,)](
            dy_ptr=dy,
            bias_ptr=bias.contiguous(),
            dots_ptr=out,
            num_tokens=self.tokens,
            num_experts=self.m,
            out_size=self.out_features,
            dy_stride=dy.stride(0),
            **_BIAS_BLOCKS,
        )

    def sum_per_example(self, dots: Tensor, out: Tensor) -> None:
        """out[b, i] = sum over the planes and over the tokens of example b of dots[:, i, t]."""
        if out.numel() == 0:
            return
        per_token = dots.new_empty(dots.shape[1:])
        _sum_planes(dots, per_token)
        kernels.sum_per_example_kernel[(out.numel(),)](
            per_token_ptr=per_token,
            ids_ptr=self.ids,
            out_ptr=out,
            num_tokens=self.tokens,
            tokens_per_example=self.tokens_per_example,
            num_experts=self.m,
            BLOCK=_EXAMPLE_BLOCK,
        )

    def expert_gradient(self, dy: Tensor, x: Tensor, out: Tensor) -> None:
        """out[i] = sum_t w_i dy_t^T x_t."""
        tile, splits, dy, x = self.plan.d_expert, self.plan.token_splits, matrix(dy), matrix(x)
        planes = out if splits == 1 else _planes(out, splits)
        tiles = triton.cdiv(self.out_features, tile.block_out) * triton.cdiv(
            self.in_features, tile.block_in
        )
        kernels.expert_gradient_kernel[(tiles * self.m * splits,)](
            dy_ptr=dy,
            x_ptr=x,
            out_ptr=planes,
            in_size=self.in_features,
            out_size=self.out_features,
            dy_stride=dy.stride(0),
            x_stride=x.stride(0),
            splits=splits,
            **self.rows,
            **tile.blocks(),
            **tile.options(),
        )
        if splits > 1:
            _sum_planes(planes, out)

    def bias_gradient(self, dy: Tensor, out: Tensor) -> None:
        """out[i] = sum_t w_i dy_t."""
        splits, dy = self.plan.token_splits, matrix(dy)
        planes = out if splits == 1 else _planes(out, splits)
        tiles = triton.cdiv(self.out_features, _BIAS_BLOCKS["BLOCK_OUT"])
        kernels.bias_gradient_kernel[(tiles * self.m * splits,)](
            dy_ptr=dy,
            out_ptr=planes,
            out_size=self.out_features,
            dy_stride=dy.stride(0),
            splits=splits,
            **self.rows,
            **_BIAS_BLOCKS,
        )
        if splits > 1:
            _sum_planes(planes, out)


def _planes(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, *like.shape, dtype=torch.float32)


def _sum_planes(planes: Tensor, out: Tensor) -> None:
    if out.numel() > 0:
        kernels.sum_planes_kernel[(triton.cdiv(out.numel(), _SUM_BLOCK),)](
            planes_ptr=planes,
            out_ptr=out,
            size=out.numel(),
            num_planes=planes.shape[0],
            BLOCK=_SUM_BLOCK,
        )


def variants(capability: tuple[int, int]) -> list[Variant]:
    """Every kernel variant that `plan` can choose, for a compile without a GPU.

    The bias and the ids of examples change a few loads outside the inner loop: each comes with and
    without, not in all pairs.
    """
    fp32, ids = "*fp32", {"ids": "*i32"}
    found: list[Variant] = []

    def add(kernel: Any, blocks: dict[str, Any], types: dict[str, str], tile: Tile | None = None):  # type: ignore[no-untyped-def]
        if tile is not None:
            blocks = {**blocks, **tile.blocks()}
        found.append(variant(kernel, blocks, {} if tile is None else tile.options(), types))

    forward, backward = {"TRANSPOSED": False}, {"TRANSPOSED": True}
    for dtype, kind in KINDS.items():
        inputs = {"x": kind, "expert": kind, "weights": fp32}
        dots = {**inputs, "other": kind, "dots": fp32}
        for tokens, features, invariant in product(
            (*DECODE_BUCKETS, SPLIT_TOKENS, 2**15), (64, 4096, 2**18), (False, True)
        ):
            chosen = plan(tokens, features, features, 1, dtype, capability, invariant)
            outputs = {**inputs, "out": kind if chosen.forward_splits == 1 else fp32}
            kernel = kernels.mixed_product_kernel
            add(kernel, forward, {**outputs, "bias": kind}, chosen.forward)
            add(kernel, forward, {**outputs, **ids}, chosen.forward)
            add(kernel, backward, {**inputs, "out": kind}, chosen.dx)
            add(kernel, backward, {**dots, **ids, "out": kind}, chosen.d_weights)
            add(kernel, backward, dots, chosen.d_weights)
            sums = {"dy": kind, "weights": fp32, "out": kind if chosen.token_splits == 1 else fp32}
            for types in (sums, {**sums, **ids}):
                add(kernels.expert_gradient_kernel, {}, {**types, "x": kind}, chosen.d_expert)
                add(kernels.bias_gradient_kernel, _BIAS_BLOCKS, types)
        bias = {"dy": kind, "bias": kind, "dots": fp32}
        add(kernels.bias_dot_kernel, _BIAS_BLOCKS, bias)
        add(kernels.sum_planes_kernel, {"BLOCK": _SUM_BLOCK}, {"planes": fp32, "out": kind})
    sums = {"per_token": fp32, "out": fp32}
    for types in (sums, {**sums, **ids}):
        add(kernels.sum_per_example_kernel, {"BLOCK": _EXAMPLE_BLOCK}, types)
    return distinct(found)
