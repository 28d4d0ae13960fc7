"""Triton kernels of sample: mix, filter and draw. Unverified on a GPU.

Without filters and in geometric mode the logits are read once: each program mixes a slice of a
row and notes its maximum, its mass and its best perturbed score; a second kernel combines a row's
slices in order. Probability mode writes the mixture first.

With filters the mixture is written too, [B, V] float32, and read again:
- once for the maximum and the mass of the whole row;
- ROUNDS = 8 times for each of top-k and top-p. The threshold is the smallest value above which
  there is less than k ids, or less than top_p of the mass; it is found by radix selection on the
  order-preserving integer of a float32, 4 bits a round. Exact, no sort, and ids that tie share a
  key, so all are kept. Masses are float64 sums of float64 exponentials;
- once for the draw over what is kept. min-p needs no threshold of its own: it is a comparison
  with the row's maximum.

A row whose filter is off, and a greedy row, is treated alike, with a threshold that keeps all:
which rows have filters is never read on the host. No atomics: two runs give the same bits, and a
row's bits do not depend on the other rows.
"""

import torch
from torch import Tensor

from clp_kernels.ops import triton_launch
from clp_kernels.ops.mix_logits.triton import (
    BLOCK,
    COMBINE_BLOCK,
    OPTIONS,
    logits_arguments,
    mixture,
    slices_of,
)
from clp_kernels.ops.mix_logits.triton_kernels import mix_kernel
from clp_kernels.ops.sample import triton_kernels as kernels
from clp_kernels.ops.sample.reference import Inputs
from clp_kernels.ops.triton_launch import KINDS, Variant, unit_stride, variant

# A program of a filter sums TILES tiles, so that the partials of a row, which each of its programs
# reads, stay small beside the row. Tiles of 1024 ids spill (triton 3.6, sm_90): each id takes a
# register pair for each of the 16 values of a digit. Unmeasured starting points.
NARROW_BLOCK = 512
TILES = 8
NARROW_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_ROUNDS = kernels.ROUNDS.value
_BINS = 16
_PARTS = 5


def why_not(inputs: Inputs) -> str | None:
    """Why these kernels cannot run a call, or None."""
    return triton_launch.why_not(inputs.logits)


