"""The trainer: it learns, resumes exactly, survives kills and full disks, refuses bad input."""

import copy
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import tiny_runs
import torch
from tiny_runs import metrics

from clp.engine.requests import SamplingParams
from clp.evaluation.frontier import evaluate
from clp.policies.loading import load_base
from clp.policies.policy import Policy
from clp.rewards import brevity, sentiment
from clp.training import updates
from clp.training.checkpoint import checkpoints
from clp.training.config import CLPConfig, load_config
from clp.training.gradients import accumulate_gradients
from clp.training.losses import policy_loss
from clp.training.run_folder import cut_lines
from clp.training.trainer import CLPTrainer
from clp_kernels import registry
from clp_kernels.nn.mixed_lora import steered_layers

SMALL = {
    "num_prompts": 4, "num_generations": 3, "max_completion_length": 8, "max_steps": 6,
    "save_steps": 2, "r": 2, "warmup_steps": 2, "scale_rewards": "reference",
}  # fmt: skip
config = partial(tiny_runs.config, **SMALL)
# Of tests in which nothing depends on the scale: its measurement costs as much as six steps.
unscaled = partial(config, scale_rewards="none")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    CLPTrainer(args=config(folder)).train()
    return folder


def test_metrics_have_trls_names(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert set(rows[0]) == {
        "step", "loss", "grad_norm", "learning_rate", "skipped_steps", "reward", "reward_std",
        "frac_reward_zero_std", "kl", "entropy", "completions/mean_length",
        "completions/min_length", "completions/max_length", "completions/clipped_ratio",
        "completions/mean_terminated_length", "completions/min_terminated_length",
        "completions/max_terminated_length", "num_tokens",
        "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
        "rewards/joy/mean", "rewards/joy/std", "rewards/brief/mean", "rewards/brief/std",
        "reward_weights/joy", "reward_weights/brief",
        "reward_weights/joy/std", "reward_weights/brief/std",
    }  # fmt: skip
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > 0
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3


def test_the_run_folder_holds_policy_checkpoints_and_config(whole):
    assert sorted(p.name for p in whole.iterdir()) == [
        ".lock", "adapters", "checkpoint-000004", "checkpoint-000006", "clp.json", "config.yaml",
        "metrics.jsonl", "run.json",
    ]  # fmt: skip
    final, last = Policy.load(whole), Policy.load(whole / "checkpoint-000006")
    pairs = zip(*(p.trainable_parameters().values() for p in (final, last)), strict=True)
    for a, b in pairs:
        assert torch.equal(a, b)
        assert a.abs().sum().item() > 0


def test_two_runs_are_bitwise_the_same(tmp_path, set_threads):
    """On two threads, where sums may be made in another order; other tests run on one."""
    set_threads(2)
    for name in ("a", "b"):
        CLPTrainer(args=config(tmp_path / name)).train()
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


LESS_MEMORY = [({"micro_batch_size": 3}, 1e-3), ({"gradient_checkpointing": True}, 1e-4)]


@pytest.mark.parametrize(("changes", "limit"), LESS_MEMORY)
def test_less_memory_gives_the_same_training(whole, tmp_path, changes, limit):
    CLPTrainer(args=config(tmp_path / "b", **changes)).train()
    for a, b in zip(metrics(whole), metrics(tmp_path / "b"), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], abs=limit)


