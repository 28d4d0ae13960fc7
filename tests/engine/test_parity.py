"""The sampler's numbers are the trainer's, and greedy text is that of PEFT's merge."""

import copy

import peft
import pytest
import torch
from tiny_runs import randomised

import clp_kernels
from clp.engine.sampler import Sampler, SamplingParams, with_seeds
from clp.policies.loading import load_base
from clp.policies.token_stats import token_stats
from clp.training.rollout import make_batch

NAMES = ["joy", "brief"]
PROMPTS = [
    "Tom had a red kite.", "Mia", "One day, the old dog was at the lake with a friend.", "Sam",
    "Once upon a time", "The cat", "Lily and Ben went to the park.", "There was a big tree",
]  # fmt: skip
WEIGHTS = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8], [0.7, 0.3], [0.9, 0.1], [0.4, 0.6],
        [0.05, 0.95]]  # fmt: skip
TIE = 1e-5


@pytest.fixture(params=["tiny", "stories260k"])
def base(request):
    if request.param == "tiny":
        return "tiny"
    return str(request.getfixturevalue("shared_models") / request.param)


def made(base, size=0.1, dtype=torch.float32):
    return randomised(size, 5, NAMES, base, r=4, dtype=dtype)


def sampled(policy, temperature):
    """Completions of the prompts as a batch, and the sampler's log-probability of every token."""
    ids = [policy.tokenizer(p)["input_ids"] for p in PROMPTS]
    params = SamplingParams(max_tokens=40, temperature=temperature)
    done = Sampler(policy).generate(ids, WEIGHTS, with_seeds(params, range(8)))
    batch = make_batch(policy, ids, done, torch.tensor(WEIGHTS))
    return batch, torch.cat([torch.tensor(c.logprobs) for c in done])


@torch.no_grad()
def trained(policy, batch, temperature):
    """The trainer's log-probability of every completion token."""
    stats = token_stats(policy, batch, policy.head(), temperature)
    return stats.logprobs[batch.completion_mask]


def differences(policy, temperature):
    """|log-probability of the trainer - of the sampler| of every sampled token."""
    batch, logprobs = sampled(policy, temperature)
    return (trained(policy, batch, temperature).float() - logprobs).abs()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainers_logprobs_are_the_samplers(base, temperature):
    """In float64 they are one function; in float32 each rounds in its own order.

    docs/log.md (2026-11-28) has the differences of more prompts and sizes of adapters.
    """
    found = differences(made(base, dtype=torch.float64), temperature)
    # Each answers in float32: half a unit in the last place of up to 16, twice.
    assert len(found) > 100 and float(found.max()) < 1e-6
    found = differences(made(base, size=0.05), temperature)
    assert float(found.max()) < (1e-5 if base == "tiny" else 6e-5)


@torch.no_grad()
def test_in_bfloat16_both_are_as_near_to_the_exact_ones_as_transformers(base):
    """Errors against float64 with the same weights, in units of those of transformers' forward.

    A bound on the difference of a single token holds for no implementation: some tokens amplify the
    rounding of all layers. At one of the embedded model's (without AVX512-BF16) the sampler is 0.08
    from float64, the trainer 0.34 and transformers' forward 0.35, or 0.16 without the tokens that
    follow; one embedding entry that is one unit in the last place larger makes it 0.11 to 0.30.

    Measured on 64 completions of each model, 8 at a time, in mean errors of transformers' forward:
    sampler 0.89 to 1.12, trainer 0.38 to 1.06, between the two 0.63 to 1.09; the largest errors in
    units of its largest: up to 3.2.
    """
    policy = made(base, dtype=torch.bfloat16)
    batch, sampler = sampled(policy, 1.0)
    exact = copy.copy(policy)
    exact.model = copy.deepcopy(policy.model).double()
    wanted, trainer = trained(exact, batch, 1.0), trained(policy, batch, 1.0)
    width = batch.completion_mask.shape[1]
    with policy.steer(batch.conditions):
        output = policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    every = output.logits[:, -width - 1 : -1].float().log_softmax(-1)
    plain = every.gather(2, batch.input_ids[:, -width:, None])[..., 0][batch.completion_mask]
    unit = (plain - wanted).abs()
    assert 1e-3 < float(unit.mean()) < 0.12  # a wrong float64 model would be far from all
    for error in ((sampler - wanted).abs(), (trainer - wanted).abs(), (sampler - trainer).abs()):
        assert float(error.mean()) < 1.3 * float(unit.mean())
        assert float(error.max()) < 6 * float(unit.max())


@torch.no_grad()
def test_greedy_is_generate_of_the_merge_of_each_weights(base, tmp_path):
    policy = made(base)
    clp_kernels.save_adapters(policy.model, tmp_path, base_model="base")
    params = SamplingParams(max_tokens=40, temperature=0)
    done = Sampler(policy).generate(PROMPTS, WEIGHTS, params)
    first, second = (tmp_path / name for name in NAMES)
    model = peft.PeftModel.from_pretrained(load_base(base)[0], first, adapter_name=NAMES[0])
    model.load_adapter(second, adapter_name=NAMES[1])
    whole = 0
    for i, (prompt, weights, completion) in enumerate(zip(PROMPTS, WEIGHTS, done, strict=True)):
        model.add_weighted_adapter(NAMES, weights, f"weights{i}", combination_type="cat")
        model.set_adapter(f"weights{i}")
        ids = policy.tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        tokens = out.sequences[0, ids.shape[1] :].tolist()
        tops = [step[0].double().topk(2).values for step in out.logits]
        # Behind a tie either token is right, and the texts may part.
        tied = next((k for k, t in enumerate(tops) if float(t[0] - t[1]) < TIE), len(tokens))
        assert completion.token_ids[:tied] == tokens[:tied]
        whole += tied == len(tokens) and completion.token_ids == tokens
    assert whole >= 7  # a tie is rare
    assert len({tuple(c.token_ids) for c in done}) == 8