def sample(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.sample, of float32, bfloat16 or float16; everything is read on the device only.

    A temperature that is negative or not finite gives token -1 and NaN too. Deterministic, each row
    by itself. Allocates by shape alone, so a CUDA graph may capture it.
    """
    logits, weights, mode, temperature, top_k, top_p, min_p, seed, position = inputs
    batch_size = logits.shape[1]
    tokens = logits.new_empty(batch_size, dtype=torch.int64)
    logprobs = logits.new_empty(batch_size, dtype=torch.float32)
    outputs = (tokens, logprobs, torch.empty_like(logprobs))
    if batch_size == 0:
        return outputs
    filtered = any(f is not None for f in (top_k, top_p, min_p))
    if weights is not None and (filtered or mode == "probability"):
        logits, weights = mixture(logits, weights, mode, torch.float32)[None], None
    elif filtered:
        logits = logits[:1].float().contiguous()
    with torch.cuda.device_of(logits):
        row = Rows(unit_stride(logits), weights, temperature)
        noise = (seed.contiguous(), position.contiguous())
        if not filtered:
            row.combine(row.partials(noise), None, outputs)
            return outputs
        rows = logits.new_empty(2, batch_size, dtype=torch.float64)
        row.combine(row.partials(None), rows, None)
        least = None
        if top_k is not None:
            least = row.threshold(rows, least, top_k=top_k.contiguous())
        if top_p is not None:
            least = row.threshold(rows, least, top_p=top_p.contiguous())
        row.combine(row.partials(noise, rows, least, min_p), rows, outputs)
    return outputs


class Rows:
    """The logits of one call and the launches over them."""

    def __init__(self, logits: Tensor, weights: Tensor | None, temperature: Tensor) -> None:
        self.logits, self.temperature = logits, temperature.contiguous()
        self.weights = None if weights is None else weights.contiguous()
        _, self.batch_size, self.vocab_size = logits.shape
        self.slices = slices_of(self.vocab_size)

    def partials(
        self,
        noise: tuple[Tensor, Tensor] | None,
        rows: Tensor | None = None,
        least: Tensor | None = None,
        min_p: Tensor | None = None,
    ) -> Tensor:
        """The partials of every slice: [5, B, slices] float64; without `noise` [2, B, slices]."""
        seed, position = noise or (None, None)
        parts = self._float64(2 if noise is None else _PARTS, self.batch_size, self.slices)
        kernels.partials_kernel[(self.batch_size * self.slices,)](
            weights_ptr=self.weights,
            log_norms_ptr=None,
            temperature_ptr=self.temperature,
            seed_ptr=seed,
            position_ptr=position,
            rows_ptr=rows,
            least_ptr=least,
            min_p_ptr=None if min_p is None else min_p.contiguous(),
            parts_ptr=parts,
            **logits_arguments(self.logits),
            BLOCK=BLOCK,
            **OPTIONS,
        )
        return parts

    def combine(
        self, parts: Tensor, rows: Tensor | None, outputs: tuple[Tensor, Tensor, Tensor] | None
    ) -> None:
        """Partials to `outputs`, or where these are None to the maximum and total in `rows`."""
        tokens, logprobs, filtered = outputs or (None, None, None)
        kernels.combine_kernel[(self.batch_size,)](
            parts_ptr=parts,
            temperature_ptr=self.temperature,
            rows_ptr=rows,
            tokens_ptr=tokens,
            logprobs_ptr=logprobs,
            filtered_ptr=filtered,
            batch_size=self.batch_size,
            slices=self.slices,
            BLOCK=COMBINE_BLOCK,
            **OPTIONS,
        )

    def threshold(
        self,
        rows: Tensor,
        least: Tensor | None,
        *,
        top_k: Tensor | None = None,
        top_p: Tensor | None = None,
    ) -> Tensor:
        """The least key [B] that one filter keeps, int64, of the ids that `least` has left."""
        slices = -(-self.vocab_size // (TILES * NARROW_BLOCK))
        prefix = torch.empty(
            _ROUNDS + 1, self.batch_size, dtype=torch.int64, device=self.logits.device
        )
        amounts = self._float64(2, _ROUNDS + 1, self.batch_size)
        parts = self._float64(2, self.batch_size, slices, _BINS)
        for round_id in range(_ROUNDS + 1):
            programs = self.batch_size * (slices if round_id < _ROUNDS else 1)
            kernels.narrow_kernel[(programs,)](
                z_ptr=self.logits,
                temperature_ptr=self.temperature,
                rows_ptr=rows,
                top_k_ptr=top_k,
                top_p_ptr=top_p,
                least_ptr=least,
                prefix_ptr=prefix,
                amounts_ptr=amounts,
                parts_ptr=parts,
                vocab_size=self.vocab_size,
                batch_size=self.batch_size,
                slices=slices,
                round_id=round_id,
                BLOCK=NARROW_BLOCK,
                TILES=TILES,
                **NARROW_OPTIONS,
            )
        return prefix[_ROUNDS]

    def _float64(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64, device=self.logits.device)


def variants(capability: tuple[int, int]) -> list[Variant]:
    """Every kernel variant that `sample` launches and mix_logits does not, on any GPU."""
    fp32, fp64, i64 = "*fp32", "*fp64", "*i64"
    fixed, combine = ({"BLOCK": BLOCK}, OPTIONS), ({"BLOCK": COMBINE_BLOCK}, OPTIONS)
    narrow = ({"BLOCK": NARROW_BLOCK, "TILES": TILES}, NARROW_OPTIONS)
    base, noise = {"temperature": fp64, "parts": fp64}, {"seed": i64, "position": i64}
    found = []
    for kind in KINDS.values():
        for types in ({}, {"weights": fp32}):
            one_pass = {**base, **noise, "logits": kind, **types}
            found.append(variant(kernels.partials_kernel, *fixed, one_pass))
        if kind != fp32:
            mix = {"logits": kind, "weights": fp32, "out": fp32}
            found.append(variant(mix_kernel, *fixed, mix))
            found.append(variant(mix_kernel, *fixed, {**mix, "log_norms": fp32}))
    rows = {**base, "logits": fp32}
    found.append(variant(kernels.partials_kernel, *fixed, rows))
    for types in ({"least": i64}, {"min_p": fp64}, {"least": i64, "min_p": fp64}):
        kept = {**rows, **noise, "rows": fp64, **types}
        found.append(variant(kernels.partials_kernel, *fixed, kept))
    drawn = {**base, "tokens": i64, "logprobs": fp32, "filtered": fp32}
    for types in (drawn, {**drawn, "rows": fp64}, {**base, "rows": fp64}):
        found.append(variant(kernels.combine_kernel, *combine, types))
    digits = {**base, "z": fp32, "rows": fp64, "prefix": i64, "amounts": fp64}
    for types in ({"top_k": i64}, {"top_p": fp64}, {"top_p": fp64, "least": i64}):
        found.append(variant(kernels.narrow_kernel, *narrow, {**digits, **types}))
    return found
