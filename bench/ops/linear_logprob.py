"""The subject `linear_logprob`: log-probabilities from hidden states, and their gradient.

Forward and backward with a frozen head, upstream gradients different for each token. A mixed head
has a matrix for each expert and weights for each of eight examples, of equal length; its baseline
is the same sum of scaled logits, materialised.

Providers.
    torch                    materialised logits, log_softmax, gather
    torch_cross_entropy      materialised logits, F.cross_entropy(reduction="none")
    torch_linear             F.linear_cross_entropy(reduction="none"), PyTorch's own fused form
    torch_compile            the first under torch.compile (optional)
    liger, cut_cross_entropy other projects' kernels, on a GPU where they are installed
                             (bench/peers.py)
    reference, cpu, triton   ours, those of clp_kernels.registry that can run the case

Error gate: log-probabilities and the gradient within the project's budget (clp_kernels.testing) of
float64, on evenly spaced tokens where there are many. Peak memory is what a call takes beyond its
inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import clp_kernels
from bench import peers
from bench.timing import Protocol, Provider, Roofs
from clp_kernels import registry
from clp_kernels.ops.linear_logprob import head
from clp_kernels.testing import assert_within_budget

OP = "linear_logprob"
PROTOCOL = Protocol(warmup=1, least=5, seconds=5.0)  # calls of a second
QUICK_PROTOCOL = Protocol(warmup=1, least=3, seconds=0.2)
JUDGED = 256  # tokens
EXAMPLES = 8  # with a mixed head
Outputs = tuple[Tensor, Tensor]  # logprobs [T], d hidden [T, d]
Form = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one call: T tokens of d features, a head of V; experts 0: it is not mixed."""

    tokens: int
    vocab_size: int
    features: int
    dtype: str
    experts: int = 0

    def fields(self) -> dict[str, object]:
        """The case as it stands in a row."""
        sizes = {"T": self.tokens, "V": self.vocab_size, "d": self.features}
        mode = f"forward+backward, frozen {'mixed ' * bool(self.experts)}head"
        if self.experts:
            sizes |= {"m": self.experts, "B": EXAMPLES}
        return {"mode": mode, **sizes, "dtype": self.dtype}

    def floors(self, roofs: Roofs) -> dict[str, float]:
        """Microseconds of two products, 4 T V d flops, and of reading the head and hidden once.

        For each expert of a mixed head.
        """
        rows = max(1, self.experts) * self.vocab_size
        flops = 4 * self.tokens * rows * self.features
        elements = (rows + 3 * self.tokens) * self.features
        size = getattr(torch, self.dtype).itemsize
        return {
            "floor": flops / roofs.flops[self.dtype] * 1e6,
            "floor_bytes": elements * size / roofs.bandwidth * 1e6,
        }


def cases(device: str, quick: bool = False) -> list[Case]:
    """The ladder of the device."""
    if device == "cuda":
        sizes = [(4096, 128_256, 4096)] if quick else [(2048, 32_000, 512), (8192, 151_936, 4096)]
        found = [Case(*size, "bfloat16") for size in sizes]
        return found if quick else [*found, Case(2048, 32_000, 512, "bfloat16", experts=4)]
    sizes = [(2048, 32_000, 512)]
    if not quick:
        sizes = [(256, 32_000, 512), *sizes, (2048, 512, 64), (512, 151_936, 1024)]
    found = [Case(*size, "float32") for size in sizes]
    return [*found, Case(512, 32_000, 512, "float32", experts=4)]


@dataclass(frozen=True)
class Inputs:
    """hidden [T, d], head [V, d], targets int64 [T], upstream float32 [T].

    With a mixed head [m, V, d]: weights float32 [B, m].
    """

    hidden: Tensor
    head: Tensor
    targets: Tensor
    upstream: Tensor
    weights: Tensor | None = None

    @property
    def example_ids(self) -> Tensor:
        """The example of each token, int64 [T]."""
        count = len(self.hidden)
        return torch.arange(count, device=self.hidden.device) // (count // EXAMPLES)


