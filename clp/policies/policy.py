"""A steerable policy: a frozen causal LM, its conditioning, and the objectives in order."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clp_kernels
from clp.data.condition import Condition
from clp.data.kl_range import KLRange
from clp.data.names import closest
from clp.data.paths import model_location
from clp.data.weights import WeightSpec
from clp.policies.attention import attention_configs, with_plans
from clp.policies.card import CONDITIONINGS, read_card, write_card
from clp.policies.checksum import digest, stored
from clp.policies.experts import Experts
from clp.policies.head import Head, find_head
from clp.policies.interface import Conditioning, Network, Steerable
from clp.policies.loading import end_ids, load_base, torch_device
from clp.policies.lora import LoRA
from clp.policies.packed import Packed
from clp.policies.prompt import Prompt
from clp.policies.token_stats import Batch, token_stats
from clp_kernels.nn.inject_experts import differences, load_experts
from clp_kernels.nn.probe import check_start


def _conditioning(name: str, kl_range: KLRange | None = None) -> LoRA | Experts:
    """Raises: ValueError for an unknown name, with the closest one."""
    if name not in CONDITIONINGS:
        known, close = ", ".join(CONDITIONINGS), closest(str(name), CONDITIONINGS)
        raise ValueError(f"conditioning must be one of {known}, got {name!r}{close}")
    if name == "lora":
        return LoRA(kl_range)
    return Prompt(kl_range) if name == "prompt" else Experts(name, kl_range)


def _base_of(recorded: str, given: str | None, directory: Path) -> str:
    """Where a policy's base model is: where it is said to be, or else where its card says.

    Raises: ValueError for a path where nothing is.
    """
    try:
        return model_location(recorded if given is None else given)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(
            f"{error}; {directory / 'clp.json'} names it: if it has moved, base_model "
            "(--base-model) says where it is"
        ) from error


def _digests(base: Any) -> dict[str, str]:
    """By the dtype of a base model, which it depends on, a digest of what its files hold."""
    return {str(base.dtype).removeprefix("torch."): digest(stored(base))}


def _with_known(
    found: dict[str, str], known: dict[str, str], directory: Path, base: str
) -> dict[str, str]:
    """The digests of a base model and those that a card has of it in other dtypes.

    Raises: ValueError if the card has another one of a dtype.
    """
    if any(known.get(dtype, own) != own for dtype, own in found.items()):
        raise ValueError(
            f"{directory} was run with another base model: its parameters are not {base}'s"
        )
    return known | found


class Policy(Steerable):
    """One policy pi(y | x; w) for all weights w over the objectives.

    Attributes:
        model: The transformers causal LM with adapters or experts, or a mixture of whole models.
        conditioning: How the weights change it.
        tokenizer: Its tokenizer.
        objectives: Names, in the order of the columns of the weights.
        rewards: The reward specification of each objective, as given to training.
        reward_scale: The standard deviation of each objective's rewards under the base model, by
            which training divides them; None if it does not (CLPConfig.scale_rewards).
        base_model: What the base was loaded from ("tiny", an absolute path or a hub name); for a
            mixture of whole models, what the first of them was.
        ends: Token ids that end a completion, beside those of model and tokenizer.
        base_digests: Of the base model's parameters, by dtype; None if they are not known.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        objectives: Sequence[str],
        base_model: str,
        rewards: Sequence[str] = (),
        reward_scale: Mapping[str, float] | None = None,
        conditioning: Conditioning | None = None,
        ends: Sequence[int] = (),
        base_digests: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.base_digests = base_digests
        self.ends = tuple(ends)
        self.conditioning = conditioning or LoRA()
        self.tokenizer = tokenizer
        self.objectives = tuple(objectives)
        self.base_model = base_model
        self.rewards = tuple(rewards)
        self.reward_scale = None if reward_scale is None else dict(reward_scale)

    @classmethod
    def create(
        cls,
        base_model: str,
        objectives: Sequence[str],
        *,
        rewards: Sequence[str] = (),
        conditioning: str = "lora",
        r: int | None = None,
        lora_alpha: float | None = None,
        target_modules: str | Sequence[str] = "all-linear",
        exclude_modules: Sequence[str] = (),
        kl_range: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> "Policy":
        """A policy that equals its base model for all weights.

        That is checked bit for bit on six tokens, except for "prompt".

        Args:
            conditioning: What the weights mix, per example: "lora", adapters of linear layers;
                "full", differences of all parameters, embeddings and norms included; "attention",
                those of the linear layers of attention; "head", those of the output head (a tied
                head is untied). "prompt": the weights stand in the prompt, and one adapter serves
                all of them.
            r, lora_alpha: Of adapters; None: 8 and 16. See clp_kernels.inject.
            target_modules: "all-linear", or names: the layers with adapters, or with "full" the
                modules whose parameters have differences ("all-linear" then means all).
            exclude_modules: Names to leave out of them.
            kl_range: (low, high), KL strengths alpha for which the policy can be steered too; None:
                it is trained with one. Each conditioning says what a strength changes.

        Raises: ValueError for a device that is not here (see torch_device), a base that cannot be
            loaded, or that `clp_kernels.inject`, `inject_experts` or the check refuses.
        """
        strengths = None if kl_range is None else KLRange.parse(kl_range)
        how = _conditioning(conditioning, strengths)
        device, base_model = torch_device(device), model_location(base_model)
        if not isinstance(how, LoRA) and not (r is None and lora_alpha is None):
            raise ValueError(f"r and lora_alpha must be None with {conditioning!r}: no adapters")
        model, tokenizer = load_base(base_model, dtype)
        digests = _digests(model)
        if isinstance(how, LoRA):
            how.inject(
                model, objectives, r=8 if r is None else r,
                lora_alpha=16 if lora_alpha is None else lora_alpha, target_modules=target_modules,
                exclude_modules=exclude_modules, generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
        else:
            how.inject(
                model, objectives, target_modules=target_modules, exclude_modules=exclude_modules
            )
        check_start(model)
        model = model.to(device)
        return cls(model, tokenizer, objectives, base_model, rewards, None, how, (), digests)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        base_model: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Policy":
        """Reads a folder written by `save` (a run folder or a checkpoint).

        Args:
            directory: The folder with clp.json.
            base_model: Where the base model is now, if not where clp.json says.

        Raises:
            ValueError: no clp.json, a malformed one, an adapter or expert that does not match its
                recorded digest or the base model, another base model than the one that it was made
                from (checked if it was saved in this dtype), or a device that is not here.
        """
        directory, device = Path(directory), torch_device(device)
        card = read_card(directory)
        how = _conditioning(card["conditioning"], card["kl_range"])
        base = _base_of(card["base_model"], base_model, directory)
        model, tokenizer = load_base(base, dtype)
        digests = _digests(model)
        how.load(model, card["objectives"], directory, card["adapters"])
        digests = _with_known(digests, card["base_digests"] or {}, directory, base)
        return cls(
            model.to(device), tokenizer, card["objectives"], base, card["rewards"],
            card["reward_scale"], how, card["ends"], digests,
        )  # fmt: skip

    @classmethod
    def from_models(
        cls,
        models: Mapping[str, str],
        *,
        base: str | None = None,
        conditioning: str = "full",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Policy":
        """A policy whose every example mixes the parameters of m whole models.

            theta(w) = theta_base + sum_i w_i (theta_i - theta_base)     with a base
            theta(w) = sum_i w_i theta_i                                 without one

        Both are the same for weights that sum to 1. With a base the policy can be trained (KL is
        that to the base), saved and loaded; without one it can be sampled. A completion ends at the
        end tokens of any of the models.

        Args:
            models: What to load for each objective: "tiny", a path or a hub name.
            base: The model that the others were made from; its tokenizer is the policy's.
            conditioning: "full", "attention" or "head": see clp_kernels.mix_models.

        Raises:
            ValueError: no models, one that cannot be loaded, tokenizers with different
                vocabularies, a device that is not here, or anything that clp_kernels.mix_models
                or, with a base, clp_kernels.nn.inject_experts refuses.
        """
        if not isinstance(models, Mapping) or not models:
            raise ValueError(f"models must map objectives to at least one model, got {models!r}")
        device, how = torch_device(device), _conditioning(conditioning)
        if not isinstance(how, Experts):
            raise ValueError(f"conditioning must be full, attention or head, got {conditioning!r}")
        sources = dict(models) if base is None else {"the base": base, **models}
        loaded = {name: load_base(source, dtype) for name, source in sources.items()}
        first, *others = loaded
        vocabulary = loaded[first][1].get_vocab()
        for name in others:
            if differ := vocabulary.items() ^ loaded[name][1].get_vocab().items():
                raise ValueError(
                    f"models must share a tokenizer: the vocabularies of {first} and {name} "
                    f"differ, first in {min(differ)[0]!r}"
                )
        ends = frozenset().union(*(end_ids(*one) for one in loaded.values()))
        objectives, model = list(models), loaded[first][0]
        digests = None if base is None else _digests(model)
        if base is None:
            parts = [part for part, _ in loaded.values()]
            model = clp_kernels.mix_models(parts, objectives, conditioning=conditioning)
        else:
            states = [
                differences(model, loaded[name][0], name, conditioning=conditioning)
                for name in objectives
            ]
            load_experts(model, objectives, states)
        return cls(
            model.to(device), loaded[first][1], objectives,
            model_location(models[first] if base is None else base), conditioning=how,
            ends=sorted(ends), base_digests=digests,
        )  # fmt: skip

    def save(self, directory: str | Path) -> None:
        """Writes adapters/<name>/ (PEFT folders) or experts/<objective>.safetensors, then clp.json.

        clp.json names their digests. It comes last and each file is replaced by a rename, so that a
        reader sees a whole policy, or digests that do not match.

        Raises: ValueError for a mixture of whole models, which are saved by themselves.
        """
        directory, how = Path(directory), self.conditioning
        digests = how.save(self.model, self.objectives, directory, self.base_model)
        write_card(
            directory, self.base_model, how.name, self.objectives, self.rewards, self.reward_scale,
            self.ends, self.kl_range, self.base_digests, digests,
        )  # fmt: skip

    def export(self, weights: WeightSpec | Condition, folder: str | Path) -> str:
        """Writes what others can load for fixed weights, and returns what that is.

        That is one PEFT adapter ("lora", "prompt") or one whole model, whose generation_config
        names all of `end_ids`. Weights are a mapping from
        objective to weight, a string "joy=0.7,brief=0.3", or m numbers; a Condition has a KL
        strength too. The folder must be missing or empty.

        Raises: ValueError, OSError: what cannot be written; nothing is then.
        """
        fixed = self.condition(weights, simplex=False)
        return self.conditioning.export(
            self.model, self.objectives, fixed, Path(folder), self.base_model, self.tokenizer,
            self.end_ids,
        )  # fmt: skip

    @property
    def end_ids(self) -> frozenset[int]:
        """As Steerable.end_ids, and `ends`."""
        return super().end_ids.union(self.ends)

    @property
    def networks(self) -> list[Network]:
        """The one model that runs for every token."""
        return [Network(self.model, partial(clp_kernels.steer, self.model))]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of adapters or experts by name, also one that is frozen."""
        return self.conditioning.parameters(self.model)

    @property
    def kl_range(self) -> KLRange | None:  # type: ignore[override]
        """The KL strengths for which it can be steered; None if it is trained with one."""
        return self.conditioning.kl_range

    def layer_weights(self, condition: Tensor) -> Tensor:
        """As Conditioning.layer_weights."""
        return self.conditioning.layer_weights(condition)

    def conditioned_prompt(self, prompt_ids: list[int], condition: Tensor) -> list[int]:
        """The prompt with what the conditioning writes into it, after its BOS token."""
        prefix = self.conditioning.prefix(condition, self.objectives, self.tokenizer)
        if not prefix:
            return prompt_ids
        front = int(prompt_ids[:1] == [self.tokenizer.bos_token_id])
        return prompt_ids[:front] + prefix + prompt_ids[front:]

    def cache_key(self, condition: Tensor) -> bytes:
        """As Steerable.cache_key: keys and values do not depend on a head."""
        return b"" if self.conditioning.name == "head" else super().cache_key(condition)

    def steer(self, conditions: Tensor) -> clp_kernels.steer:
        """Context in which example b of a batch runs with conditions[b] of conditions [B, c]."""
        return clp_kernels.steer(self.model, self.layer_weights(conditions))

    @property
    def reference(self) -> "Policy":
        """This policy: weights of zero give its base model, if it has one (see `base`)."""
        return self

    def token_kl(self, batch: Batch, temperature: float) -> Tensor:
        """As Steerable.token_kl. Raises: ValueError as `head`."""
        with torch.no_grad():
            return token_stats(self, batch, self.head(), temperature).kl

    @contextmanager
    def base(self) -> Iterator[None]:
        """Context in which the model is its base model, without gradients.

        Raises: ValueError for a mixture of whole models, which has none.
        """
        with torch.no_grad(), clp_kernels.steer(self.model, None):
            yield

    def hidden_states(self, packed: Packed) -> Tensor:
        """Last hidden states [T, d] of the packed tokens, before the head.

        Inside `base`, or `steer` with the weights of each token's example.
        """
        output = with_plans(
            attention_configs(self.model), self.model.base_model, input_ids=packed.tokens,
            position_ids=packed.positions, use_cache=False, plan=packed,
        )  # fmt: skip
        return output.last_hidden_state[:, 0]  # type: ignore[no-any-return]

    def head(self) -> Head:
        """The output head and its conditioning, for the ids that the sampler draws from.

        A head may be padded beyond them.

        Raises: ValueError if the logits are not that, as with a soft cap (Gemma 2).
        """
        return find_head(self)
