"""Which path and tiles a product of the Triton backend of mixed_lora takes: one pure function.

Imports no Triton, so that the choice can be read and tested where there is none.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: rows of tokens, columns, step along the inner axis, and how it runs."""

    tokens: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """How one product runs.

    path: "fused" or "split".
    shrink, product, expand: tiles; `product` is used by the fused path, `expand` by the split one,
        and their low-rank dots step by `rank_block`.
    low_rank_first: the fused product starts from z Q instead of adding it last.
    pdl: the fused product is launched as a programmatic dependent of the shrink.
    """

    path: str
    shrink: Tile
    product: Tile
    expand: Tile
    rank_block: int
    low_rank_first: bool
    pdl: bool


# Unmeasured starting points: no kernel of this file has run on a GPU. Sixteen-bit inputs: (largest
# T, shrink, product, low rank first). At decode every multiprocessor should stream its own part of
# W, so the tiles are narrow and deep; above it they are as large as registers allow.
_BUCKETS = (
    (16, Tile(16, 16, 256, 4, 4), Tile(16, 32, 256, 4, 4), False),
    (64, Tile(16, 16, 256, 4, 4), Tile(64, 32, 128, 4, 4), False),
    (256, Tile(16, 32, 128, 4, 4), Tile(64, 64, 64, 8, 4), False),
    (4096, Tile(32, 64, 128, 4, 3), Tile(128, 128, 64, 8, 3), True),
)
_PREFILL = (Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 3), True)
_INVARIANT = (Tile(32, 32, 128, 4, 3), Tile(64, 64, 64, 4, 4), False)
# A decode product of few columns is spread over more programs.
_NARROW_OUT, _NARROW = 2048, Tile(16, 16, 256, 4, 4)
# float32 runs without tensor cores, where a deep or wide tile spills registers.
_FLOAT32_BUCKETS = (
    (16, Tile(16, 16, 64, 4, 3), Tile(16, 32, 64, 4, 3), False),
    (256, Tile(16, 32, 32, 4, 3), Tile(32, 32, 32, 4, 2), False),
)
_FLOAT32_PREFILL = (Tile(32, 32, 32, 4, 3), Tile(64, 64, 16, 8, 3), False)
_EXPAND, _FLOAT32_EXPAND = Tile(64, 64, 32, 4, 2), Tile(32, 64, 16, 4, 2)


def plan(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    invariant: bool,
) -> Plan:
    """The path and the tiles of one product [tokens, in] -> [tokens, out] with `rank` = m * r.

    A pure function. Tokens count in buckets (16, 64, 256, 4096, more), so that a kernel compiles
    once a bucket, not once a size. With `invariant` the result does not depend on `tokens`.
    """
    full = dtype == torch.float32
    if invariant:
        shrink, product, first = _FLOAT32_PREFILL if full else _INVARIANT
    else:
        rows = _FLOAT32_BUCKETS if full else _BUCKETS
        last = _FLOAT32_PREFILL if full else _PREFILL
        shrink, product, first = next((row[1:] for row in rows if tokens <= row[0]), last)
        if not full and tokens <= _BUCKETS[0][0] and out_features <= _NARROW_OUT:
            product = _NARROW
    columns = 16 if rank <= 16 else shrink.columns
    # Beyond decode PyTorch's GEMM is the better base in float32, and in 16 bits on sm_90 and later
    # (these kernels issue no bulk copies) where in_features is large enough to pay for reading x
    # and updating the output once more: both cost about 4 T N bytes beside 2 T K N operations.
    library = tokens > 256 and (full or (capability >= (9, 0) and in_features > 2048))
    return Plan(
        path="split" if library and not invariant else "fused",
        shrink=replace(shrink, columns=columns),
        product=product,
        expand=_FLOAT32_EXPAND if full else _EXPAND,
        rank_block=16 if full else 32,
        low_rank_first=first,
        pdl=capability >= (9, 0),
    )
