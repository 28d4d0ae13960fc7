"""What is cached and recorded belongs to the model as it is now."""

import argparse
import collections
import copy
import functools
import gc
import sys
import types
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from decoding_alone import token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clp.engine.model_state import ModelState
from clp.engine.sampler import Sampler, SamplingParams
from clp.policies.checksum import WIDTH
from clp.policies.loading import load_base
from clp.policies.logit_mixture import LogitMixture
from clp_kernels.nn.mixed_lora import steered_layers

PROMPT = token_ids(40, 2)
PARAMS = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)


def ask(sampler):
    m = len(sampler.policy.objectives)
    done = sampler.generate([PROMPT, PROMPT[:20]], [[1 / m] * m] * 2, PARAMS)
    return [(c.token_ids, c.logprobs) for c in done]


def layer(model):
    return model.base_model.layers[1]


def of_type(self, x):
    """The forward of a module's class, scaled."""
    return 1.5 * type(self).forward(self, x)


def own_forward(module):
    module.forward = types.MethodType(of_type, module)


def times(module, name):
    """Another tensor or number in place of the one that is there."""
    setattr(module, name, getattr(module, name) * 1.5)


def other_class(model):
    class Doubled(type(layer(model).mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer(model).mlp.__class__ = Doubled


CHANGES = {
    "hook": lambda m: layer(m).mlp.register_forward_hook(lambda module, args, out: out * 1.5),
    "pre hook": lambda m: layer(m).mlp.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,)),
    "hook with keywords": lambda m: layer(m).self_attn.register_forward_hook(
        lambda module, args, kwargs, out: (out[0] * 1.5, *out[1:]), with_kwargs=True
    ),
    "forward": lambda m: own_forward(layer(m).mlp),
    "forward of a steered layer": lambda m: own_forward(layer(m).mlp.down_proj),
    "scale of attention": lambda m: times(layer(m).self_attn, "scaling"),
    "epsilon": lambda m: setattr(layer(m).input_layernorm, "variance_epsilon", 0.5),
    "buffer in place": lambda m: m.base_model.rotary_emb.inv_freq.mul_(1.5),
    "another buffer": lambda m: times(m.base_model.rotary_emb, "inv_freq"),
    "scale of positions": lambda m: times(m.base_model.rotary_emb, "attention_scaling"),
    "activation": lambda m: setattr(layer(m).mlp, "act_fn", nn.GELU()),
    "function": lambda m: setattr(layer(m).mlp.act_fn, "forward", F.relu),
    "frozen in place": torch.no_grad()(lambda m: layer(m).input_layernorm.weight.mul_(1.5)),
    "frozen through data": lambda m: layer(m).input_layernorm.weight.data.mul_(1.5),
    "frozen through numpy": lambda m: np.multiply(
        weight := layer(m).mlp.down_proj.base_layer.weight.numpy(), 1.5, out=weight
    ),
    "one element through data": lambda m: layer(m).mlp.up_proj.base_layer.weight.data[3, 5].add_(1),
    "rows that trade places": lambda m: layer(m).mlp.up_proj.base_layer.weight.data.copy_(
        layer(m).mlp.up_proj.base_layer.weight.flip(0)
    ),
    "embedding through data": lambda m: setattr(
        weight := m.get_input_embeddings().weight, "data", weight.data.mul_(1.5)
    ),
    "other class": other_class,
}
ADAPTERS = {
    "scaling": lambda one: one.scaling.mul_(1.5),
    "another scaling": lambda one: times(one, "scaling"),
    "adapter in place": lambda one: one.lora_B.data.mul_(1.5),
}


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


def copied(policy):
    """With a model of its own."""
    other = copy.copy(policy)
    other.model = copy.deepcopy(policy.model)
    return other


@pytest.mark.parametrize("change", [*CHANGES, *ADAPTERS])
def test_a_changed_policy_is_sampled_as_it_is_now(policy, change, one_thread):
    policy = copied(policy)
    sampler = Sampler(policy)
    before = ask(sampler)
    if change in CHANGES:
        CHANGES[change](policy.model)
    else:
        for one in steered_layers(policy.model).values():
            ADAPTERS[change](one)
    after = ask(sampler)
    assert after != before
    assert after == ask(Sampler(policy))
    sampler.runner.models[0].recording = None
    assert after == ask(sampler)


@pytest.mark.parametrize("change", ["hook", "scale of attention", "epsilon", "buffer in place"])
def test_a_changed_mixture_is_sampled_as_it_is_now(base, change, one_thread):
    models = {name: copy.deepcopy(base[0]) for name in ("a", "b")}
    sampler = Sampler(LogitMixture(models, base[1]))
    before = ask(sampler)
    CHANGES[change](models["b"])
    after = ask(sampler)
    assert after != before and after == ask(Sampler(sampler.policy))


