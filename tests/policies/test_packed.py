"""Packed sequences against the model by itself on each of them."""

import pytest
import torch
from small_models import small_model

import clp_kernels
from clp import Policy
from clp.policies.attention import rows
from clp.policies.packed import Packed

WINDOW = 3
MODELS = {
    "llama": {}, "gpt2": {}, "mistral": {"sliding_window": WINDOW}, "qwen3_moe": {},
}  # fmt: skip
# Three share a beginning, two of these their weights; the last is another's beginning.
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 3], [5, 6, 7, 8, 1], [9, 9], [5, 6, 7]]
WEIGHTS = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])


def padded(left):
    """Ids and mask [N, S], with padding of id 2, on one side or by turns."""
    ids, mask = torch.full((5, 9), 2), torch.zeros(5, 9, dtype=torch.long)
    for i, sequence in enumerate(SEQUENCES):
        start = 9 - len(sequence) if left else i % 2
        ids[i, start : start + len(sequence)] = torch.tensor(sequence)
        mask[i, start : start + len(sequence)] = 1
    return ids, mask


def policy_of(name, **options):
    torch.manual_seed(0)
    model = small_model(name, **MODELS[name], **options)
    generator = torch.Generator().manual_seed(0)
    clp_kernels.inject(model, ["a", "b"], r=2, generator=generator)
    policy = Policy(model, None, ["a", "b"], name)
    for parameter in policy.trainable_parameters().values():
        parameter.data.normal_(std=0.2, generator=generator)
    return policy


def states(policy, packed):
    with policy.steer(WEIGHTS[packed.examples]):
        return policy.hidden_states(packed)


def test_what_sequences_with_equal_weights_begin_with_is_there_once():
    ids, mask = padded(left=True)
    packed = Packed(ids, mask, WEIGHTS)
    assert packed.tokens[:, 0].tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 3, 5, 6, 7, 8, 1, 9, 9]
    assert packed.positions[:, 0].tolist() == [*range(8), 3, *range(5), 0, 1]
    assert packed.examples.tolist() == [0] * 8 + [1] + [2] * 5 + [3] * 2
    for i, sequence in enumerate(SEQUENCES):
        there = packed.places[i][mask[i] == 1]
        assert packed.tokens[there, 0].tolist() == sequence
        assert (WEIGHTS[packed.examples[there]] == WEIGHTS[i]).all()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_gradients_are_those_of_each_sequence_by_itself(name, left):
    policy = policy_of(name, dtype=torch.float64)
    ids, mask = padded(left)
    packed = Packed(ids, mask, WEIGHTS)
    hidden = states(policy, packed)[packed.places]
    upstream = torch.randn(hidden.shape, dtype=torch.float64)
    parameters = list(policy.trainable_parameters().values())
    got = torch.autograd.grad((hidden * upstream)[mask == 1].sum(), parameters)
    total = torch.zeros((), dtype=torch.float64)
    for i, sequence in enumerate(SEQUENCES):
        with policy.steer(WEIGHTS[i : i + 1]):
            plain = policy.model.base_model(torch.tensor([sequence]), use_cache=False)
        own = plain.last_hidden_state[0]
        torch.testing.assert_close(hidden[i][mask[i] == 1], own, rtol=1e-5, atol=1e-6)
        total = total + (own * upstream[i][mask[i] == 1]).sum()
    wanted = torch.autograd.grad(total, parameters)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_the_gradient_of_tokens_taken_several_times_has_the_same_bits_in_every_run():
    """A sum made by atomics, as that of x[index] is on several threads, differs."""
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(False)  # a fixture has switched them on, and off again
    torch.set_num_threads(4)
    try:
        x = torch.randn(20, 4, 32, requires_grad=True)
        index, upstream = torch.randint(0, 20, (60, 60)), torch.randn(60, 60, 4, 32)
        assert torch.equal(rows(x, index), x[index])
        runs = [torch.autograd.grad(rows(x, index), x, upstream)[0] for _ in range(10)]
        wanted = torch.zeros(20, 4, 32).index_add_(0, index.flatten(), upstream.flatten(0, 1))
        torch.testing.assert_close(runs[0], wanted, rtol=1e-5, atol=1e-4)
        assert all(torch.equal(runs[0], run) for run in runs[1:])
    finally:
        torch.set_num_threads(before)


def test_the_models_attention_is_its_own_again_afterwards():
    policy = policy_of("llama")
    before = policy.model.config._attn_implementation
    states(policy, Packed(*padded(left=True), WEIGHTS))
    assert policy.model.config._attn_implementation == before
