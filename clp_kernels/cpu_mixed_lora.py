"""`mixed_lora` on the CPU: PyTorch's base product, the low-rank part fused around it.

csrc/mixed_lora.cpp shrinks, mixes and expands in one parallel region. Where many wide rows meet
PyTorch's matrix products at full speed, these do it, with the mixing between them; `use_native`
says which. In batch_invariant() the base product runs in fixed tiles and the low-rank part in C++,
whose rows do not depend on one another. The backward is PyTorch's products, in float32 and a block
of rows at a time where the processor has none in the inputs' dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels import native, reference
from clp_kernels.native import has_native_gemm

# tokens * (in_features + out_features) up to which the C++ kernel beats PyTorch's products, whose
# calls alone take 170 us (docs/log.md, 2026-11-24). The second, beside products in 16 bits, is not
# measured: the kernel has run on processors without them only.
NATIVE_WORK, NATIVE_WORK_16_BITS = 2**18, 2**16

# A float32 copy of x or dy holds so many rows (1 MB at 4096 features), of W so many columns.
BLOCK, WEIGHT_BLOCK = 64, 64


def use_native(
    tokens: int, features: int, dtype: torch.dtype, gemm_dtype: torch.dtype, invariant: bool
) -> bool:
    """Whether the C++ kernel runs a forward; `features` are in_features + out_features.

    `gemm_dtype`: what PyTorch's products would run in (`product_dtype`). In another dtype than x's
    they would need copies, and are slower at every size but for 14 % at 2048 rows of 4096.
    """
    limit = NATIVE_WORK if dtype == torch.float32 else NATIVE_WORK_16_BITS
    return invariant or gemm_dtype != dtype or tokens * features <= limit


def product_dtype(dtype: torch.dtype, lora_dtype: torch.dtype) -> torch.dtype:
    """x's dtype where PyTorch multiplies it and the adapters at full speed, else float32."""
    return dtype if lora_dtype == dtype and has_native_gemm(dtype) else torch.float32


def why_not(x: Tensor, *_: object) -> str | None:
    """None where these kernels can run (x, or dy in the backward), else a sentence."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}, not on the CPU"
    return native.cpu_missing() or native.dtype_why_not(x)


def mixed_lora(
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    example_ids: Tensor | None,
    invariant: bool,
) -> tuple[Tensor, Tensor]:
    """As reference.mixed_lora: y in x's dtype, u = x A^T in float32."""
    m, r, in_features = lora_A.shape
    linear = reference.tiled_linear if invariant else F.linear
    y = linear(x, base_weight, bias).contiguous()
    rows = x if x.dim() == 2 else x.reshape(-1, in_features)
    tokens = rows.shape[0]
    features = in_features + base_weight.shape[0]
    gemm_dtype = product_dtype(x.dtype, lora_A.dtype)
    if tokens * m * r == 0:
        u = torch.zeros(tokens, m * r)
    elif use_native(tokens, features, x.dtype, gemm_dtype, invariant):
        u = add_low_rank(rows, lora_A, lora_B, weights, example_ids, y)
    else:
        per_token, out = token_weights(weights, example_ids, tokens), y.view(tokens, -1)
        u = _add_low_rank_by_products(rows, lora_A, lora_B, per_token, out)
    return y, u if x.dim() == 2 else u.view(*x.shape[:-1], m * r)


def add_low_rank(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    example_ids: Tensor | None,
    y: Tensor,
    isa: str = "",
) -> Tensor:
    """The C++ kernel: adds ((x A^T) * weights) B^T to y in place and returns u = x A^T.

    x [T, in] with T > 0, y contiguous of T * out elements in x's dtype, lora_A in x's dtype or
    float32 and m * r > 0; weights [B, m] float32 with example_ids [T], or B dividing T. isa: an
    instruction set for this call, "" for the one in use. A row's bits depend on neither the other
    rows nor the number of threads.
    """
    m, r, in_features = lora_A.shape
    tokens = x.shape[0]
    if in_features > 1 and x.stride(1) != 1:
        x = x.contiguous()
    u = torch.empty((tokens, m * r), dtype=torch.float32)
    # Held here, because only their addresses are passed.
    held = (lora_A.contiguous(), lora_B.contiguous(), weights.contiguous())
    ids = None if example_ids is None else example_ids.contiguous()
    native.cpu().mixed_lora(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.stride(0),
        held[0].data_ptr(),
        held[1].data_ptr(),
        native.DTYPES[lora_A.dtype],
        held[2].data_ptr(),
        0 if ids is None else ids.data_ptr(),
        ids is not None and ids.dtype == torch.int64,
        1 if ids is not None else tokens // weights.shape[0],
        y.data_ptr(),
        u.data_ptr(),
        tokens,
        in_features,
        lora_B.shape[1],
        m,
        r,
        torch.get_num_threads(),
        isa,
    )
    return u


def token_weights(weights: Tensor, example_ids: Tensor | None, tokens: int) -> Tensor:
    """weights [B, m] as [T, m]."""
    if example_ids is not None:
        return weights.index_select(0, example_ids)
    each = tokens // weights.shape[0]
    return weights if each == 1 else weights.repeat_interleave(each, 0)


