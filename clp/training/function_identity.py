"""What tells functions given in Python apart when a run is resumed: their names and their insides.

The name of a function must be that of before. What it computes may have changed (it was mended, or
what it reads is a state); it is compared only to see whether two functions have changed places.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Mapping, Set
from dataclasses import is_dataclass
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

from clp.engine.model_state import digest

# Objects of one function that are looked at: some lead to everything in the process.
MOST_OBJECTS = 10_000
# Entries up to which the values of an array count; of a larger one its shape alone.
MOST_ENTRIES = 4096


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

    Of other values that it binds, such as a cache that fills, the kind alone.
    """
    if isinstance(function, partial):
        bound = json.dumps(
            [
                list(map(_kind, function.args)),
                {name: _kind(value) for name, value in function.keywords.items()},
            ]
        )
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
        shown, held = (type(value).__qualname__, []) if again else _inside(value)
        found.update(f"{shown} {len(held)}\n".encode(errors="surrogatepass"))
        waiting.extend(held)
    return found.hexdigest()


def _kind(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    return _without_address(value) if hasattr(value, "__fspath__") else type(value).__name__


def _without_address(value: Any) -> str:
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def _inside(value: Any) -> tuple[str, list[Any]]:
    """What an object is, and the objects that it holds."""
    kind = type(value).__qualname__
    if value is None or isinstance(value, str | int | float | bytes):
        return f"{kind} {value!r}", []
    if isinstance(value, Mapping):
        keys = sorted(value, key=_without_address)
        return f"{kind} {list(map(_without_address, keys))}", [value[key] for key in keys]
    if isinstance(value, list | tuple):
        return kind, list(value)
    if isinstance(value, Set):
        return kind, sorted(value, key=_without_address)
    if isinstance(value, partial):
        return kind, [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return kind, [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        held = [value.__code__, value.__defaults__, value.__kwdefaults__, cells]
        return f"{kind} {value.__module__}", held
    if isinstance(value, CodeType):
        return f"{kind} {value.co_qualname}", [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, nn.Module):
        return f"{kind} {digest(value.parameters())}", []
    if isinstance(value, Tensor | np.ndarray):
        few = np.prod(value.shape) <= MOST_ENTRIES
        return f"{kind} {value.dtype} {list(value.shape)}", [value.tolist()] if few else []
    if isinstance(value, type):
        return f"{kind} {value.__module__}.{value.__qualname__}", []
    if (attributes := getattr(value, "__dict__", None)) is not None:
        return kind, [attributes]
    return f"{kind} {_without_address(value)}", []


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that names itself before it is there
        return None
