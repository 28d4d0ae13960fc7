"""Policies that mix logits: m models, each with its own parameters, weighted per example."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import clp_kernels
from clp.policies.interface import Network, Steerable
from clp.policies.loading import end_ids, load_base, token_count, torch_device, vocab_size
from clp.policies.policy import Policy


class LogitMixture(Steerable):
    """m models whose logits are mixed by each example's weights w, token by token.

        geometric:    pi(y | x; w)  proportional to  [p_base(y | x)] * prod_i p_i(y | x)^(alpha w_i)
        probability:  pi(y | x; w) = sum_i w_i p_i(y | x)

    Without a base and with alpha = 1 the geometric mixture is MOD (arXiv:2406.18853, reverse KL);
    with a base it is Inference-time Policy Adapters (arXiv:2305.15065) with one adapter per
    objective, whose models may be smaller than the base. `clp.Sampler` takes it as a policy. Each
    model has its own keys and values, which do not depend on the weights.

    Args:
        models: Objective -> transformers causal LM, in the order of the weights.
        tokenizer: Shared by all.
        base: A causal LM whose logits are added with weight 1 (geometric only).
        alpha: Multiplies the weights.
        mode: "geometric" or "probability"; see clp_kernels.mix_logits.

    Raises:
        ValueError: no model; models of different devices or dtypes; heads of different height, one
            of them without a row for every token of the tokenizer (otherwise the ids that all
            heads have are mixed); bad alpha or mode; a base in probability mode.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        tokenizer: Any,
        *,
        base: Any = None,
        alpha: float = 1.0,
        mode: str = "geometric",
    ) -> None:
        if not models:
            raise ValueError("models must hold at least one model")
        plain = [Network(model, _unsteered) for model in models.values()]
        self._set(tuple(models), plain, tokenizer, base, alpha, mode)

    def _set(
        self,
        objectives: tuple[str, ...],
        networks: list[Network],
        tokenizer: Any,
        base: Any,
        alpha: float,
        mode: str,
    ) -> None:
        if mode not in ("geometric", "probability"):
            raise ValueError(f'mode must be "geometric" or "probability", got {mode!r}')
        if mode == "probability" and (base is not None or alpha != 1):
            raise ValueError('mode "probability" mixes the models alone: base=None and alpha=1')
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
            raise ValueError(f"alpha must be a positive number, got {alpha!r}")
        self.objectives, self.tokenizer, self.mode = objectives, tokenizer, mode
        self.alpha, self.base = alpha, base
        self._ends: frozenset[int] = frozenset()  # of the models' own tokenizers
        self._networks = networks if base is None else [Network(base, _unsteered), *networks]
        names = objectives if base is None else ("base", *objectives)
        first = self.networks[0].model
        tokens = token_count(tokenizer)
        for name, (model, _) in zip(names, self.networks, strict=True):
            rows, others = vocab_size(model), vocab_size(first)
            if rows != others and min(rows, others) < tokens:
                raise ValueError(
                    f"models must agree in vocabulary: {names[0]} has {others}, {name} has {rows} "
                    f"token ids, the tokenizer {tokens}"
                )
            for what in ("device", "dtype"):
                own, wanted = getattr(model, what), getattr(first, what)
                if own != wanted:
                    differ = f"{names[0]} has {wanted}, {name} has {own}"
                    raise ValueError(f"models must agree in {what}: {differ}")

    @property
    def networks(self) -> list[Network]:
        """The base, if there is one, then the models in the order of the objectives."""
        return self._networks

    @property
    def end_ids(self) -> frozenset[int]:
        """As Steerable.end_ids, and what the models' own tokenizers name."""
        return super().end_ids | self._ends

    @classmethod
    def load(
        cls,
        models: Mapping[str, str],
        *,
        base: str | None = None,
        alpha: float = 1.0,
        mode: str = "geometric",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "LogitMixture":
        """Reads the models, and the base, from folders or hub names.

        Raises: ValueError as the constructor; a model that cannot be loaded; different tokenizers;
            a device that is not here.
        """
        device = torch_device(device)
        loaded, tokenizer, first = {}, None, ""
        ends: frozenset[int] = frozenset()
        places = dict(models) | ({} if base is None else {"base": base})
        if base is not None and "base" in models:
            raise ValueError('models must not have an objective called "base" beside a base')
        for name, path in places.items():
            model, own = load_base(path, dtype)
            if tokenizer is None:
                tokenizer, first = own, name
            elif own.get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"models must share one vocabulary: {name}'s is not {first}'s")
            loaded[name] = model.to(device)
            ends |= end_ids(model, own)
        root = loaded.pop("base") if base is not None else None
        made = cls(loaded, tokenizer, base=root, alpha=alpha, mode=mode)
        made._ends = ends
        return made

    @classmethod
    def of_adapters(cls, policy: Policy, *, mode: str = "geometric") -> "LogitMixture":
        """MOD over the adapters of one model: each adapter alone is a policy, logits are mixed.

        Beside `policy` itself, which mixes the adapters' parameters, this is the zero-shot
        baseline; a token costs m forward passes of the same model.
        """
        if policy.kl_range is not None:
            raise ValueError("policy must be trained with one KL strength, not a kl_range")
        made = cls.__new__(cls)
        networks = [
            Network(policy.model, partial(_steered_by_one, policy, i))
            for i in range(len(policy.objectives))
        ]
        made._set(policy.objectives, networks, policy.tokenizer, None, 1.0, mode)
        return made

    def logit_weights(self, weights: Tensor) -> Tensor:
        """[B, m] -> [B, n]: alpha times the weights, after a column of ones for the base."""
        if self.alpha != 1:
            weights = weights * self.alpha
        if self.base is None:
            return weights
        return torch.cat([weights.new_ones(len(weights), 1), weights], 1)

    def cache_key(self, weights: Tensor) -> bytes:
        """Empty: no model's keys and values depend on the weights."""
        return b""


def _unsteered(weights: Tensor) -> AbstractContextManager[None]:
    return nullcontext()


def _steered_by_one(policy: Policy, index: int, weights: Tensor) -> clp_kernels.steer:
    alone = torch.zeros_like(weights)
    alone[:, index] = 1
    return policy.steer(alone)
