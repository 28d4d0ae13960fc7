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
from clp.policies.power_mean import power_mean
from clp.policies.token_stats import Batch

# Of one model that token_kl holds at a time, prompts included: 256 MiB in float32.
LOGITS = 2**26


class LogitMixture(Steerable):
    """m models whose logits are mixed by each example's weights w, token by token.

        geometric:    pi(y | x; w)  proportional to  [p_base(y | x)] * prod_i p_i(y | x)^(alpha w_i)
        probability:  pi(y | x; w) = sum_i w_i p_i(y | x)
        power:        pi(y | x; w)  proportional to  (sum_i w_i p_i(y | x)^q)^(1/q),  q < 0

    where y is the next token. Without a base and with alpha = 1 these are MOD (arXiv:2406.18853):
    geometric for reverse KL, power with q = -1 for forward KL (the harmonic mean), and with
    q = -a for the alpha-divergence of a; q near 0 is near geometric. A model of weight 0 counts
    for nothing. With a base the geometric mixture is Inference-time Policy Adapters
    (arXiv:2305.15065) with one adapter per objective, whose models may be smaller than the base.
    `clp.Sampler` takes it as a policy. Each model has its own keys and values, which do not depend
    on the weights.

    Args:
        models: Objective -> transformers causal LM, in the order of the weights.
        tokenizer: Shared by all.
        base: A causal LM whose logits are added with weight 1 (geometric only).
        alpha: Multiplies the weights.
        mode: "geometric", "probability" (see clp_kernels.mix_logits) or "power".
        exponent: q of mode "power".

    Raises:
        ValueError: no model; models of different devices or dtypes; heads of different height, one
            of them without a row for every token of the tokenizer (otherwise the ids that all
            heads have are mixed); bad alpha, mode or exponent; a base or an alpha in a mode other
            than geometric.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        tokenizer: Any,
        *,
        base: Any = None,
        alpha: float = 1.0,
        mode: str = "geometric",
        exponent: float | None = None,
    ) -> None:
        if not models:
            raise ValueError("models must hold at least one model")
        plain = [Network(model, _unsteered) for model in models.values()]
        self._set(tuple(models), plain, tokenizer, base, alpha, mode, exponent)

    def _set(
        self,
        objectives: tuple[str, ...],
        networks: list[Network],
        tokenizer: Any,
        base: Any,
        alpha: float,
        mode: str,
        exponent: float | None,
    ) -> None:
        if mode not in ("geometric", "probability", "power"):
            raise ValueError(f'mode must be "geometric", "probability" or "power", got {mode!r}')
        if mode != "geometric" and (base is not None or alpha != 1):
            raise ValueError(f'mode "{mode}" mixes the models alone: base=None and alpha=1')
        if mode == "power":
            if type(exponent) not in (int, float) or not -100 <= (exponent or 0) <= -0.01:
                raise ValueError(
                    f'exponent must be a number from -100 to -0.01 in mode "power", got '
                    f"{exponent!r}"
                )
        elif exponent is not None:
            raise ValueError(f'exponent must be None in mode "{mode}", got {exponent!r}')
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
            raise ValueError(f"alpha must be a positive number, got {alpha!r}")
        self.objectives, self.tokenizer = objectives, tokenizer
        self.mode, self.exponent = mode, exponent
        self.alpha, self.base = alpha, base
        self._policy: Policy | None = None  # whose adapters the networks are
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
        exponent: float | None = None,
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
        made = cls(loaded, tokenizer, base=root, alpha=alpha, mode=mode, exponent=exponent)
        made._ends = ends
        return made

    @classmethod
    def of_adapters(
        cls, policy: Policy, *, mode: str = "geometric", exponent: float | None = None
    ) -> "LogitMixture":
        """MOD over the adapters or experts of one model: each alone is a policy, logits are mixed.

        Beside `policy` itself, which mixes the adapters' parameters, this is the zero-shot
        baseline; a token costs m forward passes of the same model.

        Raises: ValueError as the constructor, or for a policy that has no such parts ("prompt").
        """
        if policy.kl_range is not None:
            raise ValueError("policy must be trained with one KL strength, not a kl_range")
        if policy.conditioning.name == "prompt":
            raise ValueError("policy must mix parameters, and conditioning 'prompt' does not")
        made = cls.__new__(cls)
        networks = [
            Network(policy.model, partial(_steered_by_one, policy, i))
            for i in range(len(policy.objectives))
        ]
        made._set(policy.objectives, networks, policy.tokenizer, None, 1.0, mode, exponent)
        made._policy, made._ends = policy, policy.end_ids
        return made

    @property
    def reference(self) -> Policy:
        """The policy whose weights of zero give the base model: that of `of_adapters`.

        Raises: ValueError for a mixture of whole models, which has no base model.
        """
        if self._policy is None:
            raise ValueError(
                "a mixture of whole models has no base model to which a KL could be taken"
            )
        return self._policy

    def token_kl(self, batch: Batch, temperature: float) -> Tensor:
        """KL_t(pi || pi_ref) in nats [N, C], exact, without gradients; zero where no token is.

        pi is softmax(z / temperature) of the mixed logits z, as sampled; pi_ref is the base model
        at that temperature. A forward of the whole batch for each objective, and one for the base.

        Raises: ValueError as `reference`.
        """
        policy, mask = self.reference, batch.completion_mask
        kl = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        size = max(1, LOGITS // (self.vocab_size * batch.input_ids.shape[1]))
        for first in range(0, len(mask), size):
            part = batch.part(slice(first, first + size))
            here, ids = part.completion_mask, self.drawable_ids
            logits = []
            with torch.no_grad():
                for model, steer in self.networks:
                    with steer(part.conditions):
                        own = _logits(model, part.input_ids, part.attention_mask, here)
                    logits.append(own[:, ids].float())
                with policy.base():
                    plain = _logits(policy.model, part.base_ids, part.base_mask, here)[:, ids]
                weights = part.conditions.repeat_interleave(here.sum(1), 0)
                mixed = self.mixed(torch.stack(logits), weights)
                kl[first : first + size][here] = _kl(mixed, plain.float(), temperature)
        return kl

    def mixed(self, logits: Tensor, weights: Tensor) -> Tensor:
        """The models' logits [n, B, V], mixed by weights [B, m] -> [B, V], as the sampler does."""
        own = self.logit_weights(weights)
        if self.exponent is not None:
            return power_mean(logits, own, self.exponent)
        return clp_kernels.mix_logits(logits, own, mode=self.mode)

    def layer_weights(self, condition: Tensor) -> Tensor:
        """As Steerable.layer_weights. Raises: ValueError for weights that the mode cannot take."""
        if self.mode != "geometric" and bool((condition < 0).any()):
            got = condition.tolist()
            raise ValueError(f'weights must be >= 0 in mode "{self.mode}", got {got}')
        return condition

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


def _logits(model: Any, ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """Those that predict the tokens of completions [N, C], one row each: [T, V]."""
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    output = model(
        input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    )
    before = slice(-completion_mask.shape[1] - 1, -1)
    return output.logits[:, before][completion_mask]  # type: ignore[no-any-return]


def _kl(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """KL of rows [T, V] at a temperature; a token without probability adds nothing."""
    logp, logq = (torch.log_softmax(x / temperature, -1) for x in (logits, reference))
    return torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp - logq)).sum(-1)
