"""Whether a model is the same with its attention through the slots as it is by itself."""

from typing import Any

import torch
from torch import Tensor

from clp.engine.kv_cache import Decode, KVCache, Prefill, Segment


@torch.no_grad()
def fault(network: Any, cache: KVCache, rows: Tensor) -> str | None:
    """What is wrong with a model whose attention goes through the slots; None: nothing.

    Five tokens run through the slots and through the model as it is.

    Args:
        network: A clp.policies.interface.Network.
        cache: Its slots; there must be room for one row of five tokens.
        rows: The row of weights [1, m].
    """
    config = network.model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    odd = set(types or ()) - {"full_attention", "sliding_attention"}
    if odd:
        return f"it has {min(odd)}"
    if getattr(network.model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    ids = [min(i, config.vocab_size - 1) for i in range(1, 6)]
    tokens = torch.tensor(ids, device=rows.device)[:, None]
    where = torch.arange(5, device=rows.device)[:, None]
    with network.steer(rows):
        wanted = network.model(input_ids=tokens.t(), use_cache=False).logits[0, -1]
    plan = Prefill(cache, [Segment(0, 0, 4)], where.device)
    with network.steer(rows.expand(4, -1)):
        cache.run(
            network.model.base_model,
            input_ids=tokens[:4],
            position_ids=where[:4],
            use_cache=False,
            slots=plan,
        )
    step = Decode(cache, 0, where[4], 5, True)
    with network.steer(rows):
        got = cache.run(
            network.model,
            input_ids=tokens[4:],
            position_ids=where[4:],
            use_cache=False,
            slots=step,
        ).logits[0, -1]
    bound = 1e-3 if network.model.dtype in (torch.float32, torch.float64) else 0.1
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
