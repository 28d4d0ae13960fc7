"""The tables made from rows: one for the terminal, and bench/RESULTS.md."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.rows import RESULTS, ROOT, Row, read

HEAD = """\
# Results

Made from `bench/results/*.csv` by `python -m bench results`: the latest row of each case and
provider on each machine. Protocol: `bench/timing.py`. Every provider passed its error gate on the
inputs it was timed with.

Times are microseconds a call, median [20th, 80th percentile]. `torch...` are plain PyTorch, the
baselines. A **speed-up** is the time of the fastest baseline of the same case and run over the
provider's own: above 1 is faster. **Floor** is the time to read the inputs once at the measured
bandwidth of a large copy; inputs that stay in a cache can be read faster.

A load average well above zero before a run means that other processes held cores meanwhile. With
as many threads as cores, times then jump by whole time slices (4 to 8 ms) while one thread of a
parallel region waits for its core: read the sections with one thread, or measure again on an idle
machine.
"""


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each op, machine, number of threads, case and provider."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[k] for k in ("op", "machine", "threads", "case", "provider"))
        kept[key] = row
    return list(kept.values())


def table(rows: Sequence[Row], *, spread: bool = True) -> str:
    """A Markdown table of one op on one machine, a line a case; `spread` adds p20 and p80."""
    cases = {row["case"]: json.loads(row["case"]) for row in rows}
    fields = list(dict.fromkeys(field for case in cases.values() for field in case))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    names.sort(key=lambda n: (n != "floor", not n.startswith("torch"), n != "reference"))
    ours = [n for n in names if n not in ("floor", "reference") and not n.startswith("torch")]
    lines = [[*fields, *names, *(f"{n} {what}" for n in ours for what in ("speed-up", "/ floor"))]]
    cell = {(row["case"], row["provider"]): row for row in rows}
    for key, case in cases.items():
        line = [str(case.get(field, "")) for field in fields]
        line += [_time(cell.get((key, name)), spread) for name in names]
        floor = cell.get((key, "floor"))
        for name in ours:
            row = cell.get((key, name))
            line.append(f"{float(row['ratio']):.2f}" if row and row["ratio"] else "")
            share = float(row["p50_us"]) / float(floor["p50_us"]) if row and floor else None
            line.append("" if share is None else f"{share:.1f}")
        lines.append(line)
    return _aligned(lines)


def _time(row: Row | None, spread: bool) -> str:
    if row is None:
        return ""
    p20, p50, p80 = (_short(float(row[f"{p}_us"])) for p in ("p20", "p50", "p80"))
    return f"{p50} [{p20}, {p80}]" if spread and row["provider"] != "floor" else p50


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    padded = ([c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write_results(folder: Path = RESULTS, target: Path = ROOT / "bench" / "RESULTS.md") -> None:
    """Makes RESULTS.md anew from the CSV files."""
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
        parts.append(
            f"## `{op}` on {machine}, threads: {threads}\n\n"
            f"torch {of}; {' to '.join(dates[:: max(1, len(dates) - 1)])}; commit "
            f"{', '.join(sorted(commits))} (+: with uncommitted changes); load average before the "
            f"run: {load:.1f}. Again: `{again}`.\n\n{table(rows)}\n"
        )
    target.write_text("\n".join(parts), encoding="utf-8")
