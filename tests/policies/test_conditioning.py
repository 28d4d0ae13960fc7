"""Every conditioning: start, mixed batches against single examples, files, sampling, training."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from small_models import small_model
from steered_policies import DONE, PROMPTS, WEIGHTS, policy_of
from tiny_runs import config, metrics

from clp import CLPConfig, CLPTrainer, Policy, Sampler, SamplingParams
from clp.policies.loading import load_base
from clp.policies.token_stats import token_stats
from clp.training.rollout import make_batch
from clp_kernels.nn.mix_models import conditioned

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = ["full", "attention", "head"]
ALL = ["lora", *EXPERTS, "prompt"]


@pytest.fixture(scope="module")
def policies():
    return {name: policy_of(name) for name in ALL}


def logits(policy, ids, weights):
    with torch.no_grad(), policy.steer(weights):
        return policy.model(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conditioning", ALL)
def test_a_new_policy_is_its_base_bit_for_bit_off_the_simplex_too(conditioning, dtype):
    policy = Policy.create("tiny", ["joy", "brief"], conditioning=conditioning, dtype=dtype)
    base, _ = load_base("tiny", dtype)
    ids = torch.randint(3, 900, (5, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(logits(policy, ids, WEIGHTS), base(ids).logits)
        with policy.base():
            assert torch.equal(policy.model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("conditioning", ALL)
def test_a_policy_in_16_bits_is_one_for_the_sampler_too(conditioning, tmp_path):
    """The dtype of its model is the base's, though the trained parameters are float32."""
    policy = policy_of(conditioning, dtype=torch.bfloat16)
    assert policy.model.dtype == torch.bfloat16
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}
    done = Sampler(policy).generate(PROMPTS, WEIGHTS, SamplingParams(max_tokens=4), simplex=False)
    assert all(c.finish_reason in ("length", "stop") for c in done)
    if conditioning in EXPERTS:
        policy.export(WEIGHTS[1], tmp_path / "out")
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("conditioning", EXPERTS)
def test_a_model_of_learned_positions_is_its_base_at_the_start(conditioning, tmp_path):
    """GPT-2's: one row for any batch, until they are mixed."""
    small_model("gpt2", vocab_size=1024, pad_token_id=0).save_pretrained(tmp_path)
    load_base("tiny")[1].save_pretrained(tmp_path)
    policy = Policy.create(str(tmp_path), ["joy", "brief"], conditioning=conditioning)
    assert policy.trainable_parameters()


