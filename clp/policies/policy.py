"""A steerable policy: a frozen causal LM, one adapter per objective, and the names in order."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clp_kernels
from clp.data.paths import model_location
from clp.policies.card import checked_adapters, read_card, write_card
from clp.policies.interface import Network, Steerable
from clp.policies.loading import end_ids, load_base, model_path, torch_device
from clp_kernels.nn.mixed_lora import steered_layers
from clp_kernels.nn.probe import check_start
from clp_kernels.nn.steering import SteeredLayer


class Head(NamedTuple):
    """An output head: logits = (h W^T + bias) / temperature.

    Attributes:
        weight: [V, d].
        bias: [V] or None.
        temperature: That of models which scale their logits (Granite, Cohere); 1 elsewhere.
        ids: The token ids of its V rows, as `Steerable.drawable_ids`.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float
    ids: slice | Tensor


class Policy(Steerable):
    """One policy pi(y | x; w) for all weights w over the objectives.

    Attributes:
        model: The transformers causal LM with injected adapters, or a mixture of whole models.
        tokenizer: Its tokenizer.
        objectives: Names, in the order of the columns of the weights.
        rewards: The reward specification of each objective, as given to training.
        reward_scale: The standard deviation of each objective's rewards under the base model, by
            which training divides them; None if it does not (CLPConfig.scale_rewards).
        base_model: What the base was loaded from ("tiny", an absolute path or a hub name); for a
            mixture of whole models, what the first of them was.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        objectives: Sequence[str],
        base_model: str,
        rewards: Sequence[str] = (),
        reward_scale: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
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
        r: int = 8,
        lora_alpha: float = 16,
        target_modules: str | Sequence[str] = "all-linear",
        exclude_modules: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> "Policy":
        """A policy that equals its base model for all weights (LoRA's B starts at zero).

        That is checked bit for bit on six tokens.

        Raises: ValueError for a device that is not here (see torch_device), a base that cannot be
            loaded, or that `clp_kernels.inject` or the check refuses.
        """
        device, base_model = torch_device(device), model_location(base_model)
        model, tokenizer = load_base(base_model, dtype)
        generator = torch.Generator().manual_seed(seed)
        clp_kernels.inject(
            model, objectives, r=r, lora_alpha=lora_alpha, target_modules=target_modules,
            exclude_modules=exclude_modules, generator=generator,
        )  # fmt: skip
        check_start(model)
        return cls(model.to(device), tokenizer, objectives, base_model, rewards)

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
            ValueError: no clp.json, a malformed one, an adapter that does not match its recorded
                digest, a device that is not here, or anything that clp_kernels.load_adapters
                refuses.
        """
        directory, device = Path(directory), torch_device(device)
        card = read_card(directory)
        folders = checked_adapters(directory, card)
        try:
            base = model_location(card["base_model"] if base_model is None else base_model)
        except ValueError as error:
            if base_model is not None:
                raise
            raise ValueError(
                f"{error}; {directory / 'clp.json'} names it: if it has moved, base_model "
                "(--base-model) says where it is"
            ) from error
        model, tokenizer = load_base(base, dtype)
        clp_kernels.load_adapters(model, folders)
        return cls(
            model.to(device), tokenizer, card["objectives"], base, card["rewards"],
            card["reward_scale"],
        )  # fmt: skip

    @classmethod
    def from_models(
        cls,
        models: Mapping[str, str],
        *,
        conditioning: str = "full",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Policy":
        """A policy whose every example mixes the parameters of m whole models.

        It has no base model, and nothing to train or to save. A completion ends at the end tokens
        of any of the models.

        Args:
            models: What to load for each objective: "tiny", a path or a hub name.
            conditioning: "full", "attention" or "head": see clp_kernels.mix_models.

        Raises:
            ValueError: no models, one that cannot be loaded, tokenizers with different
                vocabularies, a device that is not here, or anything that clp_kernels.mix_models
                refuses.
        """
        if not isinstance(models, Mapping) or not models:
            raise ValueError(f"models must map objectives to at least one model, got {models!r}")
        device = torch_device(device)
        loaded = {name: load_base(source, dtype) for name, source in models.items()}
        first, *others = loaded
        vocabulary = loaded[first][1].get_vocab()
        for name in others:
            if differ := vocabulary.items() ^ loaded[name][1].get_vocab().items():
                raise ValueError(
                    f"models must share a tokenizer: the vocabularies of {first} and {name} "
                    f"differ, first in {min(differ)[0]!r}"
                )
        ends = frozenset().union(*(end_ids(*one) for one in loaded.values()))
        parts = [model for model, _ in loaded.values()]
        model: Any = clp_kernels.mix_models(parts, list(loaded), conditioning=conditioning)
        model.generation_config.eos_token_id = sorted(ends) or None
        return cls(model.to(device), loaded[first][1], list(loaded), model_location(models[first]))

    def save(self, directory: str | Path) -> None:
        """Writes adapters/<objective>/ as PEFT folders, then clp.json, which names their digests.

        clp.json comes last and each file is replaced by a rename, so that a reader sees a whole
        policy, or digests that do not match.

        Raises: ValueError for a mixture of whole models, which are saved by themselves.
        """
        if not steered_layers(self.model):
            raise ValueError(
                f"the experts of this policy ({', '.join(self.objectives)}) are whole models; "
                "save those, and load them with Policy.from_models"
            )
        directory = Path(directory)
        base = model_path(self.base_model)
        clp_kernels.save_adapters(self.model, directory / "adapters", base_model=base)
        write_card(directory, self.base_model, self.objectives, self.rewards, self.reward_scale)

    @property
    def networks(self) -> list[Network]:
        """The one model that runs for every token."""
        return [Network(self.model, self.steer)]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by name: every lora_A and lora_B, also one that is frozen."""
        layers = steered_layers(self.model)
        return {f"{n}.{a}": getattr(layers[n], a) for n in layers for a in ("lora_A", "lora_B")}

    def steer(self, weights: Tensor) -> clp_kernels.steer:
        """Context in which example b of a batch runs with weights[b] of weights [B, m]."""
        return clp_kernels.steer(self.model, weights)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Context in which the model is its base model, without gradients.

        Raises: ValueError for a mixture of whole models, which has none.
        """
        with torch.no_grad(), clp_kernels.steer(self.model, None):
            yield

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [B, S, d] before the head; padding may be on either side."""
        output = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask,
            position_ids=position_ids(attention_mask), use_cache=False,
        )  # fmt: skip
        return output.last_hidden_state  # type: ignore[no-any-return]

    def head(self) -> Head:
        """The frozen output head, for the ids that the sampler draws from.

        A head may be padded beyond them.

        Raises: ValueError if the logits are not that, as with a soft cap (Gemma 2).
        """
        layer = self.model.get_output_embeddings()
        if layer is None or isinstance(layer, SteeredLayer):
            raise ValueError(f"{self.base_model} has no frozen linear output head to train on")
        probe = torch.tensor([[0, 1, 2]], device=self.device)
        with self.base():
            hidden = self.hidden_states(probe, torch.ones_like(probe))
            plain = F.linear(hidden, layer.weight, layer.bias).float()
            actual = self.model(input_ids=probe).logits.float()
        if not actual.isfinite().all():
            raise ValueError(f"the logits of {self.base_model} are not finite: are its weights?")
        scale = float((plain * actual).sum() / (plain * plain).sum())
        error = float((actual - scale * plain).abs().max())
        if not error <= 0.02 * float(actual.abs().max()):
            raise ValueError(
                f"the logits of {self.base_model} are not a linear function of its last hidden "
                "state (a soft cap?); training needs that"
            )
        # A ratio within the rounding of the model's dtype is 1.
        temperature = 1.0 if abs(scale - 1) < 0.01 else 1 / scale
        ids = self.drawable_ids
        bias = None if layer.bias is None else layer.bias[ids]
        return Head(layer.weight[ids], bias, temperature, ids)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count from 0 at the first real token of each example."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
