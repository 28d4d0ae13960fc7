"""`python -m clp_kernels.selftest [--device cuda:1] [--op mixed_lora]`: tests the kernels here.

Each kernel is held to plain PyTorch in float64, in a process of its own, and the results are kept:
"auto" takes a GPU kernel only after it has passed on this GPU, and no kernel that has failed. The
exit code is 1 if a kernel failed, and 2 if an argument is wrong or there is nothing to test.

With --tune it measures on the CPU which path of mixed_lora is fastest for common sizes instead.
"""

import argparse
import time

import torch

from clp_kernels import trust
from clp_kernels.native import BackendError
from clp_kernels.ops.mixed_lora.cpu import ANY
from clp_kernels.selftest import cases, processes, tuning


def main(argv: list[str] | None = None) -> int:
    """Tests all kernels of a device (or those of one op) and prints a table; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m clp_kernels.selftest",
        description="Tests the kernels on this machine and keeps the results.",
        allow_abbrev=False,
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu, cuda or cuda:1 (%(default)s)")
    parser.add_argument(
        "--op", action="append", choices=list(cases.CASES), help="may be given several times (all)"
    )
    parser.add_argument("--backend", choices=("cpu", "triton", "cuda"), help="(all)")
    parser.add_argument(
        "--tune", action="store_true",
        help="measure the paths of mixed_lora on the CPU instead, for common sizes (a minute)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    device = _device(parser, options.device)
    if options.tune:
        return _tune(parser, options)
    try:
        trust.trust()  # the processes go by the kernels alone
        jobs = processes.jobs(device, options.op, options.backend)
    except BackendError as error:  # CLP_KERNELS_CPU_ISA, CLP_KERNELS_TRUST
        parser.exit(2, f"{error}\n")
    if not jobs:
        parser.exit(2, f"no such kernels run on {device} here: see python -m clp_kernels.info\n")
    begin = time.monotonic()
    found = processes.test(jobs, device)
    print(f"{'op':16} {'backend':8} {'result':7} {'cases':>5} {'seconds':>8}")
    for (op, backend), result in found.items():
        verdict = "passed" if result.reason is None else "FAILED"
        print(f"{op:16} {backend:8} {verdict:7} {result.cases:5} {result.seconds:8.1f}")
    for (op, backend), result in found.items():
        if result.reason is not None:
            print(f"{op} {backend}: {result.reason}")
    print(f"{time.monotonic() - begin:.1f} s; python -m clp_kernels.info shows what is kept")
    return int(any(result.reason is not None for result in found.values()))


def _tune(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Measures common sizes anew and prints a table; the exit code."""
    if torch.device(options.device).type != "cpu":
        parser.exit(2, f"--tune measures on the CPU, got --device {options.device}\n")
    if options.op or options.backend:
        parser.exit(2, "--tune measures mixed_lora, and takes no --op and no --backend\n")
    begin = time.monotonic()
    try:
        found = tuning.tune(tuning.common_sizes(), anew=True)
    except BackendError as error:  # CLP_KERNELS_TUNE, CLP_KERNELS_TRUST
        parser.exit(2, f"{error}\n")
    if not found:
        parser.exit(2, "nothing is measured here: see python -m clp_kernels.info\n")
    print(f"{'size':90} {'from':>6} {'to':>6} {'adapters':>8}")
    for size, limits in found.items():
        first, whole, adapters = ("any" if n == ANY else str(n) for n in limits)
        print(f"{size!s:90} {first:>6} {whole:>6} {adapters:>8}")
    print("tokens for which the C++ kernel runs all of mixed_lora, and up to which the adapters")
    print(f"{time.monotonic() - begin:.1f} s; python -m clp_kernels.info shows what is kept")
    return 0


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """Ends with exit code 2 if there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.exit(2, f"--device must be cpu, cuda or cuda:N, got {name!r}\n")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        parser.exit(2, f"--device must be cpu, cuda or cuda:N, got {name!r}\n")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.exit(2, f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs\n")
    return device


if __name__ == "__main__":
    raise SystemExit(main())
