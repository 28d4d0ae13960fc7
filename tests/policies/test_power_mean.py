"""The power mean on fixed tensors, and what token-level mixing is not (MOD, arXiv:2406.18853)."""

import math

import pytest
import torch

import clp_kernels
from clp.policies.power_mean import power_mean

LOGITS = torch.tensor([[[1.0, -0.5, 0.2, 0.0]], [[-1.0, 0.3, 2.0, -3.0]]])
WEIGHTS = torch.tensor([[0.3, 0.7]])


@pytest.mark.parametrize("exponent", [-1.0, -0.3, -4.0])
def test_the_formula(exponent):
    p = torch.softmax(LOGITS.double(), -1)[:, 0]
    mean = (0.3 * p[0] ** exponent + 0.7 * p[1] ** exponent) ** (1 / exponent)
    found = torch.softmax(power_mean(LOGITS, WEIGHTS, exponent), -1)[0].double()
    torch.testing.assert_close(found, mean / mean.sum(), rtol=1e-5, atol=1e-7)


def test_an_exponent_near_zero_is_near_the_geometric_mean():
    near = torch.softmax(power_mean(LOGITS.double(), WEIGHTS, -1e-5), -1)
    geometric = torch.softmax(clp_kernels.mix_logits(LOGITS.double(), WEIGHTS), -1)
    torch.testing.assert_close(near, geometric, rtol=1e-4, atol=1e-4)


def test_a_term_of_weight_zero_is_dropped_and_an_excluded_token_stays_out():
    logits = LOGITS.clone()
    logits[1, 0, 2] = -torch.inf
    alone = power_mean(logits, torch.tensor([[1.0, 0.0]]), -1.0)
    torch.testing.assert_close(alone, torch.log_softmax(logits[0], -1))
    both = power_mean(logits, WEIGHTS, -1.0)
    assert both[0, 2] == -torch.inf
    assert both[0, [0, 1, 3]].isfinite().all()


def test_an_example_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 33, generator=generator)
    weights = torch.rand(7, 3, generator=generator)
    whole = power_mean(logits, weights, -0.5)
    for i in range(7):
        assert power_mean(logits[:, i : i + 1], weights[i : i + 1], -0.5).equal(whole[i : i + 1])


# Rewards of the four sequences aa, ab, ba, bb of two tokens; pi_ref is uniform, beta is 1.
REWARDS = torch.tensor([[3.0, -4.5, 0.0, 0.0], [-4.5, 3.0, 0.0, 0.0]], dtype=torch.float64)


def token_wise(experts, mix):
    """Sequences [4] of experts [m, 4] whose next-token distributions are mixed at each token."""
    tables = experts.view(-1, 2, 2)
    first = torch.softmax(mix(tables.sum(2).log()), -1)
    second = [torch.softmax(mix((tables[:, a] / tables[:, a].sum(1, True)).log()), -1)
              for a in range(2)]  # fmt: skip
    return torch.cat([first[a] * second[a] for a in range(2)])


def test_mixing_token_by_token_is_not_the_optimum_of_the_sequence():
    even = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    experts = torch.softmax(REWARDS, -1)
    optimum = torch.softmax(even[0] @ REWARDS, -1)
    wanted = torch.tensor([0.16, 0.16, 0.34, 0.34], dtype=torch.float64)
    torch.testing.assert_close(optimum, wanted, rtol=0, atol=0.001)
    # Over whole sequences the geometric mean of the experts is the optimum,
    sequences = torch.softmax(clp_kernels.mix_logits(experts.log()[:, None], even)[0], -1)
    torch.testing.assert_close(sequences, optimum)
    # token by token none of the divergences is near it: each expert likes its own second token,
    # which the mixture, when it draws the first, does not know to be lost.
    mod = token_wise(experts, lambda logits: clp_kernels.mix_logits(logits[:, None], even)[0])
    wanted = torch.tensor([0.455, 0.455, 0.045, 0.045], dtype=torch.float64)
    torch.testing.assert_close(mod, wanted, rtol=0, atol=0.001)
    for exponent in (-1.0, -0.3):
        mod = token_wise(experts, lambda x, q=exponent: power_mean(x[:, None], even, q)[0])
        assert math.isclose(float(mod.sum()), 1)
        assert float(mod[:2].sum()) > 0.9
