"""What the subjects' tests share: no interpreted kernels, and a measurement at toy size."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import timing
from bench.report import plot, tables

TOY = timing.Protocol(warmup=1, repeats=2, least=1, seconds=1)
ROOFS = timing.Roofs(bandwidth=1e6, flops={"float32": 1e9, "bfloat16": 1e9})


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the suite interprets Triton, it would be one more provider, and a very slow one."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def measured() -> Callable[..., Any]:
    """measured(subject, cases, save=..., memory=...) -> (rows, refusals), on the CPU."""

    def run(subject: Any, cases: Any, save: Path | None = None, memory: bool = False) -> Any:
        cpu = torch.device("cpu")
        return command.ladder(subject, cases, cpu, TOY, roofs=ROOFS, save=save, memory=memory)

    return run


@pytest.fixture
def page(tmp_path: Path) -> Callable[[], tuple[str, list[str]]]:
    """page() -> (RESULTS.md of the rows in tmp_path, the lines of its tables), single spaces."""

    def write() -> tuple[str, list[str]]:
        plot.write_plots(tmp_path)
        tables.write_results(tmp_path, tmp_path / "RESULTS.md")
        text = re.sub(" +", " ", (tmp_path / "RESULTS.md").read_text())
        return text, [line for line in text.splitlines() if line.startswith("|")]

    return write
