"""Recorded steps: the very calls and bits of the model, or a refusal that says why."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from decoding_alone import token_ids
from torch import nn

from clp.engine.recording import LARGEST_BATCH, Inputs, Unrecordable, record
from clp.engine.sampler import Sampler, SamplingParams, with_seeds
from clp_kernels.nn.mixed_lora import steered_layers

WIDTH = 8


class Plan:
    """Attention that adds its layer's number."""

    def attend(self, layer, q, k, v, scale, window):
        return q + k * v + layer


class Model(nn.Module):
    """Logits [B, 1, WIDTH] of one attention and whatever `body` does."""

    def __init__(self, body):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.body = body

    def forward(self, input_ids, position_ids, use_cache, plan):
        x = self.embed(input_ids)
        x = plan.attend(0, x, x * 2, x + position_ids[..., None], None, None)
        return SimpleNamespace(logits=self.body(x))


@contextmanager
def steered(batch):
    assert batch <= LARGEST_BATCH
    tokens = torch.arange(batch)[:, None]
    yield Inputs(tokens + 1, tokens % 3, Plan())


def recorded(body):
    torch.manual_seed(0)
    model = Model(body).requires_grad_(False)
    return model, record(model, steered)


def check(model, made, batches=(1, 2, 4, 9)):
    for count in batches:
        tokens = torch.randint(16, (count, 1), generator=torch.Generator().manual_seed(count))
        plan, positions = Plan(), tokens % 5
        wanted = model(tokens, positions, False, plan).logits
        assert torch.equal(made(Inputs(tokens, positions, plan), count), wanted)


def in_place(x):
    y = x.clone()
    y[:, :, :3] = 7
    y.add_(x).relu_()
    return y + y.mT.sum()


BODIES = {
    "a multiple of the batch in a shape": lambda x: x.view(len(x) * 4, -1).cumsum(1).view(x.shape),
    "factories": lambda x: x + torch.arange(x.shape[0])[:, None, None] + torch.zeros(x.shape),
    "results in a tuple": lambda x: x.chunk(2, -1)[1] + x.topk(4, -1).values,
    "in place, a property, an item that is set": in_place,
    "lists, slices, keywords": lambda x: torch.stack([x, x[..., :]], dim=0).mean(0, keepdim=False),
    "repeats": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "a choice": lambda x: torch.where(x > 0, x, -x),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_the_calls_give_the_models_bits_for_other_batch_sizes(name):
    check(*recorded(BODIES[name]))


def by_hand(x):
    return torch.from_numpy(x.numpy() * 2)


def by_address(x):
    return x if x.data_ptr() else x + 1


REFUSED = {
    "a branch on a value": (lambda x: x if x.sum() > 0 else -x, "__bool__ reads"),
    "a number read": (lambda x: x * x.max().item(), "item reads"),
    "numbers read": (lambda x: x + len(x[:, 0, 0].tolist()), "tolist reads"),
    "an index": (lambda x: x + [1, 2, 3][x.argmax() % 3], "__index__ reads"),
    "NumPy": (by_hand, "numpy reads"),
    "another library, by address": (by_address, "data_ptr reads"),
    "nonzero": (lambda x: x + x.nonzero().shape[0], "nonzero"),
    "where": (lambda x: x + len(torch.where(x > 0)[0]), "where"),
    "repeats that are a tensor": (
        lambda x: x + x.repeat_interleave(torch.tensor([1]), 1).sum(), "repeat_interleave",
    ),
    "a mask": (lambda x: x + x[x > 0].numel(), "a mask selects"),
    "the batch decides what is called": (lambda x: x + 1 if x.shape[0] > 2 else x, "decides what"),
    "the square of the batch": (lambda x: x + x.shape[0] ** 2, "is given 4 and 9"),
    "one example is different": (lambda x: x + 1 if x.shape[0] == 1 else x + 2, "at batch size 1"),
    "a large batch does not fit": (
        lambda x: x + torch.ones(6)[: 6 // len(x) * len(x)].view(len(x), -1).sum(1)[:, None, None],
        "at batch size 5 the recorded calls fail",
    ),
    "a large batch is different": (lambda x: x + 1 if x.shape[0] > 4 else x + 2, "at batch size 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_list_of_calls_is_refused(name):
    body, message = REFUSED[name]
    with pytest.raises(Unrecordable, match=message):
        recorded(body)


def test_a_tensor_from_nowhere_is_refused():
    # Each pass makes its own: what made it is not seen, so it may depend on anything.
    with pytest.raises(Unrecordable, match="is given"):
        recorded(lambda x: x + torch.frombuffer(bytearray(32), dtype=torch.float32))


def test_a_compiled_model_is_refused():
    model = Model(lambda x: x)
    model.body_of_its_own = nn.Identity()
    model.body_of_its_own.compile(backend="eager")
    with pytest.raises(Unrecordable, match="compiled"):
        record(model, steered)


def test_nothing_is_left_on_model_and_plan(policy):
    sampler = Sampler(policy)
    assert sampler.runner.models[0].recording is not None
    for layer in steered_layers(policy.model).values():
        assert "forward" not in layer.__dict__


def generate(sampler):
    prompts = [token_ids(n, n) for n in range(2, 14)]
    weights = torch.rand(12, 2, generator=torch.Generator().manual_seed(1))
    params = with_seeds(SamplingParams(max_tokens=20), range(12))
    done = sampler.generate(prompts, weights, params, simplex=False)
    return [(c.token_ids, c.logprobs) for c in done]


def plainly(policy):
    """What the model itself gives."""
    sampler = Sampler(policy)
    sampler.runner.models[0].recording = None
    return generate(sampler)


def test_a_sampler_gives_the_same_bits_with_and_without(policy):
    assert generate(Sampler(policy)) == plainly(policy)


def test_trained_adapters_are_followed(policy, count_runs):
    sampler, runs = Sampler(policy), count_runs()
    before = generate(sampler)
    for layer in steered_layers(policy.model).values():
        layer.lora_B.data.mul_(1.5)
    after = generate(sampler)
    assert runs and after != before and after == plainly(policy)
    for layer in steered_layers(policy.model).values():  # another tensor
        layer.lora_B = nn.Parameter(layer.lora_B.detach() / 1.5)
    runs.clear()
    again = generate(sampler)
    assert runs and again == plainly(policy)


def norm(policy):
    return policy.model.base_model.norm


def test_a_model_that_was_changed_runs_itself(policy, count_runs):
    sampler, runs = Sampler(policy), count_runs()
    generate(sampler)
    assert runs
    weight = norm(policy).weight
    norm(policy).weight = nn.Parameter(weight.detach() * 2, requires_grad=False)
    runs.clear()
    changed = generate(sampler)
    assert not runs and changed == plainly(policy)
    norm(policy).weight = weight
    generate(sampler)
    assert runs


def test_hooks_and_training_mode_run_the_model_itself(policy, count_runs):
    sampler, runs, seen = Sampler(policy), count_runs(), []
    handle = norm(policy).register_forward_hook(lambda *_: seen.append(1))
    generate(sampler)
    assert seen and not runs
    handle.remove()
    norm(policy).train()
    generate(sampler)
    assert not runs
    norm(policy).eval()
    generate(sampler)
    assert runs
