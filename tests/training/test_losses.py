"""The objective's gradient, and the closed-form optimum on a tabular problem."""

import itertools
import math

import pytest
import torch
from torch import nn

import clp_kernels
from clp.data.condition import draw_strengths
from clp.data.kl_range import KLRange
from clp.data.weights import draw_from_dirichlet, weight_grid
from clp.policies.experts import Experts
from clp.policies.lora import LoRA
from clp.training.losses import (
    clipped_loss,
    kl_returns,
    policy_loss,
    rloo_advantages,
    scale_rewards,
    value_advantages,
)

NAN = float("nan")

RANGE = KLRange(0.15, 0.5)


def test_scale_rewards_batch_and_group():
    rewards = torch.randn(5, 4, 3) * torch.tensor([1.0, 10.0, 0.1])
    assert scale_rewards(rewards, "none") is rewards
    batch = scale_rewards(rewards, "batch").std(dim=(0, 1), correction=0)
    torch.testing.assert_close(batch, torch.ones(3))
    group = scale_rewards(rewards, "group").std(dim=1, correction=0)
    torch.testing.assert_close(group, torch.ones(5, 3))


def test_scale_rewards_leaves_a_constant_objective_alone():
    rewards = torch.full((2, 3, 1), 0.7)
    assert torch.equal(scale_rewards(rewards, "group"), rewards)


def test_rloo_advantage_is_the_return_minus_the_mean_of_the_others():
    rewards, weights, kl = torch.rand(3, 4, 2), torch.rand(3, 2), torch.rand(3, 4)
    got = rloo_advantages(rewards, weights, kl[..., None], alpha=0.3)[..., 0]
    for g in range(3):
        returns = (0.7 * rewards[g] @ weights[g] - 0.3 * kl[g]).tolist()
        for k in range(4):
            others = [r for j, r in enumerate(returns) if j != k]
            assert float(got[g, k]) == pytest.approx(returns[k] - sum(others) / 3, abs=1e-6)


class Table:
    """A policy over all sequences of two tokens out of three, in float64, and its exact gradient.

    Attributes:
        logprobs, kl, log_ratios: [9, 2], of each sequence's tokens. chances: [9].
        exact: The gradient of -J with respect to theta.
    """

    alpha = 0.4

    def __init__(self):
        torch.manual_seed(0)
        vocab = 3
        ref = torch.log_softmax(torch.randn(1 + vocab, vocab, dtype=torch.float64), -1)
        self.reward = torch.rand(vocab, vocab, dtype=torch.float64).flatten()
        self.theta = torch.randn(1 + vocab, vocab, dtype=torch.float64, requires_grad=True)
        logp = torch.log_softmax(self.theta, -1)
        token_kl = (logp.exp() * (logp - ref)).sum(-1)
        pairs = list(itertools.product(range(vocab), repeat=2))
        self.logprobs = torch.stack([torch.stack([logp[0, a], logp[1 + a, b]]) for a, b in pairs])
        chosen = torch.tensor([[ref[0, a], ref[1 + a, b]] for a, b in pairs])
        self.log_ratios = self.logprobs - chosen
        self.kl = torch.stack([torch.stack([token_kl[0], token_kl[1 + a]]) for a, _ in pairs])
        returns = (1 - self.alpha) * self.reward - self.alpha * self.kl.sum(1)
        self.chances = self.logprobs.sum(1).exp()
        self.exact = self.gradient(-(self.chances * returns).sum())

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.theta, retain_graph=True)[0]

    def kl_returns(self, how, which):
        return kl_returns(how, self.kl[which].detach(), self.log_ratios[which].detach())

    def loss(self, how, which, advantages):
        own = self.kl[which] if how == "exact" else None
        return policy_loss(self.logprobs[which], own, advantages, self.alpha)

    def with_values(self, how, which, values):
        """The estimate from one sequence, with values [2, 2]: those of reward and KL per token."""
        advantages = value_advantages(
            self.reward[which].view(1, 1, 1), torch.ones(1, 1, dtype=torch.float64),
            self.kl_returns(how, [which])[None], values[None, None], self.alpha,
        )  # fmt: skip
        return self.gradient(self.loss(how, [which], advantages[0]))


