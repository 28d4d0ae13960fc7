"""What the sampler must give: each request alone on a fresh sampler, and float64 for ties."""

import math
from contextlib import nullcontext
from functools import cache
from typing import ClassVar

import torch
from tiny_runs import randomised

import clp_kernels
from clp.engine.sampler import Sampler, SamplingParams
from clp_kernels.ops.sample import reference

TOLERANCE = 1e-4  # of log-probabilities and of scores that count as a tie; float32 rounds at 1e-5


def new_spread_policy(dtype=torch.float32):
    """The tiny model with adapters so large that all weights write something else."""
    return randomised(0.15, 5, r=4, dtype=dtype)


spread_policy = cache(new_spread_policy)  # shared: not to be changed


def token_ids(count, seed=0):
    """Random ids of the tiny model without its special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 1024, (count,), generator=generator).tolist()


def without_end(max_tokens, **changes):
    """Parameters of completions that have their whole length."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **({"seed": 1} | changes))


class Alone:
    """Completions of requests, each decoded one at a time; remembered by what was asked of which
    policy, also for other tests of the process."""

    _known: ClassVar = {}

    def __init__(self, max_prefill_tokens=2048, invariant=False):
        self._tokens, self._invariant = max_prefill_tokens, invariant
        self.flips = self.compared = 0

    def of(self, request):
        """The completions of a request alone on a fresh sampler with one slot."""
        values = spread_policy().trainable_parameters().values()
        numbers = tuple(float(p.detach().double().abs().sum()) for p in values)
        asked = (tuple(request.prompt_ids), tuple(request.weights.tolist()), request.params)
        key = (numbers, self._tokens, self._invariant, *asked)
        if key not in self._known:
            alone = Sampler(spread_policy(), max_batch_size=1, max_prefill_tokens=self._tokens)
            own = alone.submit(request.prompt_ids, request.weights, request.params, simplex=False)
            with clp_kernels.batch_invariant() if self._invariant else nullcontext():
                alone.finish([own])
            self._known[key] = own.completions
        return self._known[key]

    def check(self, *requests):
        """Every completion is the one alone; what was cancelled or failed is its beginning."""
        each = ((q, *s) for q in requests for s in zip(q.sequences, self.of(q), strict=True))
        for request, own, alone in each:
            got = own.completion
            self.compared += 1
            count = len(got.token_ids)
            _check_alone(request, got)
            pairs = enumerate(zip(got.token_ids, alone.token_ids, strict=False))
            parted = (i for i, (mine, other) in pairs if mine != other)
            same = next(parted, min(count, len(alone.token_ids)))
            bound = 0.0 if self._invariant else TOLERANCE
            for mine, other in zip(got.logprobs[:same], alone.logprobs[:same], strict=True):
                assert abs(mine - other) <= bound, (request.params, got, alone)
            if request.params.logprobs:
                assert len(got.top_logprobs) == count
                tops = (c.top_logprobs[:same] for c in (got, alone))
                for mine, other in zip(*tops, strict=True):
                    pairs = zip(mine.values(), other.values(), strict=True)
                    assert all(abs(a - b) <= bound for a, b in pairs), (got, alone)
            if same < min(count, len(alone.token_ids)):
                assert not self._invariant, (request.params, got, alone)
                for token in (got.token_ids[same], alone.token_ids[same]):
                    assert can_be_drawn(request, got.token_ids[:same], token, own.index)
                self.flips += 1
            elif got.finish_reason == "abort":
                assert count <= len(alone.token_ids)
            elif got.finish_reason != "error" or alone.finish_reason == "error":
                assert count == len(alone.token_ids)
                assert (got.finish_reason, got.text) == (alone.finish_reason, alone.text)


def _check_alone(request, got):
    """What holds of a completion without another to compare: ends, stops, probabilities."""
    params, ids = request.params, got.token_ids
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else spread_policy().end_ids)
    assert len(ids) == len(got.logprobs) <= params.max_tokens
    assert not stops & set(ids[:-1])
    assert not any(s in got.text for s in params.stop)
    if ids and ids[-1] in stops:
        assert got.finish_reason in ("stop", "error")
    elif got.finish_reason == "length":
        assert len(ids) == params.max_tokens
    elif got.finish_reason == "stop":
        assert params.stop
    for token, logprob, top in zip(ids, got.logprobs, got.top_logprobs or (), strict=False):
        values = list(top.values())
        likeliest = values[: params.logprobs]
        assert len(likeliest) == params.logprobs and likeliest == sorted(likeliest, reverse=True)
        assert abs(top[token] - logprob) <= TOLERANCE
        assert list(top)[params.logprobs :] in ([], [token])
        assert token in list(top)[: params.logprobs] or logprob <= likeliest[-1] + TOLERANCE


@torch.no_grad()
def can_be_drawn(request, before, token, index):
    """Whether float64 draws the token too, or holds it to tie with what it draws.

    A tie: its perturbed score is within TOLERANCE of the best, and filters keep it when moved by
    that much.
    """
    judge, params = spread_policy(torch.float64), request.params
    ids = request.prompt_ids + before
    with judge.steer(request.weights[None]):
        z = judge.model(torch.tensor([ids])).logits[0, -1:]
    if params.temperature == 0:
        return bool(z[0, token] >= z.max() - TOLERANCE)
    scaled = z / params.temperature
    logp = torch.log_softmax(scaled, -1)
    surely = _kept(logp, params, -TOLERANCE)
    maybe = _kept(logp, params, TOLERANCE)
    key = torch.tensor([params.seed + index]), torch.tensor([len(before)])
    score = (scaled + reference.gumbel(reference.philox_uniform(*key, z.shape[1])))[0]
    best = score.masked_fill(~surely, -torch.inf).max()
    return bool(maybe[token] and score[token] >= best - TOLERANCE)


def _kept(logp, params, slack):
    """Which tokens [V] the filters keep if every bound is moved by `slack`."""
    kept = torch.ones_like(logp, dtype=torch.bool)
    if params.top_k:
        kept &= logp >= logp.topk(params.top_k).values[:, -1:] - slack
    p = logp.masked_fill(~kept, -torch.inf).softmax(-1)
    if params.top_p < 1:
        above = torch.where(p[0] > p[0][:, None] * (1 + slack), p[0], 0.0).sum(1)
        kept &= above < params.top_p + slack
    if params.min_p:
        kept &= logp >= logp.max() + math.log(params.min_p) - slack
    return kept[0]


@cache
@torch.no_grad()
def keys_and_values(ids, weights):
    """Keys and values of every layer, each [heads, T, d], by transformers' own cache."""
    policy = spread_policy()
    with policy.steer(torch.tensor([weights])):
        past = policy.model(torch.tensor([ids]), use_cache=True).past_key_values
    return [t[0] for layer in past.layers for t in (layer.keys, layer.values)]
