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
from clp.training.rollout import make_batch

PROMPTS = ["Tom had a red kite.", "Mia", "One day, the old dog was at the lake.", "Sam"]
ROWS = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]]
HOWS = [("geometric", None), ("probability", None), ("power", -1.0), ("power", -0.3)]


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


def headed():
    """A policy whose heads have random differences."""
    policy = Policy.create("tiny", ["joy", "brief"], conditioning="head")
    generator = torch.Generator().manual_seed(7)
    for parameter in policy.trainable_parameters().values():
        parameter.data.normal_(0, 0.02, generator=generator)
    return policy


def saved(models, tokenizer, folder):
    """The folder of each model, with the tokenizer."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


@pytest.fixture(scope="module")
def models():
    return {"joy": small(1, 16), "brief": small(2, 32)}


def mixed_logits(logits, w, mode, exponent):
    """Of logits [n, V] and weights [n], float64, as MOD writes them."""
    kept = w != 0
    logits, w = logits[kept], w[kept]
    if mode == "geometric":
        return w @ logits
    if mode == "probability":
        return (w @ torch.softmax(logits, -1)).log()
    powers = w.log()[:, None] + exponent * torch.log_softmax(logits, -1)
    return torch.logsumexp(powers, 0) / exponent


def naive(networks, weights, tokenizer, prompt, row, count, mode="geometric", exponent=None):
    """Greedy tokens and log-probabilities by running every model on the whole text each time."""
    ids, logprobs = list(tokenizer(prompt)["input_ids"]), []
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = torch.stack([run(torch.tensor([ids]))[0, -1] for run in networks]).double()
        w = weights(torch.tensor(row, dtype=torch.float64))
        z = torch.log_softmax(mixed_logits(logits, w, mode, exponent), -1)
        token = int(z.argmax())
        ids.append(token)
        logprobs.append(float(z[token]))
    return ids[start:], logprobs


def check(policy, networks_of, weights, *how):
    """networks_of(row) gives the models of these weights as functions."""
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    done = Sampler(policy).generate(PROMPTS, ROWS, params)
    for prompt, row, c in zip(PROMPTS, ROWS, done, strict=True):
        ids, logprobs = naive(networks_of(row), weights, policy.tokenizer, prompt, row, 8, *how)
        assert c.token_ids == ids
        assert c.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("how", HOWS)
def test_mod_equals_a_loop_over_the_models(models, tokenizer, how):
    runs = [lambda ids, m=m: m(ids).logits for m in models.values()]
    mixture = LogitMixture(models, tokenizer, mode=how[0], exponent=how[1])
    check(mixture, lambda _: runs, lambda w: w, *how)


@pytest.mark.parametrize("how", HOWS)
def test_temperature_and_filters_act_on_the_mixture(models, tokenizer, how):
    """Of tokens drawn at temperature 0.7 among the likeliest three of the mixture."""
    mixture = LogitMixture(models, tokenizer, mode=how[0], exponent=how[1])
    params = SamplingParams(max_tokens=1, temperature=0.7, top_k=3, seed=4, n=40, logprobs=3)
    row = [0.3, 0.7]
    done = Sampler(mixture).generate([PROMPTS[0]], [row], params)
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        logits = torch.stack([m(ids).logits[0, -1] for m in models.values()]).double()
    z = mixed_logits(logits, torch.tensor(row, dtype=torch.float64), *how)
    logp = torch.log_softmax(z / 0.7, -1)
    best = set(logp.topk(3).indices.tolist())
    assert {c.token_ids[0] for c in done} == best
    for c in done:
        assert c.logprobs[0] == pytest.approx(float(logp[c.token_ids[0]]), abs=1e-4)
        assert c.top_logprobs[0] == pytest.approx({i: float(logp[i]) for i in best}, abs=1e-4)


def test_a_token_costs_one_forward_of_each_model(models, tokenizer):
    mixture = LogitMixture(models, tokenizer, mode="power", exponent=-1)
    sampler, calls = Sampler(mixture), []
    hooks = [
        model.model.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, model in models.items()
    ]
    sampler.generate([PROMPTS[1]], [ROWS[2]], SamplingParams(max_tokens=3, ignore_eos=True, seed=0))
    for hook in hooks:
        hook.remove()
    assert calls == ["joy", "brief"] * 4  # one prefill, three tokens


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
        ({"mode": "power", "exponent": -1, "base": small(1, 16)}, "alone"),
        ({"mode": "power"}, "exponent must be a number from -100 to -0.01"),
        ({"mode": "power", "exponent": 0.5}, "exponent must be a number from -100"),
        ({"exponent": -1.0}, 'exponent must be None in mode "geometric", got -1.0'),
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


@pytest.mark.parametrize("mode, exponent", [("probability", None), ("power", -0.5)])
def test_weights_below_zero_are_refused_where_they_have_no_meaning(
    models, tokenizer, mode, exponent
):
    sampler = Sampler(LogitMixture(models, tokenizer, mode=mode, exponent=exponent))
    with pytest.raises(ValueError, match="weights must be >= 0 in mode"):
        sampler.generate(PROMPTS[:1], [[1.5, -0.5]], simplex=False)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("conditioning", ["lora", "head"])
def test_the_kl_of_a_mixture_is_exact(tokenizer, how, conditioning):
    policy = randomised(0.15, 5, r=4) if conditioning == "lora" else headed()
    mixture = LogitMixture.of_adapters(policy, mode=how[0], exponent=how[1])
    assert mixture.reference is policy.reference is policy
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    params = SamplingParams(max_tokens=5, seed=2)
    done = Sampler(mixture).generate(prompts, ROWS, params)
    weights = torch.tensor(ROWS)
    kl = mixture.token_kl(make_batch(mixture, prompts, done, weights), 0.8)
    for i, (prompt, one) in enumerate(zip(prompts, done, strict=True)):
        ids = torch.tensor([prompt + one.token_ids])
        rows = []
        with torch.no_grad():
            for w in (*torch.eye(2), torch.zeros(2)):
                with policy.steer(w[None]):
                    rows.append(policy.model(ids).logits[0, len(prompt) - 1 : -1].double())
        for t in range(len(one.token_ids)):
            logits = torch.stack([row[t] for row in rows[:2]])
            z = mixed_logits(logits, weights[i].double(), *how)
            logp, logq = (torch.log_softmax(x / 0.8, -1) for x in (z, rows[2][t]))
            assert float(kl[i, t]) == pytest.approx(float((logp.exp() * (logp - logq)).sum()),
                                                    abs=2e-4)  # fmt: skip
        assert not kl[i, len(one.token_ids) :].any()
    at_corners = kl[:2].sum(1)
    batch = make_batch(policy, prompts[:2], done[:2], weights[:2])
    torch.testing.assert_close(at_corners[:, None], policy.token_kl(batch, 0.8).sum(1)[:, None],
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_the_kl_of_a_mixture_does_not_depend_on_its_chunks(tokenizer, monkeypatch):
    mixture = LogitMixture.of_adapters(randomised(0.15, 5, r=4))
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    done = Sampler(mixture).generate(prompts, ROWS, SamplingParams(max_tokens=5, seed=2))
    batch = make_batch(mixture, prompts, done, torch.tensor(ROWS))
    whole = mixture.token_kl(batch, 1.0)
    monkeypatch.setattr("clp.policies.logit_mixture.LOGITS", 1)
    torch.testing.assert_close(mixture.token_kl(batch, 1.0), whole)


def test_a_mixture_of_whole_models_has_no_reference(models, tokenizer):
    with pytest.raises(ValueError, match="no base model to which a KL"):
        _ = LogitMixture(models, tokenizer).reference


def test_the_parts_of_a_prompt_policy_cannot_be_mixed():
    with pytest.raises(ValueError, match="conditioning 'prompt' does not"):
        LogitMixture.of_adapters(Policy.create("tiny", ["joy", "brief"], conditioning="prompt"))
