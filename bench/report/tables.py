"""The tables made from rows: one for the terminal, and bench/RESULTS.md."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import gpu_model
from bench.report.rows import RESULTS, ROOT, Row, is_baseline, read
from bench.timing import BASE

RANDOM = "llama-1b-random"  # bench/engine/sampler.py's model on a GPU where none is named
CAT = "torch_cat"  # the plain form that ours are compared with, if there is a base

HEAD = """\
# Results

Made from `bench/results/*.csv` by `python -m bench results`: the latest row of each case and
provider on each machine. Protocol: `bench/timing.py`. Every provider passed its error gate on the
inputs it was timed with.

Times are microseconds per call, median [20th, 80th percentile]. `torch...` and `peft` are the
baselines. **Floor** is the time to move the bytes once at the measured bandwidth of a large copy
(inputs that stay in a cache can be read faster), **floor_flops** the time of the multiplications at
the measured rate of a large square product of the same dtype. What the providers are stands at the
top of `bench/ops/sample.py`, `bench/ops/linear_logprob.py`, `bench/ops/mixed_lora.py` and
`bench/engine/sampler.py` and `bench/engine/training.py`; in the second and third, large outputs are
judged on evenly spaced rows.

A load average well above zero before a run means that other processes used cores meanwhile. With
as many threads as cores, times then jump by whole time slices (4 to 8 ms) while one thread of a
parallel region waits for its core: read the sections with one thread, or measure again on an idle
machine.
"""
SPEED_UP = """\
Microseconds per call (median). Speed-up: the time of the fastest baseline of the same case and run
over the own time; above 1 is faster."""
OVER_BASE = """\
Each cell: time over that of the bare layer (`base`), and in brackets the microseconds beyond it;
medians over the rounds, each against the base of its own round. "cat extra / X's": the extra time
of torch_cat over that of X (all: X has none); "X / cat": the whole time of X over torch_cat's."""
OVER_MODEL = """\
Each cell: time over that of the plain model (`base`), and in brackets the microseconds beyond it;
medians over the rounds, each against the base of its own round."""
RATE = """\
Useful tokens per second: the sum of the completions' lengths (`tokens`, of `N` requests) over the
median time of a run. Floor: reading all weights once for each token of the longest completion, at
the bandwidth of a large copy."""
FIRST = """\
Milliseconds to a request's first token: mean / 95th percentile over the requests, medians over the
runs."""
PLOTS = {
    "mixed_lora": "time over the base against T",
    "sampler": "tokens per second against the number of distinct weights",
}
MEMORY = """\
Peak memory beyond the weights, MB: keys and values that are kept, and what a run adds."""

Cells = dict[str, Row]  # the rows of one case by provider


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each op, machine, number of threads, case and provider."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[k] for k in ("op", "machine", "threads", "case", "provider"))
        kept[key] = row
    return list(kept.values())


