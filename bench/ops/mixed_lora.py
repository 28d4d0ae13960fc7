"""The subject `mixed_lora`: a linear layer with m LoRA adapters, mixed by each example's weights.

What counts is the time beyond the bare layer, `base`. Shapes below: T tokens in B examples, in and
out features d, m adapters of rank r, R = m * r. What a serving system prepares once (concatenated,
stacked and transposed matrices, the weights of each token) is prepared outside of the timed call
for the plain forms; ours go through clp_kernels.mixed_lora, argument checks included.

Providers.
    base                F.linear; with `grad` forward and backward of the frozen layer (dx)
    torch_loop          adapter by adapter, x scaled first: the form of PEFT's X-LoRA
    torch_cat           concatenated rank: y += ((x Acat^T) * scales) Bcat^T, in place
    torch_cat_by_hand   with `grad`: the same with a hand-written backward, added up in place
    torch_cat_compiled  torch_cat under torch.compile (optional: it compiles again for each case)
    torch_stacked       one product with [W; Acat], then the expand. Not with `grad`: the adapters
                        change in every step, and so would the stacked copy of W
    torch_side_stream   on a GPU, forward: the shrink on a second stream while the base runs
    peft                a PEFT LoraLayer with m active adapters. PEFT cannot mix per example: all
                        take the first example's weights, as the layer's scalings. No gradient of
                        the weights either
    reference, cpu, triton, cuda    ours, those of clp_kernels.registry that can run the case
    triton_fused, triton_split      beside triton, forward: its two paths, without the checks
    <ours>_equal_rows   if the case has equal_rows: every example with the first one's weights

Error gate: the output and each gradient within the project's budget (clp_kernels.testing) of the
float64 definition. The plain form of the same dtype is torch_cat; for torch_loop and peft, which
round y after each adapter, torch_by_adapter. Of outputs and input gradients with more than JUDGED
elements, evenly spaced rows are compared, and all must be finite.
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import clp_kernels
from bench.timing import BASE, Protocol, Provider, Roofs
from clp_kernels import registry
from clp_kernels.ops.mixed_lora import reference
from clp_kernels.testing import assert_within_budget, weight_rows

OP = "mixed_lora"
GRAD_PROTOCOL = Protocol(warmup=1, least=5, seconds=3.0)  # calls of a tenth of a second to seconds
QUICK_GRAD_PROTOCOL = Protocol(warmup=1, least=3, seconds=0.2)
JUDGED = 2**22
SLOW = 2**31  # multiplications of a bfloat16 GEMM above which a CPU without it takes a second
NAMES = ("y", "dx", "d_lora_A", "d_lora_B", "d_weights")  # what a provider gives, in this order
Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]
Gate = Callable[[Outputs], float]
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one call. `grad`: forward and backward; `equal_rows`: ours with equal ones too."""

    features: int
    tokens: int
    batch: int
    m: int
    r: int
    dtype: str
    grad: bool = False
    equal_rows: bool = False

    def fields(self) -> dict[str, object]:
        """The case as it stands in a row."""
        mode = "forward+backward" if self.grad else "forward"
        sizes = {"d": self.features, "T": self.tokens, "B": self.batch, "m": self.m, "r": self.r}
        rows = {"rows": "different, equal"} if self.equal_rows else {}
        return {"mode": mode, **sizes, "dtype": self.dtype, **rows}

    def floor_bytes(self) -> int:
        """Every matrix and activation once; the backward reads W, A, B and x again, and dy."""
        adapters, tokens = 2 * self.m * self.r * self.features, self.tokens * self.features
        forward = self.features**2 + adapters + 2 * tokens
        backward = self.features**2 + 2 * adapters + 3 * tokens  # writes dA, dB and dx
        elements = forward + backward if self.grad else forward
        return elements * getattr(torch, self.dtype).itemsize

    def floor_flops(self) -> int:
        """2 T (d^2 + 2 R d); the backward is dy W and four low-rank products (G, dx, dA, dB)."""
        base, rank = self.features**2, 2 * self.m * self.r * self.features
        return 2 * self.tokens * (2 * base + 3 * rank if self.grad else base + rank)

    def floors(self, roofs: Roofs) -> dict[str, float]:
        """Microseconds that the bytes take, and that the products take."""
        return {
            "floor_bytes": self.floor_bytes() / roofs.bandwidth * 1e6,
            "floor_flops": self.floor_flops() / roofs.flops[self.dtype] * 1e6,
        }


