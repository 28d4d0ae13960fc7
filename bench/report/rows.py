"""What a measurement leaves: rows of bench/results/<device>.csv, and the tables made from them.

The CSV is append-only. Its machine column holds the processor's or GPU's model, nothing else of
the machine.
"""

import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.timing import Timing
from clp_kernels.files import write_whole
from clp_kernels.ops import choices

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
FIELDS = (
    "date",  # UTC, one for the whole run
    "commit",
    "dirty",  # whether files other than results had changed since the commit
    "machine",
    "threads",
    "load",  # of the machine when the run began (one-minute average): what others were doing
    "torch",
    "op",
    "provider",  # one of BASELINES begins it: a baseline; "floor...": time at the device's best
    "case",  # JSON
    "p20_us",
    "p50_us",
    "p80_us",
    "ratio",  # times as fast as the fastest baseline of this case in this run
    "max_err_ratio",  # largest share of the error budget; 1 is the limit
    "peak_bytes",  # memory beyond the inputs
    "extra_us",  # beyond "base" of the same round, median over the rounds
    "over_base",  # time over that of "base" in the same round, median over the rounds
    "ttft_us",  # of a generation run: time to a request's first token, its mean; median of rounds
    "ttft_p95_us",  # its 95th percentile over the requests; median of rounds
    "tuning",  # on the CPU, a digest of which paths are fastest (clp_kernels.ops.choices)
)
DIGITS = {"ratio": 3, "max_err_ratio": 4, "peak_bytes": 0, "over_base": 4}  # of others 2
OLDER = (16, 18, 20)  # how many of the columns the files of earlier days have
BASELINES = ("torch", "peft", "transformers", "flashinfer", "vllm", "liger", "cut_cross_entropy")
Row = dict[str, str]


def provenance(device: torch.device) -> Row:
    """When, what and where: the columns that all rows of a run share."""
    commit, dirty = _commit()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "dirty": dirty,
        "machine": machine(device),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "torch": torch.__version__,
        "tuning": (device.type == "cpu" and choices.fingerprint()) or "",
    }


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's model and its number of cores."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def _commit() -> tuple[str, str]:
    """(commit, dirty); outside a git checkout ($GIT_COMMIT or "unknown", "unknown")."""
    status = ("status", "--porcelain", "--", ".", ":!bench/results", ":!bench/RESULTS.md")
    outputs = []
    for command in (("rev-parse", "--short=12", "HEAD"), status):
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            break
        if done.returncode != 0:
            break
        outputs.append(done.stdout.strip())
    else:
        return outputs[0], "yes" if outputs[1] else "no"
    return os.environ.get("GIT_COMMIT", "unknown"), "unknown"


def is_baseline(provider: str) -> bool:
    """Whether speed-ups are measured against it; "base" and floors are not baselines."""
    return provider.startswith(BASELINES)


def rows(
    shared: Row,
    op: str,
    case: Mapping[str, object],
    times: Mapping[str, Timing],
    floors: Mapping[str, float],
) -> list[Row]:
    """A row for each floor (in us) and each provider, with ratios to the fastest baseline."""
    baselines = [t.p50_us for name, t in times.items() if is_baseline(name)]
    strongest = min(baselines, default=None)

    def row(provider: str, timing: Timing) -> Row:
        numbers = vars(timing) | {
            "ratio": None if strongest is None else strongest / timing.p50_us,
            "max_err_ratio": None if provider in floors else timing.max_err_ratio,
        }
        found = shared | {"op": op, "provider": provider, "case": json.dumps(case)}
        for name, value in numbers.items():
            found[name] = "" if value is None else f"{value:.{DIGITS.get(name, 2)}f}"
        return {name: found[name] for name in FIELDS}

    floor_times = {name: Timing(us, us, us, 0.0) for name, us in floors.items()}
    return [row(name, timing) for name, timing in (floor_times | dict(times)).items()]


def append(path: Path, new: Iterable[Row]) -> None:
    """Adds rows at the end of the file, with a header if it is new.

    A file from before the last columns is first rewritten with them, empty in its rows.

    Raises: ValueError if the file has other columns; values that are there never change.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
    header = _header(path)
    if header in [FIELDS[:count] for count in OLDER]:
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(read(path))
        write_whole(path, text.getvalue().encode())
    elif header != FIELDS:
        raise ValueError(f"{path.name} has the columns {list(header)}, expected {list(FIELDS)}")
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, FIELDS, lineterminator="\n").writerows(new)


def _header(path: Path) -> tuple[str, ...]:
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(next(csv.reader(file), []))


def read(path: Path) -> list[Row]:
    """The rows of a file, oldest first, columns that it lacks empty; [] if it is missing."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [dict.fromkeys(FIELDS, "") | row for row in csv.DictReader(file)]
