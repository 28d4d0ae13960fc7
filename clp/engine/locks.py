"""Locks: samplers of one model in several threads run one after the other; a sampler is for one
thread at a time."""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

LOCKS: dict[int, Any] = {}  # by id of a model's configuration, while it lives
_GUARD = threading.Lock()


def locks_of(configs: Sequence[Any]) -> list[Any]:
    """The locks of some models' configurations, in the order in which all threads take them.

    A lock belongs to a configuration, not to a model: that is what a forward of the sampler
    changes, and models made from one configuration object share it.
    """
    with _GUARD:
        for config in configs:
            if id(config) not in LOCKS:
                LOCKS[id(config)] = threading.RLock()
                weakref.finalize(config, LOCKS.pop, id(config)).atexit = False
        return sorted({LOCKS[id(config)] for config in configs}, key=id)


def locked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a method that runs while its object's `locks` are taken."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _with(self.locks, functools.partial(method, self, *args, **kwargs))

    return run


def one_thread(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a method that raises RuntimeError while another thread runs one of the object.

    The object keeps a lock `using`, which its own methods may take again.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.using.acquire(blocking=False):
            raise RuntimeError(
                f"{type(self).__name__}.{method.__name__} was called while another thread runs "
                "this object: make one for each thread"
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self.using.release()

    return run


def _with(locks: Sequence[Any], call: Callable[[], Any]) -> Any:
    # Nested `with` statements: each releases its lock, wherever Ctrl-C comes.
    if not locks:
        return call()
    with locks[0]:
        return _with(locks[1:], call)
