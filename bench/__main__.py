"""`python -m bench sample` measures and appends rows; `python -m bench results` makes RESULTS.md.

Exit status 1: a provider was refused by its error gate.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench import rows, sample, tables, timing

QUICK = timing.Protocol(warmup=1, repeats=20, seconds=0.2)


def ladder(
    cases: Sequence[sample.Case],
    device: torch.device,
    protocol: timing.Protocol,
    *,
    bandwidth: float,
    save: Path | None,
    graph: bool = False,
    compiled: bool = False,
) -> tuple[list[rows.Row], dict[str, str]]:
    """Measures every case; gives the rows, and the reason of each refusal by case and provider.

    Each case is saved as soon as it is measured, so that an interrupted run keeps what it has.
    """
    shared = rows.provenance(device)
    found: list[rows.Row] = []
    refusals: dict[str, str] = {}
    for case in _progress(cases):
        providers = sample.providers(sample.inputs(case, device), compiled=compiled)
        times, refused = timing.measure(providers, device, protocol, graph=graph)
        fields = case.fields() | ({"graph": graph} if device.type == "cuda" else {})
        floor_us = case.floor_bytes() / bandwidth * 1e6
        new = rows.rows(shared, sample.OP, fields, times, floor_us)
        if save is not None:
            rows.append(save, new)
        found += new
        refusals |= {f"{name}, {fields}": reason for name, reason in refused.items()}
    return found, refusals


def _progress(cases: Sequence[sample.Case]) -> Iterable[sample.Case]:
    """A bar, where tqdm is installed; in a log a line every ten seconds."""
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    return tqdm(cases, unit="case", mininterval=0.1 if sys.stderr.isatty() else 10)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("sample", help="draw a token: mix, softmax, draw, log-probability")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    run.add_argument("--no-save", action="store_true", help="append nothing to bench/results")
    run.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    run.add_argument("--compile", action="store_true", help="torch.compile too; takes minutes")
    commands.add_parser("results", help="make bench/RESULTS.md from bench/results")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; gives the exit status."""
    args = parser().parse_args(argv)
    if args.command == "results":
        tables.write_results()
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no GPU", file=sys.stderr)
        return 2
    if args.graph and args.device != "cuda":
        print("--graph needs --device cuda", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    bandwidth = timing.copy_bandwidth(device)
    print(
        f"{rows.machine(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"copy bandwidth {bandwidth / 1e9:.0f} GB/s, load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    found, refusals = ladder(
        sample.cases(args.quick),
        device,
        QUICK if args.quick else timing.Protocol(),
        bandwidth=bandwidth,
        save=None if args.no_save else rows.RESULTS / f"{args.device}.csv",
        graph=args.graph,
        compiled=args.compile,
    )
    print(tables.table(found, spread=False))
    print("Microseconds a call (median); speed-up against the fastest baseline of the case.")
    for which, reason in refusals.items():
        print(f"REFUSED by the error gate: {which}: {reason}")
    return 1 if refusals else 0


if __name__ == "__main__":
    sys.exit(main())
