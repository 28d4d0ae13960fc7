"""The runner: the policy's networks on the device, prefill, and decode steps over all slots.

A decode step runs the networks on one token of each slot from 0 on, mixes and draws with the op
`sample`, and writes the drawn tokens where the next step reads them. It waits for the device only
to read what was drawn. On CUDA the step is captured as a graph (clp/engine/cuda_graphs.py).
"""

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor

import clp_kernels
from clp.engine.attention import Decode, Prefill
from clp.engine.cuda_graphs import FILTERS, CudaGraphs, StepSize, common_value, step_size
from clp.engine.drawing import draw, mixture, top_logprobs
from clp.engine.kv_cache import BLOCK, Segment, rounded
from clp.engine.locks import locked, locks_of
from clp.engine.model_check import prepare
from clp.engine.model_error import memory_errors
from clp.engine.model_state import ModelState
from clp.engine.scheduler import Action, Clear, Copy, CopyEach, Move, Place, Resize, Vacate
from clp.engine.sequence import Sequence
from clp.engine.slot_model import SlotModel
from clp.engine.slot_state import SlotState
from clp.policies.interface import Steerable
from clp_kernels.invariant import is_batch_invariant
from clp_kernels.nn.mixed_lora import MixedLoRALinear
from clp_kernels.selftest import tuning
from clp_kernels.selftest.processes import ensure

# Whose kernels a sampler's policies run.
OPS = ("mixed_lora", "mixed_linear", "mix_logits", "sample")


class Drawn(NamedTuple):
    """A step's tokens and log-probabilities; the token is -1 if the logits are not finite."""

    tokens: list[int]
    logprobs: list[float]
    top: dict[int, dict[int, float]]  # of the sequences that asked for it


def _may_capture(graphs: CudaGraphs, states: Seq[ModelState], first: int) -> bool:
    """Whether a step of the slots from `first` on may be a graph. A capture runs hooks once."""
    own_code = any(state.own_code for state in states)
    return graphs.refusal is None and first == 0 and not (is_batch_invariant() or own_code)


