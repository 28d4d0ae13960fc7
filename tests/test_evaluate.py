"""The sweep: figures checked against their definitions; the plot and the tables are drawn."""

import io
import json

import pytest
import torch
from rich.console import Console

from clp.evaluate import Frontier, evaluate
from clp.policy import Policy
from clp.report import plot_frontier, print_frontier, print_samples
from clp.rewards import distinct_2, load_rewards
from clp.sampler import SamplingParams
from clp_kernels.layers import steered_layers

ROWS = [{"prompt": p} for p in ("Tom had a red kite.", "Mia was sad.", "Sam was at the lake.")]
REWARDS = {"joy": "sentiment", "brief": "brevity", "clear": "readability"}


def policy(names):
    made = Policy.create("tiny", names, r=2)
    generator = torch.Generator().manual_seed(4)
    for layer in steered_layers(made.model).values():
        layer.lora_B.data.normal_(0, 0.1, generator=generator)
    return made


def sweep(names, **changes):
    rewards = load_rewards([f"{n}={REWARDS[n]}" for n in names])
    return evaluate(policy(names), rewards, ROWS, params=SamplingParams(max_tokens=10), **changes)


@pytest.fixture(scope="module")
def two():
    return sweep(["joy", "brief"])


def test_the_figures_follow_from_the_samples(two):
    front, samples = two
    assert len(samples) == 12 * 3 and front.prompts == 3
    for i, row in enumerate(front.weights):
        chunk = samples[3 * i : 3 * i + 3]
        assert all(s["weights"] == pytest.approx(row) for s in chunk)
        mean = [sum(s["rewards"][j] for s in chunk) / 3 for j in range(2)]
        assert front.rewards[i] == pytest.approx(mean, abs=1e-6)
        assert front.distinct_2[i] == pytest.approx(distinct_2([s["text"] for s in chunk]))
    base = samples[33:]
    assert all(s["weights"] is None for s in base)
    assert front.base_rewards[0] == pytest.approx(sum(s["rewards"][0] for s in base) / 3, abs=1e-6)
    assert all(kl > 0 for kl in front.kl_per_token)


def test_hypervolume_is_the_area_over_the_reference_point(two):
    front, _ = two
    assert front.base_hypervolume == pytest.approx(front.base_rewards[0] * front.base_rewards[1])
    points = sorted(front.rewards, reverse=True)
    area, height = 0.0, 0.0
    for x, y in points:
        if y > height:
            area, height = area + x * (y - height), y
    assert front.hypervolume == pytest.approx(area)
    for i, (x, y) in enumerate(front.rewards):
        beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in front.rewards)
        assert front.pareto[i] is not beaten


def test_the_same_seed_gives_the_same_frontier(two):
    assert sweep(["joy", "brief"])[0] == two[0]
    assert sweep(["joy", "brief"], seed=1)[0] != two[0]


def test_an_untrained_policy_has_no_kl_and_no_steering():
    names = ["joy", "brief"]
    rewards = load_rewards([f"{n}={REWARDS[n]}" for n in names])
    fresh = Policy.create("tiny", names)
    front, _ = evaluate(fresh, rewards, ROWS, params=SamplingParams(max_tokens=10))
    assert front.kl_per_token == [0.0] * 11
    assert all(r == front.base_rewards for r in front.rewards)
    assert front.spearman == {"joy": None, "brief": None}
    assert front.hypervolume == pytest.approx(front.base_hypervolume)


def test_three_objectives_use_the_das_dennis_grid(tmp_path):
    front, samples = sweep(["joy", "brief", "clear"])
    assert len(front.weights) == 15 and len(samples) == 16 * 3
    plot_frontier(front, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_json_plot_and_tables(two, tmp_path):
    front, samples = two
    front.save(tmp_path / "frontier.json")
    read = json.loads((tmp_path / "frontier.json").read_text())
    assert Frontier(**read) == front
    plot_frontier(front, tmp_path / "pareto.png")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["frontier.json", "pareto.png"]
    text = io.StringIO()
    console = Console(file=text, width=140)
    print_frontier(front, console)
    print_samples(front, samples, console)
    assert "joy 0.50 brief 0.50" in text.getvalue() and "base" in text.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_point": [0.0]}, "2 entries"),
        ({"reference_point": [0.0, 5.0]}, "must lie below"),
    ],
)
def test_bad_reference_points(changes, message):
    with pytest.raises(ValueError, match=message):
        sweep(["joy", "brief"], **changes)


def test_rewards_must_be_those_of_the_policy():
    with pytest.raises(ValueError, match="reward_funcs must be"):
        evaluate(policy(["joy", "brief"]), load_rewards(["joy=sentiment"]), ROWS,
                 params=SamplingParams())  # fmt: skip
