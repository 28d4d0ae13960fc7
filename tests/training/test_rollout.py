"""Rollouts: tensors, and log-probabilities that equal the sampler's."""

import pytest
import torch
from tiny_runs import randomised
from tokenizers.processors import TemplateProcessing
from transformers import TrainerState

from clp.engine.requests import Completion, SamplingParams
from clp.engine.sampler import Sampler
from clp.policies.token_stats import token_stats
from clp.rewards import load_rewards
from clp.training.rollout import make_batch, roll_out

ROWS = [{"prompt": "Tom had a red kite."}, {"prompt": "Mia"}, {"prompt": "Sam was at the lake."}]


@pytest.fixture(scope="module")
def policy():
    return randomised(0.05, 2, r=4)


def roll(policy, temperature=1.0, seed=0, rows=ROWS):
    return roll_out(
        Sampler(policy), load_rewards(["joy=sentiment", "brief=brevity"]), rows,
        torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), 4,
        SamplingParams(max_tokens=12, temperature=temperature),
        torch.Generator().manual_seed(seed), TrainerState(),
    )  # fmt: skip


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_begin_with_one_bos_and_do_not_end_with_eos(chat, monkeypatch):
    """Though the tokenizer puts both around every text, and the template writes the first."""
    made = randomised(0.05, 2, r=2)
    made.tokenizer._tokenizer.post_processor = TemplateProcessing(
        "<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert made.tokenizer("Mia")["input_ids"][-1] == made.tokenizer.eos_token_id == 2
    made.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    texts = [row["prompt"] for row in ROWS]
    own = [made.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompts = [[{"role": "user", "content": t}] if chat else "<bos>" + t for t in texts]
    rollout = roll(made, rows=[{"prompt": prompt} for prompt in prompts])
    ids, mask = rollout.batch.input_ids, rollout.batch.attention_mask.bool()
    before = ids.shape[1] - rollout.batch.completion_mask.shape[1]
    found = [row[:before][kept[:before]].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert found == [[1, *one] for one in own for _ in range(4)]


def test_make_batch_pads_prompts_left_and_completions_right(policy):
    done = [Completion(0, 0, "", [7, 8], [], "stop"), Completion(1, 0, "", [9], [], "stop")]
    batch = make_batch(policy, [[4], [5, 6]], done, torch.eye(2))
    assert batch.input_ids.tolist() == [[0, 4, 7, 8], [5, 6, 9, 0]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.completion_mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_trainers_logprobs_are_the_samplers(policy, temperature):
    rollout = roll(policy, temperature)
    stats = token_stats(policy, rollout.batch, policy.head(), temperature)
    difference = (stats.logprobs - rollout.sampler_logprobs).abs() * rollout.batch.completion_mask
    assert difference.max().item() < 1e-4


def test_kl_and_entropy_equal_the_full_distributions(policy):
    rollout = roll(policy)
    batch = rollout.batch
    stats = token_stats(policy, batch, policy.head(), 1.0)
    for i in range(len(rollout.completions)):
        ids = batch.input_ids[i][batch.attention_mask[i].bool()][None]
        count = int(batch.completion_mask[i].sum())
        found = []
        for weights in (batch.conditions[i : i + 1], torch.zeros(1, 2)):
            with torch.no_grad(), policy.steer(weights):
                found.append(policy.model(ids).logits[0, -count - 1 : -1].log_softmax(-1))
        logp, logq = found
        kl = (logp.exp() * (logp - logq)).sum(-1)
        torch.testing.assert_close(stats.kl[i, :count], kl, atol=1e-5, rtol=1e-4)
        entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(stats.entropy[i, :count], entropy, atol=1e-4, rtol=1e-4)
        assert stats.kl[i, count:].abs().sum().item() == 0


def test_rewards_are_grouped_and_scored_on_the_text(policy):
    rollout = roll(policy)
    rewards = load_rewards(["joy=sentiment", "brief=brevity"])
    texts = [c.text for c in rollout.completions]
    for i, function in enumerate(rewards.values()):
        wanted = torch.tensor(function(prompts=[""] * 12, completions=texts)).view(3, 4)
        torch.testing.assert_close(rollout.rewards[..., i], wanted)


def test_completions_of_a_group_differ_and_the_generator_decides(policy):
    a, b = roll(policy), roll(policy)
    assert [c.token_ids for c in a.completions] == [c.token_ids for c in b.completions]
    assert len({tuple(c.token_ids) for c in a.completions[:4]}) > 1
    c = roll(policy, seed=1)
    assert [x.token_ids for x in a.completions] != [x.token_ids for x in c.completions]


def test_the_gradient_reaches_the_adapters_alone(policy):
    stats = token_stats(policy, roll(policy).batch, policy.head(), 1.0)
    stats.logprobs.sum().backward()
    grads = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    assert grads == set(policy.trainable_parameters())
    policy.model.zero_grad()