def test_every_estimate_has_the_gradient_of_the_objective_as_its_mean():
    """Over all pairs of sequences of two steps, with the other of the pair as the baseline.

    E[estimate] is the exact gradient of -J in float64; the exact KL varies least, the ratio of the
    whole sequence most.
    """
    table, variance = Table(), {}
    for how in ("exact", "tokens", "sequence"):
        mean, variance[how] = torch.zeros_like(table.theta), 0.0
        for both in map(list, itertools.product(range(9), repeat=2)):
            rewards = table.reward[both].view(1, 2, 1)
            one = torch.ones(1, 1, dtype=torch.float64)
            advantages = rloo_advantages(rewards, one, table.kl_returns(how, both)[None], 0.4)[0]
            got = table.gradient(table.loss(how, both, advantages))
            chance = float(table.chances[both].detach().prod())
            mean += chance * got
            variance[how] += chance * float((got - table.exact).square().sum())
        torch.testing.assert_close(mean, table.exact)
    assert variance["exact"] < variance["tokens"] < variance["sequence"]


@pytest.mark.parametrize("how", ["exact", "tokens", "sequence"])
def test_any_value_leaves_the_mean_of_the_gradient_and_a_fitted_one_lowers_its_variance(how):
    """Values of the first token: one number; of the second: one for each first token."""
    table = Table()
    returns = torch.stack(
        [table.reward[:, None].expand(9, 2), table.kl_returns(how, slice(None)).expand(9, 2)], -1
    )  # [sequence, token, output]
    p = table.chances.detach()
    first = (p[:, None] * returns[:, 0]).sum(0)
    halves = p.view(3, 3) / p.view(3, 3).sum(1, keepdim=True)
    second = (halves[..., None] * returns[:, 1].view(3, 3, 2)).sum(1)
    fitted = torch.stack([first.expand(9, 2), second.repeat_interleave(3, 0)], 1)
    anything = torch.randn(4, 2, dtype=torch.float64)
    other = torch.stack([anything[:1].expand(9, 2), anything[1:].repeat_interleave(3, 0)], 1)
    variance = {}
    for name, values in (("none", torch.zeros_like(fitted)), ("any", other), ("fit", fitted)):
        found = torch.stack([table.with_values(how, i, values[i]) for i in range(9)])
        chances = p[:, None, None]
        torch.testing.assert_close((chances * found).sum(0), table.exact)
        variance[name] = float((chances * (found - table.exact).square()).sum())
    assert variance["fit"] < variance["none"]


def test_value_advantages_where_objectives_do_not_apply():
    """The definition; alpha may be one per group."""
    torch.manual_seed(4)
    rewards, weights = torch.rand(2, 3, 2), torch.rand(2, 2)
    rewards[0, 1, 0] = rewards[1, 2, 1] = rewards[1, 0, 0] = NAN
    kl, values, alpha = torch.rand(2, 3, 1), torch.randn(2, 3, 4, 3), torch.tensor([0.2, 0.7])
    got = value_advantages(rewards, weights, kl, values, alpha[:, None, None])
    assert got.shape == (2, 3, 4)
    for g, k, c in itertools.product(range(2), range(3), range(4)):
        wanted = -float(alpha[g] * (kl[g, k, 0] - values[g, k, c, 2]))
        for i in range(2):
            if not rewards[g, k, i].isnan():
                own = rewards[g, k, i] - values[g, k, c, i]
                wanted += float((1 - alpha[g]) * weights[g, i] * own)
        assert float(got[g, k, c]) == pytest.approx(wanted, abs=1e-6)


def test_the_clipped_loss_at_ratio_1_has_the_gradient_of_the_plain_one():
    table, advantages = Table(), torch.randn(9, 2, dtype=torch.float64)
    mask = torch.ones(9, 2, dtype=torch.bool)
    old = table.logprobs.detach()
    for kl in (table.kl, None):
        found = clipped_loss(table.logprobs, old, kl, advantages, mask, 0.4, 0.2)
        plain = policy_loss(table.logprobs, kl, advantages, 0.4)
        torch.testing.assert_close(table.gradient(found.loss), table.gradient(plain))
        assert not found.low.any() and not found.high.any()


def test_the_clipped_loss_by_hand():
    """epsilon 0.2: the gain min(r A, clip(r) A), whose gradient is r A where it is not clipped."""
    ratios = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 3.0]])
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, 0.0]])
    advantages = torch.tensor([[2.0, 2.0, 2.0], [-2.0, -2.0, -2.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logprobs = (old + ratios.log()).requires_grad_()
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]], requires_grad=True)
    found = clipped_loss(logprobs, old, kl, advantages, mask, 0.5, 0.2)
    gains = (2.4 + 1.0 + 2.2) + (-3.0 - 1.6)
    torch.testing.assert_close(found.loss, torch.tensor(-gains / 2 + 0.5 * (0.6 + 0.4) / 2))
    found.loss.backward()
    moved = torch.tensor([[0.0, 1.0, 2.2], [-3.0, 0.0, 0.0]])
    torch.testing.assert_close(logprobs.grad, -moved / 2)
    torch.testing.assert_close(kl.grad, torch.full((2, 3), 0.25))
    assert found.high.tolist() == [[True, False, False], [False, False, False]]
    assert found.low.tolist() == [[False, False, False], [False, True, False]]


