"""The command line as its user sees it."""

import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import tiny_compare
import torch
from processes import python
from tiny_runs import SMALL, records

from clp import cli
from clp.data.paths import TINY
from clp.data.prompts import HELDOUT_PROMPTS
from clp.methods.registry import METHODS
from clp.policies.loading import torch_device
from clp.policies.policy import Policy
from clp.training.config import load_config


def test_train_with_a_file_and_options(clp, tmp_path):
    (tmp_path / "c.yaml").write_text("max_steps: 1\nr: 3\nalpha: 0.3\nseed: 5\n")
    options = ["--num-prompts", "2", "--num-generations", "2", "--max-completion-length", "4"]
    clp("train", "--config", tmp_path / "c.yaml", "--alpha", "0.4", *options,
        "--output-dir", tmp_path / "r")  # fmt: skip
    saved = (tmp_path / "r/config.yaml").read_text()
    assert "alpha: 0.4" in saved and "r: 3" in saved and "seed: 5" in saved


def test_resume_needs_the_folder_alone(clp, tmp_path):
    folder = tmp_path / "r"
    options = [*SMALL, "--alpha", "0.3", "--seed", "7", "--rewards", "brevity", "joy=sentiment"]
    clp("train", "--output-dir", folder, *options)
    first = (folder / "metrics.jsonl").read_text()
    folder = folder.rename(tmp_path / "moved")
    said = clp("train", "--output-dir", folder, "--resume")
    assert f"{folder} goes on from checkpoint-000001" in said.err
    assert (folder / "metrics.jsonl").read_text() == first
    clp("train", "--output-dir", folder, "--resume", "--max-steps", "2")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert lines[0] == first and len(lines) == 2
    saved = load_config(folder / "config.yaml")
    assert (saved.alpha, saved.seed, saved.max_steps) == (0.3, 7, 2)
    assert saved.rewards == ["brevity", "joy=sentiment"]
    # An option that is typed counts, even one that has its default.
    for option, message in [
        (["--alpha", "0.12"], "alpha=0.3; resume asks for 0.12"),
        (["--max-steps", "1"], "max_steps=2; resume asks for 1"),
        (["--rewards", "joy=brevity", "brevity=sentiment"], "as the reward of brevity"),
    ]:
        said = clp("train", "--output-dir", folder, "--resume", *option, code=2)
        assert message in said.err.splitlines()[-1]


def test_a_training_that_diverges_ends_with_one_line(clp, monkeypatch, tmp_path):
    diverge = Mock(side_effect=FloatingPointError("the last checkpoint is x"))
    monkeypatch.setattr("clp.training.trainer.CLPTrainer.train", diverge)
    said = clp("train", "--output-dir", tmp_path / "r", *SMALL, code=2)
    assert said.err.splitlines()[-1] == "clp train: error: the last checkpoint is x"


def test_sample_from_prompts(clp, trained):
    options = ["--weights", "joy=0.7,brief=0.3", "--seed", "1", "--max-tokens", "6"]
    said = clp("sample", trained, "Tom had a red kite.", "Mia was sad.", *options)
    lines = said.out.splitlines()
    assert lines[0].startswith("[joy=0.7,brief=0.3] Tom had a red kite.")
    assert lines[1].startswith("[joy=0.7,brief=0.3] Mia was sad.")


def test_none_turns_a_sampling_parameter_off(clp, trained):
    given = ["sample", trained, "Mia was sad.", "--weights", "joy=1,brief=0", "--seed", "1"]
    off = ["--stop", "None", "--stop-token-ids", "None", "--logprobs", "None", "--seed", "1"]
    assert clp(*given, "--max-tokens", "6", *off).out == clp(*given, "--max-tokens", "6").out
    # Without a bound on the tokens: as many as the context allows, and an end before them.
    assert clp(*given, "--max-tokens", "None", "--stop", "sad", ".").out.startswith("[joy=1,")