@pytest.mark.slow
@pytest.mark.parametrize(
    "which, steps, tokens, limit", [("mixed", 32, 8, 1e-5), ("all", 20, 16, 1e-4)]
)
def test_kernels_on_and_off_give_the_same_loss_curve(
    which, steps, tokens, limit, shared_models, tmp_path, monkeypatch
):
    """A real pretrained model, small enough that no draw is closer than rounding. The mixed ops
    alone, the head's being the reference's in both runs, and all kernels. The loss sums over the
    tokens of a completion, and so does its rounding."""
    if which == "mixed":
        for op in ("linear_logprob", "linear_logprob_backward"):
            monkeypatch.setitem(registry.BACKENDS, op, registry.BACKENDS[op][-1:])
    runs = {}
    for backend in ("auto", "reference"):
        monkeypatch.setenv("CLP_KERNELS_BACKEND", backend)
        args = CLPConfig(
            output_dir=str(tmp_path / backend), model=str(shared_models / "stories260k"),
            num_prompts=8, max_completion_length=tokens, max_steps=steps,
        )  # fmt: skip
        CLPTrainer(args=args).train()
        runs[backend] = metrics(tmp_path / backend)
    assert len(runs["auto"]) == steps
    for on, off in zip(runs["auto"], runs["reference"], strict=True):
        assert on["num_tokens"] == off["num_tokens"]
        assert on["loss"] == pytest.approx(off["loss"], rel=limit, abs=limit)
        assert on["kl"] == pytest.approx(off["kl"], abs=limit)


def train_until(trainer, count):
    """Trains until as many steps are done, and is interrupted."""
    real, done = trainer.train_step, []

    def stopping():
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(1)
        return real()

    trainer.train_step = stopping
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resume_from_a_checkpoint_is_bitwise_the_uninterrupted_run(whole, tmp_path, stop_after):
    """Stops between checkpoints: the steps after the last one are repeated."""
    folder = tmp_path / "cut"
    trainer = CLPTrainer(args=config(folder))
    train_until(trainer, stop_after)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    CLPTrainer(args=config(folder, resume=True)).train()
    assert metrics(folder) == metrics(whole)


