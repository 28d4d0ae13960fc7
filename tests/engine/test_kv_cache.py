"""Slots of keys and values, against an attention in float64 that is written out here."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clp.engine.attention import Decode, Prefill
from clp.engine.kv_cache import KVCache, Segment
from clp.engine.slot_model import SlotModel
from clp.policies.attention import IMPLEMENTATION, planned_attention

D, DV = 8, 4  # keys and values of other widths
DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6}


def naive(q, k, v, scale, window):
    """q [H, n, d] of the last n positions, k [heads, N, d], v [heads, N, dv] -> [n, H, dv]."""
    q, k, v = q.double(), k.double(), v.double()
    group, total = q.shape[0] // k.shape[0], k.shape[1]
    out = torch.empty(q.shape[1], q.shape[0], v.shape[-1], dtype=torch.float64)
    for h in range(q.shape[0]):
        for i in range(q.shape[1]):
            own = total - q.shape[1] + i
            first = 0 if window is None else max(0, own - window + 1)
            scores = k[h // group, first : own + 1] @ q[h, i] * scale
            out[i, h] = scores.softmax(0) @ v[h // group, first : own + 1]
    return out


class Tokens:
    """Random q, k, v of sequences, and a cache whose slots they go into."""

    def __init__(self, lengths, heads=2, group=2, slots=None, capacity=32, dtype=torch.float64):
        generator = torch.Generator().manual_seed(sum(lengths) + 100 * heads + group)

        def draw(count, d):
            return [torch.randn(count, n, d, generator=generator, dtype=dtype) for n in lengths]

        self.q, self.k = draw(heads * group, D), draw(heads, D)
        self.v = draw(heads, DV)
        self.cache = KVCache()
        self.cache.resize(slots or len(lengths), capacity)

    def at(self, parts):
        """q, k, v [T, heads, 1, d] of (sequence, start, stop), end to end."""
        return [
            torch.cat([x[i][:, a:b] for i, a, b in parts], 1).transpose(0, 1)[:, :, None]
            for x in (self.q, self.k, self.v)
        ]

    def prefill(self, parts, slots=None, scale=0.3, window=None, layer=0):
        """Prefills (sequence, start, stop), each into the slot of its sequence."""
        slots = slots or range(len(self.q))
        segments = [Segment(slots[i], a, b) for i, a, b in parts]
        q, k, v = self.at(parts)
        return Prefill(self.cache, segments, q.device).attend(layer, q, k, v, scale, window)[:, 0]

    def expected(self, i, start, stop, scale=0.3, window=None):
        q, k, v = self.q[i][:, start:stop], self.k[i][:, :stop], self.v[i][:, :stop]
        return naive(q, k, v, scale, window)


def close(got, wanted, dtype=torch.float64):
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, atol=DTYPES[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3, 11, 12, 40])
@pytest.mark.parametrize("group", [1, 3])
def test_prefill_of_several_prompts_in_any_slots(group, window, dtype):
    tokens = Tokens([12, 1, 7], group=group, slots=5, dtype=dtype)
    parts = [(0, 0, 12), (1, 0, 1), (2, 0, 7)]
    out = tokens.prefill(parts, slots=[4, 0, 2], window=window)
    wanted = [tokens.expected(i, a, b, window=window) for i, a, b in parts]
    close(out, torch.cat(wanted), dtype)
    keys, values = tokens.cache.tensors()
    for i, slot in enumerate([4, 0, 2]):
        n = tokens.k[i].shape[1]
        assert torch.equal(keys[slot, :, :n], tokens.k[i])
        assert torch.equal(values[slot, :, :n], tokens.v[i])
        assert not keys[slot, :, n:].any()
    assert not keys[[1, 3]].any() and not values[[1, 3]].any()


@given(
    cuts=st.lists(st.integers(1, 19), max_size=4, unique=True).map(sorted),
    window=st.sampled_from([None, 1, 2, 5, 19, 20, 21]),
)
def test_prefill_in_pieces_is_the_whole(cuts, window):
    tokens = Tokens([20, 6])
    ends = [*cuts, 20]
    for start, stop in zip([0, *cuts], ends, strict=True):
        parts = [(0, start, stop)]
        if stop == 20:  # beside another prompt, which begins
            parts.append((1, 0, 6))
        out = tokens.prefill(parts, window=window)
        close(out[: stop - start], tokens.expected(0, start, stop, window=window))
    close(out[-6:], tokens.expected(1, 0, 6, window=window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 4, 10, 100])
@pytest.mark.parametrize(("heads", "group"), [(2, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("lengths", [[10, 3, 1, 7], [6, 6, 6], [1, 1], [5]])
def test_decode_of_ragged_lengths(lengths, heads, group, window, dtype):
    """Each sequence's last token in a step, behind a prefill of the rest (of none for one)."""
    tokens = Tokens(lengths, heads, group, slots=len(lengths) + 1, dtype=dtype)
    started = [(i, 0, n - 1) for i, n in enumerate(lengths) if n > 1]
    if started:
        tokens.prefill(started)
    else:
        tokens.cache.layer(0, *tokens.at([(0, 0, 1)])[1:])
    cached, longest = torch.tensor(lengths) - 1, max(lengths)
    even = len(set(lengths)) == 1
    q, k, v = tokens.at([(i, n - 1, n) for i, n in enumerate(lengths)])
    wanted = torch.cat([tokens.expected(i, n - 1, n, window=window) for i, n in enumerate(lengths)])
    for is_even in {even, False}:  # a mask that is not needed changes nothing
        step = Decode(tokens.cache, 0, cached, longest, is_even)
        close(step.attend(0, q, k, v, 0.3, window)[:, 0], wanted, dtype)
    # Reading more than the longest sequence holds does not matter either.
    step = Decode(tokens.cache, 0, cached, tokens.cache.capacity, False)
    close(step.attend(0, q, k, v, 0.3, window)[:, 0], wanted, dtype)
    assert not tokens.cache.tensors()[0][-1].any()


