"""scale_rewards="reference": measured under the base model, kept with the run, and divided by."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from tiny_runs import config, metrics, randomised

from clp.engine.sampler import Sampler, SamplingParams
from clp.policies.card import read_card
from clp.policies.policy import Policy
from clp.rewards import brevity, sentiment
from clp.training import reward_scale, trainer
from clp.training.reward_scale import COMPLETIONS, measure_reward_scale
from clp.training.rollout import untrained_state
from clp.training.trainer import CLPTrainer

ROWS = [{"prompt": "Tom had a red kite."}, {"prompt": "Mia"}, {"prompt": "One day"}]
PARAMS = SamplingParams(max_tokens=4)


def run(folder, functions, **changes):
    return CLPTrainer("tiny", functions, config(folder, scale_rewards="reference", **changes), ROWS)


def characters(completions, **kwargs):
    return [float(len(text)) for text in completions]


def measured(policy, functions, seed=0):
    state = untrained_state()
    sampler = Sampler(policy)
    return measure_reward_scale(sampler, functions, ROWS, PARAMS, 3, seed, state, frozenset())


def test_it_is_the_standard_deviation_under_the_base_model():
    """Of completions of the base model, whatever the adapters write, prompts equally often."""
    seen = []

    def watch(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return [len(text) if len(text) % 3 else None for text in completions]

    functions = {"joy": characters, "brief": watch}
    found = [measured(randomised(std, 1, r=2), functions) for std in (0.0, 0.5)]
    assert found[0] == found[1] and seen[0] == seen[1]
    assert measured(randomised(0.0, 1, r=2), functions, seed=1) != found[0]
    prompts, completions = seen[0]
    # Groups of three, as in training: a reward may compare the completions of a group.
    assert len(completions) == 513 and COMPLETIONS == 512
    assert all(len(set(prompts[i : i + 3])) == 1 for i in range(0, 513, 3))
    counts = [prompts.count(row["prompt"]) for row in ROWS]
    assert max(counts) - min(counts) <= 3
    lengths = torch.tensor([len(text) for text in completions], dtype=torch.float64)
    known = lengths[lengths % 3 != 0]
    assert 50 < len(known) < COMPLETIONS
    wanted = {"joy": float(lengths.std(correction=0)), "brief": float(known.std(correction=0))}
    assert found[0] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda n: [0.3] * n, r"of odd is 0\.3 for all 512 completions of the base model"),
        (lambda n: [None] * n, "of odd applies to at most one of all 512 completions"),
        (lambda n: [1.0] + [None] * (n - 1), "of odd applies to at most one"),
    ],
)
def test_without_a_standard_deviation_nothing_begins(tmp_path, values, message):
    def odd(completions, **kwargs):
        return values(len(completions))

    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path / "r", [brevity, odd])
    assert "scale_rewards='none' takes rewards as they are" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with a checkpoint after its second step of four."""
    folder = tmp_path_factory.mktemp("scale") / "r"
    one = run(folder, {"joy": sentiment, "brief": brevity})
    one.train_step(), one.train_step()
    one.save()
    return folder


@pytest.fixture
def copied(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "r")
    return tmp_path / "r"


def resumed(folder):
    return run(folder, {"joy": sentiment, "brief": brevity}, resume=True)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_it_is_kept_in_the_run_its_checkpoints_and_the_policy(copied, monkeypatch):
    scale = json.loads((copied / "run.json").read_text())["reward_scale"]
    assert list(scale) == ["joy", "brief"] and all(0 < std < 1 for std in scale.values())
    # A resumed run does not measure again, with a checkpoint or without.
    monkeypatch.setattr(trainer, "measure_reward_scale", pytest.fail)
    one = resumed(copied)
    assert one.step == 2 and one.reward_scale.tolist() == pytest.approx(list(scale.values()))
    assert one.train().reward_scale == scale
    for folder in (copied, copied / "checkpoint-000004"):
        assert read_card(folder)["reward_scale"] == Policy.load(folder).reward_scale == scale


def test_a_run_without_a_checkpoint_begins_again_with_its_scale(copied, monkeypatch):
    monkeypatch.setattr(trainer, "measure_reward_scale", pytest.fail)
    change(copied / "run.json", reward_scale={"joy": 0.5, "brief": 0.25})
    shutil.rmtree(copied / "checkpoint-000002")
    one = resumed(copied)
    assert one.step == 0 and one.reward_scale.tolist() == [0.5, 0.25]


def test_resuming_without_it_or_with_another_is_refused(copied):
    def refused(message):
        before = sorted(copied.rglob("*"))
        with pytest.raises(ValueError, match=message):
            resumed(copied)
        assert sorted(copied.rglob("*")) == before

    file = copied / "run.json"
    whole = file.read_text()
    change(file, reward_scale=None)
    refused(r"run\.json is missing or has no reward_scale: without the standard deviations")
    for value in ([1, 2], {"joy": 1.0}, {"brief": 1.0, "joy": 1.0}, {"joy": 1.0, "brief": 0},
                  {"joy": -1.0, "brief": 1.0}, {"joy": True, "brief": 1.0}):  # fmt: skip
        change(file, reward_scale=value)
        refused(r"run\.json: reward_scale must map joy, brief to positive numbers, got ")
    change(file, reward_scale={"joy": 0.5, "brief": 0.25})
    refused(r"run\.json has the reward_scale \{'joy': 0\.5.*000002/clp\.json has \{'joy': ")
    file.unlink()
    with pytest.warns(UserWarning, match=r"no run\.json"):
        refused(r"run\.json is missing or has no reward_scale")
    file.write_text(whole)
    card = copied / "checkpoint-000002/clp.json"
    change(card, reward_scale={"joy": "0.5", "brief": 0.25})
    refused(r"clp\.json: reward_scale must map joy, brief to positive numbers")


def test_units_do_not_matter(tmp_path):
    """1024 times a reward is the same objective, bit for bit: only its exponents differ."""

    def larger(completions, **kwargs):
        return [1024 * value for value in characters(completions)]

    rows = []
    for name, function in (("as it is", characters), ("larger", larger)):
        one = run(tmp_path / name, {"joy": function, "brief": brevity}, max_steps=2)
        one.train()
        rows.append(metrics(tmp_path / name))
    for small, large in zip(*rows, strict=True):
        assert large["loss"] == small["loss"] and large["grad_norm"] == small["grad_norm"]
        assert large["rewards/joy/mean"] == 1024 * small["rewards/joy/mean"]
    assert any(row["grad_norm"] > 0 for row in rows[0])


def test_it_is_measured_with_the_lengths_and_temperature_of_training(tmp_path, monkeypatch):
    spy = Mock(wraps=reward_scale.with_seeds)
    monkeypatch.setattr(reward_scale, "with_seeds", spy)
    run(tmp_path / "r", [brevity], temperature=0.7, max_completion_length=5)
    seen = [call.args[0] for call in spy.call_args_list]
    assert [(p.max_tokens, p.temperature) for p in seen] == [(5, 0.7)]
