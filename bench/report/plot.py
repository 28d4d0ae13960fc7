"""The plots made from rows: `mixed_lora` against the bare layer, and the rates of `sampler`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.report.rows import RESULTS, Row, read
from bench.report.tables import case_of, latest, rate

Line = list[tuple[float, float]]
Panels = dict[str, dict[str, Line]]  # title -> provider -> points
GAP = 0.06  # between two labels or ticks, as a share of the panel's height


@dataclass(frozen=True)
class Style:
    """How the providers of an op are drawn: those without a colour are left out.

    bold: ours, with a thick line. dashes: line styles other than "-". ticks: of the vertical axis.
    """

    colors: Mapping[str, str]
    bold: Sequence[str]
    dashes: Mapping[str, str]
    ticks: Sequence[float]
    x: str
    y: str


MIXED_LORA = Style(
    {
        "torch_cat": "#222222", "torch_stacked": "#8a6d1f", "torch_side_stream": "#7b5ea7",
        "torch_cat_compiled": "#4f7f7f", "torch_loop": "#888888", "peft": "#b07aa1",
        "cpu": "#0b5fa5", "cuda": "#c2410c", "triton": "#15803d", "triton_fused": "#15803d",
        "triton_split": "#15803d",
    },
    ("cpu", "cuda", "triton"),
    {"triton_fused": "--", "triton_split": ":"},
    (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.005, 1.01, 1.02, 1.03, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10),
    "tokens T",
    "time / bare linear layer",
)  # fmt: skip
SAMPLER = Style(
    {
        "clp": "#0b5fa5", "clp_no_adapters": "#6fa8dc", "torch_generate_base": "#222222",
        "peft_merged_generate": "#b0413e", "transformers_cb": "#8a6d1f", "vllm": "#7b5ea7",
    },
    ("clp",),
    # What runs without adapters, whatever the weights.
    dict.fromkeys(("clp_no_adapters", "torch_generate_base", "transformers_cb", "vllm"), "--"),
    [digit * 10**power for power in range(8) for digit in (1, 2, 5)],
    "distinct weights among the requests",
    "useful tokens per second",
)  # fmt: skip


def write_plots(folder: Path = RESULTS) -> list[Path]:
    """<op>_<device>.png for each <device>.csv with rows to draw; gives the files.

    They show the machine and number of threads of the newest row.
    """
    written = []
    for path in sorted(folder.glob("*.csv")):
        rows = latest(read(path))
        for op, style, panels_of in (
            ("mixed_lora", MIXED_LORA, mixed_lora_panels),
            ("sampler", SAMPLER, sampler_panels),
        ):
            own = [r for r in rows if r["op"] == op and r["provider"] in style.colors and _drawn(r)]
            if own:
                newest = max(own, key=lambda row: row["date"])
                same = [r for r in own if all(r[k] == newest[k] for k in ("machine", "threads"))]
                target = folder / f"{op}_{path.stem}.png"
                _draw(*panels_of(same), style, newest, target)
                written.append(target)
    return written


def _drawn(row: Row) -> bool:
    """Whether a row is of a generation run, or of a forward pass with a base to compare with."""
    case = case_of(row)
    forward = case.get("mode") == "forward" and "rows" not in case
    return "weight_rows" in case or (forward and row["over_base"] != "")


def mixed_lora_panels(rows: Sequence[Row]) -> tuple[str, int, Panels]:
    """(title, columns, a panel per d and dtype), for the largest rank of the ladder."""
    cases = [(case_of(row), row) for row in rows]
    rank = max(case["m"] * case["r"] for case, _ in cases)
    cases = [(case, row) for case, row in cases if case["m"] * case["r"] == rank]
    sizes, dtypes = (sorted({case[key] for case, _ in cases}) for key in ("d", "dtype"))
    panels: Panels = {f"d = {size}, {dtype}": {} for dtype in dtypes for size in sizes}
    for case, row in cases:
        lines = panels[f"d = {case['d']}, {case['dtype']}"]
        lines.setdefault(row["provider"], []).append((case["T"], float(row["over_base"])))
    m = max(case["m"] for case, _ in cases)
    return f"mixed_lora, forward, m = {m}, r = {rank // m}: ", len(sizes), panels


def sampler_panels(rows: Sequence[Row]) -> tuple[str, int, Panels]:
    """(title, columns, a panel per model and number of requests)."""
    panels: Panels = {}
    for row in rows:
        case = case_of(row)
        name = f"{case['model']}: {case['N']} requests, {case['tokens']:,} tokens"
        lines = panels.setdefault(name, {})
        lines.setdefault(row["provider"], []).append((case["weight_rows"], rate(row)))
    title = "sampler, requests of unequal lengths (dashed: the base model, without adapters)\n"
    return title, len(panels), panels


def _draw(
    title: str, columns: int, panels: Panels, style: Style, newest: Row, target: Path
) -> None:
    lines = -(-len(panels) // columns)
    # In inches: a panel of 3.6 by 3, beside it 2 for its labels and the next one's ticks.
    width, height = 0.9 + 5.8 * columns, 1.4 + 3.8 * lines
    figure, grid = pyplot.subplots(lines, columns, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=0.9 / width, right=1 - 2 / width, bottom=0.6 / height, top=1 - 1.2 / height,
        wspace=2.2 / 3.6, hspace=0.8 / 3,
    )  # fmt: skip
    for axes, (name, providers) in zip(grid.flat, panels.items(), strict=True):
        axes.set_title(name, loc="left", fontsize=11)
        if providers:
            _panel(axes, {n: sorted(points) for n, points in providers.items()}, style)
    for axes in grid[-1]:
        axes.set_xlabel(style.x)
    for axes in grid[:, 0]:
        axes.set_ylabel(style.y)
    machine = f"{newest['machine']}, {newest['threads']} threads, torch {newest['torch']}"
    figure.suptitle(title + machine, x=0.01, y=1 - 0.15 / height, ha="left", fontsize=11)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _panel(axes: Any, lines: dict[str, Line], style: Style) -> None:
    """The lines, each with its name beside its right end."""
    values = [value for points in lines.values() for _, value in points]
    low, high = min(values), max(values)
    if style is MIXED_LORA:  # the bare layer is at 1
        low, high = min(1.0, low), max(1.02, high)
        axes.axhline(1, color="#bbbbbb", linewidth=1)
    margin = max(1.001, (high / low) ** 0.06)
    axes.set(xscale="log", yscale="log", ylim=(low / margin, high * margin))
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    to_share = axes.transAxes.inverted().transform

    def share(point: tuple[float, float]) -> float:
        return float(to_share(axes.transData.transform(point))[1])

    for name, points in lines.items():
        axes.plot(
            *zip(*points, strict=True), color=style.colors[name], marker="o", markersize=3,
            linestyle=style.dashes.get(name, "-"), linewidth=2.6 if name in style.bold else 1.3,
        )  # fmt: skip
    arrow = {"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.7, "relpos": (0, 0.5)}
    for name, height in spread((name, share(points[-1])) for name, points in lines.items()):
        axes.annotate(
            name, lines[name][-1], xytext=(1.05, height), textcoords="axes fraction",
            color=style.colors[name], fontsize=9, va="center", arrowprops=arrow,
            fontweight="bold" if name in style.bold else "normal",
        )  # fmt: skip
    kept = apart((str(tick), share((1, tick))) for tick in style.ticks)
    heights = [float(tick) for tick, height in kept if 0 <= height <= 1]
    for axis, ticks in (
        (axes.xaxis, sorted({x for points in lines.values() for x, _ in points})),
        (axes.yaxis, heights),
    ):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(_number))
        axis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)


def _number(value: float, _: Any) -> str:
    return f"{value:g}" if value < 1000 else f"{value:,.0f}"


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
