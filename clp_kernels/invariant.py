"""The batch-invariant mode: one flag, read by the ops and by the sampler."""

from collections.abc import Iterator
from contextlib import contextmanager

# How many contexts are open. A plain module global: torch.compile can guard on it (not on a
# ContextVar), and autograd's device threads see it.
depth = 0


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside this context a row's result does not depend, to the bit, on the rest of the batch.

    GEMM libraries pick a kernel by the number of rows, so a row of `F.linear` may round
    differently in another batch. Inside the context every base product and low-rank product of
    clp_kernels runs in fixed tiles of 16 rows, and `clp.Sampler` decodes row by row (PyTorch's own
    attention and activation kernels round by position in the batch too). `sample` and `mix_logits`
    are invariant always. The cost is the loss of batching; docs/log.md has measured ratios.
    Nests; holds for the whole process, all threads.
    """
    global depth
    depth += 1
    try:
        yield
    finally:
        depth -= 1


def is_batch_invariant() -> bool:
    """Whether `batch_invariant()` is active."""
    return depth > 0
