"""The policy with which a training starts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clp.policies.loading import torch_device
from clp.policies.policy import Policy
from clp.training.config import CLPConfig
from clp.training.schedule import pytorch_seed


def start_policy(
    args: CLPConfig, objectives: Sequence[str], checkpoint: Path | None, start: Policy | None
) -> Policy:
    """That of the checkpoint, else the given one, else a new one."""
    dtype = getattr(torch, args.dtype)
    if checkpoint is not None:
        return Policy.load(checkpoint, base_model=args.model, dtype=dtype, device=args.device)
    if start is not None:
        return start
    targets, adapters = args.target_modules, args.conditioning in ("lora", "prompt")
    return Policy.create(
        args.model, objectives, conditioning=args.conditioning, dtype=dtype, device=args.device,
        seed=pytorch_seed(args.seed), r=args.r if adapters else None,
        lora_alpha=args.lora_alpha if adapters else None,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        exclude_modules=args.exclude_modules, kl_range=args.kl_range,
    )  # fmt: skip


def settings_of(policy: Policy, args: CLPConfig) -> CLPConfig:
    """The arguments with what the policy has of its own.

    Raises: ValueError for a policy that cannot be trained, or settings of a new one.
    """
    if not policy.trainable_parameters():
        raise ValueError(
            "model is a mixture of whole models without a base, which cannot be trained: give "
            "Policy.from_models their base"
        )
    dtype = str(policy.model.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model must be a policy in float32 or bfloat16, got {dtype}")
    plain = CLPConfig()
    for name in ("r", "lora_alpha", "target_modules", "exclude_modules"):
        if getattr(args, name) != getattr(plain, name):
            raise ValueError(
                f"{name} must be left out for a policy that has its own, got {getattr(args, name)}"
            )
    if args.device != "auto" and torch_device(args.device) != policy.device:
        raise ValueError(f"device must be the policy's {policy.device}, got {args.device!r}")
    strengths = None if policy.kl_range is None else list(policy.kl_range)
    if args.kl_range not in (None, strengths):
        raise ValueError(f"kl_range must be the policy's {strengths}, got {args.kl_range}")
    own: dict[str, Any] = {
        "dtype": dtype, "conditioning": policy.conditioning.name, "kl_range": strengths,
    }  # fmt: skip
    return replace(args, model=policy.base_model, device=str(policy.device), **own)
