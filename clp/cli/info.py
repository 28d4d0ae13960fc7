"""clp info."""

from collections.abc import Sequence


def run(argv: Sequence[str]) -> None:
    """clp info: versions, devices, and which kernels run here."""
    from clp_kernels import info

    info.main(list(argv))
