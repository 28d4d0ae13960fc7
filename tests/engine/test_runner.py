"""The runner: memory within its bound, and the padded step that CUDA captures, on the CPU."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
from cases import F32, F64
from decoding_alone import new_spread_policy, token_ids, without_end
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clp.engine.cuda_graphs import FILTERS, CudaGraphs, common_value, padded_batch, step_size
from clp.engine.runner import Drawn, Runner
from clp.engine.sampler import Sampler, SamplingParams, with_seeds
from clp.engine.scheduler import Scheduler
from clp.engine.slot_model import SlotModel
from clp_kernels import checks
from clp_kernels.testing import assert_within_budget

BYTES = 4 * 2 * 2 * 32 * 4  # tiny: layers, keys and values, heads, width, float32
WEIGHTS = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]]


def prompts(lengths):
    return [token_ids(n, seed) for seed, n in enumerate(lengths)]


def test_padded_batch():
    sizes = [padded_batch(n) for n in range(1, 130)]
    assert sizes[:8] == [1, 2, 4, 4, 8, 8, 8, 8]
    larger = {9: 16, 16: 16, 17: 24, 63: 64, 64: 64, 65: 96, 96: 96, 97: 128}
    assert {n: padded_batch(n) for n in larger} == larger
    assert sizes == sorted(sizes) and all(s >= n for n, s in enumerate(sizes, start=1))


def test_common_value():
    assert common_value([0.5, 0.5]) == 0.5 and common_value([0]) == 0
    assert common_value([0.5, 0.4]) is None


# Memory


def with_scheduler(policy, bound, spare=0):
    """A runner, and a function that reserves slots as the sampler does."""
    runner = Runner(policy, 8, bound)
    runner.spare = int(spare)
    scheduler = Scheduler(8, runner.fits)

    def reserve(slots, length):
        scheduler.reserve(slots, length)
        while scheduler.actions:
            runner.apply(scheduler.actions.popleft())

    return runner, reserve


def test_bytes_of_a_token_and_what_is_allocated(policy):
    runner, reserve = with_scheduler(policy, 2**20)
    assert runner.bytes_per_token == BYTES
    assert runner.cache_bytes == 0 and runner.slots == 0  # the check leaves nothing
    reserve(2, 17)
    assert runner.slots == 3 and runner.cache_bytes == 3 * 32 * BYTES
    reserve(3, 5)  # there is room
    assert runner.cache_bytes == 3 * 32 * BYTES
    runner.resize(0, 0)
    assert runner.cache_bytes == 0


@given(
    bound=st.integers(0, 40 * 16),
    asked=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 200)), max_size=6),
    spare=st.booleans(),
)
def test_what_is_allocated_never_exceeds_the_bound(policy, bound, asked, spare):
    runner, reserve = with_scheduler(policy, bound * BYTES, spare)
    for slots, length in asked:
        fits = (slots + spare) * -(-length // 16) * 16 <= bound
        assert runner.fits(slots, length) == fits
        if fits:
            reserve(slots, length)
            cache = runner.models[0].cache
            assert slots <= runner.slots <= 8 and cache.capacity >= length
            assert cache.slots == runner.slots + spare
        assert runner.cache_bytes <= bound * BYTES


@pytest.mark.parametrize("spare", [0, 1])
def test_a_sampler_stays_within_its_bound_and_finishes(policy, spare):
    bound = 180 * BYTES
    sampler = Sampler(policy, max_batch_size=8, cache_gib=bound / 2**30)
    sampler.runner.spare = spare
    lengths, most = [3, 40, 5, 70, 3, 3, 20, 3, 60, 2], 0
    requests = [
        sampler.submit(p, WEIGHTS[i % 4], without_end(8, seed=i))
        for i, p in enumerate(prompts(lengths))
    ]
    while sampler.unfinished:
        sampler.step()
        assert sampler.cache_bytes <= bound
        most = max(most, sampler.cache_bytes)
    assert most > bound / 2
    assert all(len(r.completions[0].token_ids) == 8 for r in requests)
    with pytest.raises(ValueError, match="exceeds the cache"):
        sampler.submit(prompts([120])[0], WEIGHTS[0], SamplingParams(max_tokens=100))


# The padded step


class PaddedRunner(Runner):
    """Runs on the CPU what CUDA captures: padded sizes and lengths, slots without a sequence."""

    def decode(self, sequences, first=0):
        count = len(sequences)
        params = [s.request.params for s in sequences]
        filters = [common_value([getattr(p, name) for p in params]) for name in FILTERS]
        longest = max(s.cached for s in sequences) + 1
        size = step_size(count, longest, filters, self.slots, self.capacity)
        self.sizes.append((count, size.slots, size.length))
        tensors = [t for model in self.models for t in model.cache.tensors()]
        before = [t[count : self.slots].clone() for t in tensors]
        state = self.state.ints[:, count:].clone()
        self.state.activate(count)
        drawn, _ = self.padded_step(size)
        now = [t[count : self.slots] for t in tensors]
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        # Token, length, position and seed of the next sequence; the step sets `active`.
        assert torch.equal(state[[0, 1, 2, 3]], self.state.ints[[0, 1, 2, 3], count:])
        return Drawn(drawn.tokens[:count].tolist(), drawn.logprobs[:count].tolist(), {})


def padded(policy, **options):
    sampler = Sampler(policy, **options)
    sampler.runner.__class__ = PaddedRunner
    sampler.runner.spare, sampler.runner.sizes = 1, []
    return sampler


def each(count, **changes):
    return [without_end(3 + 5 * (i % 4), seed=i, **changes) for i in range(count)]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}])
def test_a_padded_step_draws_the_same_and_touches_no_other_slot(policy, changes):
    texts, weights = prompts([3, 9, 1, 20, 5, 30]), [WEIGHTS[i % 4] for i in range(6)]
    sampler = padded(policy, max_batch_size=8)
    done = sampler.generate(texts, weights, each(6, **changes))
    plain, exact = (
        Sampler(p, max_batch_size=8).generate(texts, weights, each(6, **changes))
        for p in (policy, new_spread_policy(torch.float64))
    )
    for completions in (plain, exact):
        assert [c.token_ids for c in done] == [c.token_ids for c in completions]
    # A difference of the two in float32 depends on the processor's GEMM at 6 and at 8 sequences:
    # 1.5e-5 with AVX-512, under 1e-5 with AVX2.
    assert_within_budget(
        *(
            torch.tensor([p for c in completions for p in c.logprobs], dtype=dtype)
            for completions, dtype in ((done, F32), (exact, F64), (plain, F32))
        )
    )
    assert any(size > count for count, size, _ in sampler.runner.sizes)
    assert any(size == count for count, size, _ in sampler.runner.sizes)


def test_a_padded_step_leaves_a_prompt_alone_that_is_half_prefilled(policy):
    """The sequence after the decoding ones is within the padded size, and has a token to feed."""
    sampler = padded(policy, max_batch_size=8, max_prefill_tokens=8)
    texts, weights = prompts([5, 4, 3, 60, 50]), [WEIGHTS[i % 4] for i in range(5)]
    params = with_seeds(without_end(14), range(5))
    done = sampler.generate(texts, weights, params)
    halves = [count for count, size, _ in sampler.runner.sizes if count == 3 and size == 4]
    assert halves
    wanted = Sampler(policy).generate(texts, weights, params)
    assert [c.token_ids for c in done] == [c.token_ids for c in wanted]


def test_a_sequence_that_failed_leaves_a_token_that_can_be_fed(policy):
    sampler = padded(policy, max_batch_size=8)
    texts, params = prompts([3, 4, 5, 6]), with_seeds(without_end(6), range(4))
    cases = zip(texts, [*WEIGHTS[:3], [1e30, 1e30]], params, strict=True)
    requests = [sampler.submit(*case, simplex=False) for case in cases]
    while sampler.unfinished:
        sampler.step()
    assert [r.completions[0].finish_reason for r in requests] == ["length"] * 3 + ["error"]
    wanted = Sampler(policy).generate(texts[:3], WEIGHTS[:3], params[:3])
    assert [r.completions[0].token_ids for r in requests[:3]] == [c.token_ids for c in wanted]


# Captures


class NoHostReads(TorchDispatchMode):
    """Refuses what a capture of CUDA refuses: to read a tensor on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in HOST_READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