def test_a_patched_class_and_hooks_of_all_modules(policy, monkeypatch, one_thread):
    sampler = Sampler(policy)
    before = ask(sampler)
    kind = type(layer(policy.model).mlp)
    forward = kind.forward
    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", lambda self, x: 1.5 * forward(self, x))
        after = ask(sampler)
        assert after != before and after == ask(Sampler(policy))
    assert ask(sampler) == before

    def half(module, args, out):
        return out * 0.5 if isinstance(module, kind) else None

    with nn.modules.module.register_module_forward_hook(half):
        after = ask(sampler)
        assert after != before and after == ask(Sampler(policy))
    assert ask(sampler) == before


def test_a_patched_function_of_the_models_file(policy, monkeypatch, one_thread):
    sampler = Sampler(policy)
    before = ask(sampler)
    file = sys.modules[type(layer(policy.model)).__module__]
    rotate = file.apply_rotary_pos_emb
    with monkeypatch.context() as patched:
        patched.setattr(file, "apply_rotary_pos_emb", lambda q, *a: (q, rotate(q, *a)[1]))
        after = ask(sampler)
        assert after != before and after == ask(Sampler(policy))
    assert ask(sampler) == before


FACTOR = 1.0


@dataclass(slots=True)
class Slots:
    scale: float


def by_settings(self, x):
    return self.read(self.args) * super(type(self), self).forward(x)


def by_a_global(self, x):
    return FACTOR * super(type(self), self).forward(x)


def of_a_class_with(policy, forward):
    """A copy of the policy, one of whose modules has a class of its own with this forward."""
    policy = copied(policy)
    module = layer(policy.model).mlp
    module.__class__ = type("Scaled", (type(module),), {"forward": forward})
    return policy


@pytest.mark.parametrize(
    ("args", "read", "change"),
    [
        (types.SimpleNamespace(scale=1.0), lambda a: a.scale, lambda a: setattr(a, "scale", 1.5)),
        (argparse.Namespace(scale=1.0), lambda a: a.scale, lambda a: setattr(a, "scale", 1.5)),
        (collections.UserDict(scale=1.0), lambda a: a["scale"], lambda a: a.update(scale=1.5)),
        (
            types.SimpleNamespace(scale=torch.ones(1)),
            lambda a: a.scale,
            lambda a: a.scale.mul_(1.5),
        ),
        (defaultdict(lambda: 1.0), lambda a: a["scale"], lambda a: a.update(scale=1.5)),
        (np.ones(1), lambda a: float(a[0]), lambda a: a.fill(1.5)),
        (
            partial(dict, at=[1.0]),
            lambda a: a()["at"][0],
            lambda a: a.keywords["at"].insert(0, 1.5),
        ),
        (Slots(1.0), lambda a: a.scale, lambda a: setattr(a, "scale", 1.5)),
        ({1.0}, lambda a: max(a), lambda a: a.add(1.5)),
    ],
    ids=[
        "number of a namespace",
        "parsed arguments",
        "user dict",
        "tensor of a namespace",
        "defaultdict",
        "array",
        "partial",
        "slots",
        "set",
    ],
)
def test_a_number_in_an_object_of_settings(policy, args, read, change, one_thread):
    """Models often keep their numbers in a dataclass or a namespace, `self.args`."""
    policy = of_a_class_with(policy, by_settings)
    module = layer(policy.model).mlp
    module.args, module.read = args, read
    sampler = Sampler(policy)
    before = ask(sampler)
    change(args)
    after = ask(sampler)
    assert after != before and after == ask(Sampler(policy))


def decorated(function):
    @functools.wraps(function)
    def outer(self, x):
        return function(self, x)

    return outer


@pytest.mark.parametrize(
    "attributes",
    [
        {"forward": torch.no_grad()(by_a_global)},
        {"forward": decorated(by_a_global)},
        {"forward": lambda self, x: self.factor * super(type(self), self).forward(x),
         "factor": property(lambda self: FACTOR)},
        {"forward": lambda self, x: self.factor() * super(type(self), self).forward(x),
         "factor": staticmethod(lambda: FACTOR)},
    ],
    ids=["no_grad", "decorated", "property", "staticmethod"],
)  # fmt: skip
def test_a_number_that_a_wrapped_function_names(policy, attributes, monkeypatch, one_thread):
    policy = copied(policy)
    module = layer(policy.model).mlp
    module.__class__ = type("Scaled", (type(module),), attributes)
    sampler = Sampler(policy)
    before = ask(sampler)
    monkeypatch.setitem(globals(), "FACTOR", 1.5)
    after = ask(sampler)
    assert after != before and after == ask(Sampler(policy))


