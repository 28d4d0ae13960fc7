"""Families of models: served with their own numbers, or refused when the sampler is made.

Every model has random weights and three layers, in float64: the judge, and no greedy tie is near.
"""

import functools

import pytest
import torch
import transformers
from tiny_runs import randomise
from transformers import AutoConfig, AutoModelForCausalLM

import clp_kernels
from clp.engine.sampler import Sampler, SamplingParams
from clp.policies.loading import load_base
from clp.policies.policy import Policy

WINDOW = 6  # shorter than most sequences here, longer than the five tokens of the model check
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL_GPT = {
    "vocab_size": 1024, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL_MPT = {"vocab_size": 1024, "d_model": 32, "n_heads": 4, "n_layers": 3}
CHUNKED = {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 8}
WINDOWED = {"sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 16}  # fmt: skip
LATENT = {"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4,
          "kv_lora_rank": 8, "q_lora_rank": 8, "num_key_value_heads": 4, "n_routed_experts": 4,
          "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
          "first_k_dense_replace": 1}  # fmt: skip

# name: (model_type, sizes and options); SIZES if they are not SMALL_GPT
SERVED = {
    "llama": ("llama", {}),
    "llama without groups": ("llama", {"num_key_value_heads": 4}),
    "gpt2": ("gpt2", SMALL_GPT),
    "gpt_bigcode, one key head": ("gpt_bigcode", SMALL_GPT),
    "gpt_neox": ("gpt_neox", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows in the upper layers": (
        "qwen2",
        WINDOWED | {"use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "mistral": ("mistral", WINDOWED),
    "mixtral": ("mixtral", EXPERTS | WINDOWED),
    "phi3": ("phi3", WINDOWED),
    "starcoder2": ("starcoder2", WINDOWED),
    "gemma3": ("gemma3_text", WINDOWED | {"layer_types": MIXED, "query_pre_attn_scalar": 5}),
    "cohere2": ("cohere2", WINDOWED | {"layer_types": MIXED}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "deepseek_v3, values narrower than keys": ("deepseek_v3", LATENT),
    "opt, which flattens tokens in its blocks": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    ),
    "qwen2_moe, which flattens tokens for its shared expert": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 16},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    ),
    "modernbert-decoder": (
        "modernbert-decoder",
        {"layer_types": MIXED, "local_attention": 2 * WINDOW},
    ),
}
# Values decide which experts run: their step is not a list of calls (clp/engine/recording.py).
UNRECORDED = {"qwen3_moe", "mixtral", "deepseek_v3, values narrower than keys", "ernie4_5_moe",
              "qwen2_moe, which flattens tokens for its shared expert"}  # fmt: skip
# name: (model_type, sizes and options, what the refusal says)
REFUSED = {
    "gemma2": ("gemma2", {}, "softcap"),
    "gpt_oss": ("gpt_oss", EXPERTS | WINDOWED, "s_aux"),
    "llama4": ("llama4_text", CHUNKED | {"interleave_moe_layer_step": 5}, "chunked_attention"),
    "mamba": ("mamba", {"state_size": 4}, "linear_attention"),
    "qwen3_next": (
        "qwen3_next",
        EXPERTS | {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
        "linear_attention",
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "conv"),
    "bloom, ALiBi": ("bloom", {"n_layer": 3, "n_head": 4}, "its logits differ"),
    "mpt, ALiBi": ("mpt", SMALL_MPT, "MptFor"),
    "gptj": ("gptj", SMALL_GPT | {"rotary_dim": 8}, "its logits differ"),
    "stablelm": ("stablelm", {}, "does not pass keyword arguments"),
    "doge, a learned mask": ("doge", {}, "a mask of its own"),
    "qwen2_moe, a window in its masks alone": (
        "qwen2_moe",
        SERVED["qwen2_moe, which flattens tokens for its shared expert"][1]
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        "layer 0 does not pass its window of 6 tokens",
    ),
    "phimoe, a window in its masks alone": ("phimoe", EXPERTS | WINDOWED, "its window of 6 tokens"),
    "rwkv": ("rwkv", {"attention_hidden_size": 32}, "RwkvFor"),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj"]
# Not all linear layers: routers have a forward of their own, and weights that the model itself
# multiplies or rescales have no adapters.
TARGETS = {
    "phimoe, a window in its masks alone": PROJECTIONS,
    "mamba": ["in_proj", "x_proj", "out_proj"],
    "rwkv": ["receptance", "key"],
}
LENGTHS = [1, 4, 23, 50]
COUNT = 9  # tokens of a completion: the shortest prompts grow beyond the window
WEIGHTS = [[0.0, 0.0], [0.5, 0.5], [1.0, 0.0], [-0.5, 2.0]]


@functools.cache
def tokenizer():
    return load_base("tiny")[1]


def made(model_type, options, dtype=torch.float64):
    torch.manual_seed(0)
    own_sizes = "vocab_size" in options
    config = AutoConfig.for_model(model_type, **(options if own_sizes else SIZES | options))
    family = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    attention = "sdpa" if family._supports_sdpa else "eager"
    config._experts_implementation = "eager"  # the grouped product of experts has no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval().requires_grad_(False)


def policy_of(model, target_modules="all-linear"):
    names = ["joy", "brief"]
    generator = torch.Generator().manual_seed(3)
    clp_kernels.inject(model, names, r=2, target_modules=target_modules, generator=generator)
    randomise(model, 0.3, 5)
    return Policy(model, tokenizer(), names, "random")


def prompts():
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 1024, (n,), generator=generator).tolist() for n in LENGTHS]


def greedy(max_tokens=COUNT):
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


@torch.no_grad()
def check_greedy(policy, prompt, weights, completion):
    """Each token is the likeliest of the model's own forward, without a cache, and so likely."""
    ids = prompt + completion.token_ids
    with policy.steer(torch.tensor([weights], dtype=policy.model.dtype)):
        logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
    assert logp.argmax(-1).tolist() == completion.token_ids
    wanted = logp.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    # The op gives float32: half a unit in the last place of up to 8 is 2.4e-7. Greater is an error.
    assert completion.logprobs == pytest.approx(wanted.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", SERVED)
def test_a_family_is_served_with_its_own_numbers(name):
    """In one forward per prompt and in several; with weights of zero as the base's generate."""
    base, policy = made(*SERVED[name]), policy_of(made(*SERVED[name]))
    for budget in (7, 2048):
        sampler = Sampler(policy, max_batch_size=4, max_prefill_tokens=budget)
        assert (sampler.runner.models[0].recording is None) == (name in UNRECORDED)
        done = sampler.generate(prompts(), WEIGHTS, greedy(), simplex=False)
        for prompt, weights, completion in zip(prompts(), WEIGHTS, done, strict=True):
            assert len(completion.token_ids) == COUNT
            check_greedy(policy, prompt, weights, completion)
    base.generation_config.eos_token_id = None
    done = Sampler(policy).generate(prompts(), [0.0, 0.0], greedy(), simplex=False)
    for prompt, completion in zip(prompts(), done, strict=True):
        out = base.generate(torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False)
        assert completion.token_ids == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_when_the_sampler_is_made(name):
    model_type, options, message = REFUSED[name]
    model = made(model_type, options, torch.float32)
    policy = policy_of(model, TARGETS.get(name, "all-linear"))
    refusal = f"the sampler does not support {type(policy.model).__name__}: "
    with pytest.raises(ValueError, match=message) as caught:
        Sampler(policy)
    assert str(caught.value).startswith(refusal)
    # Nothing is left behind: the model is as it was.
    assert policy.model.config._attn_implementation in ("sdpa", "eager")


def test_a_family_whose_linear_layers_are_its_own_is_refused_by_inject():
    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_attention_heads": 4}
    model = made("falcon", sizes | {"num_hidden_layers": 2}, torch.float32)
    with pytest.raises(ValueError, match="query_key_value is a FalconLinear, which has a forward"):
        policy_of(model)


@pytest.mark.parametrize("part", ["", "transformer.drop", "transformer.h.1.attn"])
def test_training_mode_with_dropout_is_named(part):
    """By a new sampler, and by one whose model has changed."""
    policy = policy_of(made("gpt2", SMALL_GPT))
    sampler = Sampler(policy)
    wanted = sampler.generate(prompts()[:1], WEIGHTS[0], greedy(), simplex=False)[0].token_ids
    policy.model.get_submodule(part).train()
    refusal = r"^GPT2LMHeadModel is in training mode, in which .*\(policy\.model\.eval\(\)\)$"
    with pytest.raises(ValueError, match=refusal):
        Sampler(policy)
    with pytest.raises(ValueError, match=refusal):
        sampler.generate(prompts()[:1], WEIGHTS[0], greedy(), simplex=False)
    policy.model.eval()
    done = Sampler(policy).generate(prompts()[:1], WEIGHTS[0], greedy(), simplex=False)
    assert done[0].token_ids == wanted


def test_training_mode_without_dropout_is_sampled():
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    policy = policy_of(made("gpt2", SMALL_GPT | none))
    wanted = Sampler(policy).generate(prompts()[:1], WEIGHTS[0], greedy(), simplex=False)
    policy.model.train()
    done = Sampler(policy).generate(prompts()[:1], WEIGHTS[0], greedy(), simplex=False)
    assert done[0].token_ids == wanted[0].token_ids
    # What is refused in eval mode too is refused for that reason.
    policy = policy_of(made(*REFUSED["gptj"][:2]))
    policy.model.train()
    with pytest.raises(ValueError, match="does not support GPTJForCausalLM: its logits differ"):
        Sampler(policy)


def test_an_encoder_is_refused():
    config = transformers.T5Config(vocab_size=1024, d_model=32, d_kv=8, d_ff=48, num_layers=2,
                                   num_heads=4, decoder_start_token_id=0)  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration: it has an encoder"):
        Sampler(policy_of(model))


def test_a_window_longer_than_the_check_is_refused_too_where_it_is_not_passed():
    options = EXPERTS | {"sliding_window": 100}
    policy = policy_of(made("phimoe", options, torch.float32), PROJECTIONS)
    with pytest.raises(ValueError, match="its window of 100 tokens"):
        Sampler(policy)


def test_long_rope_is_served_within_its_short_factors():
    """transformers takes the long factors for a whole batch where one sequence of it is longer."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 70,
    }  # fmt: skip
    options = {"rope_parameters": rope, "original_max_position_embeddings": 70}
    policy = policy_of(made("phi3", options))
    assert policy.context_length == 70
    sampler = Sampler(policy)
    done = sampler.generate(prompts(), WEIGHTS, greedy(20), simplex=False)
    for prompt, weights, completion in zip(prompts(), WEIGHTS, done, strict=True):
        check_greedy(policy, prompt, weights, completion)
    with pytest.raises(ValueError, match="exceeds the context of 70"):
        sampler.submit(prompts()[3], WEIGHTS[1], greedy(21))