def _mix_(u: Tensor, per_token: Tensor, zero: Tensor | None) -> Tensor:
    """u [T, m*r] times the weights of its token, in place; where `zero`, zero whatever u is."""
    m = per_token.shape[1]
    z = u.view(-1, m, u.shape[1] // m).mul_(per_token[:, :, None])
    if zero is not None:
        z.masked_fill_(zero[:, :, None], 0.0)
    return u


def _zeros(per_token: Tensor) -> Tensor | None:
    """Where a weight is zero, or None where none is."""
    zero = per_token == 0
    return zero if bool(zero.any()) else None


def _stacked(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """lora_B [m, out, r] as [out, m*r]."""
    return lora_B.transpose(0, 1).reshape(lora_B.shape[1], -1).to(dtype)


def _blocks(tokens: int, dtype: torch.dtype, gemm_dtype: torch.dtype) -> list[slice]:
    """All rows at once, or blocks where they have to be copied to another dtype."""
    step = tokens if dtype == gemm_dtype else BLOCK
    return [slice(begin, begin + step) for begin in range(0, tokens, step)]


def _add_low_rank_by_products(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, per_token: Tensor, y: Tensor
) -> Tensor:
    """What `add_low_rank` does, by PyTorch's products in x's dtype; y [T, out]."""
    zero = _zeros(per_token)
    bare = None if zero is None else zero.all(1).nonzero()[:, 0]
    base = None if bare is None else y[bare]
    product = x @ lora_A.flatten(0, 1).t()
    u = product.float()
    z = u.clone() if product.dtype == torch.float32 else product.float()
    y.addmm_(_mix_(z, per_token, zero).to(x.dtype), _stacked(lora_B, x.dtype).t())
    if base is not None:
        y[bare] = base
    return u


def mixed_lora_backward(
    dy: Tensor,
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    example_ids: Tensor | None,
    u: Tensor,
    invariant: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.mixed_lora_backward; holds [T, m*r] and blocks of rows beside the gradients."""
    m, r, in_features = lora_A.shape
    if invariant or m * r == 0 or x.numel() == 0:
        return reference.mixed_lora_backward(
            dy, x, base_weight, lora_A, lora_B, weights, example_ids, u, invariant, needs
        )
    out_features = dy.shape[-1]
    rows, dy_rows = x.reshape(-1, in_features), dy.reshape(-1, out_features)
    tokens = rows.shape[0]
    gemm_dtype = product_dtype(x.dtype, lora_A.dtype)
    w = token_weights(weights, example_ids, tokens)
    zero = _zeros(w)
    A, B = lora_A.flatten(0, 1), _stacked(lora_B, gemm_dtype)
    d_base, d_lora_A, d_lora_B, d_weights, d_bias = (x.new_empty(0) for _ in needs[1:])
    if needs[1]:
        d_base = (dy_rows.t().float() @ rows.float()).to(base_weight.dtype)
    if needs[5]:
        d_bias = dy_rows.sum(0, dtype=torch.float32).to(base_weight.dtype)
    d_A, d_B = torch.empty(A.shape, dtype=gemm_dtype), torch.empty(B.t().shape, dtype=gemm_dtype)
    parts, dots = [], torch.empty(tokens, m)
    for block in _blocks(tokens, x.dtype, gemm_dtype):
        add = {"beta": float(block.start > 0)}  # 0: whatever stood there is not read
        dy_block, u_block = dy_rows[block].to(gemm_dtype), u.view(tokens, m * r)[block]
        if needs[3]:
            z = _mix_(u_block.clone(), w[block], None if zero is None else zero[block])
            d_B.addmm_(z.to(gemm_dtype).t(), dy_block, **add)
            del z
        if not (needs[0] or needs[2] or needs[4]):
            continue
        g = (dy_block @ B).float()
        if needs[4]:
            dots[block] = (g * u_block).view(-1, m, r).sum(-1)
        _mix_(g, w[block], None if zero is None else zero[block])
        parts.append(g.to(gemm_dtype))
        if needs[2]:
            d_A.addmm_(parts[-1].t(), rows[block].to(gemm_dtype), **add)
    del B, dy_block
    if needs[2]:
        d_lora_A = d_A.view(m, r, in_features).to(lora_A.dtype)
    if needs[3]:
        d_lora_B = d_B.view(m, r, out_features).transpose(1, 2).to(lora_B.dtype).contiguous()
    del d_A, d_B
    if needs[4]:
        d_weights = reference.sum_per_example(dots, weights.shape[0], example_ids)
    # The largest last, when little else is held: the peak is 1.06 times the frozen layer's.
    dx = x.new_empty(0)
    if needs[0]:
        du = parts[0] if len(parts) == 1 else torch.cat(parts)
        del parts
        if x.dtype == gemm_dtype:
            dx = F.linear(dy, base_weight.t()).contiguous()
            dx.view(tokens, in_features).addmm_(du, A)
        else:
            dx = _input_gradient_by_blocks(dy_rows, base_weight, du, A).view(x.shape)
    return dx, d_base, d_lora_A, d_lora_B, d_weights, d_bias


def _input_gradient_by_blocks(dy: Tensor, base_weight: Tensor, du: Tensor, A: Tensor) -> Tensor:
    """dy W + du A with one rounding, from float32 copies of blocks: where PyTorch has no fast
    product in this dtype, its dy @ W on a transposed W is 40 times slower than this."""
    dx = dy.new_empty(dy.shape[0], base_weight.shape[1])
    for begin in range(0, dx.shape[1], WEIGHT_BLOCK):
        columns = slice(begin, begin + WEIGHT_BLOCK)
        weight, low_rank = base_weight[:, columns].float(), A[:, columns].float()
        for rows in _blocks(dy.shape[0], dy.dtype, torch.float32):
            dx[rows, columns] = torch.addmm(du[rows] @ low_rank, dy[rows].float(), weight)
    return dx
