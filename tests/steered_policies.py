"""Policies of the embedded model whose trained parameters are random, and a batch for them."""

import torch

from clp import Policy
from clp.engine.requests import Completion

WEIGHTS = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.5, 0.5], [0.0, 1.0], [1.5, -0.5]])
PROMPTS = [[1, 50], [1, 60, 70, 80], [1, 9], [1, 33, 44], [1, 90]]
DONE = [
    Completion(i, 0, "", ids, [], "stop")
    for i, ids in enumerate(([7, 8, 9], [10, 2], [11, 12, 13, 14], [15], [3, 4, 5, 6, 2]))
]


def policy_of(conditioning, base="tiny", std=0.05, **options):
    """A policy whose trained parameters are random, so that the weights matter."""
    if conditioning in ("lora", "prompt"):
        options = {"r": 2} | options
    policy = Policy.create(base, ["joy", "brief"], conditioning=conditioning, **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.trainable_parameters().values():
        parameter.data.add_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
    return policy
