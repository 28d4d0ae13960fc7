"""Random transformers models of a few thousand parameters, and what they give."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from clp_kernels import steer

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 59,
}  # fmt: skip
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0, "init_std": 0.2},
    "gemma3_text": {"head_dim": 8, "pad_token_id": 0, "sliding_window": 16},
}


def small_model(model_type: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Without dropout. The options go to the model's configuration."""
    sizes = {**SIZES, **OWN_SIZES.get(model_type, {}), **options}
    config = AutoConfig.for_model(model_type, **sizes)
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@torch.no_grad()
def plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def logits_of(model: nn.Module, ids: Tensor, weights: Tensor | None) -> Tensor:
    with steer(model, weights):
        return plain_logits(model, ids)


def state(model: nn.Module) -> dict[str, object]:
    """What a refusal must leave alone."""
    return {
        "modules": {n: (id(m), m.training) for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters()},
        "random": torch.get_rng_state().tolist(),
    }
