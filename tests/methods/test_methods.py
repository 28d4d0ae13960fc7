"""The methods end to end, in runs of a few short steps."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_runs import config, metrics, records

from clp.data.weights import weight_grid
from clp.methods.experts import train_experts
from clp.methods.method import NOTHING, Budget, steps_of
from clp.methods.one_per_weight import one_per_weight
from clp.methods.registry import METHODS, find_method
from clp.methods.runs import train_run
from clp.policies.logit_mixture import LogitMixture
from clp.policies.policy import Policy
from clp.training.trainer import CLPTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[1, 5, 9, 33]])
CORNERS = torch.eye(2)
# Beside `folder`, in which a method has its own sub-folder.
EXPERTS = "experts-lora-2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a task and seed, whose experts of two steps are trained once."""
    return tmp_path_factory.mktemp("task")


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return config(
        tmp_path_factory.mktemp("unused"), max_steps=4, save_steps=1, warmup_steps=0,
        max_completion_length=6, rewards=["joy=sentiment", "easy=readability"],
    )  # fmt: skip


@pytest.fixture
def few(monkeypatch):
    """How many completions measure the scale: fewer than else, so that it takes less time."""
    monkeypatch.setattr("clp.training.reward_scale.COMPLETIONS", 64)
    return 64


@torch.no_grad()
def logits(policy, row):
    with policy.steer(torch.as_tensor(row)[None]):
        return policy.model(IDS).logits


def test_clp_is_a_run_with_the_settings(folder, args):
    outcome = METHODS["clp"](args, folder / "clp-half", budget=0.5)
    (part,) = outcome.parts
    assert part.weights.equal(weight_grid(2))
    own = CLPTrainer(args=replace(args, max_steps=2, output_dir=str(folder / "by-hand"))).train()
    assert logits(part.policy, [0.3, 0.7]).equal(logits(own, [0.3, 0.7]))
    lines = records(folder / "by-hand" / "metrics.jsonl")
    tokens = sum(round(4 * line["completions/mean_length"]) for line in lines)
    assert outcome.budget == Budget(8, tokens, 16, 2, outcome.budget.seconds)
    assert outcome.budget.seconds > 0


def test_prompt_conditioning_is_an_option_of_clp(folder, args):
    outcome = METHODS["clp"](args, folder / "prompted", budget=0.25, conditioning="prompt")
    assert outcome.parts[0].policy.conditioning.name == "prompt"


def test_an_expert_is_a_run_of_its_objective_alone(folder, args):
    folders, used = train_experts(args, folder, 2)
    assert [f.relative_to(folder).as_posix() for f in folders] == [
        f"{EXPERTS}/joy", f"{EXPERTS}/easy",
    ]  # fmt: skip
    assert (used.completions, used.reward_calls, used.gradient_steps) == (16, 16, 4)
    alone = {"rewards": ["joy=sentiment"], "max_steps": 2}
    CLPTrainer(args=replace(args, output_dir=str(folder / "joy-by-hand"), **alone)).train()
    assert metrics(folder / "joy-by-hand") == metrics(folders[0])
    policies = [Policy.load(f) for f in folders]
    assert all(p.objectives == (n,) for p, n in zip(policies, ("joy", "easy"), strict=True))
    joy, easy = (policy.trainable_parameters() for policy in policies)
    name = min(joy).replace("lora_B", "lora_A")
    # One seed: they start with equal A, and have learned from their own rewards since.
    torch.testing.assert_close(joy[name], easy[name], rtol=0, atol=5e-3)
    base, *found = [logits(policies[0], [0.0]), *(logits(p, [1.0]) for p in policies)]
    for a, b in ((found[0], found[1]), (found[0], base), (found[1], base)):
        assert float((a - b).abs().max()) > 1e-3


def test_the_experts_have_the_scale_of_a_joint_run(tmp_path, args, few):
    scaled = replace(args, scale_rewards="reference", max_steps=1)
    joint, spent = train_run(scaled, tmp_path / "joint", 1)
    folders, used = train_experts(scaled, tmp_path, 1)
    found = [Policy.load(f).reward_scale for f in folders]
    assert found[0] | found[1] == pytest.approx(joint.reward_scale, rel=1e-6)
    assert list(joint.reward_scale) == ["joy", "easy"]
    # In each run those of the base model, and four of the step.
    assert (spent.completions, used.completions) == (few + 4, 2 * (few + 4))
    assert (spent.reward_calls, used.reward_calls) == (2 * (few + 4), 2 * (few + 4))
    assert few < spent.sampled_tokens <= 6 * (few + 4)
    assert spent.seconds > records(tmp_path / "joint" / "metrics.jsonl")[0]["step_time"]


