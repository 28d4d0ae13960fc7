"""The command line as its user sees it."""

import json
import subprocess
import sys

import pytest

from clp import cli
from clp.config import load_config

SMALL = [
    "--num-prompts", "2", "--num-generations", "2", "--max-completion-length", "6",
    "--max-steps", "1", "--r", "2",
]  # fmt: skip


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["clp", *map(str, argv)])
    cli.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "train", "--output-dir", folder, *SMALL)
    return folder


def test_train_with_a_file_and_options(monkeypatch, tmp_path):
    (tmp_path / "c.yaml").write_text("max_steps: 1\nr: 3\nalpha: 0.3\nseed: 5\n")
    options = ["--num-prompts", "2", "--num-generations", "2", "--max-completion-length", "4"]
    run(monkeypatch, "train", "--config", tmp_path / "c.yaml", "--alpha", "0.4", *options,
        "--output-dir", tmp_path / "r")  # fmt: skip
    saved = (tmp_path / "r/config.yaml").read_text()
    assert "alpha: 0.4" in saved and "r: 3" in saved and "seed: 5" in saved


def test_resume_needs_the_folder_alone(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "r"
    options = [*SMALL, "--alpha", "0.3", "--seed", "7", "--rewards", "brevity", "joy=sentiment"]
    run(monkeypatch, "train", "--output-dir", folder, *options)
    first = (folder / "metrics.jsonl").read_text()
    folder = folder.rename(tmp_path / "moved")
    run(monkeypatch, "train", "--output-dir", folder, "--resume")
    assert (folder / "metrics.jsonl").read_text() == first
    run(monkeypatch, "train", "--output-dir", folder, "--resume", "--max-steps", "2")
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
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, "train", "--output-dir", folder, "--resume", *option)
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and message in error


def test_a_training_that_diverges_ends_with_one_line(monkeypatch, capsys, tmp_path):
    def diverge(self):
        raise FloatingPointError("the last checkpoint is x")

    monkeypatch.setattr("clp.train.CLPTrainer.train", diverge)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "train", "--output-dir", tmp_path / "r", *SMALL)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error == "clp train: error: the last checkpoint is x"


def test_sample_from_prompts(monkeypatch, capsys, trained):
    run(monkeypatch, "sample", trained, "Tom had a red kite.", "Mia was sad.", "--weights",
        "joy=0.7,brief=0.3", "--seed", "1", "--max-tokens", "6")  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[joy=0.7,brief=0.3] Tom had a red kite.")
    assert lines[1].startswith("[joy=0.7,brief=0.3] Mia was sad.")


def test_sample_from_a_file_with_a_row_a_prompt(monkeypatch, trained, tmp_path):
    rows = [
        {"prompt": "Tom had a red kite.", "weights": [1, 0], "seed": 3},
        {"prompt": "Tom had a red kite.", "weights": {"brief": 1.0}, "max_tokens": 2},
        {"prompt": "Mia was sad."},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    run(monkeypatch, "sample", trained, "--input", source, "--output", target, "--weights",
        "brief=1", "--n", "2", "--max-tokens", "5")  # fmt: skip
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [r["prompt"] for r in rows for _ in range(2)]
    assert [line["index"] for line in lines] == [0, 1] * 3
    assert all(len(line["token_ids"]) <= 2 for line in lines[2:4])
    assert all(len(line["token_ids"]) == len(line["logprobs"]) for line in lines)


def test_a_bad_line_ends_with_code_1_and_the_others_are_written(
    monkeypatch, capsys, trained, tmp_path
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Tom"}\n{"prompt": "Tom", "weight": [1, 0]}\n{"prompt": "Mia"}\n')
    argv = ["sample", trained, "--input", source, "--output", target, "--weights", "joy=1",
            "--max-tokens", "3", "--logprobs", "2", "--stop-token-ids", "7", "9", "--ignore-eos",
            "--cache-gib", "0.5"]  # fmt: skip
    for shown in ('see "error" in', "nothing to do"):  # the second run has the same lines
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *argv)
        error = capsys.readouterr().err
        assert stop.value.code == 1 and "lines that failed: 1" in error and shown in error
        lines = [json.loads(line) for line in target.read_text().splitlines()]
        assert [line["line"] for line in lines] == [1, 2, 3]
        assert "'weight'" in lines[1]["error"]
        assert all(len(pairs) in (2, 3) for pairs in lines[0]["top_logprobs"])
    options = json.loads((tmp_path / "out.jsonl.meta.json").read_text())["options"]
    assert options["stop_token_ids"] == [7, 9] and options["ignore_eos"] is True
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *argv, "--top-k", "3")
    assert stop.value.code == 2
    assert "another run: top_k was 0 and is 3" in capsys.readouterr().err