@pytest.mark.parametrize("bound", [False, True])
def test_a_number_that_an_activation_holds(policy, bound, one_thread):
    policy, numbers = copied(policy), types.SimpleNamespace(scale=1.0)
    numbers.act = types.MethodType(lambda self, x: self.scale * F.silu(x), numbers)
    del layer(policy.model).mlp.act_fn
    layer(policy.model).mlp.act_fn = numbers.act if bound else lambda x: numbers.scale * F.silu(x)
    sampler = Sampler(policy)
    before = ask(sampler)
    numbers.scale = 1.5
    after = ask(sampler)
    assert after != before and after == ask(Sampler(policy))


def test_hidden_states_that_were_asked_for_once_change_nothing(policy, monkeypatch, one_thread):
    """transformers leaves hooks on the model that do nothing in other calls."""
    policy, prefilled = copied(policy), []
    sampler = Sampler(policy)
    with policy.steer(torch.tensor([[0.5, 0.5]])), torch.no_grad():
        policy.model(torch.tensor([PROMPT]), output_hidden_states=True)
    done = ask(sampler)
    prefill = sampler.runner.prefill
    monkeypatch.setattr(sampler.runner, "prefill", lambda p: prefilled.append(p) or prefill(p))
    assert ask(sampler) == done and not prefilled
    assert not ModelState(policy.model).own_code


class Odd:
    """Answers to any name, and has a slot that is not set."""

    __slots__ = ("__hidden", "unset")

    def __init__(self):
        self.__hidden = 1

    def __getattr__(self, name):
        raise RuntimeError(name)


def test_what_cannot_be_read_counts_by_itself():
    deep = []
    for _ in range(3000):
        deep = [deep]
    tensors = [
        torch.eye(3).to_sparse(), torch.randn(5000, dtype=torch.complex64).conj(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.ones(3, device="meta"),
        torch.quantize_per_tensor(torch.randn(5000), 0.1, 0, torch.qint8), torch.zeros(0),
        torch.ones(2, 3).expand(4, 2, 3), torch.ones(6).view(2, 3).t(),
    ]  # fmt: skip
    model = nn.Module()
    model.things = [deep, Odd(), tensors, collections.UserDict(a=1)]
    model.things.append(model.things)
    assert ModelState(model) == ModelState(model)


def test_a_number_that_a_class_holds(policy, one_thread):
    policy = of_a_class_with(policy, by_settings)
    kind = type(layer(policy.model).mlp)
    kind.args, kind.read = {"scale": 1.0}, staticmethod(lambda args: args["scale"])
    sampler = Sampler(policy)
    before = ask(sampler)
    kind.args["scale"] = 1.5
    after = ask(sampler)
    assert after != before and after == ask(Sampler(policy))


def test_a_number_of_the_file_that_has_the_modules_class(policy, monkeypatch, one_thread):
    """As in a notebook: the class and a global number that its forward reads."""
    policy = of_a_class_with(policy, by_a_global)
    sampler = Sampler(policy)
    before = ask(sampler)
    monkeypatch.setitem(globals(), "FACTOR", 1.5)
    after = ask(sampler)
    assert after != before and after == ask(Sampler(policy))


def test_what_a_hook_reads_is_read_at_every_step(policy, one_thread):
    """A hook that was there when the sampler was made, and a number that it reads."""
    policy, factor, calls = copied(policy), [1.0], []
    mlp = layer(policy.model).mlp
    mlp.register_forward_hook(lambda module, args, out: calls.append(1) or out * factor[0])
    sampler = Sampler(policy)
    calls.clear()
    before = ask(sampler)
    assert len(calls) >= PARAMS.max_tokens
    factor[0] = 1.5
    after = ask(sampler)
    assert after != before and after == ask(Sampler(policy))


def test_an_unchanged_model_is_cached_and_recorded(policy, count_runs, monkeypatch, one_thread):
    sampler, runs = Sampler(policy), count_runs()
    prefill = Mock(wraps=sampler.runner.prefill)
    monkeypatch.setattr(sampler.runner, "prefill", prefill)
    ask(sampler)
    runs.clear()
    prefill.reset_mock()
    with policy.steer(torch.tensor([[1.0, 0.0]])), torch.no_grad():
        policy.model(torch.tensor([PROMPT]))
    policy.head()
    ask(sampler)
    assert runs and not prefill.called


def test_equal_plain_values_are_equal_and_others_not():
    model = nn.Linear(2, 2)
    model.size, model.sizes, model.nested = 10**9, (1.5, 2), {"a": [1.25, "x"]}
    before = ModelState(model)
    model.size, model.nested = int("1000000000"), {"a": [float("1.25"), "x"]}
    # A dictionary in place of another is a change; what it holds counts too.
    assert before != ModelState(model)
    before = ModelState(model)
    assert before == ModelState(model)
    model.size = int("1000000000")
    assert before == ModelState(model)
    for change in (
        lambda: model.nested["a"].append(1), lambda: model.nested["a"].__setitem__(0, 2.5),
        lambda: setattr(model, "size", 1e9), lambda: setattr(model, "more", None),
        lambda: setattr(model, "sizes", (1.5, 3)), lambda: model.eval(),
        lambda: setattr(model.bias, "data", model.bias.data.clone()),
    ):  # fmt: skip
        change()
        now = ModelState(model)
        assert now != before
        before = now


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8]
)
@pytest.mark.parametrize("count", [1, 2, 7, WIDTH - 1, 2 * WIDTH, 12 * WIDTH + 13])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_element_counts(dtype, count, offset):
    """Writes that PyTorch does not count, wherever they are and wherever the memory begins."""
    generator = torch.Generator().manual_seed(count)
    storage = torch.randint(1, 100, (2, offset + count), generator=generator).to(dtype)
    model = nn.Module()
    for i in range(2):  # one begins somewhere else
        model.register_buffer(f"b{i}", storage[i, offset:])
    state = ModelState(model)
    assert state == ModelState(model)
    value = model.b1.data
    where = torch.randint(count, (20,), generator=generator).tolist()
    writes = [(slice(i, i + 1), value[i] + 1) for i in {0, count - 1, *where}]
    writes += [(slice(None), -value), (slice(None), 2 * value), (slice(0, count, 2), -value[::2])]
    if count > 2:
        writes += [(slice(None), value.roll(1)), (slice(None), value.flip(0))]
    for here, new in writes:
        kept = value.clone()
        value[here] = new
        assert state != ModelState(model), here
        value.copy_(kept)
        assert state == ModelState(model)


