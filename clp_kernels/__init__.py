"""Per-example weight-mixed LoRA, logit mixing and sampling for language models with conflicting
objectives: every example of a batch carries its own weights."""

from clp_kernels.invariant import batch_invariant
from clp_kernels.nn.experts import MixedLinear
from clp_kernels.nn.inject import inject
from clp_kernels.nn.inject_experts import inject_experts
from clp_kernels.nn.mix_models import mix_models
from clp_kernels.nn.mixed_lora import MixedLoRALinear
from clp_kernels.nn.steering import adapter_names, steer
from clp_kernels.ops.linear_logprob.op import LogProb, linear_logprob
from clp_kernels.ops.mix_logits.op import mix_logits
from clp_kernels.ops.mixed_linear.op import mixed_linear
from clp_kernels.ops.mixed_lora.op import mixed_lora
from clp_kernels.ops.sample.op import Sample, sample
from clp_kernels.peft.read import load_adapters
from clp_kernels.peft.write import export_adapter, save_adapters

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
    "inject_experts",
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
