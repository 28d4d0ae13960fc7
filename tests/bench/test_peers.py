"""Other projects' kernels as providers, with plain PyTorch in their place: selection, arguments and
the error gate. The signatures are those of the versions that bench/peers.py names."""

import json
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.ops import linear_logprob, sample
from bench.report import rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SAMPLER_CASES = [
    sample.Case(50, m, 5, dtype, top_p)
    for m, dtype, top_p in product((1, 3), ("float32", "bfloat16"), (1.0, 0.5))
]
HEAD_CASE = linear_logprob.Case(21, 70, 8, "bfloat16")
PACKAGES = set(peers.PACKAGES.values())


def requests(values: Tensor, *per_row: Tensor) -> None:
    """What every sampler takes: dense float32 rows, and int64 numbers for each."""
    assert values.dtype == torch.float32 and values.dim() == 2 and values.is_contiguous()
    for numbers in per_row:
        assert numbers.dtype == torch.int64 and numbers.shape == values.shape[:1]


def nucleus(probs: Tensor, top_p: Any) -> Tensor:
    ordered, ids = probs.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probs).scatter(-1, ids, ordered)


def softmax(logits, temperature=None, enable_pdl=None):
    requests(logits)
    return logits.softmax(-1)


def sampling_from_probs(
    probs, indices=None, deterministic=True, generator=None, check_nan=False, seed=None,
    offset=None, return_valid=False,
):  # fmt: skip
    requests(probs, seed, offset)
    return torch.multinomial(probs, 1)[:, 0].int()


def top_p_sampling_from_probs(
    probs, top_p, indices=None, deterministic=True, generator=None, check_nan=False, seed=None,
    offset=None, return_valid=False,
):  # fmt: skip
    return sampling_from_probs(nucleus(probs, top_p), seed=seed, offset=offset)


def sampling_from_logits(
    logits, indices=None, deterministic=True, generator=None, check_nan=False, seed=None,
    offset=None,
):  # fmt: skip
    return sampling_from_probs(logits.softmax(-1), seed=seed, offset=offset)


def apply_top_k_top_p(logits, k, p, has_topp_only_rows=True):
    """In place, as vLLM's."""
    requests(logits)
    assert k is None and p.dtype == torch.float32 and p.shape == logits.shape[:1]
    return logits.masked_fill_(nucleus(logits.softmax(-1), p[:, None]) == 0, -torch.inf)


def gumbel_sample(
    logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature, is_drafting,
    logits_cache=None, logits_cache_col=None, use_fp64=False, logits_cache_source=None,
):  # fmt: skip
    requests(logits, seed, pos)
    assert expanded_idx_mapping.tolist() == list(range(len(logits)))
    assert expanded_idx_mapping.dtype == torch.int32 and temperature.tolist() == [1] * len(logits)
    assert not is_drafting
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def compute_token_logprobs(logits, token_ids):
    requests(logits)
    return logits.log_softmax(-1).gather(-1, token_ids)


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, reduction: str) -> Tensor:
    assert hidden.dtype == head.dtype == torch.bfloat16 and targets.dtype == torch.int64
    assert hidden.requires_grad and not head.requires_grad
    logits = torch.nn.functional.linear(hidden, head).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
    label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
    chunk_mem_const=1,
):  # fmt: skip
    return cross_entropy(input, weight, target, reduction)


def linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False,
    filter_eps="high", impl="cce",
):  # fmt: skip
    return cross_entropy(e, c, targets, reduction)


