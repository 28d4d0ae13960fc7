"""What the sampler asks of a policy."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Network(NamedTuple):
    """A model that runs for every token, and the context that sets its weight rows [B, m]."""

    model: Any
    steer: Any  # rows -> context manager


class Steerable(Protocol):
    """What the sampler asks of a policy: clp.Policy, or clp.LogitMixture over several models."""

    tokenizer: Any
    objectives: tuple[str, ...]
    mode: str

    @property
    def networks(self) -> Sequence[Network]:
        """The models whose logits make the next token."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a completion."""

    @property
    def context_length(self) -> int:
        """Prompt and completion tokens that fit."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def drawable_ids(self) -> int:
        """Token ids that are drawn are below it."""

    def logit_weights(self, rows: Tensor) -> Tensor | None:
        """Rows [B, m] -> weights of the networks' logits [B, n]; None for a single network."""

    def cache_key(self, row: Tensor) -> bytes:
        """Equal for rows whose keys and values are equal for equal tokens."""
