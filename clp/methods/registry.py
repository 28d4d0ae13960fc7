"""The methods by name."""

import inspect
from collections.abc import Iterable
from typing import Any

from clp.data.names import closest
from clp.methods.averaged_adapters import averaged_adapters
from clp.methods.clp import clp
from clp.methods.method import Method
from clp.methods.mod import mod
from clp.methods.one_per_weight import one_per_weight
from clp.methods.rewarded_soups import rewarded_soups
from clp.methods.warm_start import warm_start

_ALL: tuple[Any, ...] = (
    clp, rewarded_soups, averaged_adapters, mod, one_per_weight, warm_start
)  # fmt: skip
METHODS: dict[str, Method] = {function.__name__: function for function in _ALL}


def find_method(name: str, options: Iterable[str] = ()) -> Method:
    """The method of that name.

    Args:
        options: Names of the options that it is to be called with.

    Raises: ValueError for an unknown method or option, with the closest match, or a missing option.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"method must be one of {known}, got {name!r}{closest(name, METHODS)}")
    given = set(options)
    parameters = inspect.signature(METHODS[name]).parameters.values()
    shared = ("args", "folder", "budget", "check_only")
    own = {p.name: p.default is p.empty for p in parameters if p.name not in shared}
    for option in sorted(given - own.keys()):
        known = ", ".join(own) or "none"
        raise ValueError(
            f"method {name!r} has no option {option!r}; its options: {known}{closest(option, own)}"
        )
    for option, required in own.items():
        if required and option not in given:
            raise ValueError(f"method {name!r} needs the option {option!r}")
    return METHODS[name]
