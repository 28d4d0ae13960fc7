"""The subject `sample`: mix m policies, filter by top-p, draw a token, its log-probability.

Providers. Temperature is 1 for all, which spares the baselines a division.
    torch              mix, softmax, argmax(probs / exponential noise) (Gumbel-max), gather
    torch_cdf          mix, softmax, cumulative sum, binary search for one uniform, gather
    torch_multinomial  mix, softmax, torch.multinomial, gather
    torch_compile      the first under torch.compile (optional: it compiles again for each case)
    torch_sort         with top-p: mix, log-softmax, sort, cumulative sum, torch.multinomial, gather
    torch_transformers with top-p: mix, its TopPLogitsWarper, softmax, torch.multinomial, gather
    flashinfer, vllm   other projects' samplers, on a GPU where they are installed (bench/peers.py)
    reference          clp_kernels.ops.sample.reference, the definition
    cpu, cuda          the compiled kernels through clp_kernels.sample, argument checks included

Error gate: log-probabilities within the project's budget (clp_kernels.testing); and of ours, the
very tokens that the reference draws. Baselines draw by their own noise, one stream for the batch;
with top-p every token they draw must be one that the definition keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

import clp_kernels
from bench import peers
from bench.timing import Provider, Roofs
from clp_kernels import native
from clp_kernels.ops.sample import reference
from clp_kernels.testing import assert_within_budget, weight_rows

OP = "sample"
# Below this many logits one batched product is the faster mix, above it a sum term by term
# (measured with one thread, m 4: at V 512 6 against 18 us, at V 151,936 and B 8 in bfloat16 1.6
# against 1.0 ms, where torch.einsum needs 11 ms).
SMALL = 2**18
Draw = tuple[Tensor, Tensor]  # tokens int64 [B], logprobs float32 [B]


@dataclass(frozen=True)
class Case:
    """Sizes of one draw."""

    vocab_size: int
    m: int
    batch: int
    dtype: str
    top_p: float = 1.0
    mode: str = "geometric"

    def fields(self) -> dict[str, object]:
        """The case as it stands in a row."""
        # What is usual is left out, so that rows of before keep their case.
        rest: dict[str, object] = {"top_p": self.top_p} if self.top_p < 1 else {}
        if self.mode != "geometric":
            rest["mode"] = self.mode
        return {"V": self.vocab_size, "m": self.m, "B": self.batch, "dtype": self.dtype, **rest}

    def floor_bytes(self) -> int:
        """The logits, read once."""
        return self.m * self.batch * self.vocab_size * getattr(torch, self.dtype).itemsize

    def floors(self, roofs: Roofs) -> dict[str, float]:
        """Microseconds that the bytes take: nothing is multiplied."""
        return {"floor": self.floor_bytes() / roofs.bandwidth * 1e6}


def cases(quick: bool = False) -> list[Case]:
    """The ladder, or with `quick` the mixtures over a large vocabulary alone."""
    sizes = (32_000, 151_936) if quick else (512, 32_000, 151_936)
    counts, batches = ((4,), (1, 32)) if quick else ((1, 2, 4), (1, 8, 32))
    plain = [Case(*c) for c in product(sizes, counts, batches, ("float32", "bfloat16"))]
    filtered = product((32_000, 151_936), counts, batches, ("float32",), (0.9,))
    mixtures = product((32_000, 151_936), (4,), batches, ("float32",), (1.0, 0.9), ("probability",))
    return plain + [Case(*c) for c in (*filtered, *(() if quick else mixtures))]


@dataclass(frozen=True)
class Inputs:
    """logits [m, B, V] and weights [B, m]; for m = 1 logits [B, V] and None. seed, position [B]."""

    logits: Tensor
    weights: Tensor | None
    seed: Tensor
    position: Tensor
    top_p: float
    mode: str


def inputs(case: Case, device: torch.device) -> Inputs:
    """Normal logits of spread 3 and random weights of the simplex, the same in every run."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(case.m, case.batch, case.vocab_size, generator=g)
    logits = logits.to(device, getattr(torch, case.dtype))
    weights = weight_rows("all_different", case.batch, case.m, generator=g, device=device)
    seed = torch.randint(2**62, (case.batch,), generator=g).to(device)
    position = torch.randint(2**16, (case.batch,), generator=g).to(device)
    mixed = case.m > 1
    stacked, rows = (logits, weights) if mixed else (logits[0], None)
    return Inputs(stacked, rows, seed, position, case.top_p, case.mode)


def mix(data: Inputs) -> Tensor:
    """z [B, V] in float32: the fastest plain form for the size; of probabilities normalised."""
    logits, weights = data.logits, data.weights
    if data.mode == "probability":
        return probabilities(data).log()
    if weights is None:
        return logits.float()
    if logits.numel() <= SMALL:
        return torch.bmm(weights[:, None], logits.float().transpose(0, 1))[:, 0]
    z = logits[0] * weights[:, 0, None]
    for i in range(1, len(logits)):
        z.addcmul_(logits[i], weights[:, i, None])
    return z


def probabilities(data: Inputs) -> Tensor:
    """softmax(z) [B, V], without a way over z where probabilities are mixed."""
    if data.mode == "geometric":
        return torch.softmax(mix(data), dim=-1)
    assert data.weights is not None
    each = torch.softmax(data.logits.float(), dim=-1)
    return torch.bmm(data.weights[:, None], each.transpose(0, 1))[:, 0]


def log_probabilities(data: Inputs) -> Tensor:
    """log_softmax(z) [B, V]."""
    z = mix(data)
    return torch.log_softmax(z, dim=-1) if data.mode == "geometric" else z


