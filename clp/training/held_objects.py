"""What an object is, and the objects that it holds: the parts by which functions are told apart."""

import contextlib
import copyreg
import hashlib
import json
import pickle
import re
import sys
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Set, ValuesView
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import cache, partial
from itertools import islice
from operator import attrgetter, itemgetter
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any
from uuid import UUID

import numpy as np
import torch
from torch import Tensor, nn

from clp.engine.model_state import names_of
from clp.policies.checksum import digest

# Types whose repr is their value; NumPy's scalars are some.
_VALUES = frozenset({type(None), int, str, float, bytes, bytearray, complex, range, np.generic,
                     re.Pattern, date, time, timedelta, Decimal, Fraction, PurePath, UUID,
                     itemgetter, attrgetter})  # fmt: skip
# Types that are described by what they are made for; their subclasses may have attributes too.
_BASES = _VALUES | {dict, list, tuple, deque, set, frozenset, partial, property, Tensor, np.ndarray}
# Parts of the standard library whose objects change by themselves, such as threads and locks.
_BY_ITSELF = {"asyncio", "concurrent", "contextvars", "http", "io", "logging", "multiprocessing",
              "os", "queue", "random", "selectors", "socket", "sqlite3", "ssl", "subprocess",
              "tempfile", "thread", "threading", "urllib", "weakref"}  # fmt: skip
# Libraries of tables: what their attributes hold changes by itself too.
_TABLES = {"pandas", "polars"}
# Libraries that register hooks by themselves; those of the caller count.
_OF_HOOKS = {"torch", "transformers", "accelerate", "peft", "clp", "clp_kernels"}

# Attributes that differ in every process: transformers' GenerationConfig keeps its own hash, and
# Module.compile its compiled call.
_OF_PROCESS = frozenset({"_original_object_hash", "_compiled_call_impl"})

# What every module has; parameters, buffers and other modules are looked at by themselves.
_OF_MODULES = frozenset(vars(nn.Module()))
_HOOKS = sorted(name for name in _OF_MODULES if name.endswith("_hooks"))


def plain_text(value: Any) -> str | None:
    """A value that holds no others, in full; None for others."""
    kind = type(value)
    if kind in _VALUES:
        return _text(value)
    base = _base(kind)
    return _text(value) if base in _VALUES and not _own(value, base) else None


def _base(kind: type) -> type:
    """Which of _BASES a type is, or object. Not by isinstance: an object may pose as another."""
    base = next((one for one in kind.__mro__ if one in _BASES), object)
    return object if base is np.generic and issubclass(kind, np.void) else base  # it holds others


def _text(value: Any) -> str:
    kind = type(value)
    if issubclass(kind, int):
        return f"{kind.__qualname__} {hex(value)}"
    if kind in _VALUES:
        return f"{kind.__qualname__} {value!r}"
    # What the caller's own class prints may be less.
    for shown in _of_class(kind, "__repr__"):
        if not isinstance(shown, FunctionType) or _library(shown) in sys.stdlib_module_names:
            break
    return f"{kind.__qualname__} {shown(value)}"


def _of_class(kind: type, name: str) -> list[Any]:
    """What a class and then its bases have under a name; objects may answer to any name."""
    return [vars(one)[name] for one in kind.__mro__ if name in vars(one)]


def _library(code: Any) -> str:
    """The first name of the module that a function or an object's class is from."""
    owner = code if isinstance(code, type | FunctionType) else type(code)
    return str(owner.__module__).partition(".")[0]


def _original(value: Any) -> Any:
    """What torch.compile was given, of what it gives: that holds addresses of this process."""
    kind = type(value)
    if kind is FunctionType:
        return vars(value).get("_torchdynamo_orig_callable")
    compiled = kind.__module__ == "torch._dynamo.eval_frame" and issubclass(kind, nn.Module)
    return vars(value)["_modules"].get("_orig_mod") if compiled else None


def _is_of_caller(hook: Any) -> bool:
    while isinstance(hook, partial | MethodType):
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    return _library(hook) not in _OF_HOOKS


