"""Sequences as one run of tokens, without padding and with what they begin with in common once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clp.policies.attention import PaddedSequences, rows


class Packed:
    """The tokens of N sequences, for one forward of a model as `Policy.hidden_states` runs it.

    A token's hidden state depends on its example's weights and on the tokens before it. So
    sequences with equal weights share what they begin with, such as the prompt of a prompt group,
    and each token is computed once.

    Args:
        ids, mask: [N, S] token ids, and where there is one; the padding may be on either side.
        weights: [N, n], those of the layers.

    Attributes:
        tokens, positions: [T, 1], the ids and their positions.
        examples: [T], a sequence that has the token.
        places: [N, S], which of the T tokens stands there; 0 at padding.
    """

    def __init__(self, ids: Tensor, mask: Tensor, weights: Tensor) -> None:
        nodes: dict[Any, int] = {}  # (the token before, or the weights; id) -> token
        columns: list[tuple[int, int, int]] = []
        sequences = []
        pairs = zip(ids.tolist(), mask.bool().tolist(), weights.tolist(), strict=True)
        for n, (row, there, own) in enumerate(pairs):
            before: Any = tuple(own)
            sequence: list[int] = []
            for i in [i for i, real in zip(row, there, strict=True) if real]:
                token = nodes.setdefault((before, i), len(columns))
                if token == len(columns):
                    columns.append((i, len(sequence), n))
                sequence.append(token)
                before = token
            sequences.append(sequence)
        device = ids.device
        found = torch.tensor(columns, device=device).T
        self.tokens, self.positions, self.examples = found[0, :, None], found[1, :, None], found[2]
        self.places = torch.zeros_like(ids)
        self.places[mask.bool()] = torch.tensor([t for s in sequences for t in s], device=device)
        self._sequences = PaddedSequences([s for s in sequences if s], device)
        back = [self._sequences.places[token] for token in range(len(columns))]
        self._back = torch.tensor(back, device=device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """As clp.policies.attention.Plan.attend."""
        q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
        parts: Sequence[Tensor] = self._sequences.attend(q, k, v, scale, window)
        return rows(torch.cat(list(parts)), self._back)[:, None]