# Runs the command line in a child of its own for each line that it reads, and prints the child's
# number and, when it has ended, its status: the children share the imports.
FORKS = """
import os, sys
from clp import cli
import clp.training.trainer
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        cli.main()
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_kill_9_at_any_moment_then_resume(whole, tmp_path):
    """A real process, killed twice; every step saves, so a kill may fall into a save."""
    folder = tmp_path / "killed"
    options = ["train", "--output-dir", str(folder), "--resume", "--save-steps", "1"]
    for name, value in SMALL.items():
        if name != "save_steps":
            options += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-c", FORKS, *options]
    watch = folder / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:

        def told():
            while not (line := process.stdout.readline()).strip().removeprefix("-").isdigit():
                assert line, "the process has ended"  # what the command prints is passed over
            return int(line)

        for lines in (1, 4):
            process.stdin.write("\n")
            process.stdin.flush()
            pid = told()
            while not watch.exists() or watch.read_bytes().count(b"\n") < lines:
                os.kill(pid, 0)  # it is there
                time.sleep(0.005)
            # Another moment of the step or of its checkpoint each time.
            time.sleep(0.01 * lines)
            os.kill(pid, signal.SIGKILL)
            assert told() == -signal.SIGKILL
            for checkpoint in checkpoints(folder):
                Policy.load(checkpoint)
        process.stdin.write("\n")
        process.stdin.flush()
        told()
        assert told() == 0
    assert metrics(folder) == metrics(whole)


def test_resume_without_a_run_starts_one_and_a_finished_run_stays(tmp_path):
    folder = tmp_path / "new"
    CLPTrainer(args=unscaled(folder, resume=True, max_steps=2)).train()
    before = metrics(folder)
    CLPTrainer(args=unscaled(folder, resume=True, max_steps=2)).train()
    assert metrics(folder) == before


def test_resume_of_another_configuration_is_refused(whole):
    with pytest.raises(ValueError, match=r"run with alpha=0\.\d+; resume asks for 0.77"):
        CLPTrainer(args=config(whole, resume=True, alpha=0.77))


def broken(monkeypatch, trainer, bad_steps, value=float("nan")):
    """Makes the gradient of one parameter wrong in these steps (from 1)."""

    def accumulate(*args):
        result = accumulate_gradients(*args)
        if trainer.step + 1 in bad_steps:
            next(iter(trainer.parameters.values())).grad.view(-1)[0] = value
        return result

    monkeypatch.setattr(updates, "accumulate_gradients", accumulate)
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(tmp_path, value, monkeypatch):
    trainer = broken(monkeypatch, CLPTrainer(args=unscaled(tmp_path / "r")), {2, 3}, value)
    trainer.train_step()
    parameters = [p.clone() for p in trainer.parameters.values()]
    moments = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    counts = [trainer.train_step()["skipped_steps"] for _ in range(2)]
    assert counts == [1, 2] and trainer.progress.skipped_in_a_row == 2
    assert all(map(torch.equal, parameters, trainer.parameters.values()))
    after = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i][k], after[i][k]) for i in moments for k in moments[i])
    row = trainer.train_step()
    assert row["skipped_steps"] == 2 and trainer.progress.skipped_in_a_row == 0
    assert not all(map(torch.equal, parameters, trainer.parameters.values()))


def test_a_loss_that_is_not_finite_skips_the_step(tmp_path, monkeypatch):
    trainer = CLPTrainer(args=unscaled(tmp_path / "r"))

    def with_a_nan_loss(*args):
        return accumulate_gradients(*args)._replace(loss=float("nan"))

    monkeypatch.setattr(updates, "accumulate_gradients", with_a_nan_loss)
    before = [p.clone() for p in trainer.parameters.values()]
    assert trainer.train_step()["skipped_steps"] == 1
    assert all(map(torch.equal, before, trainer.parameters.values()))


def test_skipped_steps_are_resumed_exactly_and_their_metrics_are_json(tmp_path, monkeypatch):
    broken(monkeypatch, CLPTrainer(args=unscaled(tmp_path / "a")), {2, 3, 5}).train()
    train_until(broken(monkeypatch, CLPTrainer(args=unscaled(tmp_path / "b")), {2, 3, 5}), 4)
    broken(monkeypatch, CLPTrainer(args=unscaled(tmp_path / "b", resume=True)), {2, 3, 5}).train()
    rows = metrics(tmp_path / "a")
    assert metrics(tmp_path / "b") == rows
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 2, 3, 3]
    assert rows[1]["grad_norm"] is None and "NaN" not in (tmp_path / "a/metrics.jsonl").read_text()


def test_many_skipped_steps_in_a_row_end_the_run_and_name_the_checkpoint(tmp_path, monkeypatch):
    args = config(tmp_path / "r", max_steps=30, num_prompts=1, num_generations=2)
    trainer = broken(monkeypatch, CLPTrainer(args=args), set(range(4, 31)))
    with pytest.raises(FloatingPointError, match=r"10 steps in a row.*step 13.*checkpoint-000012"):
        trainer.train()
    assert len(metrics(tmp_path / "r")) == 13
    Policy.load(tmp_path / "r/checkpoint-000012")


def test_seeds_of_any_size(tmp_path):
    rows = []
    for seed in (2**70, 2**70 + 1, 2**70 + 2**64):
        trainer = CLPTrainer(args=unscaled(tmp_path / str(seed), seed=seed, max_steps=1))
        rows.append(trainer.train_step()["reward"])
    assert len(set(rows)) == 3


def test_the_metrics_of_a_run_are_cut_at_newlines_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    deep = "[" * 200_000
    lines = ['{"step": 1, "a": "x\u2028y"}', "5", "[1]", deep, '{"a": 1}', '{"step": 2}']
    lines.append('{"step": 3}')
    path.write_text("\n".join(lines) + '\n{"step": 2, "lo')
    cut_lines(path, 2)
    assert path.read_text() == '{"step": 1, "a": "x\u2028y"}\n{"step": 2}\n'


@pytest.mark.parametrize("mark", ["config.yaml", "metrics.jsonl", "clp.json"])
def test_a_folder_that_holds_another_run_is_refused_and_untouched(tmp_path, mark):
    (tmp_path / mark).write_text("precious")
    with pytest.raises(ValueError, match=f"holds another run \\({mark}"):
        CLPTrainer(args=config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [mark]
    assert (tmp_path / mark).read_text() == "precious"


def test_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="not a folder"):
        CLPTrainer(args=config(tmp_path / "f"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The kernel refuses to write more than 20 kB to a file: a checkpoint cannot be completed."""
    folder = tmp_path / "full"
    trainer = CLPTrainer(args=unscaled(folder))
    trainer.train_step()
    trainer.train_step()
    trainer.save()
    trainer.train_step()
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # as Python starts
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-000002"]
    assert not [p for p in folder.iterdir() if "partial" in p.name]
    Policy.load(folder / "checkpoint-000002")


