"""Sampling with a weight row for each sequence: prefill, KV cache, one `sample` op a token."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

import clp_kernels
from clp.policy import Policy, position_ids
from clp.weights import WeightSpec, parse_rows
from clp_kernels.invariant import is_batch_invariant


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request; vLLM's names.

    Attributes:
        max_tokens: Tokens a completion at most.
        temperature: 0 is greedy.
        top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. See clp_kernels.sample.
        seed: Completion i of the request draws with seed + i; None takes one from torch's
            generator. The same prompt, row and seed give the same tokens in any batch (to the
            bit inside clp_kernels.batch_invariant()).
        stop: Strings that end a completion; the text ends before them.
        n: Completions a prompt.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = field(default_factory=tuple)
    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must hold non-empty strings, got {list(self.stop)!r}")
        for name, low in {"max_tokens": 1, "top_k": 0, "n": 1}.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        if self.seed is not None and (
            type(self.seed) is not int or not -(2**63) <= self.seed < 2**63 - self.n
        ):
            raise ValueError(f"seed must be None or a 64-bit integer, got {self.seed!r}")
        ranges = {"temperature": (0.0, 1e6), "top_p": (1e-9, 1.0), "min_p": (0.0, 1.0)}
        for name, (low_f, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low_f <= value <= high:
                raise ValueError(f"{name} must be a number in [{low_f:g}, {high:g}], got {value!r}")


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        prompt_index, index: Which prompt of the call, and which of its n completions.
        text: Decoded without special tokens, up to a stop string.
        token_ids: All sampled ids, an end token included.
        logprobs: log pi(token) at the sampling temperature, before the filters; one a token.
        finish_reason: "stop" (end token or stop string) or "length".
    """

    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass
class _Sequence:
    """A sequence while it is decoded."""

    prompt_index: int
    index: int
    prompt_ids: list[int]
    row: Tensor
    params: SamplingParams
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    text: str | None = None