def test_an_object_that_takes_the_place_of_a_dead_one_is_another():
    model = nn.Linear(2, 2)
    model.thing = object()
    before, where = ModelState(model), id(model.thing)
    model.thing = None
    gc.collect()
    for _ in range(1000):
        model.thing = object()
        assert id(model.thing) != where
    assert before != ModelState(model)


def test_a_sampler_refuses_a_policy_with_another_model(policy):
    policy = copy.copy(policy)
    sampler = Sampler(policy)
    policy.model = copy.deepcopy(policy.model)
    with pytest.raises(RuntimeError, match="make a new Sampler"):
        ask(sampler)


def test_a_sampler_refuses_a_model_that_a_new_one_would_refuse(policy):
    """Attention to both sides, as LLM2Vec sets it, which the slots do not compute."""
    sampler = Sampler(policy)
    wanted = ask(sampler)
    attention = [one.self_attn for one in policy.model.base_model.layers]
    hook = policy.model.base_model.norm.register_forward_hook(lambda *_: None)
    for one in attention:
        one.is_causal = False
    ask(sampler)  # what a hook reads is not known
    hook.remove()
    for _ in range(2):  # also at the second call
        with pytest.raises(ValueError, match="does not support LlamaForCausalLM: its logits diff"):
            ask(sampler)
    with pytest.raises(ValueError, match="its logits differ"):
        Sampler(policy)
    for one in attention:
        one.is_causal = True
    assert ask(sampler) == wanted == ask(Sampler(policy))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sampler_refuses_a_model_that_has_got_another_dtype(base, dtype):
    model = copy.deepcopy(base[0])
    sampler = Sampler(LogitMixture({"a": model}, base[1]))
    ask(sampler)
    model.to(dtype)
    with pytest.raises(RuntimeError, match=r"float32.*make a new Sampler"):
        ask(sampler)
    model.float()
    ask(sampler)


class Counted(TorchDispatchMode):
    """Counts the ops that PyTorch runs."""

    ops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops += 1
        return function(*args, **(kwargs or {}))


def test_looking_costs_few_ops_per_tensor(base):
    """Every generate looks, and 43 tensors took 3 ms: 12 ops each, which views take a part of."""
    tensors = [*base[0].parameters(), *base[0].buffers()]
    state = ModelState(base[0])
    with Counted() as counted:
        assert state == ModelState(base[0])
    assert 0 < counted.ops < 16 * len(tensors)
