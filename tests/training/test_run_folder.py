"""A run's folder: one training at a time, and a resumed run is the same run or refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import date
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers
from tiny_runs import ROWS, config, metrics, resumed

from clp.data.json_lines import parse_json
from clp.data.paths import TINY
from clp.data.prompts import TRAIN_PROMPTS
from clp.policies.loading import load_base
from clp.rewards import brevity, sentiment
from clp.training.config import CLPConfig
from clp.training.run_folder import Inputs, RunLock
from clp.training.trainer import CLPTrainer


def mood(prompts, completions, mood, **columns):
    return [float(value) for value in mood]


FUNCTIONS = {"tone": sentiment, "mood": mood}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the default rewards, and one of Python functions, each with its metrics."""
    root = tmp_path_factory.mktemp("finished")
    CLPTrainer(args=config(root / "specs")).train()
    CLPTrainer(reward_funcs=FUNCTIONS, args=config(root / "python"), train_dataset=ROWS).train()
    return root


@pytest.fixture
def stopped(finished, tmp_path):
    """Copies of the two runs, stopped at step 2."""
    shutil.copytree(finished, tmp_path / "runs")
    for name in ("specs", "python"):
        shutil.rmtree(tmp_path / "runs" / name / "checkpoint-000004")
        (tmp_path / "runs" / name / "clp.json").unlink()
    return tmp_path / "runs"


def test_reward_functions_in_another_order_go_to_their_own_adapters(finished, stopped):
    trainer = resumed(stopped / "python", dict(reversed(FUNCTIONS.items())), ROWS)
    assert list(trainer.reward_funcs) == list(trainer.policy.objectives) == ["tone", "mood"]
    trainer.train()
    assert metrics(stopped / "python") == metrics(finished / "python")


def test_rewards_in_another_order_go_to_their_own_adapters(finished, stopped):
    specs = ["brief=brevity", "joy=sentiment"]
    trainer = resumed(stopped / "specs", rewards=specs)
    assert list(trainer.reward_funcs) == ["joy", "brief"]
    trainer.train()
    assert metrics(stopped / "specs") == metrics(finished / "specs")
    assert CLPConfig.of_run(stopped / "specs").rewards == specs[::-1]


def test_built_in_functions_given_in_python_are_the_specifications(finished, stopped):
    resumed(stopped / "specs", {"brief": brevity, "joy": sentiment}).train()
    assert metrics(stopped / "specs") == metrics(finished / "specs")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["joy=sentiment", "short=brevity"],
         "run with the objectives joy, brief; resume gives joy, short"),
        (["joy=sentiment"], "run with the objectives joy, brief; resume gives joy"),
        (["joy=brevity", "brief=sentiment"],
         "run with sentiment as the reward of joy; resume gives brevity"),
        (["joy=sentiment", "brief=readability"],
         "run with brevity as the reward of brief; resume gives readability"),
    ],
)  # fmt: skip
def test_other_rewards_are_refused(stopped, specs, message):
    before = files(stopped)
    with pytest.raises(ValueError, match=message):
        resumed(stopped / "specs", rewards=specs)
    assert files(stopped) == before


def test_other_functions_are_refused(stopped):
    for name, message in (
        ("brevity", "objectives tone, mood; resume gives tone, brevity"),
        ("mood", "run with function:mood as the reward of mood; .* brevity"),
    ):
        with pytest.raises(ValueError, match=message):
            resumed(stopped / "python", {"tone": sentiment, name: brevity}, ROWS)


def test_prompts_are_compared_by_content(finished, stopped, tmp_path):
    changed = [ROWS[0] | {"mood": 9}, *ROWS[1:]]
    for rows in (changed, ROWS[::-1], ROWS[1:], [r | {"more": 1} for r in ROWS]):
        with pytest.raises(ValueError, match="other prompts"):
            resumed(stopped / "python", FUNCTIONS, rows)
    # From a file, with another order of the columns: the same content.
    lines = [json.dumps({"mood": r["mood"], "prompt": r["prompt"]}) + "\n" for r in ROWS]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    resumed(stopped / "python", FUNCTIONS, prompts=str(tmp_path / "p.jsonl")).train()
    assert metrics(stopped / "python") == metrics(finished / "python")
    # A file that changes under the same name.
    (tmp_path / "p.jsonl").write_text("".join(lines).replace("kites", "boats"))
    with pytest.raises(ValueError, match="other prompts"):
        resumed(stopped / "python", FUNCTIONS)


