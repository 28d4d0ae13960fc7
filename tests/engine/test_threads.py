"""Samplers and training steps in several threads; Ctrl-C anywhere."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from decoding_alone import new_spread_policy

import clp_kernels
from clp.engine import locks
from clp.engine.sampler import Sampler, SamplingParams
from clp.engine.slot_model import SlotModel
from clp.policies.attention import IMPLEMENTATION, set_attention, with_plans
from clp.policies.loading import load_base
from clp.policies.logit_mixture import LogitMixture

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
PROMPTS = [[5 + i, 9, 30 + i] for i in range(3)]


@pytest.fixture
def policy(one_thread):
    return new_spread_policy()


def in_thread(call):
    """Runs a call in another thread, until it ends."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def ask(sampler, k):
    weights = [0.25 * k, 1 - 0.25 * k]
    return [c.token_ids for c in sampler.generate(PROMPTS, weights, PARAMS)]


@pytest.mark.parametrize("recorded", [True, False])
def test_samplers_of_one_model_take_turns(policy, recorded):
    """Also one that mixes the logits of its adapters, and samplers being made."""
    policies = [policy, policy, LogitMixture.of_adapters(policy)]
    samplers = [Sampler(one) for one in policies]
    wanted = [ask(sampler, k) for k, sampler in enumerate(samplers)]
    before = policy.model.config._attn_implementation

    def work(k):
        sampler = samplers[k]
        if not recorded:
            for model in sampler.runner.models:
                model.recording = None
        for _ in range(4):
            assert ask(sampler, k) == wanted[k]
        assert ask(Sampler(policies[k]), k) == wanted[k]

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            for future in [pool.submit(work, k) for k in range(3)]:
                future.result(timeout=120)
    finally:
        sys.setswitchinterval(switch)
    assert policy.model.config._attn_implementation == before


def test_models_made_from_one_configuration_take_turns(policy):
    other = copy.copy(policy)
    other.model = copy.deepcopy(policy.model)
    assert locks.locks_of([policy.model.config]) != locks.locks_of([other.model.config])
    for module in other.model.modules():
        if getattr(module, "config", None) is not None:
            module.config = policy.model.config
    a, b = Sampler(policy).runner, Sampler(other).runner
    assert a.locks == b.locks and len(a.locks) == 1


def test_locks_live_as_long_as_their_configuration():
    before = len(locks.LOCKS)
    config = type("Config", (), {})()
    lock = locks.locks_of([config, config])
    assert locks.locks_of([config]) == lock and len(locks.LOCKS) == before + 1
    del config
    assert len(locks.LOCKS) == before


def test_a_sampler_is_for_one_thread(policy):
    sampler = Sampler(policy)
    inside, go_on = threading.Event(), threading.Event()
    decode = sampler.runner.decode

    def slow(*args):
        inside.set()
        go_on.wait(60)
        return decode(*args)

    sampler.runner.decode = slow
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, sampler, 1)
        assert inside.wait(60)
        request = Sampler(policy).submit([5], "joy=1", PARAMS)
        for call in (
            lambda: ask(sampler, 1), sampler.step, lambda: sampler.submit([5], "joy=1"),
            lambda: sampler.cancel(request), lambda: sampler.finish([]),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="another thread"):
                call()
        go_on.set()
        assert first.result(60) == ask(sampler, 1)
    assert ask(sampler, 1) == ask(Sampler(policy), 1)


def test_mixtures_of_the_same_models_in_another_order_take_turns(policy):
    """Neither waits for the other's model while it keeps its own."""
    tokenizer = policy.tokenizer
    a, b = (load_base("tiny")[0] for _ in range(2))
    for parameter in b.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    mixtures = [LogitMixture(dict(zip("xy", pair, strict=True)), tokenizer)
                for pair in ((a, b), (b, a))]  # fmt: skip
    samplers = [Sampler(one) for one in mixtures]
    wanted = [ask(sampler, 1) for sampler in samplers]
    assert wanted[0] != wanted[1]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lambda s=s: [ask(s, 1) for _ in range(4)]) for s in samplers]
        for future, one in zip(futures, wanted, strict=True):
            assert future.result(timeout=60) == [one] * 4


