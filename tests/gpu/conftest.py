"""Fixtures of the GPU tests, which also run without tests/conftest.py and the packages it needs."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an unwritten output fails its test; one seed, and no TF32."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
