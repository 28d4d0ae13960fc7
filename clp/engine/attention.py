"""The plans of the sampler's forwards: attention over the slots of a cache.

clp/policies/attention.py says how a plan reaches the attention of a model. The plan alone knows to
which slot and position a token belongs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clp.engine.kv_cache import KVCache, Segment
from clp.policies.attention import PaddedSequences, causal_mask
from clp_kernels.ops.slot_attention import cpu as cpu_slot_attention


class Prefill:
    """Plan of a forward over the segments' tokens, one segment after the other.

    Segments from position 0 on attend together, padded to the longest of a group of similar length
    (attention alone is padded, no matrix product); a later segment of a prompt attends by itself.
    """

    def __init__(self, cache: KVCache, segments: Sequence[Segment], device: torch.device) -> None:
        self.cache = cache
        self._later: list[tuple[Segment, slice]] = []
        first = 0
        slots: list[int] = []
        positions: list[int] = []
        starting = []
        for segment in segments:
            slot, start, stop = segment
            slots += [slot] * (stop - start)
            positions += range(start, stop)
            if start:
                self._later.append((segment, slice(first, first + stop - start)))
            else:
                starting.append(range(first, first + stop))
            first += stop - start
        self._target = _WriteIndex(cache, torch.tensor([slots, positions], device=device))
        self._starting = PaddedSequences(starting, device)
        places, size = self._starting.places, self._starting.size
        later = [token for _, here in self._later for token in range(here.start, here.stop)]
        places.update(zip(later, range(size, size + len(later)), strict=True))
        self._back = torch.tensor([places[token] for token in range(first)], device=device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """q [T, H, 1, d], k and v [T, heads, 1, d] -> [T, 1, H, d]."""
        self.cache.windows[layer] = window
        keys, values = self.cache.layer(layer, k, v)
        self._target.write(keys, k)
        self._target.write(values, v)
        q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
        parts = self._starting.attend(q, k, v, scale, window)
        for (slot, start, stop), here in self._later:
            mask = causal_mask(start, stop, window, q.device)
            own = q[here].transpose(0, 1)[None]
            cached = slice(slot, slot + 1), slice(None), slice(stop)
            out = F.scaled_dot_product_attention(
                own, keys[cached], values[cached], mask, scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)[self._back][:, None]


class _WriteIndex:
    """Where a forward's keys are written: for each token a slot and a position, int64 [2, T]."""

    def __init__(self, cache: KVCache, places: Tensor) -> None:
        self._cache, self._places = cache, places
        self._index: dict[int, Tensor] = {}  # by number of heads: the same in every layer

    def write(self, slots: Tensor, new: Tensor) -> None:
        """Writes new [T, heads, 1, d] into slots [slots, heads, capacity, d]."""
        heads, d = slots.shape[1], slots.shape[3]
        if heads not in self._index:
            slot, position = self._places[:, :, None]
            head = torch.arange(heads, device=slot.device)
            self._index[heads] = ((slot * heads + head) * self._cache.capacity + position).flatten()
        slots.view(-1, d).index_copy_(0, self._index[heads], new.reshape(-1, d))


class Decode:
    """Plan of a forward over one token for each of the slots 0 to B - 1, or for one slot alone.

    On the CPU csrc/cpu/slot_attention computes the attention, in dtypes that it has, and SDPA
    elsewhere.

    Args:
        first: The first of the slots, 0 except in a step of one sequence.
        lengths: int64 [B], tokens that each slot has before this one.
        longest: The step reads this many tokens of each slot.
        even: Whether all lengths are longest - 1, so that no mask is needed.
        targets: int64 [B], the slots where the keys are written, if not the slots that are read.
    """

    def __init__(
        self,
        cache: KVCache,
        first: int,
        lengths: Tensor,
        longest: int,
        even: bool,
        targets: Tensor | None = None,
    ) -> None:
        self.cache, self.first, self.lengths, self.longest = cache, first, lengths, longest
        self.even, self.count, self._targets = even, lengths.shape[0], targets
        self._native: bool | None = None  # whether the CPU kernel attends; the first layer decides
        self._write_index: _WriteIndex | None = None
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """q [B, H, 1, d], k and v [B, heads, 1, d] -> [B, 1, H, d]."""
        self.cache.windows[layer] = window
        keys, values = self.cache.layer(layer, k, v)
        if self._native is None:
            self._native = self._targets is None and cpu_slot_attention.why_not(q) is None
        if self._native:
            # It reads each slot to its own length: neither `longest` nor a mask is needed.
            return cpu_slot_attention.slot_attention(
                q, k, v, keys, values, self.lengths, self.first, scale, window
            )
        index = self._index()
        index.write(keys, k)
        index.write(values, v)
        slots = slice(self.first, self.first + self.count)
        out = F.scaled_dot_product_attention(
            # The queries of a group stand as if they were positions: keys are not repeated.
            q.reshape(self.count, k.shape[1], -1, q.shape[-1]),
            keys[slots, :, : self.longest],
            values[slots, :, : self.longest],
            attn_mask=self._mask(window, q.dtype),
            scale=scale,
        )
        return out.reshape(self.count, 1, -1, out.shape[-1])

    def _index(self) -> _WriteIndex:
        if self._write_index is None:
            slots = self._targets
            if slots is None:
                end = self.first + self.count
                slots = torch.arange(self.first, end, device=self.lengths.device)
            self._write_index = _WriteIndex(self.cache, torch.stack([slots, self.lengths]))
        return self._write_index

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, 1, longest], 0 or minus infinity; None if every token is seen.

        Not bool: SDPA would convert it to these numbers again in every layer.
        """
        if window is not None and window >= self.longest:
            window = None
        if window not in self._masks:
            mask = None
            if window is not None or not self.even:
                seen = torch.arange(self.longest, device=self.lengths.device)
                own = self.lengths[:, None]
                hidden = seen > own
                if window is not None:
                    hidden = hidden | (seen <= own - window)
                mask = torch.zeros(hidden.shape, dtype=dtype, device=own.device)
                mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
            self._masks[window] = mask
        return self._masks[window]
