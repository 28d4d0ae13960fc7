"""`python -m clp_kernels.info [--json]`: versions, devices, and each backend with its reason."""

import importlib.metadata
import json
import os
import platform
import shutil
from typing import Any

import torch

import clp_kernels
from clp_kernels import dispatch, native


def collect() -> dict[str, Any]:
    """Everything a bug report needs, as plain data; a missing part becomes a sentence."""
    packages = ("torch", "triton", "transformers", "peft", "safetensors", "numpy")
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            gpus.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return {
        "clp_kernels": clp_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in packages},
        "nvcc": shutil.which("nvcc") or "not found",
        "gpus": gpus or ["none"],
        "threads": torch.get_num_threads(),
        "CLP_KERNELS_BACKEND": os.environ.get("CLP_KERNELS_BACKEND", "not set (auto)"),
        "modules": {
            "_cpu": _cpu_module(),
            "_cuda": native.cuda_missing() or "loaded",
        },
        "backends": {
            op: [entry.name for entry in table]
            for op, table in dispatch.BACKENDS.items()
            if not op.endswith("_backward")
        },
        "verified GPU kernels": [f"{op}/{name} on sm_{a}{b}" for op, name, (a, b) in
                                 sorted(dispatch.VERIFIED)] or ["none yet"],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Prints the report, as text or with --json."""
    import sys

    argv = sys.argv[1:] if argv is None else argv
    report = collect()
    if "--json" in argv:
        print(json.dumps(report, indent=2))
        return
    for key, value in report.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, entry in value.items():
                shown = " > ".join(entry) if isinstance(entry, list) else entry
                print(f"  {name:16} {shown}")
        else:
            print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")


def _cpu_module() -> str:
    try:
        return native.cpu_missing() or f"loaded, instruction set {native.isa()}"
    except ValueError as error:  # CLP_KERNELS_CPU_ISA names what this machine lacks
        return str(error)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
