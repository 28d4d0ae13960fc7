"""batch_invariant(): a request's completion is the same to the bit, whatever runs beside it."""

import random

import pytest

import clp_kernels
from clp.engine.sampler import Sampler, SamplingParams

BUDGETS = [2048, 24]


def asked(count):
    """(prompt, weights, params); some share prompts, some the weights too; some have n > 1."""
    choose = random.Random(4)
    texts = [[choose.randrange(3, 1024) for _ in range(n)] for n in (1, 2, 7, 18, 33, 60)]
    texts.append([*texts[-1][:25], 5, 6])  # a common beginning
    choices = [[1.0, 0.0], [0.5, 0.5], [0.3, 0.7]]
    return [
        (
            choose.choice(texts),
            choose.choice(choices),
            SamplingParams(max_tokens=choose.randrange(1, 10), seed=i, ignore_eos=True,
                           temperature=choose.choice([0.0, 0.7, 1.0]), n=choose.choice([1, 1, 2])),
        )
        for i in range(count)
    ]  # fmt: skip


def results(request):
    return [(c.token_ids, c.logprobs) for c in request.completions]


def alone(policy, cases, budget):
    found = []
    for case in cases:
        sampler = Sampler(policy, max_batch_size=64, max_prefill_tokens=budget)
        request = sampler.submit(*case)
        sampler.finish([request])
        found.append(results(request))
    return found


def together(policy, cases, budget, order_seed):
    """All in one sampler, submitted in a random order between steps, strangers cancelled."""
    choose = random.Random(order_seed)
    sampler = Sampler(policy, max_batch_size=64, max_prefill_tokens=budget)
    order, requests, strangers = list(range(len(cases))), {}, []
    choose.shuffle(order)
    for i in order:
        requests[i] = sampler.submit(*cases[i])
        if choose.random() < 0.3:
            strangers.append(sampler.submit(*choose.choice(cases)))
        if choose.random() < 0.3:
            sampler.step()
        if strangers and choose.random() < 0.3:
            sampler.cancel(strangers.pop(choose.randrange(len(strangers))))
    sampler.finish(list(requests.values()))
    return [results(requests[i]) for i in range(len(cases))]


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_same_bits_alone_and_in_any_company(policy, budget):
    cases = asked(24)
    with clp_kernels.batch_invariant():
        wanted = alone(policy, cases, budget)
        assert together(policy, cases, budget, order_seed=budget) == wanted


def test_without_the_mode_some_request_differs(policy):
    """So the mode is needed; the tokens are nearly always the same, the last bits are not."""
    cases = asked(12)
    wanted = alone(policy, cases, 2048)
    assert together(policy, cases, 2048, 0) != wanted
