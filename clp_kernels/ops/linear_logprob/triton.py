"""`linear_logprob` on a GPU: cuBLAS products on blocks of the logits, one Triton kernel between.

Unverified on a GPU. The design is that of the CPU backend: a block is some tokens times some ids;
the softmax is taken as in flash attention, relative to the largest logit so far, and the gradients
with respect to hidden are sums over the vocabulary like the others, scaled down when a larger logit
comes. What the second product needs of the probabilities is rounded to the head's dtype, in which
the tensor cores take it; all sums are of what was there before that rounding. A mixed head takes
one product per expert, scaled in float32. In batch_invariant(), and for the backward of a trained
head, the reference runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clp_kernels.ops import triton_launch
from clp_kernels.ops.linear_logprob.head import Head, Inputs, gradients, outputs
from clp_kernels.ops.linear_logprob.triton_kernels import block_kernel, gradient_kernel
from clp_kernels.ops.triton_launch import KINDS, Variant, variant

# Blocks of 32 MiB of logits in float32, which the L2 cache of an H100 (50 MB) keeps between the
# product that makes them and the kernel that reads them. Each block reads and writes the sums
# [n, d], so that few tokens and many ids are better than the reverse, and 512 tokens are enough for
# the products to be limited by the tensor cores. Unmeasured, like the constants below.
BLOCK_TOKENS, BLOCK_LOGITS = 2**9, 2**23
# The backward adds to the gradient of the head [V, d] once per block of tokens: for V 152,000 and
# d 4,096 5 GB, about a tenth of the time of the products of 2,048 tokens.
BACKWARD_TOKENS = 2**11
# Blocks of ids begin at multiples of this: whole tiles of cuBLAS, and rows that 16 bytes divide.
ALIGNMENT = 128
# Ids that a program works on at a time.
BLOCK = 1024
# Told a limit, ptxas takes the registers it needs; left alone it spills some to have more programs
# at a time. Fused multiply-add is named because the default of Triton changes with 3.10.
OPTIONS = {"num_warps": 8, "maxnreg": 80, "enable_fp_fusion": True}


def why_not(inputs: Inputs, *_: object) -> str | None:
    """None if this backend can run, else a sentence."""
    reason = triton_launch.why_not(inputs.hidden)
    if reason is None and inputs.invariant:
        return "batch_invariant() needs products in fixed tiles"
    return reason


def linear_logprob(
    inputs: Inputs, return_entropy: bool, hidden_grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.linear_logprob: float32 logits and sums in every dtype.

    hidden [T, d] and head_weight [V, d] or [m, V, d] in float32, bfloat16 or float16. Holds
    BLOCK_LOGITS logits in float32 (twice with ref_hidden, and once more for a mixed head), with
    16-bit gradients as many probabilities in that dtype, and the gradients in float32. In float16 a
    probability below 2^-25 of the largest is 0 in the gradients. Reads nothing on the host.
    Deterministic; the bits depend on the number of tokens.
    """
    hidden, ref_hidden = inputs.hidden, inputs.ref_hidden
    tokens, vocab_size = hidden.shape[0], inputs.head_weight.shape[-2]

    state = hidden.new_empty(tokens, 8, dtype=torch.float64)
    wanted = (hidden_grads, hidden_grads and ref_hidden is not None)
    sums = [hidden.new_empty(hidden.shape if on else (0,), dtype=torch.float32) for on in wanted]
    head = Head.of(inputs)
    block = _Blocks(inputs, head, state)
    for begin in range(0, tokens, BLOCK_TOKENS):
        rows = slice(begin, min(begin + BLOCK_TOKENS, tokens))
        # Sums of e W and of e (z - z' - shift) W, relative to the largest logit so far.
        totals = [total[rows] for total in sums] if hidden_grads else []
        for ids in blocks_of_ids(rows.stop - begin, vocab_size):
            logits = block.logits(rows, ids)
            terms = [_like(z, hidden.dtype) for z in logits] if hidden_grads else []
            block.add(rows, ids, logits, terms, totals)
            for total, part in zip(totals, terms, strict=False):
                experts, weights = head.experts[:, ids], block.weights(rows)
                _add_product(total, part, experts, weights, fresh=ids.start == 0)
    return outputs(state, head, inputs, return_entropy, sums[0], sums[1])


