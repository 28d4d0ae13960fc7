"""Per-example weight-mixed LoRA, logit mixing and sampling for language models with conflicting
objectives: every example of a batch carries its own row of weights."""

from clp_kernels.invariant import batch_invariant
from clp_kernels.nn.experts import MixedLinear
from clp_kernels.nn.mix_models import mix_models
from clp_kernels.nn.mixed_lora import MixedLoRALinear, inject
from clp_kernels.nn.steering import adapter_names, steer
from clp_kernels.ops.functional import (
    LogProb,
    Sample,
    linear_logprob,
    mix_logits,
    mixed_linear,
    mixed_lora,
    sample,
)
from clp_kernels.peft.write import export_adapter, load_adapters, save_adapters

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
