"""Which path of an op is fastest on this machine, as measured by clp_kernels.selftest.tuning.

An op has a rule for sizes that nobody has measured. What has been measured lies in a file of the
user's cache folder (clp_kernels.files), by machine, op and size, and is read once per process.
CLP_KERNELS_TUNE=0 has it neither measured nor read: the path then depends on the size alone.
"""

import hashlib
import json
import os
from functools import cache
from typing import Any

import torch

from clp_kernels import trust
from clp_kernels.files import CacheFile
from clp_kernels.native import BackendError

Choices = dict[str, dict[str, list[int]]]  # op, size, what was chosen

of_this_process: dict[str, Choices] = {}  # by machine


def is_on() -> bool:
    """Whether CLP_KERNELS_TUNE and CLP_KERNELS_TRUST let paths be measured: both unset, or 1 and
    selftest.

    Raises:
        BackendError: one of them has none of its values.
    """
    value = os.environ.get("CLP_KERNELS_TUNE") or "1"
    if value not in ("0", "1"):
        raise BackendError(f"CLP_KERNELS_TUNE must be 0 or 1, got {value!r}")
    return value == "1" and trust.trust() == "selftest"


@cache
def known(op: str) -> dict[str, list[int]]:
    """What has been measured of an op on this machine, by size."""
    if not is_on():
        return {}
    key = _machine()
    found: Choices = FILE.read().get(key, {})
    return {**found.get(op, {}), **of_this_process.get(key, {}).get(op, {})}


def keep(op: str, size: str, choice: list[int]) -> None:
    """Adds what was measured to this process and to the file."""
    new = {_machine(): {op: {size: choice}}}
    _merge(of_this_process, new)
    FILE.update(lambda results: _merge(results, new))
    known.cache_clear()


def fingerprint() -> str | None:
    """A digest of what has been measured here; None if nothing has, or if it is not used."""
    found = known("mixed_lora")
    if not found:
        return None
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _machine() -> str:
    return trust.machine(torch.device("cpu"), "cpu")


def _merge(into: dict[str, Any], new: dict[str, Choices]) -> None:
    for machine, ops in new.items():
        for op, sizes in ops.items():
            into.setdefault(machine, {}).setdefault(op, {}).update(sizes)


def _check(results: dict[str, Any]) -> None:
    """Raises ValueError if the results are not what `keep` writes."""
    for ops in results.values():
        for sizes in _values(ops):
            for choice in _values(sizes):
                if not isinstance(choice, list) or not all(type(n) is int for n in choice):
                    raise ValueError(f"expected a list of integers, got {choice!r}")


def _values(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value.values()


FILE = CacheFile("tuning.json", 1, "measured choices", _check)
