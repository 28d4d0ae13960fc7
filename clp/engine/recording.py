"""A decode step of a model as the plain list of its calls of PyTorch.

The Python of a model's modules takes 0.55 ms per step of the embedded model on the CPU, of 1.5 ms
with one sequence and 3.7 ms with 42. `record` runs the model under a mode that notes every call of
PyTorch, for two batch sizes: what differs between them is the batch size. As one function the calls
are the same, and so are the bits. Steered layers and attention remain calls of their own, which
read their weights and their plan when they run.
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from clp.engine.model_error import ModelError, model_errors
from clp.engine.model_state import ModelState
from clp_kernels.nn.steering import SteeredLayer

# What Python may read of a tensor: nothing that depends on its values.
METADATA = frozenset({
    "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "get_device",
    "is_contiguous", "is_floating_point", "is_complex", "is_pinned", "__len__", "__hash__",
})  # fmt: skip
# The shape of their results depends on values, and Python may depend on that shape.
BY_VALUE = frozenset({
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "_unique2", "bincount",
})  # fmt: skip
LITERALS = (int, float, bool, str, type(None), type(...), torch.dtype, torch.device,
            torch.memory_format, torch.layout)  # fmt: skip
# Batch sizes that are recorded, and those that are compared with the model afterwards.
RECORDED, COMPARED = (2, 3), (1, 5)
LARGEST_BATCH = max(RECORDED + COMPARED)


class Inputs(NamedTuple):
    """What a step depends on: int64 [B, 1] each, and the plan (clp.engine.attention.Decode)."""

    tokens: Tensor
    positions: Tensor
    plan: Any


class Unrecordable(Exception):
    """The model's step is not a list of calls; the message says why."""


@dataclass(frozen=True)
class _Value:
    """The result of call `index`, or one of the inputs, counted before the calls."""

    index: int


class _Call(NamedTuple):
    function: Any
    args: Any
    kwargs: Any


class Recording:
    """The recorded step. Called with `Inputs` and the batch size it gives the model's logits.

    Attributes:
        state: The model as it was recorded; the recording is valid while it has `same_calls`.
    """

    def __init__(self, model: Any, calls: fx.GraphModule) -> None:
        self._calls = calls
        self.state = ModelState(model)

    def __call__(self, inputs: Inputs, batch: int) -> Tensor:
        return self._calls.forward(*inputs, batch)  # type: ignore[no-any-return]


def record(model: Any, steered: Callable[[int], AbstractContextManager[Inputs]]) -> Recording:
    """Records model(input_ids, position_ids, use_cache=False, plan=plan).logits.

    Args:
        model: A transformers model. Its steered layers run as they are.
        steered: Batch size up to LARGEST_BATCH -> context that gives the inputs, in which the model
            may run on them; it is called four times.

    Raises: Unrecordable if the calls depend on the values of tensors, if one is not a function of
        PyTorch, if they give other bits than the model for another batch size, or if the model has
        code of the caller (hooks), which may differ at every call.
    """
    if ModelState(model).own_code:
        raise Unrecordable("the model is compiled, or has hooks or a forward of its own")
    recorded = []
    for batch in RECORDED:
        with steered(batch) as inputs:
            recorded.append(_calls(model, inputs))
    made = Recording(model, _unified(*recorded))
    for batch in COMPARED:
        at = f"at batch size {batch}"
        with steered(batch) as inputs:
            wanted = step(model, inputs).logits
            try:
                with model_errors():  # calls of PyTorch that do not fit the batch size
                    got = made(inputs, batch)
            except ModelError as error:
                raise Unrecordable(f"{at} the recorded calls fail: {error}") from error
            if not torch.equal(got, wanted):
                raise Unrecordable(f"{at} the recorded calls give other logits")
    return made


def step(model: Any, inputs: Inputs) -> Any:
    """What the model, or its body, gives for the inputs, inside `with_plans`."""
    tokens, positions, plan = inputs
    return model(input_ids=tokens, position_ids=positions, use_cache=False, plan=plan)


def _calls(model: Any, inputs: Inputs) -> list[_Call]:
    """The calls of a step; the last one names the logits."""
    recorder = _Recorder(inputs)
    layers = [module for module in model.modules() if isinstance(module, SteeredLayer)]
    try:
        for layer in layers:
            layer.forward = recorder.as_one_call(layer.forward, layer.forward)  # type: ignore[method-assign]
        inputs.plan.attend = recorder.as_one_call(inputs.plan.attend, "attend", inputs.plan)
        with recorder:
            logits = step(model, inputs).logits
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        inputs.plan.__dict__.pop("attend", None)
    recorder.note("output", (logits,), {}, logits)
    return recorder.calls


