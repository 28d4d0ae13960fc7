"""The device's part of the sampler: per-slot state, prefill, and one decoding step for all rows.

A decoding step runs the policy's networks on one token of each slot from 0 on, mixes and draws with
the op `sample`, and writes the drawn tokens where the next step reads them. Nothing in it waits for
the device but the reading of what was drawn. On CUDA the step is captured as a graph for each size
of a few; rows of weights, seeds, lengths and filters are tensors that the graph reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import clp_kernels
from clp.engine.kv_cache import BLOCK, Decode, KVCache, Prefill, Segment
from clp.engine.model_check import fault
from clp.engine.model_state import ModelState
from clp.engine.recording import ROWS_NEEDED, Inputs, Recording, Unrecordable, record
from clp.engine.requests import Row
from clp.engine.turns import in_turn, locks_of
from clp.policies.interface import Steerable
from clp_kernels.invariant import is_batch_invariant
from clp_kernels.registry import BackendError

# Slot lengths that a CUDA graph is captured for are multiples of this.
GRAPH_LENGTH = 256
# What a model's code raises where it is not made for one token an example.
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
FILTERS = ("temperature", "top_k", "top_p", "min_p")


class Drawn(NamedTuple):
    """A step's tokens and log-probabilities by row; -1 where the logits were not numbers."""

    tokens: list[int]
    logprobs: list[float]
    top: dict[int, dict[int, float]]  # by row that asked for it


