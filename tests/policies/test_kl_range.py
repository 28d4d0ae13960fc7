"""Policies that are steered by a KL strength beside the weights, for every conditioning."""

import json
import math

import pytest
import torch
import transformers
from steered_policies import DONE, PROMPTS, policy_of
from tiny_runs import config, metrics

from clp import CLPConfig, CLPTrainer, Condition, LogitMixture, Policy, Sampler, SamplingParams
from clp.data.condition import draw_strengths
from clp.evaluation.frontier import evaluate
from clp.policies.loading import load_base
from clp.policies.token_stats import token_stats
from clp.rewards import brevity, sentiment
from clp.training.rollout import make_batch

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = ["lora", "full", "attention", "head", "prompt"]
RANGE = (0.05, 0.4)
CONDITIONS = [
    Condition([1.0, 0.0], 0.05),
    Condition([0.3, 0.7], 0.4),
    Condition([0.5, 0.5]),
    Condition([0.0, 1.0], 0.1),
    Condition([1.5, -0.5], 0.25),
]


@pytest.fixture(scope="module")
def policies():
    return {name: policy_of(name, kl_range=RANGE) for name in ALL}


def rows_of(policy):
    return torch.stack([policy.condition(one, simplex=False) for one in CONDITIONS])


def test_what_a_strength_changes():
    """The coefficients by their formulas, s = beta_0 / beta."""
    weights, middle = torch.tensor([0.3, 0.7]), math.sqrt(0.05 * 0.4)

    def beta(alpha):
        return alpha / (1 - alpha)

    for alpha in (0.05, 0.1, middle, 0.25, 0.4):
        row = torch.tensor([0.3, 0.7, alpha])
        s = beta(middle) / beta(alpha)
        found = {name: policy_of(name, kl_range=RANGE).layer_weights(row) for name in ALL}
        wanted = torch.tensor([0.3 * s, 0.7 * s, s * math.log(s)])
        torch.testing.assert_close(found["lora"], wanted, rtol=1e-5, atol=1e-6)
        for name in ("full", "attention", "head"):
            torch.testing.assert_close(found[name], weights * beta(0.05) / beta(alpha))
        assert found["prompt"].tolist() == [1.0]


