"""Soups as published code averages LoRA files: A and B each by itself."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import clp_kernels
from clp.methods.experts import check_experts, train_experts
from clp.methods.method import NOTHING, Outcome, on_grid, steps_of
from clp.methods.soup import soup_of
from clp.policies.loading import load_base
from clp.policies.lora import LoRA
from clp.policies.policy import Policy
from clp.training.config import CLPConfig
from clp_kernels.nn.mixed_lora import steered_layers


def averaged_adapters(
    args: CLPConfig, folder: Path, *, budget: float = 1.0, check_only: bool = False
) -> Outcome:
    """Rewarded Soups whose experts' A and B are averaged separately (see `averaged`).

    Each of the m experts has 1/m of the budget.

    Raises: ValueError for a conditioning other than "lora".
    """
    if args.conditioning != "lora":
        raise ValueError(f"averaged adapters need conditioning='lora', got {args.conditioning!r}")
    steps = steps_of(args, budget, len(args.rewards))
    check_experts(args)
    if check_only:
        return NOTHING
    folders, used = train_experts(args, folder.parent, steps)
    return Outcome(on_grid(averaged(soup_of(args, folders))), used)


class AveragedAdapters(LoRA):
    """Adapter (i, j) is (B_i, A_j), with the weight w_i w_j:

    s (sum_i w_i B_i) (sum_j w_j A_j) = sum_ij w_i w_j s B_i A_j
    """

    name = "averaged_adapters"

    def adapters(self, objectives: Sequence[str]) -> list[str]:
        """m^2 names."""
        return [f"{b}-{a}" for b in objectives for a in objectives]

    def layer_weights(self, condition: Tensor) -> Tensor:
        """[..., m] -> [..., m^2]: the outer product."""
        return (condition[..., :, None] * condition[..., None, :]).flatten(-2)

    def save(
        self, model: nn.Module, objectives: Sequence[str], directory: Path, base_model: str
    ) -> dict[str, str]:
        """Raises: ValueError: the experts are what is saved."""
        raise ValueError("averaged adapters are not saved: save their experts")


def averaged(policy: Policy) -> Policy:
    """The policy with the adapters of `policy` ("lora", see clp.methods.soup), averaged as files.

        y = x W^T + s (x A(w)^T) B(w)^T,  A(w) = sum_i w_i A_i,  B(w) = sum_i w_i B_i

    This is the exact sum sum_i w_i s B_i A_i only where w = e_i, or where all A_i or all B_i are
    equal (and w sums to 1). Published code that averages the state dicts of LoRA files computes it.
    It costs m^2 adapters. It can be sampled, evaluated and exported; to be saved and trained there
    are the experts.

    Raises: ValueError for another conditioning, a policy with a kl_range, or adapters of different
        rank or alpha.

    Source: Personalized Soups (arXiv:2310.11564), whose code averages A and B.
    """
    if policy.conditioning.name != "lora":
        raise ValueError(f"policy must have LoRA adapters, got {policy.conditioning.name!r}")
    if policy.kl_range is not None:
        raise ValueError("policy must be trained with one KL strength, not a kl_range")
    old = steered_layers(policy.model)
    shapes = {pair for x in old.values() for pair in zip(x.ranks, x.lora_alpha, strict=True)}
    if len(shapes) != 1:
        raise ValueError(f"adapters must have one (rank, alpha), got {sorted(shapes)}")
    (rank, alpha), how, m = shapes.pop(), AveragedAdapters(), len(policy.objectives)
    model, tokenizer = load_base(policy.base_model, policy.model.dtype)
    names = how.adapters(policy.objectives)
    clp_kernels.inject(model, names, r=rank, lora_alpha=alpha, target_modules=list(old))
    with torch.no_grad():
        for name, layer in steered_layers(model).items():
            layer.lora_A.copy_(old[name].lora_A.repeat(m, 1, 1))
            layer.lora_B.copy_(old[name].lora_B.repeat_interleave(m, 0))
    return Policy(
        model.to(policy.device), tokenizer, policy.objectives, policy.base_model, policy.rewards,
        policy.reward_scale, how, policy.ends,
    )  # fmt: skip
