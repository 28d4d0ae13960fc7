"""The Triton kernels of sample and mix_logits on a GPU, held to the reference.

Needs no conftest.py. Draws are compared with the reference on the CPU.
"""

from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, INF, MODES, NAN, MixtureInputs, judge_mixture, mixture_results
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from clp_kernels.ops.mix_logits import reference as mix_reference
from clp_kernels.ops.mix_logits import triton as mixing
from clp_kernels.ops.sample import reference
from clp_kernels.ops.sample import triton as backend
from clp_kernels.ops.triton_launch import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 hides the GPU"),
]

DTYPES = (BF16, F16, F32)
FILTERS = ("", "top_k", "top_p", "min_p", "top_k top_p", "top_k top_p min_p")
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _poison() -> Any:
    """torch.empty gives NaN, so that an unwritten output fails its test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows(
    m: int,
    batch: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    filters: str = "",
    mode: str = "geometric",
) -> Arguments:
    """Arguments of a draw on the CPU: every temperature, each filter also switched off."""

    def cycle(*values: float) -> Tensor:
        return torch.tensor(values).repeat(batch)[:batch]

    weights = None if m == 1 else torch.randn(batch, m)
    return {
        "logits": (3 * torch.randn(m, batch, vocab_size)).to(dtype),
        "weights": weights.abs() if mode == "probability" and weights is not None else weights,
        "mode": mode,
        "temperature": cycle(1.0, 0.3, 0.0, 3.0),
        "top_k": cycle(5, 0, 50).long() if "top_k" in filters else None,
        "top_p": cycle(0.9, 0.5, 1.0, 0.99, 0.1) if "top_p" in filters else None,
        "min_p": cycle(0.05, 0.0, 0.3) if "min_p" in filters else None,
        "seed": torch.randint(-(2**63), 2**63 - 1, (batch,)),
        "position": torch.randint(2**31, 2**40, (batch,)),
    }


def on_gpu(args: Arguments) -> Arguments:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in args.items()}


def assert_equals_reference(args: Arguments) -> None:
    tokens, *wanted = reference.sample(**args)
    got = backend.sample(**on_gpu(args))
    assert torch.equal(got[0].cpu(), tokens)
    for ours, theirs in zip(got[1:], wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS)
def test_small_equals_reference(dtype: torch.dtype, filters: str) -> None:
    for vocab_size in (1, 2, 7, 31, 64, 513, 1024, 1025, 4099):
        for m in (1, 2, 5):
            for batch in (0, 1, 9):
                assert_equals_reference(rows(m, batch, vocab_size, dtype, filters))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", ["", "top_k top_p min_p"])
def test_small_probability(dtype: torch.dtype, filters: str) -> None:
    for vocab_size in (1, 31, 513, 4099):
        assert_equals_reference(rows(3, 5, vocab_size, dtype, filters, "probability"))


@pytest.mark.parametrize("vocab_size", [50_257, 151_936, 262_144])
@pytest.mark.parametrize("filters", FILTERS)
def test_large_vocabulary(vocab_size: int, filters: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert_equals_reference(rows(2, 10, vocab_size, dtype, filters))


@pytest.mark.parametrize("vocab_size", [700, 20_011])
@pytest.mark.parametrize("ties", [False, True])
def test_small_kept_sets_are_exactly_the_references(vocab_size: int, ties: bool) -> None:
    z = 2 * torch.randn(5, vocab_size)
    z = z.round() if ties else z
    z[2, 100:] = -INF
    top_k = torch.tensor([1, 17, 650, 0, 10**15])
    top_p = torch.tensor([0.9, 0.05, 0.999, 0.5, 1.0])
    logp = torch.log_softmax(z.double(), -1)
    bits = (z + 0.0).view(torch.int32).long()
    key = torch.where(bits < 0, -1 - bits, bits + 2**31)
    call = backend.Rows(z[None].cuda(), None, torch.ones(5, device="cuda"))
    stats = torch.empty(2, 5, dtype=torch.float64, device="cuda")
    call.combine(call.partials(None), stats, None)
    least = call.threshold(stats, None, top_k=top_k.cuda())
    first = reference.top_k_mask(logp, top_k)
    assert torch.equal(key >= least.cpu()[:, None], first)
    found = call.threshold(stats, least, top_p=top_p.cuda()).cpu()
    wanted = first & reference.top_p_mask(logp.masked_fill(~first, -INF), top_p)
    assert torch.equal(key >= found[:, None], wanted)


@pytest.mark.parametrize("scale", [1e4, 1e17, 3e38])
def test_small_huge_logits(scale: float) -> None:
    for filters in ("", "top_p"):
        args = rows(1, 4, 5000, filters=filters)
        args["logits"][:] = scale
        args["logits"][:, 2, ::3] = -scale
        args["logits"][:, 3] *= 1 - torch.rand(5000) * 1e-6
        assert_equals_reference(args)


@pytest.mark.parametrize("margin", [1e-3, -1e-3])
def test_small_largest_noise(margin: float) -> None:
    """Id 510 of (seed 7, position 115434) has the word 0xffffffff: noise 22.87, once in 2^32."""
    args = rows(1, 1, 512)
    args["seed"], args["position"] = torch.tensor([7]), torch.tensor([115_434])
    noise = reference.gumbel(reference.philox_uniform(args["seed"], args["position"], 512))[0]
    args["logits"].fill_(-60.0)
    args["logits"][0, 0, 0], args["logits"][0, 0, 510] = 0.0, noise[0] - noise[510] + margin
    assert_equals_reference(args)


@pytest.mark.parametrize("filters", ["", "top_k top_p min_p"])
def test_small_bad_rows_and_infinities(filters: str) -> None:
    args = rows(4, 7, 5000, filters=filters)
    logits, weights = args["logits"], args["weights"]
    logits[:, 0] = -INF
    logits[0, 1, 4500] = NAN
    logits[1, 2, 3], weights[2] = INF, 1.0
    logits[:, 3, :4990] = -INF
    weights[4] = torch.tensor([0.0, 1.0, 0.0, 2.0])
    logits[0, 4], logits[2, 4, ::2] = -INF, NAN
    weights[5] = torch.tensor([1.0, -1.0, 0.5, 0.5])
    logits[1, 5, :500] = -INF
    weights[6] = 0
    assert (reference.sample(**args)[0] >= 0).tolist() == [False] * 3 + [True] * 4
    assert_equals_reference(args)


def test_small_mix_is_rounded_like_the_references() -> None:
    """One fused multiply-add would show."""
    for dtype in DTYPES:
        args = rows(5, 64, 3000, dtype)
        logits, weights = args["logits"], args["weights"]
        got = mixing.mixture(logits.cuda(), weights.cuda(), "geometric", torch.float32)
        assert torch.equal(
            got.cpu(), mix_reference.mix_logits(logits.float(), weights, "geometric")
        )
        rounded = mixing.mix_logits(logits.cuda(), weights.cuda(), "geometric")
        assert torch.equal(rounded.cpu(), mix_reference.mix_logits(logits, weights, "geometric"))


@pytest.mark.parametrize("filters", ["", "top_k top_p min_p"])
@pytest.mark.parametrize("mode", MODES)
def test_small_row_bits_are_its_own(filters: str, mode: str) -> None:
    args = on_gpu(rows(3, 5, 20_011, filters=filters, mode=mode))
    together = backend.sample(**args)
    assert all(map(torch.equal, together, backend.sample(**args)))
    padded = torch.full((5, 3, 20_017), NAN, device="cuda")[:, :, 3:20_014].transpose(0, 1)
    padded.copy_(args["logits"])
    assert all(map(torch.equal, together, backend.sample(**{**args, "logits": padded})))
    order = torch.tensor([4, 0, 3], device="cuda")
    part = {k: v[order] if isinstance(v, Tensor) and k != "logits" else v for k, v in args.items()}
    part["logits"] = args["logits"][:, order]
    for alone, all_rows in zip(backend.sample(**part), together, strict=True):
        assert torch.equal(alone, all_rows[order])


@pytest.mark.parametrize("filters", ["", "top_k top_p min_p"])
def test_cuda_graph_replay(filters: str) -> None:
    """Capture once, replay with other inputs: nothing was read on the host."""
    args = on_gpu(rows(4, 8, 32_000, torch.bfloat16, filters))
    backend.sample(**args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.sample(**args)
    for _ in range(2):
        fresh = on_gpu(rows(4, 8, 32_000, torch.bfloat16, filters))
        for name, captured_input in args.items():
            if isinstance(captured_input, Tensor):
                captured_input.copy_(fresh[name])
        graph.replay()
        assert all(map(torch.equal, captured, backend.sample(**fresh)))


@pytest.mark.parametrize("filters", ["", "top_k", "top_p", "min_p"])
def test_distribution_of_a_million_draws(filters: str) -> None:
    """Chi-square against the reference's probabilities of one row; more rows than a grid axis."""
    draws, logits = 2**20, torch.linspace(-2, 2, 12)
    given = {"top_k": torch.tensor([5]), "top_p": torch.tensor([0.8]), "min_p": torch.tensor([0.2])}
    logp = logits.double().log_softmax(-1)[None]
    kept = torch.ones(1, 12, dtype=torch.bool)
    if filters == "top_k":
        kept = reference.top_k_mask(logp, given["top_k"])
    elif filters == "top_p":
        kept = reference.top_p_mask(logp, given["top_p"])
    elif filters == "min_p":
        kept = logp >= logp.amax() + given["min_p"].double().log()
    args = on_gpu(rows(1, 1, 12))
    args["logits"] = logits.cuda().expand(1, draws, 12)
    args["temperature"] = torch.ones(draws, device="cuda")
    args["seed"] = torch.arange(draws, device="cuda")
    args["position"] = torch.full((draws,), 3, device="cuda")
    if filters:
        args[filters] = given[filters].cuda().expand(draws)
    counts = torch.bincount(backend.sample(**args)[0], minlength=12).cpu().double()
    assert counts[~kept[0]].sum() == 0
    p = logp.masked_fill(~kept, -INF).softmax(-1)[0][kept[0]] * draws
    chi_square = ((counts[kept[0]] - p) ** 2 / p).sum().item()
    # Exceeded about once in a thousand with 11 degrees of freedom, or less with fewer.
    assert chi_square < 31.3


