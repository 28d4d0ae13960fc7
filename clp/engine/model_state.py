"""The state of a model: what was cached or recorded of it is valid while the state is the same."""

import hashlib
import operator
import sys
from collections import OrderedDict
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig

from clp_kernels.nn.probe import OneExamplePerWeights
from clp_kernels.nn.steering import SteeredLayer

# Compared by value; everything else by identity, with a reference: an id alone may be used again.
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device})
# Code of the caller in a module: it may read anything.
_OWN_CODE = frozenset({"forward", "_compiled_call_impl"})
# Hooks of clp_kernels.inject: they read the weights of the call and nothing else.
_OURS = frozenset({OneExamplePerWeights})
# Elements of each frozen tensor that are compared. To read them takes 13 us per tensor.
SAMPLED = 8
# The sampler changes it for each forward.
_NOT_READ = frozenset({"_attn_implementation_internal"})


class _Inside(dict[type, Any]):
    """By type, which kind of container a value is, or None."""

    def __missing__(self, kind: type) -> Any:
        plain: dict[type, Any] = {dict: dict, OrderedDict: dict, list: list, tuple: list}
        known = plain.get(kind)
        for base in (nn.Module, Tensor, PreTrainedConfig):
            known = base if issubclass(kind, base) else known
        self[kind] = known
        return known


_INSIDE = _Inside()


class ModelState:
    """Modules, their classes, attributes and configurations, and the values of their tensors.

    Attributes that are lists, tuples and dictionaries count with what they hold. Of tensors that
    are trained, the content counts; of the frozen rest (gigabytes) where each lies, how often it
    was written to (PyTorch counts every change but those through `.data` and `.numpy()`), and for
    those a sample of its content. The functions that the modules' files name count too.

    Args:
        model: A module. It must not be running in another thread.

    Attributes:
        own_code: Whether the model has forward hooks, a `forward` beside its class's, or is
            compiled. What such code reads is not known: a state with it equals no state, not even
            itself.
    """

    def __init__(self, model: nn.Module) -> None:
        hooks = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
        self.own_code = any(map(len, hooks))
        # What recorded calls depend on, and what steered layers read when they are called.
        self._calls: list[Any] = []
        self._steered: list[Any] = []
        self._tensors: list[Tensor] = []
        self._seen: set[int] = set()
        self._classes: dict[type, None] = {}
        self._module(model, self._calls)
        bases = dict.fromkeys(base for cls in self._classes for base in cls.__mro__[:-1])
        for one in bases:
            self._calls.extend(vars(one).values())
        for name in dict.fromkeys(base.__module__ for base in bases):
            names = vars(sys.modules[name]) if name in sys.modules else {}
            self._calls.extend(one for one in names.values() if isinstance(one, FunctionType))
        # Each with its address: one that `.data` has replaced is another.
        self.addresses = [t.data_ptr() for t in self._tensors]
        self._values = [_content(t) if _is_read(t) else t._version for t in self._tensors]
        self._values += _samples([t for t in self._tensors if not _is_read(t)])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ModelState)
            and self.same_calls(other)
            and _same(self._steered, other._steered)
            and self.addresses == other.addresses
            and self._values == other._values
        )

    __hash__ = None  # type: ignore[assignment]

    def same_calls(self, other: "ModelState") -> bool:
        """Whether the model makes the same calls of PyTorch, on the same tensors."""
        return not (self.own_code or other.own_code) and _same(self._calls, other._calls)

    def _module(self, module: nn.Module, parts: list[Any]) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._classes[type(module)] = None
        parts.append(type(module))
        attributes = module.__dict__
        if (
            attributes["_forward_hooks"]
            or any(type(one) not in _OURS for one in attributes["_forward_pre_hooks"].values())
            or not attributes.keys().isdisjoint(_OWN_CODE)
        ):
            self.own_code = True
        self._add(attributes, self._steered if isinstance(module, SteeredLayer) else parts)

    def _add(self, values: Mapping[Any, Any], parts: list[Any]) -> None:
        """Adds names and values, and what those contain that are not plain values."""
        parts.extend(values)
        parts.extend(values.values())
        for value in values.values():
            kind = _INSIDE[type(value)]
            if kind is None:
                continue
            if kind is Tensor:
                self._tensors.append(value)
            elif kind is nn.Module:
                self._module(value, parts)
            elif kind is dict:
                if value:
                    self._add(value, parts)
            elif kind is list:
                self._add(dict(enumerate(value)), parts)
            elif id(value) not in self._seen:
                self._seen.add(id(value))
                self._add({k: v for k, v in vars(value).items() if k not in _NOT_READ}, parts)


def _is_read(tensor: Tensor) -> bool:
    """Whether all of its content counts: it is trained, or PyTorch does not count its changes."""
    return tensor.requires_grad or tensor.is_inference()


def _content(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).digest()


def _samples(tensors: list[Tensor]) -> list[bytes]:
    """A few evenly spread elements of each tensor; one copy from the device per dtype."""
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        # A subclass (a quantised weight) may not have these ops.
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel() and not tensor.is_meta:
            one = tensor.detach()
            if not one.is_contiguous():
                one = one[tuple(n // 2 for n in one.shape[:-1])]
            step = max(1, one.numel() // SAMPLED)
            found.setdefault((one.dtype, one.device), []).append(one.view(-1)[::step][:SAMPLED])
    parts = (torch.cat(some).cpu() for some in found.values())
    return [part.view(torch.uint8).numpy().tobytes() for part in parts]


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    if len(ours) != len(theirs):
        return False
    if all(map(operator.is_, ours, theirs)):
        return True
    return all(
        a is b or (type(a) is type(b) and type(a) in _PLAIN and a == b)
        for a, b in zip(ours, theirs, strict=True)
    )
