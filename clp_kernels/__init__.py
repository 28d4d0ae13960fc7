"""Per-example weight-mixed LoRA, logit mixing and sampling for language models with conflicting
objectives: every example of a batch carries its own row of weights."""

from clp_kernels.experts import MixedLinear
from clp_kernels.functional import (
    LogProb,
    Sample,
    linear_logprob,
    mix_logits,
    mixed_linear,
    mixed_lora,
    sample,
)
from clp_kernels.invariant import batch_invariant
from clp_kernels.layers import MixedLoRALinear, inject
from clp_kernels.peft_io import export_adapter, load_adapters, save_adapters
from clp_kernels.steering import adapter_names, steer
from clp_kernels.whole_models import mix_models

__version__ = "0.1.0"

__all__ = [
    "LogProb",
    "MixedLinear",
    "MixedLoRALinear",
    "Sample",
    "adapter_names",
    "batch_invariant",
    "export_adapter",
    "inject",
    "linear_logprob",
    "load_adapters",
    "mix_logits",
    "mix_models",
    "mixed_linear",
    "mixed_lora",
    "sample",
    "save_adapters",
    "steer",
]