def test_decode_of_one_slot_alone_leaves_the_others():
    tokens = Tokens([4, 9, 6])
    tokens.prefill([(i, 0, n - 1) for i, n in enumerate([4, 9, 6])])
    before = [t.clone() for t in tokens.cache.tensors()]
    q, k, v = tokens.at([(1, 8, 9)])
    out = Decode(tokens.cache, 1, torch.tensor([8]), 9, True).attend(0, q, k, v, 0.3, None)
    close(out[:, 0], tokens.expected(1, 8, 9))
    for old, new in zip(before, tokens.cache.tensors(), strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
        assert torch.equal(old[1, :, :8], new[1, :, :8])
        assert new[1, :, 8].any() and not new[1, :, 9:].any()


def test_a_sequence_with_another_target_writes_there_alone():
    tokens = Tokens([4, 9, 6], slots=4)
    tokens.prefill([(i, 0, n - 1) for i, n in enumerate([4, 9, 6])])
    before = [t.clone() for t in tokens.cache.tensors()]
    q, k, v = tokens.at([(0, 3, 4), (1, 8, 9), (2, 5, 6)])
    cached, targets = torch.tensor([3, 8, 5]), torch.tensor([0, 3, 2])
    step = Decode(tokens.cache, 0, cached, 9, False, targets)
    out = step.attend(0, q, k, v, 0.3, None)[:, 0]
    close(out[[0, 2]], torch.cat([tokens.expected(0, 3, 4), tokens.expected(2, 5, 6)]))
    for old, new in zip(before, tokens.cache.tensors(), strict=True):
        assert torch.equal(old[1], new[1])
        assert new[3, :, 8].any() and not new[3, :, :8].any()


def test_layers_are_apart_and_a_plan_serves_all_of_them():
    tokens = Tokens([5, 3])
    plan = Prefill(tokens.cache, [Segment(0, 0, 5), Segment(1, 0, 3)], torch.device("cpu"))
    q, k, v = tokens.at([(0, 0, 5), (1, 0, 3)])
    first = plan.attend(0, q, k, v, 0.3, None)
    second = plan.attend(1, q, 2 * k, v, 0.15, None)
    torch.testing.assert_close(first, second, atol=1e-15, rtol=0)
    assert tokens.cache.layers == 2
    assert torch.equal(tokens.cache.tensors()[2], 2 * tokens.cache.tensors()[0])


def test_the_default_scale_is_that_of_the_width():
    tokens = Tokens([5])
    q, k, v = tokens.at([(0, 0, 5)])
    out = Prefill(tokens.cache, [Segment(0, 0, 5)], q.device).attend(0, q, k, v, None, None)
    close(out[:, 0], tokens.expected(0, 0, 5, scale=D**-0.5))


# Memory


@pytest.mark.parametrize("new", [(5, 32), (3, 48), (6, 64), (2, 32), (3, 16), (1, 16), (4, 16)])
def test_resize_keeps_what_fits(new):
    tokens = Tokens([20, 7, 12])
    tokens.prefill([(0, 0, 20), (1, 0, 7), (2, 0, 12)])
    before = [t.clone() for t in tokens.cache.tensors()]
    tokens.cache.resize(*new)
    assert (tokens.cache.slots, tokens.cache.capacity) == new
    slots, length = min(new[0], 3), min(new[1], 32)
    for old, now in zip(before, tokens.cache.tensors(), strict=True):
        assert (now.shape[0], now.shape[2]) == new
        assert torch.equal(now[:slots, :, :length], old[:slots, :, :length])
        assert not now[slots:].any() and not now[:, :, length:].any()


def test_resize_to_nothing_and_back():
    tokens = Tokens([5])
    tokens.prefill([(0, 0, 5)])
    tokens.cache.resize(0, 0)
    assert sum(t.nbytes for t in tokens.cache.tensors()) == 0
    assert tokens.cache.bytes_per_token == 2 * (D + DV) * 8  # of an empty cache, too
    tokens.cache.resize(2, 16)
    close(tokens.prefill([(0, 0, 5)], slots=[1]), tokens.expected(0, 0, 5))


@pytest.mark.parametrize("count", [0, 1, 7, 12])
def test_copy(count):
    tokens = Tokens([12, 9], slots=3)
    tokens.prefill([(0, 0, 12), (1, 0, 9)])
    before = [t.clone() for t in tokens.cache.tensors()]
    tokens.cache.copy(0, 1, count)
    for old, now in zip(before, tokens.cache.tensors(), strict=True):
        assert torch.equal(now[1, :, :count], old[0, :, :count])
        assert torch.equal(now[1, :, count:], old[1, :, count:])
        assert torch.equal(now[[0, 2]], old[[0, 2]])


def test_a_copied_beginning_goes_on_as_its_own():
    tokens = Tokens([12, 12])
    for x in (tokens.q, tokens.k, tokens.v):
        x[1][:, :8] = x[0][:, :8]
    tokens.prefill([(0, 0, 12)])
    tokens.cache.copy(0, 1, 8)
    close(tokens.prefill([(1, 8, 12)]), tokens.expected(1, 8, 12))


def test_clear_and_an_empty_cache():
    tokens = Tokens([12, 9])
    tokens.cache.copy(0, 1, 3)
    tokens.cache.clear(0)  # nothing yet: no layer has run
    assert tokens.cache.layers == 0 and tokens.cache.bytes_per_token == 0
    tokens.prefill([(0, 0, 12), (1, 0, 9)])
    tokens.cache.tensors()[0][0] = torch.nan
    kept = tokens.cache.tensors()[0][1].clone()
    tokens.cache.clear(0)
    assert not tokens.cache.tensors()[0][0].any()
    assert torch.equal(tokens.cache.tensors()[0][1], kept)


# The attention function


class Part(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.layer_idx = config, 0


def test_a_run_names_the_function_in_every_configuration_and_puts_back_what_was():
    text = SimpleNamespace(_attn_implementation="eager")
    whole, other = SimpleNamespace(_attn_implementation="sdpa"), SimpleNamespace(size=3)
    model = nn.Sequential(Part(whole), Part(text), Part(text), Part(other))
    slot_model = SlotModel(model)

    def body(error):
        assert whole._attn_implementation == text._attn_implementation == IMPLEMENTATION
        raise error

    with pytest.raises(KeyError):
        slot_model.run(body, KeyError())
    assert (whole._attn_implementation, text._attn_implementation) == ("sdpa", "eager")
    assert not hasattr(other, "_attn_implementation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": None}, "Part does not pass keyword arguments on"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(1)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"attention_mask": torch.zeros(1)}, "a mask of its own"),
    ],
)
def test_attention_of_another_kind_is_refused(changes, message):
    tokens = Tokens([3])
    plan = Prefill(tokens.cache, [Segment(0, 0, 3)], torch.device("cpu"))
    q, k, v = tokens.at([(0, 0, 3)])
    options = {"attention_mask": None, "scaling": 0.3, "plan": plan}
    out, nothing = planned_attention(Part(None), q, k, v, softcap=None, **options)
    close(out[:, 0], tokens.expected(0, 0, 3))
    assert nothing is None
    with pytest.raises(ValueError, match=message):
        planned_attention(Part(None), q, k, v, **(options | changes))