@pytest.mark.parametrize("conditioning", ALL)
def test_a_mixed_batch_is_the_loop_over_its_examples(policies, conditioning):
    """Log-probabilities, entropy and KL, and the gradients of all trained parameters.

    Some examples share a prompt and weights, one of them its completion too.
    """
    policy = policies[conditioning]
    head = policy.head()
    examples = [*zip(range(5), range(5), strict=True), (1, 2), (3, 0), (1, 1)]

    def run(chosen):
        prompts, done = zip(*chosen, strict=True)
        batch = make_batch(
            policy, [PROMPTS[i] for i in prompts], [DONE[i] for i in done], WEIGHTS[list(prompts)]
        )
        stats = token_stats(policy, batch, head, 0.8)
        total = (stats.logprobs * 1.3 + stats.entropy * 0.2 - stats.kl * 0.7).sum()
        return stats, torch.autograd.grad(total, list(policy.trainable_parameters().values()))

    mixed, gradients = run(examples)
    sums = [torch.zeros_like(g) for g in gradients]
    for i, example in enumerate(examples):
        alone, found = run([example])
        width = len(DONE[example[1]].token_ids)
        for name in ("logprobs", "entropy", "kl"):
            got = getattr(mixed, name)[i, :width]
            torch.testing.assert_close(got, getattr(alone, name)[0, :width], rtol=1e-4, atol=1e-5)
        sums = [total + g for total, g in zip(sums, found, strict=True)]
    for got, wanted in zip(gradients, sums, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def model_with_bias_in_the_head(folder, tied):
    """A phi, whose head has a bias, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    model = small_model(
        "phi", vocab_size=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    load_base("tiny")[1].save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("base", ["tiny", "phi", "phi tied"])
@pytest.mark.parametrize("conditioning", ["full", "head"])
def test_the_stats_of_a_conditioned_head_are_those_of_its_logits(tmp_path, conditioning, base):
    """The reference stays the base's head, also in the gradient."""
    if base != "tiny":
        base = model_with_bias_in_the_head(tmp_path, base == "phi tied")
    policy = policy_of(conditioning, base, std=0.02)
    batch = make_batch(policy, PROMPTS, DONE, WEIGHTS)
    parameters = list(policy.trainable_parameters().values())
    stats = token_stats(policy, batch, policy.head(), 0.8)
    found = torch.autograd.grad((stats.logprobs + stats.kl).sum(), parameters)
    width, mask = batch.completion_mask.shape[1], batch.completion_mask
    positions = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def distribution():
        output = policy.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
        )
        return (output.logits[:, -width - 1 : -1] / 0.8).log_softmax(-1)

    with policy.steer(WEIGHTS):
        own = distribution()
    with policy.base():
        base_log = distribution()
    targets = batch.input_ids[:, -width:, None]
    logprobs = own.gather(-1, targets)[..., 0] * mask
    kl = (own.exp() * (own - base_log)).sum(-1) * mask
    torch.testing.assert_close(stats.logprobs, logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.kl, kl, rtol=1e-3, atol=1e-5)
    wanted = torch.autograd.grad((logprobs + kl).sum(), parameters)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("conditioning", ALL)
def test_sampling_and_training_see_the_same_log_probabilities(policies, conditioning):
    policy = policies[conditioning]
    params = [SamplingParams(max_tokens=8, seed=i) for i in range(5)]
    done = Sampler(policy).generate(PROMPTS, WEIGHTS, params, simplex=False)
    sampler = Sampler(policy)
    alone = [
        sampler.generate([p], [w], one, simplex=False)[0]
        for p, w, one in zip(PROMPTS, WEIGHTS, params, strict=True)
    ]
    assert [c.token_ids for c in done] == [c.token_ids for c in alone]
    stats = token_stats(policy, make_batch(policy, PROMPTS, done, WEIGHTS), policy.head(), 1.0)
    for i, completion in enumerate(done):
        found = stats.logprobs[i, : len(completion.token_ids)].tolist()
        assert found == pytest.approx(completion.logprobs, abs=1e-4)


@pytest.mark.parametrize("conditioning", ALL)
def test_weights_of_zero_are_the_base(policies, conditioning):
    policy = policies[conditioning]
    base = Policy.create("tiny", ["joy", "brief"])
    params = SamplingParams(max_tokens=8, seed=1)
    zero = torch.zeros(5, 2)
    got = Sampler(policy).generate(PROMPTS, zero, params, simplex=False)
    wanted = Sampler(base).generate(PROMPTS, WEIGHTS, params, simplex=False)
    assert [c.token_ids for c in got] == [c.token_ids for c in wanted]


def test_only_a_head_leaves_keys_and_values_alike_for_all_weights(policies):
    keys = {name: {policies[name].cache_key(w) for w in WEIGHTS} for name in ALL}
    assert {name: len(found) for name, found in keys.items()} == {
        "lora": 5, "full": 5, "attention": 5, "head": 1, "prompt": 1,
    }  # fmt: skip
    zero = torch.zeros(2)
    assert policies["prompt"].cache_key(zero) != policies["prompt"].cache_key(WEIGHTS[0])


# Files


@pytest.mark.parametrize("conditioning", ALL)
def test_save_and_load_are_bitwise(policies, conditioning, tmp_path):
    policies[conditioning].save(tmp_path)
    assert json.loads((tmp_path / "clp.json").read_text())["conditioning"] == conditioning
    loaded = Policy.load(tmp_path)
    assert loaded.conditioning.name == conditioning
    ids = torch.tensor(PROMPTS[1]).repeat(5, 1)
    wanted = logits(policies[conditioning], ids, WEIGHTS)
    assert torch.equal(logits(loaded, ids, WEIGHTS), wanted)
    both = (p.trainable_parameters() for p in (loaded, policies[conditioning]))
    assert [list(found) for found in both] == [list(loaded.trainable_parameters())] * 2
    again = Policy.load(tmp_path, dtype=torch.bfloat16)
    assert logits(again, ids, WEIGHTS).isfinite().all()