HOST_READS = {
    torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.item,
    torch.ops.aten.masked_select, torch.ops.aten.is_nonzero, torch.ops.aten.equal,
}  # fmt: skip


class CpuGraphs(CudaGraphs):
    """Captures under `NoHostReads`, and replays by running the step again into the same output."""

    def __init__(self, state):
        super().__init__()
        self.state, self.attempts = state, 0

    def warm_up(self, step, state):
        before = state.ints.clone()
        for _ in range(2):
            step()
            state.ints.copy_(before)

    def capture(self, step):
        self.attempts += 1
        before = self.state.ints.clone()
        # The ops look at values on the CPU alone.
        with patch.object(checks, "readable", lambda value: False), NoHostReads():
            output = step()
        self.state.ints.copy_(before)  # a capture computes nothing

        def replay():
            for old, new in zip(output, step(), strict=True):
                pairs = (
                    [(old, new)] if isinstance(old, torch.Tensor) else zip(old, new, strict=True)
                )
                for mine, its in pairs:
                    mine.copy_(its)

        return SimpleNamespace(replay=replay), output


def capturing(policy, **options):
    """A sampler whose runner captures, as on CUDA."""
    sampler = Sampler(policy, **options)
    runner = sampler.runner
    runner.spare, runner.graphs = 1, CpuGraphs(runner.state)
    runner.try_capture()
    return sampler


