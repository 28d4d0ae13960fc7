"""What people look at after a comparison: tables on the terminal and compare-TASK.png."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from clp_kernels.files import write_whole

_MARKERS = "osD^vPhX<>*p"


def print_comparison(summary: Mapping[str, Any], console: Console) -> None:
    """For each task a table of results and one of the budgets that were used."""
    for task, found in summary["tasks"].items():
        console.print(_results(task, found, summary))
        console.print(_budgets(found, summary))


def _results(task: str, found: Mapping[str, Any], summary: Mapping[str, Any]) -> Table:
    names, methods = found["objectives"], found["methods"]
    first = next(iter(methods))
    base = ", ".join(f"{n} {v:.3f}" for n, v in zip(names, found["base"]["rewards"], strict=True))
    point = ", ".join(f"{v:.3f}" for v in found["reference_point"])
    table = Table(
        title=f"{task}: {found['prompts']} held-out prompts, seeds {summary['seeds']}, base model: "
        f"{base}",
        caption=f"{summary['intervals']}. Hypervolume over ({point}). Dominated: points that "
        f"some of {first}'s dominate / points of {first} that some of the method's dominate.",
    )
    table.add_column("method")
    both = " / ".join(names)
    for name in (
        "hypervolume", f"more than {first}", "dominated", "epsilon", "inner product",
        f"Spearman {both}", f"range {both}", "KL, largest", "distinct-2, least",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for name, method in methods.items():
        own, more = method["figures"], method["difference"]
        table.add_row(
            name,
            _shown(own["hypervolume"], interval=True),
            "" if name == first else _shown(more["hypervolume"], interval=True, sign="+"),
            _pair(own, "dominated_by_first", "dominates_of_first", 1),
            _pair(own, "epsilon_to_first", "epsilon_of_first", 3),
            _shown(own.get("inner_product")),
            " / ".join(_shown(own[f"spearman/{n}"], digits=2) for n in names),
            " / ".join(_shown(own[f"range/{n}"], digits=2) for n in names),
            _shown(own["kl"], digits=2),
            _shown(own["distinct_2"], digits=2),
        )
    table.add_section()
    own = found["base"]
    volume, distinct = f"{own['hypervolume']:.3f}", f"{own['distinct_2']:.2f}"
    table.add_row("base model", volume, *[""] * 6, "0", distinct)
    return table


def _shown(
    figure: Sequence[float | None] | None,
    *,
    digits: int = 3,
    interval: bool = False,
    sign: str = "",
) -> str:
    """A figure of compare.json, [value, low, high]."""
    if figure is None or figure[0] is None:
        return "-"
    value, *ends = (None if v is None else f"{v:{sign}.{digits}f}" for v in figure)
    return f"{value} [{ends[0]}, {ends[1]}]" if interval and None not in ends else f"{value}"


def _pair(figures: Mapping[str, Any], one: str, other: str, digits: int) -> str:
    if one not in figures:
        return ""
    return f"{_shown(figures[one], digits=digits)} / {_shown(figures[other], digits=digits)}"


def _budgets(found: Mapping[str, Any], summary: Mapping[str, Any]) -> Table:
    table = Table(
        title="Used in training, mean over the seeds",
        caption=f"Equal budgets are equal numbers of {summary['equal_budget']}.",
    )
    table.add_column("method")
    for name in ("budget", "completions", "sampled tokens", "reward calls", "gradient steps",
                 "seconds"):  # fmt: skip
        table.add_column(name, justify="right")
    for name, method in found["methods"].items():
        used = [f"{np.mean(values):,.0f}" for values in method["used"].values()]
        table.add_row(name, f"{method['budget']:g}", *used)
    return table


def plot_task(task: str, found: Mapping[str, Any], seeds: Sequence[int], path: Path) -> None:
    """Draws compare-TASK.png: each method's curve, mean over the seeds, with their spread.

    A panel for each pair of the first three objectives; one objective alone is drawn by method.
    Bars reach one standard deviation over the seeds to each side.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = found["objectives"]
    pairs = list(itertools.combinations(range(min(len(names), 3)), 2))
    count = max(len(pairs), 1)
    figure, grid = plt.subplots(1, count, figsize=(6.4 * count + 3, 5.6), squeeze=False)
    axes = list(grid[0])
    if pairs:
        for axis, pair in zip(axes, pairs, strict=True):
            _draw_pair(axis, found, pair)
    else:
        _draw_one(axes[0], found)
    over = f"seed {seeds[0]}"
    if len(seeds) > 1:
        over = f"mean of {len(seeds)} seeds, bars: their standard deviation"
    figure.suptitle(f"{task}: {found['prompts']} held-out prompts, {over}", fontsize=12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 1))
    figure.legend(
        handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False,
        title="hypervolume [95 % interval]", alignment="left",
    )  # fmt: skip
    png = io.BytesIO()
    figure.savefig(png, dpi=120, bbox_inches="tight")
    plt.close(figure)
    write_whole(path, png.getvalue())


def _label(name: str, method: Mapping[str, Any]) -> str:
    return f"{name}: {_shown(method['figures']['hypervolume'], interval=True)}"


def _draw_pair(axis: Any, found: Mapping[str, Any], pair: tuple[int, int]) -> None:
    names, base = found["objectives"], found["base"]["rewards"]
    for k, (name, method) in enumerate(found["methods"].items()):
        order = np.argsort(np.array(method["weights"])[:, 0], kind="stable")
        mean = np.array(method["rewards"]["mean"])[order][:, pair]
        std = np.array(method["rewards"]["std"])[order][:, pair]
        color = f"C{k % 10}"
        # A curve runs along the weights; on a lattice of three objectives there is none.
        line = "-" if len(names) == 2 else ""
        axis.plot(
            mean[:, 0], mean[:, 1], line, marker=_MARKERS[k % len(_MARKERS)], markersize=6.5,
            markeredgecolor="white", markeredgewidth=0.5, linewidth=1.4, color=color,
            label=_label(name, method), zorder=3,
        )  # fmt: skip
        axis.errorbar(
            mean[:, 0], mean[:, 1], std[:, 1], std[:, 0], fmt="none", ecolor=color, alpha=0.4,
            elinewidth=1.2, zorder=2,
        )  # fmt: skip
    x, y = (base[i] for i in pair)
    axis.plot([x], [y], "X", markersize=11, color="black", label="base model", zorder=4)
    axis.set_xlabel(f"{names[pair[0]]} (mean reward)")
    axis.set_ylabel(f"{names[pair[1]]} (mean reward)")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.margins(0.06)


def _draw_one(axis: Any, found: Mapping[str, Any]) -> None:
    """One objective: its mean reward by method."""
    methods = found["methods"]
    for k, (name, method) in enumerate(methods.items()):
        mean, std = (np.array(method["rewards"][key])[:, 0] for key in ("mean", "std"))
        axis.errorbar(
            [k] * len(mean), mean, std, fmt="o", color=f"C{k % 10}", capsize=4,
            label=_label(name, method),
        )  # fmt: skip
    axis.axhline(found["base"]["rewards"][0], color="black", linestyle=":", label="base model")
    axis.set_xticks(range(len(methods)), list(methods), rotation=30, ha="right")
    axis.set_ylabel(f"{found['objectives'][0]} (mean reward)")
    axis.grid(alpha=0.25, linewidth=0.6, axis="y")
