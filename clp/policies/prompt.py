"""Conditioning "prompt": the weights stand in the prompt, and one adapter serves all of them."""

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clp.policies.lora import LoRA
from clp_kernels.files import write_whole


class Prompt(LoRA):
    """See clp.policies.interface.Conditioning.

    The policy reads the weights at the beginning of each prompt, such as

        [joy 0.70 brief 0.30] Once upon a time

    as token ids after the BOS token, and has one adapter, "shared". Weights of zero leave both away
    and give the base model. With a range of KL strengths it reads "[joy 0.70 brief 0.30 kl 0.05]".
    """

    name = "prompt"

    def adapters(self, objectives: Sequence[str]) -> list[str]:
        """The one."""
        return ["shared"]

    def layer_weights(self, condition: Tensor) -> Tensor:
        """[..., c] -> [..., 1]: 1, or 0 where all weights are 0."""
        weights = condition if self.kl_range is None else condition[..., :-1]
        return (weights != 0).any(-1, keepdim=True).to(condition.dtype)

    def prefix(self, condition: Tensor, objectives: Sequence[str], tokenizer: Any) -> list[int]:
        """The ids of the text that says the condition [c]."""
        if not bool(self.layer_weights(condition)):
            return []
        return self._encoded(condition, objectives, tokenizer)

    def longest_prefix(self, objectives: Sequence[str], tokenizer: Any) -> int:
        """Each number adds as many ids as in the longest text in which it alone is another."""
        said = [torch.arange(101) / 100] * len(objectives)
        if self.kl_range is not None:
            low, high = (math.floor(math.log10(alpha)) for alpha in self.kl_range)
            three = torch.arange(100, 1000) / 100
            said.append(torch.cat([three * 10.0**e for e in range(low, high + 1)]))
        even = torch.full((len(said),), 0.5, dtype=torch.float32)
        plain = most = len(self._encoded(even, objectives, tokenizer))
        for i, column in enumerate(said):
            values = even.repeat(len(column), 1)
            values[:, i] = column
            longest = max(len(self._encoded(v, objectives, tokenizer)) for v in values)
            most += longest - plain
        return most

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
        """Writes the adapter, and beside it how prompts must begin for this condition.

        A tokenizer may join the end of that text with the beginning of another one, so that the ids
        count and not the text.
        """
        written = super().export(model, objectives, condition, folder, base_model, tokenizer, ends)
        prefix = self.prefix(condition, objectives, tokenizer)
        record = {"text": prefix_text(condition, objectives) if prefix else "", "token_ids": prefix}
        write_whole(folder / "prompt_prefix.json", f"{json.dumps(record)}\n".encode())
        return (
            f"{written}; each prompt must begin, after its BOS token, with the token ids in "
            "prompt_prefix.json (its text encoded by itself)"
        )

    def _encoded(self, condition: Tensor, objectives: Sequence[str], tokenizer: Any) -> list[int]:
        text = prefix_text(condition, objectives)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prefix_text(condition: Tensor, objectives: Sequence[str]) -> str:
    """The condition [c] as a prompt says it: two decimals for a weight, three digits for alpha."""
    values = condition.tolist()
    said = [f"{name} {value:.2f}" for name, value in zip(objectives, values, strict=False)]
    said += [f"kl {alpha:.3g}" for alpha in values[len(objectives) :]]
    return f"[{' '.join(said)}] "
