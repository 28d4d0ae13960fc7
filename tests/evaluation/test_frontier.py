"""The sweep: figures checked against their definitions; the plot and the tables are drawn."""

import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_runs import randomised

from clp.engine.requests import SamplingParams
from clp.evaluation.frontier import Frontier, evaluate, evaluate_parts
from clp.evaluation.metrics import pareto
from clp.evaluation.report import plot_frontier, print_frontier, print_samples, save_evaluation
from clp.policies.logit_mixture import LogitMixture
from clp.policies.policy import Policy
from clp.rewards import distinct_2, load_rewards

ROWS = [{"prompt": p} for p in ("Tom had a red kite.", "Mia was sad.", "Sam was at the lake.")]
REWARDS = {"joy": "sentiment", "brief": "brevity", "clear": "readability"}
NAMES = ["joy", "brief"]


def rewards(names=NAMES):
    return load_rewards([f"{n}={REWARDS[n]}" for n in names])


def policy(names=NAMES):
    return randomised(0.1, 4, names, r=2)


def sweep(names=NAMES, made=None, max_tokens=10, **changes):
    params = SamplingParams(max_tokens=max_tokens)
    return evaluate(made or policy(names), rewards(names), ROWS, params=params, **changes)


@pytest.fixture(scope="module")
def two():
    return sweep()


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
    assert sweep()[0] == two[0]
    assert sweep(seed=1)[0] != two[0]


def test_an_untrained_policy_has_no_kl_and_no_steering():
    front, _ = sweep(made=Policy.create("tiny", NAMES))
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
    assert "KL strength" not in text.getvalue()
    print_frontier(replace(front, alpha=0.1), console)
    assert "KL strength 0.1" in text.getvalue()


def test_the_page_on_metrics_has_the_fields_of_both_files(two):
    front, samples = two
    page = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    _, first, second = re.split(r"^\*\*.*?\*\*", page.read_text(encoding="utf-8"), flags=re.M)
    # The names stand at the beginning of an item or a sentence, before its colon.
    for part, names in ((first, set(asdict(front))), (second, {*samples[0], "extra"})):
        heads = re.findall(r"(?:^- |\. )((?:`\w+`,?\s*)+):", part, flags=re.M)
        assert set(re.findall(r"`(\w+)`", " ".join(heads))) == names


