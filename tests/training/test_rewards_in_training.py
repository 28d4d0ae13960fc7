"""Training with reward functions of every kind that TRL takes, and the metrics of its names."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from tiny_runs import config, metrics, records

from clp.engine.requests import SamplingParams
from clp.evaluation.frontier import evaluate
from clp.rewards import brevity, sentiment
from clp.training.rollout import OPTIONAL, metric_names
from clp.training.trainer import CLPTrainer

ROWS = [{"prompt": "Tom had a red kite.", "gold": "red"}, {"prompt": "Mia was sad.", "gold": None}]


def make(folder, reward_funcs, rows=ROWS, model="tiny", **changes):
    longer = {"num_generations": 3, "max_completion_length": 8, "max_steps": 2, "save_steps": 1}
    return CLPTrainer(model, reward_funcs, config(folder, **(longer | changes)), rows)


def odd(value):
    def odd(prompts, completions, **columns):
        return value(completions)

    return odd


async def odd_exit(completions, **kwargs):
    await asyncio.gather(asyncio.to_thread(str), asyncio.create_task(odd_later_exit()))


async def odd_later_exit():
    raise SystemExit(4)


async def odd_later(completions, **kwargs):
    raise OSError("the judge is asleep")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (odd(lambda c: [float("nan")] * len(c)), ValueError),
        (odd(lambda c: ["1"] * len(c)), TypeError),
        (odd(lambda c: [1.0] * (len(c) - 1)), ValueError),
        (odd(lambda c: None), TypeError),
        (odd(lambda c: [1 / 0 for _ in c]), ZeroDivisionError),
        (lambda completions, mood: [0, 0], TypeError),
        (odd_exit, SystemExit),
        (odd_later, OSError),  # the event loop goes on after an exit
    ],
    ids=["nan", "text", "short", "none", "raises", "column", "async exit", "async"],
)
def test_a_wrong_reward_fails_by_name_before_anything_is_sampled(
    tmp_path, monkeypatch, function, error
):
    monkeypatch.setattr("clp.training.trainer.roll_out", lambda *args: pytest.fail("it sampled"))
    with pytest.raises(error, match="reward 'odd'"):  # in the message, or in its note
        make(tmp_path / "r", {"joy": sentiment, "odd": function})
    assert list(tmp_path.iterdir()) == []


def test_a_reward_that_fails_later_teaches_nothing(tmp_path):
    calls = []

    def odd(completions, **kwargs):
        calls.append(len(completions))
        return [1.0] * (len(completions) if len(calls) == 1 else 0)

    trainer = make(tmp_path / "r", [sentiment, odd])
    before = [p.clone() for p in trainer.parameters.values()]
    with pytest.raises(ValueError, match="reward 'odd' must return a list of 6 numbers, got 0"):
        trainer.train()
    assert calls == [6, 6]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters.values(), strict=True))
    assert (tmp_path / "r/metrics.jsonl").read_text() == ""


def test_a_reward_may_compare_the_completions_of_a_group(tmp_path):
    """A usual idiom in TRL: every call has whole groups of num_generations, in order."""
    seen = []

    def unlike_the_group(prompts, completions, **kwargs):
        for i in range(0, len(prompts), 3):
            seen.append(len(set(prompts[i : i + 3])))
        lengths = torch.tensor([float(len(text)) for text in completions]).view(-1, 3)
        return (lengths - lengths.mean(1, keepdim=True)).abs().flatten()

    make(tmp_path / "r", [sentiment, unlike_the_group], scale_rewards="reference").train()
    assert set(seen) == {1} and len(seen) > 512 // 3


def test_a_model_is_no_function(tmp_path):
    from clp.policies.loading import load_base

    model, _ = load_base("tiny", torch.float32)
    with pytest.raises(ValueError, match=r"'judge' is a model; clp\.rewards\.classifier"):
        make(tmp_path / "r", {"judge": model})


def length(completion_ids, trainer_state, log_extra, log_metric):
    """A reward of token ids, which logs."""
    log_extra("ids", completion_ids)
    log_metric("length/first", len(completion_ids[0]))
    log_metric("length/done", trainer_state.global_step / trainer_state.max_steps)
    return [len(ids) / 8 for ids in completion_ids]


async def gold(completions, gold, trainer_state, **kwargs):
    """Does not apply to the second prompt."""
    seen = trainer_state.num_input_tokens_seen, len(trainer_state.log_history)
    assert (seen[0] > 0) is (seen[1] > 0) is (trainer_state.global_step > 0)
    await asyncio.sleep(0)
    return [
        None if name is None else float(name in text)
        for text, name in zip(completions, gold, strict=True)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    trainer = make(folder, [length, gold], max_steps=3)
    trainer.train()
    return folder, trainer


def test_what_functions_log_is_in_the_run_folder(run):
    folder, _ = run
    table = records(folder / "completions.jsonl")
    assert [row["step"] for row in table] == [1] * 6 + [2] * 6 + [3] * 6
    thirds = pytest.approx(1 / 3), pytest.approx(2 / 3)
    assert [row["length/done"] for row in metrics(folder)] == [0, *thirds]
    for step, row in enumerate(metrics(folder)):
        mine = table[6 * step : 6 * step + 6]
        lengths = [len(line["extra"]["length"]["ids"]) for line in mine]
        assert row["length/first"] == lengths[0]
        assert [line["rewards"]["length"] for line in mine] == [n / 8 for n in lengths]
        assert row["completions/mean_length"] == pytest.approx(sum(lengths) / 6)
        assert row["completions/min_length"] == min(lengths)
        assert row["completions/max_length"] == max(lengths)
        for line in mine:
            known = line["prompt"] == "Tom had a red kite."
            assert (line["rewards"]["gold"] is not None) is known
            assert sum(line["weights"].values()) == pytest.approx(1)


def test_metrics_follow_from_the_completions(run):
    """As TRL's: reward over the batch with Bessel's correction, None left out."""
    folder, trainer = run
    table = records(folder / "completions.jsonl")
    seen = 0
    for step, row in enumerate(records(folder / "metrics.jsonl")):
        wanted = metric_names(["length", "gold"]) - set(OPTIONAL)
        assert wanted == set(row) - {"length/first", "length/done"}
        mine = table[6 * step : 6 * step + 6]
        weighted = torch.tensor([
            sum(line["weights"][n] * (line["rewards"][n] or 0) for n in ("length", "gold"))
            for line in mine
        ])  # fmt: skip
        assert row["reward"] == pytest.approx(float(weighted.mean()), abs=1e-6)
        assert row["reward_std"] == pytest.approx(float(weighted.std()), abs=1e-6)
        equal = (weighted.view(2, 3).std(1) < 1e-8).float().mean()
        assert row["frac_reward_zero_std"] == pytest.approx(float(equal))
        known = torch.tensor([v for line in mine if (v := line["rewards"]["gold"]) is not None])
        assert row["rewards/gold/mean"] == pytest.approx(float(known.mean()))
        assert row["rewards/gold/std"] == pytest.approx(float(known.std()))
        prompts = trainer.policy.tokenizer([line["prompt"] for line in mine])["input_ids"]
        seen += sum(map(len, prompts)) + sum(len(line["extra"]["length"]["ids"]) for line in mine)
        assert row["num_tokens"] == seen
    assert trainer.state.num_input_tokens_seen == seen
    assert trainer.state.global_step == trainer.state.max_steps == 3
    assert trainer.state.log_history == records(folder / "metrics.jsonl")


def test_a_resumed_run_counts_and_logs_on(run, tmp_path):
    whole, _ = run
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    for path in [*folder.glob("checkpoint-000003"), folder / "adapters"]:
        shutil.rmtree(path)
    (folder / "clp.json").unlink()
    config = (folder / "config.yaml").read_text().replace(str(whole), str(folder))
    (folder / "config.yaml").write_text(config)
    trainer = make(folder, [length, gold], max_steps=3, resume=True)
    assert trainer.state.global_step == len(trainer.state.log_history) == 2
    trainer.train()
    assert records(folder / "completions.jsonl") == records(whole / "completions.jsonl")
    assert metrics(folder) == metrics(whole)


def test_an_objective_that_applies_to_no_completion_of_a_step(tmp_path):
    def never(completions, **kwargs):
        return [None] * len(completions)

    assert make(tmp_path / "one", brevity).policy.objectives == ("brevity",)
    make(tmp_path / "r", [sentiment, never], max_steps=1).train()
    [row] = records(tmp_path / "r/metrics.jsonl")
    assert row["rewards/never/mean"] is None and row["rewards/never/std"] is None
    assert not (tmp_path / "r/completions.jsonl").exists()
    with pytest.raises(ValueError, match="returned None for row 0: prompt 'Tom had"):
        make(tmp_path / "s", {"one": never, "two": never})


def test_evaluation_leaves_out_what_does_not_apply(run):
    _, trainer = run
    sweep = {
        "params": SamplingParams(max_tokens=4), "trainer_state": trainer.state,
        "reference_point": [-1.0, -1.0],
    }  # fmt: skip
    front, samples = evaluate(trainer.policy, trainer.reward_funcs, ROWS, **sweep)
    for i, weights in enumerate(front.weights):
        first, second = samples[2 * i : 2 * i + 2]
        assert first["weights"] == pytest.approx(weights) and second["rewards"][1] is None
        assert front.rewards[i][1] == first["rewards"][1]
        assert first["rewards"][0] == len(first["extra"]["length"]["ids"]) / 8
    assert front.metrics["length/done"] == 1
    json.dumps(samples, allow_nan=False)
    with pytest.raises(ValueError, match=r"'gold' returned None for all 1 completions of weights "
                                         r"\[0\.0, 1\.0\]"):  # fmt: skip
        evaluate(trainer.policy, trainer.reward_funcs, ROWS[1:], **sweep)
    with pytest.raises(TypeError, match="reward 'gold' must"):
        evaluate(trainer.policy, {"length": length, "gold": odd(lambda c: None)}, ROWS, **sweep)


def conversations(rows):
    return [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]


def test_conversations(tmp_path, chat_model):
    """The model sees what the template makes of them, the rewards see messages."""
    seen = []

    def watch(prompts, completions, completion_ids, **kwargs):
        seen.append((prompts, completions, completion_ids))
        return [0.5] * len(prompts)

    rows = conversations(ROWS)
    trainer = make(tmp_path / "chat", [watch, brevity], rows, chat_model, max_steps=1)
    trainer.train()
    texts = [row | {"prompt": row["prompt"] + " Then"} for row in ROWS]
    make(tmp_path / "text", [watch, brevity], texts, chat_model, max_steps=1).train()
    (_, chat, _, text) = seen
    assert chat[2] == text[2]
    assert [c[0]["content"] for c in chat[1]] == text[1] and chat[1][0][0]["role"] == "assistant"
    assert chat[0][0] in [row["prompt"] for row in rows]
    assert metrics(tmp_path / "chat")[0] == metrics(tmp_path / "text")[0]
    params = SamplingParams(max_tokens=4)
    front, samples = evaluate(trainer.policy, trainer.reward_funcs, rows, params=params)
    assert samples[0]["prompt"] == rows[0]["prompt"] and front.prompts == 2


def test_conversations_without_a_template_leave_no_folder(tmp_path):
    message = r"train_dataset\[0\]: prompt is a conversation, .* no chat t"
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "r", [brevity], conversations(ROWS))
    assert list(tmp_path.iterdir()) == []


def test_an_async_reward_that_fails_at_the_second_step_is_repaired_and_resumed(tmp_path):
    """Beside one that is not async; what was trained before it stays."""
    fail = True

    async def judge(completions, trainer_state, **kwargs):
        await asyncio.sleep(0)
        if fail and trainer_state.global_step == 1:
            raise ConnectionError("the judge is away")
        return [len(text) / 9 for text in completions]

    with pytest.raises(ConnectionError) as caught:
        make(tmp_path / "cut", [sentiment, judge]).train()
    assert caught.value.__notes__ == ["raised by reward 'judge', called on 6 completions"]
    assert len(metrics(tmp_path / "cut")) == 1
    fail = False
    make(tmp_path / "cut", [sentiment, judge], resume=True).train()
    make(tmp_path / "whole", [sentiment, judge]).train()
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("scale", ["none", "batch", "group", "reference"])
def test_rewards_that_apply_to_every_other_completion_leave_all_finite(tmp_path, scale):
    def some(completions, **kwargs):
        return [None if i % 2 else float(len(text)) for i, text in enumerate(completions)]

    trainer = make(
        tmp_path / "r", [brevity, some], num_generations=2, max_steps=3, scale_rewards=scale
    )
    trainer.train()
    rows = metrics(tmp_path / "r")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0]
    assert all(p.isfinite().all() for p in trainer.parameters.values())
    assert all(row["rewards/some/mean"] is not None for row in rows)


def test_a_system_message_and_several_turns_reach_the_rewards(tmp_path, chat_model):
    talk = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tom?"},
        {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And Mia?"},
    ]  # fmt: skip
    seen = []

    def watch(prompts, completions, **kwargs):
        seen.append(prompts[0])
        return [float(len(c[0]["content"])) for c in completions]

    make(tmp_path / "r", {"watch": watch}, [{"prompt": talk}], chat_model, max_steps=1).train()
    assert seen == [talk, talk]
    wrong = [*talk[:3], {"role": "user", "content": [{"type": "text", "text": "And Mia?"}]}]
    with pytest.raises(ValueError, match=r'train_dataset\[0\]: "prompt": message 3 must be'):
        make(tmp_path / "s", {"watch": watch}, [{"prompt": wrong}], chat_model)


def test_rows_of_the_library_datasets(tmp_path):
    """Also with a format, which makes arrays of the numbers."""
    rows = datasets.Dataset.from_list([row | {"size": [1, 2]} for row in ROWS])

    def sized(completions, size, **kwargs):
        return [float(sum(one)) for one in size]

    make(tmp_path / "r", [sized, brevity], rows.with_format("torch"), max_steps=1).train()
    assert metrics(tmp_path / "r")[0]["rewards/sized/mean"] == 3
    make(tmp_path / "r", [sized, brevity], rows, max_steps=1, resume=True)


def test_the_page_on_metrics_has_them_all():
    page = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    named = re.findall(r"^\| `(.*?)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) == len(set(named))
    assert {name.replace("<objective>", "joy") for name in named} == metric_names(["joy"])
