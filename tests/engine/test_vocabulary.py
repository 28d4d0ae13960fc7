"""Which ids are drawn, and which end a completion."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from decoding_alone import without_end
from tiny_runs import randomise
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import clp_kernels
from clp.engine.detokenizer import completion_text
from clp.engine.requests import SamplingParams
from clp.engine.sampler import Sampler, with_seeds
from clp.policies.loading import load_base
from clp.policies.logit_mixture import LogitMixture
from clp.policies.policy import Policy
from clp.policies.token_stats import token_stats
from clp.training.rollout import make_batch

TOKENS = 1024  # of the embedded model's tokenizer


def small(seed, rows=TOKENS, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.5, **({"pad_token_id": 0, "eos_token_id": 2} | changes),
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return load_base("tiny")[1]


@pytest.fixture(scope="module")
def holes():
    """A tokenizer without the odd ids from 101 on."""
    ids = [i for i in range(TOKENS) if i < 100 or i % 2 == 0]
    words = {{0: "<unk>", 2: "</s>"}.get(i, f"w{i}"): i for i in ids}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def padded(seed=0, rows=TOKENS + 64):
    """A model whose likeliest ids are those that the tokenizer lacks."""
    model = small(seed, rows)
    model.lm_head.weight[TOKENS:] *= 5
    return model


def steered(model, tokenizer):
    clp_kernels.inject(model, ["joy", "brief"], r=2)
    randomise(model, 0.3, 0)
    return Policy(model, tokenizer, ["joy", "brief"], "random")


def ask(policy, **changes):
    params = SamplingParams(max_tokens=20, logprobs=5, ignore_eos=True, **changes)
    return Sampler(policy).generate([[5, 6]] * 8, "joy=1", with_seeds(params, range(8)))


def drawn(done):
    return {i for c in done for ids in (c.token_ids, *c.top_logprobs) for i in ids}


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}]
)
def test_ids_that_the_tokenizer_lacks_are_not_drawn(tokenizer, changes):
    policy = steered(padded(), tokenizer)
    assert (policy.vocab_size, policy.drawable_ids) == (TOKENS + 64, slice(TOKENS))
    with policy.base():
        logits = policy.model(torch.tensor([[5, 6]])).logits[0, -1]
    assert int(logits.argmax()) >= TOKENS  # they would be
    assert max(drawn(ask(policy, **changes))) < TOKENS


def test_ids_in_holes_of_the_tokenizers_range_are_not_drawn(holes):
    """Nor offered as likely ones, where they would be the likeliest; mixed logits as well."""
    known = sorted(holes.get_vocab().values())

    def model(seed):
        made = padded(seed)
        made.lm_head.weight[101:TOKENS:2] *= 5
        return made

    policy = steered(model(0), holes)
    assert policy.drawable_ids.tolist() == known
    with policy.base():
        logits = policy.model(torch.tensor([[5, 6]])).logits[0, -1, :TOKENS]
    assert int(logits.argmax()) not in known
    mixture = LogitMixture({"joy": model(1), "brief": model(2)}, holes)
    for one in (policy, mixture):
        for changes in ({}, {"temperature": 0}, {"top_k": 50, "top_p": 0.9}):
            assert drawn(ask(one, **changes)) <= set(known)
    greedy = ask(policy, temperature=0)[0]
    with policy.steer(torch.tensor([[1.0, 0.0]])), torch.no_grad():
        logits = policy.model(torch.tensor([[5, 6]])).logits[0, -1, known].double()
    assert greedy.token_ids[0] == known[int(logits.argmax())]
    wanted, places = logits.log_softmax(-1).topk(5)
    found = greedy.top_logprobs[0]
    assert list(found)[:5] == [known[i] for i in places.tolist()]
    assert list(found.values())[:5] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_ids_that_share_a_text_are_drawn(holes):
    """Byte pieces of one tokenizer are all printed alike; its length counts them."""

    class Alike(type(holes)):
        def __len__(self):
            return TOKENS

    alike = copy.copy(holes)
    alike.__class__ = Alike
    assert steered(padded(), alike).drawable_ids == slice(TOKENS)


@pytest.mark.parametrize("gaps", [False, True])
def test_the_trainers_logprobs_leave_them_out_too(tokenizer, holes, gaps):
    policy = steered(padded(), holes if gaps else tokenizer)
    known = policy.drawable_ids if gaps else slice(TOKENS)
    done = ask(policy, temperature=0.7)
    weights = torch.tensor([[1.0, 0.0]]).expand(8, -1)
    batch = make_batch(policy, [[5, 6]] * 8, done, weights)
    stats = token_stats(policy, batch, policy.head(), 0.7)
    wanted = torch.tensor([c.logprobs for c in done])
    torch.testing.assert_close(stats.logprobs, wanted, atol=1e-4, rtol=1e-4)
    # The reference's, and with it the KL, as well.
    found = []
    for context in (policy.steer(weights), policy.base()):
        with context:
            logits = policy.model(batch.input_ids).logits[:, 1:-1, known] / 0.7
        found.append(logits.log_softmax(-1))
    own, ref = found
    torch.testing.assert_close(stats.kl, (own.exp() * (own - ref)).sum(-1), atol=1e-3, rtol=1e-3)


def test_an_unpadded_head_is_taken_whole(tokenizer):
    policy = Policy.create("tiny", ["joy"])
    assert policy.drawable_ids == slice(policy.vocab_size)
    assert policy.vocab_size == len(policy.head().weight) == TOKENS
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<one>", "<two>"])
    wider = Policy(policy.model, more, ["joy"], "tiny")
    assert wider.drawable_ids == slice(TOKENS)  # the head has no more
    with pytest.raises(ValueError, match="token ids from 0 to 1023, got 1025"):
        Sampler(wider).submit("a<two>", "joy=1")


def test_tokens_that_are_added_later_are_drawn(tokenizer):
    more, model = copy.deepcopy(tokenizer), padded()
    policy = steered(model, more)
    sampler, params = Sampler(policy), SamplingParams(max_tokens=30, seed=0, ignore_eos=True)
    (first,) = sampler.generate([[5, 6]], "joy=1", params)
    assert max(first.token_ids) < TOKENS
    more.add_tokens([f"<{i}>" for i in range(64)])
    (then,) = sampler.generate([[5, 6]], "joy=1", params)
    assert max(then.token_ids) >= TOKENS


@pytest.mark.parametrize("mode", ["geometric", "probability"])
def test_heads_of_different_height_mix_what_they_have_in_common(tokenizer, mode):
    models = {"joy": padded(1), "brief": padded(2, TOKENS + 128)}
    mixture = LogitMixture(models, tokenizer, mode=mode)
    assert (mixture.vocab_size, mixture.drawable_ids) == (TOKENS + 64, slice(TOKENS))
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=2, ignore_eos=True)
    (c,) = Sampler(mixture).generate([[5, 6]], [[0.3, 0.7]], params)
    ids = [5, 6]
    for token, logprob in zip(c.token_ids, c.logprobs, strict=True):
        inputs = torch.tensor([ids])
        logits = torch.stack([m(inputs).logits[:, -1, :TOKENS] for m in models.values()])
        z = clp_kernels.mix_logits(logits, torch.tensor([[0.3, 0.7]]), mode=mode).log_softmax(-1)[0]
        assert token == int(z.argmax()) and logprob == pytest.approx(float(z.max()), abs=1e-4)
        ids.append(token)
    with pytest.raises(ValueError, match="token ids from 0 to 1087, got 1100"):
        Sampler(mixture).submit([1100], [0.5, 0.5])


@pytest.mark.parametrize("rows", [TOKENS, TOKENS + 128])
def test_a_base_with_a_head_of_another_height(tokenizer, rows):
    """As in IPA with a large model of Qwen's, whose head is padded further."""
    models = {"joy": padded(1), "brief": padded(2)}
    mixture = LogitMixture(models, tokenizer, base=padded(3, rows), alpha=0.5)
    assert mixture.drawable_ids == slice(TOKENS)
    assert max(drawn(ask(mixture))) < TOKENS
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    (c,) = Sampler(mixture).generate([[5, 6]], [[0.3, 0.7]], params)
    ids = torch.tensor([[5, 6]])
    base, joy, brief = (
        n.model(ids).logits[0, -1, :TOKENS].log_softmax(-1) for n in mixture.networks
    )
    z = (base + 0.5 * (0.3 * joy + 0.7 * brief)).log_softmax(-1)
    assert c.token_ids == [int(z.argmax())]
    assert c.logprobs == pytest.approx([float(z.max())], abs=1e-4)