@pytest.mark.parametrize("name", ["rewarded_soups", "averaged_adapters", "mod"])
def test_methods_of_experts_share_them(folder, args, name):
    folders, used = train_experts(args, folder, 2)
    before = [(f / "checkpoint-000002" / "state.json").stat().st_mtime_ns for f in folders]
    outcome = METHODS[name](args, folder / name)
    after = [(f / "checkpoint-000002" / "state.json").stat().st_mtime_ns for f in folders]
    assert before == after
    # In full for each method, and with half of the steps each at budget 1.
    assert outcome.budget == used
    (part,) = outcome.parts
    assert part.weights.equal(weight_grid(2))
    assert part.policy.objectives == ("joy", "easy")
    policy = part.policy.reference
    for row, expert in zip(CORNERS, folders, strict=True):
        wanted = logits(Policy.load(expert), [1.0])
        torch.testing.assert_close(logits(policy, row), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "divergence, mode, exponent",
    [("reverse_kl", "geometric", None), ("forward_kl", "power", -1.0), (0.5, "power", -0.5)],
)
def test_mod_takes_the_divergences_of_its_paper(folder, args, divergence, mode, exponent):
    policy = METHODS["mod"](args, folder / "mod", divergence=divergence).parts[0].policy
    assert isinstance(policy, LogitMixture)
    assert (policy.mode, policy.exponent, len(policy.networks)) == (mode, exponent, 2)


def test_a_warm_start_begins_at_the_soup(folder, args):
    outcome = METHODS["warm_start"](args, folder / "warm", budget=2)
    soup = METHODS["rewarded_soups"](args, folder / "rewarded_soups")
    begin = Policy.load(folder / "warm" / "clp" / "checkpoint-000003", base_model="tiny")
    # Budget 2 of four steps: 2 steps for each of two experts, 4 of CLP.
    assert outcome.budget.gradient_steps == 8
    assert outcome.budget.completions == 32
    assert outcome.budget.seconds > soup.budget.seconds
    (first,) = [m for m in metrics(folder / "warm" / "clp") if m["step"] == 1]
    assert first["kl"] > 0  # as the soup's, and not the base model's
    assert not logits(begin, [0.5, 0.5]).equal(logits(soup.parts[0].policy, [0.5, 0.5]))
    again = METHODS["warm_start"](args, folder / "warm", budget=2)
    assert again.budget == outcome.budget


def test_one_per_weight_takes_its_corners_from_the_experts(folder, args):
    weights = ["joy=1", [0.5, 0.5], {"easy": 1.0}]
    outcome = one_per_weight(args, folder / "one", budget=1.5, weights=weights)
    corners, middle = outcome.parts
    assert corners.weights.equal(CORNERS)
    assert middle.weights.equal(torch.tensor([[0.5, 0.5]]))
    wanted = [logits(Policy.load(folder / EXPERTS / name), [1.0]) for name in ("joy", "easy")]
    for row, one in zip(CORNERS, wanted, strict=True):
        torch.testing.assert_close(logits(corners.policy, row), one, rtol=1e-5, atol=1e-5)
    drawn = {m["reward_weights/joy"] for m in metrics(folder / "one" / "0.5-0.5")}
    assert drawn == {0.5}
    assert outcome.budget.gradient_steps == 6
    inner = one_per_weight(args, folder / "two", budget=0.25, weights=[[0.3, 0.7]])
    assert len(inner.parts) == 1
    assert inner.budget.gradient_steps == 1


def test_weights_within_the_tolerance_of_the_simplex_are_on_it(folder, args):
    """A corner that is 1.0005 is the expert's, and weights that differ have runs of their own."""
    near = [[1.0005, 0], [0.3333333, 0.6666667], [0.3333334, 0.6666666]]
    outcome = one_per_weight(args, folder / "near", budget=1, weights=near)
    assert [len(part.weights) for part in outcome.parts] == [1, 1, 1]
    assert outcome.parts[0].weights.tolist() == [[1, 0]]
    assert len([p for p in (folder / "near").iterdir() if p.is_dir()]) == 2


