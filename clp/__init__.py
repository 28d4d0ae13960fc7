"""clp: train and run language models that are steered, example by example, between objectives."""

import importlib
from typing import Any

_MODULES = {
    "CLPConfig": "clp.training.config",
    "CLPTrainer": "clp.training.trainer",
    "Condition": "clp.data.condition",
    "Completion": "clp.engine.requests",
    "LogitMixture": "clp.policies.logit_mixture",
    "Policy": "clp.policies.policy",
    "Sampler": "clp.engine.sampler",
    "SamplingParams": "clp.engine.requests",
    "evaluate": "clp.evaluation.frontier",
    "weight_grid": "clp.data.weights",
}
__all__ = list(_MODULES)


def __dir__() -> list[str]:
    return [*__all__, "rewards"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line's help must not wait for torch and transformers.
    if name not in _MODULES:
        raise AttributeError(f"module 'clp' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