def test_added_tokens_in_a_head_that_was_padded_for_them(tokenizer):
    """tokenizer.add_tokens, then resize_token_embeddings(..., pad_to_multiple_of=64)."""
    more, model = copy.deepcopy(tokenizer), small(0)
    more.add_tokens(["<one>", "<two>"])
    model.resize_token_embeddings(len(more), pad_to_multiple_of=64, mean_resizing=False)
    model.requires_grad_(False)
    model.lm_head.weight[TOKENS:] = 3 * model.lm_head.weight[7]
    policy = steered(model, more)
    assert (policy.vocab_size, policy.drawable_ids) == (TOKENS + 64, slice(TOKENS + 2))
    assert len(policy.head()[0]) == TOKENS + 2
    done = ask(policy)
    assert max(drawn(done)) == TOKENS + 1  # some are drawn, and are text
    assert any("<two>" in c.text for c in done if TOKENS + 1 in c.token_ids)
    weights = torch.tensor([[1.0, 0.0]]).expand(8, -1)
    batch = make_batch(policy, [[5, 6]] * 8, done, weights)
    stats = token_stats(policy, batch, policy.head(), 1.0)
    with policy.steer(weights):
        own = policy.model(batch.input_ids).logits[:, 1:-1, : TOKENS + 2].log_softmax(-1)
    torch.testing.assert_close(stats.entropy, -(own.exp() * own).sum(-1), atol=1e-3, rtol=1e-3)


