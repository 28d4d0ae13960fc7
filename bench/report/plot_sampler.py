"""The plot of `sampler`: tokens a second against the number of distinct weight rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.report.plot import apart, spread
from bench.report.rows import RESULTS, Row, read
from bench.report.tables import case_of, latest, rate

OP = "sampler"
COLORS = {
    "clp": "#0b5fa5",
    "clp_no_adapters": "#6fa8dc",
    "torch_generate_base": "#222222",
    "peft_merged_generate": "#b0413e",
    "transformers_cb": "#8a6d1f",
    "vllm": "#7b5ea7",
}
# What runs without adapters, whatever the number of rows, is dashed.
SOLID = ("clp", "peft_merged_generate")
TICKS = [digit * 10**power for power in range(8) for digit in (1, 2, 5)]


def write_plots(folder: Path = RESULTS) -> list[Path]:
    """sampler_<device>.png for each <device>.csv with rows of generation runs; gives the files.

    The machine and number of threads of the newest row; a panel for each model and number of
    requests.
    """
    written = []
    for path in sorted(folder.glob("*.csv")):
        rows = [r for r in latest(read(path)) if r["op"] == OP and r["provider"] in COLORS]
        if rows:
            newest = max(rows, key=lambda row: row["date"])
            same = [r for r in rows if all(r[k] == newest[k] for k in ("machine", "threads"))]
            target = folder / f"{OP}_{path.stem}.png"
            _draw(same, newest, target)
            written.append(target)
    return written


def _draw(rows: Sequence[Row], newest: Row, target: Path) -> None:
    panels: dict[tuple[str, int, int], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        case = case_of(row)
        lines = panels.setdefault((case["model"], case["N"], case["tokens"]), {})
        lines.setdefault(row["provider"], []).append((case["weight_rows"], rate(row)))
    # In inches: a panel of 3.6 by 3, beside it 2 for its labels.
    width, height = 0.9 + 5.8 * len(panels), 4.9
    figure, grid = pyplot.subplots(1, len(panels), figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=0.9 / width, right=1 - 2 / width, bottom=0.6 / height, top=1 - 1.2 / height,
        wspace=2.2 / 3.6,
    )  # fmt: skip
    for axes, (model, count, tokens) in zip(grid[0], panels, strict=True):
        axes.set_title(f"{model}: {count} requests, {tokens:,} tokens", loc="left", fontsize=11)
        _panel(axes, {n: sorted(line) for n, line in panels[model, count, tokens].items()})
        axes.set_xlabel("distinct weight rows among the requests")
    grid[0][0].set_ylabel("useful tokens a second")
    figure.suptitle(
        f"sampler, requests of unequal lengths (dashed: the base model, without adapters)\n"
        f"{newest['machine']}, {newest['threads']} threads, torch {newest['torch']}",
        x=0.01,
        y=1 - 0.15 / height,
        ha="left",
        fontsize=11,
    )
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _panel(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """The lines, each with its name beside its right end."""
    counts = sorted({x for line in lines.values() for x, _ in line})
    values = [y for line in lines.values() for _, y in line]
    axes.set(xscale="log", yscale="log", ylim=(min(values) / 1.4, max(values) * 1.4))
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    to_share = axes.transAxes.inverted().transform
    ends = {}
    for name, line in lines.items():
        axes.plot(
            *zip(*line, strict=True),
            color=COLORS[name],
            linestyle="-" if name in SOLID else "--",
            linewidth=2.6 if name == "clp" else 1.3,
            marker="o",
            markersize=3,
        )
        ends[name] = float(to_share(axes.transData.transform(line[-1]))[1])
    for name, place in spread(ends.items()):
        axes.annotate(
            name,
            lines[name][-1],
            xytext=(1.05, place),
            textcoords="axes fraction",
            color=COLORS[name],
            fontsize=9,
            fontweight="bold" if name == "clp" else "normal",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": "#cccccc",
                "linewidth": 0.7,
                "relpos": (0, 0.5),
            },
        )
    heights = [(str(t), float(to_share(axes.transData.transform((1, t)))[1])) for t in TICKS]
    kept = [float(t) for t, place in apart(heights) if 0 <= place <= 1]
    for axis, ticks in ((axes.xaxis, counts), (axes.yaxis, kept)):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_minor_locator(NullLocator())