def cases(
    device: str, *, grad: bool = False, graph: bool = False, quick: bool = False
) -> list[Case]:
    """The ladder; on a GPU decode with `graph`, prefill without. `quick`: its core alone."""
    bf16, both = ["bfloat16"], ["bfloat16", "float32"]
    if grad and device == "cuda":
        return [Case(4096, 8192, 8, 4, 16, "bfloat16", grad=True)]
    if grad:
        sizes = [1024] if quick else [1024, 2048, 4096]
        found = [Case(d, 2048, 8, 4, 16, dtype, grad=True) for d, dtype in product(sizes, both)]
        return [c for c in found if c.features < 4096 or c.dtype == "float32"]
    if device == "cuda" and not graph:
        return [Case(4096, tokens, 8, 4, 16, "bfloat16") for tokens in (2048, 8192)]
    if device == "cuda":
        sizes = [4096] if quick else [2048, 4096, 8192]
        batches, dtypes = [1, 16, 128] if quick else [1, 8, 16, 32, 64, 128, 256], bf16
        narrow, rows = [], [64]
    else:
        sizes = [2048] if quick else [2048, 4096]
        batches, dtypes = [1, 8, 64] if quick else [1, 2, 4, 8, 16, 64, 256], both
        narrow, rows = [1, 4, 16, 64], [8, 64]
    found = [Case(d, b, b, 4, 16, dtype) for d, b, dtype in product(sizes, batches, dtypes)]
    if not quick:
        found += [Case(2048, b, b, 2, 8, dtype) for b, dtype in product(narrow, dtypes)]
        compared = product(rows, dtypes)
        found += [Case(4096, b, b, 4, 16, dtype, equal_rows=True) for b, dtype in compared]
    return found


def too_slow(case: Case) -> bool:
    """On this CPU: a large bfloat16 case if the processor has no bfloat16 product."""
    large = case.tokens * case.features**2 > SLOW
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return large and case.dtype == "bfloat16" and not native


@dataclass(frozen=True)
class Inputs:
    """x [B, d] or [B, T / B, d], base_weight [d, d], lora_A [m, r, d], lora_B [m, d, r],
    weights float32 [B, m]; dy in the shape of the output, or None for the forward alone."""

    x: Tensor
    base_weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    weights: Tensor
    dy: Tensor | None
    equal_rows: bool


def inputs(case: Case, device: torch.device) -> Inputs:
    """The same in every run; base and low-rank part of one size, so that errors in both show."""
    g = torch.Generator(device).manual_seed(0)
    d, m, r = case.features, case.m, case.r

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=g, device=device).mul_(scale)
        return drawn.to(getattr(torch, case.dtype))

    tokens = case.tokens // case.batch
    shape = (case.batch, d) if tokens == 1 else (case.batch, tokens, d)
    on_cpu = torch.Generator().manual_seed(0)
    weights = weight_rows("all_different", case.batch, m, generator=on_cpu)
    return Inputs(
        normal(*shape),
        normal(d, d, scale=d**-0.5),
        normal(m, r, d, scale=d**-0.5),
        normal(m, d, r, scale=r**-0.5),
        weights.to(device),
        normal(*shape) if case.grad else None,
        case.equal_rows,
    )