def inputs(case: Case, device: torch.device) -> Inputs:
    """Logits of spread 2, the same in every run."""
    g = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    experts = (case.experts,) if case.experts else ()
    head = 2 * normal(*experts, case.vocab_size, case.features) * case.features**-0.5
    targets = torch.randint(case.vocab_size, (case.tokens,), generator=g, device=device)
    hidden, upstream = normal(case.tokens, case.features), normal(case.tokens)
    weights = normal(EXAMPLES, case.experts).softmax(-1) if case.experts else None
    return Inputs(hidden.to(dtype), head.to(dtype), targets, upstream, weights)


def materialised(
    token_weights: Tensor | None, head: Tensor, targets: Tensor, hidden: Tensor
) -> Tensor:
    """The plain form, of a mixed head with token_weights; in 16 bits its logits are rounded."""
    if token_weights is None:
        logits = F.linear(hidden, head)
    else:
        columns = token_weights.to(hidden.dtype).t()[..., None]
        first, *others = (w * F.linear(hidden, part) for w, part in zip(columns, head, strict=True))
        logits = sum(others, first)
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None])[:, 0]


def cross_entropy(head: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
    """The same by PyTorch's loss."""
    return -F.cross_entropy(F.linear(hidden, head), targets, reduction="none")


def linear_cross_entropy(head: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
    """The same by PyTorch's fused loss."""
    loss: Tensor = F.linear_cross_entropy(hidden, head, targets, reduction="none")
    return -loss


def _train(data: Inputs, form: Form) -> Outputs:
    hidden = data.hidden.detach().requires_grad_()
    logprobs = form(hidden)
    return logprobs, torch.autograd.grad(logprobs, hidden, data.upstream.to(logprobs.dtype))[0]


def providers(data: Inputs, *, compiled: bool = False) -> list[Provider]:
    """Everything that can run these inputs on their device."""
    ids = None if data.weights is None else data.example_ids
    plain: dict[str, Callable[..., Tensor]] = {
        "torch": partial(materialised, None if data.weights is None else data.weights[ids])
    }
    if data.weights is None:
        plain |= {"torch_cross_entropy": cross_entropy, "torch_linear": linear_cross_entropy}
        plain |= peers.heads(data.hidden.device)
    if compiled:
        torch.compiler.reset()
        plain["torch_compile"] = torch.compile(plain["torch"], dynamic=False)
    gate = _gate(data)
    found = [
        Provider(name, partial(_train, data, partial(form, data.head, data.targets)), gate)
        for name, form in plain.items()
    ]
    states = (data.hidden, data.head, data.targets, None, data.weights, ids, data.upstream, None)
    call = head.Inputs(*states, invariant=False), False, True
    for entry in registry.BACKENDS[OP]:
        if entry.why_not(*call) is None:

            def ours(hidden: Tensor, backend: str = entry.name) -> Tensor:
                states, targets = hidden, data.targets
                if data.weights is not None:
                    states, targets = (t.unflatten(0, (EXAMPLES, -1)) for t in (states, targets))
                return clp_kernels.linear_logprob(
                    states, data.head, targets, weights=data.weights, backend=backend
                ).logprobs.flatten()

            found.append(Provider(entry.name, partial(_train, data, ours), gate))
    return found


def _gate(data: Inputs) -> Callable[[Outputs], float]:
    every = slice(None, None, max(1, len(data.hidden) // JUDGED))

    def form(dtype: torch.dtype) -> Outputs:
        head, targets = data.head.to(dtype), data.targets[every]
        some = Inputs(data.hidden[every].to(dtype), head, targets, data.upstream[every])
        weights = None if data.weights is None else data.weights[data.example_ids[every]]
        return _train(some, partial(materialised, weights, head, targets))

    wide, same = form(torch.float64), form(data.hidden.dtype)

    def judge(got: Outputs) -> float:
        assert all(bool(t.isfinite().all()) for t in got)
        names = ("logprobs", "d_hidden")
        trios = zip(names, got, wide, same, strict=True)
        return max(assert_within_budget(g[every], w, s, name=n) for n, g, w, s in trios)

    return judge
