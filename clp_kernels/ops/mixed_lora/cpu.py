"""`mixed_lora` on the CPU: whole in C++, or the low-rank part around PyTorch's base product.

csrc/cpu/mixed_lora/mixed_lora.cpp multiplies, shrinks, mixes and expands in one parallel region.
Where many wide rows meet PyTorch's matrix products at full speed, these do it, with the mixing
between them. Which is faster `measured` says for the sizes that were measured on this machine, and
for others `use_native_base` and `use_native` do. In batch_invariant() the base product
runs in fixed tiles and the low-rank part in C++, whose rows do not depend on one another. The
backward is PyTorch's products, in float32 and a block of rows at a time if the processor has
none in the inputs' dtype.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels import native, trust
from clp_kernels.native import has_native_gemm
from clp_kernels.ops import choices
from clp_kernels.ops.mixed_lora import reference
from clp_kernels.ops.mixed_lora.reference import Inputs

# tokens * (in_features + out_features) up to which the C++ kernel beats PyTorch's products, whose
# calls alone take 170 us (docs/log.md); four times that on the fast path, which spares the checks.
# The last, beside products in 16 bits, is not measured: the kernel has run on processors without
# them only.
NATIVE_WORK, FAST_PATH_WORK, NATIVE_WORK_16_BITS = 2**18, 2**20, 2**16

# Rows up to which our float32 base product beats PyTorch's: 3.7 times faster with 2 rows of 2048
# features, 1.9 times with 16, 1.2 times with 96. In 16 bits on a processor without such products it
# is 4 to 6 times faster from 4 rows on, and 1.3 times with one. In smaller matrices than BASE_SIZE
# there are at most 5 us to win.
BASE_ROWS, BASE_SIZE = 96, 2**14

# A float32 copy of x or dy holds so many rows (1 MB at 4096 features), one of W^T so many columns
# of W.
BLOCK, WEIGHT_BLOCK = 64, 18

# Rows up to which the gradients of lora_A and lora_B are float32 products in 16 bits too: 10 to
# 40 us more in 1024 features.
FEW_ROWS = 8


# No number of tokens is larger.
ANY = 2**62


class Size(NamedTuple):
    """What the fastest path depends on beside the number of tokens. rank: m * r."""

    dtype: torch.dtype
    lora_dtype: torch.dtype
    in_features: int
    out_features: int
    rank: int
    threads: int

    @classmethod
    def of(cls, x: Tensor, lora_A: Tensor, out_features: int) -> "Size":
        """That of a call."""
        m, r, in_features = lora_A.shape
        return cls(x.dtype, lora_A.dtype, in_features, out_features, m * r, torch.get_num_threads())

    def __str__(self) -> str:
        names = (str(one).removeprefix("torch.") for one in self)
        return " ".join(map("{}={}".format, self._fields, names))

    @classmethod
    def parse(cls, text: str) -> "Size | None":
        """The size that has this text, None if none has."""
        fields = dict(field.partition("=")[::2] for field in text.split())
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in native.DTYPES}
        pair = [dtypes.get(fields.get(name, "")) for name in cls._fields[:2]]
        numbers = [fields.get(name, "") for name in cls._fields[2:]]
        if None in pair or not all(number.isdecimal() for number in numbers):
            return None
        return cls(*pair, *map(int, numbers))  # type: ignore[arg-type]


class Limits(NamedTuple):
    """Tokens from which and up to which the C++ kernel runs the base product too, and those up to
    which it runs the adapters of other calls; beyond, PyTorch's products run."""

    first: int
    whole: int
    adapters: int


@cache
def measured() -> dict[Size, Limits]:
    """Of sizes that were measured on this machine (clp_kernels.selftest.tuning)."""
    found = {Size.parse(text): of for text, of in choices.known("mixed_lora").items()}
    return {
        size: Limits(*of)
        for size, of in found.items()
        if size is not None and len(of) == len(Limits._fields) and 0 <= min(of) <= max(of) <= ANY
    }


def use_native(
    tokens: int, features: int, dtype: torch.dtype, gemm_dtype: torch.dtype, invariant: bool
) -> bool:
    """Whether the C++ kernel runs a forward; `features` are in_features + out_features.

    `gemm_dtype`: what PyTorch's products would run in (`product_dtype`). In another dtype than x's
    they would need copies, and are slower at every size but for 14 % at 2048 rows of 4096.
    """
    limit = NATIVE_WORK if dtype == torch.float32 else NATIVE_WORK_16_BITS
    return invariant or gemm_dtype != dtype or tokens * features <= limit


