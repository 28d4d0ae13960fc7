"""What the number of a step decides: its seeds, prompts and learning rate."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clp.training.config import CLPConfig


def pytorch_seed(number: int) -> int:
    """A seed that PyTorch takes (below 2^64): the number itself, or 64 bits of its SHA-256."""
    if number < 2**64:
        return number
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big")


def prompts_of(rows: Sequence[dict[str, Any]], args: CLPConfig, step: int) -> list[dict[str, Any]]:
    """The step's prompts: epochs of the data, each in its own order."""
    size, chosen = len(rows), []
    orders: dict[int, Tensor] = {}
    for i in range(step * args.num_prompts, (step + 1) * args.num_prompts):
        epoch, place = divmod(i, size)
        if epoch not in orders:
            seed = pytorch_seed(args.seed * 1_000_003 + 500_000 + epoch)
            generator = torch.Generator().manual_seed(seed)
            orders[epoch] = torch.randperm(size, generator=generator)
        chosen.append(rows[int(orders[epoch][place])])
    return chosen


def lr_factor(step: int, args: CLPConfig) -> float:
    """The learning rate of the step over its peak."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return {"constant": 1.0, "linear": 1 - done, "cosine": cosine}[args.lr_scheduler_type]
