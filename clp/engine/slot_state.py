"""What a decode step reads of every slot beside its keys and values, as tensors on the device."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from clp.engine.sequence import Sequence


class SlotState:
    """Tensors over slots; a captured step reads and writes them in place.

    Attributes:
        token: int64 [slots], the token that is fed next.
        length: int64 [slots], tokens before it.
        drawn: int64 [slots], tokens drawn: the position of the next draw.
        seed, top_k: int64 [slots].
        active: int64 [slots], 1 if a sequence decodes in the slot, else 0.
        temperature, top_p, min_p: float64 [slots]. Not rounded: a request's filters do not depend
            on whether others ask for the same.
        weights: [slots, n], as the layers take them.
    """

    def __init__(self, slots: int, m: int, device: torch.device, dtype: torch.dtype) -> None:
        self.ints = torch.zeros(6, slots, dtype=torch.int64, device=device)
        self.token, self.length, self.drawn, self.seed, self.top_k, self.active = self.ints
        self.floats = torch.ones(3, slots, dtype=torch.float64, device=device)
        self.temperature, self.top_p, self.min_p = self.floats
        self.weights = torch.zeros(slots, m, dtype=dtype, device=device)

    def place(self, first: int, sequences: Seq[Sequence]) -> None:
        """Writes the state of sequences for the slots from `first` on."""
        here = slice(first, first + len(sequences))
        params = [sequence.request.params for sequence in sequences]
        device = self.ints.device
        ints = [
            (s.last_id, s.length - 1, len(s.token_ids), s.seed, p.top_k, 1)
            for s, p in zip(sequences, params, strict=True)
        ]
        floats = [(p.temperature, p.top_p, p.min_p) for p in params]
        self.ints[:, here] = torch.tensor(ints, dtype=torch.int64).t().to(device)
        self.floats[:, here] = torch.tensor(floats, dtype=torch.float64).t().to(device)
        weights = torch.stack([sequence.request.weights for sequence in sequences])
        self.weights[here] = weights.to(device, self.weights.dtype)

    def move(self, source: int, target: int) -> None:
        """Copies a slot's state into another."""
        for state in (self.ints, self.floats):
            state[:, target] = state[:, source]
        self.weights[target] = self.weights[source]

    def vacate(self, slot: int) -> None:
        """The slot's sequence has ended: a captured step feeds it a token and changes nothing."""
        self.active[slot] = self.length[slot] = 0
        self.token[slot] = 0  # it may be -1, which cannot be fed

    def activate(self, count: int) -> None:
        """The first `count` slots decode. In the next one a prompt may be half prefilled."""
        self.active[:count] = 1
        self.active[count:] = 0

    def advance(self, here: slice, tokens: Tensor, *, padded: bool) -> None:
        """Writes drawn tokens [B], which the next step feeds; if padded, of active slots alone."""
        if padded:
            active = self.active[here]
            self.token[here] = torch.where(active > 0, tokens, self.token[here])
            self.ints[1:3, here] += active  # length and drawn
        else:
            self.token[here] = tokens
            self.ints[1:3, here] += 1
