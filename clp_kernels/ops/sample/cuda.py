"""`sample` on the GPU: launches csrc/cuda/sample/sample.cu. Unverified: it has not run on a GPU."""

import torch
from torch import Tensor

from clp_kernels import native


def why_not(logits: Tensor, *_: object) -> str | None:
    """None if the kernel can run, else a sentence."""
    if logits.device.type != "cuda":
        return f"the logits are on {logits.device}, not on a GPU"
    return native.cuda_missing() or native.dtype_why_not(logits)


def sample(
    logits: Tensor,
    weights: Tensor | None,
    mode: str,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpu.sample`, on CUDA tensors; relies on the checks of the public function.

    Enqueued on the current stream of the logits' device; reads nothing on the host, and works under
    CUDA graph capture: weights, temperatures, filters, seeds and positions may change between
    replays. Which filters exist is fixed by which tensors are given.

    Deterministic; a row's bits do not depend on the other rows or their filters. A row without
    filters is read once (twice in probability mode). With a filter argument the workspace also
    holds V floats a row; a row that a filter applies to is mixed into it and read again, once to
    draw and about three times each for top-k and top-p.

    Raises: as `cpu.sample`; RuntimeError for sizes beyond the launch limits in
    csrc/cuda/sample/sample.cu.
    """
    module = native.cuda()
    outputs, arguments = native.sample_arguments(
        logits, weights, mode, temperature, top_k, top_p, min_p, seed, position
    )
    m, batch, vocab_size = logits.shape
    if batch == 0:
        return outputs
    filters = any(value is not None for value in (top_k, top_p, min_p))
    size = module.sample_workspace(m, batch, vocab_size, mode == "probability", filters)
    workspace = torch.empty(size, dtype=torch.uint8, device=logits.device)
    module.sample(
        **arguments,
        workspace=workspace,
        device=logits.device.index,
        stream=torch.cuda.current_stream(logits.device).cuda_stream,
    )
    return outputs
