"""Keys and values of the sequences being decoded: one slot each, behind transformers' attention
interface.

A model's code is transformers' own. While the sampler runs it, its configuration names the
attention function `slot_attention`, which gets the step's plan as a keyword argument that the model
passes through. Every token is an example of its own ([T, 1]): a decoding step has one token for
each slot from 0 on, a prefill has the tokens of several prompts end to end, without padding. The
plan alone knows which token belongs to which slot.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from clp_kernels.ops.slot_attention import cpu as cpu_slot_attention

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
        self._views: dict[int, list[Tensor]] = {}  # by slot, of all layers; made when first copied
        self.configs: list[Any] = []
        self.look_at(model)

    def look_at(self, model: Any) -> None:
        """Finds the configurations: transformers keeps one for a model, or one for each part."""
        parts = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self.configs = [c for c in parts.values() if hasattr(c, "_attn_implementation")]

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs) while the model's attention is `slot_attention`.

        No context manager: Ctrl-C may come when a `with` block is entered or left, and the
        configurations would stay changed.
        """
        before = [config._attn_implementation for config in self.configs]
        try:
            try:
                _name(self.configs, [IMPLEMENTATION] * len(before))
                return function(*args, **kwargs)
            finally:
                _name(self.configs, before)
        except BaseException:
            _name(self.configs, before)  # Ctrl-C may have come in the middle of it
            raise

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
            self._views.clear()
            pair = self._layers[index] = (self._empty(keys), self._empty(values))
        return pair

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: attention multiplies what lies behind a sequence's end by 0, and 0 * NaN is NaN.
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[-1])

    def resize(self, slots: int, capacity: int) -> None:
        """Other numbers of slots and tokens a slot; what fits is kept. A layer at a time."""
        kept, length = min(slots, self.slots), min(capacity, self.capacity)
        self.slots, self.capacity = slots, capacity
        self._views.clear()
        for index, (keys, values) in list(self._layers.items()):
            pair = self._empty(keys), self._empty(values)
            for new, old in zip(pair, (keys, values), strict=True):
                new[:kept, :, :length] = old[:kept, :, :length]
            self._layers[index] = pair

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` tokens of a slot into another."""
        old, new = self._slot(source), self._slot(target)
        if not old or not count:
            return
        if 2 * count < self.capacity:
            old, new = ([t[:, :count] for t in views] for views in (old, new))
        torch._foreach_copy_(new, old)  # whole slots, where cutting 2 x layers views costs more

    def spread(self, sources: Tensor, targets: Tensor, count: int) -> None:
        """Copies the first `count` tokens of each source into its target: int64 [k] each."""
        for tensor in self.tensors():
            tensor[targets, :, :count] = tensor[sources, :, :count]

    def _slot(self, slot: int) -> list[Tensor]:
        if slot not in self._views:
            self._views[slot] = [t[slot] for t in self.tensors()]
        return self._views[slot]

    def clear(self, slot: int) -> None:
        """Zeros in a slot (after values that are not finite)."""
        for tensor in self.tensors():
            tensor[slot].zero_()


def _name(configs: Sequence[Any], implementations: Sequence[str | None]) -> None:
    for config, name in zip(configs, implementations, strict=True):
        config._attn_implementation = name


class Segment(NamedTuple):
    """The tokens of a prompt from position `start` to before `stop`, which go into a slot."""

    slot: int
    start: int
    stop: int


class Prefill:
    """Plan of a forward over the segments' tokens, end to end.

    Segments from position 0 on attend together, padded to the longest of a group of like length
    (attention alone is padded, no matrix product); a segment behind others attends by itself.
    """

    def __init__(self, cache: KVCache, segments: Sequence[Segment], device: torch.device) -> None:
        self.cache = cache
        self._later: list[tuple[Segment, slice]] = []
        groups: list[list[tuple[int, int]]] = []  # (first token, tokens) of each
        first = 0
        home: list[int] = []
        positions: list[int] = []
        starting = []
        for segment in segments:
            slot, start, stop = segment
            home += [slot] * (stop - start)
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
        self._places = _Places(cache, torch.tensor([home, positions], device=device))
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
        self._places.write(keys, k)
        self._places.write(values, v)
        q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
        gqa, parts = q.shape[1] != k.shape[1], []
        for tokens in self._groups:
            longest = tokens.shape[1]
            mask = _mask(0, longest, window, q.device)
            out = F.scaled_dot_product_attention(
                q[tokens].transpose(1, 2),
                k[tokens].transpose(1, 2),
                v[tokens].transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=gqa,
            )
            parts.append(out.transpose(1, 2).flatten(0, 1))
        for (slot, start, stop), here in self._later:
            out = F.scaled_dot_product_attention(
                q[here].transpose(0, 1)[None],
                keys[slot : slot + 1, :, :stop],
                values[slot : slot + 1, :, :stop],
                attn_mask=_mask(start, stop, window, q.device),
                scale=scale,
                enable_gqa=gqa,
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)[self._back][:, None]


def _mask(start: int, stop: int, window: int | None, device: torch.device) -> Any:
    """[stop - start, stop]: what the tokens from `start` to before `stop` may see; None: causal."""
    if window is not None and window < stop:
        own = torch.arange(start, stop, device=device)[:, None]
        seen = torch.arange(stop, device=device)
        return (seen <= own) & (seen > own - window)
    return causal_lower_right(stop - start, stop) if start else None


class _Places:
    """Where a forward's keys are written: for each token a slot and a position, int64 [2, T]."""

    def __init__(self, cache: KVCache, home: Tensor) -> None:
        self._cache, self._home = cache, home
        self._rows: dict[int, Tensor] = {}  # by number of heads: the same in every layer

    def write(self, slots: Tensor, new: Tensor) -> None:
        """new [T, heads, 1, d] into slots [slots, heads, capacity, d]."""
        heads, d = slots.shape[1], slots.shape[3]
        if heads not in self._rows:
            home, position = self._home[:, :, None]
            head = torch.arange(heads, device=home.device)
            self._rows[heads] = ((home * heads + head) * self._cache.capacity + position).flatten()
        slots.view(-1, d).index_copy_(0, self._rows[heads], new.reshape(-1, d))


class Decode:
    """Plan of a forward over one token for each of the slots 0 to B - 1, or for one slot alone.

    On the CPU csrc/cpu/slot_attention/slot_attention.cpp attends, in dtypes that it has; else SDPA
    does.

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
        self.count, self._home = lengths.shape[0], home
        self._native: bool | None = None  # whether the CPU kernel attends; the first layer decides
        self._written: _Places | None = None
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """q [B, H, 1, d], k and v [B, heads, 1, d] -> [B, 1, H, d]."""
        keys, values = self.cache.layer(layer, k, v)
        if self._native is None:
            self._native = self._home is None and cpu_slot_attention.why_not(q) is None
        if self._native:
            # It reads each row to its own length: neither `longest` nor a mask is needed.
            return cpu_slot_attention.slot_attention(
                q, k, v, keys, values, self.lengths, self.first, scale, window
            )
        self._places.write(keys, k)
        self._places.write(values, v)
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

    @property
    def _places(self) -> _Places:
        if self._written is None:
            home = self._home
            if home is None:
                home = torch.arange(self.first, self.first + self.count, device=self.lengths.device)
            self._written = _Places(self.cache, torch.stack([home, self.lengths]))
        return self._written

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, 1, longest], 0 or minus infinity; None where every token is seen.

        Not bool: SDPA would make these numbers of it in every layer again.
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
        raise ValueError(
            f"{name} does not pass keyword arguments on to its attention, or another thread runs "
            "it while a sampler does"
        )
    if odd:
        raise ValueError(f"{name} has attention with {odd[0]}")
    slots.cache.windows[module.layer_idx] = sliding_window
    return slots.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, slot_attention)
