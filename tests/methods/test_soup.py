"""Policies made of single-objective experts: the exact sum, and A and B averaged separately."""

import json
import shutil

import pytest
import torch
from tiny_runs import randomise
from transformers import AutoModelForCausalLM, AutoTokenizer

from clp.data.paths import TINY
from clp.engine.requests import SamplingParams
from clp.engine.sampler import Sampler
from clp.methods.averaged_adapters import averaged
from clp.methods.soup import soup
from clp.policies.loading import load_base
from clp.policies.policy import Policy
from clp_kernels.nn.inject_experts import expert_state
from clp_kernels.nn.mixed_lora import steered_layers

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[1, 5, 9, 33], [1, 7, 2, 80], [1, 5, 9, 33], [1, 40, 41, 42]])
ROWS = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8], [-0.5, 1.4]])


def expert(folder, name, seed, conditioning="lora", scale=None, model="tiny", **options):
    """A saved policy of one objective, whose difference from the base is random."""
    policy = Policy.create(model, [name], conditioning=conditioning, seed=seed, **options)
    if conditioning in ("lora", "prompt"):
        randomise(policy.model, 0.2, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.trainable_parameters().values():
            parameter.data.normal_(0, 0.02, generator=generator)
    policy.reward_scale = scale
    policy.rewards = (f"{name}=sentiment",)
    policy.save(folder)
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    options = {"r": 2, "lora_alpha": 6}
    return [
        expert(folder / "1", "joy", 1, scale={"joy": 0.5}, **options),
        expert(folder / "2", "brief", 2, scale={"brief": 0.25}, **options),
    ]


@torch.no_grad()
def steered(policy, ids, weights):
    with policy.steer(weights):
        return policy.model(ids).logits


@torch.no_grad()
def plain(changes, ids):
    """Logits of the base model with changes added to its parameters."""
    model, _ = load_base("tiny")
    for name, change in changes.items():
        model.get_parameter(name).add_(change)
    return model(ids).logits


def lora_changes(policies, row, average):
    """What the formula adds to each weight for one example's weights."""
    layers = [steered_layers(policy.model) for policy in policies]
    changes = {}
    for name in layers[0]:
        a = [layer[name].lora_A[0] for layer in layers]
        b = [layer[name].lora_B[0] for layer in layers]
        if average:
            total = sum(w * x for w, x in zip(row, b, strict=True)) @ sum(
                w * x for w, x in zip(row, a, strict=True)
            )
        else:
            total = sum(w * x @ y for w, x, y in zip(row, b, a, strict=True))
        changes[f"{name}.weight"] = 3 * total.detach()  # lora_alpha / r
    return changes


@pytest.mark.parametrize("average", [False, True])
def test_a_mixed_batch_equals_the_formula_for_each_example(loras, average):
    experts = [Policy.load(folder) for folder in loras]
    policy = averaged(soup(loras)) if average else soup(loras)
    found = steered(policy, IDS, ROWS)
    for i, row in enumerate(ROWS):
        wanted = plain(lora_changes(experts, row, average), IDS[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-4, atol=1e-4)


def test_the_sum_and_the_average_differ_but_for_a_single_expert(loras):
    exact = soup(loras)
    other = averaged(exact)
    a, b = steered(exact, IDS, ROWS), steered(other, IDS, ROWS)
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-4)
    assert float((a[1] - b[1]).abs().max()) > 0.1


@pytest.mark.parametrize("conditioning", ["full", "attention", "head"])
def test_a_soup_of_differences(tmp_path, conditioning):
    folders = [expert(tmp_path / n, n, i, conditioning) for i, n in enumerate(("joy", "brief"))]
    policy = soup(folders)
    states = [expert_state(Policy.load(folder).model, 0) for folder in folders]
    found = steered(policy, IDS, ROWS)
    name = min(states[0])
    base = load_base("tiny")[0].get_parameter(name)
    for i in (2, 3):
        policy.export(ROWS[i].tolist(), tmp_path / str(i))
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
            total = base + sum(w * s[name] for w, s in zip(ROWS[i], states, strict=True))
            torch.testing.assert_close(model.get_parameter(name), total, rtol=1e-5, atol=1e-6)
            wanted = model(IDS[i : i + 1]).logits
        torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-3, atol=1e-3)


def test_a_soup_is_a_policy_like_any_other(tmp_path, loras):
    policy = soup(loras)
    assert policy.objectives == ("joy", "brief")
    assert policy.rewards == ("joy=sentiment", "brief=sentiment")
    assert policy.reward_scale == {"joy": 0.5, "brief": 0.25}
    policy.save(tmp_path / "saved")
    again = Policy.load(tmp_path / "saved")
    assert steered(again, IDS, ROWS).equal(steered(policy, IDS, ROWS))
    assert soup(loras[::-1]).objectives == ("brief", "joy")


