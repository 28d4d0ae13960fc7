"""Inputs and plain formulas that the tests of several ops and of the GPU share.

Imports no hypothesis, so that tests/gpu runs without it.
"""

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clp_kernels import mixed_linear, mixed_lora, native, testing
from clp_kernels.ops.linear_logprob.head import Inputs as HeadInputs
from clp_kernels.ops.mixed_linear import reference as linear_reference
from clp_kernels.ops.mixed_lora import reference as lora_reference
from clp_kernels.ops.sample import reference as sample_reference
from clp_kernels.testing import assert_within_budget

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INF, NAN = float("inf"), float("nan")
DTYPES = (F32, BF16, F16)
MODES = ("geometric", "probability")
# x's dtype and that of the adapters.
LORA_DTYPES = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32)]
Results = dict[str, Tensor]
Form = Callable[..., Results]
Runs = tuple[Results, Results, Results]  # got, in float64, in the inputs' dtypes

# Marks of the tests of compiled kernels, and the instruction sets of this processor.
CPU_KERNELS = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))
CUDA_KERNELS = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.cuda_missing() is not None, reason=str(native.cuda_missing())),
]
ISAS: list[str] = native.cpu().isas() if native.cpu_missing() is None else ["scalar"]


def interpreted(op: str) -> Any:
    """The Triton backend of an op; skips the test if its kernels are not interpreted here."""
    launch = pytest.importorskip("clp_kernels.ops.triton_launch", reason="triton is not installed")
    if not launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 was not set at import")
    return importlib.import_module(f"clp_kernels.ops.{op}.triton")


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor of a (nested, named) tuple or list in this dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        each = [cast(one, dtype) for one in value]
        return type(value)._make(each) if hasattr(value, "_make") else type(value)(each)
    return value


def bits(t: Tensor) -> Tensor:
    """The bit pattern: distinguishes -0.0 from 0.0 and compares NaN."""
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def case_id(case: tuple[Any, ...]) -> str:
    return "-".join(str(v).removeprefix("torch.").replace(" ", "+") for v in case)


def sampled(
    make: Any, axes: tuple[Any, ...], count: int, seed: int, allowed: Any = lambda case: True
) -> list[Any]:
    """Different cases, a value of each axis drawn for each; the same in every run."""
    rng, found = random.Random(seed), list[Any]()
    while len(found) < count:
        case = make(*map(rng.choice, axes))
        if case not in found and allowed(case):
            found.append(case)
    return found


def gradients(
    function: Form, inputs: dict[str, Any], upstream: Results, dtype: Any = None
) -> Results:
    """The outputs of function(**inputs) and the gradients of the inputs that are not None.

    The inputs are cast to `dtype` (None: as they are), the upstream gradients to the outputs'.
    """
    given = {k: t for k, t in inputs.items() if t is not None}
    leaves = {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in given.items()}
    out = function(**leaves)
    results = {k: out[k] for k in upstream}
    dy = [upstream[k].to(t.dtype) for k, t in results.items()]
    grads = torch.autograd.grad(
        list(results.values()), list(leaves.values()), dy, allow_unused=True, materialize_grads=True
    )
    named = {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}
    return {k: t.detach() for k, t in out.items()} | named


def three_runs(function: Form, plain: Form, inputs: dict[str, Any], upstream: Results) -> Runs:
    """A function and all gradients, and the plain form in float64 and in the inputs' dtypes."""
    got = gradients(function, inputs, upstream)
    wide, same = (gradients(plain, inputs, upstream, dtype) for dtype in (F64, None))
    return got, wide, same