def test_mixed_parameters_need_one_shape(tmp_path, tokenizer):
    for i, rows in enumerate([TOKENS, TOKENS + 64]):
        small(i, rows).save_pretrained(tmp_path / str(i))
        tokenizer.save_pretrained(tmp_path / str(i))
    with pytest.raises(ValueError, match="shape"):
        Policy.from_models({"a": str(tmp_path / "0"), "b": str(tmp_path / "1")})


# Ends


def test_stop_token_ids_may_be_a_policys_end_ids(tokenizer):
    ids = Policy(small(0, eos_token_id=[7, 8]), tokenizer, ["a"], "x").end_ids
    assert set(SamplingParams(stop_token_ids=ids).stop_token_ids) == {2, 7, 8}
    with pytest.raises(ValueError, match="stop_token_ids must be a list of token ids"):
        SamplingParams(stop_token_ids={"a", 1})


def test_lists_of_params_may_be_numpys_or_torchs():
    params = SamplingParams(
        stop=np.array(["a", "b"]), stop_token_ids=torch.tensor([3, 4]), ignore_eos=np.bool_(True)
    )
    assert params == SamplingParams(stop=["a", "b"], stop_token_ids=[3, 4], ignore_eos=True)
    assert SamplingParams(stop=np.str_("ab")).stop == ("ab",)
    with pytest.raises(ValueError, match=r"stop must be a list of .* got \{'a'\}"):
        SamplingParams(stop={"a"})


def test_end_ids_are_those_of_configurations_and_tokenizer(tokenizer):
    model = small(0, eos_token_id=[7, 8])
    for ids in (np.int64(9), np.array([9]), torch.tensor(9), {9}, [np.int64(9)]):
        model.generation_config.eos_token_id = ids
        assert Policy(model, tokenizer, ["a"], "x").end_ids == {2, 7, 8, 9}
    model.generation_config.eos_token_id = 9
    assert Policy(model, tokenizer, ["a"], "x").end_ids == {2, 7, 8, 9}
    model = small(0, eos_token_id=None)
    model.generation_config.eos_token_id = None
    assert Policy(model, tokenizer, ["a"], "x").end_ids == {2}
    silent = copy.deepcopy(tokenizer)
    silent.eos_token = None
    assert Policy(model, silent, ["a"], "x").end_ids == frozenset()
    model.generation_config.eos_token_id = [-1, TOKENS, 5, [3]]
    assert Policy(model, silent, ["a"], "x").end_ids == {5}