class Runner:
    """Runs a policy's networks over slots.

    Attributes:
        models: The networks' models with their caches.
        state: What a step reads of each slot beside its keys and values.
        graphs: Captured decode steps; None on the CPU, or to run without them.
        bytes_per_token: Keys and values of one token in all networks.
        spare: 1 on CUDA: one more slot, into which a captured step writes for slots without a
            decoding sequence; else 0.

    Raises: ValueError for a model whose logits differ through the slots.
    """

    def __init__(self, policy: Steerable, max_slots: int, max_cache_bytes: int) -> None:
        self.policy, self.max_cache_bytes = policy, max_cache_bytes
        self.networks = list(policy.networks)
        self.models = [SlotModel(network.model) for network in self.networks]
        device = policy.device
        ensure(device, OPS)
        modules = (module for network in self.networks for module in network.model.modules())
        tuning.ensure([module for module in modules if isinstance(module, MixedLoRALinear)])
        own = policy.layer_weights(policy.condition([0.0] * len(policy.objectives), simplex=False))
        self.spare = int(device.type == "cuda")
        self._kind = self.models[0].model.dtype, self.models[0].model.device
        dtype = torch.float64 if self._kind[0] == torch.float64 else torch.float32
        self.state = SlotState(max_slots, len(own), device, dtype)
        self.graphs = CudaGraphs() if self.spare else None
        self._steering: dict[tuple[int, int, int], Any] = {}
        # Of the models, when they were last compared, and when they were last checked.
        self._states: list[ModelState] = []
        self._checked: list[ModelState] = []
        self._follow_models()
        self._prepare()
        self.bytes_per_token = sum(model.cache.bytes_per_token for model in self.models)

    # Memory

    @property
    def cache_bytes(self) -> int:
        """Keys and values as they are allocated."""
        return sum(t.nbytes for model in self.models for t in model.cache.tensors())

    @property
    def slots(self) -> int:
        """How many slots there are for sequences."""
        return max(0, self.models[0].cache.slots - self.spare)

    @property
    def capacity(self) -> int:
        """How many tokens each of them has room for."""
        return self.models[0].cache.capacity

    @property
    def max_length(self) -> int:
        """Tokens of the longest slot that fits, if it is the only one."""
        return self.max_cache_bytes // ((1 + self.spare) * self.bytes_per_token) // BLOCK * BLOCK

    def fits(self, slots: int, length: int) -> bool:
        """Whether so many slots of so many tokens are within max_cache_bytes."""
        return (slots + self.spare) * rounded(length) * self.bytes_per_token <= self.max_cache_bytes

    def resize(self, slots: int, capacity: int) -> None:
        """So many slots of so many tokens; what fits is kept."""
        if self.graphs is not None:
            self.graphs.captured.clear()
        for model in self.models:
            model.cache.resize(slots + self.spare if slots else 0, capacity)

    def copy(self, source: int, target: int, count: int) -> None:
        for model in self.models:
            model.cache.copy(source, target, count)

    def copy_each(self, sources: Seq[int], targets: Seq[int], count: int) -> None:
        for model in self.models:
            model.cache.copy_each(sources, targets, count)

    def move(self, source: int, target: int, count: int) -> None:
        """Copies a slot's tokens and state into another."""
        self.copy(source, target, count)
        self.state.move(source, target)

    def apply(self, action: Action) -> None:
        """Does what the scheduler has decided.

        Raises: ModelError if there is no memory for it.
        """
        match action:
            case Resize() | Copy() | CopyEach():
                calls: Any = {Resize: self.resize, Copy: self.copy, CopyEach: self.copy_each}
                with memory_errors():
                    calls[type(action)](*action)
            case Place():
                self.state.place(*action)
            case Move():
                self.move(*action)
            case Clear():
                for model in self.models:
                    model.cache.clear(action.slot)
            case Vacate():
                self.state.vacate(action.slot)

    # Forward passes

    @locked
    @torch.inference_mode()
    def prefill(self, parts: Seq[tuple[Sequence, Segment]]) -> None:
        """Puts tokens of prompts into their slots, all in one forward.

        Raises: ModelError for what a model raises.
        """
        device = self.state.ints.device
        ids = [i for sequence, s in parts for i in sequence.request.prompt_ids[s.start : s.stop]]
        positions = [i for _, s in parts for i in range(s.start, s.stop)]
        slots = [s.slot for _, s in parts for _ in range(s.start, s.stop)]
        segments = [s for _, s in parts]
        weights = self.state.weights[torch.tensor(slots, device=device)]
        tokens, places = torch.tensor([ids, positions], device=device)[:, :, None]
        with torch.cuda.device_of(weights):
            for network, model in zip(self.networks, self.models, strict=True):
                plan = Prefill(model.cache, segments, device)
                model.prefill(network.steer(weights), tokens, places, plan)

    @locked
    @torch.inference_mode()
    def decode(self, sequences: Seq[Sequence], first: int = 0) -> Drawn:
        """Feeds one token of each sequence (in the slots from `first` on) and draws the next.

        Raises: ModelError for what a model raises.
        """
        count, params = len(sequences), [s.request.params for s in sequences]
        cached = [sequence.cached for sequence in sequences]
        longest = max(cached) + 1
        filters = [common_value([getattr(p, name) for p in params]) for name in FILTERS]
        with torch.cuda.device_of(self.state.ints):
            if self.graphs is not None and _may_capture(self.graphs, self._states, first):
                size = step_size(count, longest, filters, self.slots, self.capacity)
                self.state.activate(count)
                drawn, logits = self.graphs.replay(size, self.padded_step, self.state)
            else:
                even = min(cached) == longest - 1
                drawn, logits = self.step(slice(first, first + count), longest, even, filters)
        top = self.top_logprobs(sequences, logits, first)
        tokens, logprobs = drawn.tokens[:count].tolist(), drawn.logprobs[:count].tolist()
        for i, found in top.items():
            found.setdefault(tokens[i], logprobs[i])
        return Drawn(tokens, logprobs, top)

    def step(
        self,
        here: slice,
        longest: int,
        even: bool,
        filters: Seq[Any],
        targets: Tensor | None = None,
    ) -> tuple[clp_kernels.Sample, Tensor]:
        """One token for the slots of `here`; what was drawn, and the logits, as `mixture`.

        Args:
            longest, even, targets: As in clp.engine.attention.Decode.
            filters: In the order of FILTERS; None: those of the slots.
        """
        state, mixing = self.state, self._mixing(here)
        tokens, lengths = state.token[here, None], state.length[here]
        logits = []
        for i, model in enumerate(self.models):
            plan = Decode(model.cache, here.start, lengths, longest, even, targets)
            found = model.logits(self._steer(i, here), tokens, lengths[:, None], plan)
            logits.append(found[:, self._ids])
        mixed, mixing = mixture(logits, mixing)
        options = {"seed": state.seed[here], "position": state.drawn[here]}
        for name, value in zip(FILTERS, filters, strict=True):
            options[name] = getattr(state, name)[here] if value is None else value
        with memory_errors():
            drawn = draw(mixed, mixing, options, self._ids)
        state.advance(here, drawn.tokens, padded=targets is not None)
        return drawn, mixed

    def padded_step(self, size: StepSize) -> tuple[clp_kernels.Sample, Tensor]:
        """A step that may be captured: it has more slots and tokens than are asked for.

        Keys of slots without a decoding sequence go into the spare slot.
        """
        slots = torch.arange(size.slots, device=self.state.ints.device)
        targets = torch.where(self.state.active[: size.slots] > 0, slots, self.slots)
        return self.step(slice(0, size.slots), size.length, False, size.filters, targets)

    def top_logprobs(
        self, sequences: Seq[Sequence], logits: Tensor, first: int
    ) -> dict[int, dict[int, float]]:
        """The likeliest tokens, by sequence that asked for them."""
        asked = [i for i, s in enumerate(sequences) if s.request.params.logprobs]
        if not asked:
            return {}
        params = [sequences[i].request.params for i in asked]
        index = torch.tensor(asked, device=logits.device)
        with memory_errors():
            found = top_logprobs(
                logits.index_select(-2, index),
                {} if logits.dim() == 2 else self._mixing(first + index),
                [p.temperature for p in params],
                [p.logprobs or 0 for p in params],
                self._ids,
            )
        return dict(zip(asked, found, strict=True))

    def _mixing(self, here: slice | Tensor) -> dict[str, Any]:
        """Arguments by which the networks' logits are mixed; empty for a single network."""
        weights = self.policy.logit_weights(self.state.weights[here])
        if weights is None:
            return {}
        mixing = {"weights": weights, "mode": self.policy.mode}
        return mixing | ({"exponent": self.policy.exponent} if self.policy.exponent else {})

    def _steer(self, network: int, here: slice) -> Any:
        """The context that steers by the live weights of some slots; made once per slice."""
        key = (network, here.start, here.stop)
        if key not in self._steering:
            self._steering[key] = self.networks[network].steer(self.state.weights[here])
        return self._steering[key]

    # The models

    @locked
    def _prepare(self) -> None:
        """Checks the models, records their decode steps, and tries whether they can be captured."""
        self._check(self.models, recorded=not self.state.weights.is_cuda)
        self.renew()
        self.try_capture()

    def _check(self, models: Seq[SlotModel], *, recorded: bool) -> None:
        weights = torch.full_like(self.state.weights[:1], 1 / self.state.weights.shape[1])
        with torch.cuda.device_of(weights):
            for network, model in zip(self.networks, models, strict=True):
                prepare(model, network.steer, weights, recorded=recorded)

    @torch.inference_mode()
    def try_capture(self) -> None:
        """Captures a step of one slot, while no sequence has one: what cannot be shows here."""
        if self.graphs is None or not _may_capture(self.graphs, self._states, 0):
            return
        self.resize(1, BLOCK)
        try:
            with torch.cuda.device_of(self.state.ints):
                size = StepSize(1, BLOCK, tuple(FILTERS.values()))
                self.graphs.replay(size, self.padded_step, self.state)
        finally:
            self.resize(0, 0)

    @locked
    def renew(self) -> bool:
        """Compares the models with what they were at the last call; whether they are unchanged.

        The recording of a model that has changed is not used: the model itself runs, after the
        check of a new sampler's model.

        Raises: RuntimeError if the policy has another model, dtype or device; ValueError for a
            model that a new sampler would refuse.
        """
        models = [network.model for network in self.policy.networks]
        if [id(model) for model in models] != [id(one.model) for one in self.models]:
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
        before, states = self._states, [known[id(model)] for model in models]
        pairs = list(zip(before, states, strict=False))
        # With code of the caller's, such as a hook, no two states are the same: it would be checked
        # at every call.
        checked = list(zip(self._checked or states, states, strict=True))
        if any(not (then.same_calls(now) or now.own_code) for then, now in checked):
            self._check([SlotModel(model) for model in models], recorded=False)
        self._checked = [then if now.own_code else now for then, now in checked]
        self._states = states
        for one, state in zip(self.models, self._states, strict=True):
            recording = one.recording
            one.recording_is_valid = recording is not None and recording.state.same_calls(state)
        unchanged = all(o.same_calls(n) and o.addresses == n.addresses for o, n in pairs)
        if not before or not unchanged or len(self.policy.tokenizer) != self._tokens:
            self._follow_models()
        return bool(before) and all(old == new for old, new in pairs)

    def _follow_models(self) -> None:
        """Updates what is kept of the models besides their recorded steps."""
        if self.graphs is not None:
            self.graphs.captured.clear()  # they read memory that may have been given back
            self.graphs.refusal = None
        self._steering.clear()
        for model in self.models:
            model.find_configs()
        self.locks = locks_of([config for model in self.models for config in model.configs])
        self._ids, self._tokens = self.policy.drawable_ids, len(self.policy.tokenizer)