def assert_graph_replays(
    run: Callable[[dict[str, Any]], tuple[Tensor, ...]], fresh: Callable[[], dict[str, Any]]
) -> None:
    """Captures run(fresh()) once and replays it with other inputs: nothing is read on the host."""
    args = fresh()
    run(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(args)
    for _ in range(3):
        new = fresh()
        for name, captured_input in args.items():
            if isinstance(captured_input, Tensor):
                captured_input.copy_(new[name])
        graph.replay()
        assert all(map(same_bits, captured, run(new)))


def close(a: Tensor, b: Tensor) -> None:
    """Of numbers in float64."""
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def judge(runs: list[Runs], what: str = "") -> None:
    """Holds every result to the error budget, over all runs (got, reference64, same_dtype).

    Together, because plain PyTorch may be right by chance where a result has few numbers.
    """
    for name in runs[0][1]:
        columns = list(zip(*((run[name] for run in triple) for triple in runs), strict=True))
        assert {g.shape for g in columns[0]} == {t.shape for t in columns[1]}, name
        assert_within_budget(*(torch.stack(column) for column in columns), name=f"{name}{what}")


# The fast paths of mixed_lora and sample on the CPU.


def changed(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments, some replaced by a value or by a function of the old one."""
    return arguments | {k: v(arguments[k]) if callable(v) else v for k, v in changes.items()}


def taken(backend: Any, arguments: dict[str, Any]) -> Any:
    """The result of the fast path of a backend, None if it refuses the arguments."""
    run = backend.fast_path()
    assert run is not None
    return run(*arguments.values())


def check_modes(
    backend: Any, make: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls under a mode, and those that the environment sends elsewhere, are refused."""

    def quick(**changes: Any) -> Any:
        return taken(backend, make(**changes))

    assert quick() is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert quick() is None
    with FlopCounterMode(display=False):
        assert quick() is None
    arguments = make()
    none = torch.func.vmap(lambda s: (taken(backend, arguments) is None) * s)(torch.ones(2))
    assert none.all()
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "reference")
    assert quick() is None
    assert quick(backend="cpu") is not None


# mixed_lora.


def lora_plain(
    x: Tensor,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and u of x [..., in] with the weights [T, m] of each token: one pair of matrices of rank
    m * r, the strongest plain form, and PEFT's "cat"; the low-rank part in the adapters' dtype."""
    m, r, in_features = lora_A.shape
    u = F.linear(x.to(lora_A.dtype), lora_A.reshape(m * r, in_features)).reshape(-1, m * r)
    z = u * weights.to(u.dtype).repeat_interleave(r, dim=-1)
    delta = F.linear(z, lora_B.transpose(0, 1).reshape(-1, m * r)).to(x.dtype)
    y = F.linear(x, base_weight, bias) + delta.view(*x.shape[:-1], delta.shape[-1])
    return y, u.view(*x.shape[:-1], m * r)


@dataclass
class LoraInputs:
    """Arguments of mixed_lora's backends, and the gradient of y."""

    x: Tensor
    base_weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    weights: Tensor
    bias: Tensor | None
    ids: Tensor | None
    dy: Tensor

    NAMES = ("x", "base_weight", "lora_A", "lora_B", "weights", "bias")

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.NAMES)

    def call(self, invariant: bool = False) -> lora_reference.Inputs:
        """As the backends take them."""
        return lora_reference.Inputs(*self.args, self.ids, invariant)

    @property
    def examples(self) -> Tensor:
        """The example of each token."""
        if self.ids is not None:
            return self.ids.long()
        tokens = self.x.numel() // self.x.shape[-1]
        each = max(1, tokens // max(1, len(self.weights)))
        return torch.arange(tokens, device=self.x.device) // each


def lora_inputs(
    dtypes: tuple[torch.dtype, torch.dtype],
    leading: tuple[int, ...],
    n_in: int,
    n_out: int,
    m: int,
    r: int,
    kind: str = "all_different",
    examples: int | None = None,
    *,
    bias: bool = True,
    ids_dtype: torch.dtype = torch.int32,
    device: str = "cpu",
    strided: Callable[..., Tensor] = lambda t, *_: t,
) -> LoraInputs:
    """`examples` makes the tokens flat, with unsorted ids; some examples then have no token.

    strided(t, expandable) gives every tensor its layout.
    """
    dtype, lora_dtype = dtypes
    ids = None
    if examples is not None:
        ids = strided(torch.randint(0, examples, leading, dtype=ids_dtype, device=device), False)

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1, expand: bool = False):  # type: ignore[no-untyped-def]
        return strided((torch.randn(*shape, device=device) * scale).to(dtype), expand)

    batch = leading[0] if examples is None else examples
    return LoraInputs(
        x=normal(*leading, n_in, expand=True),
        base_weight=normal(n_out, n_in, scale=n_in**-0.5, expand=True),
        lora_A=normal(m, r, n_in, dtype=lora_dtype, scale=n_in**-0.5),
        lora_B=normal(m, n_out, r, dtype=lora_dtype, scale=r**-0.5),
        weights=strided(testing.weight_rows(kind, batch, m, device=device), False),
        bias=normal(n_out) if bias else None,
        ids=ids,
        dy=normal(*leading, n_out, expand=True),
    )


def run_lora(
    backend: Any, inputs: LoraInputs, invariant: bool = False, path: str | None = None
) -> Results:
    """y, u and all gradients by a backend's functions."""
    call = inputs.call(invariant)
    y, u = backend.mixed_lora(call, path=path)
    grads = backend.mixed_lora_backward(call, inputs.dy, u, [True] * 6, path=path)
    assert all(t.is_contiguous() for t in (y, u, *grads))
    return {"y": y, "u": u} | {f"d_{k}": g for k, g in zip(inputs.NAMES, grads, strict=True)}


def lora_results(inputs: LoraInputs, dtype: torch.dtype | None) -> Results:
    """The formula in plain PyTorch under autograd, in float64 or in the inputs' own dtypes."""

    def plain(weights: Tensor, **leaves: Tensor) -> Results:
        y, u = lora_plain(weights=weights[inputs.examples], **leaves)
        return {"y": y, "u": u}

    named = dict(zip(inputs.NAMES, inputs.args, strict=True))
    found = gradients(plain, named, {"y": inputs.dy}, dtype)
    if dtype is None:
        # u is kept in float32, so float32 is what it is held to.
        found["u"] = F.linear(inputs.x.float(), inputs.lora_A.flatten(0, 1).float())
    return found


def judge_lora(draws: list[LoraInputs], results: list[Results]) -> None:
    """The error budget of the output, u and every gradient, over all draws together."""
    for got, inputs in zip(results, draws, strict=True):
        for k, t in zip(inputs.NAMES, inputs.args, strict=True):
            assert t is None or got[f"d_{k}"].dtype == t.dtype, k
        assert got["y"].dtype == inputs.x.dtype and got["u"].dtype == F32
    plain = [[lora_results(inputs, dtype) for inputs in draws] for dtype in (F64, None)]
    judge(list(zip(results, *plain, strict=True)))


def not_finite(inputs: LoraInputs, value: float) -> dict[str, Tensor]:
    """Both matrices of the first adapter with a value that is not finite."""
    lora_A, lora_B = inputs.lora_A.clone(), inputs.lora_B.clone()
    lora_A[0, 0, 3] = lora_B[0, 5, 0] = value
    return {"lora_A": lora_A, "lora_B": lora_B}


def check_invariant_rows(run: Form, inputs: LoraInputs, orders: list[Tensor]) -> None:
    """Examples have the same bits in any order and batch."""
    got = run(inputs, invariant=True)
    for rows in orders:
        part = {name: getattr(inputs, name)[rows] for name in ("x", "weights", "dy")}
        other = run(replace(inputs, **part), invariant=True)
        for name in ("y", "u", "d_x", "d_weights"):
            assert torch.equal(other[name], got[name][rows]), name


def check_nan_stays_in_its_example(run: Form, inputs: LoraInputs) -> None:
    """Of four examples, the third gets NaN in the gradient of one token."""
    expected, dy, others = run(inputs)["d_weights"], inputs.dy.clone(), [0, 1, 3]
    dy.view(-1, dy.shape[-1])[(inputs.examples == 2).nonzero()[0, 0]] = NAN
    got = run(replace(inputs, dy=dy))["d_weights"]
    assert got[2].isnan().all() and torch.equal(got[others], expected[others])


def check_same_bits_twice(run: Form, inputs: LoraInputs, path: str) -> None:
    first, second = run(inputs, path=path), run(inputs, path=path)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# mixed_linear.


def linear_plain(
    x: Tensor, expert_weight: Tensor, weights: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y of x [T, in] with the weights [T, m] of each token, product by product in x's dtype."""
    columns = weights.to(x.dtype).unbind(1)
    biases = [None] * len(columns) if bias is None else bias
    products = (F.linear(x, w, c) for w, c in zip(expert_weight, biases, strict=True))
    return sum(column[:, None] * p for column, p in zip(columns, products, strict=True))  # type: ignore[return-value]


class LinearInputs(NamedTuple):
    """The gradient of y, and the arguments of mixed_linear's backends."""

    dy: Tensor
    x: Tensor
    expert_weight: Tensor
    weights: Tensor
    bias: Tensor | None
    example_ids: Tensor | None

    def call(self, invariant: bool = False) -> linear_reference.Inputs:
        """As the backends take them."""
        return linear_reference.Inputs(*self[1:], invariant)


def linear_results(
    backend: Any, args: LinearInputs, invariant: bool = False, needs: list[bool] | None = None
) -> tuple[Tensor, ...]:
    """y and the gradients that `needs` asks for, of all inputs without it."""
    needs = needs or [True, True, True, args.bias is not None]
    call = args.call(invariant)
    return backend.mixed_linear(call), *backend.mixed_linear_backward(call, args.dy, needs)


def judge_linear(backend: Any, reference: Any, args: LinearInputs, invariant: bool) -> None:
    """The error budget of the output and of every gradient."""
    got = linear_results(backend, args, invariant)
    wide, same = (linear_results(reference, one) for one in (cast(args, F64), args))
    names = ("y", "dx", "d_expert", "d_weights", "d_bias")
    for name, *three in zip(names, got, wide, same, strict=True):
        assert (three[0].dtype, three[0].is_contiguous()) == (three[2].dtype, True), name
        assert_within_budget(*three, name=name)


def check_unused_experts(backend: Any, args: LinearInputs) -> None:
    """Experts of weight zero may hold anything. args: five examples of one token, m = 3."""
    weights = torch.tensor([[0, 1, 0], [0, 0, 0], [0, -0.5, 0], [-0.0, 1, 0], [0, 1, 0]])
    weights, expert, bias = weights.to(args.x.device), args.expert_weight.clone(), args.bias.clone()
    alone = LinearInputs(
        args.dy, args.x, expert[1:2].clone(), weights[:, 1:2], bias[1:2].clone(), None
    )
    expert[0], expert[2], bias[0], bias[2] = INF, NAN, NAN, -INF
    many = args._replace(expert_weight=expert, weights=weights, bias=bias)
    both = (
        linear_results(backend, one, needs=[True, False, False, False]) for one in (many, alone)
    )
    for got, wanted in list(zip(*both, strict=True))[:2]:
        assert torch.equal(got, wanted) and not got[1].any()


def rows_alone_and_together(
    backend: Any, args: LinearInputs, ranges: list[tuple[int, int]], invariant: bool
) -> list[tuple[Tensor, Tensor]]:
    """y, dx and d_weights of these rows among all of x [B, in], and by themselves."""
    needs, pairs = [True, False, True, False], []
    y, dx, _, d_weights, _ = linear_results(backend, args, invariant, needs)
    for rows in (slice(*ends) for ends in ranges):
        part = args._replace(dy=args.dy[rows], x=args.x[rows], weights=args.weights[rows])
        alone = linear_results(backend, part, invariant, needs)
        pairs += [(y[rows], alone[0]), (dx[rows], alone[1]), (d_weights[rows], alone[3])]
    return pairs


# mixed_lora and mixed_linear through the public functions.


def mixed_tensors(op: str, case: Any, draw: Callable[..., Tensor]) -> Results:
    """The matrices and the bias of a case; draw(*shape, scale=1, dtype=that of x) makes each."""
    n_in, n_out, m, r = case.in_features, case.out_features, case.m, case.r
    if op == "mixed_linear":
        found = {"expert_weight": draw(m, n_out, n_in, scale=n_in**-0.5)}
        return found | ({"bias": draw(m, n_out)} if case.bias else {})
    found = {
        "base_weight": draw(n_out, n_in, scale=n_in**-0.5),
        "lora_A": draw(m, r, n_in, scale=n_in**-0.5, dtype=case.lora_dtype),
        "lora_B": draw(m, n_out, r, scale=r**-0.5, dtype=case.lora_dtype),
    }
    return found | ({"bias": draw(n_out)} if case.bias else {})


def mixed_runs(
    op: str, inputs: Results, dy: Tensor, rows: Tensor, scaling: str, **options: Any
) -> Runs:
    """By the public op with these options, and by the plain form with the row of each token."""
    public = {"mixed_lora": mixed_lora, "mixed_linear": mixed_linear}[op]
    number = 1.75 if op == "mixed_lora" and scaling == "number" else 1.0
    if number != 1:
        options["scaling"] = number

    def plain(x, weights, scaling=number, **rest):  # type: ignore[no-untyped-def]
        flat, weights = x.reshape(-1, x.shape[-1]), (weights * scaling)[rows]
        if op == "mixed_lora":
            y, _ = lora_plain(flat, weights=weights, **rest)
        else:
            y = linear_plain(flat, weights=weights, **rest)
        return {"y": y.view(dy.shape)}

    return three_runs(lambda **t: {"y": public(**t, **options)}, plain, inputs, {"y": dy})


# mix_logits.


def mixture_plain(logits: Tensor, weights: Tensor, mode: str) -> Tensor:
    """The mixture of logits [m, B, V] with weights [B, m], in the dtype of the logits."""
    columns = weights.t()[:, :, None].to(logits.dtype)
    if mode == "geometric":
        return (columns * logits).sum(0)
    return torch.logsumexp(columns.log() + logits.log_softmax(-1), dim=0)


class MixtureInputs(NamedTuple):
    """The gradient of the mixture, and the arguments of mix_logits' backends but the mode."""

    dz: Tensor
    logits: Tensor
    weights: Tensor

    def rows(self, rows: list[int]) -> "MixtureInputs":
        return MixtureInputs(self.dz[rows], self.logits[:, rows], self.weights[rows])


def mixture_inputs(
    m: int,
    batch: int,
    vocab_size: int,
    dtype: torch.dtype = F32,
    kind: str = "all_different",
    *,
    mode: str = "geometric",
    masked: bool = False,
    strides: str = "dense",
    scale: float = 3.0,
) -> MixtureInputs:
    """strides: "dense", "gaps", "expanded", or "sliced": the last axis dense, the others not."""
    shape = (m, batch, vocab_size)
    logits = scale * torch.randn(shape)
    if masked:
        # A third of the ids of each source, another third each, and one of all; the last is left.
        logits = logits.masked_fill(torch.rand(shape) < 0.3, -INF)
        logits[:, :, :1] = -INF
        logits[:, :, -1:] = 1
    logits, dz = logits.to(dtype), torch.randn(shape[1:]).to(dtype)
    weights = testing.weight_rows(kind, batch, m)
    if mode == "probability" and kind in ("negative", "zero"):
        # Weights of zero give -inf everywhere, which a budget cannot judge.
        weights = weights.abs() + (weights.sum(-1, keepdim=True) == 0)
    if strides == "gaps":
        dz, logits, weights = map(testing.noncontiguous, (dz, logits, weights))
    elif strides == "expanded":
        logits = testing.expanded(logits, 1)
    elif strides == "sliced":
        logits = F.pad(logits, (1, 2), value=NAN)[..., 1:-2]
    return MixtureInputs(dz, logits, weights)


def mixture_results(module: Any, args: MixtureInputs, mode: str, *isa: str) -> tuple[Tensor, ...]:
    """The mixture and its gradients by the functions of a module."""
    grads = module.mix_logits_backward(*args, mode, [True, True], *isa)
    return module.mix_logits(*args[1:], mode, *isa), *grads


def judge_mixture(
    backend: Any, reference: Any, args: MixtureInputs, mode: str, *isa: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The error budget of the mixture and its gradients; gives the backend's and the plain ones."""
    got, same = mixture_results(backend, args, mode, *isa), mixture_results(reference, args, mode)
    wide = mixture_results(reference, cast(args, F64), mode)
    for name, *three in zip(("z", "d_logits", "d_weights"), got, wide, same, strict=True):
        assert (three[0].dtype, three[0].is_contiguous()) == (three[2].dtype, True), name
        assert_within_budget(*three, name=name)
    return got, same


# sample: the arguments of its backends by name.

# The vectors that Random123 publishes (kat_vectors, philox4x32 10), by counter and key.
PHILOX_ANSWERS = {
    ((0,) * 4, (0,) * 2): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): "408f276d 41c83b0e a20bc7c6 6d5451fd",
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
    ): "d16cfe09 94fdcceb 5001e420 24126ea1",
}
Draw = dict[str, Any]


def draw_inputs(
    m: int,
    batch: int,
    vocab_size: int,
    dtype: torch.dtype = F32,
    mode: str = "geometric",
    filters: str = "",
) -> Draw:
    """Logits of spread 3, every temperature, weights of any sign that the mode allows.

    filters: those of "top_k top_p min_p" that are given; each is off in some rows.
    """
    weights = torch.rand(batch, m) if mode == "probability" else torch.randn(batch, m)

    def one_of(values: list[float], dtype: torch.dtype = F32) -> Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(0, len(values), (batch,))]

    k = one_of([0, 1, 2, 20, 1000, vocab_size, vocab_size + 9], torch.int64)
    p, least = one_of([1.0, 0.999999, 0.9, 0.5, 1e-6]), one_of([0.0, 1e-4, 0.05, 1.0])
    return {
        "logits": (3 * torch.randn(m, batch, vocab_size)).to(dtype),
        "weights": None if m == 1 else weights,
        "mode": mode,
        "temperature": torch.tensor([0.0, 0.3, 1.0, 3.0]).repeat(batch)[:batch],
        "top_k": k if "top_k" in filters else None,
        "top_p": p if "top_p" in filters else None,
        "min_p": least if "min_p" in filters else None,
        "seed": torch.randint(-(2**63), 2**63 - 1, (batch,)),
        "position": torch.randint(2**31, 2**40, (batch,)),
    }