def test_built_in_functions_given_in_python_are_named_in_the_files(tmp_path):
    def own(completions, **columns):
        return [float(len(c)) for c in completions]

    for functions, specs, known in (
        ({"joy": sentiment, "brief": brevity}, ["joy=sentiment", "brief=brevity"], True),
        ({"joy": sentiment, "own": own}, ["joy=sentiment", "own"], False),
    ):
        folder = tmp_path / specs[1]
        policy = CLPTrainer(reward_funcs=functions, args=unscaled(folder, max_steps=1)).train()
        assert load_config(folder / "config.yaml").rewards == specs
        assert policy.rewards == (tuple(specs) if known else ())


def test_the_estimates_of_kls_gradient_differ_in_training_and_each_resumes(tmp_path):
    """They agree in the first step, in which the policy is its reference."""
    found = {}
    for how in ("exact", "tokens", "sequence"):
        options = {"kl_gradient": how, "alpha": 0.5, "learning_rate": 0.05, "max_steps": 4}
        CLPTrainer(args=unscaled(tmp_path / how, **options)).train()
        found[how] = metrics(tmp_path / how)
        shutil.rmtree(tmp_path / how / "checkpoint-000004")
        CLPTrainer(args=CLPConfig.of_run(tmp_path / how)).train()
        assert metrics(tmp_path / how) == found[how]
    assert found["exact"][0]["kl"] == found["tokens"][0]["kl"] == 0
    losses = [found[how][3]["loss"] for how in found]
    assert len(set(losses)) == 3