class _Blocks:
    """The logits of blocks of tokens and ids, and the sums of the softmax over them."""

    def __init__(self, inputs: Inputs, head: Head, state: Tensor) -> None:
        self.states = [x for x in (inputs.hidden, inputs.ref_hidden) if x is not None]
        self.head, self.state = head, state
        self.temperature = inputs.temperature.float().contiguous()
        self.targets = inputs.targets.contiguous()
        # Of a mixed head it is in the logits; of a plain one the kernels add it.
        self.bias = None if head.bias is None else head.bias.float().contiguous()

    def weights(self, rows: slice) -> Tensor | None:
        """Those of the tokens in a mixed head."""
        return None if self.head.weights is None else self.head.weights[rows]

    def logits(self, rows: slice, ids: slice) -> list[Tensor]:
        """Of the policy and, if there is one, of the reference policy, float32."""
        weights, found = self.weights(rows), []
        for states in self.states:
            z = _mixed(states[rows], self.head.experts[:, ids].mT, weights)
            if weights is not None and self.bias is not None:
                z.addmm_(weights, self.bias[:, ids])
            found.append(z)
        return found

    def arguments(self, rows: slice, ids: slice, logits: list[Tensor]) -> dict[str, Any]:
        """What both kernels take."""
        plain = self.bias is not None and self.head.weights is None
        return {
            "logits_ptr": logits[0],
            "ref_logits_ptr": logits[1] if len(logits) > 1 else None,
            "bias_ptr": self.bias[0, ids] if plain and self.bias is not None else None,
            "targets_ptr": self.targets[rows],
            "temperature_ptr": self.temperature[rows],
            "state_ptr": self.state[rows],
            "first": ids.start,
            "count": ids.stop - ids.start,
            "BLOCK": BLOCK,
        }

    def add(
        self,
        rows: slice,
        ids: slice,
        logits: list[Tensor],
        terms: Sequence[Tensor] = (),
        sums: Sequence[Tensor] = (),
    ) -> None:
        """Adds a block to the state; `terms` become e and e (z - z' - shift), if there are any, and
        `sums`, of the products of those of earlier blocks, are scaled."""
        e, apart = (*terms, None, None)[:2]
        with torch.cuda.device_of(self.state):
            block_kernel[(len(logits[0]),)](
                **self.arguments(rows, ids, logits),
                e_ptr=e,
                apart_ptr=apart,
                sums_ptr=None if e is None else sums[0],
                apart_sums_ptr=None if apart is None else sums[1],
                width=self.states[0].shape[1],
                **OPTIONS,
            )


