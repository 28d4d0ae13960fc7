"""The output head of a policy, as log-probabilities need it."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clp.policies.packed import Packed
from clp_kernels.nn.experts import MixedLinear
from clp_kernels.nn.steering import SteeredLayer

if TYPE_CHECKING:  # policy.py imports this file
    from clp.policies.policy import Policy


class Head(NamedTuple):
    """An output head: logits = (h W^T + bias) / temperature.

    Attributes:
        weight: [V, d].
        bias: [V] or None.
        temperature: That of models which scale their logits (Granite, Cohere); 1 elsewhere.
        ids: The token ids of its V rows, as `Steerable.drawable_ids`.
        experts: The layer with differences from all rows of W and bias, if it is conditioned.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float
    ids: slice | Tensor
    experts: MixedLinear | None


def find_head(policy: "Policy") -> Head:
    """As Policy.head: compares the head's product with the logits of the model on four tokens."""
    layer = policy.model.get_output_embeddings()
    experts = layer if isinstance(layer, MixedLinear) and layer.has_base else None
    if experts is not None:
        layer = experts.base_layer
    if layer is None or isinstance(layer, SteeredLayer):
        raise ValueError(f"{policy.base_model} has no frozen linear output head to train on")
    probe = torch.tensor([[0, 1, 2], [0, 1, 1]], device=policy.device)
    packed = Packed(probe, torch.ones_like(probe), torch.zeros_like(probe))
    with policy.base():
        hidden = policy.hidden_states(packed)[packed.places]
        plain = F.linear(hidden, layer.weight, layer.bias).float()
        actual = policy.model(input_ids=probe).logits.float()
    if not actual.isfinite().all():
        raise ValueError(f"the logits of {policy.base_model} are not finite: are its weights?")
    scale = float((plain * actual).sum() / (plain * plain).sum())
    error = float((actual - scale * plain).abs().max())
    # Rounding of two ways to compute the same. A cap at 30 bends logits of 5 by 1 %.
    exact = policy.model.dtype in (torch.float32, torch.float64)
    text = policy.model.config.get_text_config()
    capped = getattr(text, "final_logit_softcapping", None) is not None
    if capped or not error <= (1e-3 if exact else 0.02) * float(actual.abs().max()):
        raise ValueError(
            f"the logits of {policy.base_model} are not a linear function of its last hidden "
            "state (a soft cap?); training needs that"
        )
    # A ratio within the rounding of the model's dtype is 1.
    temperature = 1.0 if abs(scale - 1) < (1e-4 if exact else 0.01) else 1 / scale
    ids = policy.drawable_ids
    bias = None if layer.bias is None else layer.bias[ids]
    return Head(layer.weight[ids], bias, temperature, ids, experts)
