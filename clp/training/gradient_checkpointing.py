"""Gradient checkpointing of a model in eval mode.

transformers checkpoints a layer only while `layer.training` is True, and then the layer's own
dropout is on as well (OPT's reads `self.training`). A policy's model stays in eval mode, so that
its log-probabilities are those that the sampler drew with; here its layers checkpoint in that mode.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.utils.checkpoint
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from clp.policies.attention import attention_configs, with_plans


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that `checkpointing` is about: those that transformers would checkpoint.

    Raises: ValueError if the model has none.
    """
    kind = GradientCheckpointingLayer
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, kind)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has no layers that transformers can "
            "checkpoint"
        )
    return layers


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Context in which each layer saves only its inputs and runs again in the backward pass.

    Enter it outside `steer`: that makes the recomputation run with the weights of its forward, also
    after both contexts have ended. Gradients have the bits of those without it. No layer changes
    its mode, and afterwards the model is as it was before.
    """
    layers, configs = checkpointed_layers(model), attention_configs(model)
    # In eval mode nothing is drawn, so no state of the generators needs to be kept.
    checkpoint = partial(
        torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False
    )
    names = ("forward", "_gradient_checkpointing_func")
    before = [{n: m.__dict__[n] for n in names if n in m.__dict__} for m in layers]
    try:
        for layer in layers:
            # `steer` finds the function by this name and passes it the weights.
            layer._gradient_checkpointing_func = checkpoint  # type: ignore[assignment]
            forward = partial(_forward, configs, layer, layer.forward)
            layer.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            for name in names:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(attributes)


def _forward(
    configs: Sequence[Any], layer: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # In the recomputation too attention must be that of Policy.hidden_states, which has ended.
    planned = partial(with_plans, configs, forward, **kwargs)
    return layer._gradient_checkpointing_func(planned, *args)