def test_tied_differences_are_written_once(policies, tmp_path):
    policies["full"].save(tmp_path)
    path = tmp_path / "experts/joy.safetensors"
    parameters = sum(p.numel() for p in load_base("tiny")[0].parameters())
    assert 4 * parameters < path.stat().st_size < 4 * parameters + 8192


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: p.unlink(), r"joy\.safetensors is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-4] + b"1234"), "is not the expert that"),
    ],
)
def test_a_damaged_expert_is_refused(policies, tmp_path, harm, message):
    policies["head"].save(tmp_path)
    harm(tmp_path / "experts/joy.safetensors")
    with pytest.raises(ValueError, match=message):
        Policy.load(tmp_path)


def test_experts_of_another_model_and_other_cards_are_refused(policies, tmp_path):
    policies["head"].save(tmp_path / "p")
    other = small_model("llama", vocab_size=1024, pad_token_id=0)
    other.save_pretrained(tmp_path / "base")
    load_base("tiny")[1].save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"does not fit the base model: lm_head\.weight of joy"):
        Policy.load(tmp_path / "p", base_model=str(tmp_path / "base"))
    card = tmp_path / "p/clp.json"
    card.write_text(card.read_text().replace('"head"', '"heads"'))
    with pytest.raises(ValueError, match=r"clp\.json: conditioning must be one of lora, .*'heads'"):
        Policy.load(tmp_path / "p")


@pytest.mark.parametrize("conditioning", ["lora", *EXPERTS, "prompt"])
def test_a_base_with_other_parameters_is_refused(tmp_path, conditioning):
    """Though it has the same shapes: the policy would be that of no training."""
    base, other = tmp_path / "base", tmp_path / "other"
    for folder, scale in ((base, 1.0), (other, 1.05)):
        model, tokenizer = load_base("tiny")
        next(model.parameters()).data.mul_(scale)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    made = Policy.create(str(base), ["joy", "brief"], conditioning=conditioning)
    made.save(tmp_path / "p")
    again = Policy.load(tmp_path / "p")
    again.save(tmp_path / "again")
    shutil.copytree(base, tmp_path / "moved")
    refusal = f"was run with another base model: its parameters are not {other}'s"
    for folder in (tmp_path / "p", tmp_path / "again"):
        Policy.load(folder, base_model=str(tmp_path / "moved"))
        with pytest.raises(ValueError, match=refusal):
            Policy.load(folder, base_model=str(other))
    # In another dtype nothing is known of it, until it is saved in that too.
    Policy.load(tmp_path / "p", base_model=str(base), dtype=torch.bfloat16).save(tmp_path / "p")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="was run with another base model"):
            Policy.load(tmp_path / "p", base_model=str(other), dtype=dtype)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    policy = policy_of("head")
    policy.model.lm_head.expert_weight.data[1, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"difference of lm_head\.weight of brief is not finite"):
        policy.save(tmp_path)
    assert not (tmp_path / "clp.json").exists()


