"""Errors of code that is not the engine's: a model's, a tokenizer's, or of memory that is short."""

import traceback

# Why a sequence ends whose logits are infinite or NaN.
NOT_FINITE = "the logits are not finite for these weights"


class NotFiniteError(RuntimeError):
    """A completion could not be drawn, because the logits are not finite."""


class ModelError(Exception):
    """A model or a tokenizer has raised, or the device has no memory left.

    The text is "TypeName: message" of what was raised, which is also the `__cause__`. It ends the
    sequences of the call. Every other exception is a fault of the engine and is raised as it is.
    """

    def __init__(self, cause: BaseException) -> None:
        # Its own text may raise; traceback then says so.
        text = traceback.TracebackException(type(cause), cause, None)
        super().__init__(f"{type(cause).__name__}: {text}")


class model_errors:
    """Context for one call of a model or a tokenizer: whatever it raises becomes a ModelError.

    A model calls the engine's attention, and its own code may raise anything. So an error whose
    innermost frame is of this package, and that neither PyTorch nor the package raises on purpose
    (AttributeError, TypeError, AssertionError, ...), is a fault of the engine and raised as it is.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not _of_the_engine(error):
            raise ModelError(error) from error


class memory_errors:
    """Context for one call that needs memory: a lack of it becomes a ModelError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None and is_out_of_memory(error):
            raise ModelError(error) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is short. PyTorch has a class for a GPU's alone, and a text for the CPU's."""
    name = type(error).__name__  # not imported for this: it takes seconds
    return (
        isinstance(error, MemoryError)
        or name == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def _of_the_engine(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    on_purpose = isinstance(error, (ValueError, RuntimeError, MemoryError))
    return module.partition(".")[0] == "clp" and not on_purpose
