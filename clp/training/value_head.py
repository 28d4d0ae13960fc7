"""The learned baseline: the expected rewards and KL after the tokens so far, for the conditions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Chosen on the demo (docs/log.md, 2026-11-30).
WIDTH = 128
LEARNING_RATE = 3e-3
FIT_UPDATES = 8


class Experience(NamedTuple):
    """What a value head learns from the T tokens of some completions.

    Attributes:
        hidden: [T, d], the policy's last hidden states before each token.
        conditions: [T, c], what the policy was conditioned on.
        targets: [T, m + 1], rewards (NaN: the objective does not apply) and the return's KL.
        returns, advantages: [T], the return of each token, and what the baseline left of it.
    """

    hidden: Tensor
    conditions: Tensor
    targets: Tensor
    returns: Tensor
    advantages: Tensor


class ValueHead(nn.Module):
    """V(s; c) [T, m + 1]: the expected reward of each objective, and the expected KL.

        V(s; c) = W_2 tanh(W_1 [normalised h; c] + b_1) + b_2

    where h is the policy's last hidden state, without gradients, and c are the conditions (the
    weights). W_2 and b_2 start as 0. All of it is float32.

    One output per reward, and not the weighted sum, because the sum is known: the returns of all
    weights teach the same outputs, and an objective that does not apply is left out of the rest.

    Args:
        hidden_size: d. conditions: c. objectives: m.
        seed: That of W_1.

    Attributes:
        optimizer: AdamW over its parameters alone, at LEARNING_RATE in all steps.
    """

    def __init__(self, hidden_size: int, conditions: int, objectives: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = hidden_size + conditions
        first = torch.empty(WIDTH, size, dtype=torch.float32)
        self.weight_1 = nn.Parameter(first.normal_(0, size**-0.5, generator=generator))
        self.bias_1 = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float32))
        self.weight_2 = nn.Parameter(torch.zeros(objectives + 1, WIDTH, dtype=torch.float32))
        self.bias_2 = nn.Parameter(torch.zeros(objectives + 1, dtype=torch.float32))
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def forward(self, hidden: Tensor, conditions: Tensor) -> Tensor:
        """hidden [T, d] of any dtype, conditions [T, c] -> values [T, m + 1]."""
        hidden = F.layer_norm(hidden.float(), hidden.shape[-1:])
        inputs = torch.cat([hidden, conditions.float()], -1)
        inner = F.linear(inputs, self.weight_1, self.bias_1).tanh()
        return F.linear(inner, self.weight_2, self.bias_2)

    def fit(self, parts: Sequence[Experience], max_grad_norm: float) -> tuple[float, bool]:
        """FIT_UPDATES updates that lower the squared error to the targets, mean over the tokens.

        Gradients are clipped to max_grad_norm, apart from the policy's. From the first one on that
        is not finite, nothing changes any more.

        Returns: the share of the variance of the returns that the values before explained, which is
            not finite if the returns are all the same; and whether all gradients were finite.
        """
        seen = Experience(*(torch.cat(column) for column in zip(*parts, strict=True)))
        known = ~seen.targets.isnan()
        targets = seen.targets.nan_to_num(nan=0.0)
        left = seen.advantages.var(correction=0) / seen.returns.var(correction=0)
        explained = 1 - float(left)
        for _ in range(FIT_UPDATES):
            self.optimizer.zero_grad(set_to_none=True)
            error = (self(seen.hidden, seen.conditions) - targets) * known
            loss = error.square().sum(1).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(self.parameters(), max_grad_norm)
            if not bool(norm.isfinite()):
                return explained, False
            self.optimizer.step()
        return explained, True
