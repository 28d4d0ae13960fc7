"""What the sampler asks of a policy."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clp.data.condition import Condition, parse_condition
from clp.data.kl_range import KLRange
from clp.data.weights import WeightSpec
from clp.policies.loading import context_length, drawable_ids, end_ids, vocab_size

if TYPE_CHECKING:  # both import this file
    from clp.policies.policy import Policy
    from clp.policies.token_stats import Batch


class Network(NamedTuple):
    """A model that runs for every token, and the context that sets its `layer_weights` [B, n]."""

    model: Any
    steer: Any  # layer_weights -> context manager


class Conditioning(Protocol):
    """How the condition of an example changes a policy; the object has no state of the policy.

    A condition is a row of numbers: the m weights, and behind them the KL strength alpha if the
    policy is trained on a range of them.

    Attributes:
        name: That of CLPConfig.conditioning and clp.json.
        kl_range: That range, or None.
    """

    name: str
    kl_range: KLRange | None = None

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What is trained, by name."""

    def save(
        self, model: nn.Module, objectives: Sequence[str], directory: Path, base_model: str
    ) -> dict[str, str]:
        """Writes what is trained; each file or folder is replaced by a rename.

        Returns: the digests by name, as `load` wants them.
        """

    def load(
        self, model: nn.Module, objectives: Sequence[str], directory: Path, digests: dict[str, Any]
    ) -> None:
        """Puts what `save` wrote into the base model. Raises: ValueError if it does not fit."""

    def export(
        self,
        model: Any,
        objectives: Sequence[str],
        condition: Tensor,
        folder: Path,
        base_model: str,
        tokenizer: Any,
        ends: Collection[int],
    ) -> str:
        """Writes what others can load for a fixed condition [c], and returns what that is.

        A whole model says that the ids `ends` end a completion; an adapter cannot.
        """

    def layer_weights(self, condition: Tensor) -> Tensor:
        """The weights that the layers take [..., n] for conditions [..., c]."""

    def prefix(self, condition: Tensor, objectives: Sequence[str], tokenizer: Any) -> list[int]:
        """The ids that say the condition [c] at the beginning of a prompt, after its BOS token."""
        return []

    def longest_prefix(self, objectives: Sequence[str], tokenizer: Any) -> int:
        """Ids that `prefix` has at most, for weights from 0 to 1 and strengths of the range."""
        return 0


class Steerable(Protocol):
    """What the sampler asks of a policy: clp.Policy, or clp.LogitMixture over several models.

    A subclass has `tokenizer`, `objectives` and `networks`. The rest is derived from them, for one
    network whose weights change its keys and values.
    """

    tokenizer: Any
    objectives: tuple[str, ...]
    kl_range: KLRange | None = None
    # How the logits of several networks are mixed: a mode of clp_kernels.sample, or "power" with
    # an exponent (clp.policies.power_mean).
    mode: str = "geometric"
    exponent: float | None = None

    @property
    def networks(self) -> Sequence[Network]:
        """The models whose logits make the next token."""

    @property
    def reference(self) -> "Policy":
        """The policy that is the base model at weights of zero.

        Raises: ValueError if the policy has no base model.
        """
        raise ValueError(f"{type(self).__name__} has no base model to measure KL to")

    def token_kl(self, batch: "Batch", temperature: float) -> Tensor:
        """Exact KL to the base model at every sampled token, without gradients.

        Args:
            batch: N sequences with up to C sampled tokens.
            temperature: Of both distributions.

        Returns: [N, C], float32, nats; zero where there is no token.

        Raises: ValueError as `reference`.
        """
        raise ValueError(f"{type(self).__name__} has no base model to measure KL to")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return torch.device(self.networks[0].model.device)

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a completion: those of every model."""
        return frozenset().union(*(end_ids(n.model, self.tokenizer) for n in self.networks))

    @property
    def context_length(self) -> int:
        """Prompt and completion tokens that fit every model."""
        return min(context_length(network.model) for network in self.networks)

    @property
    def vocab_size(self) -> int:
        """Rows of the smallest embedding: token ids are below it."""
        return min(vocab_size(network.model) for network in self.networks)

    @property
    def drawable_ids(self) -> slice | Tensor:
        """Index of the token ids that are drawn: the tokenizer and every model have them."""
        ids = drawable_ids(self.tokenizer, self.vocab_size)
        return ids if isinstance(ids, slice) else ids.to(self.device)

    def condition(self, spec: WeightSpec | Condition, *, simplex: bool = True) -> Tensor:
        """The row [c] of a condition: its m weights, then alpha if there is a kl_range (c = m + 1).

        Raises: ValueError as clp.data.condition.parse_condition.
        """
        return parse_condition(spec, self.objectives, self.kl_range, simplex=simplex)

    def layer_weights(self, condition: Tensor) -> Tensor:
        """Conditions [..., c] as `Network.steer` takes them [..., n]."""
        return condition

    def conditioned_prompt(self, prompt_ids: list[int], condition: Tensor) -> list[int]:
        """The prompt as the networks get it for the condition [c]."""
        return prompt_ids

    def logit_weights(self, weights: Tensor) -> Tensor | None:
        """Layer weights [B, n] -> weights of the networks' logits; None for a single network."""
        return None

    def cache_key(self, condition: Tensor) -> bytes:
        """Equal for conditions [c] that give equal keys and values for equal tokens.

        Here the bytes of their layer weights, where -0.0 counts as 0.0.
        """
        return bytes((self.layer_weights(condition) + 0.0).numpy().tobytes())
