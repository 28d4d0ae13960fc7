"""Inputs and the error budget that tests and benchmarks share. Imports only torch.

A backend is right when it is no worse than twice plain PyTorch in the same dtype, both measured
against float64; see `assert_within_budget`. Benchmarks call it on the inputs they time, before
they report a speed.
"""

import torch
from torch import Tensor

WEIGHT_KINDS = ("one_hot", "uniform", "dirichlet", "zero", "negative", "all_equal", "all_different")

# Relative to max|reference|. float64 serves finite differences and exact checks.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


def weight_rows(
    kind: str,
    batch: int,
    m: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Weight rows [B, m] of one kind, drawn on the CPU.

    one_hot: row b is adapter b mod m.     uniform: every entry 1/m.
    dirichlet: Dirichlet(0.1), near the corners of the simplex.
    zero: rows 0, 2, 4, ... are exactly zero, the others Dirichlet(0.1).
    negative: standard normal, any sign and sum.
    all_equal: one Dirichlet(1) row B times.     all_different: Dirichlet(1).

    Raises: ValueError for a kind that does not exist.
    """
    if kind == "one_hot":
        rows = torch.eye(m, dtype=torch.float64)[torch.arange(batch) % m]
    elif kind == "uniform":
        rows = torch.full((batch, m), 1 / m, dtype=torch.float64)
    elif kind in ("dirichlet", "zero"):
        rows = _dirichlet(0.1, batch, m, generator)
        if kind == "zero":
            rows[::2] = 0
    elif kind == "negative":
        rows = torch.randn(batch, m, dtype=torch.float64, generator=generator)
    elif kind == "all_equal":
        rows = _dirichlet(1.0, 1, m, generator).repeat(batch, 1)
    elif kind == "all_different":
        rows = _dirichlet(1.0, batch, m, generator)
    else:
        raise ValueError(f"kind must be one of {', '.join(WEIGHT_KINDS)}, got {kind!r}")
    return rows.to(device, dtype)


def _dirichlet(
    concentration: float, batch: int, m: int, generator: torch.Generator | None
) -> Tensor:
    alpha = torch.full((batch, m), concentration, dtype=torch.float64)
    gamma = torch._standard_gamma(alpha, generator=generator).clamp(min=1e-300)
    return gamma / gamma.sum(-1, keepdim=True)


def noncontiguous(t: Tensor) -> Tensor:
    """The same values in a layout with no dense axis: axes reversed, gaps between all elements.

    The gaps hold NaN (the lowest integer), so a kernel that ignores strides cannot pass.
    """
    if t.dim() == 0:
        return t
    gap = torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).min
    store = t.new_full([2 * size for size in reversed(t.shape)], gap)
    view = store[(slice(None, None, 2),) * t.dim()].permute(*reversed(range(t.dim())))
    view.copy_(t)
    return view


def expanded(t: Tensor, dim: int = 0) -> Tensor:
    """The first entry along `dim` repeated by a stride of zero, in the shape of `t`."""
    return t.narrow(dim, 0, min(1, t.shape[dim])).expand(t.shape)


def assert_within_budget(
    got: Tensor,
    reference64: Tensor,
    same_dtype: Tensor,
    *,
    name: str = "result",
    floor: dict[torch.dtype, float] = FLOOR,
) -> float:
    """Holds a result to twice the error that plain PyTorch makes in the same dtype.

        max|got - reference64| <= 2 * max|same_dtype - reference64| + floor * max|reference64|

    The floor is relative to the largest finite entry, because errors of a sum scale with its
    terms; an all-zero reference must be met exactly. NaN and infinity must stand where the
    reference has them, and the maxima are taken over the finite rest.

    Args:
        got: The result to judge; its dtype picks the floor.
        reference64: The definition, in float64, on the same (already rounded) inputs.
        same_dtype: Plain PyTorch in the dtype of the inputs.
        name: What is compared, for the message.
        floor: Floor of each dtype; the default is the project's.

    Returns:
        The share of the budget that was used, 0 to 1 (0 where the budget is zero and met).

    Raises: AssertionError with the index and the three values there.
    """
    shapes = [tuple(t.shape) for t in (got, reference64, same_dtype)]
    if len(set(shapes)) != 1:
        raise AssertionError(f"{name}: shapes differ: got, reference64, same_dtype are {shapes}")
    if reference64.dtype != torch.float64:
        raise AssertionError(f"{name}: reference64 must be float64, is {reference64.dtype}")
    if got.numel() == 0:
        return 0.0
    g, ref, same = (t.detach().cpu().double() for t in (got, reference64, same_dtype))
    finite = ref.isfinite()
    wrong = torch.where(finite, ~g.isfinite(), (g != ref) & ~(g.isnan() & ref.isnan()))
    error = torch.where(finite, (g - ref).abs(), 0.0).masked_fill(wrong, torch.inf)
    allowed = torch.where(finite & same.isfinite(), (same - ref).abs(), 0.0).max().item()
    budget = 2 * allowed + floor[got.dtype] * torch.where(finite, ref, 0.0).abs().max().item()
    worst = int(error.argmax())
    if not error.flatten()[worst].item() <= budget:
        index = [int(i) for i in torch.unravel_index(torch.tensor(worst), ref.shape)]
        at = tuple(index)
        raise AssertionError(
            f"{name} is out of its error budget at index {index}: got {g[at].item():.9g}, "
            f"reference64 {ref[at].item():.9g}, same_dtype {same[at].item():.9g}; error "
            f"{error[at].item():.3g} > budget {budget:.3g} ({got.dtype})"
        )
    return error.flatten()[worst].item() / budget if budget else 0.0
