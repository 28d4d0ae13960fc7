"""The sampler on a GPU: captured steps against plain ones, rows together against one at a time.

Needs a GPU, and transformers for the models.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", exc_type=ImportError)

from clp.engine.sampler import Sampler, SamplingParams
from clp.policies.policy import Policy
from clp_kernels.nn.mixed_lora import steered_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"
COUNT = 11  # rows: more than one size of a captured step as they finish
PROMPTS = [[(7 * i + 3 * k) % 500 + 1 for k in range(2 + 3 * i)] for i in range(COUNT)]
ROWS = [[i / (COUNT - 1), 1 - i / (COUNT - 1)] for i in range(COUNT)]


def params(i: int, temperature: float) -> SamplingParams:
    """Of row i: lengths from 5 to 65, so that rows finish one after the other."""
    return SamplingParams(
        max_tokens=5 + 6 * i, temperature=temperature, seed=100 + i, ignore_eos=True
    )


@pytest.fixture(scope="module")
def policy() -> Policy:
    made = Policy.create("tiny", ["joy", "brief"], r=4, device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    for layer in steered_layers(made.model).values():
        noise = torch.randn(layer.lora_B.shape, generator=generator)
        layer.lora_B.data.copy_(0.15 * noise)  # every row writes something else
    return made


def tokens(sampler: Sampler, temperature: float) -> list[list[int]]:
    asked = [params(i, temperature) for i in range(COUNT)]
    return [c.token_ids for c in sampler.generate(PROMPTS, ROWS, asked)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_steps_draw_what_plain_steps_draw(policy: Policy, temperature: float) -> None:
    sampler = Sampler(policy)
    captured = [tokens(sampler, temperature) for _ in range(2)]  # captured, then replayed alone
    assert sampler.runner.graphs is not None and len(sampler.runner.graphs.captured) >= 3
    plain = Sampler(policy)
    plain.runner.graphs = None
    wanted = tokens(plain, temperature)
    assert plain.runner.graphs is None
    assert [len(t) for t in wanted] == [5 + 6 * i for i in range(COUNT)]
    assert captured == [wanted, wanted]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_together_draw_what_each_draws_alone(policy: Policy, temperature: float) -> None:
    sampler = Sampler(policy)
    together = tokens(sampler, temperature)
    alone = [
        sampler.generate([PROMPTS[i]], [ROWS[i]], params(i, temperature))[0].token_ids
        for i in range(COUNT)
    ]
    assert together == alone
    assert len({tuple(t[:5]) for t in together}) > COUNT // 2


def test_the_next_requests_reuse_slots_and_graphs(policy: Policy) -> None:
    """Two slots for eleven rows: each row finds another's leavings in its slot."""
    few, many = Sampler(policy, max_batch_size=2), Sampler(policy)
    assert tokens(few, 0.0) == tokens(many, 0.0)


def test_greedy_tokens_are_those_of_generate(policy: Policy) -> None:
    made = tokens(Sampler(policy), 0.0)
    generate: Callable[..., Any] = policy.model.generate
    for i in (0, COUNT // 2, COUNT - 1):
        ids = torch.tensor([PROMPTS[i]], device=DEVICE)
        count = len(made[i])
        with policy.steer(torch.tensor(ROWS[i : i + 1])):
            out = generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        # generate forbids the end tokens that the sampler goes on behind
        own = out[0, ids.shape[1] :].tolist()
        ends = [k for k, token in enumerate(made[i]) if token in policy.end_ids]
        until = ends[0] if ends else count
        assert own[:until] == made[i][:until]
