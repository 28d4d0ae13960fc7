"""What the digest of a base model covers."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from clp.policies.checksum import digest, stored
from clp.policies.loading import load_base
from clp.policies.policy import Policy


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("derived", torch.ones(2), persistent=False)
        self.register_buffer("absent", None)


def test_what_is_stored_is_what_files_hold() -> None:
    model = nn.Sequential(Part(), Part())
    model.append(model[0])
    found = list(stored(model))
    assert len(found) == len({id(t) for t in found}) == 4
    assert {id(t) for t in found} == {id(t) for t in model.state_dict(keep_vars=True).values()}


def test_a_digest_sees_a_buffer() -> None:
    model = Part()
    before = digest(stored(model))
    model.derived[0] = 2
    assert digest(stored(model)) == before
    model.kept[0] = 2
    assert digest(stored(model)) != before


def test_a_base_with_other_buffers_is_refused(tmp_path) -> None:
    """GLM-4's bias of the router is a buffer, and decides which experts run."""
    config = AutoConfig.for_model(
        "glm4_moe", vocab_size=1024, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1, n_group=1,
        topk_group=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    router = next(b for n, b in base.named_buffers() if "correction" in n)
    for folder, value in (("base", 0.0), ("other", 1.0)):
        router[0] = value
        base.save_pretrained(tmp_path / folder)
        load_base("tiny")[1].save_pretrained(tmp_path / folder)
    made = Policy.create(str(tmp_path / "base"), ["joy", "brief"], conditioning="head")
    made.save(tmp_path / "p")
    Policy.load(tmp_path / "p")
    with pytest.raises(ValueError, match="was run with another base model"):
        Policy.load(tmp_path / "p", base_model=str(tmp_path / "other"))
