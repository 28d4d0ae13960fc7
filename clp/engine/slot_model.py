"""A model of transformers whose attention runs through the slots of a cache."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from clp.engine.attention import Decode, Prefill
from clp.engine.kv_cache import KVCache
from clp.engine.model_error import model_errors
from clp.engine.recording import Inputs, Recording, step
from clp.policies.attention import attention_configs, with_plans

Steering = AbstractContextManager[Any]  # in which the model runs with the weights of its inputs


class SlotModel:
    """A transformers model, whose code runs as it is, with its cache.

    Attributes:
        cache: Its keys and values.
        configs: Its configurations: transformers keeps one per model, or one per part of it.
        recording: The decode step as a list of calls, or None: the model itself runs then.
        recording_is_valid: Whether the model is as it was recorded.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, KVCache()
        self.recording: Recording | None = None
        self.recording_is_valid = False
        self.configs: list[Any] = []
        self.find_configs()

    def find_configs(self) -> None:
        """Finds the configurations, which may be others if the model has changed."""
        self.configs = attention_configs(self.model)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs) while the model's attention is `planned_attention`."""
        return with_plans(self.configs, function, *args, **kwargs)

    def prefill(self, steering: Steering, tokens: Tensor, positions: Tensor, plan: Prefill) -> None:
        """Puts the keys and values of tokens [T, 1] at positions [T, 1] into their slots.

        The body alone runs: a prompt's last token goes through the head in a decode step.

        Raises: ModelError for what the model raises.
        """
        with model_errors(), steering:
            self.run(step, self.model.base_model, Inputs(tokens, positions, plan))

    def logits(self, steering: Steering, tokens: Tensor, positions: Tensor, plan: Decode) -> Tensor:
        """Logits [B, V] of one token per slot: tokens [B, 1] at positions [B, 1].

        Raises: ModelError for what the model raises.
        """
        inputs = Inputs(tokens, positions, plan)
        with model_errors(), steering:
            if self.recording is not None and self.recording_is_valid:
                logits = self.recording(inputs, len(tokens))
            else:
                logits = self.run(step, self.model, inputs).logits
            return logits[:, -1]
