"""Prompts that are too long are found before a training begins."""

import json
import os

import pytest
from tiny_runs import config

from clp.data.conversation import encode_prompt
from clp.engine.sampler import Sampler
from clp.policies.loading import load_base
from clp.policies.policy import Policy
from clp.training.config import CLPConfig
from clp.training.prompt_lengths import fitting_rows
from clp.training.trainer import CLPTrainer

LONG = "Tom had a red kite. " * 200


@pytest.fixture(scope="module")
def policy():
    return Policy.create("tiny", ["joy", "brief"], r=2)


@pytest.fixture(scope="module")
def length(policy):
    return lambda text: len(policy.tokenizer(text)["input_ids"])


def write(path, *prompts):
    """With a blank line between the prompts."""
    path.write_text("\n\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    return str(path)


def test_a_prompt_that_is_too_long_is_named_by_file_and_line(tmp_path):
    path = write(tmp_path / "p.jsonl", "Tom had a kite", LONG, "Mia was sad", LONG + "More")
    args = config(tmp_path / "r", prompts=path, max_steps=1)
    message = r"p\.jsonl:3: the prompt has \d+ tokens, at most \d+ fit .* 2 of 4 prompts"
    with pytest.raises(ValueError, match=message):
        CLPTrainer(args=args)
    assert not (tmp_path / "r").exists()


def test_a_token_that_the_model_does_not_have_is_named_by_file_and_line(tmp_path):
    """A tokenizer with an added token, whose model was not resized."""
    model, tokenizer = load_base("tiny")
    tokenizer.add_tokens(["<note>"], special_tokens=True)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    path = write(tmp_path / "p.jsonl", "Tom had a kite", "<note> Mia was sad", "Tom")
    args = config(tmp_path / "r", model=str(tmp_path / "base"), prompts=path, max_steps=1)
    with pytest.raises(ValueError, match=r"p\.jsonl:3: prompt must hold token ids from 0 to"):
        CLPTrainer(args=args)
    assert not (tmp_path / "r").exists()


def test_rows_given_in_python_are_named_by_index(tmp_path):
    args = config(tmp_path / "r", max_steps=1)
    with pytest.raises(ValueError, match=r"train_dataset\[1\]: the prompt has"):
        CLPTrainer(args=args, train_dataset=[{"prompt": "Tom"}, {"prompt": LONG}])


def test_max_prompt_length_leaves_out_and_says_how_many(tmp_path, capsys, length):
    short = ["Tom had a kite.", "Mia was sad."]
    limit = max(map(length, short))
    rows = [{"prompt": p} for p in (LONG, short[0], LONG, short[1], short[0] + " So")]
    args = config(tmp_path / "r", max_prompt_length=limit, max_steps=1)
    trainer = CLPTrainer(args=args, train_dataset=rows)
    assert f"left out 3 of 5 prompts: they have more than {limit} tokens" in capsys.readouterr().err
    assert [row["prompt"] for row in trainer.rows] == short
    trainer.train()
    # The prompts that were left out are part of what a resumed run is compared with.
    again = CLPConfig.of_run(tmp_path / "r", max_steps=2)
    trainer.lock.release()
    with pytest.raises(ValueError, match="other prompts"):
        CLPTrainer(args=again, train_dataset=[r for r in rows if r["prompt"] != LONG])
    CLPTrainer(args=again, train_dataset=rows).train()


def test_the_longest_prompt_that_fits_is_trained_on(tmp_path, policy, length):
    """One token more is refused, in the sampler too."""
    words = policy.context_length - 4 - length("Tom")
    fitting = "Tom" + " a" * words
    assert length(fitting) == policy.context_length - 4
    args = config(tmp_path / "r", max_steps=1)
    CLPTrainer(args=args, train_dataset=[{"prompt": fitting}]).train()
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: the prompt has"):
        fitting_rows([{"prompt": fitting + " a"}], policy, Sampler(policy), 4)


def test_a_prompt_that_does_not_fit_the_cache_is_refused(policy):
    rows = [{"prompt": "Tom"}, {"prompt": "Tom had a red kite. " * 10}]
    sampler = Sampler(policy, cache_gib=1e-4)
    with pytest.raises(ValueError, match=r"train_dataset\[1\]: .*cache"):
        fitting_rows(rows, policy, sampler, 4)
    assert sampler.unfinished == 0


def test_lengths_that_cannot_be_are_refused(policy, length, monkeypatch):
    sampler, rows = Sampler(policy), [{"prompt": "Tom"}, {"prompt": "Tom had"}]
    context = policy.context_length
    with pytest.raises(ValueError, match="max_completion_length leaves no room for a prompt"):
        fitting_rows(rows, policy, sampler, context)
    with pytest.raises(
        ValueError, match=f"^max_tokens leaves no room .* less max_tokens={context}"
    ):
        fitting_rows(rows, policy, None, context, setting="max_tokens")
    with pytest.raises(ValueError, match=f"max_prompt_length must be at most {context - 4}"):
        fitting_rows(rows, policy, sampler, 4, context - 3)
    with pytest.raises(ValueError, match="all 2 prompts have more than"):
        fitting_rows([{"prompt": LONG}] * 2, policy, sampler, 4, 3)
    for ids, message in (
        ([], "is empty: it has no tokens"),
        ([5, 1024], "from 0 to 1023, got 1024"),
    ):
        monkeypatch.setattr("clp.engine.requests.encode_prompt", lambda *args, ids=ids: ids)
        with pytest.raises(ValueError, match=rf"train_dataset\[0\]: prompt .*{message}"):
            fitting_rows(rows, policy, sampler, 4)
    assert sampler.unfinished == 0


def test_a_prompt_from_a_pipe_that_is_too_long_is_said(tmp_path):
    """As of `--prompts <(zcat p.jsonl.gz)`: what is read once cannot be read again for the line."""
    reader, writer = os.pipe()
    os.write(writer, json.dumps({"prompt": LONG}).encode() + b"\n")
    os.close(writer)
    try:
        args = config(tmp_path / "r", prompts=f"/dev/fd/{reader}", max_steps=1)
        with pytest.raises(ValueError, match=rf"/dev/fd/{reader}.*(tokens|pipe)"):
            CLPTrainer(args=args)
    finally:
        os.close(reader)
    assert not (tmp_path / "r").exists()


def test_what_a_chat_template_adds_counts(tmp_path, chat_model, capsys):
    """In a file with a byte order mark and the line ends of Windows."""
    fits = [{"role": "user", "content": "Tom had a kite."}]
    longer = [{"role": "system", "content": "Mia"}, *fits]
    path = tmp_path / "p.jsonl"
    lines = ["", *(json.dumps({"prompt": talk}) for talk in (fits, longer))]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    tokenizer = Policy.create(chat_model, ["joy"], r=1).tokenizer
    limit = len(encode_prompt(fits, tokenizer))
    assert limit > len(tokenizer("Tom had a kite.")["input_ids"])
    args = config(tmp_path / "r", prompts=str(path), max_prompt_length=limit, model=chat_model)
    assert [row["prompt"] for row in CLPTrainer(args=args).rows] == [fits]
    assert "left out 1 of 2 prompts" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"p\.jsonl:2: the prompt has"):
        CLPTrainer(args=config(tmp_path / "s", prompts=str(path), model=chat_model,
                               max_completion_length=256 - limit + 1))  # fmt: skip