def draw_rows(args: Draw, rows: Any) -> Draw:
    """These rows of the batch."""
    tensors = {k: t for k, t in args.items() if isinstance(t, Tensor)}
    return args | {k: t[:, rows] if k == "logits" else t[rows] for k, t in tensors.items()}


def draw_on(args: Draw, device: str) -> Draw:
    return {k: t.to(device) if isinstance(t, Tensor) else t for k, t in args.items()}


def check_row_bits(draw: Callable[..., tuple[Tensor, ...]], args: Draw, orders: list[Any]) -> None:
    """A row's bits are the same in two runs, with padding between rows, and in any batch."""
    logits, whole = args["logits"], draw(args)
    assert all(map(same_bits, draw(args), whole))
    padded = F.pad(logits.transpose(0, 1), (3, 3), value=NAN)[:, :, 3:-3]
    assert all(map(same_bits, draw({**args, "logits": padded.transpose(0, 1)}), whole))
    for rows in orders:
        part = draw(draw_rows(args, rows))
        assert all(same_bits(a, b[rows]) for a, b in zip(part, whole, strict=True))


def assert_close_draws(got: Any, wanted: Any, atol: float = 1e-5, rtol: float = 1e-6) -> None:
    """The same tokens, and close log-probabilities, NaN where they are NaN."""
    assert [t.dtype for t in got] == [torch.int64, F32, F32]
    assert torch.equal(got[0].cpu(), wanted[0])
    for ours, theirs in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=rtol, atol=atol, equal_nan=True)


