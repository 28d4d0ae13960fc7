"""What is cached and recorded belongs to the model as it is now."""

import copy
import gc
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from decoding_alone import new_spread_policy
from torch import nn

from clp.engine import recording
from clp.engine.model_state import ModelState
from clp.engine.sampler import Sampler, SamplingParams
from clp.policies.loading import load_base
from clp.policies.logit_mixture import LogitMixture
from clp_kernels.nn.mixed_lora import steered_layers

PROMPT = torch.randint(3, 1000, (40,), generator=torch.Generator().manual_seed(2)).tolist()
PARAMS = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)


def ask(sampler):
    m = len(sampler.policy.objectives)
    done = sampler.generate([PROMPT, PROMPT[:20]], [[1 / m] * m] * 2, PARAMS)
    return [(c.token_ids, c.logprobs) for c in done]


def layer(model):
    return model.base_model.layers[1]


def hook(model):
    layer(model).mlp.register_forward_hook(lambda module, args, out: out * 1.5)


def pre_hook(model):
    layer(model).mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def hook_with_kwargs(model):
    layer(model).self_attn.register_forward_hook(
        lambda module, args, kwargs, out: (out[0] * 1.5, *out[1:]), with_kwargs=True
    )


def own_forward(model):
    mlp = layer(model).mlp
    mlp.forward = types.MethodType(lambda self, x: 1.5 * type(self).forward(self, x), mlp)


def own_forward_of_a_steered_layer(model):
    one = layer(model).mlp.down_proj
    one.forward = types.MethodType(lambda self, x: 1.5 * type(self).forward(self, x), one)


def scale_of_attention(model):
    layer(model).self_attn.scaling *= 1.5


def epsilon(model):
    layer(model).input_layernorm.variance_epsilon = 0.5


def buffer_in_place(model):
    model.base_model.rotary_emb.inv_freq.mul_(1.5)


def another_buffer(model):
    rotary = model.base_model.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 1.5


def scale_of_positions(model):
    model.base_model.rotary_emb.attention_scaling = 1.2


def activation(model):
    layer(model).mlp.act_fn = nn.GELU()


def function(model):
    layer(model).mlp.act_fn.forward = F.relu


def frozen_in_place(model):
    with torch.no_grad():
        layer(model).input_layernorm.weight.mul_(1.5)


def frozen_through_data(model):
    layer(model).input_layernorm.weight.data.mul_(1.5)


def frozen_through_numpy(model):
    layer(model).mlp.down_proj.base_layer.weight.numpy()[:] *= 1.5


def embedding_through_data(model):
    model.get_input_embeddings().weight.data *= 1.5