@pytest.mark.parametrize("base", ["tiny", "gpt2"])
@pytest.mark.parametrize("conditioning", EXPERTS)
def test_an_export_of_whole_models_is_their_sum(tmp_path, conditioning, base):
    """Without a base the experts are whole models and not differences from the first one."""
    tokenizer, models = load_base("tiny")[1], {}
    for seed, name in enumerate(("joy", "brief")):
        torch.manual_seed(0)  # what is not mixed must be equal
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1}
        model = load_base("tiny")[0] if base == "tiny" else small_model("gpt2", **sizes)
        generator = torch.Generator().manual_seed(seed)
        for target in conditioned(model, conditioning).values():
            if conditioning == "head":
                target.weight = torch.nn.Parameter(target.weight.detach().clone())
                model.config.tie_word_embeddings = False
            for parameter in target.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        models[name] = str(tmp_path / name)
    policy = Policy.from_models(models, conditioning=conditioning)
    policy.export([0.3, 0.7], tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        wanted = logits(policy, ids, torch.tensor([[0.3, 0.7]]))
        torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def with_ends(folder, ends):
    """The embedded model, with end tokens of its own."""
    model, tokenizer = load_base("tiny")
    model.generation_config.eos_token_id = model.config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("conditioning", EXPERTS)
def test_an_export_ends_where_the_policy_does(tmp_path, conditioning):
    """Also at the ends of models that are not the base, and at the tokenizer's."""
    models = {"joy": with_ends(tmp_path / "a", 2), "brief": with_ends(tmp_path / "b", [7, 9])}
    policy = Policy.from_models(models, base=models["joy"], conditioning=conditioning)
    policy.export([0, 1], tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.generation_config.eos_token_id == [2, 7, 9]
    assert Policy.create(str(tmp_path / "out"), ["x"]).end_ids == policy.end_ids == {2, 7, 9}
    policy = Policy.create(models["brief"], ["x"], conditioning=conditioning)
    policy.export([1], tmp_path / "other")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert plain.generation_config.eos_token_id == sorted(policy.end_ids) == [2, 7, 9]
    policy = Policy.create(models["joy"], ["x"], conditioning=conditioning)
    policy.export([1], tmp_path / "one")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert plain.generation_config.eos_token_id == 2


@pytest.mark.parametrize("base", ["tiny", "phi"])
@pytest.mark.parametrize("conditioning", EXPERTS)
def test_an_export_is_the_policy_at_fixed_weights(tmp_path, conditioning, base):
    """The embedded model's head is tied, and is written untied where it alone is conditioned."""
    if base == "phi":
        base = model_with_bias_in_the_head(tmp_path / "base", False)
    policy = policy_of(conditioning, base, std=0.02)
    said = policy.export(torch.tensor([0.7, 0.3]), tmp_path / "out")
    assert said == f"model: {tmp_path / 'out'}"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tied = plain.lm_head.weight is plain.get_input_embeddings().weight
    assert tied == (base == "tiny" and conditioning != "head")
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        wanted = logits(policy, ids, torch.tensor([[0.7, 0.3]]))
        torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert sorted(p.name for p in tmp_path.iterdir()) in (["out"], ["base", "out"])


def test_an_export_goes_where_a_link_leads_and_into_the_folder_one_is_in(tmp_path, monkeypatch):
    policy = policy_of("head")
    for name in ("real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    policy.export(WEIGHTS[1], tmp_path / "link")
    monkeypatch.chdir(tmp_path / "here")
    policy.export(WEIGHTS[1], ".")
    assert all((tmp_path / name / "config.json").is_file() for name in ("real", "here", "link"))


def test_an_export_of_prompts_says_what_they_must_begin_with(policies, tmp_path):
    """As ids: a tokenizer may join the end of the text with the beginning of a prompt."""
    policy = policies["prompt"]
    assert "prompt_prefix.json" in policy.export("joy=0.7,brief=0.3", tmp_path / "out")
    begin = json.loads((tmp_path / "out/prompt_prefix.json").read_text())
    assert begin["text"] == "[joy 0.70 brief 0.30] "
    ids = [1, *begin["token_ids"], *PROMPTS[1][1:]]
    assert ids == policy.conditioned_prompt(PROMPTS[1], torch.tensor([0.7, 0.3]))
    base, _ = load_base("tiny")
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        wanted = logits(policy, torch.tensor([ids]), torch.tensor([[0.7, 0.3]]))
        torch.testing.assert_close(plain(torch.tensor([ids])).logits, wanted, rtol=1e-4, atol=1e-4)


# Prompts


def test_the_weights_stand_after_the_bos_token(policies):
    policy = policies["prompt"]
    encode = policy.tokenizer.encode
    prefix = encode("[joy 0.30 brief 0.70] ", add_special_tokens=False)
    assert policy.conditioned_prompt([1, 50, 51], WEIGHTS[1]) == [1, *prefix, 50, 51]
    assert policy.conditioned_prompt([50, 51], WEIGHTS[1]) == [*prefix, 50, 51]
    assert policy.conditioned_prompt([1, 50], torch.zeros(2)) == [1, 50]
    batch = make_batch(policy, PROMPTS, DONE, WEIGHTS)
    assert batch.base_ids.shape[1] < batch.input_ids.shape[1]
    assert batch.base_ids[1].tolist()[:4] == PROMPTS[1]
    longest = policy.conditioning.longest_prefix(policy.objectives, policy.tokenizer)
    drawn = torch.distributions.Dirichlet(torch.ones(2)).sample((200,))
    assert max(len(policy.conditioned_prompt([], w)) for w in drawn) <= longest < 40


def test_a_prompt_must_fit_with_its_weights(tmp_path):
    text = "Mia " * 56
    rows = [{"prompt": text}]
    CLPTrainer(args=config(tmp_path / "lora"), train_dataset=rows).lock.release()
    args = config(tmp_path / "p", conditioning="prompt", max_completion_length=20)
    with pytest.raises(ValueError, match=r"max_completion_length=20 and [0-9]+ for the weights"):
        CLPTrainer(args=args, train_dataset=rows)


# Training


@pytest.mark.parametrize("conditioning", [*EXPERTS, "prompt"])
def test_training_learns_and_a_resumed_run_repeats_it(tmp_path, conditioning):
    options = {"conditioning": conditioning, "r": 8 if conditioning in EXPERTS else 2}
    policy = CLPTrainer(args=config(tmp_path / "whole", **options)).train()
    start = Policy.create("tiny", ["joy", "brief"], conditioning=conditioning, r=options.get("r") if
                          conditioning == "prompt" else None)  # fmt: skip
    before, after = start.trainable_parameters(), policy.trainable_parameters()
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert len(changed) > 0.4 * len(after)
    base = dict(load_base("tiny")[0].named_parameters())
    if conditioning == "full":
        kept = policy.model.model.layers[0].mlp.up_proj.base_layer.weight
        assert torch.equal(kept, base["model.layers.0.mlp.up_proj.weight"])
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoint-000004")
    (tmp_path / "part/clp.json").unlink()
    again = CLPTrainer(args=CLPConfig.of_run(tmp_path / "part")).train()
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    for name, parameter in again.trainable_parameters().items():
        assert torch.equal(parameter, after[name])
    with pytest.raises(ValueError, match=r"was run with conditioning='.*'; resume asks for 'lora'"):
        CLPTrainer(args=CLPConfig.of_run(tmp_path / "part", conditioning="lora"))


def experts_of_tiny(folder):
    """Two copies of the embedded model with other parameters."""
    for seed, name in enumerate(("joy", "brief")):
        model, tokenizer = load_base("tiny")
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(0, 0.02, generator=generator)
            parameter.data.add_(noise)
        if name == "brief":
            model.generation_config.eos_token_id = [2, 9]
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("joy", "brief")}


def test_models_with_a_base_are_differences_from_it(tmp_path):
    models = experts_of_tiny(tmp_path)
    mixture, policy = Policy.from_models(models), Policy.from_models(models, base="tiny")
    assert policy.base_model == "tiny" and policy.objectives == ("joy", "brief")
    ids = torch.tensor(PROMPTS[1]).repeat(4, 1)
    wanted = logits(mixture, ids, WEIGHTS[:4])
    torch.testing.assert_close(logits(policy, ids, WEIGHTS[:4]), wanted, rtol=1e-4, atol=1e-4)
    base, _ = load_base("tiny")
    with torch.no_grad(), policy.base():
        assert torch.equal(policy.model(ids).logits, base(ids).logits)
    policy.save(tmp_path / "saved")
    loaded = Policy.load(tmp_path / "saved")
    assert torch.equal(logits(loaded, ids, WEIGHTS[:4]), logits(policy, ids, WEIGHTS[:4]))
    # One of them ends at 9 too.
    assert loaded.end_ids == policy.end_ids == {2, 9}
    with pytest.raises(ValueError, match='conditioning "head" does not mix model'):
        Policy.from_models(models, base="tiny", conditioning="head")
    with pytest.raises(ValueError, match="must be full, attention or head, got 'lora'"):
        Policy.from_models(models, base="tiny", conditioning="lora")


def test_a_policy_of_models_is_trained_and_resumed_from_its_own_start(tmp_path):
    models = experts_of_tiny(tmp_path)
    policy = Policy.from_models(models, base="tiny")
    start = [p.detach().clone() for p in policy.trainable_parameters().values()]
    # The order of the rewards is that of the policy's objectives.
    rewards = ["brief=brevity", "joy=sentiment"]
    args = config(tmp_path / "run", r=8, rewards=rewards)
    trainer = CLPTrainer(policy, args=args)
    assert list(trainer.reward_funcs) == ["joy", "brief"]
    trainer.lock.release()
    # Killed before its first checkpoint.
    again = CLPTrainer(args=CLPConfig.of_run(tmp_path / "run"))
    for one, parameter in zip(start, again.parameters.values(), strict=True):
        assert torch.equal(one, parameter)
    again.train()
    done = metrics(tmp_path / "run")
    whole = CLPTrainer(policy, args=config(tmp_path / "whole", r=8, rewards=rewards))
    whole.train()
    assert metrics(tmp_path / "whole") == done and done[0]["kl"] > 0
    loaded = Policy.load(tmp_path / "run")
    assert loaded.conditioning.name == "full" and loaded.rewards == tuple(rewards[::-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ["joy=sentiment"]}, "must be those of the policy's objectives joy, brief"),
        ({"r": 4}, "r must be left out for a policy that has its own, got 4"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not here"),
    ],
)
def test_a_policy_that_does_not_fit_the_training_is_refused(policies, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        CLPTrainer(policies["head"], args=config(tmp_path / "r", **({"r": 8} | changes)))
    assert not list(tmp_path.iterdir())


def test_a_mixture_without_a_base_is_not_trained(tmp_path):
    models = experts_of_tiny(tmp_path)
    with pytest.raises(ValueError, match=r"without a base, .* give Policy\.from_models their base"):
        CLPTrainer(Policy.from_models(models), args=config(tmp_path / "r", r=8))


def test_full_takes_names_of_modules(tmp_path):
    args = config(
        tmp_path, conditioning="full", r=8, target_modules=["mlp", "norm"],
        exclude_modules=["down_proj"], max_steps=1,
    )  # fmt: skip
    policy = CLPTrainer(args=args).train()
    names = policy.trainable_parameters()
    assert names and all("mlp" in n or ".norm." in n for n in names)
    assert not any("down_proj" in n for n in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "ful"}, "conditioning must be one of .*, got 'ful'; did you mean 'full'"),
        ({"conditioning": "full", "r": 4}, "r must be left out with conditioning='full'"),
        ({"conditioning": "head", "lora_alpha": 2.0}, "lora_alpha must be left out"),
        ({"conditioning": "attention", "target_modules": ["mlp"]}, "target_modules must be left"),
        ({"conditioning": "head", "exclude_modules": ["mlp"]}, "exclude_modules must be left"),
    ],
)
def test_settings_without_a_use_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CLPConfig(**options)


def test_a_policy_refuses_what_its_conditioning_has_no_use_for():
    for options, message in (
        ({"conditioning": "heads"}, "got 'heads'; did you mean 'head'"),
        ({"conditioning": "full", "r": 4}, "r and lora_alpha must be None with 'full'"),
        ({"conditioning": "head", "target_modules": ["mlp"]}, "target_modules must be left out"),
    ):
        with pytest.raises(ValueError, match=message):
            Policy.create("tiny", ["joy", "brief"], **options)