def huge_draws(scale: float, vocab_size: int = 5000, filters: str = "") -> Draw:
    """If a score's rounding loses the noise, ties go to the lowest index, as in float64."""
    args = draw_inputs(1, 4, vocab_size, filters=filters)
    logits = args["logits"][0]
    logits[:] = scale
    logits[2, ::3] = -scale
    logits[3] *= 1 - torch.rand(vocab_size) * 1e-6
    return args


def largest_noise_draw(margin: float, filters: str = "") -> Draw:
    """Id 510 of (seed 7, position 115434) has the word 0xffffffff: noise 22.87, once in 2^32.

    Its score is above that of id 0 by the margin, and above all others.
    """
    args = draw_inputs(1, 1, 512, filters=filters)
    args["seed"], args["position"] = torch.tensor([7]), torch.tensor([115_434])
    noise = sample_reference.gumbel(
        sample_reference.philox_uniform(args["seed"], args["position"], 512)
    )[0]
    assert noise[510] > 22.87
    args["logits"][:] = -60.0
    args["logits"][0, 0, 0], args["logits"][0, 0, 510] = 0.0, noise[0] - noise[510] + margin
    args["temperature"][:] = 1.0
    return args


# Whether a row of bad_draws, and of infinite_draws, gives a token.
GOOD_ROWS = [False, False, False, True, False, True, True]
FINITE_ROWS = [True] * 4 + [False] * 4