def train_table(rewards, alpha, how, conditioning=None):
    """Trains policies of one token on rewards [2, V], with R in units of its standard deviation
    under pi_ref unless `how` is "none".

    alpha is a number, or for a conditioning with a range of strengths drawn for each group.

    Returns: a function from alpha to the policies learned [N, V], for the N weights of the grid,
    and the optima [N, V]; and pi_ref [V].
    """
    vocab, groups, k = rewards.shape[1], 64, 4

    def layer_weights(rows):
        return rows if conditioning is None else conditioning.layer_weights(rows)

    def with_strengths(weights, alphas):
        return weights if conditioning is None else torch.cat([weights, alphas[:, None]], 1)

    table = nn.Sequential(nn.Linear(1, vocab, bias=False))
    count = layer_weights(with_strengths(torch.ones(1, 2), torch.full((1,), 0.1))).shape[1]
    clp_kernels.inject(table, list("abc")[:count], r=1, lora_alpha=1)
    parameters = [p for p in table.parameters() if p.requires_grad]
    steps = 600
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    ref = torch.log_softmax(table[0].base_weight[:, 0].detach(), -1)
    std = (rewards - (rewards * ref.exp()).sum(1, keepdim=True)).square().mul(ref.exp())
    std = std.sum(1).sqrt()
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        weights = draw_from_dirichlet(groups, 2, 1.0, 0.2, generator)
        if conditioning is None:
            alphas = torch.full((groups,), alpha)
        else:
            alphas = draw_strengths(conditioning.kl_range, groups, generator)
        with clp_kernels.steer(table, layer_weights(with_strengths(weights, alphas))):
            logp = torch.log_softmax(table(torch.ones(groups, 1)), -1).repeat_interleave(k, 0)
        seeds = torch.arange(groups * k) + 10_000 * step
        tokens = clp_kernels.sample(logp, seed=seeds, position=0).tokens
        kl = (logp.exp() * (logp - ref)).sum(-1)
        scores = scale_rewards(rewards[:, tokens].t().view(groups, k, 2), how, std)
        advantages = rloo_advantages(
            scores, weights, kl.detach().view(groups, k, 1), alphas[:, None, None]
        )
        picked = logp.gather(-1, tokens[:, None])
        loss = policy_loss(
            picked, kl[:, None], advantages.flatten(0, 1), alphas.repeat_interleave(k)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    grid = weight_grid(2)
    units = torch.ones(2) if how == "none" else std

    def at(alpha):
        rows = with_strengths(grid, torch.full((len(grid),), alpha))
        with torch.no_grad(), clp_kernels.steer(table, layer_weights(rows)):
            learned = torch.softmax(table(torch.ones(len(grid), 1)), -1)
        best = torch.softmax(ref + (1 - alpha) / alpha * grid @ (rewards / units[:, None]), -1)
        return learned, best

    return at, ref.exp()


def distances(p, q):
    """Total variation of distributions [N, V]."""
    return (p - q).abs().sum(-1) / 2


@pytest.mark.parametrize("alpha", [0.2, 0.4])
def test_trained_policy_reaches_the_closed_form_optimum_for_every_weight(alpha):
    """pi* ~ pi_ref exp(((1 - alpha) / alpha) w.R), within 0.05 total variation on the grid."""
    torch.manual_seed(1)
    at, ref = train_table(2 * torch.rand(2, 6), alpha, "none")
    learned, best = at(alpha)
    assert float(distances(learned, best).max()) <= 0.05
    # The test can fail: the reference itself is far from the optimum.
    assert float(distances(ref, best).max()) > 0.1


@pytest.mark.parametrize(
    "conditioning", [LoRA(RANGE), Experts("full", RANGE)], ids=["lora", "full"]
)
def test_one_policy_reaches_the_optimum_of_every_weight_at_five_strengths(conditioning):
    """pi* ~ pi_ref exp(w.R / beta), within 0.05 total variation, from end to end of the range.

    The test can fail: the optimum of one end is far from that of the other.
    """
    torch.manual_seed(1)
    at, _ = train_table(2 * torch.rand(2, 6), None, "none", conditioning)
    strengths = torch.logspace(math.log10(RANGE.low), math.log10(RANGE.high), 5).tolist()
    for alpha in strengths:
        assert float(distances(*at(alpha)).max()) <= 0.05
    assert float(distances(at(strengths[0])[1], at(strengths[-1])[1])[[0, -1]].min()) > 0.1


@pytest.mark.parametrize("alpha", [0.2, 0.3])
def test_the_optimum_in_units_of_the_reference_is_reached_whatever_the_scales(alpha):
    """Rewards of standard deviations near 1e4 and 1e-3, corners and all between. A scale that
    follows the policy ("batch") ends elsewhere, because KL counts too little where it is narrow:
    0.25 and 0.12 from the optimum, where "reference" is 0.02.
    """
    torch.manual_seed(1)
    rewards = torch.rand(2, 6) * torch.tensor([[3e4], [3e-3]])
    at, ref = train_table(rewards, alpha, "reference")
    learned, best = at(alpha)
    assert float(distances(learned, best).max()) <= 0.05
    assert float(distances(ref, best)[[0, -1]].min()) > 0.1
    follows, best = train_table(rewards, alpha, "batch")[0](alpha)
    assert float(distances(follows, best).max()) > 0.1


def test_scale_rewards_over_those_to_which_an_objective_applies():
    rewards = torch.tensor([[[1.0, NAN], [3.0, NAN]], [[NAN, NAN], [2.0, 7.0]]])
    batch = scale_rewards(rewards, "batch")
    std = math.sqrt(2 / 3)  # of 1, 3, 2
    torch.testing.assert_close(batch[..., 0], rewards[..., 0] / std, equal_nan=True)
    torch.testing.assert_close(batch[..., 1], rewards[..., 1], equal_nan=True)
    group = scale_rewards(rewards, "group")
    wanted = torch.tensor([[1.0, 3.0], [NAN, 2.0]])  # standard deviations 1, and of one value
    torch.testing.assert_close(group[..., 0], wanted, equal_nan=True)
    assert scale_rewards(rewards, "none") is rewards


def test_rloo_advantages_where_objectives_do_not_apply():
    """The definition, for every pattern of four completions and two objectives' first."""
    torch.manual_seed(3)
    patterns = torch.tensor(list(itertools.product([False, True], repeat=4)))
    rewards = torch.rand(16, 4, 2, dtype=torch.float64)
    rewards[..., 0][patterns] = NAN
    weights = torch.rand(16, 2, dtype=torch.float64)
    kl = torch.rand(16, 4, dtype=torch.float64)
    got = rloo_advantages(rewards, weights, kl[..., None], alpha=0.3)[..., 0]
    for g, k in itertools.product(range(16), range(4)):
        others = [j for j in range(4) if j != k]
        wanted = -0.3 * float(kl[g, k] - kl[g, others].mean())
        for i in range(2):
            known = [float(rewards[g, j, i]) for j in others if not rewards[g, j, i].isnan()]
            if known and not rewards[g, k, i].isnan():
                term = float(rewards[g, k, i]) - sum(known) / len(known)
                wanted += 0.7 * float(weights[g, i]) * term
        assert float(got[g, k]) == pytest.approx(wanted, abs=1e-12)


def test_the_expected_gradient_where_an_objective_does_not_apply():
    """P(applies) grad E[R | applies]: no pull to or from completions to which it does not."""
    torch.manual_seed(5)
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([0.3, 2.0, NAN], dtype=torch.float64)
    p = torch.softmax(theta, -1)
    known = p[:2] / p[:2].sum()
    (conditional,) = torch.autograd.grad((known * rewards[:2]).sum(), theta, retain_graph=True)
    logp = torch.log_softmax(theta, -1)
    # Over all groups of 3 draws; groups with a single one to which it applies have no baseline.
    draws = torch.tensor(list(itertools.product(range(3), repeat=3)))
    table = rewards[draws][..., None]
    one, none = torch.ones(27, 1, dtype=torch.float64), torch.zeros(27, 3, dtype=torch.float64)
    advantages = rloo_advantages(table, one, none[..., None], alpha=0.0)[..., 0]
    chance = p.detach()[draws].prod(1, keepdim=True) / 3
    (got,) = torch.autograd.grad((chance * advantages * logp[draws]).sum(), theta)
    rate = p[:2].sum().item()
    with_a_baseline = rate * (1 - (1 - rate) ** 2)
    torch.testing.assert_close(got, with_a_baseline * conditional)
    assert got[2].abs().item() < 1e-12
