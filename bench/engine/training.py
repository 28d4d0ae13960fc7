"""The subject `training`: what a conditioning costs in a training step, over the plain model.

Timed is the part of a step that depends on the conditioning: hidden states of N completions of C
tokens after prompts of P tokens, their log-probabilities, entropy and exact KL to the base, and the
backward into all that is trained. Sampling is the subject `sampler`.

Providers.
    base               the model without weights, all of its parameters trained; a frozen copy gives
                       the reference
    lora, full, attention, head, prompt
                       clp.Policy with that conditioning, m objectives, other weights for each group
                       of 4 completions
    lora_equal, ...    the same with equal weights in the whole batch

Error gate: the policies have just been made, so that log-probabilities must be those of the base
within 1e-4 and the KL at most 1e-6 ("prompt": finite, because it has another prompt).
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import clp_kernels
from bench.timing import Protocol, Provider
from clp import Policy
from clp.engine.requests import Completion
from clp.policies.loading import load_base
from clp.policies.token_stats import Batch, token_stats
from clp.training.rollout import make_batch

OP = "training"
CONDITIONINGS = ("lora", "full", "attention", "head", "prompt")
GROUP = 4
PROTOCOL = Protocol(warmup=1, repeats=9, least=9, seconds=0)
QUICK_PROTOCOL = Protocol(warmup=1, repeats=3, least=3, seconds=0)
# A Llama of 24 million parameters: as wide as small real ones, small enough for a CPU. Its ids are
# those of the embedded model's tokenizer: others would not be drawn.
RANDOM, SIZES = "llama-24m-random", {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and the sizes of a batch."""

    model: str
    m: int
    completions: int
    prompt: int
    length: int
    dtype: str = "float32"

    def fields(self) -> dict[str, object]:
        """The case as it stands in a row."""
        return {
            "model": self.model, "m": self.m, "N": self.completions, "P": self.prompt,
            "C": self.length, "dtype": self.dtype,
        }  # fmt: skip

    def floors(self, _: Any) -> dict[str, float]:
        """None: the base is what they are compared with."""
        return {}


def cases(quick: bool = False) -> list[Case]:
    """The demo's own shape, and a wider model."""
    return [Case("tiny", 2, 96, 12, 24), Case(RANDOM, 2, 16, 16, 48)][: 1 if quick else 2]


def inputs(case: Case, device: torch.device) -> tuple[dict[str, Policy], Any, Callable[..., Any]]:
    """The policies, the plain model with its frozen copy, and what makes a policy's batch."""
    with tempfile.TemporaryDirectory() as folder:
        source = case.model
        if source == RANDOM:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
            load_base("tiny")[1].save_pretrained(folder)
            source = folder
        names = [f"r{i}" for i in range(case.m)]
        policies = {
            name: Policy.create(source, names, conditioning=name, device=device)
            for name in CONDITIONINGS
        }
        plain = [load_base(source)[0].to(device) for _ in range(2)]
    plain[0].requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    shape = case.completions, case.prompt + case.length
    ids = torch.randint(3, 1000, shape, generator=generator).tolist()
    done = [Completion(i, 0, "", row[case.prompt :], [], "length") for i, row in enumerate(ids)]

    def batch(policy: Policy, equal: bool) -> Batch:
        groups = torch.rand(case.completions // GROUP, case.m, generator=generator)
        weights = (groups / groups.sum(1, keepdim=True)).repeat_interleave(GROUP, 0)
        weights = weights[:1].expand_as(weights) if equal else weights
        return make_batch(policy, [row[: case.prompt] for row in ids], done, weights)

    return policies, plain, batch


def providers(made: tuple[dict[str, Policy], Any, Callable[..., Any]]) -> Sequence[Provider]:
    """All of them."""
    policies, plain, batch = made
    first = batch(policies["lora"], False)
    found = [Provider("base", partial(_plain, plain, first), lambda _: 0.0)]
    wanted = _plain(plain, first)
    for name, policy in policies.items():
        for equal in (False, True):
            run = partial(_step, policy, policy.head(), batch(policy, equal))
            check = partial(gate, wanted, name == "prompt")
            found.append(Provider(name + "_equal" * equal, run, check))
    return found


def trained(made: tuple[dict[str, Policy], Any, Callable[..., Any]]) -> dict[str, float]:
    """Trained parameters over those of the model, by conditioning."""
    whole = sum(p.numel() for p in made[1][0].parameters())
    return {
        name: sum(p.numel() for p in policy.trainable_parameters().values()) / whole
        for name, policy in made[0].items()
    }


def _step(policy: Policy, head: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    stats = token_stats(policy, batch, head, 1.0)
    (stats.kl - stats.logprobs).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None
    return stats.logprobs.detach(), stats.kl.detach()


def _plain(models: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same of one model, whose reference is another."""
    mask = batch.completion_mask
    before = slice(-mask.shape[1] - 1, -1)

    def hidden(model: Any) -> Tensor:
        # All sequences are of the same length: there is no padding.
        output = model.base_model(input_ids=batch.base_ids, use_cache=False)
        states: Tensor = output.last_hidden_state[:, before][mask]
        return states

    states = hidden(models[0])
    with torch.no_grad():
        ref = hidden(models[1])
    targets = batch.base_ids[:, -mask.shape[1] :][mask]
    weight = models[0].get_output_embeddings().weight
    found = clp_kernels.linear_logprob(states, weight, targets, return_entropy=True, ref_hidden=ref)
    assert found.kl is not None
    (found.kl - found.logprobs).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in models[0].parameters():
        parameter.grad = None
    logprobs = torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, found.logprobs)
    return logprobs.detach(), found.kl.detach()


def gate(wanted: tuple[Tensor, Tensor], other_prompt: bool, got: tuple[Tensor, Tensor]) -> float:
    """The error gate of (log-probabilities, KL); gives the share of the bounds.

    other_prompt: as "prompt" has; the values must only be finite then.

    Raises: AssertionError, which says what is wrong.
    """
    logprobs, kl = got
    if other_prompt:
        assert bool(logprobs.isfinite().all() and kl.isfinite().all()), "a value is not finite"
        return 0.0
    error, divergence = float((logprobs - wanted[0]).abs().max()), float(kl.abs().max())
    assert error <= 1e-4, f"log-probabilities differ by {error:.2g}"
    assert divergence <= 1e-6, f"the KL to the base is {divergence:.2g}"
    return max(error / 1e-4, divergence / 1e-6)