def bad_draws(vocab_size: int, batch: int = 6, mode: str = "geometric", filters: str = "") -> Draw:
    """Rows without a finite logit, with NaN or with infinity, beside rows that are well."""
    args = draw_inputs(1, batch, vocab_size, mode=mode, filters=filters)
    logits = args["logits"][0]
    logits[0] = -INF
    logits[1, vocab_size // 2] = NAN
    logits[2, 3] = INF
    logits[3, :-5] = -INF
    logits[4] = -INF
    logits[4, -1] = NAN
    return args


def infinite_draws(filters: str = "") -> Draw:
    """A term of weight 0 is not read; an active -inf decides, whatever stands beside it."""
    args = draw_inputs(4, 8, 600, filters=filters)
    logits, weights = args["logits"], args["weights"]
    weights[0] = torch.tensor([0.0, 1.0, 0.0, 2.0])
    logits[0, 0], logits[2, 0, ::2] = -INF, NAN
    weights[1] = torch.tensor([1.0, -1.0, 0.5, 0.5])
    logits[1, 1, :500] = -INF
    weights[2] = 1
    logits[0, 2, :300], logits[1, 2, :300] = -INF, NAN
    weights[3] = 0
    weights[4] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    logits[0, 4, 7], logits[2, 4, 8] = INF, INF
    weights[5] = torch.tensor([1.0, NAN, 0.0, 0.0])
    logits[1, 6, 400] = NAN
    logits[:, 7] = -INF
    return args


def order_key(z: Tensor) -> Tensor:
    """Integers in the order of the float32 numbers; both zeros are one."""
    pattern = bits(z + 0.0).long()
    return torch.where(pattern < 0, -1 - pattern, pattern + 2**31)


def check_kept_sets(
    backend: Any, vocab_size: int, ties: bool, temperature: float, device: str, *, alone: bool
) -> None:
    """The thresholds of Triton's kernels, which a draw shows only by chance; top_p's also alone."""
    z = 2 * torch.randn(5, vocab_size)
    z = z.round() if ties else z
    z[2, 100:] = -INF
    top_k = torch.tensor([1, 17, 650, 0, 10**15])
    top_p = torch.tensor([0.9, 0.05, 0.999, 0.5, 1.0])
    logp = torch.log_softmax(z.double() / temperature, -1)
    call = backend.Rows(z[None].to(device), None, torch.full((5,), temperature, device=device))
    rows = torch.empty(2, 5, dtype=F64, device=device)
    call.combine(call.partials(None), rows, None)
    assert torch.equal(rows[0].cpu(), z.double().amax(-1))

    least = call.threshold(rows, None, top_k=top_k.to(device))
    first = sample_reference.top_k_mask(logp, top_k)
    assert torch.equal(order_key(z) >= least.cpu()[:, None], first)
    everything = [(None, torch.ones_like(first))] if alone else []
    for chosen, mask in (*everything, (least, first)):
        found = call.threshold(rows, chosen, top_p=top_p.to(device)).cpu()
        wanted = mask & sample_reference.top_p_mask(logp.masked_fill(~mask, -INF), top_p)
        assert torch.equal(order_key(z) >= found[:, None], wanted)


# linear_logprob.

HEAD_NAMES = ("logprobs", "entropy", "kl", "d_logprobs", "d_kl")


def head_inputs(
    tokens: int,
    vocab_size: int,
    dim: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    m: int = 0,
    device: str = "cpu",
) -> HeadInputs:
    """With a reference policy; every fourth token is ignored.

    m: experts of a mixed head, with weights of any sign for three examples; 0 for a plain head.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    hidden, ref = (normal(tokens, dim).to(dtype) for _ in range(2))
    shape = (m, vocab_size) if m else (vocab_size,)
    head = (2 * normal(*shape, dim) * dim**-0.5).to(dtype)
    targets = torch.randint(vocab_size, (tokens,), device=device)
    targets[3::4] = -100
    added = normal(*shape).to(dtype) if bias else None
    weights = normal(3, m) if m else None
    ids = torch.randint(3, (tokens,), device=device) if m else None
    tau = torch.rand(tokens, device=device) + 0.5
    return HeadInputs(hidden, head, targets, added, weights, ids, tau, ref, False)


def head_outputs(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and kl from materialised logits in the dtype of the inputs."""
    hidden, head, targets, bias, weights, ids, temperature, ref, _ = inputs
    tau = temperature.to(hidden.dtype)[:, None]

    def log_softmax(x: Tensor) -> Tensor:
        if weights is None:
            return F.linear(x, head, bias).div(tau).log_softmax(-1)
        return linear_plain(x, head, weights[ids], bias).div(tau).log_softmax(-1)

    logp, logq = log_softmax(hidden), log_softmax(ref)
    used, p = targets != -100, logp.exp()
    picked = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0] * used
    kl = torch.where(p > 0, p * (logp - logq), 0).sum(-1) * used
    entropy = -torch.where(p > 0, p * logp.clamp(min=-1e4), 0).sum(-1) * used
    return picked, entropy, kl