def test_a_base_model_that_has_moved_is_named(tmp_path):
    model, tokenizer = load_base("tiny")
    for saved in (tokenizer, model):
        saved.save_pretrained(tmp_path / "base")
    CLPTrainer(args=config(tmp_path / "r", model=str(tmp_path / "base"), max_steps=1)).train()
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"neither a folder .* model \(--model\) says where it is"):
        resumed(tmp_path / "r", max_steps=2)
    resumed(tmp_path / "r", max_steps=2, model=str(tmp_path / "moved")).train()
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]
    assert json.loads((tmp_path / "r/clp.json").read_text())["base_model"].endswith("moved")


def test_a_base_model_that_has_changed_is_refused(tmp_path):
    """In the same folder, by less than the adapters' own start would show."""
    model, tokenizer = load_base("tiny")
    tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    args = config(tmp_path / "r", model=str(tmp_path / "base"), max_steps=1)
    CLPTrainer(args=args).train()
    before = files(tmp_path / "r")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="was run with another base model: its parameters"):
        resumed(tmp_path / "r", max_steps=2)
    assert files(tmp_path / "r") == before


def test_another_function_that_draws_the_weights_is_refused(tmp_path):
    def even(count, generator):
        return torch.full((count, 2), 0.5)

    def corner(count, generator):
        return torch.tensor([[1.0, 0.0]]).repeat(count, 1)

    CLPTrainer(args=config(tmp_path / "r"), draw_weights=even).lock.release()
    args = CLPConfig.of_run(tmp_path / "r")
    CLPTrainer(args=args, draw_weights=even).lock.release()
    with pytest.raises(ValueError, match=r"even as draw_weights; resume gives .*corner"):
        CLPTrainer(args=args, draw_weights=corner)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", '"rope_theta": 10000.0', '"rope_theta": 500.0', "rope_parameters of its"),
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5', "rms_norm_eps of its conf"),
        ("generation_config.json", '"eos_token_id": 2', '"eos_token_id": [2, 5]', "other ids, or"),
        ("tokenizer.json", '"he": 2', '"eh": 2', "other ids, or"),
        ("tokenizer_config.json", "{", '{"chat_template": "{{ messages[0].content }}.",', None),
    ],
)
def test_a_base_model_of_other_files_is_refused(tmp_path, file, old, new, message):
    """A chat template counts if a prompt is a conversation."""
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.jsonl"))
    args = config(tmp_path / "r", model=str(tmp_path / "base"), max_steps=1)
    CLPTrainer(args=args).train()
    path = tmp_path / "base" / file
    if file == "tokenizer.json":
        vocabulary = json.loads(path.read_text())["model"]["vocab"]
        a, b = [token for token, i in vocabulary.items() if i in (300, 301)]
        old, new = f'"{a}": 300', f'"{b}": 300'
    text = path.read_text()
    flat = text if old in text else json.dumps(json.loads(text))
    assert old in flat
    changed = flat.replace(old, new, 1)
    if file == "tokenizer.json":
        changed = changed.replace(f'"{b}": 301', f'"{a}": 301', 1)
    path.write_text(changed)
    if message is None:
        resumed(tmp_path / "r", max_steps=2)
        return
    with pytest.raises(ValueError, match=message):
        resumed(tmp_path / "r", max_steps=2)


def test_a_chat_template_that_has_changed_is_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.jsonl"))
    path = tmp_path / "base/tokenizer_config.json"
    given = json.loads(path.read_text())
    rows = [{"prompt": [{"role": "user", "content": "Mia"}]}]
    for template, fails in (("{{ messages[0].content }}", False), ("{{ messages[0].role }}", True)):
        path.write_text(json.dumps(given | {"chat_template": template}))
        if not fails:
            args = config(tmp_path / "r", model=str(tmp_path / "base"), max_steps=1)
            CLPTrainer(args=args, train_dataset=rows).train()
            continue
        with pytest.raises(ValueError, match="another tokenizer, chat template or end tokens"):
            CLPTrainer(args=CLPConfig.of_run(tmp_path / "r", max_steps=2), train_dataset=rows)