def torch_gumbel(data: Inputs) -> Draw:
    """Gumbel-max with the logarithms cancelled: argmax p / e, e exponential (as in gpt-fast)."""
    probs = probabilities(data)
    noise = torch.empty_like(probs).exponential_(1)
    return _picked(probs, torch.div(probs, noise, out=noise).argmax(-1, keepdim=True))


def torch_cdf(data: Inputs) -> Draw:
    """One uniform per example instead of one per token, which is what counts on a CPU."""
    probs = probabilities(data)
    cdf = probs.cumsum(-1)
    u = torch.rand(len(cdf), 1, device=cdf.device) * cdf[:, -1:]
    return _picked(probs, torch.searchsorted(cdf, u, right=True).clamp_(max=cdf.shape[1] - 1))


def torch_multinomial(data: Inputs) -> Draw:
    """What most samplers call."""
    probs = probabilities(data)
    return _picked(probs, torch.multinomial(probs, 1))


def _picked(probs: Tensor, tokens: Tensor) -> Draw:
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


def torch_sort(data: Inputs) -> Draw:
    """Top-p as most samplers write it; the log-probability is that before the filter."""
    ordered, ids = log_probabilities(data).sort(dim=-1, descending=True)
    probs = ordered.exp()
    probs[probs.cumsum(-1) - probs >= data.top_p] = 0
    places = torch.multinomial(probs, 1)
    return ids.gather(-1, places)[:, 0], ordered.gather(-1, places)[:, 0]


def transformers_warper(data: Inputs) -> Draw:
    """What `generate` does in a step; it, too, draws by torch.multinomial."""
    from transformers import TopPLogitsWarper

    z = log_probabilities(data)
    warped: Tensor = TopPLogitsWarper(data.top_p)(torch.empty(0, dtype=torch.int64), z)  # type: ignore[arg-type]
    tokens = torch.multinomial(torch.softmax(warped, dim=-1), 1)
    return tokens[:, 0], z.gather(-1, tokens)[:, 0]


def providers(data: Inputs, *, compiled: bool = False) -> list[Provider]:
    """Everything that can draw from these inputs on their device."""
    kind = data.logits.device.type
    ours = {"reference": None, "cpu": native.cpu_missing, "cuda": native.cuda_missing}
    logprobs_right, draw_right = _gates(data)

    def plain(name: str, draw: Callable[..., Draw], graph: bool = True) -> Provider:
        return Provider(name, lambda: draw(data), logprobs_right, graph)

    # torch.multinomial checks its input on the host, which no graph can hold.
    if data.top_p < 1:
        found = [
            plain("torch_sort", torch_sort, graph=False),
            plain("torch_transformers", transformers_warper, graph=False),
        ]
    else:
        found = [
            plain("torch", torch_gumbel),
            plain("torch_cdf", torch_cdf),
            plain("torch_multinomial", torch_multinomial, graph=False),
        ]
    if compiled and data.top_p == 1:
        torch.compiler.reset()  # each case is compiled for its own sizes
        found.append(plain("torch_compile", torch.compile(torch_gumbel, dynamic=False)))
    for name, form in peers.samplers(data.logits.device, data.top_p).items():
        found.append(Provider(name, partial(_peer, data, form), logprobs_right))
    for backend in ("reference", kind):
        missing = ours[backend]
        if missing is None or missing() is None:
            run = partial(_ours, data, backend)
            found.append(Provider(backend, run, draw_right, backend == kind))
    return found


def _peer(data: Inputs, form: peers.Sampler) -> Draw:
    return form(mix(data), data.top_p, data.seed, data.position)


def _ours(data: Inputs, backend: str) -> Draw:
    options = {"mode": data.mode, "position": data.position, "top_p": data.top_p}
    return clp_kernels.sample(  # type: ignore[arg-type]
        data.logits, weights=data.weights, seed=data.seed, backend=backend, **options
    )[:2]


def _gates(data: Inputs) -> tuple[Callable[[Draw], float], Callable[[Draw], float]]:
    """(log-probabilities right for whatever was drawn, and also drawn what the reference draws)."""
    z64 = data.logits.double()
    if data.weights is not None:
        z64 = clp_kernels.mix_logits(z64, data.weights, mode=data.mode, backend="reference")
    logp64 = torch.log_softmax(z64, dim=-1)
    logp32 = log_probabilities(data)
    wanted, _ = _ours(data, "reference")
    kept = logp64.exp() > 0
    if data.top_p < 1:
        bounds = torch.full((len(logp64),), data.top_p, dtype=torch.float64)
        kept = reference.top_p_mask(logp64, bounds)

    def logprobs_right(draw: Draw) -> float:
        tokens, logprobs = draw
        if not bool(((tokens >= 0) & (tokens < logp64.shape[1])).all()):
            raise AssertionError(f"tokens must be ids of the vocabulary, got {tokens.tolist()}")
        # Float32 may cut one id earlier or later; an id well outside is another distribution.
        low = torch.where(kept, logp64, torch.inf).amin(-1)
        if bool((logp64.gather(-1, tokens[:, None])[:, 0] < low - 1e-3).any()):
            raise AssertionError(
                f"a token that top_p {data.top_p} does not keep: {tokens.tolist()}"
            )
        ref64, same = (p.gather(-1, tokens[:, None])[:, 0] for p in (logp64, logp32))
        return assert_within_budget(logprobs, ref64, same, name="logprobs")

    def draw_right(draw: Draw) -> float:
        wrong = (draw[0] != wanted).nonzero()[:, 0].tolist()
        if wrong:
            raise AssertionError(f"rows {wrong} drew other tokens than the reference")
        return logprobs_right(draw)

    return logprobs_right, draw_right
