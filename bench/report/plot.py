"""The plot of `mixed_lora`: time over the bare linear layer against the number of tokens."""

import json
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.ops import mixed_lora
from bench.report.rows import RESULTS, Row, is_baseline, read
from bench.report.tables import latest

# Ours are thick, each path of a kernel thin and dashed in its colour; the plain forms are thin.
COLORS = {
    "torch_cat": "#222222",
    "torch_stacked": "#8a6d1f",
    "torch_side_stream": "#7b5ea7",
    "torch_cat_compiled": "#4f7f7f",
    "torch_loop": "#888888",
    "peft": "#b07aa1",
    "cpu": "#0b5fa5",
    "cuda": "#c2410c",
    "triton": "#15803d",
    "triton_fused": "#15803d",
    "triton_split": "#15803d",
}
DASHES = {"triton_fused": "--", "triton_split": ":"}
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.005, 1.01, 1.02, 1.03, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10)
GAP = 0.06  # between two labels or ticks, as a share of the panel's height


def write_plots(folder: Path = RESULTS) -> list[Path]:
    """mixed_lora_<device>.png for each <device>.csv with rows of the forward; gives the files.

    The machine and number of threads of the newest row; the largest rank of the ladder; one panel
    for each d and dtype.
    """
    written = []
    for path in sorted(folder.glob("*.csv")):
        rows = [row for row in latest(read(path)) if row["op"] == mixed_lora.OP and _drawn(row)]
        if rows:
            newest = max(rows, key=lambda row: row["date"])
            same = [r for r in rows if all(r[k] == newest[k] for k in ("machine", "threads"))]
            target = folder / f"{mixed_lora.OP}_{path.stem}.png"
            _draw(same, newest, target)
            written.append(target)
    return written


def _drawn(row: Row) -> bool:
    case = json.loads(row["case"])
    plain = case["mode"] == "forward" and "rows" not in case
    return plain and row["over_base"] != "" and row["provider"] in COLORS


def _draw(rows: Sequence[Row], newest: Row, target: Path) -> None:
    cases = [(json.loads(row["case"]), row) for row in rows]
    rank = max(case["m"] * case["r"] for case, _ in cases)
    cases = [(case, row) for case, row in cases if case["m"] * case["r"] == rank]
    sizes = sorted({case["d"] for case, _ in cases})
    dtypes = sorted({case["dtype"] for case, _ in cases})
    # In inches: a panel of 3.6 by 3, beside it 2 for its labels and the next one's ticks.
    width, height = 0.8 + 5.6 * len(sizes), 1.1 + 3.8 * len(dtypes)
    figure, grid = pyplot.subplots(len(dtypes), len(sizes), figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=0.8 / width,
        right=1 - 2 / width,
        bottom=0.6 / height,
        top=1 - 0.9 / height,
        wspace=2 / 3.6,
        hspace=0.8 / 3,
    )
    for (i, dtype), (j, size) in product(enumerate(dtypes), enumerate(sizes)):
        axes = grid[i][j]
        axes.set_title(f"d = {size}, {dtype}", loc="left", fontsize=11)
        lines: dict[str, list[tuple[int, float]]] = {}
        for case, row in cases:
            if (case["d"], case["dtype"]) == (size, dtype):
                points = lines.setdefault(row["provider"], [])
                points.append((case["T"], float(row["over_base"])))
        if lines:
            _panel(axes, {name: sorted(points) for name, points in lines.items()})
        if i == len(dtypes) - 1:
            axes.set_xlabel("tokens T")
        if j == 0:
            axes.set_ylabel("time / bare linear layer")
    m = max(case["m"] for case, _ in cases)
    figure.suptitle(
        f"mixed_lora, forward, m = {m}, r = {rank // m}: {newest['machine']}, "
        f"{newest['threads']} threads, torch {newest['torch']}",
        x=0.01,
        y=1 - 0.2 / height,
        ha="left",
        fontsize=12,
    )
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _panel(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """The lines, each with its name beside its right end."""
    tokens = sorted({t for points in lines.values() for t, _ in points})
    values = [value for points in lines.values() for _, value in points]
    low, high = min(1.0, *values), max(1.02, *values)
    margin = (high / low) ** 0.06
    axes.set(xscale="log", yscale="log", ylim=(low / margin, high * margin))
    axes.axhline(1, color="#bbbbbb", linewidth=1)
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    to_share = axes.transAxes.inverted().transform
    ends = {}
    for name, points in lines.items():
        plain, path = is_baseline(name), name in DASHES
        axes.plot(
            *zip(*points, strict=True),
            color=COLORS[name],
            linestyle=DASHES.get(name, "-"),
            linewidth=1.3 if plain or path else 2.6,
            marker="o",
            markersize=3,
        )
        ends[name] = float(to_share(axes.transData.transform(points[-1]))[1])
    for name, height in spread(ends.items()):
        axes.annotate(
            name,
            lines[name][-1],
            xytext=(1.05, height),
            textcoords="axes fraction",
            color=COLORS[name],
            fontsize=9,
            fontweight="bold" if name in ("cpu", "cuda", "triton") else "normal",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": "#cccccc",
                "linewidth": 0.7,
                "relpos": (0, 0.5),
            },
        )
    heights = [(str(t), float(to_share(axes.transData.transform((1, t)))[1])) for t in TICKS]
    kept = [float(t) for t, height in apart(heights) if 0 <= height <= 1]
    for axis, ticks in ((axes.xaxis, tokens), (axes.yaxis, kept)):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)


def apart(heights: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """The heights, lowest first, without those closer than GAP to the one kept before."""
    kept: list[tuple[str, float]] = []
    for name, height in heights:
        if not kept or height - kept[-1][1] >= GAP:
            kept.append((name, height))
    return kept


def spread(ends: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """The heights, lowest first, moved up until no two are closer than GAP."""
    placed: list[tuple[str, float]] = []
    for name, height in sorted(ends, key=lambda end: end[1]):
        least = placed[-1][1] + GAP if placed else height
        placed.append((name, max(height, least)))
    return placed