def test_sample_from_a_file_with_a_row_a_prompt(clp, trained, tmp_path):
    rows = [
        {"prompt": "Tom had a red kite.", "weights": [1, 0], "seed": 3},
        {"prompt": "Tom had a red kite.", "weights": {"brief": 1.0}, "max_tokens": 2},
        {"prompt": "Mia was sad."},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    clp("sample", trained, "--input", source, "--output", target, "--weights",
        "brief=1", "--n", "2", "--max-tokens", "5")  # fmt: skip
    lines = records(target)
    assert [line["prompt"] for line in lines] == [r["prompt"] for r in rows for _ in range(2)]
    assert [line["index"] for line in lines] == [0, 1] * 3
    assert all(len(line["token_ids"]) <= 2 for line in lines[2:4])
    assert all(len(line["token_ids"]) == len(line["logprobs"]) for line in lines)


def test_a_bad_line_ends_with_code_1_and_the_others_are_written(clp, trained, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Tom"}\n{"prompt": "Tom", "weight": [1, 0]}\n{"prompt": "Mia"}\n')
    argv = ["sample", trained, "--input", source, "--output", target, "--weights", "joy=1",
            "--max-tokens", "3", "--logprobs", "2", "--stop-token-ids", "7", "9", "--ignore-eos",
            "--cache-gib", "0.5"]  # fmt: skip
    for shown in ('see "error" in', "nothing to do"):  # the second run has the same lines
        error = clp(*argv, code=1).err
        assert "lines that failed: 1" in error and shown in error
        lines = records(target)
        assert [line["line"] for line in lines] == [1, 2, 3]
        assert "'weight'" in lines[1]["error"]
        assert all(len(pairs) in (2, 3) for pairs in lines[0]["top_logprobs"])
    options = json.loads((tmp_path / "out.jsonl.meta.json").read_text())["options"]
    assert options["stop_token_ids"] == [7, 9] and options["ignore_eos"] is True
    assert "another run: top_k was 0 and is 3" in clp(*argv, "--top-k", "3", code=2).err


def test_prompts_into_a_file(clp, trained, tmp_path):
    argv = ["sample", trained, "Tom", "Mia", "--weights", "joy=1", "--max-tokens", "3",
            "--output", tmp_path / "out.jsonl"]  # fmt: skip
    clp(*argv)
    lines = records(tmp_path / "out.jsonl")
    assert [(line["line"], line["prompt"]) for line in lines] == [(1, "Tom"), (2, "Mia")]
    clp(*argv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "joy=2"], "sum to 1"),
        (["--temperature", "-1"], "temperature must be"),
        (["--max-batch-size", "0"], "max_batch_size must be"),
        (["--cache-gib", "0"], "cache_gib must be"),
        (["--stop-token-ids", "99999999"], "stop_token_ids must be"),
        (["--max-tokens", "100000"], "exceeds the context"),
        (["--base-model", "/none"], "neither a folder nor"),
        (["Tom"], "give one of"),
        (["--interactive"], "give one of"),
    ],
)
def test_bad_options_of_a_file_run_write_nothing(clp, trained, tmp_path, options, message):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Tom"}\n')
    said = clp("sample", trained, *options, "--input", source, "--output", target, code=2)
    assert message in said.err
    assert list(tmp_path.iterdir()) == [source]


def test_ctrl_c_in_a_file_run_says_how_to_go_on(clp, monkeypatch, trained, tmp_path):
    monkeypatch.setattr("clp.engine.sampler.Sampler.step", Mock(side_effect=KeyboardInterrupt))
    argv = ["sample", trained, "Tom", "--weights", "joy=1", "--output", tmp_path / "out.jsonl"]
    assert "the same command goes on from here" in clp(*argv, code=130).err


@pytest.mark.parametrize("terminal", [True, False])
def test_the_prompt_loop_with_its_option_or_on_a_terminal(clp, monkeypatch, trained, terminal):
    lines = iter(["Tom", "/w", "/quit"])
    monkeypatch.setattr("clp.cli.sample.input", lambda shown: next(lines), raising=False)
    if terminal:
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    options = [] if terminal else ["--interactive"]
    said = clp("sample", trained, *options, "--weights", "joy=1", "--max-tokens", "3")
    shown = said.out.splitlines()
    assert shown[0].startswith("weights joy=1,brief=0;") and shown[-1] == "weights joy=1,brief=0"
    assert len(shown) == 3


