"""Other projects' kernels as baselines: on a GPU, where they are installed.

Samplers, of mixed logits z [B, V] in float32, which stay as they are:
    flashinfer         softmax, sampling_from_probs or top_p_sampling_from_probs (no sort: it draws
                       again until a token is kept), then the plain gather of its probability
    flashinfer_logits  without a filter: sampling_from_logits, then plain logsumexp and gather
    vllm               vLLM's Triton sampler: its top-p mask on a copy (in place, and the
                       log-probability is that before the filter), Gumbel-max, token log-probability
Log-probabilities of targets:
    liger              liger_fused_linear_cross_entropy(reduction="none"): logits in chunks, made
                       again in the backward
    cut_cross_entropy  linear_cross_entropy(reduction="none"), its default gradient filter included
Whole generation runs:
    vllm               its engine, stepped here, over a base model saved to a folder

FlashInfer and Liger give no log-probability or loss of the other sign by themselves: what is added
is in the timed work. Written against the sources of flashinfer-python 0.7.2.post1, vllm 0.33.0,
liger-kernel 0.8.5 and cut-cross-entropy 25.1.1, and unverified: none of it has run on a GPU here.
An installed peer is never left out: if it raises, its row is refused, as by a failed error gate.
FlashInfer compiles its kernels at the first call unless flashinfer-jit-cache is installed.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from bench.engine.workload import Batch, Served

P = ParamSpec("P")
T = TypeVar("T")
# z, top_p, seed and position int64 [B] -> tokens int64 [B], logprobs float32 [B]
Sampler = Callable[[Tensor, float, Tensor, Tensor], tuple[Tensor, Tensor]]
# head [V, d], targets int64 [T], hidden [T, d] -> logprobs float32 [T]
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def flashinfer(z: Tensor, top_p: float, seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds in tensors, as its documentation asks for CUDA graphs."""
    from flashinfer import sampling

    probs = sampling.softmax(z)
    if top_p < 1:
        drawn = sampling.top_p_sampling_from_probs(probs, top_p, seed=seed, offset=position)
    else:
        drawn = sampling.sampling_from_probs(probs, seed=seed, offset=position)
    tokens = drawn.long()
    return tokens, probs.gather(-1, tokens[:, None])[:, 0].log()


def flashinfer_logits(
    z: Tensor, top_p: float, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Raises: ValueError with top-p, which this kernel does not filter by."""
    from flashinfer import sampling

    if top_p < 1:
        raise ValueError(f"top_p must be 1, got {top_p}")
    tokens = sampling.sampling_from_logits(z, seed=seed, offset=position).long()
    return tokens, z.gather(-1, tokens[:, None])[:, 0] - z.logsumexp(-1)


@cache
def _requests(count: int, top_p: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Index, temperature and top_p of each row, which a server holds: no part of the timed work."""
    index = torch.arange(count, dtype=torch.int32, device=device)
    return index, torch.ones(count, device=device), torch.full((count,), top_p, device=device)


def vllm(z: Tensor, top_p: float, seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """What its model runner calls for requests with seeds and log-probabilities."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    rows, ones, limits = _requests(len(z), top_p, z.device)
    kept = z if top_p == 1 else apply_top_k_top_p(z.clone(), None, limits)
    tokens = gumbel_sample(
        kept, rows, ones, seed, position, apply_temperature=False, is_drafting=False
    )
    return tokens, compute_token_logprobs(z, tokens[:, None])[:, 0]


def liger(head: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(hidden, head, targets, reduction="none")
    return -loss


def cut_cross_entropy(head: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden, head, targets, reduction="none")
    return -loss


class Vllm:
    """vLLM over a base model; an engine of bench/engine/engines.py.

    Args:
        model: A transformers causal LM on the GPU.
        count, longest: Requests in one batch, and tokens of the longest.
        memory: Share of the GPU's memory that it may take beside what is loaded here.
    """

    def __init__(self, model: Any, count: int, longest: int, memory: float = 0.3) -> None:
        self.model, self.count, self.longest, self.memory = model, count, longest, memory
        self._engine: Any = None

    def _start(self) -> Any:
        from vllm import LLM

        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return LLM(
                model=folder, skip_tokenizer_init=True, max_model_len=self.longest + 1,
                max_num_seqs=self.count, gpu_memory_utilization=self.memory,
            ).llm_engine  # fmt: skip

    def serve(self, batch: Batch, greedy: bool) -> Served:
        from vllm import SamplingParams

        if self._engine is None:
            self._engine = self._start()
        begin = time.perf_counter()
        for i, (prompt, length) in enumerate(zip(batch.prompts, batch.lengths, strict=True)):
            how = SamplingParams(
                max_tokens=length, temperature=0.0 if greedy else 1.0, ignore_eos=True,
                detokenize=False,
            )  # fmt: skip
            self._engine.add_request(str(i), {"prompt_token_ids": prompt}, how)
        tokens: list[list[int]] = [[] for _ in batch.prompts]
        first = [0.0] * len(tokens)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                i = int(output.request_id)
                tokens[i] = list(output.outputs[0].token_ids)
                first[i] = first[i] or time.perf_counter() - begin
        return Served(tokens, first)

    def kept_bytes(self) -> None:
        """Unknown: its memory is that of another process."""

    def close(self) -> None:
        self._engine = None


def samplers(device: torch.device, top_p: float) -> dict[str, Sampler]:
    """Those that can draw there, by provider's name."""
    found: dict[str, Sampler] = {"flashinfer": flashinfer}
    if top_p == 1:
        found["flashinfer_logits"] = flashinfer_logits
    return installed(device, found | {"vllm": vllm})


def heads(device: torch.device) -> dict[str, Head]:
    """Those that can run there, by provider's name."""
    found: dict[str, Head] = {"liger": liger, "cut_cross_entropy": cut_cross_entropy}
    return installed(device, found)


PACKAGES = {
    "flashinfer": "flashinfer", "flashinfer_logits": "flashinfer", "vllm": "vllm",
    "liger": "liger_kernel", "cut_cross_entropy": "cut_cross_entropy",
}  # fmt: skip


def vllm_missing(device: torch.device) -> str | None:
    """Why vLLM cannot serve there, or None."""
    if device.type != "cuda":
        return "needs a GPU"
    return None if importlib.util.find_spec("vllm") else "vllm is not installed"


def installed(device: torch.device, forms: dict[str, Any]) -> dict[str, Any]:
    """Those of the forms whose packages are installed; none without a GPU."""
    if device.type != "cuda":
        return {}
    return {n: form for n, form in forms.items() if importlib.util.find_spec(PACKAGES[n])}
