"""Which kernels "auto" may take: CLP_KERNELS_TRUST, and the results of the self-test.

`python -m clp_kernels.selftest` makes the results. A file in the user's cache folder has them by
machine, op and backend (clp_kernels.files).
"""

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clp_kernels import native
from clp_kernels.files import CacheFile, warn_once
from clp_kernels.native import BackendError

TRUSTS = ("selftest", "all", "none")


class Result(NamedTuple):
    """Of one op and backend on one machine. reason: why the kernels failed, None if they passed."""

    reason: str | None
    cases: int
    seconds: float


Results = dict[str, dict[str, dict[str, Result]]]  # machine, op, backend

of_this_process: Results = {}
distrusted: dict[tuple[str, str, torch.device], str | None] = {}


def distrust(op: str, backend: str, device: torch.device) -> str | None:
    """Why "auto" does not take a backend on this device, or None. Looked up once per process.

    The first op whose kernels have not been tested on a GPU causes a warning with the command to
    run.

    Raises:
        BackendError: CLP_KERNELS_TRUST is none of its values.
    """
    key = (op, backend, device)
    if key not in distrusted:
        distrusted[key] = _why(op.removesuffix("_backward"), backend, device)
    return distrusted[key]


def forget() -> None:
    """Has `distrust` look again: there are new results."""
    distrusted.clear()


def _why(op: str, backend: str, device: torch.device) -> str | None:
    if backend == "reference":
        return None
    if trust() == "none":
        return "CLP_KERNELS_TRUST=none excludes all kernels"
    if device.type != "cuda" and backend == "triton":
        return "Triton's interpreter is for tests; name backend='triton' to use it"
    if trust() == "all":
        return None
    result = find(op, backend, device)
    if result is not None:
        return None if result.reason is None else f"failed its self-test: {result.reason}"
    if device.type != "cuda":
        return None
    command = f"python -m clp_kernels.selftest --device {device}"
    warn_once(
        f"kernels of clp_kernels have not been tested on {device} yet, and plain PyTorch runs in "
        f"their place; to test them, run: {command}"
    )
    return f"not tested on {device} yet; run {command}, or name backend={backend!r} to use it"


@cache
def trust() -> str:
    """CLP_KERNELS_TRUST, read once per process: which kernels "auto" may take.

    "selftest" (default): GPU kernels that have passed the self-test on this GPU, and CPU kernels
    that have not failed it. "all": every kernel. "none": none, plain PyTorch alone.

    Raises:
        BackendError: it is none of these.
    """
    value = os.environ.get("CLP_KERNELS_TRUST") or "selftest"  # an empty value counts as none
    if value not in TRUSTS:
        raise BackendError(f"CLP_KERNELS_TRUST must be one of {', '.join(TRUSTS)}, got {value!r}")
    return value


def machine(device: torch.device, backend: str) -> str:
    """What a result belongs to: device, driver, libraries, and the bytes of the kernels."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        parts = [torch.cuda.get_device_name(device), f"sm_{major}{minor}", f"driver {driver()}"]
    else:
        parts = [_processor()]
    if backend == "cpu":
        parts.append(native.isa())
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        parts.append("interpreted")
    parts += [f"{name} {_version(name)}" for name in ("torch", "triton", "clp-steer")]
    parts.append(f"sources {_digest(tuple(sorted(Path(__file__).parent.glob('ops/**/*.py'))))}")
    module = native.load(f"_{backend}")[0] if backend in ("cpu", "cuda") else None
    if module is not None:
        parts.append(f"_{backend} {_digest((Path(str(module.__file__)),))}")
    return ", ".join(parts)


def find(op: str, backend: str, device: torch.device) -> Result | None:
    """The result of this op's kernels on this device, None if there is none."""
    key = machine(device, backend)
    found = of_this_process.get(key, {}).get(op, {}).get(backend)
    return found or _parsed(FILE.read()).get(key, {}).get(op, {}).get(backend)


def keep(
    op: str, backend: str, device: torch.device, result: Result, *, on_disk: bool = True
) -> None:
    """Adds a result to those of this process and, `on_disk`, to the file."""
    new: Results = {machine(device, backend): {op: {backend: result}}}
    _merge(of_this_process, new)
    forget()
    if on_disk:

        def change(results: dict[str, Any]) -> None:
            known = _parsed(results)
            _merge(known, new)
            results |= _plain(known)

        FILE.update(change)


def _parsed(results: dict[str, Any]) -> Results:
    """Raises ValueError if the results are not what `keep` writes."""
    found: Results = {}
    for key, ops in results.items():
        for op, backends in _items(ops):
            for backend, entry in _items(backends):
                fields = dict(_items(entry))
                reason, cases, seconds = (fields.get(name) for name in Result._fields)
                if not (
                    (reason is None or isinstance(reason, str))
                    and isinstance(cases, int)
                    and isinstance(seconds, int | float)
                    and 0 <= seconds < 1e9
                ):
                    raise ValueError(f"expected reason, cases and seconds, got {fields}")
                one = Result(reason, cases, float(seconds))
                _merge(found, {key: {op: {backend: one}}})
    return found


FILE = CacheFile("selftest.json", 1, "results of the self-test", _parsed)


def _items(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value.items()


def _plain(results: Results) -> dict[str, Any]:
    return {
        key: {
            op: {backend: one._asdict() for backend, one in backends.items()}
            for op, backends in ops.items()
        }
        for key, ops in results.items()
    }


def _merge(into: Results, new: Results) -> None:
    for key, ops in new.items():
        for op, backends in ops.items():
            into.setdefault(key, {}).setdefault(op, {}).update(backends)


def driver() -> str:
    """The driver's release on Linux, else the newest CUDA version that it has."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split("\n")[0]
    except OSError:
        return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    return " ".join(first.split()[2:])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


@cache
def _digest(files: tuple[Path, ...]) -> str:
    found = hashlib.sha256()
    for path in files:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