def linear_logprob_backward(
    inputs: Inputs, upstream: tuple[Tensor, ...], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.linear_logprob_backward: float32 logits and sums in every dtype.

    Holds what the forward holds, for BACKWARD_TOKENS, and the needed gradients in float32. The
    derivatives by the logits are rounded to hidden's dtype for the products; in float16 one below
    2^-25 of the largest derivative by an output is 0. Reads nothing on the host. Deterministic.
    """
    hidden, ref_hidden = inputs.hidden, inputs.ref_hidden
    tokens, vocab_size = hidden.shape[0], inputs.head_weight.shape[-2]
    head = Head.of(inputs)
    upstream = tuple(d.float().contiguous() for d in upstream)
    unit = _unit(upstream, inputs)
    m = len(head.experts)
    shapes = (hidden.shape, head.experts.shape, (m, vocab_size), (tokens, m))
    sums = [
        hidden.new_zeros(shape, dtype=torch.float32) if need else None
        for shape, need in zip(shapes, needs, strict=True)
    ]
    state = hidden.new_empty(tokens, 8, dtype=torch.float64)
    block = _Blocks(inputs, head, state)
    for begin in range(0, tokens, BACKWARD_TOKENS):
        rows = slice(begin, min(begin + BACKWARD_TOKENS, tokens))
        blocks = blocks_of_ids(rows.stop - begin, vocab_size)
        logits: list[Tensor] = []
        for ids in blocks:
            logits = block.logits(rows, ids)
            block.add(rows, ids, logits)
        d_logprobs, d_entropy, d_kl = (d[rows] if d.numel() else None for d in upstream)
        for ids in blocks:
            if len(blocks) > 1:
                logits = block.logits(rows, ids)
            dz, *ref_dz = (_like(z, hidden.dtype) for z in logits)
            with torch.cuda.device_of(hidden):
                gradient_kernel[(len(dz),)](
                    **block.arguments(rows, ids, logits),
                    unit_ptr=unit,
                    d_logprobs_ptr=d_logprobs,
                    d_entropy_ptr=d_entropy,
                    d_kl_ptr=d_kl if ref_dz else None,
                    dz_ptr=dz,
                    ref_dz_ptr=ref_dz[0] if ref_dz else None,
                    **OPTIONS,
                )
            _add_gradients(sums, head, rows, ids, dz, hidden[rows])
            if ref_hidden is not None:
                # It has the same head, and is not differentiated by its own states.
                _add_gradients([None, *sums[1:]], head, rows, ids, ref_dz[0], ref_hidden[rows])
    for total in sums:
        if total is not None:
            total.mul_(unit)
    return gradients(inputs, *sums)


def _unit(upstream: tuple[Tensor, ...], inputs: Inputs) -> Tensor:
    """A power of two near the largest derivative by an output, over the temperature.

    In units of it, derivatives by the logits are not lost in float16 if a loss is a mean over many
    tokens; the scaling is exact. It stays on the device.
    """
    if inputs.hidden.dtype != torch.float16 or not len(inputs.hidden):
        return inputs.hidden.new_ones((), dtype=torch.float32)
    found = torch.cat([d / inputs.temperature.float() for d in upstream if d.numel()])
    largest = found.abs().where(found.isfinite(), 0.0).max()
    return torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(largest))), 1.0)


def _add_gradients(
    sums: list[Tensor | None], head: Head, rows: slice, ids: slice, dz: Tensor, h: Tensor
) -> None:
    """Adds what dz [n, ids], the derivative by the logits of states h [n, d], gives to the sums:
    of the states, the experts, their biases and the weights."""
    d_hidden, d_experts, d_bias, d_weights = sums
    experts = head.experts[:, ids]
    if head.weights is None:
        if d_hidden is not None:
            _add_product(d_hidden[rows], dz, experts, None, fresh=False)
        if d_experts is not None:
            _addmm(d_experts[0, ids], dz.t(), h)
        if d_bias is not None:
            d_bias[0, ids] += dz.sum(0, dtype=torch.float32)
        return
    weights = head.weights[rows]
    for i, expert in enumerate(experts):
        column = weights[:, i, None]
        if d_hidden is not None or d_weights is not None:
            product = _product(dz, expert)
            if d_hidden is not None:
                d_hidden[rows].addcmul_(product, column)
            if d_weights is not None:
                d_weights[rows, i] += (product * h).sum(-1)
                if head.bias is not None:
                    d_weights[rows, i] += dz.float() @ head.bias[i, ids].float()
        if d_experts is not None:
            _addmm(d_experts[i, ids], (dz * column).to(dz.dtype).t(), h)
    if d_bias is not None:
        d_bias[:, ids] += weights.t() @ dz.float()


def blocks_of_ids(tokens: int, vocab_size: int) -> list[slice]:
    """Blocks of ids for a block of so many tokens: whole tiles where the logits allow it."""
    step = max(1, BLOCK_LOGITS // tokens)
    step = step if step < ALIGNMENT else step // ALIGNMENT * ALIGNMENT
    return [slice(at, min(at + step, vocab_size)) for at in range(0, vocab_size, step)]


def _mixed(a: Tensor, matrices: Tensor, weights: Tensor | None) -> Tensor:
    """sum_i w_i (a @ matrices[i]) in float32, weights [n, m]; a @ matrices[0] without them.

    Scaling the products keeps a's 16 bits as they are; scaled states would be rounded again.
    """
    total = _product(a, matrices[0])
    if weights is None:
        return total
    total.mul_(weights[:, :1])
    for i in range(1, len(matrices)):
        total.addcmul_(_product(a, matrices[i]), weights[:, i : i + 1])
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, never rounded to the dtype of 16-bit factors."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # PyTorch has that product on CUDA alone; this is for the interpreter.
    return torch.mm(a.float(), b.float())


def _add_product(
    total: Tensor, a: Tensor, matrices: Tensor, weights: Tensor | None, fresh: bool
) -> None:
    """total += sum_i w_i (a @ matrices[i]) as _mixed; `fresh`: what is in total does not count."""
    if weights is None:
        _addmm(total, a, matrices[0], beta=0 if fresh else 1)
    elif fresh:
        total.copy_(_mixed(a, matrices, weights))
    else:
        for i, matrix in enumerate(matrices):
            total.addcmul_(_product(a, matrix), weights[:, i : i + 1])


def _addmm(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """total = beta total + a @ b in float32, added up by the product itself."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)


def _like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where what becomes of logits goes: in their place if the dtype allows it."""
    return logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)


def variants(capability: tuple[int, int]) -> list[Variant]:
    """Every variant of the kernels that linear_logprob and its backward launch, on any GPU."""
    fp32, found = "*fp32", []
    always = {"logits": fp32, "targets": "*i64", "temperature": fp32, "state": "*fp64"}
    sizes = {"BLOCK": BLOCK}
    for bias in ({}, {"bias": fp32}):
        shared = always | bias
        for kind in (None, *KINDS.values()):
            e = {} if kind is None else {"e": kind, "sums": fp32}
            apart = {} if kind is None else {"apart": kind, "apart_sums": fp32}
            for more in (e, {"ref_logits": fp32, **e, **apart}):
                found.append(variant(block_kernel, sizes, OPTIONS, shared | more))
        for kind in KINDS.values():
            for entropy in ({}, {"d_entropy": fp32}):
                dz = {"unit": fp32, "d_logprobs": fp32, **entropy, "dz": kind}
                kl = {"ref_logits": fp32, "d_kl": fp32, "ref_dz": kind}
                for more in (dz, dz | kl):
                    found.append(variant(gradient_kernel, sizes, OPTIONS, shared | more))
    return found