@pytest.mark.parametrize("name", METHODS)
def test_checking_alone_trains_nothing(tmp_path, args, name):
    options = {"weights": [[1, 0], [0.5, 0.5]]} if name == "one_per_weight" else {}
    assert METHODS[name](args, tmp_path / "a", budget=1, check_only=True, **options) is NOTHING
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("few")
def test_a_method_goes_on_after_a_kill_and_counts_the_whole_run(tmp_path, args, monkeypatch):
    scaled = replace(args, scale_rewards="reference")
    straight = METHODS["rewarded_soups"](scaled, tmp_path / "a" / "soups")
    real = CLPTrainer.train_step
    # Before the first step of all, and in the second expert's second step.
    for kill_at in (0, 3):
        steps = []

        def train_step(self, steps=steps, kill_at=kill_at):
            if len(steps) == kill_at:
                raise KeyboardInterrupt
            steps.append(1)
            return real(self)

        monkeypatch.setattr(CLPTrainer, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            METHODS["rewarded_soups"](scaled, tmp_path / "b" / "soups")
    monkeypatch.setattr(CLPTrainer, "train_step", real)
    resumed = METHODS["rewarded_soups"](scaled, tmp_path / "b" / "soups")
    assert replace(resumed.budget, seconds=0) == replace(straight.budget, seconds=0)
    assert resumed.budget.seconds > 0
    for row in ([0.3, 0.7], [1.0, 0.0]):
        a, b = (logits(one.parts[0].policy, row) for one in (straight, resumed))
        assert a.equal(b)


def test_a_folder_of_another_budget_is_refused(folder, args):
    METHODS["clp"](args, folder / "grown", budget=0.25)
    with pytest.raises(ValueError, match="holds a run of 1 steps, not of 2"):
        METHODS["clp"](args, folder / "grown", budget=0.5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("rewarded_soup", [], "method must be one of clp, .* did you mean 'rewarded_soups'?"),
        ("mod", ["divergance"], "'mod' has no option 'divergance'.*did you mean 'divergence'?"),
        ("warm_start", ["weights"], "'warm_start' has no option 'weights'; its options: none"),
        ("one_per_weight", [], "'one_per_weight' needs the option 'weights'"),
    ],
)
def test_unknown_methods_and_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        find_method(name, options)
    assert find_method("mod", ["divergence"]) is METHODS["mod"]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("clp", {"budget": 0}, "budget must be a positive number up to 1e6, got 0"),
        ("clp", {"budget": 1e308}, "budget must be a positive number up to 1e6, got 1e"),
        ("clp", {"budget": 10**400}, "budget must be a positive number up to 1e6, got 1000"),
        ("clp", {"budget": True}, "budget must be a positive number up to 1e6, got True"),
        ("rewarded_soups", {"budget": 0.1}, "budget must leave a step to each of 2 runs; 0.1"),
        ("mod", {"divergence": "forward"}, "forward_kl or a number, got 'forward'"),
        ("mod", {"divergence": 0.0}, "divergence must be a number from 0.01 to 100, got 0.0"),
        ("one_per_weight", {"weights": []}, "weights must be a list of weights, got"),
        ("one_per_weight", {"weights": [[0.5, 0.5], "joy=0.5,easy=0.5"]}, "must be distinct"),
        ("one_per_weight", {"weights": [[0.5, 0.6]]}, "weights"),
        ("clp", {"conditioning": "lorra"}, "conditioning must be one of .* did you mean 'lora'?"),
    ],
)
def test_bad_budgets_and_options_are_refused_before_anything_is_trained(
    tmp_path, args, name, options, message
):
    with pytest.raises(ValueError, match=message):
        METHODS[name](args, tmp_path / "task" / name, **options)
    assert not (tmp_path / "task").exists()


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("rewarded_soups", {"conditioning": "prompt"}, "a conditioning other than 'prompt'"),
        (
            "averaged_adapters",
            {"conditioning": "head", "r": 8},
            "need conditioning='lora', got 'head'",
        ),
        ("warm_start", {"kl_range": [0.05, 0.3]}, r"one KL strength, got kl_range=\[0.05, 0.3\]"),
    ],
)
def test_methods_refuse_settings_that_they_have_no_use_for(tmp_path, args, name, settings, message):
    odd = replace(args, **settings)
    with pytest.raises(ValueError, match=message):
        METHODS[name](odd, tmp_path / "task" / name)
    assert not (tmp_path / "task").exists()


def test_budgets_add_up_and_steps_share_them(args):
    one, two = Budget(1, 2, 3, 4, 0.5), Budget(10, 20, 30, 40, 1.0)
    assert one + two == Budget(11, 22, 33, 44, 1.5)
    assert [steps_of(args, *given) for given in ((1.0,), (0.5, 2), (3, 2))] == [4, 1, 6]


def test_what_measured_the_scale_stands_in_run_json(tmp_path, args, few):
    train_run(replace(args, scale_rewards="reference"), tmp_path / "r", 1)
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["scale_tokens"] > few
    assert record["scale_seconds"] > 0
    record["scale_tokens"] = "many"
    (tmp_path / "r" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="scale_tokens and scale_seconds must be numbers"):
        train_run(replace(args, scale_rewards="reference"), tmp_path / "r", 1)