@pytest.mark.parametrize("conditioning", ALL)
def test_a_new_policy_is_its_base_bit_for_bit_at_every_strength(conditioning):
    policy = Policy.create("tiny", ["joy", "brief"], conditioning=conditioning, kl_range=RANGE)
    base, _ = load_base("tiny", torch.float32)
    ids = torch.randint(3, 900, (5, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), policy.steer(rows_of(policy)):
        assert torch.equal(policy.model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("conditioning", ALL)
def test_a_mixed_batch_is_the_loop_over_its_examples(policies, conditioning):
    policy = policies[conditioning]
    head, rows = policy.head(), rows_of(policy)

    def run(chosen):
        batch = make_batch(
            policy, [PROMPTS[i] for i in chosen], [DONE[i] for i in chosen], rows[chosen]
        )
        stats = token_stats(policy, batch, head, 0.8)
        total = (stats.logprobs * 1.3 + stats.entropy * 0.2 - stats.kl * 0.7).sum()
        return stats, torch.autograd.grad(total, list(policy.trainable_parameters().values()))

    mixed, gradients = run(list(range(5)))
    sums = [torch.zeros_like(g) for g in gradients]
    for i in range(5):
        alone, found = run([i])
        width = len(DONE[i].token_ids)
        for name in ("logprobs", "entropy", "kl"):
            got = getattr(mixed, name)[i, :width]
            torch.testing.assert_close(got, getattr(alone, name)[0, :width], rtol=1e-4, atol=1e-5)
        sums = [total + g for total, g in zip(sums, found, strict=True)]
    for got, wanted in zip(gradients, sums, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("conditioning", ALL)
def test_a_mixed_batch_samples_what_each_request_does_alone(policies, conditioning):
    policy = policies[conditioning]
    params = SamplingParams(max_tokens=12, temperature=0)
    together = Sampler(policy).generate(PROMPTS, CONDITIONS, params, simplex=False)
    single = Sampler(policy)
    for prompt, condition, got in zip(PROMPTS, CONDITIONS, together, strict=True):
        (alone,) = single.generate([prompt], condition, params, simplex=False)
        assert got.token_ids == alone.token_ids
    # The strength matters: the same prompt and weights at the ends of the range.
    ends = [Condition([0.5, 0.5], kl) for kl in RANGE]
    low, high = single.generate([PROMPTS[1]] * 2, ends, params)
    assert low.token_ids != high.token_ids or low.logprobs != high.logprobs


@pytest.mark.parametrize("conditioning", ALL)
def test_files_and_export_keep_the_strength(policies, conditioning, tmp_path):
    policy = policies[conditioning]
    policy.save(tmp_path / "run")
    loaded = Policy.load(tmp_path / "run")
    assert loaded.kl_range == RANGE
    ids = torch.tensor([[1, 50, 60, 70]])
    condition = Condition("joy=0.3,brief=0.7", 0.1)
    row = policy.condition(condition)[None]
    with torch.no_grad():
        with policy.steer(row):
            wanted = policy.model(ids).logits
        with loaded.steer(row):
            assert torch.equal(loaded.model(ids).logits, wanted)
    policy.export(condition, tmp_path / "out")
    if conditioning in ("full", "attention", "head"):
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-3, atol=1e-4)
    elif conditioning == "prompt":
        record = json.loads((tmp_path / "out/prompt_prefix.json").read_text())
        assert record["text"] == "[joy 0.30 brief 0.70 kl 0.1] "
        assert record["token_ids"] == policy.conditioned_prompt([1], row[0])[1:]


def test_no_text_of_the_condition_is_longer_than_what_is_kept_free(policies):
    policy = policies["prompt"]
    longest = policy.conditioning.longest_prefix(policy.objectives, policy.tokenizer)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(300, 2, generator=generator)
    strengths = draw_strengths(policy.kl_range, 300, generator)
    drawn = torch.cat([weights, strengths[:, None]], 1)
    assert max(len(policy.conditioned_prompt([], row)) for row in drawn) <= longest < 60


@pytest.mark.parametrize("ends", [(1e-4, 4e-4), (1e-6, 1 - 1e-6), (0.011, 0.012)])
@pytest.mark.parametrize("conditioning", ["lora", "full", "prompt"])
def test_the_ends_of_narrow_and_wide_ranges_differ_and_are_finite(conditioning, ends):
    policy = Policy.create("tiny", ["a", "b"], conditioning=conditioning, kl_range=ends)
    rows = [policy.condition(Condition([0.5, 0.5], kl)) for kl in ends]
    weights = [policy.layer_weights(row) for row in rows]
    assert all(w.isfinite().all() for w in weights)
    prompts = [policy.conditioned_prompt([1], row) for row in rows]
    assert not torch.equal(*weights) or prompts[0] != prompts[1]
    assert max(map(len, prompts)) - 1 <= policy.conditioning.longest_prefix(
        policy.objectives, policy.tokenizer
    )


def test_training_with_a_range_draws_records_and_resumes_exactly(tmp_path):
    CLPTrainer(args=config(tmp_path / "a", kl_range=[0.05, 0.4])).train()
    rows = metrics(tmp_path / "a")
    assert all(0.05 <= row["alpha"] <= 0.4 for row in rows)
    assert len({row["alpha"] for row in rows}) == len(rows)
    trainer = CLPTrainer(args=config(tmp_path / "b", kl_range=[0.05, 0.4]))
    trainer.train_step()
    trainer.train_step()
    trainer.save()
    del trainer
    resumed = CLPTrainer(args=CLPConfig.of_run(tmp_path / "b"))
    assert resumed.policy.kl_range == (0.05, 0.4)
    resumed.train()
    for name in ("joy", "brief", "kl-residual"):
        path = f"adapters/{name}/adapter_model.safetensors"
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_evaluation_at_a_strength(policies, tmp_path):
    rows = [{"prompt": "Once upon a time"}, {"prompt": "One day"}]
    rewards = {"joy": sentiment, "brief": brevity}
    params = SamplingParams(max_tokens=8)
    found = {
        kl: evaluate(policies["full"], rewards, rows, params=params, kl=kl)[0]
        for kl in (0.05, 0.4, None)
    }
    assert found[0.05].alpha == pytest.approx(0.05)
    assert found[None].alpha == pytest.approx(0.02**0.5)
    # Random differences, interpolated towards the base.
    assert max(found[0.4].kl_per_token) < min(found[0.05].kl_per_token)


@pytest.mark.parametrize(
    ("kl", "message"),
    [
        (0.5, r"kl must be in \[0.05, 0.4\], which the policy was trained on, got 0.5"),
        (0.01, "got 0.01"),
        (float("nan"), "got nan"),
        (True, "got True"),
        ("0.1", "got '0.1'"),
    ],
)
def test_a_strength_that_was_not_trained_is_refused(policies, kl, message):
    sampler = Sampler(policies["lora"])
    with pytest.raises(ValueError, match=message):
        sampler.submit("a", Condition("joy=1", kl))
    with pytest.raises(ValueError, match=message):
        sampler.generate(["a"], [Condition("joy=1", kl)])


def test_a_strength_for_a_policy_of_one_strength_is_refused():
    policy = policy_of("lora")
    with pytest.raises(ValueError, match=r"kl must be left out, got 0\.1: the policy was trained"):
        Sampler(policy).submit("a", Condition("joy=1", 0.1))
    rows = [{"prompt": "a"}]
    rewards = {"joy": sentiment, "brief": brevity}
    with pytest.raises(ValueError, match="kl must be left out"):
        evaluate(policy, rewards, rows, params=SamplingParams(max_tokens=2), kl=0.1)
    with pytest.raises(ValueError, match="trained with one KL strength"):
        LogitMixture.of_adapters(policy_of("lora", kl_range=RANGE))


@pytest.mark.parametrize(
    "value",
    [[0.4, 0.05], [0.1, 0.1], [0.1, 1.0], [0.0, 0.5], [0.5, 0.9999999], [1e-39, 0.1], [0.1],
     [0.1, 0.2, 0.3], "01", ["a"]],
)  # fmt: skip
def test_a_range_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"kl_range must be two numbers, 1e-06 <= .* got"):
        CLPConfig(kl_range=value)
    with pytest.raises(ValueError, match=r"kl_range must be two numbers, 1e-06 <= .* got"):
        Policy.create("tiny", ["joy"], kl_range=value)


def test_alpha_beside_a_range_is_refused():
    with pytest.raises(ValueError, match="alpha must be left out with kl_range"):
        CLPConfig(kl_range=[0.05, 0.4], alpha=0.2)


def test_a_damaged_range_in_the_card_is_refused(policies, tmp_path):
    policies["lora"].save(tmp_path)
    card = json.loads((tmp_path / "clp.json").read_text())
    (tmp_path / "clp.json").write_text(json.dumps(card | {"kl_range": [0.4, 2]}))
    with pytest.raises(ValueError, match=r"clp.json: kl_range must be two numbers.*got \[0.4, 2\]"):
        Policy.load(tmp_path)
