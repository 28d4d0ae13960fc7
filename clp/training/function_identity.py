"""What tells functions given in Python apart when a run is resumed: their names and their insides.

The name of a function must be that of before. What it computes may have changed (it was mended, or
what it reads is a state); it is compared only to see whether two functions have changed places.
"""

import hashlib
import json
import re
import sys
from collections import deque
from collections.abc import Mapping, Set
from dataclasses import is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from operator import attrgetter, itemgetter, methodcaller
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
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

# Objects of one function that are looked at: some lead to everything in the process.
MOST_OBJECTS = 10_000
# Types whose repr is their value.
_VALUES = (str, float, bytes, bytearray, complex, range, re.Pattern, date, time, timedelta, Decimal,
           Fraction, PurePath, UUID, itemgetter, attrgetter, methodcaller)  # fmt: skip
# Parts of the standard library whose objects change by themselves, such as threads and locks.
_BY_ITSELF = {"asyncio", "concurrent", "contextvars", "http", "io", "logging", "multiprocessing",
              "queue", "random", "selectors", "socket", "sqlite3", "ssl", "subprocess", "tempfile",
              "thread", "threading", "urllib", "weakref"}  # fmt: skip

# What every module has; parameters, buffers and other modules are looked at by themselves.
_OF_MODULES = frozenset(vars(nn.Module()))


def plain(value: Any) -> Any:
    """A value as JSON has it: equal for equal ones, in whatever order a mapping holds its keys."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {"keys": sorted([repr(k), plain(v)] for k, v in value.items())}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted(json.dumps(plain(one)) for one in value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: plain(vars(value))}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return {type(value).__name__: _without_address(value)}


def name_of(function: Any) -> str:
    """The name of a function or of an object's class, and the plain values that a partial binds.

    Texts, which may be secret, count by their digests; of other values that it binds, such as a
    cache that fills, the kind alone.
    """
    if isinstance(function, partial):
        keywords = {name: _kind(value) for name, value in function.keywords.items()}
        bound = json.dumps([list(map(_kind, function.args)), keywords], sort_keys=True)
        return f"{name_of(function.func)} with {bound}"
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def insides_of(function: Any) -> str:
    """A digest of the function's code, of what it is bound to and of what its closure holds."""
    found, kept = hashlib.sha256(), dict[int, Any]()
    waiting = deque([function])
    while waiting and len(kept) < MOST_OBJECTS:
        value = waiting.popleft()
        again = id(value) in kept
        kept[id(value)] = value  # so that no id is given twice
        shown, contents = (type(value).__qualname__, []) if again else _inside(value)
        if not _is_found_by_name(type(value)):
            contents = [*contents, type(value)]
        # Plain values here and now, in full: they are many, and Python may share them.
        parts = [_plain_text(one) for one in contents]
        text = "\n".join([shown, *("object" if part is None else part for part in parts)])
        found.update(f"{text}\n\n".encode(errors="surrogatepass"))
        waiting.extend(one for one, part in zip(contents, parts, strict=True) if part is None)
    return found.hexdigest()


def _plain_text(value: Any) -> str | None:
    """A value that holds no others, in full; None for others."""
    if value is None or isinstance(value, _VALUES):
        return f"{type(value).__qualname__} {value!r}"
    if isinstance(value, int):
        return f"{type(value).__qualname__} {hex(value)}"
    return None


def _kind(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, str):
        return f"text {hashlib.sha256(value.encode(errors='surrogatepass')).hexdigest()[:12]}"
    plain_number = isinstance(value, int | float) and not _is_huge(value)
    return value if value is None or plain_number else type(value).__name__


def _is_huge(value: Any) -> bool:
    """Whether Python refuses to write the integer: more than 4,300 digits."""
    return isinstance(value, int) and value.bit_length() > 14_000


def _without_address(value: Any) -> str:
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def _key(value: Any) -> str:
    """A key or a member, by what orders it: others than plain ones by their kind."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, tuple):
        return f"({','.join(map(_key, value[:100]))})"
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(_key, value)))}}}"
    return _plain_text(value) or type(value).__qualname__


def _inside(value: Any) -> tuple[str, list[Any]]:
    """What an object is, and the objects that it holds.

    Those of _BY_ITSELF count by their kind.
    """
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if (plain_text := _plain_text(value)) is not None:
        return plain_text, []
    if isinstance(value, Mapping):
        keys = sorted(value, key=_key)
        return f"{kind} {list(map(_key, keys))}", [value[key] for key in keys]
    if isinstance(value, list | tuple | deque):
        return kind, list(value)
    if isinstance(value, Set):
        return kind, sorted(value, key=_key)
    if isinstance(value, partial):
        return kind, [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return kind, [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        # Two files may be loaded as modules of one name. What is found by its name is the same.
        known = value.__globals__
        named = {n: known[n] for n in names_of(value.__code__) if n in known}
        own = {n: one for n, one in named.items() if not _is_found_by_name(one)}
        code = value.__code__, value.__defaults__, value.__kwdefaults__
        contents = [*code, cells, vars(value), own]
        return f"{kind} {value.__module__}", contents
    if isinstance(value, CodeType):
        return f"{kind} {value.co_qualname}", [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, nn.Module):
        own = {name: one for name, one in vars(value).items() if name not in _OF_MODULES}
        tensors = dict(
            [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
        )
        numbers = f"{list(tensors)} {digest(tensors.values())}"
        return f"{kind} {numbers}", [own, dict(value.named_children())]
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided and not (value.is_meta or value.is_quantized)
        numbers = digest([value.detach()]) if dense else ""
        return f"{kind} {value.dtype} {list(value.shape)} {numbers}", []
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return f"{kind} {list(value.shape)}", value.ravel().tolist()
        numbers = hashlib.sha256(value.tobytes()).hexdigest()
        return f"{kind} {value.dtype} {list(value.shape)} {numbers}", []
    if isinstance(value, type):
        insides = [] if _is_found_by_name(value) else [dict(vars(value)), value.__bases__]
        return f"{kind} {value.__module__}.{value.__qualname__}", insides
    if isinstance(value, property):
        return kind, [value.fget]
    if isinstance(value, staticmethod | classmethod):
        return kind, [value.__func__]
    if isinstance(value, ModuleType):
        return f"{kind} {value.__name__}", []
    if isinstance(value, BuiltinFunctionType | MethodWrapperType | MethodDescriptorType):
        owner = getattr(value, "__self__", None)
        contents = [] if owner is None or isinstance(owner, ModuleType) else [owner]
        return f"{kind} {getattr(value, '__module__', None)}.{value.__qualname__}", contents
    if type(value).__module__.partition(".")[0].lstrip("_") in _BY_ITSELF:
        return kind, []
    if callable(as_array := getattr(value, "to_numpy", None)):  # pandas and its like
        return kind, [as_array()]
    slots = [name for one in type(value).__mro__ for name in _slots(one)]
    attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return kind, [attributes | getattr(value, "__dict__", {})]


def _is_found_by_name(value: Any) -> bool:
    """Whether a class or function is the only one of its name, unlike one that a function makes."""
    if not isinstance(value, type | FunctionType | BuiltinFunctionType):
        return isinstance(value, ModuleType)
    if value.__module__ == "builtins":
        return True
    try:
        return attrgetter(value.__qualname__)(sys.modules.get(value.__module__)) is value
    except AttributeError:  # as of "make.<locals>.Reward"
        return False


def _slots(kind: type) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that names itself before it is there
        return None
