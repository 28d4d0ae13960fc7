"""README.md's commands exist, and its snippets run as they are typed.

`python tests/test_readme.py CLP`, in an empty folder, runs them with the command `clp` at that path
and needs nothing but what they need: tests/newcomer.sh does that with an installed package.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("clp_kernels", "clp", "bench", "tests", "scripts")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# In place of bench/compare-demo.yaml.
COMPARISON = """
output_dir: runs/compare-demo
seeds: [0]
num_prompts: 2
tasks:
  demo: {rewards: [joy=sentiment, brief=brevity], max_steps: 1, num_prompts: 2, num_generations: 2,
         max_completion_length: 8, scale_rewards: none}
methods:
  clp-lora: {method: clp}
"""
# Added to a command, so that it takes a second.
SMALL = {
    "train": ["--max-steps", "2", "--num-prompts", "2", "--max-completion-length", "8"],
    "eval": ["--num-prompts", "2", "--max-tokens", "8"],
    "sample": ["--max-tokens", "8"],
}


def blocks(markdown: str) -> list[tuple[str, str]]:
    """(language, text) of each ``` block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", markdown, flags=re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Each command of a ```bash block as words, without prompts, comments and variables."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split, words = True, []
        for token in [*lexer, ";"]:
            if token and set(token) <= set("&|;()"):
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                if words:
                    found.append(words)
                words = []
            else:
                words.append(token)
    return found


def bash_commands(markdown: str) -> list[list[str]]:
    return [c for language, text in blocks(markdown) if language == "bash" for c in commands(text)]


def unknown(words: list[str]) -> str | None:
    """What a command names that is not there: a make target, a clp command or a module."""
    from clp.cli import COMMANDS

    program = words[0].rsplit("/", 1)[-1]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([\w.-]+):(?!=)", makefile, flags=re.M))
        asked = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
        return next((t for t in asked if t not in targets), None)
    if program == "clp" and len(words) > 1 and not words[1].startswith("-"):
        return None if words[1] in COMMANDS else words[1]
    if program.startswith("python") and words[1:2] == ["-m"]:
        path = ROOT / words[2].replace(".", "/")
        if path.parts[len(ROOT.parts)] not in PACKAGES:
            return None
        here = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        return None if here else words[2]
    return None


def run_snippets(
    markdown: str, run_python: Callable[[str], None], run_clp: Callable[[Sequence[str]], None]
) -> None:
    """Runs what the text shows, in its order, in the working folder, with the files it assumes.

    `make` and `pip` change environments: tests/newcomer.sh and continuous integration run those.
    """
    from clp.data.paths import TINY

    shutil.copytree(TINY, "path/to/model")
    prompts = ["Once upon a time", "One day", "Tom had a red kite."]
    for name in ("prompts.jsonl", "requests.jsonl"):
        Path(name).write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    # A folder of the hub's name: nothing is downloaded.
    instruct = Path(shutil.copytree(TINY, "Qwen/Qwen3-0.6B"))
    settings = json.loads((instruct / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (instruct / "tokenizer_config.json").write_text(json.dumps(settings))
    messages = [{"prompt": [{"role": "user", "content": p}]} for p in prompts]
    Path("chat.jsonl").write_text("".join(json.dumps(m) + "\n" for m in messages))
    Path("bench").mkdir()
    Path("bench/compare-demo.yaml").write_text(COMPARISON)
    for language, text in blocks(markdown):
        if language == "python":
            run_python(text)
            continue
        for words in commands(text):
            if words[0] == "clp":
                run_clp([*words[1:], *SMALL.get(words[1], [])])
            else:
                assert language == "bash" and words[0] in {"make", "pip", "export"}, words


def test_commands_exist() -> None:
    found = bash_commands(README)
    assert found, "README.md shows no command in a ```bash block"
    assert not [words for words in found if unknown(words)]


def test_the_scan_sees_what_it_must() -> None:
    text = """
```bash
make dev           # the environment
$ SEED=1 make demo RUN=runs/a && .venv/bin/clp sample runs/a "Once; a time" \\
    --weights joy=1
```
```python
make nothing
```
"""
    sample = [".venv/bin/clp", "sample", "runs/a", "Once; a time", "--weights", "joy=1"]
    assert bash_commands(text) == [["make", "dev"], ["make", "demo", "RUN=runs/a"], sample]
    assert [unknown(words) for words in bash_commands(text)] == [None, None, None]
    assert unknown(["make", "-s", "nothing"]) == "nothing"
    assert unknown(["clp", "fly", "runs/a"]) == "fly"
    assert unknown(["python", "-m", "clp_kernels.nothing"]) == "clp_kernels.nothing"
    assert unknown(["python", "-m", "clp_kernels.info"]) is None
    assert unknown(["python", "-m", "pip", "install", "."]) is None
    assert blocks(text)[1] == ("python", "make nothing\n")


def test_snippets_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """In this process, which has imported what they import: seconds instead of a minute."""
    from clp import cli

    def run_clp(arguments: Sequence[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["clp", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(TYPED))
        cli.main()

    monkeypatch.chdir(tmp_path)
    run_snippets(README, lambda text: exec(compile(text, "README.md", "exec"), {}), run_clp)
    check_outputs()
    assert "mixed_lora" in capsys.readouterr().out  # of clp info


TYPED = "/weights joy=1\nOnce\n/quit\n"


def check_outputs() -> None:
    """What the commands have written, as the text says."""
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3]
    assert not [line for line in lines if "error" in line]
    assert Path("runs/mine/pareto.png").is_file()
    assert Path("runs/compare-demo/compare-demo.png").is_file()
    assert Path("exported/joyful/adapter_model.safetensors").is_file()


def main(clp: str) -> None:
    def run(command: Sequence[str]) -> None:
        print("$", shlex.join(command[-1:] if command[1] == "-c" else command), flush=True)
        subprocess.run(command, check=True, text=True, input=TYPED)

    run_snippets(
        README,
        lambda text: run([sys.executable, "-c", text]),
        lambda arguments: run([clp, *arguments]),
    )
    check_outputs()
    import clp as package

    assert not Path(str(package.__file__)).is_relative_to(ROOT), "this is the source tree's"
    print(f"README's snippets ran in {os.getcwd()}")


if __name__ == "__main__":
    main(sys.argv[1])
