"""The error gate of `bench sampler`: greedy tokens against a plain model with merged adapters."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.engine.workload import Batch, Served, Weights
from clp.policies.policy import Policy
from clp_kernels.nn.mixed_lora import is_transposed, steered_layers

JUDGED = 4  # requests of a batch
STRIDE = 21  # between them, so that they have different weights of 4, 16 and 64
TIE = 1e-4  # logits closer than this are equal in float32


class Judge:
    """Says whether greedy tokens are those of the base with its adapters merged by the weights w.

        W' = W + sum_i w_i * scaling_i * B_i A_i

    computed here from the adapters' parameters, in float64. Each token is judged after the
    request's own earlier ones: its float64 logit may be below the largest by TIE at most, in a
    16-bit model by twice the largest error of the logits that W' gives in the model's own dtype.

    Args:
        policy: Whose adapters.
        model: Its base model, a separate module.
    """

    def __init__(self, policy: Policy, model: Any) -> None:
        self._layers, self._base = steered_layers(policy.model), model
        self._wide = copy.deepcopy(model).double()
        narrow = model.dtype not in (torch.float32, torch.float64)
        self._same = copy.deepcopy(model) if narrow else None

    def share(self, batch: Batch, served: Served, *, weighted: bool) -> float:
        """The largest share of the bound that a judged token uses; `weighted` False: the bare base.

        Raises: AssertionError naming the request and token that is not the best.
        """
        count = len(batch.prompts)
        worst = 0.0
        for i in dict.fromkeys(k * STRIDE % count for k in range(min(JUDGED, count))):
            weights = batch.weights[i] if weighted else None
            worst = max(worst, self._share(batch.prompts[i], served.tokens[i], weights, i))
        return worst

    def _share(
        self, prompt: list[int], tokens: list[int], weights: Weights | None, request: int
    ) -> float:
        ids = torch.tensor([prompt + tokens[:-1]], device=self._base.device)
        wide = self._logits(self._wide, ids, weights)[len(prompt) - 1 :]
        bound = TIE
        if self._same is not None:
            same = self._logits(self._same, ids, weights)[len(prompt) - 1 :]
            bound = 2 * float((same - wide).abs().max())
        picked = wide.gather(-1, torch.tensor(tokens, device=ids.device)[:, None])[:, 0]
        gaps = wide.max(-1).values - picked
        at = int(gaps.argmax())
        gap = float(gaps[at])
        assert gap <= bound, (
            f"request {request}, greedy token {at}: {tokens[at]} has a logit {gap:.3g} below that "
            f"of {int(wide[at].argmax())}, allowed {bound:.3g}"
        )
        return gap / bound

    @torch.no_grad()
    def _logits(self, model: Any, ids: Tensor, weights: Weights | None) -> Tensor:
        with self._merged(model, weights):
            return model(input_ids=ids, use_cache=False).logits[0].double()  # type: ignore[no-any-return]

    @contextmanager
    def _merged(self, model: Any, weights: Weights | None) -> Iterator[None]:
        """Context in which the adapters are merged into a copy of the base."""
        for name, layer in self._layers.items() if weights is not None else ():
            weight = model.get_submodule(name).weight
            shares = torch.tensor(weights, dtype=torch.float64, device=weight.device)
            shares = shares * layer.scaling.double()
            factors = layer.lora_B.double(), layer.lora_A.double()
            change = torch.einsum("m,mor,mri->oi", shares, *factors)
            if is_transposed(layer.base_layer):
                change = change.t()
            weight.copy_(weight.double() + change)
        try:
            yield
        finally:
            for name in self._layers if weights is not None else ():
                model.get_submodule(name).weight.copy_(self._base.get_submodule(name).weight)