def check_one_id_is_left(backend: Any, inputs: HeadInputs, id: int) -> None:
    """All other ids have a bias of -inf."""
    inputs.bias[:] = -INF
    inputs.bias[id] = 0.0
    inputs.targets[:] = id
    logprobs, entropy, kl, d_logprobs, d_kl = backend.linear_logprob(inputs, True, True)
    assert not logprobs.any() and not kl.any() and entropy.abs().max() < 1e-6
    assert d_logprobs.abs().max() < 1e-6 and d_kl.abs().max() < 1e-6


def head_plain(inputs: HeadInputs) -> list[Tensor]:
    """The outputs, and by autograd the gradients of logprobs and kl with respect to hidden."""
    hidden = inputs.hidden.detach().requires_grad_()
    picked, entropy, kl = head_outputs(inputs._replace(hidden=hidden))
    grads = [torch.autograd.grad(o.sum(), hidden, retain_graph=True)[0] for o in (picked, kl)]
    return [t.detach() for t in (picked, entropy, kl, *grads)]


def judge_head(
    got: list[tuple[Tensor, ...]], draws: list[HeadInputs], plain: Any = head_plain
) -> None:
    """The error budget of all outputs, over all draws together."""
    for results in got:
        for i, (name, result) in enumerate(zip(HEAD_NAMES, results, strict=True)):
            assert result.dtype == (F32 if i < 3 else draws[0].hidden.dtype), name
            assert result.is_contiguous() and result.device == draws[0].hidden.device, name
    wide, same = [plain(cast(args, F64)) for args in draws], [plain(args) for args in draws]
    trios = (map(torch.cat, zip(*runs, strict=True)) for runs in (got, wide, same))
    for name, *three in zip(HEAD_NAMES, *trios, strict=True):
        assert_within_budget(*three, name=name)


