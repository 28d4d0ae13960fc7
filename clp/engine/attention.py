"""Attention over the slots of a cache, behind transformers' attention interface.

A step calls an unmodified model of transformers whose attention implementation is `slot_attention`
and passes a plan as a keyword argument, which the model's code hands on. Inputs are [T, 1]: each
token is a batch entry of its own. The plan alone knows to which slot and position a token belongs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from clp.engine.kv_cache import KVCache, Segment
from clp_kernels.ops.slot_attention import cpu as cpu_slot_attention

IMPLEMENTATION = "clp_slots"


class Prefill:
    """Plan of a forward over the segments' tokens, one segment after the other.

    Segments from position 0 on attend together, padded to the longest of a group of similar length
    (attention alone is padded, no matrix product); a later segment of a prompt attends by itself.
    """

    def __init__(self, cache: KVCache, segments: Sequence[Segment], device: torch.device) -> None:
        self.cache = cache
        self._later: list[tuple[Segment, slice]] = []
        groups: list[list[tuple[int, int]]] = []  # (first token, number of tokens) of each segment
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
                starting.append((first, stop))
            first += stop - start
        for begin, count in sorted(starting, key=lambda pair: -pair[1]):
            if not groups or 2 * count < groups[-1][0][1]:
                groups.append([])
            groups[-1].append((begin, count))
        self._target = _WriteIndex(cache, torch.tensor([slots, positions], device=device))
        # Tokens by group, padded with the last one; and where each token's result stands.
        padded = [[[b + min(i, n - 1) for i in range(g[0][1])] for b, n in g] for g in groups]
        self._groups = [torch.tensor(tokens, device=device) for tokens in padded]
        back, offset = [0] * first, 0
        for group in groups:
            for begin, count in group:
                back[begin : begin + count] = range(offset, offset + count)
                offset += group[0][1]
        for _, here in self._later:
            back[here] = range(offset, offset + here.stop - here.start)
            offset += here.stop - here.start
        self._back = torch.tensor(back, device=device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """q [T, H, 1, d], k and v [T, heads, 1, d] -> [T, 1, H, d]."""
        keys, values = self.cache.layer(layer, k, v)
        self._target.write(keys, k)
        self._target.write(values, v)
        q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
        options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
        parts = []
        for tokens in self._groups:
            mask = _mask(0, tokens.shape[1], window, q.device)
            own, ks, vs = (t[tokens].transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(
                own, ks, vs, mask, is_causal=mask is None, **options
            )
            parts.append(out.transpose(1, 2).flatten(0, 1))
        for (slot, start, stop), here in self._later:
            mask = _mask(start, stop, window, q.device)
            own = q[here].transpose(0, 1)[None]
            cached = slice(slot, slot + 1), slice(None), slice(stop)
            out = F.scaled_dot_product_attention(own, keys[cached], values[cached], mask, **options)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)[self._back][:, None]


def _mask(start: int, stop: int, window: int | None, device: torch.device) -> Any:
    """[stop - start, stop]: what the tokens from `start` to before `stop` may see; None: causal."""
    if window is not None and window < stop:
        own = torch.arange(start, stop, device=device)[:, None]
        seen = torch.arange(stop, device=device)
        return (seen <= own) & (seen > own - window)
    return causal_lower_right(stop - start, stop) if start else None


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


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    slots: Prefill | Decode | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over the slots; a function of transformers' attention interface.

    Args:
        module: The attention module; its layer_idx names the layer.
        query, key, value: [T, heads, 1, d], one token per example.
        attention_mask: Must be None; the plan, `slots`, has the mask.
        dropout: Not applied: the sampler draws from the policy in evaluation mode.

    Returns: [T, 1, heads, d], and None for the attention weights.
    Raises: ValueError for attention that the plan does not compute.
    """
    odd = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None:
        odd.append("a mask of its own")
    name = type(module).__name__
    if slots is None:
        raise ValueError(
            f"{name} does not pass keyword arguments on to its attention, or another thread runs "
            "it while a sampler does"
        )
    if odd:
        raise ValueError(f"{name} has attention with {odd[0]}")
    slots.cache.windows[module.layer_idx] = sliding_window
    return slots.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, slot_attention)