def token_scales(weights: Tensor, tokens: int, r: int, dtype: torch.dtype) -> Tensor:
    """weights [B, m] as [T, R], adapter by adapter."""
    return weights.to(dtype).repeat_interleave(r, 1).repeat_interleave(tokens // len(weights), 0)


def torch_loop(x: Tensor, base: Tensor, lora_A: Tensor, lora_B: Tensor, scales: Tensor) -> Tensor:
    """lora_A [m, r, d], lora_B [m, d, r]."""
    y = F.linear(x, base)
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        scale = scales[:, i * len(a), None]
        y = y + F.linear(F.linear(x * scale, a), b)
    return y


def torch_cat(x: Tensor, base: Tensor, cat_A: Tensor, cat_B: Tensor, scales: Tensor) -> Tensor:
    """cat_A [R, d], cat_B [d, R]."""
    return F.linear(x, base).addmm_((x @ cat_A.t()) * scales, cat_B.t())


def torch_by_adapter(
    x: Tensor, base: Tensor, lora_A: Tensor, lora_B: Tensor, scales: Tensor
) -> Tensor:
    """A judge, not a provider: torch_loop with fewer roundings, y still rounded m times."""
    y = F.linear(x, base)
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        y = torch.addmm(y, (x * scales[:, i * len(a), None]) @ a.t(), b.t())
    return y


class _ByHand(torch.autograd.Function):
    """torch_cat; its backward reads dy three times and adds to dx in place (Unsloth's order)."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:  # type: ignore[override]
        x, base, cat_A, cat_B, scales = args
        u = x @ cat_A.t()
        ctx.save_for_backward(*args, u)
        return F.linear(x, base).addmm_(u * scales, cat_B.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, base, cat_A, cat_B, scales, u = ctx.saved_tensors
        g = dy @ cat_B
        du = g * scales
        return (dy @ base).addmm_(du, cat_A), None, du.t() @ x, dy.t() @ (u * scales), g * u


def torch_stacked(stacked: Tensor) -> Callable[..., Tensor]:
    """stacked [d + R, d] is [W; Acat]; W and Acat themselves are not read."""

    def form(x: Tensor, base: Tensor, cat_A: Tensor, cat_B: Tensor, scales: Tensor) -> Tensor:
        both = F.linear(x, stacked)
        out = len(cat_B)
        return torch.addmm(both[:, :out], both[:, out:] * scales, cat_B.t())

    return form


def torch_side_stream(side: torch.cuda.Stream) -> Callable[..., Tensor]:
    """torch_cat with its shrink on `side`; the next call waits, so z may be freed."""

    def form(x: Tensor, base: Tensor, cat_A: Tensor, cat_B: Tensor, scales: Tensor) -> Tensor:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            z = (x @ cat_A.t()) * scales
        y = F.linear(x, base)
        main.wait_stream(side)
        return y.addmm_(z, cat_B.t())

    return form


def _call(data: Inputs, form: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Run:
    """A call that gives (form(*leaves),), or with dy also the gradient of each leaf."""
    dy = data.dy
    if dy is None:
        return lambda: (form(*leaves),)

    def train() -> Outputs:
        y = form(*leaves)
        return (y, *torch.autograd.grad(y, leaves, dy.view_as(y)))

    return train


def _leaves(data: Inputs, *tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_(data.dy is not None) for t in tensors]


def _base(data: Inputs) -> Run:
    return _call(data, lambda x: F.linear(x, data.base_weight), _leaves(data, data.x))


def _plain(data: Inputs, form: Callable[..., Tensor], *, cat: bool = True) -> Run:
    """A call of a plain form on prepared matrices; with gradients the weights are spread inside."""
    m, r, d = data.lora_A.shape
    x = data.x.reshape(-1, d)
    adapters = data.lora_A, data.lora_B
    if cat:
        adapters = data.lora_A.reshape(m * r, d), data.lora_B.transpose(0, 1).reshape(-1, m * r)

    def spread(weights: Tensor) -> Tensor:
        return token_scales(weights, len(x), r, x.dtype)

    if data.dy is None:
        prepared = (x, data.base_weight, *adapters, spread(data.weights))
        return lambda: (form(*prepared),)
    leaves = _leaves(data, x, *adapters, data.weights)
    return _call(data, lambda x, a, b, w: form(x, data.base_weight, a, b, spread(w)), leaves)


def _ours(data: Inputs, run: Callable[..., Tensor]) -> Run:
    leaves = _leaves(data, data.x, data.lora_A, data.lora_B, data.weights)
    return _call(data, lambda x, a, b, w: run(x, data.base_weight, a, b, w), leaves)


def _public(backend: str) -> Callable[..., Tensor]:
    return partial(clp_kernels.mixed_lora, backend=backend)


def _triton(path: str) -> Callable[..., Tensor]:
    from clp_kernels.ops.mixed_lora import triton  # which is not installed everywhere

    run: Callable[..., tuple[Tensor, Tensor]] = triton.mixed_lora
    return lambda *args: run(reference.Inputs(*args, None, None, False), path=path)[0]


def _peft(data: Inputs) -> Run:
    """All examples with the first one's weights, which become the scalings of the layer."""
    from peft import LoraConfig, inject_adapter_in_model

    m, r, d = data.lora_A.shape
    linear = torch.nn.Linear(d, len(data.base_weight), bias=False, device="meta")
    linear.weight = torch.nn.Parameter(data.base_weight, requires_grad=False)
    model: torch.nn.Module = torch.nn.ModuleDict({"linear": linear})
    names = [f"adapter{i}" for i in range(m)]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=["linear"])
    with warnings.catch_warnings():  # that there is more than one adapter
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name in names:
            model = inject_adapter_in_model(config, model, name)
    layer: Any = model.get_submodule("linear")
    layer.set_adapter(names)
    halves = ((layer.lora_A, data.lora_A), (layer.lora_B, data.lora_B))
    for half, matrices in halves:
        for name, matrix in zip(names, matrices, strict=True):
            half[name].weight = torch.nn.Parameter(matrix, requires_grad=data.dy is not None)
    for name, weight in zip(names, data.weights[0].tolist(), strict=True):
        layer.set_scale(name, weight)
    adapters = [half[name].weight for half, _ in halves for name in names]
    return _call(data, lambda x, *_: layer(x), [*_leaves(data, data.x), *adapters])


