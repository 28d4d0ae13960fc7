"""Rollouts: prompt groups with weight rows -> completions, tensors, rewards, log-probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

import clp_kernels
from clp.data.conversation import encode_prompt
from clp.data.prompts import columns
from clp.data.scoring import RewardLog, score
from clp.engine.requests import Completion, SamplingParams
from clp.engine.sampler import Sampler, with_seeds
from clp.policies.lora import Policy
from clp.rewards import RewardFunc


@dataclass
class Batch:
    """Prompts and completions as tensors: prompts padded left, completions right.

    Attributes:
        input_ids, attention_mask: [N, P + C].
        completion_mask: [N, C], True on sampled tokens (the end token included).
        weights: [N, m].
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    weights: Tensor

    def rows(self, chosen: slice) -> "Batch":
        """The sequences of a slice."""
        return Batch(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass
class TokenStats:
    """Per-token values [N, C] of a batch's completions, zero where there is no token."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor


@dataclass
class Rollout:
    """A step's completions: N = G * K sequences, in groups of K.

    Attributes:
        batch: The tensors. rewards: [G, K, m], NaN where an objective does not apply.
        sampler_logprobs: [N, C], as the sampler saw them.
        completions: The N completions. log: What the reward functions logged about them.
    """

    batch: Batch
    rewards: Tensor
    sampler_logprobs: Tensor
    completions: list[Completion]
    log: RewardLog


def make_batch(
    prompt_ids: Sequence[list[int]],
    completions: Sequence[Completion],
    weights: Tensor,
    pad: int,
    device: torch.device,
) -> Batch:
    """Stacks prompts and completions; weights [N, m]."""
    p = max(len(ids) for ids in prompt_ids)
    c = max(len(done.token_ids) for done in completions)
    ids = torch.full((len(completions), p + c), pad)
    mask = torch.zeros_like(ids)
    for i, (prompt, done) in enumerate(zip(prompt_ids, completions, strict=True)):
        whole = prompt + done.token_ids
        start = p - len(prompt)
        ids[i, start : start + len(whole)] = torch.tensor(whole)
        mask[i, start : start + len(whole)] = 1
    return Batch(ids.to(device), mask.to(device), mask[:, p:].bool().to(device), weights.to(device))


def token_stats(
    policy: Policy, batch: Batch, head: tuple[Tensor, Tensor | None, float], temperature: float
) -> TokenStats:
    """Log-probability, entropy and exact KL to the base at every sampled token, with gradients.

    All three under softmax(logits / temperature), as sampled. The base runs without gradients.
    """
    weight, bias, head_temperature = head
    width = batch.completion_mask.shape[1]
    mask = batch.completion_mask
    # The hidden state before a token predicts it.
    targets = batch.input_ids[:, -width:][mask]
    with policy.steer(batch.weights):
        hidden = policy.hidden_states(batch.input_ids, batch.attention_mask)
    with policy.base():
        ref_hidden = policy.hidden_states(batch.input_ids, batch.attention_mask)
    out = clp_kernels.linear_logprob(
        hidden[:, -width - 1 : -1][mask],
        weight,
        targets,
        bias=bias,
        temperature=temperature * head_temperature,
        return_entropy=True,
        ref_hidden=ref_hidden[:, -width - 1 : -1][mask],
    )
    return TokenStats(
        *(
            torch.zeros_like(mask, dtype=t.dtype).masked_scatter(mask, t)
            for t in out
            if t is not None
        )
    )


def roll_out(
    policy: Policy,
    sampler: Sampler,
    reward_funcs: Mapping[str, RewardFunc],
    rows: Sequence[dict[str, Any]],
    weights: Tensor,
    num_generations: int,
    params: SamplingParams,
    generator: torch.Generator,
    trainer_state: TrainerState,
    reserved: frozenset[str] = frozenset(),
) -> Rollout:
    """Samples and scores num_generations completions for each of the G prompts, row weights [G, m].

    Every completion draws with a seed of its own from `generator`. Reward functions get
    `trainer_state`, and may not log metrics with `reserved` names.
    """
    repeated = [row for row in rows for _ in range(num_generations)]
    row_weights = weights.repeat_interleave(num_generations, 0)
    ids = [encode_prompt(row["prompt"], policy.tokenizer) for row in rows]
    prompt_ids = [p for p in ids for _ in range(num_generations)]
    seeds = torch.randint(2**62, (len(repeated),), generator=generator).tolist()
    completions = sampler.generate(prompt_ids, row_weights, with_seeds(params, seeds))
    log = RewardLog(reserved)
    rewards = score(
        reward_funcs, [row["prompt"] for row in repeated], [done.text for done in completions],
        columns(repeated), completion_ids=[done.token_ids for done in completions],
        trainer_state=trainer_state, log=log,
    )  # fmt: skip
    batch = make_batch(
        prompt_ids, completions, row_weights, policy.tokenizer.pad_token_id or 0, policy.device
    )
    sampled = [torch.tensor(done.logprobs) for done in completions]
    logprobs = torch.nn.utils.rnn.pad_sequence(sampled, batch_first=True).to(policy.device)
    shape = (len(rows), num_generations, len(reward_funcs))
    return Rollout(batch, rewards.view(shape).to(policy.device), logprobs, completions, log)
