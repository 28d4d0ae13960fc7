"""MOD: the next-token distributions of single-objective experts, mixed when sampling."""

from pathlib import Path

from clp.data.names import closest
from clp.methods.experts import check_experts, train_experts
from clp.methods.method import NOTHING, Outcome, on_grid, steps_of
from clp.methods.soup import soup_of
from clp.policies.logit_mixture import LogitMixture
from clp.training.config import CLPConfig

_NAMED = ("reverse_kl", "forward_kl")


def mod(
    args: CLPConfig,
    folder: Path,
    *,
    budget: float = 1.0,
    check_only: bool = False,
    divergence: str | float = "reverse_kl",
) -> Outcome:
    """Multi-objective decoding (arXiv:2406.18853): no training beside that of the experts.

    Each of the m experts has 1/m of the budget; a sampled token costs m forwards.

    Args:
        divergence: "reverse_kl": proportional to prod_i p_i^w_i. "forward_kl": to
            (sum_i w_i / p_i)^-1. A number a > 0, the alpha-divergence: to
            (sum_i w_i p_i^-a)^(-1/a).
    """
    exponent = _exponent(divergence)
    steps = steps_of(args, budget, len(args.rewards))
    check_experts(args)
    if check_only:
        return NOTHING
    folders, used = train_experts(args, folder.parent, steps)
    mode = "geometric" if exponent is None else "power"
    mixture = LogitMixture.of_adapters(soup_of(args, folders), mode=mode, exponent=exponent)
    return Outcome(on_grid(mixture), used)


def _exponent(divergence: str | float) -> float | None:
    """Of LogitMixture's mode "power"; None for "geometric"."""
    if isinstance(divergence, str):
        if divergence not in _NAMED:
            raise ValueError(
                f"divergence must be one of {', '.join(_NAMED)} or a number, got {divergence!r}"
                f"{closest(divergence, _NAMED)}"
            )
        return None if divergence == "reverse_kl" else -1.0
    if type(divergence) not in (int, float) or not 0.01 <= divergence <= 100:
        raise ValueError(f"divergence must be a number from 0.01 to 100, got {divergence!r}")
    return -float(divergence)
