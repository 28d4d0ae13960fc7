"""Comparisons of small methods: what is refused, what is written, what a kill leaves."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from processes import python
from tiny_compare import FAKES, TASK, values, write
from tiny_runs import records

from clp.evaluation.compare import locked, run_units
from clp.evaluation.compare_config import load_comparison
from clp.evaluation.compare_report import plot_task
from clp.evaluation.compare_summary import read_unit, summarise
from clp.evaluation.metrics import dominated, hypervolume
from clp.methods import registry
from clp.rewards import distinct_2

REAL = dict(registry.METHODS)


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(FAKES))


SMALL = {
    "one": {"method": "trained"},
    "points": {"method": "several", "weights": [[0, 1], [1, 0]]},
}


def load(folder, **changes):
    return load_comparison(write(folder / "c.yaml", values(folder / "out", **changes)))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison: its folder, what was read, what was found."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "METHODS", dict(FAKES))
        comparison = load(folder)
        run_units(comparison)
    return comparison, summarise(comparison)


def test_every_unit_has_its_files(done):
    comparison, _ = done
    for seed in (0, 1):
        for method in ("one", "twice", "points"):
            folder = comparison.output_dir / f"demo/seed-{seed}/{method}"
            names = {p.name for p in folder.iterdir() if p.is_file()}
            assert names == {"unit.json", "budget.json", "frontier.json", "samples.jsonl",
                             "pareto.png"}  # fmt: skip
    # A method with settings of its own has its runs to itself.
    assert (comparison.output_dir / "demo/seed-0/one/run/clp.json").is_file()
    assert (comparison.output_dir / "demo/seed-0/twice/runs/run/clp.json").is_file()
    settings = (comparison.output_dir / "demo/seed-1/twice/runs/run/config.yaml").read_text()
    assert (
        "learning_rate: 0.01" in settings and "max_steps: 4" in settings and "seed: 1" in settings
    )


def test_the_figures_follow_from_the_files(done):
    comparison, found = done
    task = found["tasks"]["demo"]
    base = json.loads((comparison.output_dir / "demo/base.json").read_text())
    first = [json.loads((comparison.output_dir / f"demo/seed-{s}/one/frontier.json").read_text())
             for s in (0, 1)]  # fmt: skip
    assert base["rewards"] == first[0]["base_rewards"] == base["reference_point"]
    assert task["reference_point"] == first[1]["reference_point"] == base["rewards"]
    for name, method in task["methods"].items():
        folders = [comparison.output_dir / f"demo/seed-{s}/{name}" for s in (0, 1)]
        fronts = [json.loads((f / "frontier.json").read_text()) for f in folders]
        own, points = method["figures"], [np.array(f["rewards"]) for f in fronts]
        assert own["hypervolume"][0] == pytest.approx(np.mean([f["hypervolume"] for f in fronts]))
        assert own["kl"][0] == pytest.approx(np.mean([max(f["kl_per_token"]) for f in fronts]))
        assert own["distinct_2"][0] == pytest.approx(
            np.mean([min(f["distinct_2"]) for f in fronts])
        )
        gains = [
            np.mean(np.sum(np.array(f["weights"]) * (p - base["rewards"]) / base["std"], 1))
            for f, p in zip(fronts, points, strict=True)
        ]
        assert own["inner_product"][0] == pytest.approx(np.mean(gains))
        assert own["range/joy"][0] == pytest.approx(np.mean([np.ptp(p[:, 0]) for p in points]))
        assert method["rewards"]["mean"] == np.mean(points, 0).tolist()
        for value, low, high in own.values():
            assert value is None or low <= value <= high
        for other, count in method["dominated_by"].items():
            rivals = [
                json.loads((comparison.output_dir / f"demo/seed-{s}/{other}/frontier.json")
                           .read_text())["rewards"] for s in (0, 1)
            ]  # fmt: skip
            each = [dominated(p, np.array(q)) for p, q in zip(points, rivals, strict=True)]
            assert count == np.mean(each)
    widths = [m["figures"]["range/joy"] for m in task["methods"].values()]
    assert any(low < high for _, low, high in widths)
    assert [task["methods"][n]["used"]["completions"] for n in task["methods"]] == [
        [8, 8], [16, 16], [8, 8],
    ]  # fmt: skip
    assert "dominated_by_first" not in task["methods"]["one"]["figures"]
    more = task["methods"]["twice"]["difference"]["hypervolume"][0]
    values_ = [task["methods"][n]["figures"]["hypervolume"][0] for n in ("one", "twice")]
    assert more == pytest.approx(values_[1] - values_[0])
    assert found["equal_budget"].startswith("completions sampled in training")


def test_a_unit_is_read_as_it_was_evaluated(done):
    comparison, _ = done
    folder = comparison.output_dir / "demo/seed-1/points"
    front, swept, used = read_unit(folder)
    assert front.weights == [[1, 0], [0.5, 0.5], [0, 1]] and used["completions"] == 8
    assert swept.rewards.shape == (3, 3, 2)
    assert swept.rewards.mean(0) == pytest.approx(np.array(front.rewards), abs=1e-6)
    assert swept.kl.sum(0) / swept.tokens.sum(0) == pytest.approx(np.array(front.kl_per_token))
    samples = records(folder / "samples.jsonl")
    assert [s["weights"] for s in samples[::3]] == [*front.weights, None]
    assert samples[4]["rewards"] == swept.rewards[1, 1].tolist()
    texts = [s["text"] for s in samples[3:6]]
    assert swept.bigrams[1].sum() and front.distinct_2[1] == distinct_2(texts)


def test_what_is_finished_is_not_done_again(done, monkeypatch):
    comparison, found = done
    never = Mock(side_effect=AssertionError("trained again"))
    monkeypatch.setitem(registry.METHODS, "trained", never)
    monkeypatch.setattr("clp.evaluation.compare.evaluate_parts", never)
    run_units(comparison)
    assert summarise(comparison) == found


def test_methods_seeds_and_tasks_may_be_added(tmp_path, monkeypatch):
    plot = Mock(side_effect=lambda front, path: path.touch())
    monkeypatch.setattr("clp.evaluation.report.plot_frontier", plot)
    one = {"one": {"method": "trained"}}
    run_units(load(tmp_path, methods=one, seeds=[0]))
    before = (tmp_path / "out/demo/seed-0/one/frontier.json").read_bytes()
    base = (tmp_path / "out/demo/base.json").read_bytes()
    more = {"new": {"method": "several", "weights": [[0.5, 0.5]]}, **one}
    tasks = {"other": TASK | {"alpha": 0.5}, "demo": TASK}
    comparison = load(tmp_path, methods=more, seeds=[3, 0], tasks=tasks)
    run_units(comparison)
    assert (tmp_path / "out/demo/seed-0/one/frontier.json").read_bytes() == before
    # The reference point stays that of the first evaluation.
    assert (tmp_path / "out/demo/base.json").read_bytes() == base
    assert list(summarise(comparison)["tasks"]) == ["other", "demo"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"demo": TASK | {"alpha": 0.3}}}, "alpha was 0.12 and is 0.3"),
        ({"methods": {"one": {"method": "trained", "budget": 2}}}, "budget was 1 and is 2"),
        ({"methods": {"one": {"method": "several", "weights": [[1, 0]]}}},
         "method was 'trained' and is 'several'; option weights was None"),
        ({"num_prompts": 2}, "number of eval_prompts was 3 and is 2"),
        ({"max_tokens": 3}, "max_tokens was 12 and is 3"),
        ({"tasks": {"demo": TASK | {"rewards": ["joy=sentiment", "brief=brevity"]}}},
         "content of rewards was"),
        ({"tasks": {"demo": TASK | {"rewards": TASK["rewards"][::-1]}}}, "content of rewards was"),
        ({"reference_point": [0, 0]}, "has the reference_point"),
    ],
)  # fmt: skip
def test_other_settings_are_refused(done, monkeypatch, changes, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        run_without_training(monkeypatch, load(done[0].output_dir.parent, **changes))


def test_where_it_runs_and_what_it_saves_may_change(done, monkeypatch):
    tasks = {"demo": TASK | {"device": "cpu", "save_steps": 2}}
    run_without_training(monkeypatch, load(done[0].output_dir.parent, tasks=tasks))


def run_without_training(monkeypatch, comparison):
    for name in ("trained", "several"):
        monkeypatch.setitem(registry.METHODS, name, Mock(side_effect=AssertionError("trained")))
    run_units(comparison)


def with_method(**own):
    return {"methods": {"one": {"method": "trained"} | own}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {}}, "unknown key 'task'; did you mean 'tasks'"),
        ({"output_dir": None}, "output_dir must be a folder"),
        ({"tasks": None}, "tasks must map names"),
        ({"methods": {}}, "methods must map names"),
        ({"methods": {"a/b": {"method": "trained"}}}, "'a/b' must be at most 100 letters"),
        ({"methods": {"experts-1": {"method": "trained"}}}, "not begin with 'experts-'"),
        ({"methods": {"a": {"method": "trained"}, "A": {"method": "trained"}}}, "upper and lower"),
        ({"methods": {"a": None}}, "'a' must hold a mapping"),
        ({"methods": {"a": {}}}, "method 'a': method must be the name"),
        (with_method(method="trainer"), "got 'trainer'; did you mean 'trained'"),
        (with_method(weights=[[1, 0]]), "has no option 'weights'"),
        (with_method(conditonning="full"), "did you mean 'conditioning'"),
        (with_method(method="several"), "needs the option 'weights'"),
        (with_method(method="several", weights=[[1, 1]]), "must be >= 0 and sum to 1"),
        (with_method(method="several", weights=[[1, 0, 0]]), "weights must have 2 entries"),
        (with_method(conditioning="ful"), "'demo', method 'one': conditioning .*mean 'full'"),
        (with_method(max_steps=3), "max_steps belongs to the task"),
        (with_method(rewards=["brevity"]), "rewards belongs to the task"),
        (with_method(seed=3), "seed is set by the comparison"),
        (with_method(budget=0), "budget must be a positive number up to 1e6"),
        (with_method(budget="2"), "budget must be a positive number up to 1e6"),
        (with_method(reference_point=[0, 0]), "compared under one reference_point"),
        ({"tasks": {"demo": {"max_steps": 2}}}, "task 'demo': rewards is missing"),
        ({"tasks": {"demo": TASK | {"alhpa": 1}}}, "unknown key 'alhpa'; did you mean 'alpha'"),
        ({"tasks": {"demo": TASK | {"alpha": 2}}}, "task 'demo': alpha must be in"),
        ({"tasks": {"demo": TASK | {"output_dir": "x"}}}, "output_dir is set by the comparison"),
        ({"tasks": {"demo": TASK | {"reference_point": [0, 0]}}}, "stands at the top"),
        ({"seeds": []}, "seeds must be a non-empty list"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [-1]}, "integers from 0 on"),
        ({"seeds": 3}, "seeds must be a non-empty list"),
        ({"num_prompts": 0}, "num_prompts must be an integer from 1 on"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"reference_point": [0]}, "task 'demo': reference_point must have 2 entries"),
        ({"reference_point": "bas"}, "must be numbers or 'base', got 'bas'"),
        ({"reference_point": {"demo": [0, 0], "dmo": [0, 0]}}, "unknown task 'dmo'.*'demo'"),
        ({"reference_point": {"demo": [0, 0]}, "tasks": {"demo": TASK, "b": TASK}}, "task 'b'"),
        ({"reference_point": {"demo": [0, 0], "b": "base"}, "tasks": {"demo": TASK, "b": TASK}},
         "either every task has 'base' or"),
        ({"reference_point": {"demo": [0, 0], "b": [0, 1]}, "tasks": {"demo": TASK, "b": TASK}},
         "must have one point"),
        ({"reference_point": [0, 0], "tasks": {"demo": TASK, "b": TASK | {"rewards": ["brevity"]}}},
         "task 'b': reference_point must have 1 entries"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **changes)


def test_a_name_twice_is_refused(tmp_path):
    path = write(tmp_path / "c.yaml", values(tmp_path / "out"))
    path.write_text(path.read_text() + "  one: {method: trained}\nmethods: {}\n")
    with pytest.raises(ValueError, match="twice"):
        load_comparison(path)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TASK | {"eval_prompts": "nothing.jsonl"}, "nothing.jsonl cannot be read"),
        (TASK | {"prompts": "nothing.jsonl"}, "nothing.jsonl cannot be read"),
        (TASK | {"rewards": ["joy=sentimnt", "brief=brevity"]}, "sentimnt"),
    ],
)
def test_bad_inputs_are_refused_before_anything_is_trained(tmp_path, monkeypatch, task, message):
    trained = Mock(side_effect=AssertionError("trained"))
    monkeypatch.setattr("clp.evaluation.compare.find_method", trained)
    with pytest.raises(ValueError, match=message):
        run_units(load(tmp_path, tasks={"demo": TASK, "bad": task}, reference_point=None))


def test_two_comparisons_do_not_share_a_folder(done, tmp_path):
    comparison, _ = done
    with locked(comparison.output_dir), pytest.raises(ValueError, match="in use by another"):
        run_units(comparison)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"method": "rewarded_soups", "conditioning": "prompt"}, "other than 'prompt'"),
        ({"method": "averaged_adapters", "conditioning": "prompt"}, "need conditioning='lora'"),
        ({"method": "warm_start", "budget": 2, "kl_range": [0.1, 0.2]}, "one KL strength"),
        ({"method": "mod", "divergence": "foo"}, "divergence must be one of"),
        ({"method": "rewarded_soups", "budget": 0.2}, "leave a step to each of 2 runs"),
        ({"method": "one_per_weight", "weights": []}, "must be a list of weights"),
        ({"method": "one_per_weight", "weights": None}, "must be a list of weights"),
        ({"method": "one_per_weight", "weights": [[1, 0], [1, 0]]}, "weights must be distinct"),
        ({"method": "clp", "weight_draws": "function"}, "needs no function of Python's"),
        ({"method": "clp", "conditioning": "ful"}, "did you mean 'full'"),
    ],
)
def test_what_a_method_refuses_is_refused_before_the_first_one_trains(
    tmp_path, monkeypatch, method, message
):
    monkeypatch.setattr(registry, "METHODS", REAL | FAKES)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, methods={"one": {"method": "trained"}, "odd": method})


@pytest.mark.parametrize("name", ["compare.json", "compare-x", "a" * 300, "experts-lora-2"])
def test_names_that_the_folder_needs_for_itself_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="must be at most 100 letters"):
        load(tmp_path, tasks={name: TASK})


def test_a_base_that_was_measured_on_something_else_is_refused(done, tmp_path):
    """As after the folder of a unit was deleted by hand."""
    folder = tmp_path / "out"
    shutil.copytree(done[0].output_dir, folder)
    for unit in (folder / "demo").glob("seed-*"):
        shutil.rmtree(unit)
    path = folder / "demo/base.json"
    before = path.read_bytes()
    rewards = TASK | {"rewards": ["joy=sentiment", "brief=brevity"]}
    for changes, what in (
        ({"num_prompts": 2}, "num_prompts, eval_prompts"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"tasks": {"demo": rewards}}, "rewards"),
    ):
        with pytest.raises(ValueError, match=rf"base\.json was measured with another {what}: name"):
            run_units(load_comparison(write(tmp_path / "c.yaml", values(folder, **changes))))
    assert path.read_bytes() == before


def test_a_base_that_is_lost_or_damaged_is_refused(done, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(done[0].output_dir, folder)
    path = folder / "demo/base.json"
    whole = json.loads(path.read_text())
    for odd in ({"std": ["a", "b"]}, {"rewards": 3}, {"reference_point": None}):
        path.write_text(json.dumps(whole | odd))
        with pytest.raises(ValueError, match="must be an object with rewards, std, reference_po"):
            run_units(load_comparison(write(tmp_path / "c.yaml", values(folder))))
    path.unlink()
    for seeds in ([0, 1], [0, 1, 2]):
        with pytest.raises(ValueError, match=r"base\.json is missing, which the finished units of"):
            run_units(load_comparison(write(tmp_path / "c.yaml", values(folder, seeds=seeds))))
    assert not path.exists()


@pytest.mark.parametrize("rewards", [["brevity"], ["joy=sentiment", "brevity", "readability"]])
def test_plots_of_one_and_of_three_objectives(tmp_path, rewards):
    weights = np.eye(len(rewards)).tolist()
    methods = {"a": {"method": "several", "weights": weights}}
    comparison = load(tmp_path, methods=methods, tasks={"t": TASK | {"rewards": rewards}})
    run_units(comparison)
    found = summarise(comparison)["tasks"]["t"]
    plot_task("t", found, [0, 1], tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000
    front = np.array(found["methods"]["a"]["rewards"]["mean"])
    assert front.shape == (len(rewards), len(rewards))
    assert hypervolume(front, found["reference_point"]) >= 0


# A process ends by SIGKILL before or after a rename of a file, the next one at a later one of its
# own, until one comes to the end. They share the imports of their parent, which has one thread.
KILLED = """
import os, signal, sys
from pathlib import Path

