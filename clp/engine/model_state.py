"""The state of a model: what was cached or recorded of it is valid while the state is the same."""

import contextlib
import functools
import operator
import sys
from argparse import Namespace
from collections import UserDict, UserList, deque
from collections.abc import Mapping
from functools import partial
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from clp.policies.checksum import checksums, has_memory
from clp_kernels.nn.probe import OneExamplePerWeights
from clp_kernels.nn.steering import SteeredLayer

# Compared by value; everything else by identity, with a reference: an id alone may be used again.
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device})
# Code of the caller in a module: it may read anything.
_OWN_CODE = frozenset({"forward", "_compiled_call_impl"})
# Hooks of clp_kernels.inject: they read the weights of the call and nothing else.
_OURS = frozenset({OneExamplePerWeights})
# Of transformers' hooks that stay on a model after a call with output_hidden_states=True: they do
# nothing in other calls.
_CAPTURE = "transformers.utils.output_capturing"
# The sampler changes it for each forward.
_NOT_READ = frozenset({"_attn_implementation_internal"})
# Kinds of values that count with what they hold.
_HOLD = (Tensor, nn.Module, FunctionType, MethodType, staticmethod, classmethod, property, partial,
         SimpleNamespace, Namespace, UserDict, UserList, np.ndarray, dict, list, tuple, set,
         frozenset, deque)  # fmt: skip
# Objects of these count by themselves (what `steer` writes is ours); of others, their attributes.
_LIBRARIES = sys.stdlib_module_names | {"torch", "clp_kernels", "clp"}


def _of_a_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _has_a_forward(kind: type) -> bool:
    """Whether a class's file is one of a model, not of PyTorch or transformers' loading."""
    name = kind.__module__
    loading = name.startswith("transformers.") and not name.startswith("transformers.models.")
    return not loading and not _of_a_library(kind)


class _Inside(dict[type, Any]):
    """By type, which of _HOLD a value is, `object` if it has attributes of its own, or None."""

    def __missing__(self, kind: type) -> Any:
        known: Any = next((base for base in _HOLD if issubclass(kind, base)), None)
        library = _of_a_library(kind)
        if known is None and not library and not issubclass(kind, type):
            known = object
        self[kind] = known
        return known


_INSIDE = _Inside()


class ModelState:
    """Modules, their classes, attributes and configurations, and the values of their tensors.

    Attributes that are containers, arrays or objects count with what they hold. Tensors count with
    where they lie and a checksum of what they hold: PyTorch counts no writes through `.data` and
    `.numpy()`. Functions count with their code, defaults and closures, and those of the modules'
    own files with the functions and values that they name.

    Cost: one pass over the parameters.

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
        self._functions: list[FunctionType] = []
        self._seen: set[int] = set()
        self._classes: dict[type, None] = {}
        self._module(model, self._calls)
        bases = dict.fromkeys(base for cls in self._classes for base in cls.__mro__[:-1])
        files = {base.__module__ for base in bases if _has_a_forward(base)}
        for one in bases:
            self._add(vars(one), self._calls)
        while self._functions:
            function = self._functions.pop()
            self._calls.extend((function.__code__, function.__defaults__, function.__kwdefaults__))
            if named := _read_by(function, files):
                self._add(named, self._calls)
        # Each with its address: one that `.data` has replaced is another.
        self.addresses = [t.data_ptr() if has_memory(t) else id(t) for t in self._tensors]
        # The content alone of what is trained, and where PyTorch does not count the writes.
        read = [t.requires_grad or t.is_inference() for t in self._tensors]
        self._values = [None if r else t._version for r, t in zip(read, self._tensors, strict=True)]
        self._values += checksums(self._tensors)

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
            any(map(_may_read, attributes["_forward_hooks"].values()))
            or any(map(_may_read, attributes["_forward_pre_hooks"].values()))
            or not attributes.keys().isdisjoint(_OWN_CODE)
        ):
            self.own_code = True
        self._add(attributes, self._steered if isinstance(module, SteeredLayer) else parts)

    def _add(self, values: Mapping[Any, Any], parts: list[Any]) -> None:
        """Adds names and values, and what those contain that are not plain values."""
        waiting = [values]
        while waiting:
            values = waiting.pop()
            parts.extend(values)
            parts.extend(values.values())
            for value in values.values():
                kind = _INSIDE[type(value)]
                if kind is None or (kind is dict and not value):
                    continue
                if kind is Tensor:
                    self._tensors.append(value)
                elif kind is nn.Module:
                    self._module(value, parts)
                elif kind is np.ndarray and not value.dtype.hasobject:
                    parts.append(value.tobytes())
                elif id(value) not in self._seen:
                    self._seen.add(id(value))
                    if kind is FunctionType:
                        self._functions.append(value)
                    else:
                        waiting.append(_contents(value, kind))


def _may_read(hook: Any) -> bool:
    return type(hook) not in _OURS and getattr(hook, "__module__", None) != _CAPTURE


def _contents(value: Any, kind: Any) -> Mapping[Any, Any]:
    """What a value of this kind holds, by name, key or place."""
    if kind is dict:
        return value  # type: ignore[no-any-return]
    if kind is partial:
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if kind is property:
        return {"fget": value.fget}
    if kind is MethodType:
        return {"self": value.__self__, "func": value.__func__}
    if kind in (staticmethod, classmethod):
        return {"func": value.__func__}
    if kind in (object, SimpleNamespace, Namespace, UserDict, UserList):
        found: dict[str, Any] = {}
        for name, slot in _slots(type(value)):
            with contextlib.suppress(AttributeError):  # not set
                found[name] = slot.__get__(value)
        # Not getattr: a class may answer to any name, or raise.
        own = object.__getattribute__(value, "__dict__") if type(value).__dictoffset__ else {}
        return found | {k: v for k, v in own.items() if k not in _NOT_READ}
    return dict(enumerate(value.flat if kind is np.ndarray else value))


def _slots(kind: type) -> list[tuple[str, Any]]:
    each = (item for base in kind.__mro__ for item in vars(base).items())
    return [(name, slot) for name, slot in each if isinstance(slot, MemberDescriptorType)]


def _read_by(function: FunctionType, files: set[str]) -> dict[Any, Any]:
    """What a function reads: its attributes, its closure, and in these files what it names."""
    read: dict[Any, Any] = dict(function.__dict__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # empty
            read[name] = cell.cell_contents
    if function.__module__ in files:
        known = function.__globals__
        named = names_of(function.__code__)
        read |= {n: known[n] for n in named if n in known and _is_read(known[n])}
    return read


def _is_read(value: Any) -> bool:
    """Whether a global counts with what it holds; registries of transformers grow by themselves."""
    kind = _INSIDE[type(value)]
    own = kind is not object or type(value).__module__.partition(".")[0] != "transformers"
    return type(value) in _PLAIN or (kind is not None and own)


@functools.cache
def names_of(code: CodeType) -> frozenset[str]:
    """The names of globals and attributes in a function's code, and in the functions inside it."""
    inner = (names_of(const) for const in code.co_consts if isinstance(const, CodeType))
    return frozenset(code.co_names).union(*inner)


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    if len(ours) != len(theirs):
        return False
    if all(map(operator.is_, ours, theirs)):
        return True
    return all(
        a is b or (type(a) is type(b) and type(a) in _PLAIN and a == b)
        for a, b in zip(ours, theirs, strict=True)
    )