def test_a_stream_may_be_read_in_any_thread(policy):
    """As web servers read it: each token in a thread of a pool. Dropped, it locks nothing."""
    sampler, other = Sampler(policy), Sampler(policy)
    wanted, config = ask(sampler, 1), policy.model.config
    before, weights = config._attn_implementation, [0.25, 0.75]
    stream, ids = sampler.stream(sampler.submit(PROMPTS[0], weights, PARAMS)), []
    while True:
        token = []
        in_thread(lambda token=token: token.append(next(stream, None)))
        if token[0] is None:
            break
        ids.append(token[0].token_id)
        assert config._attn_implementation == before
    assert ids == wanted[0]
    dropped = sampler.stream(sampler.submit(PROMPTS[1], weights, PARAMS))
    next(dropped)
    found = []
    in_thread(lambda: found.append(ask(other, 1)))
    assert found == [wanted]
    in_thread(dropped.close)
    assert ask(sampler, 1) == wanted


def test_a_training_step_in_another_thread_is_refused_and_changes_nothing(policy):
    sampler, refused = Sampler(policy), []
    sampler.runner.models[0].recording = None
    wanted = ask(sampler, 1)
    weights = torch.tensor([[1.0, 0.0]])

    def train():
        try:
            with policy.steer(weights):
                policy.model(torch.tensor([[5, 6]]))
        except RuntimeError as error:
            refused.append(str(error))

    norm = policy.model.base_model.norm
    handle = norm.register_forward_pre_hook(lambda module, args: in_thread(train))
    assert ask(sampler, 1) == wanted
    assert refused and all("another thread is running this model" in r for r in refused)
    handle.remove()
    with policy.steer(weights), ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match="another thread is running this model"):
            pool.submit(ask, sampler, 1).result(60)
        with pytest.raises(RuntimeError, match=r"^another thread is running this model"):
            pool.submit(Sampler, policy).result(60)
        with policy.steer(weights):  # nests in its own thread
            policy.model(torch.tensor([[5, 6]]))
    assert ask(sampler, 1) == wanted


def test_a_plain_forward_beside_a_samplers_is_right_or_refused():
    model, tokenizer = load_base("tiny")
    sampler = Sampler(LogitMixture({"a": model}, tokenizer))
    prompt, results = torch.tensor([[5, 6]]), []
    params = replace(PARAMS, max_tokens=2)
    wanted = sampler.generate([[5, 6]], [[1.0]], params)
    with torch.no_grad():
        logits = model(prompt).logits

    def forward():
        try:
            results.append(torch.equal(model(prompt).logits, logits))
        except ValueError as error:
            results.append(str(error))

    def beside(module, args):
        handle.remove()
        for _ in range(2):
            in_thread(forward)

    handle = model.base_model.norm.register_forward_pre_hook(beside)
    assert sampler.generate([[5, 6]], [[1.0]], params) == wanted
    assert len(results) == 2 and all("another thread runs it" in r for r in results)
    forward()
    assert results[2] is True


@pytest.mark.parametrize("device_thread", [False, True])
def test_a_recomputation_may_run_in_a_thread_of_autograds(policy, device_thread):
    """A backward may enter contexts of its own: on CUDA it runs in another thread."""
    seen = []

    class Enter(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with clp_kernels.steer(policy.model, torch.tensor([[0.0, 1.0]])):
                seen.append(policy.model(torch.tensor([[5, 6]])).logits)
            return grad

    x = torch.ones(1, requires_grad=True)
    with policy.steer(torch.tensor([[1.0, 0.0]])):
        y = Enter.apply(x)
        if device_thread:
            in_thread(y.backward)
        else:
            y.backward()
        with policy.steer(torch.tensor([[1.0, 0.0]])):
            pass
    assert seen and x.grad is not None


def test_ctrl_c_anywhere_restores_the_configuration(policy):
    """KeyboardInterrupt at every line that changes it, and at every call out of those."""
    model = SlotModel(policy.model)
    config = policy.model.config
    functions = (model.run.__func__, with_plans, set_attention)
    codes = {function.__code__ for function in functions}

    def interrupted(at):
        """Whether there was an event number `at` to interrupt."""
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            if frame.f_code not in codes:
                return None
            count += 1
            if count == at:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            model.run(list)
        finally:
            sys.settrace(before)

    for at in range(1, 200):
        try:
            interrupted(at)
        except KeyboardInterrupt:
            assert config._attn_implementation == "sdpa", at
            continue
        break
    assert 10 < at < 199
    assert config._attn_implementation != IMPLEMENTATION
