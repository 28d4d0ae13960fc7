"""Tokens and log-probabilities out of logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import clp_kernels
from clp.engine.model_error import ModelError
from clp.policies.power_mean import power_mean
from clp_kernels.native import BackendError


def mixture(logits: Sequence[Tensor], mixing: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Logits [B, V] of each network, and how to mix them, as the op `sample` takes both.

    The op lacks the mode "power", which is mixed here.
    """
    if "exponent" in mixing:
        return power_mean(torch.stack(list(logits)), mixing["weights"], mixing["exponent"]), {}
    return (torch.stack(list(logits)) if mixing else logits[0]), mixing


def draw(
    logits: Tensor, mixing: dict[str, Any], options: dict[str, Any], ids: slice | Tensor
) -> clp_kernels.Sample:
    """clp_kernels.sample; token -1 and NaN for the examples whose logits are not finite.

    Args:
        logits: [B, V], or [n, B, V] of n networks.
        mixing: `weights` and `mode` of the op, or empty.
        options: Its other arguments.
        ids: The token ids that the V logits belong to: all from 0 on, or [V] in order.

    Raises: ModelError if the logits are finite and their mixture is not.
    """
    try:
        drawn = clp_kernels.sample(logits, **mixing, **options)
    except BackendError:
        raise
    except ValueError:
        # On the CPU the op refuses a batch with logits that are not finite; the others go on.
        good = _finite_examples(logits)
        if bool(good.all()):
            mixed = clp_kernels.mix_logits(logits, **mixing) if mixing else logits
            if bool(_finite_examples(mixed).all()):
                raise  # a fault of the engine
            text = "the logits cannot be sampled: their mixture is not finite"
            raise ModelError(ValueError(text)) from None
        drawn = _draw_finite(logits, mixing | options, good)
    if isinstance(ids, slice):
        return drawn
    return drawn._replace(tokens=torch.where(drawn.tokens < 0, drawn.tokens, ids[drawn.tokens]))


def _finite_examples(logits: Tensor) -> Tensor:
    """Bool [B]: as the op decides. Minus infinity excludes a token."""
    by_example = logits if logits.dim() == 2 else logits.transpose(0, 1).flatten(1)
    return (by_example < torch.inf).all(1) & by_example.isfinite().any(1)


def _draw_finite(logits: Tensor, options: dict[str, Any], good: Tensor) -> clp_kernels.Sample:
    count = good.shape[0]
    tokens = torch.full((count,), -1, device=good.device)
    logprobs = torch.full((count,), float("nan"), dtype=torch.float32, device=good.device)
    if bool(good.any()):
        picked: dict[str, Any] = {
            k: v[good] if isinstance(v, Tensor) else v for k, v in options.items()
        }
        drawn = clp_kernels.sample(logits[..., good, :], **picked)
        tokens[good], logprobs[good] = drawn.tokens, drawn.logprobs
    return clp_kernels.Sample(tokens, logprobs, logprobs)


def top_logprobs(
    logits: Tensor,
    mixing: dict[str, Any],
    temperatures: Sequence[float],
    counts: Sequence[int],
    ids: slice | Tensor,
) -> list[dict[int, float]]:
    """For each example the `counts` likeliest tokens, under the tempered distribution.

    Args:
        logits: [k, V] or [n, k, V].
        mixing, ids: As in `draw`, for these examples.
        temperatures, counts: k of them; a temperature of 0 counts as 1.
    """
    if mixing:
        logits = clp_kernels.mix_logits(logits, **mixing)
    # Less the largest, in float64: a quotient by the least temperature would be infinite.
    logits = logits.double()
    scaled = (logits - logits.amax(1, keepdim=True)) / torch.tensor(
        [t or 1.0 for t in temperatures], dtype=torch.float64, device=logits.device
    )[:, None]
    logp = torch.log_softmax(scaled, 1)
    values, places = logp.topk(min(max(counts), logp.shape[1]))
    tokens = places if isinstance(ids, slice) else ids[places]
    return [
        dict(list(zip(i, v, strict=True))[:most])
        for i, v, most in zip(tokens.tolist(), values.tolist(), counts, strict=True)
    ]