def test_python_interface_with_functions_and_columns(tmp_path):
    seen = []

    def shout(prompts, completions, mood, **columns):
        seen.extend(mood)
        return [float("!" in c) for c in completions]

    prompts = {"m1": "Tom had a red kite.", "m2": "Mia was sad."}
    rows = [{"prompt": prompt, "mood": mood} for mood, prompt in prompts.items()]
    args = config(tmp_path / "p", max_steps=1, scale_rewards="none")
    policy = CLPTrainer("tiny", [shout, brevity], args, rows).train()
    assert policy.objectives == ("shout", "brevity")
    # The first six are those of the call before anything is sampled.
    assert seen[:6] == ["m1"] * 3 + ["m2"] * 3 and sorted(seen[6:]) == ["m1"] * 6 + ["m2"] * 6


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reward_funcs": [sentiment, sentiment]}, "distinct names, got 'sentiment' twice"),
        ({"reward_funcs": (f for f in [sentiment, sentiment])}, "distinct names"),
        ({"reward_funcs": ["org/a", "org/b"]}, "must be functions, got 'org/a'; specifications"),
        ({"reward_funcs": []}, "reward_funcs must have at least one function"),
        ({"reward_funcs": {}}, "reward_funcs must have at least one function"),
        ({"reward_funcs": {"a-b": sentiment}}, "identifier"),
        (
            {"reward_funcs": {"a": "sentiment"}},
            r"functions, got 'sentiment'; .* go into args\.rewards",
        ),
        ({"reward_funcs": "sentiment"}, r"functions, got 'sentiment'; .* go into args\.rewards"),
        ({"reward_funcs": [lambda completions: [0, 0]]}, "'<lambda>' cannot name an objective"),
        ({"reward_funcs": [partial(brevity), brevity]}, "distinct names, got .*mapping names them"),
        ({"train_dataset": []}, "holds no prompt"),
        ({"train_dataset": [{"text": "x"}]}, r"train_dataset\[0\]"),
        ({"model": "no/such/model"}, "neither a folder nor a hub name"),
    ],
)
def test_bad_arguments_leave_no_run_behind(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        CLPTrainer(args=config(tmp_path / "x"), **keywords)
    assert not (tmp_path / "x").exists()


def test_training_steers(tmp_path):
    """Fifteen steps at a high learning rate already separate the two ends."""
    trainer = CLPTrainer(
        args=config(
            tmp_path / "s", num_prompts=12, num_generations=4, max_steps=15,
            max_completion_length=24, learning_rate=1e-2, corner_probability=1.0, save_steps=15,
        )
    )  # fmt: skip
    trainer.train()
    params = SamplingParams(max_tokens=24)
    front, _ = evaluate(trainer.policy, trainer.reward_funcs, trainer.rows[:24], params=params)
    brief_end, joy_end = front.rewards[0], front.rewards[-1]
    assert front.weights[0] == [0, 1] and front.weights[-1] == [1, 0]
    assert joy_end[0] > brief_end[0] + 0.02
    assert brief_end[1] > joy_end[1] + 0.1
    assert front.hypervolume > 1.1 * front.base_hypervolume


def test_excluded_modules_carry_no_adapter(tmp_path):
    trainer = CLPTrainer(args=unscaled(tmp_path / "a", exclude_modules=["q_proj"]))
    assert any("k_proj" in name for name in trainer.parameters)
    assert not any("q_proj" in name for name in trainer.parameters)


def test_frozen_factors_are_saved_and_resumed(tmp_path):
    """LoRA-FA: the A factors stay as they are, and never have a gradient."""

    def frozen(folder, **changes):
        trainer = CLPTrainer(args=tiny_runs.config(folder, **changes))
        for name, parameter in trainer.parameters.items():
            parameter.requires_grad_("lora_A" not in name)
        return trainer

    frozen(tmp_path / "a").train()
    train_until(frozen(tmp_path / "b"), 2)
    frozen(tmp_path / "b", resume=True).train()
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")


def test_a_tower_that_no_prompt_reaches_is_saved_and_resumed(tmp_path, monkeypatch):
    """As the vision tower of a model that gets texts."""

    def towered(*args, **kwargs):
        model, tokenizer = load_base(*args, **kwargs)
        torch.manual_seed(0)
        model.tower = torch.nn.Linear(8, 8)
        return model.requires_grad_(False), tokenizer

    monkeypatch.setattr("clp.policies.policy.load_base", towered)
    CLPTrainer(args=tiny_runs.config(tmp_path / "a")).train()
    assert "tower" in steered_layers(Policy.load(tmp_path / "a").model)
    train_until(CLPTrainer(args=tiny_runs.config(tmp_path / "b")), 2)
    CLPTrainer(args=tiny_runs.config(tmp_path / "b", resume=True)).train()
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")


def test_one_bad_micro_batch_of_several_skips_the_whole_step(tmp_path, monkeypatch):
    real, calls = policy_loss, []

    def loss(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 1 else 1)

    monkeypatch.setattr("clp.training.gradients.policy_loss", loss)
    trainer = CLPTrainer(args=tiny_runs.config(tmp_path / "r", micro_batch_size=2))
    before = [p.clone() for p in trainer.parameters.values()]
    assert trainer.train_step()["skipped_steps"] == 1 and len(calls) == 2
    assert all(map(torch.equal, before, trainer.parameters.values()))
    assert trainer.train_step()["skipped_steps"] == 1


def test_a_policy_whose_logits_diverge_ends_the_run_and_names_the_checkpoint(tmp_path):
    """With such a learning rate the sampler is the first to see what is not finite."""
    changes = {"learning_rate": 1e30, "warmup_steps": 0, "max_steps": 30, "save_steps": 1}
    trainer = CLPTrainer(args=tiny_runs.config(tmp_path / "r", **changes))
    with pytest.raises(FloatingPointError, match=r"not finite.*checkpoint-\d+.*learning_rate"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.parameters.values())
