"""`python -m clp_kernels.info [--json]`: versions, devices, the backends that run here and why the
others do not."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import torch

import clp_kernels
from clp_kernels import native, registry, trust
from clp_kernels.ops import choices
from clp_kernels.selftest import cases


def collect() -> dict[str, Any]:
    """Everything a bug report needs, as plain data; a missing part becomes a sentence."""
    packages = ("torch", "triton", "transformers", "peft", "safetensors", "numpy")
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            gpus.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    absent = {name: reason for name in registry.NAMES[1:] if (reason := _missing(name))}
    return {
        "clp_kernels": clp_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in packages},
        "nvcc": shutil.which("nvcc") or "not found",
        "gpus": gpus or ["none"],
        "threads": torch.get_num_threads(),
        "CLP_KERNELS_BACKEND": _backend_of_the_environment(),
        "modules": {
            "_cpu": _loaded("cpu"),
            "_cuda": _loaded("cuda"),
        },
        "backends": {
            op: [entry.name for entry in table if entry.name not in absent and not entry.kernels_of]
            for op, table in sorted(registry.BACKENDS.items())
            if not op.endswith("_backward")
        },
        "names without kernels": {
            op: ", ".join(f"{name} means {other}" for name, other in others)
            for op, table in sorted(registry.BACKENDS.items())
            if (others := [(entry.name, entry.kernels_of) for entry in table if entry.kernels_of])
        },
        "backends not here": absent or "none",
        "CLP_KERNELS_TRUST": _trust_of_the_environment(),
        "self-test": {
            f"{op} {name} on {device}": shown
            for op in cases.CASES
            for name in cases.backends(op)
            if name not in absent
            for device, shown in _tested(op, name)
        },
        "measured sizes": _measured(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Prints the report, as text or with --json; another argument ends with exit code 2."""
    parser = argparse.ArgumentParser(prog="info", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="as JSON")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.exit(2, f"info takes no argument but --json, got {unknown[0]!r}\n")
    report = collect()
    try:
        print(json.dumps(report, indent=2) if options.json else _as_text(report), flush=True)
    except BrokenPipeError:  # the reader has ended (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where the interpreter flushes what is left


def _as_text(report: dict[str, Any]) -> str:
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            for name, entry in value.items():
                shown = " > ".join(entry) if isinstance(entry, list) else entry
                lines.append(f"  {name:16} {shown}")
        else:
            lines.append(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    return "\n".join(lines)


def _missing(backend: str) -> str | None:
    """registry.missing, in a wrong environment too."""
    try:
        return registry.missing(backend)
    except ValueError as error:  # CLP_KERNELS_CPU_ISA names what this machine lacks
        return str(error)


def _loaded(backend: str) -> str:
    """Whether a compiled module can be used, and how it was built."""
    reason = _missing(backend)
    try:
        module = native.load(f"_{backend}")[0]
    except ValueError:  # as in _missing
        module = None
    if module is None:
        return str(reason)
    built = f"built with {module.BUILT_WITH}"
    if backend == "cuda":
        built += f", for {' '.join(module.ARCHITECTURES)}"
    elif reason is None:
        built = f"instruction set {native.isa()}, {built}"
    return f"loaded, {built}" if reason is None else f"not used: {reason}; {built}"


def _backend_of_the_environment() -> str:
    value = os.environ.get("CLP_KERNELS_BACKEND")
    if value is None:
        return "not set (auto)"
    if value == "":
        return "empty, as if it were not set (auto)"
    try:
        return registry.requested("auto")
    except ValueError as error:
        return f"{error}; every call of an op raises this"


def _trust_of_the_environment() -> str:
    try:
        return trust.trust()
    except ValueError as error:
        return f"{error}; every call of an op raises this"


def _measured() -> str:
    """Of how many sizes the fastest path is known, and the digest that runs are marked with."""
    try:
        if not choices.is_on():
            return "not used (CLP_KERNELS_TUNE, CLP_KERNELS_TRUST)"
        known = choices.known("mixed_lora")
    except ValueError as error:
        return f"{error}; every call of an op raises this"
    if not known:
        return "none (python -m clp_kernels.selftest --tune)"
    return f"{len(known)} of mixed_lora, {choices.fingerprint()}"


def _tested(op: str, backend: str) -> Iterator[tuple[str, str]]:
    """(device, what the self-test says of these kernels there)."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in [torch.device("cpu")] if backend == "cpu" else gpus:
        result = trust.find(op, backend, device)
        if result is None:
            yield str(device), f"not tested (python -m clp_kernels.selftest --device {device})"
        elif result.reason is None:
            yield str(device), f"passed in {result.cases} cases"
        else:
            yield str(device), f"FAILED: {result.reason}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
