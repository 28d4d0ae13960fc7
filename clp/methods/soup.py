"""One policy out of single-objective experts: Rewarded Soups."""

from collections.abc import Sequence
from pathlib import Path

import torch

import clp_kernels
from clp.policies.checksum import digest, stored
from clp.policies.experts import Experts
from clp.policies.loading import load_base, torch_device
from clp.policies.lora import LoRA
from clp.policies.policy import Policy
from clp.training.config import CLPConfig
from clp_kernels.nn.inject_experts import expert_state, load_experts
from clp_kernels.nn.mixed_lora import steered_layers


def soup(
    folders: Sequence[str | Path],
    *,
    base_model: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Policy:
    """The policy whose parameters are those of m experts, mixed by the weights of each example.

        theta(w) = theta_ref + sum_i w_i delta_i

    where delta_i is the difference of expert i from the base: s B_i A_i in each layer with an
    adapter ("lora"; the exact sum), or that of whole parameters ("full", "attention", "head"). For
    w = e_i it is expert i. A batch may have distinct weights. It can be saved, loaded, exported and
    trained further like any other policy.

    Args:
        folders: A run folder or checkpoint of each expert, which has one objective; their order is
            that of the weights.
        base_model, dtype, device: As Policy.load.

    Raises:
        ValueError: as Policy.load; no expert; one of several objectives, of one that another has,
            or with a kl_range; experts of different base models, tokenizers, conditioning, adapters
            (rank, alpha, modules), or of which some have a reward scale. The message names the two.

    Source: Rewarded Soups (arXiv:2306.04488).
    """
    device, experts = torch_device(device), dict[str, Policy]()
    for folder in folders:
        expert = Policy.load(folder, base_model=base_model, dtype=dtype)
        if len(expert.objectives) != 1:
            shown = ", ".join(expert.objectives)
            raise ValueError(f"expert {folder} must have one objective, got {shown}")
        if expert.kl_range is not None:
            raise ValueError(
                f"expert {folder} must be trained with one KL strength, not a kl_range"
            )
        (name,) = expert.objectives
        if name in experts:
            raise ValueError(f"expert {folder} has the objective of another one: {name}")
        experts[name] = expert
    if not experts:
        raise ValueError("folders must name at least one expert")
    first, *others = experts
    for other in others:
        _check_alike(experts[first], experts[other])
    start, names = experts[first], list(experts)
    model, tokenizer = load_base(start.base_model, dtype)
    if isinstance(start.conditioning, Experts):
        load_experts(model, names, [expert_state(one.model, 0) for one in experts.values()])
    else:
        places = [Path(folder) / "adapters" for folder in folders]
        clp_kernels.load_adapters(model, [p / n for p, n in zip(places, names, strict=True)])
    scales = {n: s for one in experts.values() for n, s in (one.reward_scale or {}).items()}
    return Policy(
        model.to(device), tokenizer, names, start.base_model,
        [spec for one in experts.values() for spec in one.rewards], scales or None,
        start.conditioning, sorted(frozenset().union(*(one.end_ids for one in experts.values()))),
    )  # fmt: skip


def soup_of(args: CLPConfig, folders: Sequence[Path]) -> Policy:
    """The soup of experts trained with these settings."""
    dtype = getattr(torch, args.dtype)
    return soup(folders, base_model=args.model, dtype=dtype, device=args.device)


def _check_alike(one: Policy, other: Policy) -> None:
    a, b = one.objectives[0], other.objectives[0]

    def refuse(what: str, first: object, second: object) -> None:
        raise ValueError(f"experts must agree in {what}: {a} has {first}, {b} has {second}")

    kinds = [expert.conditioning.name for expert in (one, other)]
    if kinds[0] != kinds[1] or kinds[0] == "prompt":
        refuse("a conditioning that mixes parameters", *kinds)
    if _base_digest(one) != _base_digest(other):
        places = [expert.base_model for expert in (one, other)]
        same = " with other parameters" if places[0] == places[1] else ""
        refuse("base model", places[0], places[1] + same)
    vocabularies = [expert.tokenizer.get_vocab() for expert in (one, other)]
    if differ := vocabularies[0].items() ^ vocabularies[1].items():
        token = min(differ)[0]
        refuse(f"tokenizer (token {token!r})", *(v.get(token) for v in vocabularies))
    if isinstance(one.conditioning, LoRA):
        layers = [steered_layers(expert.model) for expert in (one, other)]
        for name in sorted(layers[0].keys() | layers[1].keys()):
            found = [layer.get(name) for layer in layers]
            shapes = ["no adapter" if x is None else f"rank {x.ranks[0]}, alpha {x.lora_alpha[0]:g}"
                      for x in found]  # fmt: skip
            if shapes[0] != shapes[1]:
                refuse(f"adapters ({name})", *shapes)
    else:
        names = [sorted(expert_state(expert.model, 0)) for expert in (one, other)]
        if odd := set(names[0]) ^ set(names[1]):
            refuse(f"modules ({min(odd)})", *(min(odd) in own for own in names))
    scaled = [expert.reward_scale is not None for expert in (one, other)]
    if scaled[0] != scaled[1]:
        refuse("whether rewards have a scale", *(expert.reward_scale for expert in (one, other)))


def _base_digest(expert: Policy) -> str:
    trained = set(expert.trainable_parameters().values())
    return digest(t for t in stored(expert.model) if t not in trained)