def classifier_folder(folder):
    """A small sequence classifier with the embedded model's tokenizer."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = transformers.BertConfig(
        vocab_size=1024, intermediate_size=8, pad_token_id=0, **sizes
    )
    transformers.BertForSequenceClassification(settings).save_pretrained(folder)
    load_base("tiny")[1].save_pretrained(folder)


def test_a_classifier_that_has_moved_is_found_there_from_then_on(tmp_path):
    classifier_folder(tmp_path / "clf")
    spec = f"joy=classifier:{tmp_path / 'clf'}#1"
    CLPTrainer(args=config(tmp_path / "r", rewards=["brief=brevity", spec], max_steps=1)).train()
    (tmp_path / "clf").rename(tmp_path / "new")
    moved = [f"joy=classifier:{tmp_path / 'new'}#1", "brief=brevity"]
    resumed(tmp_path / "r", rewards=moved, max_steps=2).train()
    card = json.loads((tmp_path / "r/clp.json").read_text())
    assert card["rewards"] == moved[::-1] == CLPConfig.of_run(tmp_path / "r").rewards


@pytest.mark.parametrize("text", [b"caf\xe9".decode("utf-8", "surrogateescape"), "[" * 500])
def test_what_a_reward_logs_stays_when_a_run_is_resumed(tmp_path, text):
    """Values that a strict reader refuses: half a surrogate pair, deep nesting, huge integers."""
    deep = []
    for _ in text[:300]:
        deep = [deep]

    def logs(completions, log_extra, log_metric, **columns):
        log_extra("text", [text] * len(completions))
        log_extra("deep", [deep] * len(completions))
        log_extra("huge", [10**5000] * len(completions))
        return [float(len(text)) for text in completions]

    args = config(tmp_path / "r", max_steps=2)
    CLPTrainer(reward_funcs=logs, args=args, train_dataset=ROWS).train()
    table = tmp_path / "r/completions.jsonl"
    before = table.read_bytes()
    assert len(before.splitlines()) == 2 * 4
    for line in before.splitlines():
        parse_json(line)  # the strict reader
    resumed(tmp_path / "r", logs, ROWS).train()
    assert table.read_bytes() == before


def test_messages_with_their_keys_in_another_order_are_the_same_prompts():
    """As columns are: a file that is written again may have them so."""
    rows = [[{"prompt": [dict(pairs)]}] for pairs in (
        (("role", "user"), ("content", "Hi")), (("content", "Hi"), ("role", "user")),
        (("role", "system"), ("content", "Hi")),
    )]  # fmt: skip
    first, same, other = (Inputs.of({}, [], one) for one in rows)
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("one", "other"),
    [(Fraction(1, 2), Fraction(1, 3)), (date(2026, 1, 2), date(2026, 1, 3)), (b"x", b"y"),
     ({1, 2}, {1, 3})],
)  # fmt: skip
def test_values_of_columns_that_json_lacks_count(one, other):
    """Answers of mathematics are fractions, say."""
    first, same, second = (
        Inputs.of({}, [], [{"prompt": "a", "answer": value}]) for value in (one, one, other)
    )
    assert first == same
    assert first != second


def test_a_classifiers_files_are_part_of_the_reward(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1")
        (tmp_path / name / "config.json").write_bytes(b"{}")
        (tmp_path / name / "README.md").write_bytes(name.encode())

    def of(*specs):
        return Inputs.of({}, specs, ROWS).rewards

    first = of(f"x=classifier:{tmp_path / 'a'}#1", "brevity")
    assert re.fullmatch("classifier:[0-9a-f]{64}#1", first["x"]) and first["brevity"] == "brevity"
    assert of(f"x=classifier:{tmp_path / 'b'}#1", "brevity=brevity") == first
    assert of(f"x=classifier:{tmp_path / 'a'}#2") != of(f"x=classifier:{tmp_path / 'a'}#1")
    (tmp_path / "a/model.safetensors").write_bytes(b"2")
    assert of(f"x=classifier:{tmp_path / 'a'}#1", "brevity") != first


def test_values_that_json_lacks_do_not_stop_a_training():
    np = pytest.importorskip("numpy")
    rows = [{"prompt": "a", "x": object(), "y": np.arange(3), "z": {(1, 2): 3, None: {1}}}]
    same = [{"z": {None: {1}, (1, 2): 3}, "prompt": "a", "x": object(), "y": [0, 1, 2]}]
    assert Inputs.of({}, [], rows) == Inputs.of({}, [], same)
    assert Inputs.of({}, [], rows) != Inputs.of({}, [], [rows[0] | {"y": np.arange(1, 4)}])


def test_a_run_that_is_older_than_run_json_is_resumed_with_a_warning(finished, stopped):
    for name in ("specs", "python"):
        (stopped / name / "run.json").unlink()
    with pytest.warns(UserWarning, match=r"no run\.json"):
        resumed(stopped / "python", dict(reversed(FUNCTIONS.items())), ROWS).train()
    assert metrics(stopped / "python") == metrics(finished / "python")
    specs = stopped / "specs"
    for rewards, message in [
        (["joy=brevity", "brief=sentiment"], "run with sentiment as the reward of joy"),
        (["joy=sentiment", "short=brevity"], "objectives joy, brief; resume gives joy, short"),
    ]:
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
            resumed(specs, rewards=rewards)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="run with prompts=None"):
        resumed(specs, prompts=str(TRAIN_PROMPTS))


def test_max_steps_may_grow_and_nothing_is_lost(finished, stopped):
    specs = stopped / "specs"
    with pytest.raises(ValueError, match="max_steps=4; resume asks for 3, and max_steps may only"):
        resumed(specs, max_steps=3)
    resumed(specs).train()
    resumed(specs, max_steps=6, save_steps=3).train()
    rows = metrics(specs)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[:4] == metrics(finished / "specs")
    # A linear decay to zero over six steps, the first of which warms up.
    assert rows[4]["learning_rate"] == pytest.approx(2e-3 * (1 - 3 / 5))
    saved = CLPConfig.of_run(specs)
    assert (saved.max_steps, saved.save_steps) == (6, 3)


def test_what_changes_no_bit_may_change(finished, stopped):
    held = stopped / "held.jsonl"
    held.write_text('{"prompt": "Mia"}\n')
    free = {"eval_prompts": str(held), "save_steps": 1, "save_total_limit": 5, "device": "cpu"}
    resumed(stopped / "specs", gradient_checkpointing=True, **free).train()
    assert metrics(stopped / "specs") == metrics(finished / "specs")
    with pytest.raises(ValueError, match="micro_batch_size=128; resume asks for 2"):
        resumed(stopped / "specs", micro_batch_size=2)


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize(
    "changes",
    [{"model": "no/such/model"}, {"device": "nope"}, {"rewards": ["nope"]},
     {"prompts": "none.jsonl"}, {"target_modules": ["nope"]}],
)  # fmt: skip
def test_a_start_that_fails_leaves_the_folder_as_it_was(tmp_path, changes):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises((ValueError, RuntimeError)):
            CLPTrainer(args=config(folder, **changes))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    CLPTrainer(args=config(tmp_path))


def test_a_resume_that_fails_leaves_the_folder_free_and_as_it_was(stopped):
    before = files(stopped)
    shutil.move(stopped / "specs/checkpoint-000002/adapters/joy", stopped / "joy")
    for _ in range(2):  # and the lock is free again
        with pytest.raises(ValueError, match="joy"):
            resumed(stopped / "specs")
    shutil.move(stopped / "joy", stopped / "specs/checkpoint-000002/adapters/joy")
    assert files(stopped) == before


def test_a_disk_that_is_full_at_the_start_leaves_no_run(tmp_path, monkeypatch):
    real = os.replace
    for failing in ("run.json", "config.yaml"):

        def full(self, target, failing=failing):
            if Path(target).name == failing:
                raise OSError(28, "No space left on device")
            real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            with pytest.raises(OSError, match="No space"):
                CLPTrainer(args=config(tmp_path / "r"))
        assert not (tmp_path / "r/config.yaml").exists()
        assert not list((tmp_path / "r").glob("*.tmp")) + list((tmp_path / "r").glob(".*.tmp"))
    CLPTrainer(args=config(tmp_path / "r"))


def test_two_trainings_in_one_folder(tmp_path):
    first = CLPTrainer(args=config(tmp_path / "r", max_steps=1))
    refused = rf"in use by another training \(process {os.getpid()} on .* since 20"
    with pytest.raises(ValueError, match=refused):
        resumed(tmp_path / "r")
    first.train()
    second = resumed(tmp_path / "r", max_steps=2)
    with pytest.raises(ValueError, match="in use by another training"):
        first.train()
    second.train()
    with pytest.raises(ValueError, match="trained further, to checkpoint-000002"):
        first.train()
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]


def test_of_two_new_trainings_one_gets_the_folder(tmp_path, monkeypatch):
    """Both find it free, and load their models; the second to be ready is refused."""
    real = CLPTrainer.prepare
    won = []

    def prepare(self, *args):
        measured = real(self, *args)
        if not won:
            won.append(1)
            won.append(CLPTrainer(args=config(tmp_path / "r")))
        return measured

    monkeypatch.setattr(CLPTrainer, "prepare", prepare)
    with pytest.raises(ValueError, match="in use by another training"):
        CLPTrainer(args=config(tmp_path / "r"))
    won.pop().lock.release()
    with pytest.raises(ValueError, match="holds another run"):
        CLPTrainer(args=config(tmp_path / "r"))


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path):
    script = f"""
