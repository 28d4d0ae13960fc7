"""Mixtures of models through the sampler: logits (MOD, IPA) and parameters (full, head)."""

import json
from functools import partial

import pytest
import torch
from tiny_runs import randomised
from transformers import LlamaConfig, LlamaForCausalLM

import clp_kernels
from clp.data.paths import TINY
from clp.engine.requests import SamplingParams
from clp.engine.sampler import Sampler
from clp.policies.loading import load_base
from clp.policies.logit_mixture import LogitMixture
from clp.policies.policy import Policy

PROMPTS = ["Tom had a red kite.", "Mia", "One day, the old dog was at the lake.", "Sam"]
ROWS = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]]


def small(seed, hidden, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_base("tiny")[1]


def saved(models, tokenizer, folder):
    """The folder of each model, with the tokenizer."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


@pytest.fixture(scope="module")
def models():
    return {"joy": small(1, 16), "brief": small(2, 32)}


def naive(networks, weights, tokenizer, prompt, row, count, mode="geometric"):
    """Greedy tokens and log-probabilities by running every model on the whole text each time."""
    ids, logprobs = list(tokenizer(prompt)["input_ids"]), []
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = torch.stack([run(torch.tensor([ids]))[0, -1] for run in networks]).double()
        w = weights(torch.tensor(row, dtype=torch.float64))
        if mode == "geometric":
            z = torch.log_softmax(w @ logits, -1)
        else:
            z = (w @ torch.softmax(logits, -1)).log()
        token = int(z.argmax())
        ids.append(token)
        logprobs.append(float(z[token]))
    return ids[start:], logprobs


def check(policy, networks_of, weights, mode="geometric"):
    """networks_of(row) gives the models of these weights as functions."""
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    done = Sampler(policy).generate(PROMPTS, ROWS, params)
    for prompt, row, c in zip(PROMPTS, ROWS, done, strict=True):
        ids, logprobs = naive(networks_of(row), weights, policy.tokenizer, prompt, row, 8, mode)
        assert c.token_ids == ids
        assert c.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("mode", ["geometric", "probability"])
def test_mod_is_the_weighted_sum_of_the_models_logits(models, tokenizer, mode):
    runs = [lambda ids, m=m: m(ids).logits for m in models.values()]
    check(LogitMixture(models, tokenizer, mode=mode), lambda _: runs, lambda w: w, mode)


def test_ipa_adds_the_adapters_to_a_larger_base(models, tokenizer):
    base = small(3, 64)
    mixture = LogitMixture(models, tokenizer, base=base, alpha=0.7)
    runs = [lambda ids, m=m: m(ids).logits for m in (base, *models.values())]
    check(mixture, lambda _: runs, lambda w: torch.cat([w.new_ones(1), 0.7 * w]))


def test_mod_over_the_adapters_of_one_model(tokenizer):
    policy = randomised(0.15, 5, r=4)

    def alone(i, ids):
        with policy.steer(torch.eye(2)[i : i + 1]):
            return policy.model(ids).logits

    runs = [partial(alone, i) for i in range(2)]
    check(LogitMixture.of_adapters(policy), lambda _: runs, lambda w: w)


def test_rows_share_prompts_because_no_cache_depends_on_the_weights(models, tokenizer):
    sampler = Sampler(LogitMixture(models, tokenizer))
    counted = []

    def count(module, args, kwargs):
        counted.append(kwargs["input_ids"].numel())

    with models["joy"].model.register_forward_pre_hook(count, with_kwargs=True):
        sampler.generate([PROMPTS[2]] * 4, ROWS, SamplingParams(max_tokens=2, seed=1))
    tokens = len(tokenizer(PROMPTS[2])["input_ids"])
    assert counted == [tokens - 1, 4, 4]  # one prefill for all, then two steps


def test_alone_and_together_are_the_same_bits_in_batch_invariant_mode(models, tokenizer):
    sampler = Sampler(LogitMixture(models, tokenizer))
    params = SamplingParams(max_tokens=10, seed=3, logprobs=2)
    with clp_kernels.batch_invariant():
        together = sampler.generate(PROMPTS, ROWS, params)
        for i in range(4):
            (alone,) = Sampler(sampler.policy).generate([PROMPTS[i]], [ROWS[i]], params)
            assert alone.token_ids == together[i].token_ids
            assert alone.logprobs == together[i].logprobs
            assert alone.top_logprobs == together[i].top_logprobs


def test_top_logprobs_are_those_of_the_mixture(models, tokenizer):
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=3, ignore_eos=True)
    for c in Sampler(LogitMixture(models, tokenizer)).generate(PROMPTS, ROWS, params):
        for token, logprob, top in zip(c.token_ids, c.logprobs, c.top_logprobs, strict=True):
            assert len(top) == 3
            assert next(iter(top)) == token
            assert top[token] == pytest.approx(logprob, abs=1e-5)


def test_load_reads_folders_and_compares_tokenizers(tmp_path, models, tokenizer):
    places = saved(models, tokenizer, tmp_path)
    mixture = LogitMixture.load(places, base="tiny")
    assert mixture.objectives == ("joy", "brief")
    assert len(mixture.networks) == 3
    assert mixture.context_length == 128
    file = tmp_path / "brief" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    a, b = sorted(vocabulary)[500:502]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="brief's is not joy's"):
        LogitMixture.load(places)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "at least one"),
        ({"mode": "harmonic"}, "mode must be"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"mode": "probability", "alpha": 2.0}, "alone"),
        ({"models": {"a": small(1, 16), "b": small(1, 16, torch.bfloat16)}}, "agree in dtype"),
    ],
)
def test_bad_mixtures(models, tokenizer, changes, message):
    arguments = {"models": models} | changes
    with pytest.raises(ValueError, match=message):
        LogitMixture(arguments.pop("models"), tokenizer, **arguments)


def test_models_of_different_vocabularies_are_refused(models, tokenizer):
    other = small(1, 16)
    other.resize_token_embeddings(1000)
    with pytest.raises(ValueError, match="vocabulary: joy has 1024, odd has 1000"):
        LogitMixture(models | {"odd": other}, tokenizer)


def test_the_embedded_model_is_a_base(models, tokenizer):
    mixture = LogitMixture.load({"joy": "tiny"}, base=str(TINY))
    (a,) = Sampler(mixture).generate(["Sam"], [[0.0]], SamplingParams(max_tokens=6, temperature=0),
                                     simplex=False)  # fmt: skip
    ids = tokenizer("Sam", return_tensors="pt")["input_ids"]
    out = mixture.base.generate(ids, max_new_tokens=6, do_sample=False)
    assert a.token_ids == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("conditioning", ["full", "attention", "head"])
def test_a_mixture_of_parameters_samples_as_the_merged_model(tmp_path, tokenizer, conditioning):
    first, second = small(1, 16), small(2, 16)
    part = {"full": "", "attention": "self_attn", "head": "lm_head"}[conditioning]
    pairs = zip(first.named_parameters(), second.parameters(), strict=True)
    for (name, own), other in pairs:  # what is not mixed must be equal
        if part not in name:
            other.data.copy_(own.data)
    places = saved({"joy": first, "brief": second}, tokenizer, tmp_path)

    def merged(row):
        made = small(1, 16)
        parameters = (model.parameters() for model in (made, first, second))
        for target, a, b in zip(*parameters, strict=True):
            target.data.copy_(row[0] * a.data + row[1] * b.data)
        return [lambda ids: made(ids).logits]

    policy = Policy.from_models(places, conditioning=conditioning)
    check(policy, merged, lambda w: w.new_ones(1))