def _attributes(value: Any, base: type = object) -> dict[str, Any]:
    """Those that classes before `base` add. Not by getattr: an object may answer to any name."""
    kind, found = type(value), dict[str, Any]()
    for one in kind.__mro__[: kind.__mro__.index(base)]:
        for name, slot in vars(one).items() if "__slots__" in vars(one) else ():
            if isinstance(slot, MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # not set
                    found.setdefault(name, slot.__get__(value))
    found |= object.__getattribute__(value, "__dict__") if kind.__dictoffset__ else {}
    return {name: one for name, one in found.items() if name not in _OF_PROCESS}


def _own(value: Any, base: type) -> dict[str, Any]:
    """What an object of a subclass holds beside what its base is made for."""
    kind, found = type(value), _attributes(value, base)
    if issubclass(kind, Enum):  # its name, and what is known of it by its class
        return {name: one for name, one in found.items() if not name.startswith("_")}
    if issubclass(kind, defaultdict):
        found["default_factory"] = vars(defaultdict)["default_factory"].__get__(value)
    if issubclass(kind, deque) and value.maxlen is not None:
        found["maxlen"] = value.maxlen
    return found


def _changes_by_itself(kind: type) -> bool:
    random = kind is torch.Generator or kind.__module__.startswith("numpy.random")
    return random or _library(kind).lstrip("_") in _BY_ITSELF or issubclass(kind, Iterator)


def _reduced(value: Any, attributes: dict[str, Any]) -> list[Any]:
    """What pickle keeps of an object of a class written in C, whose state is in no attributes."""
    kind = type(value)
    if any(map(_changes_by_itself, kind.__mro__)):
        return []
    own = [*_of_class(kind, "__reduce_ex__")[:-1], *_of_class(kind, "__reduce__")[:-1]]
    own = [one for one in own if not isinstance(one, FunctionType)]
    try:
        if kind in copyreg.dispatch_table:
            kept: Any = copyreg.dispatch_table[kind](value)
        elif own:
            kept = own[0](value, 4) if own[0].__name__ == "__reduce_ex__" else own[0](value)
        elif (states := _of_class(kind, "__getstate__")[:-1]) and not any(
            isinstance(one, FunctionType) for one in states
        ):
            kept = kind, states[0](value)
        else:
            return []
    except (TypeError, ValueError, RuntimeError, pickle.PickleError):  # it cannot be pickled
        return []
    if isinstance(kept, str):  # a name
        return [] if attributes else [kept]

    # Iterators are over what it holds; some classes keep the attributes too.
    def is_new(part: Any) -> bool:
        if type(part) is dict:
            return part.keys() != attributes.keys()
        return not (part is None or (type(part) in (tuple, list) and not part))

    contents = [list(part) if isinstance(part, Iterator) else part for part in kept[1:]]
    return [kept[0], *contents] if (contents := list(filter(is_new, contents))) else []


def _key(value: Any, depth: int = 2) -> str:
    """A key or a member, by what orders it: others than plain ones by what they hold near by."""
    kind = type(value)
    if issubclass(kind, Enum):
        return f"{kind.__qualname__}.{value._name_}"
    if (shown := plain_text(value)) is not None:
        return shown
    base = _base(kind)
    if base is tuple:
        return f"({','.join(_key(one, depth) for one in islice(tuple.__iter__(value), 100))})"
    if base in (set, frozenset):
        return f"{{{','.join(sorted(_key(one, depth) for one in base.__iter__(value)))}}}"
    if issubclass(kind, type | FunctionType | BuiltinFunctionType):
        return f"{kind.__qualname__} {value.__module__}.{value.__qualname__}"
    shown = _text(value) if base in _VALUES else kind.__qualname__
    if depth == 0:
        return shown
    own = [(name, _key(one, depth - 1)) for name, one in _own(value, base).items()]
    if base is dict:
        own += [(_key(name, 0), _key(one, depth - 1)) for name, one in dict.items(value)]
    if base is list:
        own += [("", _key(one, depth - 1)) for one in islice(list.__iter__(value), 100)]
    return f"{shown} {sorted(own)}" if own else shown


def inside(value: Any) -> tuple[str, list[Any] | dict[str, Any]]:
    """What an object is, and the objects that it holds, by their names if they have some.

    Those of _BY_ITSELF count by their kind.
    """
    base = _base(type(value))
    if base is object:
        return _inside_others(value)
    shown, contents = _inside_base(value, base)
    if own := _own(value, base):
        contents = {**contents, "own": own} if isinstance(contents, dict) else [*contents, own]
    return shown, contents


def _inside_base(value: Any, base: type) -> tuple[str, list[Any] | dict[str, Any]]:
    """As its base has it: the caller's class may have methods of other meanings."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if base in _VALUES:
        return _text(value), []
    if base is dict:
        return kind, {_key(key): one for key, one in dict.items(value)}
    if base in (list, tuple, deque):
        return kind, list(base.__iter__(value))  # type: ignore[attr-defined]
    if base in (set, frozenset):
        return kind, sorted(base.__iter__(value), key=_key)  # type: ignore[attr-defined]
    if base is partial:
        return kind, [value.func, value.args, value.keywords]
    if base is property:
        return kind, [value.fget, value.__doc__, *filter(None, [value.fset, value.fdel])]
    if base is Tensor:
        if _is_dense(value):
            numbers = "" if value.is_meta else digest([value.detach()])
            return f"{kind} {value.dtype} {list(value.shape)} {numbers}", []
        return f"{kind} {value.dtype} {value.layout}", _parts(value.detach())
    array = np.ndarray.view(value, np.ndarray)
    if array.dtype.hasobject:
        return f"{kind} {list(array.shape)}", array.ravel().tolist()
    numbers = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{kind} {array.dtype} {list(array.shape)} {numbers}", []


def _inside_others(value: Any) -> tuple[str, list[Any]]:
    cls = type(value)
    kind = f"{cls.__module__}.{cls.__qualname__}"
    if (original := _original(value)) is not None:
        return f"{kind} compiled", [original]
    if cls is MethodType:
        return kind, [value.__func__, value.__self__]
    if cls is FunctionType:
        closure = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        cells = {name: _content(cell) for name, cell in closure}
        # Two files may be loaded as modules of one name. What is found by its name is that name.
        known = value.__globals__
        named = {n: known[n] for n in sorted(names_of(value.__code__)) if n in known}
        own = {n: _name_of(one) if is_found_by_name(one) else one for n, one in named.items()}
        code = value.__code__, value.__defaults__, value.__kwdefaults__
        told = value.__name__, value.__doc__  # which decorators set, and judges read
        return f"{kind} {value.__module__}", [*code, cells, vars(value), own, *told]
    if cls is CodeType:
        # Arguments go by their names: which column it reads is in the name alone.
        names = value.co_varnames[: value.co_argcount + value.co_kwonlyargcount]
        shown = f"{kind} {value.co_qualname} {names}"
        return shown, [value.co_code, value.co_names, value.co_consts]
    if issubclass(cls, nn.Module):
        own = {n: one for n, one in _attributes(value).items() if n not in _OF_MODULES}
        tensors = dict(
            [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
        )
        numbers = f"{list(tensors)} {digest(tensors.values())}"
        others = [t for t in tensors.values() if not _is_dense(t)]
        hooks = {
            name: list(filter(_is_of_caller, vars(value).get(name, {}).values())) for name in _HOOKS
        }
        own |= {name: some for name, some in hooks.items() if some}
        own["training"] = value.training
        if issubclass(cls, torch.jit.ScriptModule):
            others += _script(value)
        return f"{kind} {numbers}", [own, dict(value.named_children()), *others]
    if issubclass(cls, type):
        own = {n: one for n, one in vars(value).items() if not _is_made(n, value)}
        insides = [] if is_found_by_name(value) else [own, value.__bases__]
        return f"{kind} {value.__module__}.{value.__qualname__} {value.__name__}", insides
    if issubclass(cls, staticmethod | classmethod):
        return kind, [value.__func__]
    if issubclass(cls, ModuleType):
        return f"{kind} {value.__name__}", []
    if issubclass(cls, BuiltinFunctionType | MethodWrapperType | MethodDescriptorType):
        owner = getattr(value, "__self__", None)
        contents = [] if owner is None or isinstance(owner, ModuleType) else [owner]
        return f"{kind} {getattr(value, '__module__', None)}.{value.__qualname__}", contents
    if issubclass(cls, weakref.ReferenceType):
        return kind, [value()]
    if _changes_by_itself(cls):
        return kind, []
    if kind == "tokenizers.Tokenizer":  # each call sets how it cuts and pads
        state = json.loads(value.to_str())
        return kind, [{k: v for k, v in state.items() if k not in ("truncation", "padding")}]
    if cls is memoryview:
        return kind, [value.tobytes()]
    if issubclass(cls, torch.jit.ScriptFunction):
        return kind, _script(value)
    for to_numpy in _of_class(cls, "to_numpy"):
        if _library(to_numpy) in _TABLES:
            names = [name for name in ("columns", "index") if hasattr(cls, name)]
            return kind, [to_numpy(value), *(getattr(value, name) for name in names)]
    if not any(isinstance(one, FunctionType) for one in _of_class(cls, "__iter__")):
        if issubclass(cls, Mapping):
            return kind, [dict(value)]
        if issubclass(cls, Set | ValuesView):
            return kind, sorted(value, key=_key) if issubclass(cls, Set) else list(value)
    attributes = _attributes(value)
    attributes.pop("_inverted_", None)  # of a flag: it is there once it was asked for
    return f"{kind}{_named_in_c(value)}", [attributes, *_reduced(value, attributes)]


def _named_in_c(value: Any) -> str:
    """The name of an object whose class, written in C, gives objects names: Cython's functions."""
    names = [""]
    for name in ("__module__", "__qualname__"):
        found = next(iter(_of_class(type(value), name)), None)
        if type(found) is GetSetDescriptorType:
            names.append(str(found.__get__(value)))
    return " ".join(names)


def _is_made(name: str, owner: type) -> bool:
    """Whether an attribute of a class follows from the others, and differs in every process: what
    dataclasses write of their defaults, and pydantic's schemas with addresses."""
    if name == "__doc__":
        return "__dataclass_fields__" in vars(owner)
    return name.startswith("__pydantic_") and name != "__pydantic_fields__"


def _script(value: Any) -> list[Any]:
    """The graph of what torch.jit has made, without lines of its source and numbers of the process
    in its names, and its constants; a part of a module may have none."""
    try:
        graph = value.graph
    except (AttributeError, RuntimeError):
        return []
    found = [n.output().toIValue() for n in graph.nodes() if n.kind() == "prim::Constant"]
    return [re.sub(r" # .*|\.___torch_mangle_\d+", "", str(graph)), *found]


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)