from pathlib import Path
from clp.training.run_folder import RunLock
lock = RunLock(Path({str(tmp_path)!r}))
lock.acquire()
print("locked", flush=True)
input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], **pipes)
    assert process.stdout.readline() == "locked\n"
    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        lock.acquire()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with lock:
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        with pytest.raises(ValueError, match="in use"):
            RunLock(tmp_path).acquire()
    RunLock(tmp_path).acquire()  # and with its object
    RunLock(tmp_path).acquire()
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"odd cannot be locked: .* directory"):
        RunLock(tmp_path / "odd").acquire()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "rewards": [1]}', "[" * 200_000]
)
def test_a_damaged_run_json_is_refused_by_name(stopped, text):
    (stopped / "specs/run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        resumed(stopped / "specs")


def test_another_name_of_the_folder_is_the_same_folder(tmp_path, monkeypatch):
    first = CLPTrainer(args=config(tmp_path / "r", max_steps=1))
    (tmp_path / "link").symlink_to("r")
    monkeypatch.chdir(tmp_path / "r")
    for name in (tmp_path / "link", ".", "../link"):
        with pytest.raises(ValueError, match="in use by another training"):
            resumed(name)
    first.train()
    resumed(".", max_steps=2).train()
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]


def test_a_lock_ends_with_its_process_though_a_child_lives_on(tmp_path):
    """Such as a worker of a pool that a reward function has forked."""
    script = f"""
import os, time
from pathlib import Path
from clp.training.run_folder import RunLock
lock = RunLock(Path({str(tmp_path)!r}))
lock.acquire()
child = os.fork()
if child == 0:
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_reward_that_fails_while_the_scale_is_measured_leaves_no_folder(tmp_path):
    def late(completions, **kwargs):
        if len(completions) > 4:
            raise ConnectionError("the judge is away")
        return [0.5] * len(completions)

    args = config(tmp_path / "new/er/r", scale_rewards="reference")
    with pytest.raises(ConnectionError) as caught:
        CLPTrainer(reward_funcs={"late": late}, args=args, train_dataset=ROWS)
    assert caught.value.__notes__ == ["raised by reward 'late', called on 512 completions"]
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_was_edited_by_hand_is_resumed(finished, stopped):
    """More steps and other spacing; the metrics of before stay."""
    path = stopped / "specs/config.yaml"
    text = path.read_text().replace("max_steps: 4", "max_steps:   6  # a little more")
    path.write_text(f"# mine\n\n{text}")
    resumed(stopped / "specs").train()
    rows = metrics(stopped / "specs")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[:2] == metrics(finished / "specs")[:2]


def test_a_training_whose_folder_was_deleted_leaves_the_next_one_alone(tmp_path):
    """`rm -r run` beside a forgotten training, whose lock is on a file that is gone."""
    first = CLPTrainer(args=config(tmp_path / "r", max_steps=1))
    shutil.rmtree(tmp_path / "r")
    second = CLPTrainer(args=config(tmp_path / "r", max_steps=2))
    with pytest.raises((ValueError, OSError)):
        first.train()
    second.train()
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]
    assert not (tmp_path / "r/checkpoint-000001").exists()