def other_class(model):
    class Doubled(type(layer(model).mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer(model).mlp.__class__ = Doubled


CHANGES = [
    hook, pre_hook, hook_with_kwargs, own_forward, own_forward_of_a_steered_layer,
    scale_of_attention, epsilon, buffer_in_place, another_buffer, scale_of_positions, activation,
    function, frozen_in_place, frozen_through_data, frozen_through_numpy, embedding_through_data,
    other_class,
]  # fmt: skip


def scaling_of_a_steered_layer(model):
    for one in steered_layers(model).values():
        one.scaling.mul_(1.5)


def another_scaling(model):
    for one in steered_layers(model).values():
        one.scaling = one.scaling * 1.5


def adapter_in_place(model):
    for one in steered_layers(model).values():
        one.lora_B.data.mul_(1.5)


@pytest.fixture(scope="module")
def unchanged():
    return new_spread_policy()


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


def with_model(policy, model):
    changed = copy.copy(policy)
    changed.model = model
    return changed


@pytest.mark.parametrize(
    "change", [*CHANGES, scaling_of_a_steered_layer, another_scaling, adapter_in_place]
)
def test_a_changed_policy_is_sampled_as_it_is_now(unchanged, change, one_thread):
    policy = with_model(unchanged, copy.deepcopy(unchanged.model))
    sampler = Sampler(policy)
    before = ask(sampler)
    change(policy.model)
    after = ask(sampler)
    assert after != before
    assert after == ask(Sampler(policy))
    sampler.runner.models[0].recording = None
    assert after == ask(sampler)


@pytest.mark.parametrize("change", CHANGES[:1] + CHANGES[5:8])
def test_a_changed_mixture_is_sampled_as_it_is_now(base, change, one_thread):
    models = {name: copy.deepcopy(base[0]) for name in ("a", "b")}
    sampler = Sampler(LogitMixture(models, base[1]))
    before = ask(sampler)
    change(models["b"])
    after = ask(sampler)
    assert after != before and after == ask(Sampler(sampler.policy))


def test_a_patched_class_and_hooks_of_all_modules(unchanged, monkeypatch, one_thread):
    sampler = Sampler(unchanged)
    before = ask(sampler)
    kind = type(layer(unchanged.model).mlp)
    forward = kind.forward
    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", lambda self, x: 1.5 * forward(self, x))
        after = ask(sampler)
        assert after != before and after == ask(Sampler(unchanged))
    assert ask(sampler) == before

    def half(module, args, out):
        return out * 0.5 if isinstance(module, kind) else None

    handle = nn.modules.module.register_module_forward_hook(half)
    try:
        after = ask(sampler)
        assert after != before and after == ask(Sampler(unchanged))
    finally:
        handle.remove()
    assert ask(sampler) == before


def test_a_patched_function_of_the_models_file(unchanged, monkeypatch, one_thread):
    sampler = Sampler(unchanged)
    before = ask(sampler)
    file = sys.modules[type(layer(unchanged.model)).__module__]
    rotate = file.apply_rotary_pos_emb
    with monkeypatch.context() as patched:
        patched.setattr(file, "apply_rotary_pos_emb", lambda q, *a: (q, rotate(q, *a)[1]))
        after = ask(sampler)
        assert after != before and after == ask(Sampler(unchanged))
    assert ask(sampler) == before


def test_what_a_hook_reads_is_read_at_every_step(unchanged, one_thread):
    """A hook that was there when the sampler was made, and a number that it reads."""
    policy, factor, calls = with_model(unchanged, copy.deepcopy(unchanged.model)), [1.0], []
    layer(policy.model).mlp.register_forward_hook(
        lambda module, args, out: calls.append(1) or out * factor[0]
    )
    sampler = Sampler(policy)
    calls.clear()
    before = ask(sampler)
    assert len(calls) >= PARAMS.max_tokens
    factor[0] = 1.5
    after = ask(sampler)
    assert after != before and after == ask(Sampler(policy))


def test_an_unchanged_model_is_cached_and_recorded(unchanged, monkeypatch, one_thread):
    sampler, runs, prefilled = Sampler(unchanged), [], []
    call, prefill = recording.Recording.__call__, sampler.runner.prefill
    monkeypatch.setattr(
        recording.Recording, "__call__", lambda self, *args: runs.append(1) or call(self, *args)
    )
    monkeypatch.setattr(sampler.runner, "prefill", lambda p: prefilled.append(p) or prefill(p))
    ask(sampler)
    runs.clear()
    prefilled.clear()
    with unchanged.steer(torch.tensor([[1.0, 0.0]])), torch.no_grad():
        unchanged.model(torch.tensor([PROMPT]))
    unchanged.head()
    ask(sampler)
    assert runs and not prefilled


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


def test_a_sampler_refuses_a_policy_with_another_model(unchanged):
    policy = with_model(unchanged, unchanged.model)
    sampler = Sampler(policy)
    policy.model = copy.deepcopy(unchanged.model)
    with pytest.raises(RuntimeError, match="make a new Sampler"):
        ask(sampler)


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


def test_looking_costs_little(base):
    state = ModelState(base[0])
    times = []
    for _ in range(20):
        begin = time.thread_time()
        assert state == ModelState(base[0])
        times.append(time.thread_time() - begin)
    assert min(times) < 0.005
