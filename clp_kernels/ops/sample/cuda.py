"""`sample` on the GPU: launches csrc/cuda/sample/sample.cu. Unverified: it has not run on a GPU."""

import torch
from torch import Tensor

from clp_kernels import native
from clp_kernels.ops.sample.cpu import arguments
from clp_kernels.ops.sample.reference import Inputs


def why_not(inputs: Inputs) -> str | None:
    """None if the kernel can run, else a sentence."""
    if inputs.logits.device.type != "cuda":
        return f"the logits are on {inputs.logits.device}, not on a GPU"
    return native.cuda_missing(inputs.logits.device) or native.dtype_why_not(inputs.logits)


def sample(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpu.sample`, on CUDA tensors; relies on the checks of the public function.

    Enqueued on the current stream of the logits' device; reads nothing on the host, and works under
    CUDA graph capture: weights, temperatures, filters, seeds and positions may change between
    replays. Which filters exist is fixed by which tensors are given.

    Deterministic; a row's bits do not depend on the other rows or their filters. A row without
    filters is read once (twice in probability mode). With a filter argument the workspace also
    holds V floats per row; a row that a filter applies to is mixed into it and read again, once to
    draw and about three times each for top-k and top-p.

    Raises: as `cpu.sample`; RuntimeError for sizes beyond the launch limits in
    csrc/cuda/sample/sample.cu.
    """
    module = native.cuda()
    outputs, named = arguments(inputs)
    (m, batch, vocab_size), device = inputs.logits.shape, inputs.logits.device
    if batch == 0:
        return outputs
    filters = any(value is not None for value in (inputs.top_k, inputs.top_p, inputs.min_p))
    size = module.sample_workspace(m, batch, vocab_size, named["probability"], filters)
    module.sample(
        **named,
        workspace=torch.empty(size, dtype=torch.uint8, device=device),
        device=device.index,
        stream=torch.cuda.current_stream(device).cuda_stream,
    )
    return outputs
