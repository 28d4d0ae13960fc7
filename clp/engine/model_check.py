"""Whether a model computes the same with its attention through the slots as by itself."""

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clp.engine.attention import Decode, Prefill
from clp.engine.kv_cache import BLOCK, Segment
from clp.engine.model_error import ModelError, model_errors
from clp.engine.recording import LARGEST_BATCH, Inputs, Unrecordable, record
from clp.engine.slot_model import SlotModel
from clp_kernels.native import BackendError
from clp_kernels.nn.steering import BusyError


def prepare(slot_model: SlotModel, steer: Any, weights: Tensor, *, recorded: bool) -> None:
    """Checks a model and records its decode step; its cache is empty afterwards.

    Args:
        slot_model: The model, which gets its `recording` if its step can be recorded.
        steer: Weights [B, m] -> context, as of a clp.policies.interface.Network.
        weights: [1, m]. Weights of zero would hide the adapters.

    Raises: ValueError for a model whose logits differ through the slots, from run to run (dropout
        in training mode) or are not finite, or that fails there.
    """
    model, cache = slot_model.model, slot_model.cache
    cache.resize(LARGEST_BATCH, BLOCK)
    refusal = f"the sampler does not support {type(model).__name__}"
    try:
        difference = _difference(slot_model, steer, weights)
        if difference is not None:
            raise ValueError(f"{refusal}: {difference}")
        if recorded:
            _record(slot_model, steer, weights)
    except ModelError as error:
        cause = error.__cause__
        if isinstance(cause, (torch.OutOfMemoryError, BackendError, BusyError)):
            raise cause from None
        raise ValueError(f"{refusal}: {error}") from cause
    finally:
        cache.resize(0, 0)


@torch.no_grad()
def _difference(slot_model: SlotModel, steer: Any, weights: Tensor) -> str | None:
    """What differs from the model by itself on five tokens; None: nothing."""
    model, cache = slot_model.model, slot_model.cache
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    odd = set(types or ()) - {"full_attention", "sliding_attention"}
    if odd:
        return f"it has {min(odd)}"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    device = weights.device
    ids = [min(i, config.vocab_size - 1) for i in range(1, 6)]
    tokens = torch.tensor(ids, device=device)[:, None]
    positions = torch.arange(5, device=device)[:, None]

    def plain() -> Tensor:
        with model_errors(), steer(weights):
            logits: Tensor = model(input_ids=tokens.t(), use_cache=False).logits
        return logits[0, -1]

    wanted = plain()
    if not bool(wanted.isfinite().all()):
        raise ValueError(
            f"the logits of {type(model).__name__} are not finite: are its parameters, and those "
            "that the policy adds?"
        )
    if any(module.training for module in model.modules()) and not torch.equal(plain(), wanted):
        raise ValueError(
            f"{type(model).__name__} is in training mode, in which its logits differ from run to "
            "run, as by dropout: call eval() on it (policy.model.eval())"
        )
    plan = Prefill(cache, [Segment(0, 0, 4)], device)
    slot_model.prefill(steer(weights.expand(4, -1)), tokens[:4], positions[:4], plan)
    step = Decode(cache, 0, positions[4], 5, True)
    got = slot_model.logits(steer(weights), tokens[4:], positions[4:], step)[0]
    bound = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    difference = float((got - wanted).abs().max())
    if cache.layers == 0 or not difference <= bound * float(wanted.abs().max()):
        return (
            f"its logits differ by {difference:.2g} where attention goes through the slots "
            "of the cache"
        )
    # Five tokens do not fill a window. A model may have it in its masks alone.
    window = getattr(config, "sliding_window", None)
    for layer, passed in cache.windows.items():
        if window and passed != window and (types is None or types[layer] != "full_attention"):
            return f"layer {layer} does not pass its window of {window} tokens to the attention"
    return None


@torch.inference_mode()
def _record(slot_model: SlotModel, steer: Any, weights: Tensor) -> None:
    @contextmanager
    def steered(count: int) -> Any:
        lengths = torch.arange(count) % 4
        plan = Decode(slot_model.cache, 0, lengths, 4, False)
        with steer(weights.expand(count, -1)):
            yield Inputs((lengths + 1)[:, None], lengths[:, None], plan)

    try:
        slot_model.recording = slot_model.run(record, slot_model.model, steered)
    except Unrecordable:
        slot_model.recording = None
