"""Speed against plain PyTorch. `python -m bench` with `sample`, `mixed_lora`, `linear_logprob`,
`sampler` or `training` measures and appends rows, `python -m bench results` makes RESULTS.md and
the plots.

Exit status 1: a provider was refused by its error gate.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from bench import timing
from bench.ops import linear_logprob, mixed_lora, sample
from bench.report import rows, tables

QUICK = timing.Protocol(warmup=1, repeats=20, seconds=0.2)
Case = sample.Case | mixed_lora.Case | linear_logprob.Case


def ladder(
    subject: ModuleType,
    cases: Sequence[Case],
    device: torch.device,
    protocol: timing.Protocol,
    *,
    roofs: timing.Roofs,
    save: Path | None,
    graph: bool = False,
    compiled: bool = False,
    memory: bool = False,
) -> tuple[list[rows.Row], dict[str, str]]:
    """Measures every case; gives the rows, and the reason of each refusal by case and provider.

    Each case is saved as soon as it is measured, so that an interrupted run keeps what it has.
    """
    shared = rows.provenance(device)
    found: list[rows.Row] = []
    refusals: dict[str, str] = {}
    for case in timing.progress(cases, len(cases), "case"):
        providers = subject.providers(subject.inputs(case, device), compiled=compiled)
        times, refused = timing.measure(providers, device, protocol, graph=graph, memory=memory)
        fields = case.fields() | ({"graph": graph} if device.type == "cuda" else {})
        new = rows.rows(shared, subject.OP, fields, times, case.floors(roofs))
        if save is not None:
            rows.append(save, new)
        found += new
        refusals |= {f"{name}, {fields}": reason for name, reason in refused.items()}
    return found, refusals


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    subjects = {
        "sample": "draw a token: mix, softmax, filter, draw, log-probability",
        "linear_logprob": "log-probabilities from hidden states and their gradient, and memory",
        "mixed_lora": "a linear layer with adapters mixed per example; on a GPU decode with "
        "--graph, prefill without",
        "sampler": "whole generation runs of requests with unequal lengths and their own weights",
        "training": "forward and backward of a training step by conditioning, and memory",
    }
    for name, what in subjects.items():
        run = commands.add_parser(name, help=what, description=what)
        run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        run.add_argument("--quick", action="store_true", help="fewer and smaller cases and repeats")
        run.add_argument("--no-save", action="store_true", help="append nothing to bench/results")
        if name == "sampler":
            model = '"tiny" (default on the CPU), a path or a hub name; default on a GPU: '
            run.add_argument("--model", help=f"{model}a Llama of 1B random weights")
            continue
        if name == "training":
            continue
        run.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
        run.add_argument("--compile", action="store_true", help="torch.compile too; takes minutes")
        if name == "mixed_lora":
            run.add_argument("--grad", action="store_true", help="forward and backward, and memory")
    commands.add_parser("results", help="make RESULTS.md and the plots from bench/results")
    return top


def plan(args: argparse.Namespace) -> tuple[ModuleType, Sequence[Case], timing.Protocol]:
    """The subject, its cases, and how often each is timed; prints which cases are left out."""
    if args.command == "sample":
        return sample, sample.cases(args.quick), QUICK if args.quick else timing.Protocol()
    if args.command == "linear_logprob":
        quick = linear_logprob.QUICK_PROTOCOL
        found = linear_logprob.cases(args.device, args.quick)
        return linear_logprob, found, quick if args.quick else linear_logprob.PROTOCOL
    every = mixed_lora.cases(args.device, grad=args.grad, graph=args.graph, quick=args.quick)
    cases = [case for case in every if args.device == "cuda" or not mixed_lora.too_slow(case)]
    for case in every:
        if case not in cases:
            print(f"left out (no bfloat16 product in this processor): {case.fields()}")
    protocol = mixed_lora.GRAD_PROTOCOL if args.grad else timing.Protocol()
    quick = mixed_lora.QUICK_GRAD_PROTOCOL if args.grad else QUICK
    return mixed_lora, cases, quick if args.quick else protocol


def sampler_runs(args: argparse.Namespace) -> int:
    """Measures `sampler`; gives the exit status."""
    from bench.engine import sampler  # transformers, which a machine that times kernels may lack

    device = torch.device(args.device)
    name = args.model or ("tiny" if args.device == "cpu" else sampler.RANDOM)
    try:
        policy, base = sampler.models(name, device)
    except ValueError as error:
        print(f"--model: {error}", file=sys.stderr)
        return 2
    protocol = sampler.QUICK_PROTOCOL if args.quick else sampler.PROTOCOL
    bandwidth = timing.copy_bandwidth(device)
    print(_where(device, timing.Roofs(bandwidth, {})), flush=True)
    refusals: dict[str, str] = {}
    for case in sampler.cases(args.device, args.quick):
        try:
            found, refused, missing = sampler.measure(case, name, policy, base, protocol, bandwidth)
        except ValueError as error:  # the sampler does not support the model, or it is too short
            print(f"--model {name}: {error}", file=sys.stderr)
            return 2
        if not args.no_save:
            rows.append(rows.RESULTS / f"{args.device}.csv", found)
        print(tables.tables(found, spread=False))
        print("\nTokens per second over tokens per second:")
        print("\n".join(sampler.ratios(found)))
        for which, reason in missing.items():
            print(f"not measured: {which}: {reason}")
        refusals |= {f"{which}, {case}": reason for which, reason in refused.items()}
    return _refused(refusals)


def training_runs(args: argparse.Namespace) -> int:
    """Measures `training`; gives the exit status."""
    from bench.engine import training  # transformers, as for the sampler

    device = torch.device(args.device)
    protocol = training.QUICK_PROTOCOL if args.quick else training.PROTOCOL
    roofs = timing.Roofs(timing.copy_bandwidth(device), {})
    print(_where(device, roofs), flush=True)
    save = None if args.no_save else rows.RESULTS / f"{args.device}.csv"
    refusals: dict[str, str] = {}
    for case in training.cases(args.quick):
        made = training.inputs(case, device)
        providers = training.providers(made)
        times, refused = timing.measure(providers, device, protocol, memory=True)
        found = rows.rows(rows.provenance(device), training.OP, case.fields(), times, {})
        if save is not None:
            rows.append(save, found)
        print(tables.tables(found, spread=False))
        parameters = ", ".join(
            f"{name} {share:.3f}" for name, share in training.trained(made).items()
        )
        print(f"\nTrained parameters over those of the model: {parameters}\n")
        refusals |= {f"{name}, {case}": reason for name, reason in refused.items()}
    return _refused(refusals)


def _where(device: torch.device, roofs: timing.Roofs) -> str:
    """The machine and its state, in a line."""
    rates = {dtype: f"{rate / 1e9:.0f} GFLOP/s" for dtype, rate in roofs.flops.items()}
    gemm = "".join(f", {dtype} GEMM {rate}" for dtype, rate in rates.items())
    return (
        f"{rows.machine(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"copy bandwidth {roofs.bandwidth / 1e9:.0f} GB/s{gemm}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def _refused(refusals: dict[str, str]) -> int:
    """Prints the refusals; gives the exit status."""
    for which, reason in refusals.items():
        print(f"REFUSED by the error gate: {which}: {reason}")
    return 1 if refusals else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; gives the exit status."""
    args = parser().parse_args(argv)
    if args.command == "results":
        # matplotlib, which a machine that only measures may lack
        from bench.report import plot

        plot.write_plots()
        tables.write_results()
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no GPU", file=sys.stderr)
        return 2
    if args.command == "sampler":
        return sampler_runs(args)
    if args.command == "training":
        return training_runs(args)
    if args.graph and args.device != "cuda":
        print("--graph needs --device cuda", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    subject, cases, protocol = plan(args)
    dtypes = sorted({case.dtype for case in cases}) if subject is not sample else []
    roofs = timing.roofs(device, dtypes)
    print(_where(device, roofs), flush=True)
    save = None if args.no_save else rows.RESULTS / f"{args.device}.csv"
    memory = subject is linear_logprob or (subject is mixed_lora and args.grad)
    options = {"graph": args.graph, "compiled": args.compile, "memory": memory}
    found, refusals = ladder(subject, cases, device, protocol, roofs=roofs, save=save, **options)
    print(tables.tables(found, spread=False))
    return _refused(refusals)


if __name__ == "__main__":
    sys.exit(main())