class Sampler:
    """Samples from a policy; every sequence of a batch has its own weights and parameters."""

    def __init__(self, policy: Policy, *, max_batch_size: int = 64) -> None:
        """Args: policy; max_batch_size: sequences decoded together (bounds the KV cache)."""
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self.policy = policy
        self.max_batch_size = max_batch_size
        accepted = inspect.signature(policy.model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        weights: WeightSpec | Sequence[WeightSpec],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        simplex: bool = True,
        progress: bool = False,
    ) -> list[Completion]:
        """Samples params.n completions for every prompt, in the order of the prompts.

        Args:
            prompts: Texts, or lists of token ids.
            weights: One row for all prompts, or one a prompt: a mapping from objective to weight,
                a string "joy=0.7,brief=0.3", or m numbers in the policy's order; or [B, m].
            params: One for all prompts, or one a prompt.
            simplex: Refuse rows off the simplex (negative entries, sum other than 1).
            progress: Show a progress bar.

        Raises:
            ValueError: bad rows (see clp.weights.parse_weights), an empty prompt, a prompt and
                max_tokens that do not fit the context, lists of unequal length.
        """
        rows = parse_rows(weights, len(prompts), self.policy.objectives, simplex=simplex)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params must be one or {len(prompts)}, got {len(params)}")
        waiting = [
            s for i, p in enumerate(prompts) for s in self._requests(i, p, rows[i], params[i])
        ]
        size = 1 if is_batch_invariant() else self.max_batch_size
        # Prompts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(waiting)), key=lambda i: len(waiting[i].prompt_ids))
        with tqdm(total=len(waiting), desc="sampling", unit="seq", disable=not progress) as bar:
            for start in range(0, len(order), size):
                batch = [waiting[i] for i in order[start : start + size]]
                for count in self._decode(batch):
                    bar.update(count)
        return [self._finish(sequence) for sequence in waiting]

    def _requests(
        self, i: int, prompt: str | list[int], row: Tensor, params: SamplingParams
    ) -> Iterator[_Sequence]:
        ids = (
            self.policy.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        )
        if not ids:
            raise ValueError(f"prompt {i} is empty: it has no tokens")
        if len(ids) + params.max_tokens > self.policy.context_length:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens; with max_tokens={params.max_tokens} it exceeds "
                f"the context of {self.policy.context_length}"
            )
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        for k in range(params.n):
            yield _Sequence(i, k, ids, row, params, seed + k)

    @torch.no_grad()
    def _decode(self, batch: list[_Sequence]) -> Iterator[int]:
        """Decodes a batch to its end; yields how many sequences each step finished."""
        device, model = self.policy.device, self.policy.model
        width = max(len(s.prompt_ids) for s in batch)
        pad = self.policy.tokenizer.pad_token_id or 0
        ids = torch.tensor(
            [[pad] * (width - len(s.prompt_ids)) + s.prompt_ids for s in batch], device=device
        )
        mask = torch.tensor(
            [[0] * (width - len(s.prompt_ids)) + [1] * len(s.prompt_ids) for s in batch],
            device=device,
        )
        cache = DynamicCache(config=model.config)
        positions = position_ids(mask)
        batch = list(batch)
        args, steering = _SampleArguments.of(batch, device), self._steering(batch)
        while batch:
            with steering:
                logits = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    **self._last_logits,
                ).logits[:, -1]
            step = len(batch[0].token_ids)
            drawn = clp_kernels.sample(logits, **args.options, seed=args.seed, position=step)
            alive = self._extend(batch, drawn)
            yield len(batch) - len(alive)
            ids, positions = drawn.tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            if len(alive) < len(batch):
                keep = torch.tensor(alive, device=device, dtype=torch.int64)
                ids, positions, mask = ids[keep], positions[keep], mask[keep]
                batch = [batch[i] for i in alive]
                if batch:
                    cache.batch_select_indices(keep)
                    args, steering = _SampleArguments.of(batch, device), self._steering(batch)

    def _steering(self, batch: list[_Sequence]) -> clp_kernels.steer:
        return self.policy.steer(torch.stack([s.row for s in batch]))

    def _extend(self, batch: list[_Sequence], drawn: clp_kernels.Sample) -> list[int]:
        """Appends the drawn tokens; returns the positions in the batch that go on."""
        alive = []
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        for i, sequence in enumerate(batch):
            sequence.token_ids.append(tokens[i])
            sequence.logprobs.append(logprobs[i])
            if tokens[i] in self.policy.end_ids or self._hit_stop(sequence):
                sequence.finish_reason = "stop"
            elif len(sequence.token_ids) >= sequence.params.max_tokens:
                sequence.finish_reason = "length"
            else:
                alive.append(i)
        return alive

    def _hit_stop(self, sequence: _Sequence) -> bool:
        if not sequence.params.stop:
            return False
        text = self._text(sequence)
        cuts = [text.find(s) for s in sequence.params.stop if s in text]
        if cuts:
            sequence.text = text[: min(cuts)]
        return bool(cuts)

    def _text(self, sequence: _Sequence) -> str:
        # Decoded behind the prompt, because tokenizers drop the space of a text's first token.
        decode = self.policy.tokenizer.decode
        before = decode(sequence.prompt_ids, skip_special_tokens=True)
        whole = decode(sequence.prompt_ids + sequence.token_ids, skip_special_tokens=True)
        return whole[len(before) :] if whole.startswith(before) else decode(
            sequence.token_ids, skip_special_tokens=True
        )  # fmt: skip

    def _finish(self, sequence: _Sequence) -> Completion:
        text = sequence.text if sequence.text is not None else self._text(sequence)
        return Completion(
            sequence.prompt_index,
            sequence.index,
            text,
            sequence.token_ids,
            sequence.logprobs,
            sequence.finish_reason or "length",
        )


@dataclass(frozen=True)
class _SampleArguments:
    """The per-row arguments of the `sample` op for a batch, on its device."""

    seed: Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, batch: list[_Sequence], device: torch.device) -> "_SampleArguments":
        options: dict[str, Any] = {}
        for name in ("temperature", "top_k", "top_p", "min_p"):
            values = [getattr(s.params, name) for s in batch]
            # A plain number where all agree: a filter that is off then costs nothing.
            same = len(set(values)) == 1
            options[name] = values[0] if same else torch.tensor(values, device=device)
        seed = torch.tensor([s.seed for s in batch], dtype=torch.int64, device=device)
        return cls(seed, options)


def with_seeds(params: SamplingParams, seeds: Sequence[int]) -> list[SamplingParams]:
    """The same parameters with a seed for each prompt."""
    return [replace(params, seed=seed) for seed in seeds]


def sampling_fields() -> list[str]:
    """Names of SamplingParams' fields, for the rows of an input file."""
    return [f.name for f in fields(SamplingParams)]