def use_native_base(tokens: int, size: int, dtype: torch.dtype) -> bool:
    """Whether the C++ kernel runs the base product too; size: base_weight's elements.

    Only outside of batch_invariant(), with a contiguous base_weight, and if no example's weights
    and not all of lora_B are zero (clp::has_bare_rows): then y has the bits of F.linear.
    """
    faster = tokens <= BASE_ROWS if dtype == torch.float32 else not has_native_gemm(dtype)
    return faster and size >= BASE_SIZE


def product_dtype(dtype: torch.dtype, lora_dtype: torch.dtype) -> torch.dtype:
    """x's dtype if PyTorch multiplies it and the adapters at full speed, else float32."""
    return dtype if lora_dtype == dtype and has_native_gemm(dtype) else torch.float32


def why_not(inputs: Any, *_: object) -> str | None:
    """None if the kernels of this op, or of mixed_linear, can run, else a sentence."""
    if inputs.x.device.type != "cpu":
        return f"the tensors are on {inputs.x.device}, not on the CPU"
    return native.cpu_missing() or native.dtype_why_not(inputs.x)


def mixed_lora(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """As reference.mixed_lora: y in x's dtype, u = x A^T in float32."""
    x, base_weight, lora_A, lora_B, weights, bias, example_ids, invariant = inputs
    m, r, in_features = lora_A.shape
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    tokens, out_features = rows.shape[0], base_weight.shape[0]
    if x.numel() * out_features * m * r == 0:  # an empty tensor has no address
        return reference.mixed_lora(inputs)
    gemm_dtype = product_dtype(x.dtype, lora_A.dtype)
    limits = measured().get(Size.of(x, lora_A, out_features))
    if limits is None:
        native_base = use_native_base(tokens, base_weight.numel(), x.dtype)
        in_native = use_native(tokens, in_features + out_features, x.dtype, gemm_dtype, invariant)
    else:
        native_base = limits.first <= tokens <= limits.whole
        in_native = invariant or gemm_dtype != x.dtype or tokens <= limits.adapters
    native_base = native_base and not invariant and base_weight.is_contiguous()
    if native_base:
        lora_B, weights = lora_B.contiguous(), weights.contiguous()
        native_base = not native.cpu().mixed_lora_has_bare_rows(weights, lora_B)
    if native_base:
        y = x.new_empty(*x.shape[:-1], out_features)
        base = (base_weight, bias)
        u = run_native(rows, lora_A, lora_B, weights, example_ids, y, *base)
        return y, u if x.dim() == 2 else u.view(*x.shape[:-1], m * r)
    linear = reference.tiled_linear if invariant else F.linear
    y = linear(x, base_weight, bias).contiguous()
    if in_native:
        u = run_native(rows, lora_A, lora_B, weights, example_ids, y)
    else:
        u = _add_low_rank_by_products(rows, lora_A, lora_B, weights, example_ids, y.flatten(0, -2))
    return y, u if x.dim() == 2 else u.view(*x.shape[:-1], m * r)


def choose(size: Size, limits: Limits) -> None:
    """Sets the limits of a size for this process."""
    measured()[size] = limits
    fast_path.cache_clear()


def forget() -> None:
    """Has `measured` look again: there are new results."""
    measured.cache_clear()
    fast_path.cache_clear()


@cache
def fast_path() -> Callable[..., Tensor | None] | None:
    """csrc/bindings/fast_path.cpp: a function of the public arguments, or None without it.

    Its last argument is the depth of batch_invariant(). It returns y, or None if the call has to be
    checked and dispatched; then nothing has happened.
    """
    if native.cpu_missing() or trust.distrust("mixed_lora", "cpu", torch.device("cpu")):
        return None
    work, base_tokens = [], []
    for dtype in native.DTYPES:
        wide = dtype == torch.float32 or not has_native_gemm(dtype)
        work.append(FAST_PATH_WORK if wide else NATIVE_WORK_16_BITS)
        most = BASE_ROWS if dtype == torch.float32 else FAST_PATH_WORK
        base_tokens.append(most if use_native_base(1, BASE_SIZE, dtype) else 0)
    products = [has_native_gemm(dtype) for dtype in native.DTYPES]
    native.cpu().set_mixed_lora_rule(work, base_tokens, BASE_SIZE, products)
    index = native.DTYPES.index
    native.cpu().set_mixed_lora_limits(
        {(index(s.dtype), index(s.lora_dtype), *s[2:]): limits for s, limits in measured().items()}
    )
    return native.cpu().mixed_lora_fast_path  # type: ignore[no-any-return]


def run_native(
    x: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    weights: Tensor | None,
    example_ids: Tensor | None,
    y: Tensor | None,
    base_weight: Tensor | None = None,
    bias: Tensor | None = None,
    u: Tensor | None = None,
    isa: str = "",
) -> Tensor:
    """The C++ kernel: writes x W^T + bias + ((x A^T) * weights) B^T to y; returns u = x A^T.

    Without base_weight y holds the base product and the rest is added to it. With lora_A None u
    [T, m*r] is read, else it is written, to the one given or a new one; with lora_B None (and
    weights and y) u alone is computed. x [T, in] with T > 0,
    y [T, out] in x's dtype (any shape of that many elements where contiguous), lora_A in x's dtype
    or float32 and m * r > 0; weights [B, m] float32 with example_ids [T], or B dividing T. isa: an
    instruction set for this call, "" for the one in use. A row's bits depend on neither the other
    rows nor the number of threads.
    """
    tokens, in_features = x.shape
    if in_features > 1 and x.stride(1) != 1:
        x = x.contiguous()
    out_features = 0 if lora_B is None else lora_B.shape[1]
    if lora_A is not None:
        m, r, lora_dtype = lora_A.shape[0], lora_A.shape[1], lora_A.dtype
        u = torch.empty((tokens, m * r), dtype=torch.float32) if u is None else u
    else:
        assert lora_B is not None and u is not None
        m, r, lora_dtype = lora_B.shape[0], lora_B.shape[2], lora_B.dtype
    has_ids = example_ids is not None
    native.cpu().mixed_lora(
        x=x,
        x_dtype=x.dtype,
        x_stride=x.stride(0),
        base_weight=None if base_weight is None else base_weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        lora_A=None if lora_A is None else lora_A.contiguous(),
        lora_B=None if lora_B is None else lora_B.contiguous(),
        lora_dtype=lora_dtype,
        weights=None if weights is None else weights.contiguous(),
        example_ids=None if example_ids is None else example_ids.contiguous(),
        wide_ids=example_ids is not None and example_ids.dtype == torch.int64,
        tokens_per_example=1 if weights is None or has_ids else tokens // weights.shape[0],
        y=y,
        y_stride=y.stride(0) if y is not None and y.dim() == 2 else out_features,
        u=u,
        T=tokens,
        K=in_features,
        N=out_features,
        m=m,
        r=r,
        num_threads=torch.get_num_threads(),
        isa=isa,
    )
    return u


def token_weights(weights: Tensor, example_ids: Tensor | None, tokens: int) -> Tensor:
    """weights [B, m] as [T, m]."""
    if example_ids is not None:
        return weights.index_select(0, example_ids)
    each = tokens // weights.shape[0]
    return weights if each == 1 else weights.repeat_interleave(each, 0)


def _mix(u: Tensor, weights: Tensor, example_ids: Tensor | None, z: Tensor) -> Tensor:
    """z = u [T, m*r] times the weights of its token; where one is zero, zero whatever u is. z may
    be u."""
    tokens, m = len(u), weights.shape[1]
    has_ids = example_ids is not None
    native.cpu().mixed_lora_mix(
        u=u,
        weights=weights.contiguous(),
        example_ids=None if example_ids is None else example_ids.contiguous(),
        wide_ids=example_ids is not None and example_ids.dtype == torch.int64,
        tokens_per_example=1 if has_ids else tokens // len(weights),
        z=z,
        T=tokens,
        m=m,
        r=u.shape[1] // m,
    )
    return z


def _stacked(lora_B: Tensor) -> Tensor:
    """lora_B [m, out, r] as [out, m*r]."""
    m, out_features, r = lora_B.shape
    stacked = lora_B.new_empty(out_features, m * r)
    native.cpu().mixed_lora_stack(
        lora_B=lora_B.contiguous(), stacked=stacked, bytes=lora_B.itemsize, m=m, N=out_features, r=r
    )
    return stacked


def _over_rows(rank: Tensor, rows: Tensor) -> Tensor:
    """rank^T rows, [m*r, features]; rank [T, m*r] float32, rows [T, features]. In 16 bits rank is
    rounded, which averages out over many rows; over few the product is one in float32."""
    if len(rows) <= FEW_ROWS:
        rows = rows.float()
    return rank.to(rows.dtype).t() @ rows


def _add_low_rank_by_products(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    example_ids: Tensor | None,
    y: Tensor,
) -> Tensor:
    """What `run_native` does, by PyTorch's products in x's dtype; y [T, out]."""
    bare = base = None
    if native.cpu().mixed_lora_has_bare_rows(weights.contiguous(), lora_B.contiguous()):
        zero = token_weights(weights, example_ids, len(x)) == 0
        bare = zero.all(1).nonzero()[:, 0]
        base = y[bare]
    # In 16 bits PyTorch's products would round u and, in the backward, G = dy B: the factors of
    # d_weights. The C++ kernel keeps them in float32 and is as fast (docs/log.md, 2026-11-28).
    if x.dtype == torch.float32:
        u = x @ lora_A.flatten(0, 1).t()
    else:
        u = run_native(x, lora_A, None, None, None, None)
    z = _mix(u, weights, example_ids, torch.empty_like(u)).to(x.dtype)
    y.addmm_(z, _stacked(lora_B).t())
    if base is not None:
        y[bare] = base
    return u


def mixed_lora_backward(
    inputs: Inputs, dy: Tensor, u: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.mixed_lora_backward; keeps [T, m*r] and blocks of rows beside the gradients."""
    x, base_weight, lora_A = inputs[:3]
    if inputs.invariant or lora_A.shape[:2].numel() * x.numel() * dy.numel() == 0:
        return reference.mixed_lora_backward(inputs, dy, u, needs)
    rows, dy_rows = x.flatten(0, -2), dy.flatten(0, -2)
    d_base, d_bias = (x.new_empty(0) for _ in range(2))
    if needs[1]:
        d_base = (dy_rows.t().float() @ rows.float()).to(base_weight.dtype)
    if needs[5]:
        d_bias = dy_rows.sum(0, dtype=torch.float32).to(base_weight.dtype)
    gemm_dtype = product_dtype(x.dtype, lora_A.dtype)
    gradients = _gradients_by_products if x.dtype == gemm_dtype else _gradients_native
    dx, d_lora_A, d_lora_B, d_weights = gradients(
        inputs._replace(x=rows), dy_rows, u.view(len(rows), -1), needs
    )
    if needs[0]:
        dx = dx.view(x.shape)
    return dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias


def _gradients_by_products(
    inputs: Inputs, dy: Tensor, u: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, d_lora_A, d_lora_B, d_weights, by products in x's dtype; x [T, in], dy [T, out].

    What lies between two products is float32, and rounded for the second alone.
    """
    x, base_weight, lora_A, lora_B, weights, _, example_ids, _ = inputs
    m, r, _ = lora_A.shape
    dx, d_lora_A, d_lora_B, d_weights = (x.new_empty(0) for _ in range(4))
    if needs[3]:
        d_B = _over_rows(_mix(u, weights, example_ids, torch.empty_like(u)), dy)
        d_lora_B = d_B.unflatten(0, (m, r)).transpose(1, 2).to(lora_B.dtype).contiguous()
        del d_B
    if not (needs[0] or needs[2] or needs[4]):
        return dx, d_lora_A, d_lora_B, d_weights
    if x.dtype == torch.float32:
        g = dy @ _stacked(lora_B)
    else:
        g = run_native(dy, lora_B.mT, None, None, None, None)
    if needs[4]:
        d_w = (g * u).view(len(u), m, r).sum(-1)
        d_weights = reference.sum_per_example(d_w, len(weights), example_ids)
        del d_w
    du = _mix(g, weights, example_ids, g)
    if needs[2]:
        d_lora_A = _over_rows(du, x).view(lora_A.shape).to(lora_A.dtype)
    if needs[0]:
        # The largest last, when little else is kept: the peak is 1.06 times the frozen layer's.
        dx = F.linear(dy, base_weight.t()).contiguous()
        dx.addmm_(du.to(x.dtype), lora_A.flatten(0, 1))
    return dx, d_lora_A, d_lora_B, d_weights


def _gradients_native(
    inputs: Inputs, dy: Tensor, u: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As _gradients_by_products, if the processor has no product in x's dtype.

    What is needed before dx lies in dx's own memory, the rank [T, m*r] at its beginning: with u,
    64 of 1024 bfloat16 features would else be 12.5 % of the layer's activations, not 6.25 %.
    """
    x, base_weight, lora_A, lora_B, weights, _, example_ids, _ = inputs
    m, r, in_features = lora_A.shape
    tokens, out_features = dy.shape
    dx, d_lora_A, d_lora_B, d_weights = (x.new_empty(0) for _ in range(4))
    of_rank, of_features = tokens * m * r, (m * r + BLOCK) * max(in_features, out_features)
    spare = dx.float()
    if needs[0]:
        dx = x.new_empty(tokens, in_features)
        spare = dx.view(-1)[: dx.numel() // 2 * 2].view(torch.float32)
    inside = 4 * (of_rank + of_features) <= spare.numel()
    if not inside:
        spare = torch.empty(of_rank + of_features, dtype=torch.float32)
    rank, features = spare[:of_rank].view(tokens, m * r), spare[-of_features:]
    if needs[3]:
        d_B = _gradient_of_rank(_mix(u, weights, example_ids, rank), dy, features)
        # A copy always: `features` is written again.
        d_lora_B = lora_B.new_empty(lora_B.shape).copy_(d_B.unflatten(0, (m, r)).mT)
    if not (needs[0] or needs[2] or needs[4]):
        return dx, d_lora_A, d_lora_B, d_weights
    transposed = features.view(lora_B.dtype)[: lora_B.numel()].view(m, r, -1).copy_(lora_B.mT)
    run_native(dy, transposed, None, None, None, None, u=rank)
    if needs[4]:
        d_w = torch.empty(tokens, m, dtype=torch.float32)
        for begin in range(0, tokens, BLOCK):
            block = slice(begin, begin + BLOCK)
            torch.sum((rank[block] * u[block]).view(-1, m, r), -1, out=d_w[block])
        d_weights = reference.sum_per_example(d_w, len(weights), example_ids)
        del d_w
    _mix(rank, weights, example_ids, rank)
    if needs[2]:
        d_A = _gradient_of_rank(rank, x, features)
        d_lora_A = lora_A.new_empty(lora_A.shape).copy_(d_A.view(lora_A.shape))
    while needs[0] and tokens > 0:
        # The rows of dx from `begin` on hold no rank that a row before `tokens` needs.
        begin = -(-tokens * m * r * 4 // (in_features * dx.element_size())) if inside else 0
        if begin > 0 and tokens <= BLOCK:
            begin, rank = 0, rank[:tokens].clone()
        rows = slice(begin, tokens)
        _input_gradient(dy[rows], base_weight, rank[rows], lora_A, dx[rows])
        tokens = begin
    return dx, d_lora_A, d_lora_B, d_weights


def _gradient_of_rank(rank: Tensor, rows: Tensor, memory: Tensor) -> Tensor:
    """rank^T rows, [m*r, features], in `memory`; rank [T, m*r] float32, rows [T, features]."""
    size, features = rank.shape[1], rows.shape[1]
    total, block = memory[: (size + BLOCK) * features].view(-1, features).split([size, BLOCK])
    for begin in range(0, len(rows), BLOCK):
        part = rank[begin : begin + BLOCK]
        floats = block[: len(part)].copy_(rows[begin : begin + BLOCK])
        # beta 0: whatever stood there is not read.
        total.addmm_(part.t(), floats, beta=float(begin > 0))
    return total


def _input_gradient(
    dy: Tensor, base_weight: Tensor, du: Tensor, lora_A: Tensor, dx: Tensor
) -> None:
    """dx = dy W + du A with one rounding, by the C++ kernel, which reads W^T and A^T: a block of
    their columns is copied at a time. PyTorch's dy @ W on a transposed W takes 80 times as long
    if the processor has no product in this dtype."""
    ones = torch.ones(1, lora_A.shape[0], dtype=torch.float32)
    for begin in range(0, dx.shape[1], WEIGHT_BLOCK):
        columns = slice(begin, begin + WEIGHT_BLOCK)
        transposed = base_weight[:, columns].t().contiguous()
        run_native(dy, None, lora_A[..., columns].mT, ones, None, dx[:, columns], transposed, u=du)
        del transposed  # or two of them would be kept
