"""Policies and training runs of the embedded model, as several tests need them."""

import json

import pytest
import torch

from clp.policies.policy import Policy
from clp.training.config import CLPConfig
from clp.training.trainer import CLPTrainer
from clp_kernels.nn.mixed_lora import steered_layers

# Options of a training of a second.
SMALL = [
    "--num-prompts", "2", "--num-generations", "2", "--max-completion-length", "6",
    "--max-steps", "1", "--r", "2",
]  # fmt: skip


def randomised(std, seed, objectives=("joy", "brief"), model="tiny", **options):
    """A policy whose adapters have random lora_B, so that the weights matter."""
    policy = Policy.create(model, objectives, **options)
    randomise(policy.model, std, seed)
    return policy


def randomise(model, std, seed):
    """Random lora_B, drawn in float32: those of a wider dtype are the same."""
    generator = torch.Generator().manual_seed(seed)
    for layer in steered_layers(model).values():
        values = torch.empty(layer.lora_B.shape).normal_(0, std, generator=generator)
        layer.lora_B.data.copy_(values)


def config(folder, **changes):
    """A training of four short steps, or as the changes say."""
    small = {"num_prompts": 2, "num_generations": 2, "max_completion_length": 4, "r": 2}
    steps = {"max_steps": 4, "save_steps": 2, "warmup_steps": 1}
    # "reference", the default, samples 512 completions first: 0.5 s.
    unscaled = {"scale_rewards": "none"}
    return CLPConfig(output_dir=str(folder), **(small | steps | unscaled | changes))


ROWS = [{"prompt": f"Tom had {i} red kites.", "mood": i} for i in range(5)]


def resumed(folder, functions=None, rows=None, **changes):
    """A trainer that continues a run."""
    args = CLPConfig.of_run(folder, **changes)
    return CLPTrainer(reward_funcs=functions, args=args, train_dataset=rows)


def records(path):
    """The lines of a file, each strict JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def metrics(folder):
    """The lines of metrics.jsonl, without the time that a step took."""
    lines = records(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "step_time"} for line in lines]