def test_averaged_adapters_are_sampled_as_they_are_and_not_saved(tmp_path, loras):
    policy = averaged(soup(loras))
    rows = [[0.5, 0.5], [0.1, 0.9]]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    done = Sampler(policy).generate(["Mia", "Sam"], rows, params)
    for row, one in zip(rows, done, strict=True):
        ids = policy.tokenizer("Mia" if row[0] == 0.5 else "Sam")["input_ids"]
        for token in one.token_ids:
            logits = steered(policy, torch.tensor([ids]), torch.tensor([row]))
            assert int(logits[0, -1].argmax()) == token
            ids.append(token)
    with pytest.raises(ValueError, match="save their experts"):
        policy.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    policy.export([0.5, 0.5], tmp_path / "peft")
    with pytest.raises(ValueError, match="policy must have LoRA adapters, got 'averaged_adapters'"):
        averaged(policy)


def other_base(folder):
    """The embedded model with one other parameter."""
    shutil.copytree(TINY, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    next(iter(model.parameters())).data[0, 0] += 1
    model.save_pretrained(folder)
    return str(folder)


def other_tokenizer(folder):
    """The embedded model whose tokenizer has two tokens in each other's place."""
    shutil.copytree(TINY, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    a, b = sorted(vocabulary)[500:502]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(folder).get_vocab()[a] == vocabulary[a]
    return str(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 4}, r"agree in adapters \(.*\): joy has rank 2, alpha 6, brief has rank 4, alpha 6"),
        ({"lora_alpha": 4}, "joy has rank 2, alpha 6, brief has rank 2, alpha 4"),
        ({"target_modules": ["q_proj"]}, "joy has rank 2, alpha 6, brief has no adapter"),
        ({"conditioning": "head", "r": None, "lora_alpha": None},
         "agree in a conditioning that mixes parameters: joy has lora, brief has head"),
        ({"conditioning": "prompt"}, "joy has lora, brief has prompt"),
        ({"scale": None}, "agree in whether rewards have a scale: joy has {'joy': 0.5}, brief has"),
        ({"model": other_base}, "agree in base model: joy has .*tiny.*, brief has .*other"),
        ({"model": other_tokenizer}, r"agree in tokenizer \(token '.*'\): joy has \d+, brief has"),
        ({"name": "joy"}, "has the objective of another one: joy"),
    ],
)  # fmt: skip
def test_experts_that_do_not_go_together(tmp_path, loras, change, message):
    settings = {"name": "brief", "scale": {"brief": 0.25}, "r": 2, "lora_alpha": 6} | change
    if callable(settings.get("model")):
        settings["model"] = settings["model"](tmp_path / "other")
    if settings["name"] == "joy":
        settings["scale"] = {"joy": 0.25}
    odd = expert(tmp_path / "odd", seed=3, **settings)
    with pytest.raises(ValueError, match=message):
        soup([loras[0], odd])


def test_experts_of_experts_modules_differ(tmp_path):
    first = expert(tmp_path / "1", "joy", 1, "full")
    second = expert(tmp_path / "2", "brief", 2, "full", exclude_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"modules \(.*embed_tokens.*\): joy has True, brief has"):
        soup([first, second])


def test_what_is_no_list_of_experts(tmp_path, loras):
    both = Policy.create("tiny", ["joy", "brief"], r=2)
    both.save(tmp_path / "both")
    with pytest.raises(ValueError, match="must have one objective, got joy, brief"):
        soup([tmp_path / "both"])
    Policy.create("tiny", ["joy"], r=2, kl_range=(0.05, 0.3)).save(tmp_path / "strengths")
    with pytest.raises(ValueError, match="strengths must be trained with one KL strength"):
        soup([tmp_path / "strengths"])
    with pytest.raises(ValueError, match="at least one expert"):
        soup([])
    with pytest.raises(ValueError, match="holds no policy"):
        soup([loras[0], tmp_path / "nothing"])


def test_averaged_needs_equal_adapters(loras):
    policy = soup(loras)
    layer = next(iter(steered_layers(policy.model).values()))
    layer.lora_alpha = (6, 4)
    with pytest.raises(ValueError, match=r"one \(rank, alpha\)"):
        averaged(policy)
    with pytest.raises(ValueError, match="one KL strength, not a kl_range"):
        averaged(Policy.create("tiny", ["joy", "brief"], kl_range=(0.05, 0.3)))
    with pytest.raises(ValueError, match="must have LoRA adapters, got 'head'"):
        averaged(Policy.create("tiny", ["joy", "brief"], conditioning="head"))


@pytest.mark.parametrize("conditioning", ["lora", "full"])
def test_a_soup_ends_where_any_of_its_experts_does(tmp_path, conditioning):
    """Of one base model in two folders, one has another end token."""
    model, tokenizer = load_base("tiny")
    places = []
    for name, ends in (("joy", 2), ("brief", [7, 9])):
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        base = str(tmp_path / name)
        places.append(expert(tmp_path / f"{name}-expert", name, 1, conditioning, model=base))
    policy = soup(places)
    assert policy.end_ids == {2, 7, 9}
    if conditioning == "full":
        policy.export([0.5, 0.5], tmp_path / "out")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert exported.generation_config.eos_token_id == [2, 7, 9]
