"""Argument checks of the public ops: each error names the argument, what was expected, what came.

Shapes, dtypes and devices are checked always. Values (NaN, ranges) are checked on CPU tensors
only, because reading a CUDA tensor on the host would stall the stream; `steer` and the samplers
check the weights of a device where they enter.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor(name: str, value: object, shape: Sequence[int | None], like: Tensor | None) -> Tensor:
    """A floating tensor of this shape (None: any size), on `like`'s device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    sizes = value.shape
    fits = len(sizes) == len(shape)
    # A plain loop: this runs several times per call, and a generator costs a microsecond more.
    for want, got in zip(shape, sizes, strict=False):
        if want is not None and want != got:
            fits = False
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(sizes)}")
    same_device(name, value, like)
    return value


def same_device(name: str, value: Tensor, like: Tensor | None) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if like is not None and value.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device} like the other inputs, got {value.device}"
        )


def same_dtype(name: str, value: Tensor, *dtypes: torch.dtype) -> None:
    """Raises TypeError unless the tensor has one of these dtypes."""
    if value.dtype not in dtypes:
        wanted = " or ".join(str(d) for d in dict.fromkeys(dtypes))
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}")


def mode(value: str) -> None:
    """Raises ValueError for a mixing mode that does not exist."""
    if value not in ("geometric", "probability"):
        raise ValueError(f'mode must be "geometric" or "probability", got {value!r}')


def readable(value: Tensor) -> bool:
    """Whether the values of this tensor may be looked at: on the CPU, outside torch.compile."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def finite(name: str, value: Tensor) -> None:
    """Raises ValueError for NaN or infinity in a CPU tensor."""
    if not readable(value):
        return
    # A finite sum has finite terms. Of a few numbers Python's sum costs least: 0.7 us, against 3 us
    # for PyTorch's and 10 us for a test of every entry.
    few = value.dim() == 2 and value.numel() <= 32
    if math.isfinite(sum(map(sum, value.tolist())) if few else value.sum().item()):
        return
    if not bool(torch.isfinite(value).all()):
        bad = (~torch.isfinite(value)).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {value[tuple(bad)].item()} at index {bad}")


def weights(value: Tensor, batch: int | None, m: int, like: Tensor) -> Tensor:
    """weights [B, m] real and finite, as float32 (float64 beside float64 inputs)."""
    tensor("weights", value, (batch, m), like)
    finite("weights", value)
    wanted = accumulator(like.dtype)
    return value if value.dtype == wanted else value.to(wanted)


def weights_for(x: Tensor, value: Tensor, m: int, ids: Tensor | None) -> Tensor:
    """`weights` for x [B, ..., in], or for x [T, in] with example_ids, which are checked too."""
    if ids is None:
        return weights(value, x.shape[0], m, x)
    if x.dim() != 2:
        raise ValueError(f"x must be [T, in] when example_ids is given, got {list(x.shape)}")
    checked = weights(value, None, m, x)
    example_ids(ids, x.shape[0], checked.shape[0], x)
    return checked


def example_ids(ids: Tensor, num_tokens: int, batch: int, like: Tensor) -> None:
    """example_ids: int32 or int64 [T], each in [0, B)."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"example_ids must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"example_ids must be int32 or int64, got {ids.dtype}")
    if tuple(ids.shape) != (num_tokens,):
        raise ValueError(f"example_ids must have shape [{num_tokens}], got {list(ids.shape)}")
    same_device("example_ids", ids, like)
    in_range("example_ids", ids, 0, batch)


def in_range(name: str, ids: Tensor, low: int, high: int, also: int | None = None) -> None:
    """Raises ValueError for an index of a CPU tensor outside [low, high), but for `also`."""
    if not readable(ids) or ids.numel() == 0:
        return
    outside = (ids < low) | (ids >= high)
    if also is not None:
        outside &= ids != also
    if bool(outside.any()):
        extra = "" if also is None else f" or {also}"
        got = ids[outside][0].item()
        raise ValueError(f"{name} must lie in [{low}, {high}){extra}, got {got}")


def per_example(
    name: str, value: object, batch: int, like: Tensor, dtype: torch.dtype, ok: str
) -> Tensor:
    """A number or a [B] tensor as a [B] tensor of this dtype; `ok` is a range of _RANGES."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not dtype.is_floating_point:
            raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
        if tuple(value.shape) != (batch,):
            raise ValueError(
                f"{name} must be a number or have shape [{batch}], got {list(value.shape)}"
            )
        same_device(name, value, like)
        rows = value.to(dtype)
        if readable(rows):
            good = _RANGES[ok](rows)
            if not bool(good.all()):
                raise ValueError(f"{name} must be {ok}, got {rows[~good][0].item()}")
        return rows
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    number = as_float(value)
    if not dtype.is_floating_point:
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        number = int(value)
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"{name} must be a 64-bit integer, got {number}")
    if not _RANGES[ok](number):
        raise ValueError(f"{name} must be {ok}, got {number}")
    return torch.full((batch,), number, dtype=dtype, device=like.device)


def scaling(value: object, m: int, like: Tensor) -> float | Tensor:
    """A finite number as a float, or a finite tensor [m]."""
    if isinstance(value, Tensor):
        tensor("scaling", value, (m,), like)
        finite("scaling", value)
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"scaling must be a number or a tensor [m], got {type(value).__name__}")
    number = as_float(value)
    if not math.isfinite(number):
        raise ValueError(f"scaling must be finite, got {number}")
    return number


def as_float(value: Real) -> float:
    """float(value), infinite for an integer that is larger than any float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]  # Real has it


def broadcast_temperature(value: object, shape: torch.Size, like: Tensor) -> Tensor:
    """A finite number > 0, or a tensor of them that broadcasts to `shape`; expanded to it, float32
    (float64 beside a float64 `like`)."""
    dtype = accumulator(like.dtype)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"temperature must be a number or a tensor, got {type(value).__name__}")
        value = torch.full((), as_float(value), dtype=dtype, device=like.device)
    same_device("temperature", value, like)
    sizes = tuple(value.shape)
    pairs = zip(reversed(sizes), reversed(shape), strict=False)
    if len(sizes) > len(shape) or any(have not in (1, want) for have, want in pairs):
        raise ValueError(f"temperature must broadcast to {list(shape)}, got {list(sizes)}")
    rows = value.to(dtype)
    if readable(rows) and not bool(_RANGES["finite and > 0"](rows).all()):
        raise ValueError(f"temperature must be finite and > 0, got {rows.min().item()}")
    return rows.expand(shape)


# Plain comparisons, so that each takes a number or a tensor; NaN fails them all.
_RANGES: dict[str, Callable[[Any], Any]] = {
    "finite and >= 0": lambda t: (t >= 0) & (t < math.inf),
    "finite and > 0": lambda t: (t > 0) & (t < math.inf),
    "0 (off) or positive": lambda t: t >= 0,
    "in (0, 1]": lambda t: (t > 0) & (t <= 1),
    "in [0, 1]": lambda t: (t >= 0) & (t <= 1),
    "an integer": lambda t: t == t,
}


def is_number(value: object, number: float) -> bool:
    """Whether this is a plain number, not a tensor or an array, and equal to `number`."""
    return not hasattr(value, "__len__") and bool(value == number)


def describe(value: object) -> str:
    """What came, for a message: dtype and shape, or the type's name."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
