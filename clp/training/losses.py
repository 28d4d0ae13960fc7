"""The policy-gradient objective as pure tensor functions; shapes [G, K] = groups, generations.

The objective of CLP (arXiv:2407.15762), for each prompt group with its weights w:

    J = E_{y ~ pi_w} [ (1 - alpha) w.R(y) ] - alpha KL(pi_w || pi_ref)

whose optimum is pi* ~ pi_ref exp( ((1 - alpha) / alpha) w.R ), where each R_i is in units of its
standard deviation under pi_ref (scale_rewards="reference"). KL is that of the whole completion. Its
gradient is estimated in one of three ways, all unbiased (CLPConfig.kl_gradient):

    "exact"     KL = sum_t KL_t, the exact KL between the next-token distributions: the
                Rao-Blackwellised estimate. KL_t is in the loss, for its own gradient, and in the
                return, for that of the states in which it is taken. Least variance.
    "tokens"    the log-ratios l_t = log pi(y_t) - log pi_ref(y_t), in the return alone: token t's
                return has sum_{s >= t} l_s, since earlier ones do not depend on it.
    "sequence"  sum_t l_t in the return of every token.

The baseline of a return is the mean of the group's other completions (rloo_advantages) or a learned
value (value_advantages). Further updates with the same completions clip the ratio of the new to the
old probabilities (clipped_loss), and are not unbiased.

If objective i does not apply to completion k (its reward is NaN), w_i counts as 0 for k: the
objective adds nothing to the completion's return, its advantage or the means and standard
deviations of the others. So the policy is drawn neither to nor from completions to which an
objective does not apply: the expected gradient of its part is that of E[R_i | i applies], times the
probability that it applies to a completion and to another one of the group. With a learned value
this holds as far as V_i is the mean of R_i where i applies; until then the part is pulled by its
error.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def scale_rewards(rewards: Tensor, how: str, reference: Tensor | None = None) -> Tensor:
    """Divides each objective of rewards [G, K, m] by a standard deviation, or by nothing ("none").

    Normalising before weighting (GDPO) keeps one objective's units from hiding another's.

    "reference": by `reference` [m], the standard deviations under pi_ref. They are constants, so J
    above is what is maximised, with R in these units.

    "batch", "group": by that of the given rewards to which the objective applies (not NaN). It
    follows the policy, and what is maximised is not J. One below 1e-4, or of none, leaves nothing
    to learn from: it divides by 1, not by noise.
    """
    if how == "none":
        return rewards
    if how == "reference":
        assert reference is not None
        return rewards / reference
    axes = (0, 1) if how == "batch" else (1,)
    mean = rewards.nanmean(dim=axes, keepdim=True)
    std = (rewards - mean).square().nanmean(dim=axes, keepdim=True).sqrt()
    return rewards / torch.where(std >= 1e-4, std, 1.0)


def rloo_advantages(rewards: Tensor, weights: Tensor, kl: Tensor, alpha: Tensor | float) -> Tensor:
    """Leave-one-out advantages [G, K, C or 1] of the return (1 - alpha) w.R - alpha KL.

        A_k = (1 - alpha) sum_i w_i (R_ik - mean_j R_ij) - alpha (KL_k - mean_j KL_j)

    where the means are over the other completions j of the group, those of R_i over the ones to
    which objective i applies (R_ij is not NaN). The term of i is 0 where i does not apply to k, or
    to no other completion.

    Args:
        rewards: [G, K, m], NaN if an objective does not apply. weights: [G, m].
        kl: [G, K, C or 1], nats per completion, or of each token's return; detached.
        alpha: KL strength, one for all or [G, 1, 1].

    All completions of a group share prompt and weights, so the baseline is conditioned on both and
    the estimate is unbiased. Source: RLOO (Ahmadian et al., arXiv:2402.14740).
    """
    applies = ~rewards.isnan()
    count = applies.sum(1, keepdim=True).to(rewards.dtype)
    # x - mean of the others = (x - mean of all) n / (n - 1)
    centred = (rewards - rewards.nanmean(1, keepdim=True)) * (count / (count - 1))
    centred = torch.where(applies & (count > 1), centred, 0.0)
    k = kl.shape[1]
    centred_kl = (kl - kl.mean(1, keepdim=True)) * (k / (k - 1))
    gain = torch.einsum("gkm,gm->gk", centred, weights)[..., None]
    return (1 - alpha) * gain - alpha * centred_kl


def value_advantages(
    rewards: Tensor, weights: Tensor, kl: Tensor, values: Tensor, alpha: float | Tensor
) -> Tensor:
    """Advantages [G, K, C] of the return (1 - alpha) w.R - alpha KL over a learned baseline.

        A_kt = (1 - alpha) sum_i w_i (R_ik - V_i(s_kt)) - alpha (KL_kt - V_KL(s_kt))

    The term of i is 0 where i does not apply to k (R_ik is NaN).

    Args:
        rewards: [G, K, m], NaN if an objective does not apply. weights: [G, m].
        kl: [G, K, C or 1], nats, as kl_returns gives it.
        values: [G, K, C, m + 1], those of the m rewards and of kl, made before the token was drawn.
        alpha: A number, or [G, 1, 1].

    The baseline depends on the prompt, the tokens before y_t, w and alpha alone, so that any V
    leaves the mean of the gradient as it is, if every objective applies. Source: REINFORCE with
    baseline (Williams, 1992), as CLP uses it (arXiv:2407.15762).
    """
    applies = ~rewards.isnan()[:, :, None]
    centred = torch.where(applies, rewards[:, :, None] - values[..., :-1], 0.0)
    gain = torch.einsum("gkcm,gm->gkc", centred, weights)
    return (1 - alpha) * gain - alpha * (kl - values[..., -1])


def kl_returns(how: str, kl: Tensor, log_ratios: Tensor) -> Tensor:
    """What the return of each token has of KL, [N, C] or [N, 1], for kl and log_ratios [N, C]."""
    if how == "tokens":
        return log_ratios.flip(1).cumsum(1).flip(1)
    return (kl if how == "exact" else log_ratios).sum(1, keepdim=True)


def policy_loss(
    logprobs: Tensor, kl: Tensor | None, advantages: Tensor, alpha: Tensor | float
) -> Tensor:
    """The loss whose gradient is that of -J.

    The mean over completions of sum_t -A_t log pi(y_t), plus alpha KL if that is differentiated
    directly ("exact").

    Args:
        logprobs, kl: [N, C], zero where there is no token, differentiable; None: no such term.
        advantages: [N, C or 1], constants.
        alpha: KL strength, one for all or [N].

    The exact gradient of E[sum_t KL_t] has two parts: KL_t's own gradient (the second term) and
    the score function times KL (in the advantages).
    """
    loss = -(advantages * logprobs).sum(1).mean()
    return loss if kl is None else loss + (alpha * kl.sum(1)).mean()


class Clipped(NamedTuple):
    """A loss, and which tokens [N, C] its clipping holds back: `low` below, `high` above."""

    loss: Tensor
    low: Tensor
    high: Tensor


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    kl: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    alpha: float | Tensor,
    epsilon: float,
) -> Clipped:
    """The loss for completions that an earlier policy has drawn, with clipped ratios.

        r_t = pi(y_t) / pi_old(y_t)
        -sum_t min(r_t A_t, clip(r_t, 1 - epsilon, 1 + epsilon) A_t)

    The mean over completions, plus alpha KL as in policy_loss. At r = 1 its gradient is that of
    policy_loss. A token without gradient is one whose ratio has left the interval in the direction
    in which its advantage pushes it.

    Args:
        logprobs, kl: [N, C], differentiable; kl None: no such term. old_logprobs: [N, C].
        advantages: [N, C or 1], constants. mask: [N, C], True where there is a token.
        alpha: KL strength, one for all or [N].

    Source: PPO (Schulman et al., arXiv:1707.06347), equation 7, with a ratio per token.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    gain = torch.where(mask, torch.minimum(ratio * advantages, clipped * advantages), 0.0)
    loss = -gain.sum(1).mean()
    if kl is not None:
        loss = loss + (alpha * kl.sum(1)).mean()
    low = mask & (ratio < 1 - epsilon) & (advantages < 0)
    high = mask & (ratio > 1 + epsilon) & (advantages > 0)
    return Clipped(loss, low, high)