def tables(rows: Sequence[Row], *, spread: bool = True) -> str:
    """A Markdown table for each op and kind of case in the rows, with what its cells mean."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        case = case_of(row)
        kind = ", ".join(str(case[key]) for key in ("mode", "rows") if key in case)
        groups.setdefault((row["op"], kind), []).append(row)
    parts = []
    for (op, kind), group in groups.items():
        heading = [f"**{kind}**"] if kind else []
        if op == "sampler":
            parts += [*heading, rate_tables(group)]
            continue
        if any(row["provider"] == BASE for row in group):
            said = OVER_BASE if op == "mixed_lora" else OVER_MODEL
            parts += [*heading, over_base_table(group, spread=spread), said]
        else:
            parts += [*heading, table(group, spread=spread), SPEED_UP]
        if any(row["peak_bytes"] for row in group):
            parts += [memory_table(group), "Peak memory beyond the inputs, over the first one's."]
    return "\n\n".join(parts)


def table(rows: Sequence[Row], *, spread: bool = True) -> str:
    """Times of one op on one machine, one line per case; `spread` adds p20 and p80."""
    names = _providers(rows)
    ours = [n for n in names if _is_ours(n)]

    def line(own: Cells) -> list[str]:
        cells = [_time(own.get(name), spread) for name in names]
        floor = own.get("floor")
        for row in map(own.get, ours):
            cells.append(f"{float(row['ratio']):.2f}" if row and row["ratio"] else "")
            share = float(row["p50_us"]) / float(floor["p50_us"]) if row and floor else None
            cells.append("" if share is None else f"{share:.1f}")
        return cells

    heads = [*names, *(f"{n} {what}" for n in ours for what in ("speed-up", "/ floor"))]
    return _aligned(rows, heads, line)


def over_base_table(rows: Sequence[Row], *, spread: bool = True) -> str:
    """Floors and the base in microseconds, every provider against the base, ours against CAT."""
    names = _providers(rows)
    timed = [n for n in names if n.startswith("floor") or n == BASE]
    rest = [n for n in names if n not in timed]
    ours = [n for n in rest if _is_ours(n)]

    def line(own: Cells) -> list[str]:
        cells = [_time(own.get(name), spread) for name in timed]
        cells += [_over(own.get(name)) for name in rest]
        cat = own.get(CAT)
        for row in map(own.get, ours):
            if row is None or cat is None or not (row["extra_us"] and cat["extra_us"]):
                cells += ["", ""]
                continue
            extra = float(row["extra_us"])
            cells.append(f"{float(cat['extra_us']) / extra:.2f}" if extra > 0 else "all")
            cells.append(f"{float(row['p50_us']) / float(cat['p50_us']):.3f}")
        return cells

    ratios = [head for name in ours for head in (f"cat extra / {name}'s", f"{name} / cat")]
    if CAT not in names:
        return _aligned(rows, [*timed, *rest], lambda own: line(own)[: len(timed) + len(rest)])
    return _aligned(rows, [*timed, *rest, *ratios], line)


def memory_table(rows: Sequence[Row]) -> str:
    """The peak of the base, or of the first baseline, in MB, and every other provider's over it."""
    first, *rest = [n for n in _providers(rows) if not n.startswith("floor")]

    def line(own: Cells) -> list[str]:
        if first not in own:
            return []
        least = float(own[first]["peak_bytes"])
        peaks = [own[name]["peak_bytes"] if name in own else "" for name in rest]
        return [f"{least / 1e6:.1f}", *(f"{float(p) / least:.2f}" if p else "" for p in peaks)]

    return _aligned(rows, [f"{first} MB", *rest], line)


def rate_tables(rows: Sequence[Row]) -> str:
    """Tokens per second, time to first token, peak memory of generation runs; one line per case."""
    parts = [_cells(rows, lambda row: _short(rate(row))), RATE]
    timed = [row for row in rows if row["ttft_us"]]
    if timed:
        parts += [_cells(timed, _first), FIRST]
    weighed = [row for row in rows if row["peak_bytes"]]
    if weighed:
        parts += [_cells(weighed, lambda row: _short(float(row["peak_bytes"]) / 1e6)), MEMORY]
    return "\n\n".join(parts)


def case_of(row: Row) -> dict[str, Any]:
    """A row's case."""
    case: dict[str, Any] = json.loads(row["case"])
    return case


def rate(row: Row) -> float:
    """Useful tokens per second of a generation run."""
    return float(case_of(row)["tokens"]) / float(row["p50_us"]) * 1e6


def _first(row: Row) -> str:
    mean, p95 = (_short(float(row[key]) / 1e3) for key in ("ttft_us", "ttft_p95_us"))
    return f"{mean} / {p95}"


def _cells(rows: Sequence[Row], text: Callable[[Row], str]) -> str:
    """One line per case, one column per provider."""
    names = _providers(rows)
    return _aligned(rows, names, lambda own: [text(own[n]) if n in own else "" for n in names])


