"""Keys and values of the sequences being decoded: one slot each, behind transformers' attention
interface.

A model's code is transformers' own. While the sampler runs it, its configuration names the
attention function `slot_attention`, which gets the step's plan as a keyword argument that the model
passes through. Every token is an example of its own ([T, 1]): a decoding step has one token for
each slot from 0 on, a prefill has the tokens of several prompts end to end, without padding. The
plan alone knows which token belongs to which slot.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

IMPLEMENTATION = "clp_slots"
# Lengths of a slot are multiples of this: fewer reallocations, and every head's keys begin at a
# multiple of a cache line.
BLOCK = 16


class KVCache:
    """The slots of one model: for each layer keys [slots, heads, capacity, d] and values.

    Head-major, because SDPA on the CPU reads it so up to twice as fast as token-major (96 rows of
    60 tokens, 2 heads of 32: 0.34 ms against 0.63). A slot is as long as the longest sequence asks
    for: sequences are compact from slot 0 on, and attention reads a plain slice.
    """

    def __init__(self, model: Any) -> None:
        self.slots = self.capacity = 0
        self.windows: dict[int, int | None] = {}  # by layer, as the model's code asked for them
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        # transformers keeps one configuration for a model, or one for each of its parts.
        parts = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self._configs = [c for c in parts.values() if hasattr(c, "_attn_implementation")]

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Context in which the model's attention is `slot_attention`."""
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name

    @property
    def layers(self) -> int:
        """How many layers have used the cache."""
        return len(self._layers)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, known once the model has run."""
        sizes = [t.shape[1] * t.shape[3] * t.element_size() for t in self.tensors()]
        return sum(sizes)

    def tensors(self) -> list[Tensor]:
        """Keys and values of every layer, each [slots, heads, capacity, d]."""
        return [t for pair in self._layers.values() for t in pair]

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of a layer; made at its first use, for keys and values [T, heads, 1, d]."""
        pair = self._layers.get(index)
        if pair is None:
            pair = self._layers[index] = (self._empty(keys), self._empty(values))
        return pair

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: attention multiplies what lies behind a sequence's end by 0, and 0 * NaN is NaN.
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[-1])

    def resize(self, slots: int, capacity: int) -> None:
        """Other numbers of slots and tokens a slot; what fits is kept. A layer at a time."""
        kept, length = min(slots, self.slots), min(capacity, self.capacity)
        self.slots, self.capacity = slots, capacity
        for index, (keys, values) in list(self._layers.items()):
            pair = self._empty(keys), self._empty(values)
            for new, old in zip(pair, (keys, values), strict=True):
                new[:kept, :, :length] = old[:kept, :, :length]
            self._layers[index] = pair

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` tokens of a slot into another."""
        tensors = self.tensors()
        if tensors and count:
            torch._foreach_copy_(
                [t[target, :, :count] for t in tensors], [t[source, :, :count] for t in tensors]
            )

    def clear(self, slot: int) -> None:
        """Zeros in a slot (after values that are not finite)."""
        for tensor in self.tensors():
            tensor[slot].zero_()


class Segment(NamedTuple):
    """The tokens of a prompt from position `start` to before `stop`, which go into a slot."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class Prefill:
    """Plan of a forward over the segments' tokens, end to end."""

    cache: KVCache
    segments: Sequence[Segment]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """q [T, H, 1, d], k and v [T, heads, 1, d] -> [T, 1, H, d]."""
        keys, values = self.cache.layer(layer, k, v)
        # [T, heads, 1, d] -> [heads, T, d]
        q, k, v = (t.squeeze(2).transpose(0, 1) for t in (q, k, v))
        parts, first = [], 0
        for slot, start, end in self.segments:
            count = end - start
            here = slice(first, first + count)
            keys[slot, :, start:end] = k[:, here]
            values[slot, :, start:end] = v[:, here]
            bias: Any = None
            if window is not None and window < end:
                bias = _band(start, count, window, q.device)
            elif start:
                bias = causal_lower_right(count, end)
            out = F.scaled_dot_product_attention(
                q[None, :, here],
                keys[slot : slot + 1, :, :end],
                values[slot : slot + 1, :, :end],
                attn_mask=bias,
                is_causal=bias is None,
                scale=scale,
                enable_gqa=q.shape[0] != k.shape[0],
            )
            parts.append(out[0].transpose(0, 1))
            first += count
        return torch.cat(parts)[:, None]


def _band(start: int, count: int, window: int, device: torch.device) -> Tensor:
    """[count, start + count]: which positions the tokens from `start` on may see."""
    own = torch.arange(start, start + count, device=device)[:, None]
    seen = torch.arange(start + count, device=device)
    return (seen <= own) & (seen > own - window)


class Decode:
    """Plan of a forward over one token for each of the slots 0 to B - 1, or for one slot alone.

    Args:
        cache: Whose slots.
        first: The first of the slots, 0 but in a step of one row.
        lengths: int64 [B], tokens that each slot holds before this one.
        longest: The step reads this many tokens of each slot.
        even: Whether all lengths are longest - 1, so that no mask is needed.
        home: int64 [B], where each row's keys are written, if not in its own slot.
    """

    def __init__(
        self,
        cache: KVCache,
        first: int,
        lengths: Tensor,
        longest: int,
        even: bool,
        home: Tensor | None = None,
    ) -> None:
        self.cache, self.first, self.lengths, self.longest = cache, first, lengths, longest
        self.even = even
        self.count = lengths.shape[0]
        slots = torch.arange(first, first + self.count, device=lengths.device)
        self.home = slots if home is None else home
        self._masks: dict[int | None, Tensor | None] = {}
        self._places: dict[int, Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """q [B, H, 1, d], k and v [B, heads, 1, d] -> [B, 1, H, d]."""
        keys, values = self.cache.layer(layer, k, v)
        heads = k.shape[1]
        place = self._place(heads)
        keys.view(-1, k.shape[-1]).index_copy_(0, place, k.reshape(-1, k.shape[-1]))
        values.view(-1, v.shape[-1]).index_copy_(0, place, v.reshape(-1, v.shape[-1]))
        slots = slice(self.first, self.first + self.count)
        out = F.scaled_dot_product_attention(
            # The queries of a group stand as if they were positions: keys are not repeated.
            q.reshape(self.count, heads, -1, q.shape[-1]),
            keys[slots, :, : self.longest],
            values[slots, :, : self.longest],
            attn_mask=self._mask(window),
            scale=scale,
        )
        return out.reshape(self.count, 1, -1, out.shape[-1])

    def _place(self, heads: int) -> Tensor:
        """[B * heads]: the rows of keys.view(-1, d) that are written; the same in every layer."""
        if heads not in self._places:
            head = torch.arange(heads, device=self.home.device)
            row = (self.home[:, None] * heads + head) * self.cache.capacity + self.lengths[:, None]
            self._places[heads] = row.flatten()
        return self._places[heads]

    def _mask(self, window: int | None) -> Tensor | None:
        """bool [B, 1, 1, longest], or None where every token is seen."""
        if window is not None and window >= self.longest:
            window = None
        if window not in self._masks:
            mask = None
            if window is not None or not self.even:
                seen = torch.arange(self.longest, device=self.lengths.device)
                own = self.lengths[:, None]
                mask = seen <= own
                if window is not None:
                    mask = mask & (seen > own - window)
                mask = mask[:, None, None]
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
        query, key, value: [T, heads, 1, d], a token an example.
        attention_mask: Must be None; the plan has the mask.
        scaling, sliding_window: As the model gives them.
        dropout: Not applied: the sampler draws from the policy as it is evaluated.
        slots: The plan.

    Returns: [T, 1, heads, d], and None for the attention weights.
    Raises: ValueError for attention of a kind that this is not.
    """
    odd = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None:
        odd.append("a mask of its own")
    name = type(module).__name__
    if slots is None:
        raise ValueError(f"{name} does not pass keyword arguments on to its attention")
    if odd:
        raise ValueError(f"{name} has attention with {odd[0]}")
    slots.cache.windows[module.layer_idx] = sliding_window
    return slots.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, slot_attention)
