"""The ways to serve a batch of requests that `bench sampler` compares."""

import copy
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria

from bench.engine.workload import Batch, Served
from clp.engine.requests import SamplingParams
from clp.engine.sampler import Sampler
from clp.policies.interface import Network, Steerable
from clp.policies.policy import Policy
from clp_kernels import save_adapters

NO_END = -1  # of continuous batching: an end token that is never drawn
PAGE = 256  # tokens of a page of transformers' continuous batching (its default)


class Engine(ABC):
    """A way to serve."""

    @abstractmethod
    def serve(self, batch: Batch, greedy: bool) -> Served:
        """Every request's completion, at temperature 1 or greedy."""

    def kept_bytes(self) -> int | None:
        """Bytes kept between calls; None if they are unknown."""
        return 0

    def close(self) -> None:  # noqa: B027  # most have started nothing
        """Stops what it has started."""


class Bare(Steerable):
    """A plain causal LM as a policy with one objective, for the sampler without adapters."""

    objectives = ("none",)

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def networks(self) -> list[Network]:
        return [Network(self.model, lambda weights: nullcontext())]

    def cache_key(self, weights: Tensor) -> bytes:
        return b""


class Clp(Engine):
    """The project's sampler: all requests in one batch, each with its own weights.

    `weighted` False: for a policy with one objective, whose weight is 1.
    """

    def __init__(self, policy: Steerable, count: int, *, weighted: bool = True) -> None:
        self.weighted = weighted
        self.sampler = Sampler(policy, max_batch_size=count)

    def serve(self, batch: Batch, greedy: bool) -> Served:
        begin = time.perf_counter()
        same = SamplingParams(temperature=0.0 if greedy else 1.0, ignore_eos=True)
        requests = []
        cases = zip(batch.prompts, batch.lengths, batch.weights, strict=True)
        for i, (prompt, length, weights) in enumerate(cases):
            params = replace(same, max_tokens=length, seed=batch.seed + i)
            own = list(weights) if self.weighted else [1.0]
            requests.append(self.sampler.submit(prompt, own, params))
        first = [0.0] * len(requests)
        waiting = list(range(len(requests)))
        while self.sampler.unfinished:
            self.sampler.step()
            now = time.perf_counter() - begin
            for i in waiting:
                if requests[i].sequences[0].token_ids:
                    first[i] = now
            waiting = [i for i in waiting if not first[i]]
        done = [request.completions[0] for request in requests]
        for i, completion in enumerate(done):
            if completion.error is not None:
                raise RuntimeError(f"request {i} failed: {completion.error}")
        return Served([completion.token_ids for completion in done], first)

    def kept_bytes(self) -> int:
        return self.sampler.cache_bytes


