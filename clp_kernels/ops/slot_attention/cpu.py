"""Attention of a decoding step on the CPU: launches csrc/cpu/slot_attention/slot_attention.cpp.

Called for every layer of every step, so that its checks are in C++
(csrc/bindings/slot_attention.cpp), and its shapes those that transformers' attention interface
passes: nothing is viewed or reshaped.
"""

from torch import Tensor

from clp_kernels import native, trust


def why_not(tensor: Tensor) -> str | None:
    """Why this kernel cannot run on tensors like this one, or None."""
    if tensor.device.type != "cpu":
        return f"the queries are on {tensor.device}, not on the CPU"
    missing = native.cpu_missing() or native.dtype_why_not(tensor)
    return missing or trust.distrust("slot_attention", "cpu", tensor.device)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    first: int,
    scale: float | None = None,
    window: int | None = None,
    isa: str = "",
) -> Tensor:
    """Writes a token's key and value into its slot, and attends to what is in the slot.

        keys[s, h, n] = k[b, h],  values[s, h, n] = v[b, h]   for s = first + b, n = lengths[b]
        out[b, h G + g] = sum_j softmax_j(scale q[b, h G + g] . keys[s, h, j]) values[s, h, j]

    over positions j from max(0, n + 1 - window) to n; G = H / heads.

    Args:
        q: [B, H, 1, d], float32, bfloat16 or float16. Any strides; a copy is made if the last
            axis of q, k or v is not contiguous.
        k, v: [B, heads, 1, d] and [B, heads, 1, dv].
        keys, values: [slots, heads, capacity, d] and [slots, heads, capacity, dv], contiguous;
            changed in place at position lengths[b] of each slot.
        lengths: int64 [B], tokens in each slot, below capacity.
        first: The first of the B slots.
        scale: None for 1 / sqrt(d).
        window: None for all positions.
        isa: an instruction set for this call (see native.isa); "" for the one in use.

    Returns: [B, 1, H, dv], float32 within and rounded once. What lies behind a slot's tokens is not
    read. Deterministic; a row's bits depend neither on the other rows nor on the number of threads.
    No gradient.

    Raises:
        ValueError: shapes, dtypes, devices or layouts other than these; slots or positions that are
            not there; an unknown instruction set. Nothing is written then.
        RuntimeError: the CPU kernels are missing.
    """
    run, rest = native.cpu().slot_attention, (first, scale, window, isa)
    out: Tensor | None = run(q, k, v, keys, values, lengths, *rest)
    if out is None:
        q, k, v, lengths = (t.contiguous() for t in (q, k, v, lengths))
        out = run(q, k, v, keys, values, lengths, *rest)
    if out is None:
        raise _wrong(q=q, k=k, v=v, keys=keys, values=values, lengths=lengths)
    return out


def _wrong(**tensors: Tensor) -> ValueError:
    got = ", ".join(
        f"{name} {list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"
        + ("" if t.is_contiguous() else " with gaps")
        for name, t in tensors.items()
    )
    return ValueError(
        "slot_attention expects on the CPU q [B, H, 1, d], k [B, heads, 1, d] and v [B, heads, 1, "
        "dv], keys [slots, heads, capacity, d] and values [slots, heads, capacity, dv] contiguous, "
        "H a multiple of heads, all of one dtype of float32, bfloat16 and float16; lengths int64 "
        f"[B]. Got {got}"
    )
