"""The options of the policy gradient in training: the value head, and several updates per step."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import config, metrics
from torch.nn import functional as F

from clp.policies.policy import Policy
from clp.training import updates
from clp.training.checkpoint import load_value_head
from clp.training.config import CLPConfig
from clp.training.gradients import accumulate_clipped_gradients, accumulate_gradients
from clp.training.trainer import CLPTrainer
from clp.training.value_head import Experience, ValueHead

OPTIONS = {
    "value": {"baseline": "value"},
    "several": {"num_iterations": 3, "epsilon": 0.05},
    "both": {"baseline": "value", "num_iterations": 2},
}
LEARNING = {"alpha": 0.3, "learning_rate": 0.02, "max_completion_length": 8}


def parameters_of(trainer):
    return [p.detach().clone() for p in trainer.parameters.values()]


def test_the_options_differ_in_training_and_each_resumes_exactly(tmp_path):
    found = {}
    for name, options in {"neither": {}, **OPTIONS}.items():
        CLPTrainer(args=config(tmp_path / name, **LEARNING, **options)).train()
        found[name] = metrics(tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoint-000004")
        CLPTrainer(args=CLPConfig.of_run(tmp_path / name)).train()
        assert metrics(tmp_path / name) == found[name]
    assert len({rows[3]["loss"] for rows in found.values()}) == 4
    # The first loss is that of the first pass: with leave-one-out the same.
    assert found["several"][0]["loss"] == found["neither"][0]["loss"] != found["value"][0]["loss"]
    for name, rows in found.items():
        assert all(
            ("value/explained_variance" in row) == (name in ("value", "both")) for row in rows
        )
        assert all(
            ("clip_ratio/region_mean" in row) == (name in ("several", "both")) for row in rows
        )
    clipped = [row["clip_ratio/region_mean"] for row in found["several"]]
    assert sum(clipped) > 0 and max(clipped) < 2 / 3
    for row in found["several"]:
        both = row["clip_ratio/low_mean"] + row["clip_ratio/high_mean"]
        assert row["clip_ratio/region_mean"] == pytest.approx(both)


def test_a_smaller_epsilon_clips_more(tmp_path):
    shares = []
    for epsilon in (0.5, 0.01):
        args = config(tmp_path / str(epsilon), **LEARNING, num_iterations=2, epsilon=epsilon)
        shares.append(CLPTrainer(args=args).train_step()["clip_ratio/region_mean"])
    assert shares[0] < shares[1] < 1 / 2


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "kl_gradient": "tokens"}])
def test_micro_batches_give_the_same_training(tmp_path, changes):
    rows = []
    for size in (1, 128):
        args = config(
            tmp_path / str(size), baseline="value", num_prompts=4, num_generations=1,
            micro_batch_size=size, **changes,
        )  # fmt: skip
        CLPTrainer(args=args).train()
        rows.append(metrics(tmp_path / str(size)))
    for a, b in zip(*rows, strict=True):
        assert a["num_tokens"] == b["num_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["value/explained_variance"] == pytest.approx(
            b["value/explained_variance"], abs=1e-3
        )


def test_a_value_head_needs_one_completion_per_prompt(tmp_path):
    changes = {"baseline": "value", "num_generations": 1, "max_steps": 2}
    trainer = CLPTrainer(args=config(tmp_path / "r", num_prompts=1, **changes))
    before = parameters_of(trainer)
    row = trainer.train_step()
    assert row["reward_std"] is None and row["frac_reward_zero_std"] == 1
    assert not all(map(torch.equal, before, parameters_of(trainer)))


def test_a_checkpoint_has_the_value_head_and_the_policy_has_not(tmp_path):
    trainer = CLPTrainer(args=config(tmp_path / "r", baseline="value"))
    trainer.train()
    assert not [p for p in (tmp_path / "r").iterdir() if "value" in p.name]
    checkpoint = tmp_path / "r/checkpoint-000004"
    Policy.load(checkpoint)
    path = checkpoint / "value.safetensors"
    other = ValueHead(trainer.head.weight.shape[1], 2, 2, seed=7)
    load_value_head(checkpoint, other)
    for name, parameter in trainer.value.named_parameters():
        own, loaded = trainer.value.optimizer.state[parameter], dict(other.named_parameters())[name]
        assert torch.equal(parameter, loaded)
        for key, moment in other.optimizer.state[loaded].items():
            assert torch.equal(moment, own[key])
    tensors = load_file(path)
    save_file(tensors | {"bias_2": torch.zeros(9)}, path)
    with pytest.raises(ValueError, match=r"bias_2 must be float32 of shape \[3\]"):
        CLPTrainer(args=CLPConfig.of_run(tmp_path / "r", max_steps=6))
    path.unlink()
    with pytest.raises(ValueError, match=r"value\.safetensors cannot be read"):
        CLPTrainer(args=CLPConfig.of_run(tmp_path / "r", max_steps=6))


def test_the_value_head_does_not_change_how_the_policy_is_clipped(tmp_path):
    """In the first step the values are 0, so that the advantages are the returns."""
    steps = {}
    for learns in (False, True):
        trainer = CLPTrainer(
            args=config(tmp_path / str(learns), baseline="value", max_grad_norm=1e-3)
        )
        if not learns:
            trainer.value.fit = lambda *args: (0.0, True)
        row = trainer.train_step()
        steps[learns] = [row["loss"], row["grad_norm"], *parameters_of(trainer)]
    assert steps[False][:2] == steps[True][:2]
    assert all(map(torch.equal, steps[False][2:], steps[True][2:]))


def test_values_are_0_at_the_start_and_learn_what_the_returns_are():
    """The reward of an example is the product of a hidden state and a condition; the other one
    applies to half of the tokens, and those to which it does not apply do not count."""
    torch.manual_seed(0)
    head = ValueHead(4, 2, 2, seed=1)
    hidden, conditions = F.layer_norm(torch.randn(500, 4), (4,)), torch.rand(500, 2)
    first = 3 + hidden[:, 0] * conditions[:, 0]
    second = torch.where(torch.arange(500) % 2 == 0, -2.0, float("nan"))
    targets = torch.stack([first, second, torch.full((500,), 0.5)], 1)
    assert not head(hidden, conditions).any()
    shares = []
    for _ in range(60):
        left = first - head(hidden, conditions)[:, 0].detach()
        shares.append(head.fit([Experience(hidden, conditions, targets, first, left)], 1.0)[0])
    assert shares[0] == 0 and shares[-1] > 0.8
    values = head(hidden, conditions).detach()
    torch.testing.assert_close(values.mean(0), torch.tensor([3.0, -2.0, 0.5]), atol=0.1, rtol=0)


def test_a_gradient_that_is_not_finite_leaves_the_value_head_as_it_was(tmp_path, monkeypatch):
    trainer = CLPTrainer(args=config(tmp_path / "r", baseline="value"))
    trainer.train_step()
    monkeypatch.setattr(
        updates, "accumulate_gradients",
        lambda *args: accumulate_gradients(*args)._replace(loss=float("nan")),
    )  # fmt: skip
    before = [
        p.detach().clone() for p in (*trainer.value.parameters(), *trainer.parameters.values())
    ]
    row = trainer.train_step()
    assert row["skipped_steps"] == 1 and row["value/explained_variance"] is None
    after = (*trainer.value.parameters(), *trainer.parameters.values())
    assert all(map(torch.equal, before, after))


def test_a_value_head_whose_gradient_is_not_finite_counts_as_a_skipped_step(tmp_path):
    trainer = CLPTrainer(args=config(tmp_path / "r", baseline="value"))
    trainer.train_step()
    before = [p.detach().clone() for p in trainer.value.parameters()]
    hook = trainer.value.bias_2.register_hook(lambda gradient: gradient * float("nan"))
    assert trainer.train_step()["skipped_steps"] == 1
    assert all(map(torch.equal, before, trainer.value.parameters()))
    assert trainer.progress.skipped_in_a_row == 1
    hook.remove()
    assert trainer.train_step()["skipped_steps"] == 1 and trainer.progress.skipped_in_a_row == 0


def test_a_later_pass_that_is_not_finite_ends_the_step_and_counts_once(tmp_path, monkeypatch):
    """The updates before it stay: the state is that of a step with as many iterations."""
    calls = []

    def broken(*args):
        calls.append(1)
        loss, low, high = accumulate_clipped_gradients(*args)
        return (float("inf") if len(calls) == 2 else loss), low, high

    whole = CLPTrainer(args=config(tmp_path / "a", num_iterations=2))
    whole.train_step()
    monkeypatch.setattr(updates, "accumulate_clipped_gradients", broken)
    cut = CLPTrainer(args=config(tmp_path / "b", num_iterations=4))
    assert cut.train_step()["skipped_steps"] == 1 and len(calls) == 2
    assert all(map(torch.equal, parameters_of(whole), parameters_of(cut)))
    assert cut.train_step()["skipped_steps"] == 1 and cut.progress.skipped_in_a_row == 0


def test_a_range_of_strengths_reaches_baseline_and_clipped_loss(tmp_path):
    """Each completion's KL is weighed by its own strength, in the first and in later passes."""
    options = {"kl_range": [0.05, 0.4], "baseline": "value", "num_iterations": 2}
    trainer = CLPTrainer(args=config(tmp_path / "r", **options))
    assert trainer.value is not None and trainer.value.weight_1.shape[1] == (
        trainer.head.weight.shape[1] + 3
    )
    trainer.train_step()
    trainer.save()
    del trainer
    assert CLPTrainer(args=CLPConfig.of_run(tmp_path / "r")).step == 1