def test_eval_writes_its_three_files(clp, trained):
    said = clp("eval", trained, "--num-prompts", "4")
    front = json.loads((trained / "frontier.json").read_text())
    assert len(front["weights"]) == len(front["rewards"]) == 11
    assert front["objectives"] == ["joy", "brief"]
    assert front["prompts"] == 4
    assert len(records(trained / "samples.jsonl")) == 12 * 4
    assert (trained / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "Spearman" in said.out and "joy 1.00 brief 0.00" in said.out


def test_eval_into_another_folder_says_how_it_was_made(clp, monkeypatch, trained, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom"}\n{"prompt": "Mia"}\n')
    monkeypatch.chdir(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in trained.iterdir()}
    clp("eval", trained, "--output-dir", "new/er", "--prompts", "p.jsonl",
        "--max-tokens", "3", "--temperature", "0.5", "--top-p", "0.9", "--seed", "7",
        "--rewards", "joy=diversity", "brief=brevity", "--reference-point", "2", "2")  # fmt: skip
    front = json.loads((tmp_path / "new/er/frontier.json").read_text())
    wanted = {
        "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7, "prompts": 2,
        "run": str(trained), "reward_specs": ["joy=diversity", "brief=brevity"],
        "prompts_file": str(tmp_path / "p.jsonl"), "hypervolume": 0.0, "base_hypervolume": 0.0,
    }  # fmt: skip
    assert {name: front[name] for name in wanted} == wanted
    assert len(list((tmp_path / "new/er").iterdir())) == 3
    assert {p.name: p.stat().st_mtime_ns for p in trained.iterdir()} == before


def test_what_a_run_names_is_found_from_elsewhere(clp, monkeypatch, tmp_path):
    """A model, prompts and a configuration that are given relative to the working folder."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    shutil.copytree(TINY, tmp_path / "here/models/tiny")
    for name in ("p.jsonl", "e.jsonl"):
        (tmp_path / "here" / name).write_text('{"prompt": "Tom"}\n')
    (tmp_path / "here/c.yaml").write_text("r: 1\n")
    monkeypatch.chdir(tmp_path / "here")
    clp("train", *SMALL, "--config=c.yaml", "--model", "models/tiny", "--prompts",
        "p.jsonl", "--eval-prompts", "e.jsonl", "--output-dir", "run")  # fmt: skip
    model = str(tmp_path / "here/models/tiny")
    assert json.loads((tmp_path / "here/run/clp.json").read_text())["base_model"] == model
    adapter = json.loads((tmp_path / "here/run/adapters/joy/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == model
    monkeypatch.chdir(tmp_path / "there")
    clp("eval", "../here/run", "--max-tokens", "2")
    clp("sample", "../here/run", "Tom", "--weights", "joy=1", "--max-tokens", "2")
    clp("export", "../here/run", "out", "--weights", "joy=1")
    monkeypatch.chdir(tmp_path / "here")
    clp("train", *SMALL, "--config", "c.yaml", "--model", "./models/tiny", "--prompts",
        "p.jsonl", "--eval-prompts", "e.jsonl", "--output-dir", "run", "--resume")  # fmt: skip


def test_a_model_that_has_moved_is_named_again(clp, refused, trained, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    card = json.loads((copied / "clp.json").read_text())
    (copied / "clp.json").write_text(json.dumps(card | {"base_model": "/gone/away"}))
    argv = ["sample", copied, "Tom", "--weights", "joy=1", "--max-tokens", "2"]
    assert "if it has moved, base_model (--base-model)" in refused(*argv)
    clp(*argv, "--base-model", TINY)


def test_a_run_that_has_not_ended_has_checkpoints(refused, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/clp.json").unlink()
    error = refused("sample", tmp_path / "run", "Hi", "--weights", "joy=1")
    assert error.endswith("clp.json is missing; the training has not ended: name one of its "
                          "checkpoints\n")  # fmt: skip


def test_export_writes_a_peft_folder(clp, trained, tmp_path):
    said = clp("export", trained, tmp_path / "one", "--weights", "joy=0.5,brief=0.5")
    assert json.loads((tmp_path / "one/adapter_config.json").read_text())["r"] == 4
    assert (tmp_path / "one/adapter_model.safetensors").is_file()
    assert "rank 4" in said.out


def test_info_prints_the_backends(clp):
    assert "mixed_lora" in clp("info").out


def test_help_lists_the_commands(clp):
    out = clp("--help").out
    assert all(f"clp {name}" in out for name in [*cli.COMMANDS, "--version"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "unknown command 'fly'"),
        (["train", "--config"], "--config needs the path"),
        (["train", "--config", "none.yaml"], "none.yaml cannot be read"),
        (["train", "--prompts", "no.jsonl", "--output-dir", "{tmp}"], "no.jsonl cannot be read"),
        (["train", "--rewards", "sentimant", "--output-dir", "{tmp}"], "sentiment"),
        (["train", "--output-dir", "{run}"], "holds another run"),
        (["train", "--alpha", "2", "--output-dir", "{tmp}"], "alpha"),
        (["sample", "{run}", "Hi"], "have no weights"),
        (["sample", "{run}", "--weights", "joy=1"], "or --interactive"),
        (["sample", "{run}", "--output", "{tmp}"], "give prompts, or a file of them with --input"),
        (["sample", "{run}", "--interactive", "--output", "{tmp}"], "not with --interactive"),
        (["sample", "{run}", "--input", "none.jsonl", "--weights", "joy=1"], "cannot be read"),
        (["sample", "{run}", "Hi", "--weights", "joi=1"], "unknown objective 'joi'"),
        (["sample", "{run}", "Hi", "--weights", "0.2,0.3,0.5"], "2 entries"),
        (["sample", "{tmp}", "Hi", "--weights", "joy=1"], "clp.json is missing"),
        (["eval", "{run}", "--rewards", "sentiment"], "rewards must be those of"),
        (["eval", "{run}", "--rewards"], "rewards is empty"),
        (["eval", "{run}", "--num-prompts", "0"], "num_prompts must be at least 1, got 0"),
        (["eval", "{run}", "--num-prompts", "-1"], "num_prompts must be at least 1, got -1"),
        (["eval", "{run}", "--max-tokens", "0"], "max_tokens must be"),
        (["eval", "{run}", "--max-batch-size", "0"], "max_batch_size must be at least 1"),
        (["eval", "{run}", "--temperature", "nan"], "temperature must be"),
        (["eval", "{run}", "--reference-point", "1"], "must have 2 entries"),
        (["eval", "{run}", "--reference-point", "nan", "0"], "must be finite"),
        (["eval", "{run}", "--output-dir", "{run}/config.yaml"], "config.yaml is a file"),
        (["eval", "{run}", "--output-dir", ""], "a path is empty"),
        (["eval", "{run}", "--device", "nope"], 'device must be "auto", "cpu"'),
        (["eval", "{run}", "--device", "xpu:3"], "device 'xpu:3' is not here"),
        (["train", "--device", "nope", "--output-dir", "{tmp}"], "device must be"),
        (["sample", "{run}", "Hi", "--weights", "joy=1", "--device", "meta"], "'meta' is not here"),
        (["sample", "{run}", "--input", "{run}", "--weights", "joy=1"], "it is not a file"),
        (["train", "--model", "runs/none/x", "--output-dir", "{tmp}"], "neither a folder nor"),
        (["sample", "{run}", "Hi", "--weights", "joy=1", "--base-model", ""], "neither a folder"),
        (["train", "--output-dir", "{tmp}\udcff"], "is not UTF-8"),
        (["train", "--config="], "--config needs the path"),
        (["train", "--config=a.yaml", "--config", "b.yaml"], "must be given once, got a.yaml and"),
        (["export", "{run}", "{run}/config.yaml", "--weights", "joy=1"], "config.yaml is a file"),
        (["export", "{run}", "{run}", "--weights", "joy=1"], "must be missing or empty"),
    ],
)
def test_bad_input_is_said_and_ends_with_code_2(
    refused, monkeypatch, trained, tmp_path, argv, message
):
    monkeypatch.setattr("clp.policies.policy.load_base", pytest.fail)
    before = sorted(trained.iterdir())
    filled = [a.format(run=trained, tmp=tmp_path / "t") for a in argv]
    assert message in refused(*filled)
    assert sorted(trained.iterdir()) == before and not (tmp_path / "t").exists()


def test_a_prompt_that_is_too_long(refused, trained):
    argv = ["sample", trained, "Hi", "Ho " * 9999, "--weights", "joy=1"]
    assert "prompt 1: prompt has" in refused(*argv)


def test_cuda_where_there_is_none(refused, monkeypatch, trained, tmp_path):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    for argv in (
        ["train", "--output-dir", tmp_path / "t"],
        ["eval", trained],
        ["sample", trained, "Hi", "--weights", "joy=1"],
    ):
        error = refused(*argv, "--device", "cuda")
        assert "device 'cuda' is not here" in error
    assert not (tmp_path / "t").exists()


def test_a_device_that_is_not_among_those_here(refused, monkeypatch, trained):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    error = refused("eval", trained, "--device", "cuda:2")
    assert "device 'cuda:2' is not here: there are 2, counted from 0" in error
    assert torch_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("config.json", {"quantization_config": {"quant_method": "hqq"}}, "HQQ version"),
        ("config.json", {"quantization_config": {"quant_method": "x"}}, "quantised by 'x', which"),
        ("config.json", {"hidden_size": "x"}, "Field 'hidden_size' expected int"),
        ("config.json", {"num_attention_heads": 0}, "modulo by zero"),
        ("config.json", {"pad_token_id": 10**9}, "Padding_idx"),
        ("config.json", {"architectures": [3]}, "is not a causal LM: it holds 3"),
        ("config.json", "[" * 200_000, "recursion"),
        ("tokenizer.json", {"model": {"type": "none"}}, "ModelUntagged"),
    ],
)
def test_a_model_that_cannot_be_loaded(refused, tmp_path, name, value, message):
    """The last one is what the library tokenizers says of files newer than itself."""
    shutil.copytree(TINY, tmp_path / "model")
    file = tmp_path / "model" / name
    old = json.loads(file.read_text())
    file.write_text(value if isinstance(value, str) else json.dumps(old | value))
    error = refused("train", "--model", tmp_path / "model", "--output-dir", tmp_path / "t")
    assert "model '" in error and message in error


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_column_of_another_kind(refused, trained, tmp_path, command):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom", "reference": 3}\n')
    where = [trained] if command == "eval" else ["--output-dir", tmp_path / "t"]
    options = ["--prompts", tmp_path / "p.jsonl", "--rewards", "joy=rouge", "brief=brevity"]
    error = refused(command, *where, *options)
    assert "column 'reference', row 0: expected a string" in error


@pytest.mark.parametrize("command", ["train", "eval", "export", "sample"])
def test_ctrl_c_is_one_line_and_code_130(clp, monkeypatch, trained, tmp_path, command):
    for name in ("clp.engine.sampler.Sampler.step", "clp_kernels.export_adapter"):
        monkeypatch.setattr(name, Mock(side_effect=KeyboardInterrupt))
    argv = {
        "train": ["--output-dir", tmp_path / "t", "--scale-rewards", "none"],
        "eval": [trained],
        "export": [trained, tmp_path / "t", "--weights", "joy=1"],
        "sample": [trained, "Tom", "--weights", "joy=1"],
    }[command]
    hint = "; there is no checkpoint yet: --resume begins at step 1" if command == "train" else ""
    assert clp(command, *argv, code=130).err.splitlines()[-1] == f"clp {command}: stopped{hint}"


def test_ctrl_c_before_the_first_step_leaves_no_run(clp, monkeypatch, tmp_path):
    monkeypatch.setattr("clp.engine.sampler.Sampler.step", Mock(side_effect=KeyboardInterrupt))
    printed = clp("train", "--output-dir", tmp_path / "t", code=130).err
    assert printed.splitlines()[-1] == "clp train: stopped"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_too_little_memory_is_one_line(clp, monkeypatch, on_a_gpu):
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    ask = Mock(side_effect=error) if on_a_gpu else lambda argv: torch.empty(2**50)
    monkeypatch.setattr("clp.cli.info.run", ask)
    (line,) = clp("info", code=2).err.splitlines()
    assert line.startswith("clp info: error: not enough memory: ") and " to allocate " in line


def test_another_error_of_pytorch_is_raised(clp, monkeypatch):
    monkeypatch.setattr("clp.cli.info.run", lambda argv: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        clp("info", code=2)


def info_prints(what):
    """Arguments of a Python whose `clp info` prints this."""
    code = f"info.run = lambda argv: {what}; sys.argv = ['clp', 'info']; cli.main()"
    return ["-c", f"import sys; from clp import cli; from clp.cli import info; {code}"]


def test_a_terminal_without_the_characters():
    done = python(*info_prints("print('“é”')"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "\\u201c\\xe9\\u201d\n")


def test_a_reader_that_goes_is_no_error():
    """`| head`: the command ends as others do, without a word."""
    argv = [sys.executable, *info_prints("[print('x' * 99) for _ in range(9999)]")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        done.stdout.readline()
        done.stdout.close()
        error = done.stderr.read()
    assert done.returncode == 141
    assert error == ""


def test_unknown_option_is_refused(clp, tmp_path):
    said = clp("train", "--learning-rat", "1", "--output-dir", tmp_path / "t", code=2)
    assert "learning-rate" in said.err


def test_help_is_immediate():
    """Importing the command line imports neither torch nor transformers."""
    code = "import sys, clp.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_version_is_immediate():
    import clp_kernels

    code = "import sys; from clp import cli; cli.main(); print('torch' in sys.modules)"
    shown = python("-c", code, "--version").stdout.splitlines()
    assert shown == [f"clp {clp_kernels.__version__}", "False"]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory, chat_model):
    """A policy of a model with a chat template."""
    folder = tmp_path_factory.mktemp("instruct") / "run"
    Policy.create(chat_model, ["joy", "brief"], r=2).save(folder)
    return folder


def test_sample_chat_gives_the_model_messages(clp, instruct, tmp_path):
    """From the command line, a file and as messages: the same tokens, not those of the text."""
    options = ["--weights", "joy=1", "--max-tokens", "16", "--seed", "4"]
    talk = [{"role": "user", "content": "Tom had a kite."}]
    rows = [{"prompt": "Tom had a kite."}, {"prompt": talk}, {"prompt": [5, 6, 7]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for chat in ([], ["--chat"]):
        out = tmp_path / f"out{len(chat)}.jsonl"
        clp("sample", instruct, "--input", tmp_path / "p.jsonl", "--output", out, *options, *chat)
        found[len(chat)] = records(out)
        clp("sample", instruct, "--input", tmp_path / "p.jsonl", "--output", out, *options, *chat)
    ids = {chat: [row["token_ids"] for row in rows] for chat, rows in found.items()}
    assert ids[0][0] != ids[0][1] == ids[1][0] == ids[1][1] and ids[0][2] == ids[1][2]
    assert [row["prompt"] for row in found[1]] == [row["prompt"] for row in rows]
    answer = found[1][0]["text"]
    shown = clp("sample", instruct, "Tom had a kite.", *options, "--chat").out
    assert f"[joy=1] Tom had a kite.\n{answer}" in shown
    shown = clp("sample", instruct, "--input", tmp_path / "p.jsonl", *options).out
    assert f"[joy=1] Tom had a kite.\n{answer}" in shown  # the conversation's
    source, out = tmp_path / "p.jsonl", tmp_path / "out0.jsonl"
    said = clp("sample", instruct, "--input", source, "--output", out, *options, "--chat", code=2)
    assert "belongs to another run: chat was None and is True" in said.err


def test_sample_chat_needs_a_template(refused, trained):
    for more in (["Tom"], ["--interactive"]):
        said = refused("sample", trained, *more, "--weights", "joy=1", "--chat")
        assert "the model's tokenizer has no chat template" in said


@pytest.mark.parametrize("kind", ["a file", "a link to nothing"])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_output_folder_that_cannot_be_is_refused_first(
    refused, monkeypatch, trained, tmp_path, command, kind
):
    """Before a model is loaded, or 512 completions are sampled for the reward scale."""
    monkeypatch.setattr("clp.policies.policy.load_base", pytest.fail)
    if kind == "a file":
        (tmp_path / "x").write_text("mine")
    else:
        (tmp_path / "x").symlink_to(tmp_path / "gone")
    argv = [command, "--output-dir", tmp_path / "x/run"]
    assert str(tmp_path / "x") in refused(*argv, *[trained] * (command == "eval"))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_resume_in_the_folder_itself(clp, monkeypatch, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    clp("train", "--resume", "--output-dir=.", "--max-steps=2")
    assert [row["step"] for row in records(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert load_config("config.yaml").max_steps == 2
    assert json.loads((tmp_path / "run/clp.json").read_text())["objectives"] == ["joy", "brief"]


def test_eval_records_the_embedded_prompts_and_the_runs_rewards(clp, monkeypatch, trained):
    """An output folder that is a link, relative to the working folder."""
    monkeypatch.chdir(trained.parent)
    (trained.parent / "real").mkdir()
    (trained.parent / "out").symlink_to("real")
    clp("eval", f"{trained.name}/", "--output-dir", "out/", "--num-prompts", "1", "--max-tokens",
        "1", "--seed", "-3")  # fmt: skip
    front = json.loads((trained.parent / "real/frontier.json").read_text())
    wanted = {"seed": -3, "run": str(trained), "reward_specs": ["joy=sentiment", "brief=brevity"],
              "prompts_file": str(HELDOUT_PROMPTS), "prompts": 1, "max_tokens": 1}  # fmt: skip
    assert {name: front[name] for name in wanted} == wanted


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 3626176\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_cloned_without_its_large_files(refused, tmp_path, name):
    """Git leaves a pointer of three lines in the place of each."""
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / name).write_text(POINTER.format("0" * 64))
    error = refused("train", "--model", tmp_path / "model", "--output-dir", tmp_path / "t")
    assert f"model '{tmp_path / 'model'}' cannot be loaded" in error


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_policy_without_finite_logits_is_one_line(refused, tmp_path, command):
    folder = tmp_path / "run"
    policy = Policy.create(
        "tiny", ["joy", "brief"], r=1, rewards=["joy=sentiment", "brief=brevity"]
    )
    for name, parameter in policy.trainable_parameters().items():
        if "lora_B" in name:
            parameter.data.fill_(1e30)
    policy.save(folder)
    argv = {"eval": ["--num-prompts", "2"], "sample": ["Tom", "--weights", "joy=1"]}[command]
    assert "not finite" in refused(command, folder, *argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea\x00", "cannot be read"),
        (b"max_steps: 2\n\tr: 2\n", "cannot be read"),
        (b'["max_steps", 3]', "must hold a mapping, got list"),
        (None, "cannot be read"),
    ],
    ids=["UTF-16", "tab", "list", "folder"],
)
def test_a_file_of_options_that_is_none(refused, tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    error = refused("train", "--config", path, "--output-dir", tmp_path / "t")
    assert str(path) in error and message in error
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("device", ["CPU", "gpu", "", "cuda:-1", "cuda:0:1", "cpu,cuda"])
def test_devices_that_are_none(refused, tmp_path, device):
    assert "device must be" in refused("train", "--device", device, "--output-dir", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_numbers_that_begin_with_a_minus_sign(clp, trained):
    options = ["--weights", "joy=1", "--max-tokens", "4", "--temperature", "1.5"]
    said = {
        seed: clp("sample", trained, "Tom had", *options, "--top-k", "-1", "--seed", seed).out
        for seed in ("-5", str(2**64 - 5), str(2**70 + 2**64 - 5), "5")
    }
    first, *same, other = said.values()
    assert same == [first, first] and other != first


def test_resume_of_a_folder_that_is_not_there_trains_nothing(refused, monkeypatch, tmp_path):
    """A mistyped name would cost a whole training of the embedded model."""
    monkeypatch.setattr("clp.policies.policy.load_base", pytest.fail)
    error = refused("train", "--resume", "--output-dir", tmp_path / "mistyped")
    assert "mistyped holds no run to resume" in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--max-steps", "400", "--device", "cpu"]])
def test_resume_of_a_folder_without_a_run_trains_nothing(refused, monkeypatch, tmp_path, options):
    """Such as one that was made for a log; what may change describes no new run."""
    monkeypatch.setattr("clp.policies.policy.load_base", pytest.fail)
    (tmp_path / "log.txt").touch()
    for folder in (tmp_path, tmp_path / "mistyped"):
        error = refused("train", "--resume", "--output-dir", folder, *options)
        assert f"{folder.name} holds no run to resume" in error
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_logprobs_that_would_not_be_shown_are_refused(refused, trained):
    argv = ["sample", trained, "Tom", "--weights", "joy=1", "--logprobs", "2"]
    assert "--logprobs goes with --output" in refused(*argv)


def test_names_are_listed_before_they_are_imported():
    script = "import clp; print(*dir(clp)); from clp import *; Sampler, CLPTrainer"
    listed = python("-c", script).stdout.split()
    assert {"CLPTrainer", "Sampler", "evaluate", "rewards"} <= set(listed)
    assert not {"Any", "importlib"} & set(listed)


def test_resume_of_a_checkpoint_names_the_run(refused, monkeypatch, trained):
    """As other trainers take it; to give --resume is no advice to one who has."""
    monkeypatch.setattr("clp.policies.policy.load_base", pytest.fail)
    error = refused("train", "--resume", "--output-dir", trained / "checkpoint-000001")
    assert "to continue it" not in error and "config.yaml" in error


def test_an_interrupt_inside_an_exec_ends_with_130_too(tmp_path):
    """CPython makes it a death by SIGINT under `python -m`; dataclasses exec when they are made."""
    (tmp_path / "stopped.py").write_text(
        "import sys\nfrom clp.cli import info, main\n"
        "info.run = lambda argv: exec('raise KeyboardInterrupt')\n"
        "sys.argv[1:] = ['info']\nmain()\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-m", "stopped"], env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 130


def test_compare(clp, refused, monkeypatch, tmp_path):
    for name, method in tiny_compare.FAKES.items():
        monkeypatch.setitem(METHODS, name, method)
    methods = {"points": {"method": "several", "weights": [[0, 1], [1, 0]]}}
    given = tiny_compare.values(tmp_path / "out", methods=methods)
    path = tiny_compare.write(tmp_path / "c.yaml", given)
    said = clp("compare", path)
    for text in ("demo: 3 held-out prompts, seeds [0, 1]", "points", "base model", "completions"):
        assert text in said.out
    assert "demo/seed-1/points" in said.err  # the progress bar's unit
    found = json.loads((tmp_path / "out/compare.json").read_text())
    assert found["tasks"]["demo"]["methods"]["points"]["used"]["completions"] == [8, 8]
    assert (tmp_path / "out/compare-demo.png").read_bytes().startswith(b"\x89PNG")
    tiny_compare.write(tmp_path / "c.yaml", given | {"num_prompts": 2})
    assert "number of eval_prompts was 3 and is 2" in refused("compare", path)
    assert "cannot be read" in refused("compare", tmp_path / "nothing.yaml")


def test_compare_stopped_says_how_to_go_on(clp, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "trained", tiny_compare.trained)
    monkeypatch.setattr("tiny_compare.CLPTrainer", Mock(side_effect=KeyboardInterrupt))
    methods = {"one": {"method": "trained"}}
    path = tiny_compare.write(
        tmp_path / "c.yaml", tiny_compare.values(tmp_path / "out", methods=methods)
    )
    assert "stopped; the same command goes on" in clp("compare", path, code=130).err
