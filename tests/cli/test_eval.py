"""clp eval: which settings, prompts and lengths it takes."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_runs import SMALL

from clp.training.config import load_config
from clp.training.trainer import CLPTrainer


@pytest.mark.parametrize("how", ["path", "dot", "link"])
def test_eval_of_a_checkpoint_takes_the_configuration_of_its_run(
    clp, monkeypatch, trained, tmp_path, how
):
    """Its prompts and length."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom"}\n{"prompt": "Mia"}\n')
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    config = load_config(copied / "config.yaml")
    config = replace(config, eval_prompts=str(tmp_path / "p.jsonl"), max_completion_length=5)
    (copied / "config.yaml").write_text(config.to_yaml())
    checkpoint = copied / "checkpoint-000001"
    if how == "dot":
        monkeypatch.chdir(checkpoint)
    (tmp_path / "latest").symlink_to(checkpoint)
    clp("eval", {"path": checkpoint, "dot": ".", "link": tmp_path / "latest"}[how])
    front = json.loads((checkpoint / "frontier.json").read_text())
    assert (front["prompts"], front["max_tokens"]) == (2, 5)


def test_rewards_of_eval_are_matched_by_name(clp, trained, tmp_path):
    specs = load_config(trained / "config.yaml").rewards
    assert len(specs) == 2
    for name, given in (("a", specs), ("b", specs[::-1])):
        clp("eval", trained, "--num-prompts", "2", "--output-dir", tmp_path / name,
            "--rewards", *given)  # fmt: skip
    first, second = (json.loads((tmp_path / n / "frontier.json").read_text()) for n in "ab")
    assert first["reward_specs"] == second["reward_specs"] == specs
    assert first["rewards"] == second["rewards"]


@pytest.mark.parametrize("name", ["best", "../moved/checkpoint-000001/"])
def test_eval_of_a_checkpoint_that_has_moved(clp, monkeypatch, trained, tmp_path, name):
    """Renamed in its run, so that it is not deleted when newer ones come; or with its run."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom"}\n{"prompt": "Mia"}\n')
    copied = tmp_path / "moved"
    shutil.copytree(trained, copied)
    config = load_config(copied / "config.yaml")
    config = replace(config, eval_prompts=str(tmp_path / "p.jsonl"), max_completion_length=5)
    (copied / "config.yaml").write_text(config.to_yaml())
    (copied / "checkpoint-000001").rename(copied / name)
    monkeypatch.chdir(copied)
    clp("eval", name, "--num-prompts", "3")
    front = json.loads((copied / name / "frontier.json").read_text())
    assert (front["prompts"], front["max_tokens"]) == (2, 5)


def test_a_copy_of_a_checkpoint_alone_has_the_settings_of_its_training(clp, trained, tmp_path):
    """As one that is kept or uploaded; without its training.yaml a line says what is taken."""
    copied = tmp_path / "best"
    shutil.copytree(trained / "checkpoint-000001", copied)
    config = load_config(copied / "training.yaml")
    assert config == replace(load_config(trained / "config.yaml"), resume=False)
    said = clp("eval", copied, "--num-prompts", "2").err
    front = json.loads((copied / "frontier.json").read_text())
    assert front["max_tokens"] == config.max_completion_length and "no settings" not in said
    (copied / "training.yaml").unlink()
    said = clp("eval", copied, "--num-prompts", "1").err
    assert "has no settings of a training" in said and "float32, 48 tokens" in said


def test_a_checkpoint_that_was_copied_into_another_run_has_its_own_settings(clp, trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    config = replace(load_config(other / "config.yaml"), output_dir=str(other))
    (other / "config.yaml").write_text(replace(config, max_completion_length=5).to_yaml())
    copied = other / "from_trained"
    shutil.copytree(trained / "checkpoint-000001", copied)
    clp("eval", copied, "--num-prompts", "2")
    own = load_config(trained / "config.yaml").max_completion_length
    assert own != 5
    assert json.loads((copied / "frontier.json").read_text())["max_tokens"] == own


def test_eval_says_that_prompts_given_in_python_are_not_there(clp, trained, tmp_path):
    rows = [{"prompt": "Tom"}, {"prompt": "Mia"}]
    args = replace(load_config(trained / "config.yaml"), output_dir=str(tmp_path / "r"))
    CLPTrainer(args=args, train_dataset=rows).train()
    for folder in (tmp_path / "r", tmp_path / "r/checkpoint-000001"):
        said = clp("eval", folder, "--num-prompts", "1").err
        assert "the run's prompts were given in Python; these are the embedded ones" in said


def test_what_is_wrong_with_an_evaluation_is_named_as_it_was_given(refused, trained):
    said = refused("eval", trained, "--max-tokens", 4000)
    assert "error: max_tokens leaves no room for a prompt" in said
    said = refused("eval", trained / "checkpoint-7")
    assert "checkpoint-7/clp.json is missing; there is no such folder" in said


def test_a_held_out_prompt_that_is_too_long_is_named_by_file_and_line(refused, trained, tmp_path):
    """By eval, and by train, before it trains."""
    path = tmp_path / "held.jsonl"
    path.write_text('{"prompt": "Tom"}\n' + json.dumps({"prompt": "Tom had a kite. " * 200}) + "\n")
    wanted = r"held.jsonl:2: the prompt has \d+ tokens, at most \d+ fit .*are too long$"
    said = refused("eval", trained, "--prompts", path)
    assert re.search(wanted, said.strip().splitlines()[-1])
    said = refused("train", "--output-dir", tmp_path / "r", *SMALL, "--eval-prompts", path)
    assert re.search(wanted, said.strip().splitlines()[-1])
    path.write_text('{"prompt": "Tom"}\n')
    said = refused("train", "--output-dir", tmp_path / "r", "--rewards", "rouge", "--eval-prompts",
                   path, "--prompts", _with_references(tmp_path))  # fmt: skip
    assert f"eval_prompts {path}: rouge needs the column 'reference'" in said
    assert not (tmp_path / "r").exists()


def _with_references(folder):
    path = folder / "train.jsonl"
    path.write_text('{"prompt": "Tom", "reference": "a kite"}\n')
    return path


def test_eval_takes_the_dtype_of_the_run(clp, monkeypatch, trained, tmp_path):
    """The adapters have learned on a base model that is rounded so."""
    copied, seen = tmp_path / "run", []
    shutil.copytree(trained, copied)
    config = replace(load_config(copied / "config.yaml"), dtype="bfloat16")
    (copied / "config.yaml").write_text(config.to_yaml())

    def look(policy, *args, **kwargs):
        seen.append(policy.model.dtype)
        raise ValueError("looked")

    monkeypatch.setattr("clp.evaluation.frontier.evaluate", look)
    for folder in (copied, copied / "checkpoint-000001"):
        clp("eval", folder, code=2)
    assert seen == [torch.bfloat16] * 2


def test_eval_says_that_it_takes_the_embedded_prompts(clp, trained, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    config = replace(load_config(copied / "config.yaml"), prompts="/mine.jsonl")
    (copied / "config.yaml").write_text(config.to_yaml())
    printed = clp("eval", copied, "--num-prompts", "1", "--max-tokens", "1")
    assert "prompts were /mine.jsonl; these are the embedded ones" in printed.err
    assert (
        "embedded ones" not in clp("eval", trained, "--num-prompts", "1", "--max-tokens", "1").err
    )