class _Recorder(TorchFunctionMode):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        # By identity; all are kept alive, so that no other object gets the same.
        self._values = {id(one): _Value(i) for i, one in enumerate(inputs)}
        self._alive: list[Any] = list(inputs)
        self._count, self._inside = len(inputs), False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._inside:
            self._note_torch(func, args, kwargs, result)
        return result

    def as_one_call(
        self, function: Callable[..., Any], name: Any, *owner: Any
    ) -> Callable[..., Any]:
        """The function, noted as one call of `name`; calls inside it are not noted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self._inside = self._inside, True
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside = outer
            if not outer:
                self.note(name, (*owner, *args), kwargs, result)
            return result

        return run

    def _note_torch(self, func: Any, args: Sequence[Any], kwargs: Any, result: Any) -> None:
        name = getattr(func, "__name__", str(func))
        if isinstance(result, Tensor) or _tensors(result):
            by_value = name in BY_VALUE or (name == "where" and len(args) + len(kwargs) == 1)
            if name == "repeat_interleave":
                by_value = type(kwargs.get("repeats", args[1:2] and args[1])) is not int
            if by_value:
                raise Unrecordable(f"the shape of what {name} gives depends on values")
            if name == "__getitem__" and any(t.dtype == torch.bool for t in _tensors(args[1:])):
                raise Unrecordable("a mask selects")
            if name == "__get__":
                func, args = getattr, (args[0], func.__self__.__name__)
            elif func is getattr(Tensor, name, None):
                func = name
            self.note(func, args, kwargs, result)
        elif name == "__setitem__":
            self.note(name, args, kwargs, None)
        elif name not in METADATA and name not in ("__get__", "_set_grad_enabled"):
            raise Unrecordable(f"{name} reads a tensor's values")

    def note(self, function: Any, args: Sequence[Any], kwargs: Any, result: Any) -> None:
        """Adds a call: a method's name, or a function."""
        named = map_aggregate((tuple(args), dict(kwargs)), self._named)
        self.calls.append(_Call(function, *named))  # type: ignore[misc]
        whole = self._bind(result)
        if isinstance(result, (tuple, list)):
            for i, one in enumerate(result):
                if isinstance(one, Tensor):
                    self.calls.append(_Call(operator.getitem, (whole, i), {}))
                    self._bind(one)

    def _named(self, leaf: Any) -> Any:
        found = self._values.get(id(leaf))
        if found is not None and not isinstance(leaf, LITERALS):
            return found
        if not isinstance(leaf, (Tensor, *LITERALS)):
            raise Unrecordable(f"a call is given a {type(leaf).__name__}")
        return leaf

    def _bind(self, result: Any) -> _Value:
        value = _Value(self._count)
        self._values[id(result)] = value
        self._alive.append(result)
        self._count += 1
        return value


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def look(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf

    if isinstance(values, (tuple, list)):
        map_aggregate(tuple(values), look)
    return found


def _unified(first: list[_Call], second: list[_Call]) -> fx.GraphModule:
    """One function of the inputs and the batch size, from two recordings."""
    if [call.function for call in first] != [call.function for call in second]:
        raise Unrecordable("the batch size decides what is called")
    graph = fx.Graph()
    constants: dict[str, Tensor] = {}
    nodes: list[Any] = [graph.placeholder(name) for name in Inputs._fields]
    batch = graph.placeholder("batch")
    for call, other in zip(first, second, strict=True):
        theirs: list[Any] = []
        map_aggregate((other.args, other.kwargs), lambda leaf: theirs.append(leaf))  # noqa: B023
        rest = iter(theirs)

        def same(mine: Any) -> Any:
            other = next(rest)  # noqa: B023
            if isinstance(mine, _Value) and mine == other:
                return nodes[mine.index]
            if isinstance(mine, Tensor) and mine is other:
                name = f"constant_{len(constants)}"
                constants[name] = mine
                return graph.get_attr(name)
            if type(mine) is type(other) and isinstance(mine, LITERALS) and mine == other:
                return mine
            if type(mine) is type(other) is int and mine * RECORDED[1] == other * RECORDED[0]:
                times = mine // RECORDED[0]
                return batch if times == 1 else graph.call_function(operator.mul, (batch, times))
            raise Unrecordable(f"{call.function} is given {mine!r} and {other!r}")  # noqa: B023

        args, kwargs = map_aggregate((call.args, call.kwargs), same)  # type: ignore[misc]
        if call.function == "output":
            graph.output(args[0])
        elif isinstance(call.function, str):
            nodes.append(graph.call_method(call.function, args, kwargs))
        else:
            nodes.append(graph.call_function(call.function, args, kwargs))
    return fx.GraphModule(constants, graph)
