"""Gradient checkpointing: layers recompute in eval mode, with the bits of the plain gradients."""

from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
import torch.utils.checkpoint
import transformers
from tiny_runs import config
from torch.autograd.graph import saved_tensors_hooks

import clp_kernels
from clp.data.paths import TINY
from clp.policies.policy import Policy
from clp.policies.token_stats import Batch, token_stats
from clp.training.gradient_checkpointing import checkpointing
from clp.training.trainer import CLPTrainer

LAYERS = 3
SIZES = {
    "vocab_size": 64, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
# Dropouts under the names of all architectures: they must stay off.
DROPOUTS = dict.fromkeys([
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout",
    "layerdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout",
], 0.5)  # fmt: skip
MODELS = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 4},
    "gpt2": {},
    "gpt_neox": {},
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 64},
    "biogpt": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.5},
    "granite": {},
    "olmo2": {},
}


def make_policy(name):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SIZES, **DROPOUTS, **MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False).eval()
    targets = ["q_proj", "v_proj"] if name == "opt" else "all-linear"
    generator = torch.Generator().manual_seed(0)
    clp_kernels.inject(model, ["a", "b"], r=2, target_modules=targets, generator=generator)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    policy = Policy(model, tokenizer, ["a", "b"], name)
    for parameter in policy.trainable_parameters().values():
        parameter.data.normal_(std=0.1)
    return policy


def batch():
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.5, 0.5], [0.0, 1.0]])
    return Batch(ids, mask, torch.ones(4, 6, dtype=torch.bool), weights, ids, mask)


def gradients(policy, recompute):
    """Gradients by name, and the bytes that autograd holds between forward and backward."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = policy.trainable_parameters()
    for parameter in policy.model.parameters():
        parameter.grad = None
    fixed = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    context = checkpointing(policy.model) if recompute else nullcontext()
    with saved_tensors_hooks(note, lambda tensor: tensor), context:
        stats = token_stats(policy, batch(), policy.head(), 1.0)
    size = sum(n for place, n in kept.items() if place not in fixed)
    # Both contexts have ended, and other weights are set: the rows of the forward must return.
    with policy.steer(torch.full((4, 2), 9.0)):
        (stats.kl - stats.logprobs).sum().backward()
    return {n: p.grad.clone() for n, p in parameters.items()}, size


@pytest.fixture
def calls(monkeypatch):
    """An entry for each call of PyTorch's checkpoint."""
    spy = Mock(wraps=torch.utils.checkpoint.checkpoint)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", spy)
    return spy.call_args_list


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_plain_ones_to_the_bit_and_less_is_saved(name, calls):
    policy = make_policy(name)
    before = [(set(vars(m)), m.training) for m in policy.model.modules()]
    plain, plain_size = gradients(policy, False)
    assert not calls
    again, size = gradients(policy, True)
    assert len(calls) == LAYERS
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert max(float(g.abs().max()) for g in plain.values()) > 0
    # What is left: each layer's input, and what stands outside the layers.
    assert size < 0.6 * plain_size
    assert [(set(vars(m)), m.training) for m in policy.model.modules()] == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_the_user_has_switched_on_already_changes_nothing(calls, reentrant):
    """transformers' own checkpointing, with the hook that PEFT's users need for it."""
    policy = make_policy("llama")
    plain, plain_size = gradients(policy, False)
    policy.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    policy.model.enable_input_require_grads()
    before = [(set(vars(m)), m.training) for m in policy.model.modules()]
    again, size = gradients(policy, True)
    assert len(calls) == LAYERS
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert size < 0.6 * plain_size
    assert [(set(vars(m)), m.training) for m in policy.model.modules()] == before


def test_the_dropout_of_these_models_is_not_zero():
    """In train mode the same forward gives other values: the test above could fail."""
    for name in ("gpt2", "gpt_neox", "opt", "biogpt"):
        policy = make_policy(name)
        given = batch()
        inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
        with torch.no_grad(), policy.steer(given.conditions):
            quiet = policy.model(**inputs).logits
            policy.model.train()
            assert not torch.equal(quiet, policy.model(**inputs).logits)


def test_an_error_inside_leaves_the_model_as_it_was():
    policy = make_policy("llama")
    layer = policy.model.model.layers[0]
    layer.forward = own = layer.forward  # such as accelerate's hooks put there
    with pytest.raises(RuntimeError, match="halt"), checkpointing(policy.model):
        assert layer.forward is not own
        raise RuntimeError("halt")
    assert layer.forward is own
    assert not hasattr(layer, "_gradient_checkpointing_func")


def test_a_model_without_such_layers_is_refused():
    refused = pytest.raises(ValueError, match="gradient_checkpointing: Linear has no layers")
    with refused, checkpointing(torch.nn.Linear(1, 1)):
        pass


def test_the_trainer_checkpoints_its_own_forwards_alone(tmp_path, calls):
    small = {"num_prompts": 4, "max_completion_length": 6, "max_steps": 2, "micro_batch_size": 4}
    losses = []
    for on in (False, True):
        args = config(tmp_path / str(on), gradient_checkpointing=on, **small)
        trainer = CLPTrainer(args=args)
        losses.append([trainer.train_step() for _ in range(2)])
    layers = trainer.policy.model.config.num_hidden_layers
    assert len(calls) == 2 * 2 * layers  # two steps of two micro-batches
    for plain, own in zip(*losses, strict=True):
        assert plain | {"step_time": 0} == own | {"step_time": 0}