class Decoder:
    """Runs a policy's networks over slots.

    Args:
        policy: What is sampled from.
        max_batch_size: Slots at most.
        cache_bytes: Memory of all keys and values at most.

    Raises: ValueError for a model whose logits do not come out the same through the slots.
    """

    def __init__(self, policy: Steerable, max_batch_size: int, cache_bytes: int) -> None:
        self.policy, self.cache_bytes = policy, cache_bytes
        self.networks = list(policy.networks)
        self.caches = [KVCache(network.model) for network in self.networks]
        device, m = policy.device, len(policy.objectives)
        # A slot more on CUDA, where the rows of a captured step that have gone write.
        self.spare = int(device.type == "cuda")
        self._kind = self.networks[0].model.dtype, self.networks[0].model.device
        double = self._kind[0] == torch.float64
        ints = torch.zeros(6, max_batch_size, dtype=torch.int64, device=device)
        self.token, self.length, self.drawn, self.seed, self.top_k, self.alive = ints
        # Not rounded: a request's filters do not depend on whether others ask for the same.
        floats = torch.ones(3, max_batch_size, dtype=torch.float64, device=device)
        self.temperature, self.top_p, self.min_p = floats
        self._ints, self._floats = ints, floats
        self.weights = torch.zeros(
            max_batch_size, m, dtype=torch.float64 if double else torch.float32, device=device
        )
        self._steering: dict[tuple[int, int, int], Any] = {}
        # By number of rows, length and filters: (graph, its output). They share their memory: one
        # runs at a time, and its output is read before the next.
        self._graphs: dict[Any, Any] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        # On the CPU; None where a network's step cannot be recorded.
        self.recordings: list[Recording | None] = [None] * len(self.networks)
        self._recorded = self._own_code = False
        self._states: list[ModelState] = []  # at the last look
        self._look()
        self._check()
        # Keys and values of one token in all networks.
        self.bytes_per_token = sum(cache.bytes_per_token for cache in self.caches)

    # Memory

    @property
    def held_bytes(self) -> int:
        """Keys and values as they are allocated."""
        return sum(t.nbytes for cache in self.caches for t in cache.tensors())

    @property
    def slots(self) -> int:
        """How many slots there are for rows."""
        return max(0, self.caches[0].slots - self.spare)

    @property
    def capacity(self) -> int:
        """How many tokens each of them has room for."""
        return self.caches[0].capacity

    @property
    def longest(self) -> int:
        """Tokens of a slot that is alone."""
        return self.cache_bytes // ((1 + self.spare) * self.bytes_per_token) // BLOCK * BLOCK

    def fits(self, slots: int, length: int) -> bool:
        """Whether so many slots of so many tokens are within cache_bytes."""
        return (slots + self.spare) * _rounded(length) * self.bytes_per_token <= self.cache_bytes

    def reserve(self, slots: int, length: int, most: int) -> None:
        """At least so many slots (at most `most`) of at least so many tokens; contents stay.

        Grows the number of slots by half more than asked for, as far as memory allows.
        """
        capacity = max(self.capacity, _rounded(length))
        if not self.fits(slots, capacity):
            capacity = _rounded(length)  # longer ones have gone
        have = self.slots
        wanted = have if slots <= have else min(most, slots + slots // 2)
        while wanted > slots and not self.fits(wanted, capacity):
            wanted -= 1
        if (wanted, capacity) != (have, self.capacity):
            self._graphs.clear()
            for cache in self.caches:
                cache.resize(wanted + self.spare, capacity)

    def drop(self) -> None:
        """Gives all keys and values back."""
        self._graphs.clear()
        for cache in self.caches:
            cache.resize(0, 0)

    # Slots

    def place(self, first: int, rows: Sequence[Row]) -> None:
        """Writes the state of rows for the slots from `first` on."""
        here = slice(first, first + len(rows))
        params = [row.request.params for row in rows]
        device = self._ints.device
        ints = [
            # The token that is fed next, the tokens before it, those drawn.
            (row.last_id, row.length - 1, len(row.token_ids), row.seed, p.top_k, 1)
            for row, p in zip(rows, params, strict=True)
        ]
        floats = [(p.temperature, p.top_p, p.min_p) for p in params]
        self._ints[:, here] = torch.tensor(ints, dtype=torch.int64).t().to(device)
        self._floats[:, here] = torch.tensor(floats, dtype=torch.float64).t().to(device)
        weights = torch.stack([row.request.weights for row in rows])
        self.weights[here] = weights.to(device, self.weights.dtype)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` tokens of a slot into another."""
        for cache in self.caches:
            cache.copy(source, target, count)

    def spread(self, sources: Sequence[int], targets: Sequence[int], count: int) -> None:
        """Copies the first `count` tokens of slots into as many others, at once."""
        pair = torch.tensor([sources, targets], device=self._ints.device)
        for cache in self.caches:
            cache.spread(pair[0], pair[1], count)

    def move(self, source: int, target: int, count: int) -> None:
        """Copies a slot's tokens and state into another."""
        self.copy(source, target, count)
        for state in (self._ints, self._floats):
            state[:, target] = state[:, source]
        self.weights[target] = self.weights[source]

    def vacate(self, slot: int) -> None:
        """The slot's row has gone: a captured step feeds it a token and leaves it alone."""
        self.alive[slot] = self.length[slot] = 0
        self.token[slot] = 0  # it may be -1, which is no index

    def clear(self, slot: int) -> None:
        """Zeros in a slot (after values that are not finite)."""
        for cache in self.caches:
            cache.clear(slot)

    # Forward passes

    @in_turn
    @torch.inference_mode()
    def prefill(self, parts: Sequence[tuple[Row, Segment]]) -> None:
        """Puts tokens of prompts into their slots, all in one forward."""
        device = self._ints.device
        ids = [i for row, s in parts for i in row.request.prompt_ids[s.start : s.stop]]
        positions = [i for _, s in parts for i in range(s.start, s.stop)]
        slots = [s.slot for _, s in parts for _ in range(s.start, s.stop)]
        segments = [s for _, s in parts]
        rows = self.weights[torch.tensor(slots, device=device)]
        tokens, where = torch.tensor([ids, positions], device=device)[:, :, None]
        for network, cache in zip(self.networks, self.caches, strict=True):
            plan = Prefill(cache, segments, device)
            with network.steer(rows):
                # The body alone: a prompt's last token goes through the head in a decoding step.
                cache.run(
                    network.model.base_model,
                    input_ids=tokens,
                    position_ids=where,
                    use_cache=False,
                    slots=plan,
                )

    @in_turn
    @torch.inference_mode()
    def decode(self, rows: Sequence[Row], first: int = 0) -> Drawn:
        """Feeds one token of each row (in the slots from `first` on) and draws the next."""
        count, params = len(rows), [row.request.params for row in rows]
        longest = max(row.cached for row in rows) + 1
        filters = tuple(_same([getattr(p, name) for p in params]) for name in FILTERS)
        captured = self._ints.is_cuda and not self._own_code  # a capture has hooks run once
        if captured and first == 0 and not is_batch_invariant():
            drawn, mixed = self._replay(count, longest, filters)
        else:
            even = all(row.cached == longest - 1 for row in rows)
            drawn, mixed = self._step(slice(first, first + count), longest, even, filters)
        top = self._top([i for i, p in enumerate(params) if p.logprobs], params, mixed, first)
        tokens, logprobs = drawn.tokens[:count].tolist(), drawn.logprobs[:count].tolist()
        for i, found in top.items():
            found.setdefault(tokens[i], logprobs[i])
        return Drawn(tokens, logprobs, top)

    def _step(
        self,
        here: slice,
        longest: int,
        even: bool,
        filters: tuple[Any, ...],
        home: Tensor | None = None,
    ) -> tuple[clp_kernels.Sample, Tensor]:
        """One token for the slots of `here`; (what was drawn, logits [B, V] or [n, B, V])."""
        logits = self._logits(here, longest, even, home)
        mixing: dict[str, Any] = {}
        weights = self.policy.logit_weights(self.weights[here])
        if weights is not None:
            mixing = {"weights": weights, "mode": self.policy.mode}
        chosen = {
            name: getattr(self, name)[here] if value is None else value
            for name, value in zip(FILTERS, filters, strict=True)
        }
        key = {"seed": self.seed[here], "position": self.drawn[here]}
        try:
            drawn = clp_kernels.sample(logits, **mixing, **chosen, **key)
        except ValueError:
            # On the CPU the op refuses a row that is not finite; the others go on.
            drawn = self._sample_finite(logits, mixing, chosen | key)
        if home is None:
            self.token[here] = drawn.tokens
            self._ints[1:3, here] += 1  # length and drawn
        else:
            alive = self.alive[here]
            self.token[here] = torch.where(alive > 0, drawn.tokens, self.token[here])
            self._ints[1:3, here] += alive
        return drawn, logits

    def _logits(self, here: slice, longest: int, even: bool, home: Tensor | None) -> Tensor:
        tokens, lengths = self.token[here, None], self.length[here, None]
        count, found = here.stop - here.start, []
        for i, (network, cache) in enumerate(zip(self.networks, self.caches, strict=True)):
            plan = Decode(cache, here.start, self.length[here], longest, even, home)
            recording = self.recordings[i] if self._recorded else None
            with self._steer(i, here):
                if recording is not None:
                    logits = recording(Inputs(tokens, lengths, plan), count)
                else:
                    logits = cache.run(
                        network.model,
                        input_ids=tokens,
                        position_ids=lengths,
                        use_cache=False,
                        slots=plan,
                    ).logits
            found.append(logits[:, -1, : self.ids])
        if len(found) == 1 and self.policy.logit_weights(self.weights[:1]) is None:
            return found[0]
        return torch.stack(found)

    def _steer(self, network: int, here: slice) -> Any:
        """The context that steers by the live rows of some slots; made once for each slice."""
        key = (network, here.start, here.stop)
        if key not in self._steering:
            self._steering[key] = self.networks[network].steer(self.weights[here])
        return self._steering[key]

    def _sample_finite(
        self, logits: Tensor, mixing: dict[str, Any], options: dict[str, Any]
    ) -> clp_kernels.Sample:
        """`sample` on the rows whose logits are numbers; token -1 and NaN for the rest."""
        per_row = logits if logits.dim() == 2 else logits.transpose(0, 1).flatten(1)
        # As the op judges: minus infinity is a token that is ruled out.
        good = (per_row < torch.inf).all(1) & per_row.isfinite().any(1)
        count = good.shape[0]
        if bool(good.all()):
            raise ValueError("the logits cannot be sampled: their mixture is not finite")
        tokens = torch.full((count,), -1, device=good.device)
        nan = torch.full((count,), float("nan"), device=good.device)
        if bool(good.any()):
            picked: dict[str, Any] = {
                k: v[good] if isinstance(v, Tensor) else v for k, v in (mixing | options).items()
            }
            drawn = clp_kernels.sample(logits[..., good, :], **picked)
            tokens[good], nan[good] = drawn.tokens, drawn.logprobs
        return clp_kernels.Sample(tokens, nan, nan)

    def _top(
        self, asked: list[int], params: Sequence[Any], logits: Tensor, first: int
    ) -> dict[int, dict[int, float]]:
        """The most likely tokens of the rows that asked, under the tempered distribution."""
        if not asked:
            return {}
        rows = torch.tensor(asked, device=logits.device)
        chosen = logits.index_select(-2, rows)
        weights = self.policy.logit_weights(self.weights[first + rows])
        if weights is not None:
            chosen = clp_kernels.mix_logits(chosen, weights, mode=self.policy.mode)
        tau = [params[i].temperature or 1.0 for i in asked]
        # Less the largest, in float64: a quotient by the least temperature would be infinite.
        scaled = (chosen.double() - chosen.double().amax(1, keepdim=True)) / torch.tensor(
            tau, dtype=torch.float64, device=rows.device
        )[:, None]
        logp = torch.log_softmax(scaled, 1)
        most = max(params[i].logprobs for i in asked)
        values, ids = (t.tolist() for t in logp.topk(min(most, logp.shape[1])))
        return {
            i: dict(list(zip(ids[k], values[k], strict=True))[: params[i].logprobs])
            for k, i in enumerate(asked)
        }

    # CUDA graphs

    def _replay(
        self, count: int, longest: int, filters: tuple[Any, ...]
    ) -> tuple[clp_kernels.Sample, Tensor]:
        """`_step` for the next larger size, captured at its first use."""
        key = self._padded(count, longest, filters)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        graph, output = self._graphs[key]
        graph.replay()
        return output  # type: ignore[no-any-return]

    def _padded(
        self, count: int, longest: int, filters: tuple[Any, ...]
    ) -> tuple[int, int, tuple[Any, ...]]:
        """Slots, length and filters of a captured step that serves the first `count` slots."""
        size = min(_bucket(count), self.slots, self.token.shape[0])
        length = min(-(-longest // GRAPH_LENGTH) * GRAPH_LENGTH, self.caches[0].capacity)
        # A filter that is off for all rows is left out of the graph; the rest are tensors.
        off = dict(zip(FILTERS, (None, 0, 1.0, 0.0), strict=True))
        chosen = tuple(
            v if v is not None and v == off[name] else None
            for name, v in zip(FILTERS, filters, strict=True)
        )
        # Behind them there may be a row whose prompt is still being prefilled.
        self.alive[:count] = 1
        self.alive[count:] = 0
        return size, length, chosen

    def _capture(self, size: int, length: int, filters: tuple[Any, ...]) -> tuple[Any, Any]:
        here = slice(0, size)
        for i in range(len(self.networks)):
            self._steer(i, here)  # checks its rows on the host, which a capture cannot

        def step() -> Any:
            return self._step(here, length, False, filters, self.home(size))

        before = self._ints.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries set themselves up outside the capture
                step()
                self._ints.copy_(before)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = step()
        return graph, output

    def home(self, size: int) -> Tensor:
        """Where the first rows' keys go: their own slot, or the spare one if the row is gone."""
        slots = torch.arange(size, device=self._ints.device)
        return torch.where(self.alive[:size] > 0, slots, self.slots)

    # The model

    @contextmanager
    def _probing(self) -> Iterator[None]:
        for cache in self.caches:
            cache.resize(ROWS_NEEDED, BLOCK)
        # Zero rows would hide the adapters, and give no logits at all in a mixture of models.
        self.weights.fill_(1 / self.weights.shape[1])
        try:
            yield
        finally:
            self.weights.zero_()
            self.drop()

    @in_turn
    def _check(self) -> None:
        """Refuses a model that is not the same through the slots as it is."""
        with self._probing():
            for network, cache in zip(self.networks, self.caches, strict=True):
                refusal = f"the sampler does not support {type(network.model).__name__}"
                try:
                    found = fault(network, cache, self.weights[:1])
                except (torch.OutOfMemoryError, BackendError):
                    raise
                except MODEL_ERRORS as error:
                    raise ValueError(f"{refusal}: {type(error).__name__}: {error}") from error
                if found is not None:
                    raise ValueError(f"{refusal}: {found}")
            if not self._ints.is_cuda:
                self.recordings = [self._record(i) for i in range(len(self.networks))]
                self.renew()

    @torch.inference_mode()
    def _record(self, index: int) -> Recording | None:
        network, cache = self.networks[index], self.caches[index]

        @contextmanager
        def steered(count: int) -> Iterator[Inputs]:
            lengths = torch.arange(count) % 4
            plan = Decode(cache, 0, lengths, 4, False)
            rows = self.weights[:1].expand(count, -1)
            with network.steer(rows):
                yield Inputs((lengths + 1)[:, None], lengths[:, None], plan)

        try:
            return cache.run(record, network.model, steered)  # type: ignore[no-any-return]
        except Unrecordable:
            return None

    @in_turn
    def renew(self) -> bool:
        """Looks at the models; whether they are what they were when it last looked.

        What is recorded of a model that has changed runs no more: the model runs itself.

        Raises: RuntimeError where the policy has another model, dtype or device.
        """
        models = [network.model for network in self.policy.networks]
        if [id(model) for model in models] != [id(network.model) for network in self.networks]:
            raise RuntimeError(
                "the policy has another model than when this sampler was made: make a new Sampler"
            )
        for model in models:
            if (model.dtype, model.device) != self._kind:
                raise RuntimeError(
                    f"the model is {model.dtype} on {model.device}, and was {self._kind[0]} on "
                    f"{self._kind[1]} when this sampler was made: make a new Sampler"
                )
        known = {id(model): ModelState(model) for model in models}
        states = [known[id(model)] for model in models]
        before, self._states = self._states, states
        self._recorded = all(
            recording is None or recording.state.same_calls(state)
            for recording, state in zip(self.recordings, states, strict=True)
        )
        self._own_code = any(state.own_code for state in states)
        pairs = list(zip(before, states, strict=False))
        if not before or not all(
            old.same_calls(new) and old.addresses == new.addresses for old, new in pairs
        ):
            self._graphs.clear()  # they read memory that may have been given back
            self._look()
        return bool(before) and all(old == new for old, new in pairs)

    def _look(self) -> None:
        """What is kept of the models beside their keys and recorded steps."""
        self._steering.clear()
        for network, cache in zip(self.networks, self.caches, strict=True):
            cache.look_at(network.model)
        self.locks = locks_of([config for cache in self.caches for config in cache.configs])
        self.ids = self.policy.drawable_ids


def _rounded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _bucket(count: int) -> int:
    """The next power of two up to 8, then the next multiple of 8, of 32 above 64."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 32
    return -(-count // step) * step


def _same(values: Sequence[Any]) -> Any:
    """The value where all agree, else None. A filter that is off for all costs nothing."""
    first = values[0]
    return first if all(v == first for v in values) else None
