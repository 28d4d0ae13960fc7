"""Keys and values of the sequences that are decoded: one slot each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Lengths of a slot are multiples of this: fewer reallocations, and every head's keys begin at a
# multiple of a cache line.
BLOCK = 16


def rounded(length: int) -> int:
    """The least multiple of BLOCK that is not below a number of tokens."""
    return -(-length // BLOCK) * BLOCK


class Segment(NamedTuple):
    """The tokens of a prompt from position `start` to before `stop`, which go into a slot."""

    slot: int
    start: int
    stop: int


class KVCache:
    """The slots of one model: for each layer keys [slots, heads, capacity, d] and values.

    Head-major, because SDPA on the CPU reads it up to twice as fast as token-major (96 sequences of
    60 tokens, 2 heads of 32: 0.34 ms against 0.63). A slot is as long as the longest sequence asks
    for: sequences occupy the slots from 0 on without gaps, and attention reads a plain slice.

    Attributes:
        slots, capacity: Number of slots, and tokens that each has room for.
        windows: By layer, the sliding window that the model's code asked for.
    """

    def __init__(self) -> None:
        self.slots = self.capacity = 0
        self.windows: dict[int, int | None] = {}
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._views: dict[int, list[Tensor]] = {}  # by slot, of all layers; made when first copied

    @property
    def layers(self) -> int:
        """How many layers have used the cache."""
        return len(self._layers)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, known once the model has run."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in self.tensors())

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
        # Not in inference mode, in which a model may show a layer for the first time: its tensors
        # cannot be written outside of it, where slots are copied.
        with torch.inference_mode(False):
            shape = self.slots, like.shape[1], self.capacity, like.shape[-1]
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def resize(self, slots: int, capacity: int) -> None:
        """Changes the number of slots and their capacity, layer by layer; what fits is kept.

        It may be called again after an exception in the middle of it.
        """
        self.slots, self.capacity = slots, capacity
        self._views.clear()
        for index, (keys, values) in list(self._layers.items()):
            kept, length = min(slots, keys.shape[0]), min(capacity, keys.shape[2])
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

    def copy_each(self, sources: Sequence[int], targets: Sequence[int], count: int) -> None:
        """Copies the first `count` tokens of each source slot into its target slot."""
        if tensors := self.tensors():
            old, new = torch.tensor([sources, targets], device=tensors[0].device)
            for tensor in tensors:
                tensor[new, :, :count] = tensor[old, :, :count]

    def _slot(self, slot: int) -> list[Tensor]:
        if slot not in self._views:
            self._views[slot] = [t[slot] for t in self.tensors()]
        return self._views[slot]

    def clear(self, slot: int) -> None:
        """Writes zeros into a slot (after values that are not finite)."""
        for tensor in self.tensors():
            tensor[slot].zero_()
