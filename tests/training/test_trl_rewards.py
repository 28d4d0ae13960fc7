"""TRL's own reward functions, unchanged, in a training."""

import torch
from tiny_runs import config, metrics, records
from transformers import TrainerState
from trl import rewards as trl

from clp.data import scoring
from clp.data.scoring import RewardLog
from clp.training.trainer import CLPTrainer

FUNCTIONS = [
    trl.think_format_reward, trl.accuracy_reward, trl.reasoning_accuracy_reward,
    trl.get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4),
    trl.get_repetition_penalty_reward(ngram_size=2), trl.get_cosine_scaled_reward(max_len=10),
]  # fmt: skip
PROMPT = [{"role": "user", "content": "What is 1 + 1?"}]
TEXTS = [
    "<think>two</think>It is \\boxed{2}", "<think>three</think>It is \\boxed{3}",
    "It is \\boxed{2}", "nothing",
]  # fmt: skip
IDS = [[1, 2, 3, 4, 5], [1, 1, 1, 1, 1], list(range(6)), list(range(10))]
EMPTY = ""  # a solution that cannot be parsed


def test_their_values():
    log = RewardLog()
    matrix = scoring.score(
        {function.__name__: function for function in FUNCTIONS}, [PROMPT] * 4, TEXTS,
        {"solution": ["2", "2", EMPTY, "$2$"]}, completion_ids=IDS, trainer_state=TrainerState(),
        log=log,
    )  # fmt: skip
    nan = float("nan")
    wanted = torch.tensor([
        [1, 1, 1, -0.25, 0, 0.75],
        [1, 0, 0, -0.25, -0.75, -0.75],
        [0, nan, 0, -0.5, 0, nan],  # no thought at all is wrong, whatever the solution
        [0, 0, 0, -1, 0, -0.5],
    ])  # fmt: skip
    torch.testing.assert_close(matrix, wanted, equal_nan=True)
    own = {"solution", "gold_parsed", "answer_parsed"}
    assert {name: set(columns) for name, columns in log.extra.items()} == {
        "accuracy_reward": own, "reasoning_accuracy_reward": own,
    }  # fmt: skip
    assert log.extra_of(2)["accuracy_reward"]["gold_parsed"] == "[unparseable]"


def test_a_training_with_all_of_them(tmp_path, chat_model):
    args = config(tmp_path / "r", max_completion_length=8, max_steps=2)
    rows = [{"prompt": PROMPT, "solution": text} for text in ("2", EMPTY)]
    CLPTrainer(chat_model, FUNCTIONS, args, rows).train()
    rows, table = metrics(tmp_path / "r"), records(tmp_path / "r/completions.jsonl")
    assert len(rows) == 2 and len(table) == 8
    for row in rows:
        assert row["rewards/accuracy_reward/mean"] == 0  # of those whose solution can be parsed
        assert row["rewards/soft_overlong_punishment_reward/mean"] <= 0
        assert row["rewards/repetition_penalty_reward/mean"] <= 0
    for line in table:
        known = line["extra"]["accuracy_reward"]["solution"] != EMPTY
        assert (line["rewards"]["accuracy_reward"] is not None) is known
