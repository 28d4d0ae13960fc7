"""What people look at after an evaluation: tables on the terminal and pareto.png."""

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clp.data.conversation import message_text
from clp.evaluation.frontier import Frontier
from clp_kernels.files import flush, write_whole

# The last says what the others belong to.
FILES = ("samples.jsonl", "pareto.png", "frontier.json")


def print_frontier(front: Frontier, console: Console) -> None:
    """Rewards, KL, distinct-2 and length for each of the weights; the figures below."""
    title = f"{front.prompts} held-out prompts per line{_strength(front)}"
    table = Table(title=title, caption=_figures(front))
    for name in front.objectives:
        table.add_column(f"w {name}", justify="right")
    for name in front.objectives:
        table.add_column(name, justify="right", style="bold")
    for name in ("KL per token", "distinct-2", "tokens", "Pareto"):
        table.add_column(name, justify="right")
    for w, r, kl, d2, length, best in zip(
        front.weights, front.rewards, front.kl_per_token, front.distinct_2, front.mean_length,
        front.pareto, strict=True,
    ):  # fmt: skip
        cells = [f"{v:.2f}" for v in w] + [f"{v:.3f}" for v in r]
        table.add_row(*cells, f"{kl:.3f}", f"{d2:.2f}", f"{length:.1f}", "*" if best else "")
    table.add_section()
    base = [f"{v:.3f}" for v in front.base_rewards]
    table.add_row(
        "base", *[""] * (len(base) - 1), *base, "0", f"{front.base_distinct_2:.2f}",
        f"{front.base_mean_length:.1f}", "",
    )  # fmt: skip
    console.print(table)


def _strength(front: Frontier) -> str:
    return "" if front.alpha is None else f", KL strength {front.alpha:.3g}"


def _figures(front: Frontier) -> str:
    each = front.spearman.items()
    rho = ", ".join(f"{n} {'-' if v is None else format(v, '.3f')}" for n, v in each)
    if front.base_hypervolume:
        beside = f"{front.hypervolume / front.base_hypervolume:.2f} x the base's"
    else:
        beside = "the base's is 0"
    return f"Spearman: {rho}; hypervolume {front.hypervolume:.3f} ({beside})"


def save_evaluation(front: Frontier, samples: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes FILES, in that order, in place of those of an earlier evaluation.

    All are whole before the first of them takes its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".evaluation-", dir=folder) as partial:
        written = [Path(partial) / name for name in FILES]
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        written[0].write_text(text, encoding="utf-8")
        plot_frontier(front, written[1])
        front.save(written[2])
        for path in written:
            flush(path)
        for path in written:
            path.replace(folder / path.name)


def print_samples(
    front: Frontier, samples: Sequence[dict[str, Any]], console: Console, prompts: int = 2
) -> None:
    """The same prompts at five trade-offs, side by side."""
    last = len(front.weights) - 1
    chosen = sorted({round(i * last / 4) for i in range(5)})
    for p in range(min(prompts, front.prompts)):
        first = samples[p]
        table = Table(title=f"“{message_text(first['prompt'])}”", show_lines=True)
        for i in chosen:
            weights = zip(front.objectives, front.weights[i], strict=True)
            title = " ".join(f"{n} {v:.2f}" for n, v in weights)
            table.add_column(title, ratio=1, overflow="fold")
        table.add_row(*(samples[i * front.prompts + p]["text"].strip() for i in chosen))
        console.print(table)


def plot_frontier(front: Frontier, path: Path) -> None:
    """Draws pareto.png: the front of the first two objectives, and what each weight does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    m = len(front.objectives)
    two = m >= 2
    figure, axes = plt.subplots(1, 3 if two else 2, figsize=(14 if two else 9.5, 4.4))
    panels = list(axes)
    if two:
        _draw_front(panels.pop(0), front)
    steer, cost = panels
    for i, name in enumerate(front.objectives):
        pairs = sorted((w[i], r[i]) for w, r in zip(front.weights, front.rewards, strict=True))
        steer.plot(*zip(*pairs, strict=True), "o-", label=name, color=f"C{i}")
        steer.axhline(front.base_rewards[i], color=f"C{i}", linestyle=":", linewidth=1)
    steer.set_xlabel("weight of the objective")
    steer.set_ylabel("its mean reward (dotted: base model)")
    steer.set_title("Steering")
    steer.legend()
    x = [w[0] for w in front.weights]
    cost.plot(x, front.kl_per_token, "s-", color="C3", label="KL to the base, nats per token")
    cost.plot(x, front.distinct_2, "^-", color="C4", label="distinct-2")
    cost.axhline(front.base_distinct_2, color="C4", linestyle=":", linewidth=1, label="base's")
    cost.set_xlabel(f"weight of {front.objectives[0]}")
    cost.set_ylim(bottom=0)
    cost.set_title("What it costs")
    cost.legend()
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    plt.close(figure)
    write_whole(path, png.getvalue())


def _draw_front(axis: Any, front: Frontier) -> None:
    xs, ys = ([r[i] for r in front.rewards] for i in (0, 1))
    axis.plot(xs, ys, "-", color="0.8", zorder=1)
    colors = [w[0] for w in front.weights]
    points = axis.scatter(xs, ys, c=colors, cmap="viridis", s=60, zorder=2)
    base = front.base_rewards[:2]
    axis.scatter(*base, marker="X", s=90, color="C3", zorder=3)
    axis.annotate("base model", base, xytext=(9, -4), textcoords="offset points", color="C3")
    axis.set_xlabel(f"{front.objectives[0]} (mean reward)")
    axis.set_ylabel(f"{front.objectives[1]} (mean reward)")
    volumes = f"{front.hypervolume:.3f}, base {front.base_hypervolume:.3f}"
    axis.set_title(f"Hypervolume {volumes}{_strength(front)}")
    axis.figure.colorbar(points, ax=axis, label=f"weight of {front.objectives[0]}")
