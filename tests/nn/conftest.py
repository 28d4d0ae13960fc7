"""Fixtures of the tests of layers."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm


@pytest.fixture
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorms compute in float32 whatever their input; here in its own dtype.

    A gradient rounded to float32 in each of m terms is another one than that of their sum.
    """

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        scale = 1 + self.weight if isinstance(self, Gemma3RMSNorm) else self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale

    for kind in (LlamaRMSNorm, Qwen2RMSNorm, Gemma3RMSNorm):
        monkeypatch.setattr(kind, "forward", norm)