import matplotlib.pyplot
import tiny_compare
import torch
from clp import cli
from clp_kernels.files import write_whole
from clp.evaluation import report, compare, compare_config, compare_report, compare_summary
from clp.methods import registry
from clp.policies.policy import Policy

torch.set_num_threads(1)
Policy.create("tiny", ["joy"])
report.plot_frontier = lambda front, path: write_whole(path, b"a plot of a unit")
registry.METHODS = tiny_compare.FAKES
rename = Path.replace

def child(last):
    left = last
    def counted(self, target):
        nonlocal left
        left -= 1
        if left == 0 and last % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done = rename(self, target)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    Path.replace = counted
    sys.argv = ["clp", "compare", sys.argv[1]]
    cli.main()

for number in (6 * i + j for i in range(20) for j in (1, 2)):
    pid = os.fork()
    if pid == 0:
        try:
            child(number)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != -signal.SIGKILL:
        print(status, number - 1)
        break
"""


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    whole = load(tmp_path, seeds=[0], methods=SMALL)
    run_units(whole)
    found = summarise(whole)
    path = write(tmp_path / "c.yaml", values(tmp_path / "again", seeds=[0], methods=SMALL))
    places = ":".join(str(Path(__file__).resolve().parents[i]) for i in (1, 2))
    ended = python("-c", KILLED, str(path), PYTHONPATH=places)
    status, last = map(int, ended.stdout.split()[-2:])
    assert status == 0 and last > 12, ended.stderr
    written = json.loads((tmp_path / "again/compare.json").read_text())
    assert without_seconds(written) == without_seconds(json.loads(json.dumps(found)))
    assert (tmp_path / "again/compare-demo.png").stat().st_size > 10_000
    assert "Equal budgets are equal numbers of completions" in " ".join(ended.stdout.split())


def without_seconds(found):
    if isinstance(found, dict):
        return {k: without_seconds(v) for k, v in found.items() if k != "seconds"}
    return found