def test_a_mixture_ends_at_the_end_of_each_model(tokenizer):
    models = {"a": small(0, eos_token_id=7), "b": small(1, eos_token_id=[8, 9])}
    mixture = LogitMixture(models, tokenizer)
    assert mixture.end_ids == {2, 7, 8, 9}
    (free,) = Sampler(mixture).generate([[5]], [[0.5, 0.5]], without_end(30))
    end = free.token_ids[4]
    models["b"].generation_config.eos_token_id = end
    (c,) = Sampler(mixture).generate([[5]], [[0.5, 0.5]], SamplingParams(max_tokens=30, seed=1))
    assert c.finish_reason == "stop" and c.token_ids[-1] == end


@pytest.mark.parametrize("conditioning", ["full", "head"])
def test_a_mixture_of_parameters_ends_at_the_end_of_each_model(tmp_path, tokenizer, conditioning):
    """An instruct model's end of turn counts, whichever of the models comes first."""
    for name, ends in {"a": 7, "b": [8, 9]}.items():
        model = small(0)
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    places = {name: str(tmp_path / name) for name in ("a", "b")}
    assert Policy.from_models(places, conditioning=conditioning).end_ids == {2, 7, 8, 9}


def test_ends_of_a_composite_configuration_and_of_a_base(tokenizer):
    """Of a model for images and text; one may have no generation config at all."""
    text = small(0).config.to_dict()
    config = Gemma3Config(
        text_config={"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 24,
                     "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "head_dim": 8, "eos_token_id": [7, 8]},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        eos_token_id=9,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config.get_text_config()).eval()
    model.config, model.generation_config = config, None
    assert text["eos_token_id"] == 2
    assert Policy(model, tokenizer, ["a"], "x").end_ids == {2, 7, 8, 9}
    models = {"a": small(0, eos_token_id=7)}
    mixture = LogitMixture(models, tokenizer, base=small(1, eos_token_id=[8, 10]))
    assert mixture.end_ids == {2, 7, 8, 10}


def test_without_an_end_in_the_configurations_the_tokenizers_ends_it(tokenizer):
    model = small(0, eos_token_id=None)
    model.generation_config.eos_token_id = None
    model.lm_head.weight[2] = 20 * model.lm_head.weight.std()  # likely for some state
    policy = steered(model, tokenizer)
    params = SamplingParams(max_tokens=40, seed=1)
    done = Sampler(policy).generate([[5 + i] for i in range(16)], "joy=1", params)
    ended = [c for c in done if c.finish_reason == "stop"]
    assert ended and all(c.token_ids[-1] == 2 for c in ended)


def test_an_end_token_that_is_no_special_token_is_no_text(tokenizer):
    word = 300
    assert tokenizer.decode([word], skip_special_tokens=True)
    policy = steered(small(3, eos_token_id=word), tokenizer)
    sampler = Sampler(policy)
    params = SamplingParams(max_tokens=60, temperature=2.0)
    done = sampler.generate([[5]] * 32, "joy=1", with_seeds(params, range(32)))
    ended = [c for c in done if c.token_ids[-1] == word]
    assert ended
    for c in ended:
        assert c.text == completion_text(tokenizer, [5], c.token_ids[:-1])
    params = replace(params, seed=done.index(ended[0]))
    (c,) = sampler.generate([[5]], "joy=1", params)
    request = sampler.submit([5], "joy=1", params)
    assert "".join(token.text for token in sampler.stream(request)) == c.text == ended[0].text


def test_a_mixture_ends_where_the_tokenizer_of_each_model_does(tmp_path, tokenizer):
    """Though the models share a vocabulary, in whatever order they are given."""
    places = {}
    for name, end in (("a", 2), ("b", 9)):
        own = copy.deepcopy(tokenizer)
        own.eos_token = own.convert_ids_to_tokens(end)
        model = small(0, eos_token_id=None)
        model.generation_config.eos_token_id = None
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
        places[name] = str(tmp_path / name)
    for order in (places, dict(reversed(places.items()))):
        assert LogitMixture.load(order).end_ids == {2, 9}
    assert LogitMixture.load({"a": places["a"]}, base=places["b"]).end_ids == {2, 9}
