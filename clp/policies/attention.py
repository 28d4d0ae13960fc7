"""Attention by a plan, behind transformers' attention interface; no token of padding elsewhere.

A forward calls an unmodified model of transformers whose attention implementation is `planned` and
passes a plan as a keyword argument, which the model's code hands on. Inputs are [T, 1]: each token
is a batch entry of its own. The plan alone knows which tokens attend to which.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

IMPLEMENTATION = "clp_planned"


class Plan(Protocol):
    """Which of the tokens of one forward attend to which."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """q [T, H, 1, d], k and v [T, heads, 1, d] -> [T, 1, H, d]."""


class PaddedSequences:
    """Sequences that attend causally, padded to the longest of a group of similar length.

    Attention alone is padded, no matrix product. A sequence is a list of tokens of the forward, and
    may share some with others: a token's result is taken from the last sequence that has it.

    Args:
        sequences: The tokens of each; all from position 0 on.

    Attributes:
        places: By token, where its result stands.
        size: Number of results, those of padding included.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], device: torch.device) -> None:
        groups: list[list[Sequence[int]]] = []
        self.places: dict[int, int] = {}
        self.size = 0
        for tokens in sorted(sequences, key=len, reverse=True):
            if not groups or 2 * len(tokens) < len(groups[-1][0]):
                groups.append([])
            groups[-1].append(tokens)
            self.places.update(zip(tokens, range(self.size, self.size + len(tokens)), strict=True))
            self.size += len(groups[-1][0])
        # Padded with the last token.
        padded = [[[*s, *[s[-1]] * (len(g[0]) - len(s))] for s in g] for g in groups]
        self._groups = [torch.tensor(tokens, device=device) for tokens in padded]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> list[Tensor]:
        """q [T, H, d], k and v [T, heads, d] -> the results, in parts: [size, H, d] together."""
        options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
        parts = []
        for tokens in self._groups:
            mask = causal_mask(0, tokens.shape[1], window, q.device)
            own, ks, vs = (rows(t, tokens).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(
                own, ks, vs, mask, is_causal=mask is None, **options
            )
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return parts


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for x [T, ...]. In the backward no sum is made by atomics, as x[index] makes it."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])


def causal_mask(start: int, stop: int, window: int | None, device: torch.device) -> Any:
    """[stop - start, stop]: what the tokens from `start` to before `stop` may see; None: causal."""
    if window is not None and window < stop:
        own = torch.arange(start, stop, device=device)[:, None]
        seen = torch.arange(stop, device=device)
        return (seen <= own) & (seen > own - window)
    return causal_lower_right(stop - start, stop) if start else None


def planned_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    plan: Plan | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention by the plan; a function of transformers' attention interface.

    Args:
        module: The attention module; its layer_idx names the layer.
        query, key, value: [T, heads, 1, d], one token per example.
        attention_mask: Must be None; the plan has the mask.
        dropout: Not applied: policies run in evaluation mode.

    Returns: [T, 1, heads, d], and None for the attention weights.
    Raises: ValueError for attention that the plan does not compute.
    """
    odd = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None:
        odd.append("a mask of its own")
    name = type(module).__name__
    if plan is None:
        raise ValueError(
            f"{name} does not pass keyword arguments on to its attention, or another thread runs "
            "it while a sampler or a training step does"
        )
    if odd:
        raise ValueError(f"{name} has attention with {odd[0]}, which is not supported")
    return plan.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, planned_attention)


def attention_configs(model: Any) -> list[Any]:
    """The configurations that name the attention of a model's parts, each once."""
    parts = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in parts.values() if hasattr(c, "_attn_implementation")]


def with_plans(
    configs: Sequence[Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """function(*args, **kwargs) while the attention of `attention_configs` is `planned_attention`.

    No context manager: Ctrl-C may come when a `with` block is entered or left, and the
    configurations would stay changed.
    """
    before = [config._attn_implementation for config in configs]
    try:
        try:
            set_attention(configs, [IMPLEMENTATION] * len(before))
            return function(*args, **kwargs)
        finally:
            set_attention(configs, before)
    except BaseException:
        set_attention(configs, before)  # Ctrl-C may have come in the middle of it
        raise


def set_attention(configs: Sequence[Any], implementations: Sequence[str | None]) -> None:
    """Names the attention implementation in each configuration."""
    for config, name in zip(configs, implementations, strict=True):
        config._attn_implementation = name
