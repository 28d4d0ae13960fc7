"""Policies and training runs of the embedded model, as several tests need them."""

import json

import torch

from clp.policies.lora import Policy
from clp_kernels.nn.mixed_lora import steered_layers


def randomised(std, seed, objectives=("joy", "brief"), model="tiny", **options):
    """A policy whose adapters have random lora_B, so that the weights matter."""
    policy = Policy.create(model, objectives, **options)
    generator = torch.Generator().manual_seed(seed)
    for layer in steered_layers(policy.model).values():
        layer.lora_B.data.normal_(0, std, generator=generator)
    return policy


def metrics(folder):
    """The lines of metrics.jsonl, without the time that a step took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "step_time"} for line in lines]
