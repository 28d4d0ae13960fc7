"""clp: train and run language models that are steered, example by example, between objectives."""

import importlib
from typing import Any

_HOMES = {
    "CLPConfig": "clp.config",
    "CLPTrainer": "clp.train",
    "Completion": "clp.requests",
    "LogitMixture": "clp.mixture",
    "Policy": "clp.policy",
    "Sampler": "clp.sampler",
    "SamplingParams": "clp.requests",
    "evaluate": "clp.evaluate",
    "weight_grid": "clp.weights",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line's help must not wait for torch and transformers.
    if name not in _HOMES:
        raise AttributeError(f"module 'clp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