def test_a_decode_step_reads_nothing_on_the_host(policy):
    sampler = capturing(policy, max_batch_size=8)
    assert sampler.runner.graphs.refusal is None and sampler.runner.graphs.attempts == 1
    texts, weights = prompts([3, 9, 1, 20, 5, 30]), [WEIGHTS[i % 4] for i in range(6)]
    params = each(6, top_k=5, top_p=0.9)
    done = sampler.generate(texts, weights, params)
    wanted = Sampler(policy, max_batch_size=8).generate(texts, weights, params)
    assert [c.token_ids for c in done] == [c.token_ids for c in wanted]
    assert len(sampler.runner.graphs.captured) >= 2 and sampler.runner.graphs.refusal is None


class Reads(nn.Module):
    """A part of a model that looks at its input on the host."""

    def forward(self, x):
        return x if float(x.sum()) != 1e9 else -x


def test_a_model_that_cannot_be_captured_runs_without(policy):
    """Known when the sampler is made, and remembered: no request ends for it."""
    own = new_spread_policy()
    mlp = own.model.model.layers[1].mlp
    mlp.act_fn = nn.Sequential(mlp.act_fn, Reads())
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph .* not permitted"):
        sampler = capturing(own, max_batch_size=8)
    graphs = sampler.runner.graphs
    assert "operation not permitted" in graphs.refusal and graphs.attempts == 1
    texts, weights = prompts([3, 9, 1]), WEIGHTS[:3]
    done = sampler.generate(texts, weights, each(3))
    wanted = Sampler(policy, max_batch_size=8).generate(texts, weights, each(3))
    assert [c.token_ids for c in done] == [c.token_ids for c in wanted]
    assert not graphs.captured and graphs.attempts == 1


def test_a_later_capture_that_fails_ends_no_request(policy):
    sampler = capturing(policy, max_batch_size=8)
    graphs = sampler.runner.graphs
    graphs.capture = Mock(side_effect=RuntimeError("capture"))
    texts, weights = prompts([3, 9, 1]), WEIGHTS[:3]
    with pytest.warns(UserWarning, match="without one, slower: capture"):
        done = sampler.generate(texts, weights, each(3))
    wanted = Sampler(policy, max_batch_size=8).generate(texts, weights, each(3))
    assert [c.token_ids for c in done] == [c.token_ids for c in wanted]
    assert graphs.capture.call_count == 1


def test_no_memory_for_a_capture_is_not_remembered(policy):
    sampler = capturing(policy, max_batch_size=8)
    graphs, capture = sampler.runner.graphs, sampler.runner.graphs.capture
    graphs.capture = Mock(side_effect=torch.OutOfMemoryError("2 GiB"))
    with pytest.raises(RuntimeError, match="prompt 0 failed: OutOfMemoryError: 2 GiB"):
        sampler.generate(prompts([3]), [WEIGHTS[0]], each(1))
    assert graphs.refusal is None
    graphs.capture = capture
    assert sampler.generate(prompts([3]), [WEIGHTS[0]], each(1))[0].error is None
    assert graphs.captured


def test_forwards_and_captures_run_on_the_policys_device(policy, monkeypatch):
    """Which need not be the current one: a stream, a graph and Triton's launches take that."""
    inside, seen = [], []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    made = CpuGraphs.capture
    monkeypatch.setattr(CpuGraphs, "capture", lambda *a: seen.append(len(inside)) or made(*a))
    for name in ("logits", "prefill"):
        whole = getattr(SlotModel, name)
        monkeypatch.setattr(
            SlotModel, name,
            lambda *a, whole=whole: seen.append(len(inside)) or whole(*a),
        )  # fmt: skip
    sampler = capturing(policy, max_batch_size=8)
    sampler.generate(prompts([3, 9]), WEIGHTS[:2], each(2))
    sampler.runner.graphs = None
    sampler.generate(prompts([4, 7]), WEIGHTS[:2], each(2))
    assert len(seen) > 20 and all(count == 1 for count in seen)
