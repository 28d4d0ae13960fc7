"""Conditioning "lora": one LoRA adapter per objective, mixed by the weights of each example."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clp_kernels
from clp.data.condition import beta
from clp.data.kl_range import KLRange
from clp.policies.interface import Conditioning
from clp.policies.loading import model_path
from clp_kernels.nn.mixed_lora import steered_layers


class LoRA(Conditioning):
    """See clp.policies.interface.Conditioning; the adapters are PEFT folders.

    With a range of KL strengths, where beta = alpha / (1 - alpha), beta_0 is that of the middle of
    the range, and s = beta_0 / beta, adapter i has the coefficient

        s w_i

    because the optimum pi_ref exp(w.R / beta) is proportional to s in its logits, to first order in
    the parameters. One more adapter takes what that leaves, with the coefficient

        sum_i w_i s log(s)

    which is 0 in the middle of the range and for the base model.
    """

    name = "lora"

    def __init__(self, kl_range: KLRange | None = None) -> None:
        self.kl_range = kl_range

    def adapters(self, objectives: Sequence[str]) -> list[str]:
        """The names of the adapters. An objective is an identifier, so that names differ."""
        return [*objectives, *([] if self.kl_range is None else ["kl-residual"])]

    def layer_weights(self, condition: Tensor) -> Tensor:
        """As Conditioning.layer_weights: [..., m] themselves, or [..., m + 1] -> [..., m + 1]."""
        if self.kl_range is None:
            return condition
        weights, alpha = condition[..., :-1], condition[..., -1:]
        s = beta(self.kl_range.middle) / beta(alpha)
        return torch.cat([weights * s, weights.sum(-1, keepdim=True) * s * s.log()], -1)

    def inject(
        self,
        model: nn.Module,
        objectives: Sequence[str],
        *,
        r: int,
        lora_alpha: float,
        target_modules: str | Sequence[str],
        exclude_modules: Sequence[str],
        generator: torch.Generator,
    ) -> None:
        """New adapters, whose B is zero."""
        clp_kernels.inject(
            model, self.adapters(objectives), r=r, lora_alpha=lora_alpha,
            target_modules=target_modules, exclude_modules=exclude_modules, generator=generator,
        )  # fmt: skip

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Every lora_A and lora_B, also one that is frozen."""
        layers = steered_layers(model)
        return {f"{n}.{a}": getattr(layers[n], a) for n in layers for a in ("lora_A", "lora_B")}

    def save(
        self, model: nn.Module, objectives: Sequence[str], directory: Path, base_model: str
    ) -> dict[str, str]:
        """Writes adapters/<name>/; their digests."""
        folder = directory / "adapters"
        clp_kernels.save_adapters(model, folder, base_model=model_path(base_model))
        return {name: _digest(folder / name) for name in self.adapters(objectives)}

    def load(
        self, model: nn.Module, objectives: Sequence[str], directory: Path, digests: dict[str, Any]
    ) -> None:
        """Puts the adapters of a folder into the base model.

        Raises: ValueError if one is incomplete, or differs from its digest.
        """
        folders = [directory / "adapters" / name for name in self.adapters(objectives)]
        for folder in folders:
            if _digest(folder) != digests.get(folder.name):
                raise ValueError(f"{folder} is not the adapter that {directory / 'clp.json'} names")
        clp_kernels.load_adapters(model, folders)

    def export(
        self,
        model: Any,
        objectives: Sequence[str],
        condition: Tensor,
        folder: Path,
        base_model: str,
        tokenizer: Any,
        ends: Collection[int],
    ) -> str:
        """Writes one PEFT adapter for a fixed condition; says what it is."""
        base = model_path(base_model)
        given = self.layer_weights(condition)
        written = clp_kernels.export_adapter(model, given, folder, base_model=base)
        ranks = (layer.ranks for layer in steered_layers(model).values())
        return f"PEFT adapter of rank {sum(map(max, zip(*ranks, strict=True)))}: {written}"


def _digest(folder: Path) -> str:
    """SHA-256 over the two files of an adapter folder."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"adapter {folder} lacks {name}")
        digest.update(path.read_bytes())
    return digest.hexdigest()
