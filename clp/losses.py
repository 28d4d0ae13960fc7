"""The policy-gradient objective as pure tensor functions; shapes [G, K] = groups, generations.

The objective of CLP (arXiv:2407.15762), for each prompt group with its weight row w:

    J = E_{y ~ pi_w} [ (1 - alpha) w.R(y) ] - alpha KL(pi_w || pi_ref)

whose optimum is pi* ~ pi_ref exp( ((1 - alpha) / alpha) w.R ). KL is that of the whole completion,
as the sum over tokens of the exact KL between the next-token distributions, which is the
Rao-Blackwellised estimate of the sequence KL: lower variance than sampled log-ratios.
"""

import torch
from torch import Tensor


def scale_rewards(rewards: Tensor, how: str) -> Tensor:
    """Divides each objective of rewards [G, K, m] by its standard deviation ("batch", "group").

    Normalising before weighting (GDPO) keeps one objective's units from drowning another's. A
    standard deviation below 1e-4 leaves nothing to learn from: it divides by 1, not by noise.
    """
    if how == "none":
        return rewards
    axes = (0, 1) if how == "batch" else (1,)
    std = rewards.std(dim=axes, keepdim=True, correction=0)
    return rewards / torch.where(std < 1e-4, 1.0, std)


def rloo_advantages(rewards: Tensor, weights: Tensor, kl: Tensor, alpha: float) -> Tensor:
    """Leave-one-out advantages [G, K] of the return (1 - alpha) w.R - alpha KL.

        A_k = return_k - mean of the other K - 1 returns of the group

    Args:
        rewards: [G, K, m]. weights: [G, m]. kl: [G, K], nats a completion, detached.

    All completions of a group share prompt and weights, so the baseline is conditioned on both and
    the estimate is unbiased. Source: RLOO (Ahmadian et al., arXiv:2402.14740).
    """
    returns = (1 - alpha) * torch.einsum("gkm,gm->gk", rewards, weights) - alpha * kl
    k = returns.shape[1]
    return (returns - returns.mean(1, keepdim=True)) * (k / (k - 1))


def policy_loss(logprobs: Tensor, kl: Tensor, advantages: Tensor, alpha: float) -> Tensor:
    """The loss whose gradient is that of -J: mean of -A sum_t log pi(y_t) + alpha KL.

    Args:
        logprobs, kl: [N], summed over the tokens of each completion, differentiable.
        advantages: [N], constants.

    The exact gradient of E[sum_t KL_t] has two parts: KL_t's own gradient (the second term) and
    the score function times KL (in the advantages).
    """
    return (alpha * kl - advantages * logprobs).mean()