MODULES: dict[str, tuple[Callable[..., Any], ...]] = {
    "flashinfer": (),
    "flashinfer.sampling": (
        softmax, sampling_from_probs, top_p_sampling_from_probs, sampling_from_logits,
    ),
    "vllm": (),
    "vllm.v1.sample.ops.topk_topp_sampler": (apply_top_k_top_p,),
    "vllm.v1.worker.gpu.sample.gumbel": (gumbel_sample,),
    "vllm.v1.worker.gpu.sample.logprob": (compute_token_logprobs,),
    "liger_kernel": (),
    "liger_kernel.transformers.functional": (liger_fused_linear_cross_entropy,),
    "cut_cross_entropy": (linear_cross_entropy,),
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """All four packages, and the choice that a GPU would make."""
    modules = {}
    for name, functions in MODULES.items():
        modules[name] = module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    modules["flashinfer"].sampling = modules["flashinfer.sampling"]  # type: ignore[attr-defined]
    on_gpu, heads = peers.samplers, peers.heads
    monkeypatch.setattr(peers, "samplers", lambda device, top_p: on_gpu(CUDA, top_p))
    monkeypatch.setattr(peers, "heads", lambda device: heads(CUDA))
    return modules


def names(found: list[rows.Row], case: Any) -> set[str]:
    fields = json.dumps(case.fields())
    return {row["provider"] for row in found if row["case"] == fields}


def test_installed_samplers_have_rows(installed, measured) -> None:
    for case in SAMPLER_CASES:
        data = sample.inputs(case, CPU)
        before = data.logits.clone()
        for provider in sample.providers(data):
            assert provider.check(provider.run()) <= 1
        assert torch.equal(data.logits, before)  # a mask in place must not reach them
    found, refused = measured(sample, SAMPLER_CASES)
    assert not refused
    for case in SAMPLER_CASES:
        wanted = {"flashinfer", "vllm"} | ({"flashinfer_logits"} if case.top_p == 1 else set())
        assert names(found, case) & set(peers.PACKAGES) == wanted
    for name in {row["provider"] for row in found}:
        assert rows.is_baseline(name) == (name in peers.PACKAGES or name.startswith("torch"))


def test_installed_heads_have_rows(installed, measured) -> None:
    found, refused = measured(linear_logprob, [HEAD_CASE], memory=True)
    assert not refused
    assert {"liger", "cut_cross_entropy"} <= names(found, HEAD_CASE)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_only_what_is_installed_and_only_on_a_gpu(installed, monkeypatch, package: str) -> None:
    def chosen(device: torch.device) -> set[str]:
        forms = peers.installed(device, peers.PACKAGES)
        return {peers.PACKAGES[name] for name in forms}

    assert chosen(CUDA) == PACKAGES and chosen(CPU) == set()
    find = peers.importlib.util.find_spec
    monkeypatch.setattr(
        peers.importlib.util, "find_spec", lambda n: None if n == package else find(n)
    )
    assert chosen(CUDA) == PACKAGES - {package}


def least_likely(probs: Tensor, top_p: float, **options: Any) -> Tensor:
    return probs.argmin(-1).int()


@pytest.mark.parametrize(
    "module, name, broken, reason",
    [
        ("flashinfer.sampling", "top_p_sampling_from_probs", least_likely, "does not keep"),
        ("flashinfer.sampling", "softmax", None, "AttributeError: .*softmax"),
        ("flashinfer.sampling", "softmax", lambda z: z.softmax(-1) * 1.001, "out of its error"),
        ("vllm.v1.worker.gpu.sample.gumbel", "gumbel_sample", lambda z: z, "TypeError: .*lambda"),
        ("vllm.v1.worker.gpu.sample.gumbel", "gumbel_sample", None, "ImportError: .*gumbel_sample"),
    ],
)
def test_a_peer_that_is_wrong_is_refused_alone(
    installed, measured, module, name, broken, reason
) -> None:
    if broken is None:
        delattr(installed[module], name)
    else:
        setattr(installed[module], name, broken)
    peer = module.partition(".")[0]
    found, refused = measured(sample, [sample.Case(50, 3, 5, "float32", 0.5)])
    assert len(refused) == 1
    (which, why), *_ = refused.items()
    assert which.startswith(f"{peer}, ") and re.search(reason, why)
    present = {row["provider"] for row in found}
    assert peer not in present and len(present & {"flashinfer", "vllm"}) == 1


@pytest.mark.parametrize(
    "module, name",
    [
        ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
        ("cut_cross_entropy", "linear_cross_entropy"),
    ],
)
def test_a_head_with_a_wrong_gradient_is_refused_alone(installed, measured, module, name) -> None:
    right = getattr(installed[module], name)

    def wrong(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Forgets the gradient that comes from above, the loss being right."""
        loss = right(hidden, *arguments, **options)
        return loss.detach() + (loss.sum() - loss.sum().detach())

    setattr(installed[module], name, wrong)
    found, refused = measured(linear_logprob, [HEAD_CASE])
    assert len(refused) == 1 and "d_hidden" in next(iter(refused.values()))
    assert len(names(found, HEAD_CASE) & {"liger", "cut_cross_entropy"}) == 1