def test_prompts_into_a_file(monkeypatch, trained, tmp_path):
    argv = ["sample", trained, "Tom", "Mia", "--weights", "joy=1", "--max-tokens", "3",
            "--output", tmp_path / "out.jsonl"]  # fmt: skip
    run(monkeypatch, *argv)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["line"], line["prompt"]) for line in lines] == [(1, "Tom"), (2, "Mia")]
    run(monkeypatch, *argv)


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
def test_bad_options_of_a_file_run_write_nothing(
    monkeypatch, capsys, trained, tmp_path, options, message
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Tom"}\n')
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "sample", trained, *options[:1], *options[1:], "--input", source,
            "--output", target)  # fmt: skip
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_ctrl_c_in_a_file_run_says_how_to_go_on(monkeypatch, capsys, trained, tmp_path):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("clp.sampler.Sampler.step", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "sample", trained, "Tom", "--weights", "joy=1", "--output",
            tmp_path / "out.jsonl")  # fmt: skip
    assert stop.value.code == 130
    assert "the same command goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_the_prompt_loop_with_its_option_or_on_a_terminal(monkeypatch, capsys, trained, terminal):
    lines = iter(["Tom", "/w", "/quit"])
    monkeypatch.setattr("clp.sample_command.input", lambda shown: next(lines), raising=False)
    if terminal:
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    options = [] if terminal else ["--interactive"]
    run(monkeypatch, "sample", trained, *options, "--weights", "joy=1", "--max-tokens", "3")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("weights joy=1,brief=0;") and shown[-1] == "weights joy=1,brief=0"
    assert len(shown) == 3


def test_eval_writes_its_three_files(monkeypatch, capsys, trained):
    run(monkeypatch, "eval", trained, "--num-prompts", "4")
    front = json.loads((trained / "frontier.json").read_text())
    assert len(front["weights"]) == len(front["rewards"]) == 11
    assert front["objectives"] == ["joy", "brief"]
    assert front["prompts"] == 4
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 * 4
    assert (trained / "pareto.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "Spearman" in out and "joy 1.00 brief 0.00" in out


def test_export_writes_a_peft_folder(monkeypatch, capsys, trained, tmp_path):
    run(monkeypatch, "export", trained, tmp_path / "one", "--weights", "joy=0.5,brief=0.5")
    assert json.loads((tmp_path / "one/adapter_config.json").read_text())["r"] == 4
    assert (tmp_path / "one/adapter_model.safetensors").is_file()
    assert "rank 4" in capsys.readouterr().out


def test_info_prints_the_backends(monkeypatch, capsys):
    run(monkeypatch, "info")
    assert "mixed_lora" in capsys.readouterr().out


def test_help_lists_the_commands(monkeypatch, capsys):
    run(monkeypatch, "--help")
    out = capsys.readouterr().out
    assert all(f"clp {name}" in out for name in [*cli.COMMANDS, "--version"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "unknown command 'fly'"),
        (["train", "--config"], "--config needs the path"),
        (["train", "--config", "none.yaml"], "none.yaml cannot be read"),
        (
            ["train", "--prompts", "none.jsonl", "--output-dir", "{tmp}"],
            "none.jsonl cannot be read",
        ),
        (["train", "--rewards", "sentimant", "--output-dir", "{tmp}"], "sentiment"),
        (["train", "--output-dir", "{run}"], "holds another run"),
        (["train", "--alpha", "2", "--output-dir", "{tmp}"], "alpha"),
        (["sample", "{run}", "Hi"], "have no weights"),
        (["sample", "{run}", "--weights", "joy=1"], "or --interactive"),
        (["sample", "{run}", "--output", "{tmp}"], "give prompts, or a file of them with --input"),
        (["sample", "{run}", "--interactive", "--output", "{tmp}"], "not with --interactive"),
        (["sample", "{run}", "--input", "none.jsonl", "--weights", "joy=1"], "cannot be read"),
        (["sample", "{run}", "Hi", "Ho " * 9999, "--weights", "joy=1"], "prompt 1: prompt has"),
        (["sample", "{run}", "Hi", "--weights", "joi=1"], "unknown objective 'joi'"),
        (["sample", "{run}", "Hi", "--weights", "0.2,0.3,0.5"], "2 entries"),
        (["sample", "{tmp}", "Hi", "--weights", "joy=1"], "clp.json is missing"),
        (["eval", "{run}", "--reference-point", "2", "2"], "must lie below"),
        (["eval", "{run}", "--rewards", "sentiment"], "reward_funcs must be"),
        (["export", "{run}", "{run}", "--weights", "joy=1"], "must be missing or empty"),
    ],
)
def test_bad_input_is_said_and_ends_with_code_2(
    monkeypatch, capsys, trained, tmp_path, argv, message
):
    filled = [a.format(run=trained, tmp=tmp_path / "t") for a in argv]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *filled)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert any(message in line for line in error)
    assert "Traceback" not in "".join(error)


def test_unknown_option_is_refused(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "train", "--learning-rat", "1", "--output-dir", tmp_path / "t")
    assert stop.value.code == 2
    assert "learning-rate" in capsys.readouterr().err


def test_help_is_immediate():
    """Importing the command line imports neither torch nor transformers."""
    code = "import sys, clp.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_immediate():
    import clp_kernels

    code = "import sys; from clp import cli; cli.main(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"clp {clp_kernels.__version__}", "False"]
