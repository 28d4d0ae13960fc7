"""Conditioning "prompt": the weights stand in the prompt, and one adapter serves all of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clp.data.files import write_whole
from clp.policies.lora import LoRA


class Prompt(LoRA):
    """See clp.policies.interface.Conditioning.

    The policy reads the weights at the beginning of each prompt, such as

        [joy 0.70 brief 0.30] Once upon a time

    as token ids after the BOS token, and has one adapter, "shared". Weights of zero leave both away
    and give the base model.
    """

    name = "prompt"

    def adapters(self, objectives: Sequence[str]) -> list[str]:
        """The one."""
        return ["shared"]

    def layer_weights(self, weights: Tensor) -> Tensor:
        """[..., m] -> [..., 1]: 1, or 0 where all weights are 0."""
        return (weights != 0).any(-1, keepdim=True).to(weights.dtype)

    def prefix(self, weights: Tensor, objectives: Sequence[str], tokenizer: Any) -> list[int]:
        """The ids of the text that says the weights [m]."""
        if not bool((weights != 0).any()):
            return []
        return self._encoded(weights, objectives, tokenizer)

    def longest_prefix(self, objectives: Sequence[str], tokenizer: Any) -> int:
        """Each number adds as many ids as in the longest text in which it alone is another."""
        even = torch.full((len(objectives),), 0.5, dtype=torch.float32)
        plain = most = len(self._encoded(even, objectives, tokenizer))
        for i in range(len(objectives)):
            weights = even.repeat(101, 1)
            weights[:, i] = torch.arange(101) / 100
            longest = max(len(self._encoded(w, objectives, tokenizer)) for w in weights)
            most += longest - plain
        return most

    def export(
        self,
        model: Any,
        objectives: Sequence[str],
        weights: Tensor,
        folder: Path,
        base_model: str,
        tokenizer: Any,
    ) -> str:
        """Writes the adapter, and beside it how prompts must begin for these weights.

        A tokenizer may join the end of that text with the beginning of another one, so that the ids
        count and not the text.
        """
        written = super().export(model, objectives, weights, folder, base_model, tokenizer)
        prefix = self.prefix(weights, objectives, tokenizer)
        record = {"text": prefix_text(weights, objectives) if prefix else "", "token_ids": prefix}
        write_whole(folder / "prompt_prefix.json", f"{json.dumps(record)}\n".encode())
        return (
            f"{written}; each prompt must begin, after its BOS token, with the token ids in "
            "prompt_prefix.json (its text encoded by itself)"
        )

    def _encoded(self, weights: Tensor, objectives: Sequence[str], tokenizer: Any) -> list[int]:
        text = prefix_text(weights, objectives)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prefix_text(weights: Tensor, objectives: Sequence[str]) -> str:
    """The weights [m] as a prompt says them, with two decimals."""
    pairs = zip(objectives, weights.tolist(), strict=True)
    return f"[{' '.join(f'{name} {value:.2f}' for name, value in pairs)}] "
