"""Errors of code that is not the engine's: a model's, a tokenizer's, or of memory that is short."""

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
        super().__init__(f"{type(cause).__name__}: {cause}")


class model_errors:
    """Context for one call: an exception of one of `kinds` becomes a ModelError.

    `Exception` is for calls of a model or a tokenizer alone: their code is anyone's, and may raise
    anything. Nothing of the engine's bookkeeping belongs inside.
    """

    def __init__(self, *kinds: type[Exception]) -> None:
        self.kinds = kinds

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self.kinds):
            raise ModelError(error) from error