def _parts(tensor: Tensor) -> list[Any]:
    """The dense tensors of one that is nested, quantised or sparse, and its sizes."""
    if tensor.is_nested:
        return list(tensor.unbind())
    sizes = list(tensor.shape)
    if tensor.is_quantized:
        return [sizes, str(tensor.qscheme()), tensor.int_repr(), tensor.dequantize()]
    if tensor.layout == torch.sparse_coo:
        return [sizes, tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [sizes, tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [sizes, tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [sizes, tensor.to_dense()]


def is_found_by_name(value: Any) -> bool:
    """Whether a class or function is the only one of its name, unlike one that a function makes."""
    if not issubclass(type(value), type | FunctionType | BuiltinFunctionType):
        return issubclass(type(value), ModuleType)
    if value.__module__ == "builtins":
        return True
    module = sys.modules.get(value.__module__)
    try:
        return attrgetter(value.__qualname__)(module) is value and _is_importable(module)
    except AttributeError:  # as of "make.<locals>.Reward"
        return False


def _is_importable(module: Any) -> bool:
    """Whether an import of its name gives this module: frameworks load several files of rewards
    under one name, which is on no path."""
    name, file = module.__name__, getattr(module, "__file__", None)
    is_known = file is None or name.partition(".")[0] in {"__main__", *sys.stdlib_module_names}
    return is_known or _origin(name) == file


@cache
def _origin(name: str) -> str | None:
    """The file that an import of the name reads, whatever has been loaded under it."""
    parent = sys.modules.get(name.rpartition(".")[0])
    for finder in sys.meta_path:
        if (spec := finder.find_spec(name, getattr(parent, "__path__", None))) is not None:
            return spec.origin
    return None


def _name_of(value: Any) -> str:
    """Of what `is_found_by_name`."""
    if issubclass(type(value), ModuleType):
        return f"module {value.__name__}"
    return f"{value.__module__}.{value.__qualname__}"


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that names itself before it is there
        return None