def backends(data: Inputs) -> list[registry.Backend]:
    """Ours that can run these inputs; with gradients those that also have the backward."""
    args = (data.x, data.base_weight, data.lora_A, data.lora_B, data.weights)
    call = reference.Inputs(*args, None, None, False)
    ops = (OP,) if data.dy is None else (OP, f"{OP}_backward")
    found = [[b for b in registry.BACKENDS[op] if b.why_not(call) is None] for op in ops]
    both = set.intersection(*({b.name for b in each} for each in found))
    return [b for b in found[0] if b.name in both]


def providers(data: Inputs, *, compiled: bool = False) -> list[Provider]:
    """Everything that can compute these inputs on their device."""
    on_gpu, train = data.x.is_cuda, data.dy is not None
    shared = replace(data, weights=data.weights[:1].expand_as(data.weights).contiguous())
    (own_rows, own_by_adapter), (one_row, one_by_adapter) = _gates(data), _gates(shared)
    runs = {"torch_cat": _plain(data, torch_cat)}
    if train:
        runs["torch_cat_by_hand"] = _plain(data, _ByHand.apply)
    else:
        matrix = torch.cat([data.base_weight, data.lora_A.flatten(0, 1)])
        runs["torch_stacked"] = _plain(data, torch_stacked(matrix))
    if on_gpu and not train:
        runs["torch_side_stream"] = _plain(data, torch_side_stream(torch.cuda.Stream()))
    if compiled:
        torch.compiler.reset()  # each case is compiled for its own sizes
        mode = "max-autotune-no-cudagraphs" if on_gpu else "default"
        runs["torch_cat_compiled"] = _plain(data, torch.compile(torch_cat, mode=mode))
    equal = {}
    for backend in backends(data):
        runs[backend.name] = _ours(data, _public(backend.name))
        if data.equal_rows:
            equal[f"{backend.name}_equal_rows"] = _ours(shared, _public(backend.name))
        if backend.name == "triton" and not train:
            runs |= {f"triton_{path}": _ours(data, _triton(path)) for path in ("fused", "split")}
    found = [
        Provider(BASE, _base(data), _base_gate(data)),
        Provider("torch_loop", _plain(data, torch_loop, cat=False), own_by_adapter),
        *(Provider(name, run, own_rows) for name, run in runs.items()),
        *(Provider(name, run, one_row) for name, run in equal.items()),
    ]
    if importlib.util.find_spec("peft") is not None:
        found.append(Provider("peft", _peft(shared), one_by_adapter))
    return found


def _double(data: Inputs) -> Inputs:
    wide = {name: t.double() for name, t in vars(data).items() if isinstance(t, Tensor)}
    return replace(data, **wide)  # type: ignore[arg-type]


def _gates(data: Inputs) -> tuple[Gate, Gate]:
    """For the forms that round y once more after the base, and for those that go by adapter."""
    m = data.lora_A.shape[0]
    definition = cache(lambda: _judged(_ours(_double(data), _public("reference"))(), m))

    def gate(plain: Run) -> Gate:
        same = cache(lambda: _judged(plain(), m))
        return lambda output: _share(_judged(output, m), definition(), same())

    return gate(_plain(data, torch_cat)), gate(_plain(data, torch_by_adapter, cat=False))


def _base_gate(data: Inputs) -> Gate:
    """The base can only be compared with its own error: it is the plain form in its dtype."""

    def check(output: Outputs) -> float:
        got = _judged(output, 1)
        return _share(got, _judged(_base(_double(data))(), 1), got)

    return check


def _share(got: Named, wanted: Named, same: Named) -> float:
    return max(assert_within_budget(t, wanted[n], same[n], name=n) for n, t in got.items())


def _judged(output: Outputs, m: int) -> Named:
    """Outputs by name, in the layout of the op's arguments; of the large ones some rows."""
    if len(output) > len(NAMES):  # PEFT's: the gradients of each adapter
        y, dx, *rest = output
        output = (y, dx, torch.stack(rest[:m]), torch.stack(rest[m:]))
    found = dict(zip(NAMES, output, strict=False))  # the base has two, a forward has one
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise AssertionError(f"{name} must be finite")
        if name in ("y", "dx"):
            found[name] = value.flatten(0, -2)[:: -(-value.numel() // JUDGED)]
        elif name == "d_lora_A":
            found[name] = value.reshape(m, -1, value.shape[-1])
        elif name == "d_lora_B" and value.dim() == 2:
            found[name] = value.unflatten(1, (m, -1)).transpose(0, 1)
    return found