@pytest.mark.slow
def test_more_than_two_to_the_31_logits() -> None:
    batch, vocab_size = 14_200, 151_936
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    logits = torch.randn(1, batch, vocab_size, device="cuda", dtype=torch.bfloat16)
    for filters in ("", "top_p"):
        args = on_gpu(rows(1, batch, 1, filters=filters))
        got = backend.sample(**{**args, "logits": logits})
        tail = {k: v[-4:].cpu() if isinstance(v, Tensor) else v for k, v in args.items()}
        tail["logits"] = logits[:, -4:].cpu()
        assert torch.equal(got[0][-4:].cpu(), reference.sample(**tail)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_small_mix_logits_within_budget(dtype: torch.dtype, mode: str) -> None:
    for m, batch, vocab_size in ((1, 3, 7), (2, 1, 1025), (5, 4, 4099), (3, 2, 151_936)):
        args = rows(m, batch, vocab_size, dtype, mode=mode)
        logits, weights = args["logits"].cuda(), torch.rand(batch, m, device="cuda")
        if mode == "geometric":
            weights = weights - 0.5
        logits[:, :, 0] = -INF
        dz = torch.randn(batch, vocab_size, device="cuda").to(dtype)
        args = MixtureInputs(dz, logits, weights)
        got, _ = judge_mixture(mixing, mix_reference, args, mode)
        again = mixture_results(mixing, args, mode)
        assert all(map(torch.equal, got, again))
        alone = mixture_results(mixing, args.rows([-1]), mode)
        assert torch.equal(alone[1], got[1][:, -1:])
        assert torch.equal(alone[2], got[2][-1:])