@pytest.fixture
def no_sampler(monkeypatch):
    """What is refused is refused before anything is sampled."""
    made = Mock(side_effect=AssertionError("a sampler was made"))
    monkeypatch.setattr("clp.evaluation.frontier.Sampler", made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_point": [0.0]}, "2 entries"),
        ({"reference_point": [0.0, float("nan")]}, "must be finite"),
        ({"reference_point": [float("-inf"), 0]}, "must be finite"),
        ({"params": SamplingParams(n=2)}, "n must be 1"),
        ({"rows": []}, "rows holds no prompt"),
        ({"rewards": ["joy=sentiment", "brief=rouge"]}, "rouge needs the column 'reference'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sampled(no_sampler, changes, message):
    changes = {"params": SamplingParams(max_tokens=10), "rows": ROWS} | changes
    functions = load_rewards(changes.pop("rewards", ["joy=sentiment", "brief=brevity"]))
    with pytest.raises(ValueError, match=message):
        evaluate(policy(), functions, changes.pop("rows"), **changes)


def test_a_model_without_a_linear_head_is_refused_first(no_sampler, monkeypatch):
    monkeypatch.setattr(Policy, "head", Mock(side_effect=ValueError("a soft cap?")))
    with pytest.raises(ValueError, match="soft cap"):
        sweep()


@pytest.mark.parametrize("place", ["on", "above"])
def test_a_base_on_or_below_the_reference_point_has_no_volume(two, place, tmp_path):
    """The base's volume is 0, whatever it took to find that out: the evaluation is kept."""
    point = two[0].base_rewards if place == "on" else [0.0, 5.0]
    front, samples = sweep(reference_point=point)
    assert front.base_hypervolume == 0 and front.reference_point == point
    best = [[max(0.0, v - p) for v, p in zip(r, point, strict=True)] for r in front.rewards]
    assert max(x * y for x, y in best) <= front.hypervolume
    assert (front.hypervolume > 0) is (place == "on")
    save_evaluation(front, samples, tmp_path)
    text = io.StringIO()
    print_frontier(front, Console(file=text, width=140))
    assert "(the base's is 0)" in " ".join(text.getvalue().split())


def test_equal_rows_are_all_on_the_front():
    front, _ = sweep(made=Policy.create("tiny", NAMES), max_tokens=4)
    assert front.pareto == [True] * 11


def test_equal_rows_of_three_objectives_are_all_on_the_front(tmp_path):
    made = Policy.create("tiny", ["joy", "brief", "clear"])
    front, _ = sweep(["joy", "brief", "clear"], made, max_tokens=4)
    front.save(tmp_path / "frontier.json")
    assert json.loads((tmp_path / "frontier.json").read_text())["pareto"] == [True] * 15


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_equal_rows_of_any_numbers(dtype):
    """Zeros of both signs are equal; what is equal and dominated is not on the front."""
    rows = [[0.0, 1, 2], [-0.0, 1, 2], [0.0, 1, 2], [-1e-30, 1, 2], [-1, 0.5, 2], [-1, 0.5, 2],
            [1e30, -1e30, 0], [1e30, -1e30, -0.0]]  # fmt: skip
    front = [True] * 3 + [False] * 3 + [True] * 2
    assert pareto(np.array(rows, dtype=dtype)) == front
    assert pareto(np.array(rows[::-1], dtype=dtype)) == front[::-1]
    assert pareto(np.full((1000, 2), 0.1, dtype=dtype)) == [True] * 1000


@given(st.integers(1, 5), st.data())
def test_the_front_of_any_rows(m, data):
    """Against the definition; moocore has other algorithms for more objectives."""
    row = st.lists(st.integers(0, 3), min_size=m, max_size=m)
    points = np.array(data.draw(st.lists(row, min_size=1, max_size=12)), dtype=float)
    beaten = [any((q >= p).all() and (q > p).any() for q in points) for p in points]
    assert pareto(points) == [not b for b in beaten]


def test_an_evaluation_says_how_it_was_made(two):
    front, _ = two
    assert (front.max_tokens, front.temperature, front.top_p, front.seed) == (10, 1.0, 1.0, 0)
    assert (front.run, front.reward_specs, front.prompts_file) == (None, None, None)
    params = SamplingParams(max_tokens=3, temperature=0.5, top_k=5, top_p=0.9, min_p=0.01,
                            stop=["."], stop_token_ids=[7], ignore_eos=True)  # fmt: skip
    front, _ = evaluate(policy(), rewards(), ROWS, params=params)
    for name, value in asdict(params).items():
        if name not in ("n", "seed", "logprobs"):
            assert getattr(front, name) == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("seed", [-1, 10**30])
def test_seeds_of_any_size(seed):
    front, _ = sweep(seed=seed)
    assert front.seed == seed


def test_what_fails_while_it_is_written_leaves_the_earlier_evaluation(two, tmp_path, monkeypatch):
    front, samples = two
    save_evaluation(front, samples, tmp_path / "new/folder")
    before = {p.name: p.read_bytes() for p in (tmp_path / "new/folder").iterdir()}
    assert sorted(before) == ["frontier.json", "pareto.png", "samples.jsonl"]
    for place, error in {
        "clp.evaluation.report.plot_frontier": OSError("disk full"),
        "clp.evaluation.frontier.Frontier.save": KeyboardInterrupt(),
    }.items():
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(place, Mock(side_effect=error))
            save_evaluation(front, samples[:1], tmp_path / "new/folder")
        assert {p.name: p.read_bytes() for p in (tmp_path / "new/folder").iterdir()} == before
    save_evaluation(front, samples[:1], tmp_path / "new/folder")
    assert len((tmp_path / "new/folder/samples.jsonl").read_text().splitlines()) == 1


def test_rewards_must_be_those_of_the_policy():
    with pytest.raises(ValueError, match="reward_funcs must be"):
        evaluate(policy(), rewards(["joy"]), ROWS, params=SamplingParams())


def test_rewards_are_matched_by_name():
    made = policy()
    front, _ = sweep(made=made, weights=[[0.3, 0.7]])
    swapped = dict(reversed(rewards().items()))
    again, _ = evaluate(
        made, swapped, ROWS, params=SamplingParams(max_tokens=10), weights=[[0.3, 0.7]]
    )
    assert (again.objectives, again.rewards) == (front.objectives, front.rewards)


def test_a_policy_of_one_objective(tmp_path):
    front, samples = sweep(["joy"], reference_point=[2.0])
    assert front.weights == [[1.0]] and front.spearman == {"joy": None}
    assert (front.hypervolume, front.base_hypervolume, front.pareto) == (0.0, 0.0, [True])
    save_evaluation(front, samples, tmp_path)
    assert json.loads((tmp_path / "frontier.json").read_text())["rewards"] == front.rewards
    print_frontier(front, Console(file=io.StringIO()))
    print_samples(front, samples, Console(file=io.StringIO()))


def test_rewards_that_are_constant_on_one_prompt(tmp_path):
    """All points of the front are one, on the reference point, which is that of the base too."""
    same = dict.fromkeys(NAMES, lambda completions: [0.0] * len(completions))
    params = SamplingParams(max_tokens=1)
    front, samples = evaluate(policy(), same, ROWS[:1], params=params)
    assert front.spearman == {"joy": None, "brief": None} and front.pareto == [True] * 11
    assert front.hypervolume == front.base_hypervolume == 0
    save_evaluation(front, samples, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_all_that_decides_the_completions_is_recorded(tmp_path):
    params = SamplingParams(
        max_tokens=None, temperature=0.5, top_k=np.int64(3), min_p=0.1, stop=".", ignore_eos=True,
        stop_token_ids=np.array([5]).tolist(),
    )  # fmt: skip
    front, samples = evaluate(policy(), rewards(), ROWS[:1], params=params, seed=-1)
    save_evaluation(front, samples, tmp_path)
    found = json.loads((tmp_path / "frontier.json").read_text())
    wanted = {
        "max_tokens": None, "temperature": 0.5, "top_k": 3, "top_p": 1.0, "min_p": 0.1, "seed": -1,
        "stop": ["."], "stop_token_ids": [5], "ignore_eos": True, "run": None,
        "reward_specs": None, "prompts_file": None,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


def test_given_weights_are_points_of_the_sweep(two):
    """Prompts draw as in the sweep, so that the numbers are the same."""
    front, samples = two
    some, chosen = sweep(weights=["joy=0.3,brief=0.7", [1.0, 0.0]])
    assert some.weights == [front.weights[3], front.weights[10]]
    for name in ("rewards", "distinct_2", "mean_length"):
        assert getattr(some, name) == [getattr(front, name)[i] for i in (3, 10)]
    wanted = [front.kl_per_token[i] for i in (3, 10)]
    assert some.kl_per_token == pytest.approx(wanted, rel=1e-4)
    assert (some.base_rewards, some.prompts) == (front.base_rewards, 3)
    assert some.pareto == [True, True] and some.spearman["joy"] in (1, -1)
    assert [s["text"] for s in chosen[3:6]] == [s["text"] for s in samples[30:33]]


def test_samples_have_their_kl_and_length(two):
    front, samples = two
    for i in range(11):
        chunk = samples[3 * i : 3 * i + 3]
        kl, tokens = (sum(s[key] for s in chunk) for key in ("kl_to_base", "tokens"))
        assert kl / tokens == pytest.approx(front.kl_per_token[i])
        assert tokens / 3 == pytest.approx(front.mean_length[i])
    assert all(s["kl_to_base"] == 0 and s["tokens"] > 0 for s in samples[33:])


@pytest.mark.parametrize(
    ("weights", "message"),
    [([[0.5, 0.6]], "sum to 1"), ([[1.0]], "2 entries"), ([], "at least one set of weights")],
)
def test_bad_weights_are_refused_before_anything_is_sampled(no_sampler, weights, message):
    with pytest.raises(ValueError, match=message):
        sweep(weights=weights)


def test_parts_make_one_curve(two):
    """Each weight's completions are those of its own policy; the base is that of the first."""
    weights = torch.tensor([[1.0, 0.0], [0.2, 0.8]])
    other = randomised(0.1, 5, NAMES, r=2)
    front, samples = evaluate_parts(
        [(policy(), weights[:1]), (other, weights[1:])], rewards(), ROWS,
        params=SamplingParams(max_tokens=10),
    )  # fmt: skip
    alone, _ = sweep(made=other, weights=weights[1:].tolist())
    assert front.weights == [[1, 0], [0.2, 0.8]]
    assert front.rewards == [two[0].rewards[10], alone.rewards[0]]
    assert front.kl_per_token[1] == pytest.approx(alone.kl_per_token[0], rel=1e-4)
    assert front.base_rewards == two[0].base_rewards and len(samples) == 9
    with pytest.raises(ValueError, match="reward_funcs must be"):
        evaluate_parts(
            [(policy(), weights[:1]), (policy(["brief", "joy"]), weights[1:])], rewards(), ROWS,
            params=SamplingParams(),
        )  # fmt: skip


class Twin(Policy):
    """A policy whose base model is that of another one, as a mixture's is."""

    @property
    def reference(self):
        return self.other

    def token_kl(self, batch, temperature):
        return torch.full(batch.completion_mask.shape, 0.5) * batch.completion_mask


def test_the_base_is_sampled_from_the_reference_policy(two):
    made = policy()
    made.__class__ = Twin
    made.other = policy()
    front, samples = sweep(made=made)
    assert front.kl_per_token == pytest.approx([0.5] * 11)
    assert front.base_rewards == two[0].base_rewards and front.rewards == two[0].rewards
    assert samples[-1]["weights"] is None and samples[-1]["text"] == two[1][-1]["text"]


def test_a_policy_without_a_base_model_is_refused(no_sampler, monkeypatch):
    models = {name: policy(["joy"]).model for name in NAMES}
    mixture = LogitMixture(models, policy().tokenizer)
    with pytest.raises(ValueError, match="base model"):
        sweep(made=mixture)
    with pytest.raises(ValueError):
        sweep(made=Policy.from_models({"joy": "tiny", "brief": "tiny"}))