HeadBackward = tuple[HeadInputs, tuple[Tensor, ...], list[bool]]
HEAD_LEAVES = ("hidden", "head_weight", "bias", "weights")


def head_backward(inputs: HeadInputs, *, entropy: bool = True, kl: bool = True) -> HeadBackward:
    """Arguments of the backward, asking for all gradients, with upstream gradients of any sign."""
    tokens, device = len(inputs.hidden), inputs.hidden.device
    upstream = [torch.randn(tokens if on else 0, device=device) for on in (True, entropy, kl)]
    needs = [True, True, inputs.bias is not None, inputs.weights is not None]
    return inputs if kl else inputs._replace(ref_hidden=None), tuple(upstream), needs


def head_backward_plain(
    inputs: HeadInputs, upstream: tuple[Tensor, ...], needs: list[bool]
) -> list[Tensor]:
    """The gradients asked for, by autograd from materialised logits."""
    names = [n for n, need in zip(HEAD_LEAVES, needs, strict=True) if need]
    leaves = {n: getattr(inputs, n).detach().clone().requires_grad_() for n in names}
    inputs = inputs._replace(**leaves)
    if inputs.ref_hidden is None:
        inputs = inputs._replace(ref_hidden=inputs.hidden.detach())
    results = head_outputs(inputs)
    total = sum((u * r).sum() for u, r in zip(upstream, results, strict=True) if u.numel())
    return list(torch.autograd.grad(total, list(leaves.values())))


def judge_head_backward(got: tuple[Tensor, ...], back: HeadBackward) -> None:
    """The error budget of each gradient; those not asked for are empty."""
    wide, same = head_backward_plain(*cast(back, F64)), head_backward_plain(*back)
    needs = back[-1]
    for grad, need in zip(got, needs, strict=True):
        assert grad.numel() > 0 if need else grad.shape == (0,)
    asked = [i for i, need in enumerate(needs) if need]
    for i, *two in zip(asked, wide, same, strict=True):
        assert got[i].dtype == two[1].dtype and got[i].is_contiguous()
        assert_within_budget(got[i], *two, name=HEAD_LEAVES[i])