def _providers(rows: Sequence[Row]) -> list[str]:
    """Floors first, then the base, baselines, the reference, ours."""
    names = dict.fromkeys(row["provider"] for row in rows)
    return sorted(
        names,
        key=lambda n: (not n.startswith("floor"), n != BASE, not is_baseline(n), n != "reference"),
    )


def _is_ours(name: str) -> bool:
    """A kernel: neither floor, base, baseline nor the reference."""
    return not (name.startswith(("floor", BASE, "reference")) or is_baseline(name))


def _over(row: Row | None) -> str:
    if row is None or not row["over_base"]:
        return ""
    return f"{float(row['over_base']):.3f} ({_short(float(row['extra_us']))})"


def _time(row: Row | None, spread: bool) -> str:
    if row is None:
        return ""
    p20, p50, p80 = (_short(float(row[f"{p}_us"])) for p in ("p20", "p50", "p80"))
    return f"{p50} [{p20}, {p80}]" if spread and not row["provider"].startswith("floor") else p50


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _aligned(rows: Sequence[Row], heads: list[str], line: Callable[[Cells], list[str]]) -> str:
    """A Markdown table with a line per case: its fields, and what `line` gives, if anything."""
    cases: dict[str, Cells] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["provider"]] = row
    known = {key: json.loads(key) for key in cases}
    fields = dict.fromkeys(field for case in known.values() for field in case)
    shown = [field for field in fields if field not in ("mode", "rows")]
    lines = [[*shown, *heads]]
    for key, own in cases.items():
        if cells := line(own):
            lines.append([*(str(known[key].get(field, "")) for field in shown), *cells])
    # At least "-:", the shortest rule of a Markdown table.
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    padded = ([c.rjust(w) for c, w in zip(cells, widths, strict=True)] for cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def write_results(folder: Path = RESULTS, target: Path = ROOT / "bench" / "RESULTS.md") -> None:
    """Writes RESULTS.md from the CSV files."""
    parts = [HEAD]
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for path in sorted(folder.glob("*.csv")):
        for row in latest(read(path)):
            key = (row["op"], path.stem, row["machine"], row["threads"])
            groups.setdefault(key, []).append(row)
    for (op, device, machine, threads), rows in sorted(groups.items()):
        commits = {f"{r['commit']}{'+' * (r['dirty'] == 'yes')}" for r in rows}
        dates = sorted({r["date"][:10] for r in rows})
        of = ", ".join(sorted({r["torch"] for r in rows}))
        load = max(float(r["load"]) for r in rows)
        again = f"OMP_NUM_THREADS={threads} python -m bench {op} --device {device}"
        commands = sorted({f"`{again}{_options(json.loads(row['case']))}`" for row in rows})
        plot = folder / f"{op}_{device}.png"
        shown = PLOTS.get(op, "")
        image = f"![{shown}](results/{plot.name})\n\n"
        parts.append(
            f"## `{op}` on {machine}, threads: {threads}\n\n"
            f"torch {of}; {' to '.join(dates[:: max(1, len(dates) - 1)])}; commit "
            f"{', '.join(sorted(commits))} (+: with uncommitted changes); load average before the "
            f"run: {load:.1f}. Again: {', '.join(commands)}.\n\n"
            f"{image if plot.is_file() else ''}{tables(rows)}\n"
        )
    if model := gpu_model.section(folder / gpu_model.TABLE.relative_to(RESULTS)):
        parts.append(model)
    target.write_text("\n".join(parts), encoding="utf-8")


def _options(case: dict[str, Any]) -> str:
    """The options of the command that measured a case."""
    if "weight_rows" in case:
        return f" --model {case['model']}" * (case["model"] != RANDOM)
    grad, graph = "backward" in case.get("mode", ""), case.get("graph", False)
    return " --grad" * grad + " --graph" * graph
