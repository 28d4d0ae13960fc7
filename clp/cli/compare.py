"""clp compare: its argument, and what it does with it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from clp.data.paths import home_expanded


@dataclass
class CompareCommand:
    """Train and evaluate methods x tasks x seeds at equal budgets: compare.json, plots, tables.

    Started again, it goes on where it was stopped; methods, tasks and seeds may be added.
    docs/compare.md describes the file.
    """

    config: Annotated[str, tyro.conf.Positional]
    """YAML file with output_dir, tasks, methods and seeds."""


def run(argv: Sequence[str]) -> None:
    """clp compare CONFIG.yaml: methods x tasks x seeds at equal budgets, with plots."""
    command = tyro.cli(CompareCommand, prog="clp compare", args=argv)
    from rich.console import Console

    from clp.evaluation.compare import run_units
    from clp.evaluation.compare_config import load_comparison
    from clp.evaluation.compare_report import plot_task, print_comparison
    from clp.evaluation.compare_summary import summarise
    from clp_kernels.files import write_whole

    comparison = load_comparison(home_expanded(command.config))
    try:
        run_units(comparison, progress=True)
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on") from None
    summary, folder = summarise(comparison), comparison.output_dir
    for task, found in summary["tasks"].items():
        plot_task(task, found, comparison.seeds, folder / f"compare-{task}.png")
    text = json.dumps(summary, indent=1, allow_nan=False)
    write_whole(folder / "compare.json", f"{text}\n".encode())
    console = Console(width=None if sys.stdout.isatty() else 200)
    print_comparison(summary, console)
    plots = ", ".join(f"compare-{task}.png" for task in comparison.tasks)
    console.print(f"{folder}/compare.json, {plots}")