class _First(StoppingCriteria):
    """Stops nothing; notes when the first new token is there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        if self.at is None:
            int(input_ids[0, -1])  # waits for the device
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(
    model: Any, prompts: list[list[int]], lengths: list[int], greedy: bool
) -> tuple[list[list[int]], float]:
    """transformers' `generate` on one batch, padded on the left, until the longest is done.

    The model must have no end token (`_endless`).

    Returns: each prompt's own number of new tokens, and the clock at the first of them.
    """
    device = model.device
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    how = GenerationConfig(max_new_tokens=max(lengths), pad_token_id=0, **_drawing(greedy))
    clock = _First()
    out = model.generate(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=how,
        stopping_criteria=[clock],
    )
    new = out[:, width:].tolist()
    assert clock.at is not None
    return [tokens[:count] for tokens, count in zip(new, lengths, strict=True)], clock.at


def _endless(model: Any) -> Any:
    """The model, without its end token: every completion gets its whole length."""
    model.generation_config.eos_token_id = None
    return model


def _drawing(greedy: bool) -> dict[str, Any]:
    return {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}


class Generate(Engine):
    """The plain base model, all requests in one padded batch. Its end token is taken from it."""

    def __init__(self, model: Any) -> None:
        self.model = _endless(model)

    def serve(self, batch: Batch, greedy: bool) -> Served:
        begin = time.perf_counter()
        tokens, at = generate(self.model, batch.prompts, batch.lengths, greedy)
        return Served(tokens, [at - begin] * len(tokens))


class PeftMerged(Engine):
    """PEFT: for all distinct weights a `cat` adapter mixed by them, merged into the base.

    Then `generate` for the requests with these weights in one padded batch. A merged adapter is
    removed by subtraction, which leaves rounding: the base's parameters are then copied back.
    """

    def __init__(self, policy: Policy, model: Any) -> None:
        self.policy, self.base = policy, model
        self.names = list(policy.objectives)
        self.model: Any = None
        self.bases: dict[Tensor, Tensor] = {}  # each adapted weight, and what it was

    def _start(self) -> None:
        import peft

        with tempfile.TemporaryDirectory() as folder:
            save_adapters(self.policy.model, folder, base_model=self.policy.base_model)
            first, *others = (Path(folder) / name for name in self.names)
            self.model = peft.PeftModel.from_pretrained(
                _endless(copy.deepcopy(self.base)), first, adapter_name=self.names[0]
            ).eval()
            for path in others:
                self.model.load_adapter(path, adapter_name=path.name)
        for layer in self.model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                base: Any = layer.get_base_layer()
                self.bases[base.weight] = base.weight.detach().clone()

    @torch.no_grad()
    def serve(self, batch: Batch, greedy: bool) -> Served:
        if self.model is None:
            self._start()
        begin = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in batch.prompts]
        first = [0.0] * len(tokens)
        order = sorted(range(len(tokens)), key=lambda i: batch.weights[i])
        for weights, group in groupby(order, key=lambda i: batch.weights[i]):
            members = list(group)
            self.model.add_weighted_adapter(
                self.names, list(weights), adapter_name="mixed", combination_type="cat"
            )
            self.model.set_adapter("mixed")
            self.model.merge_adapter()
            found, at = generate(
                self.model, [batch.prompts[i] for i in members],
                [batch.lengths[i] for i in members], greedy,
            )  # fmt: skip
            self.model.unmerge_adapter()
            for weight, base in self.bases.items():
                weight.copy_(base)
            self.model.delete_adapter("mixed")
            for i, own in zip(members, found, strict=True):
                tokens[i], first[i] = own, at - begin
        return Served(tokens, first)

    def kept_bytes(self) -> int:
        """The copy of the base's weights that merging needs."""
        return sum(base.nbytes for base in self.bases.values())


class ContinuousBatching(Engine):
    """transformers' continuous batching over the base model, its paged cache made beforehand."""

    def __init__(self, model: Any, count: int, longest: int) -> None:
        # Of its own: the manager changes the attention of its model.
        self.model = copy.deepcopy(model)
        self.count, self.longest = count, longest
        self._manager: Any = None

    def _start(self, greedy: bool) -> Any:
        how = GenerationConfig(
            max_new_tokens=self.longest, eos_token_id=NO_END, pad_token_id=0, **_drawing(greedy)
        )
        # By default it takes most of the free memory; here what all requests need, half as much
        # again (it keeps a margin free), and as many tokens per step as ours prefills.
        pages = self.count * -(-self.longest // PAGE)
        sizes = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages + pages // 2 + 2, max_batch_tokens=2048,
            max_requests_per_batch=self.count,
        )  # fmt: skip
        manager = self.model.init_continuous_batching(
            generation_config=how, continuous_batching_config=sizes
        )
        manager.warmup()  # captures its CUDA graphs, as `generate_batch` does
        manager.start()
        return manager

    @torch.no_grad()
    def serve(self, batch: Batch, greedy: bool) -> Served:
        """Raises: RuntimeError for a request that failed, or if its thread has ended."""
        if greedy:
            manager = self._start(greedy)
            try:
                return self._run(manager, batch)
            finally:
                manager.stop(block=True)
                manager.destroy()
        if self._manager is None:
            self._manager = self._start(greedy)
        return self._run(self._manager, batch)

    def _run(self, manager: Any, batch: Batch) -> Served:
        begin = time.perf_counter()
        names = [
            manager.add_request(prompt, max_new_tokens=length, record_timestamps=True)
            for prompt, length in zip(batch.prompts, batch.lengths, strict=True)
        ]
        results: dict[str, Any] = {}
        while len(results) < len(names):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("its generation thread has ended")
            elif result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"{result.request_id} failed: {result.error}")
                results[result.request_id] = result
        done = [results[name] for name in names]
        tokens = [list(result.generated_tokens) for result in done]
        return Served(tokens, [result.timestamps[0] - begin for result in done])

    def kept_bytes(self) -> int | None:
        """The pages of its cache."""
        if self._manager is None:
            return None
        return int(self._manager.batch_processor.cache.cache_tensor.nbytes)

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True)
            self._manager.destroy()
