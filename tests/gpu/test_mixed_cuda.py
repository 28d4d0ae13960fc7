"""The CUDA decode kernels of mixed_lora and mixed_linear against the references. Needs a GPU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, CUDA_KERNELS, F16, F32, F64, INF, NAN, assert_graph_replays, cast
from torch import Tensor

from clp_kernels import mixed_linear, mixed_lora, testing
from clp_kernels.ops.mixed_linear import cuda as cuda_mixed_linear
from clp_kernels.ops.mixed_linear import reference as linear_reference
from clp_kernels.ops.mixed_lora import cuda as cuda_mixed_lora
from clp_kernels.ops.mixed_lora import reference as lora_reference

pytestmark = CUDA_KERNELS

DEVICE = "cuda"
Args = dict[str, Any]
Dtypes = tuple[torch.dtype, torch.dtype]  # of x, and of the adapters
PAIRS = {
    "mixed_lora": [(x, lora) for x in (BF16, F16) for lora in (x, F32)],
    "mixed_linear": [(BF16, BF16), (F16, F16)],
}
MATRIX = {"mixed_lora": "base_weight", "mixed_linear": "expert_weight"}

each_op = pytest.mark.parametrize("op", PAIRS)
each_pair = pytest.mark.parametrize(
    ("op", "dtypes"), [(op, dtypes) for op, pairs in PAIRS.items() for dtypes in pairs], ids=str
)
each_lora_pair = pytest.mark.parametrize("dtypes", PAIRS["mixed_lora"], ids=str)


def inputs(
    op: str,
    tokens: int,
    in_features: int,
    out_features: int,
    m: int = 2,
    r: int = 8,
    dtypes: Dtypes = (BF16, BF16),
    kind: str = "all_different",
    bias: bool = True,
) -> Args:
    """Arguments of an op on the GPU, one row of weights per token; mixed_linear has no rank."""
    dtype, lora_dtype = dtypes
    scale = max(1, in_features) ** -0.5

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=DEVICE)).to(dtype)

    args: Args = {"x": normal(tokens, in_features)}
    if op == "mixed_lora":
        args["base_weight"] = normal(out_features, in_features, scale=scale)
        args["lora_A"] = normal(m, r, in_features, dtype=lora_dtype, scale=scale)
        args["lora_B"] = normal(m, out_features, r, dtype=lora_dtype)
        bias_shape: tuple[int, ...] = (out_features,)
    else:
        args["expert_weight"] = normal(m, out_features, in_features, scale=scale)
        bias_shape = (m, out_features)
    args["weights"] = testing.weight_rows(kind, tokens, m, device=DEVICE)
    args["bias"] = normal(*bias_shape) if bias else None
    return {**args, "example_ids": None, "invariant": False}


INPUTS: dict[str, Any] = {
    "mixed_lora": lora_reference.Inputs,
    "mixed_linear": linear_reference.Inputs,
}


def outputs(op: str, module: Any, values: Any) -> tuple[Tensor, ...]:
    """y, and for mixed_lora u."""
    found = getattr(module, op)(INPUTS[op](*values))
    return found if isinstance(found, tuple) else (found,)


def run(op: str, args: Args) -> tuple[Tensor, ...]:
    module = {"mixed_lora": cuda_mixed_lora, "mixed_linear": cuda_mixed_linear}[op]
    assert module.why_not(INPUTS[op](**args)) is None
    return outputs(op, module, args.values())


def definitions(op: str, args: Args) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The reference's results in float64 and in the inputs' own dtypes."""
    module = {"mixed_lora": lora_reference, "mixed_linear": linear_reference}[op]
    values = tuple(args.values())
    return outputs(op, module, cast(values, F64)), outputs(op, module, values)


def assert_equals_reference(op: str, args: Args) -> None:
    for name, *three in zip("yu", run(op, args), *definitions(op, args), strict=False):
        assert three[0].is_contiguous() and three[0].dtype == three[2].dtype
        testing.assert_within_budget(*three, name=name)


def assert_same_bits(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@each_pair
@pytest.mark.parametrize("tokens", [1, 2, 7, 9, 17, 33])
def test_small_equals_reference(tokens: int, op: str, dtypes: Dtypes) -> None:
    for in_features, out_features in ((8, 1), (64, 8), (168, 65), (896, 172), (2048, 30)):
        for m, r in ((1, 1), (2, 4), (3, 12), (5, 16)):
            args = inputs(op, tokens, in_features, out_features, m, r, dtypes)
            assert_equals_reference(op, args)


@each_op
@pytest.mark.parametrize("kind", testing.WEIGHT_KINDS)
def test_small_weight_kinds(kind: str, op: str) -> None:
    for dtypes in PAIRS[op]:
        for bias in (True, False):
            assert_equals_reference(op, inputs(op, 5, 128, 70, 3, 8, dtypes, kind, bias))


@each_pair
@pytest.mark.parametrize("tokens", [1, 8, 16, 32, 64, 129, 256])
def test_decode_sizes(tokens: int, op: str, dtypes: Dtypes) -> None:
    m = 4 if op == "mixed_lora" else 3
    for in_features, out_features in ((4096, 4096), (4096, 1024), (2048, 11_008), (14_336, 2049)):
        assert_equals_reference(op, inputs(op, tokens, in_features, out_features, m, 16, dtypes))


def test_many_ranks() -> None:
    for m, r in ((8, 64), (1, 64), (13, 5)):
        assert_equals_reference("mixed_lora", inputs("mixed_lora", 19, 512, 200, m, r))


@each_lora_pair
def test_small_zero_weights_are_bare(dtypes: Dtypes) -> None:
    """0 * inf must not leak, and the bits do not depend on what A and B hold."""
    args = inputs("mixed_lora", 6, 264, 70, 2, 8, dtypes)
    args["weights"][::2] = 0
    wanted = run("mixed_lora", args)[0]
    bare = run("mixed_lora", {**args, "weights": torch.zeros_like(args["weights"])})[0]
    assert torch.equal(wanted[::2], bare[::2])
    args["lora_A"][0, 3, 5], args["lora_A"][1, 0], args["lora_B"][1, 60] = INF, NAN, -INF
    got = run("mixed_lora", args)[0]
    assert torch.equal(got[::2], bare[::2])
    assert not got[1::2].isfinite().all(1).any()


@each_op
def test_small_zero_weight_leaves_nothing_of_its_expert(op: str) -> None:
    """Nor of its adapter."""
    parts = ("lora_A", "lora_B") if op == "mixed_lora" else ("expert_weight", "bias")
    for tokens in (6, 40):
        args = inputs(op, tokens, 264, 70, 3)
        args["weights"][:, 1] = 0
        args["weights"][3] = 0
        wanted = run(op, args)[0]
        assert op == "mixed_lora" or wanted[3].eq(0).all()
        for name, value in zip(parts, (INF, NAN), strict=True):
            args[name][1] = value
        assert torch.equal(run(op, args)[0], wanted)


def test_small_infinite_adapter_is_where_the_reference_has_it() -> None:
    for dtypes in PAIRS["mixed_lora"]:
        args = inputs("mixed_lora", 4, 64, 40, 2, 4, dtypes, bias=False)
        args["lora_B"][0, 33, 2] = INF
        args["lora_A"][1, 1, 7] = -INF
        args["lora_B"][1] = args["lora_B"][1].abs() + 1
        assert_equals_reference("mixed_lora", args)


@each_lora_pair
def test_small_float32_between_the_products(dtypes: Dtypes) -> None:
    """4097 - 4096, where 4097 is in u, and for float32 matrices in A or in B."""
    args = inputs("mixed_lora", 1, 8, 1, 1, 1, dtypes, kind="uniform", bias=False)
    x, base_weight, lora_A, lora_B = (t.zero_() for t in list(args.values())[:4])
    x[0, :2] = torch.tensor([64.0, 1.0])
    base_weight[0, 0] = -64
    lora_A[0, 0, :2], lora_B[:] = torch.tensor([64.0, 1.0]), 1
    assert [t.item() for t in run("mixed_lora", args)] == [1, 4097]
    if dtypes[1] == F32:
        lora_A[0, 0, :2] = torch.tensor([0.0, 4097.0])
        assert run("mixed_lora", args)[0].item() == 1
        lora_A[0, 0, 1], lora_B[:] = 1, 4097
        assert run("mixed_lora", args)[0].item() == 1


def test_small_negative_zero_of_a_bare_row() -> None:
    args = inputs("mixed_lora", 3, 64, 40, bias=False)
    args["x"].zero_()
    args["base_weight"] = args["base_weight"].abs().neg()
    args["weights"].zero_()
    args["bias"] = torch.full((40,), -0.0, dtype=BF16, device=DEVICE)
    y = run("mixed_lora", args)[0]
    assert torch.equal(y, torch.zeros_like(y))


@each_op
def test_small_one_hot_is_the_single_expert(op: str) -> None:
    """Or the single adapter."""
    args = inputs(op, 6, 264, 70, 3, kind="one_hot")
    y, *u = run(op, args)
    parts = ("lora_A", "lora_B") if op == "mixed_lora" else ("expert_weight", "bias")
    for i in range(3):
        one = {name: args[name][i : i + 1] for name in parts}
        single_y, *single_u = run(op, {**args, **one, "weights": torch.ones(6, 1, device=DEVICE)})
        assert torch.equal(y[i::3], single_y[i::3])
        for whole, part in zip(u, single_u, strict=True):
            assert torch.equal(whole[:, 8 * i : 8 * i + 8], part)


@each_op
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_small_example_ids(ids_dtype: torch.dtype, op: str) -> None:
    args = inputs(op, 11, 72, 33, 3, 4)
    ids = torch.tensor([2, 0, 1, 1, 2, 2, 0, 3, 0, 1, 3], device=DEVICE)
    table = testing.weight_rows("negative", 4, 3, device=DEVICE)
    got = run(op, {**args, "weights": table, "example_ids": ids.to(ids_dtype)})
    assert_same_bits(got, run(op, {**args, "weights": table[ids]}))


@each_op
def test_small_tokens_of_an_example_share_its_weights(op: str) -> None:
    args = inputs(op, 12, 72, 33, 3, 4)
    table = testing.weight_rows("negative", 4, 3, device=DEVICE)
    got = run(op, {**args, "x": args["x"].view(4, 3, 72), "weights": table})
    assert [t.shape for t in got] == [(4, 3, 33), (4, 3, 12)][: len(got)]
    flat = run(op, {**args, "weights": table.repeat_interleave(3, 0)})
    assert_same_bits(tuple(t.flatten(0, 1) for t in got), flat)


@each_pair
def test_small_any_strides(op: str, dtypes: Dtypes) -> None:
    args = inputs(op, 9, 72, 33, 3, 4, dtypes)
    args["example_ids"] = torch.arange(9, dtype=torch.int32, device=DEVICE)
    wanted = run(op, args)
    tensors = {name: t for name, t in args.items() if isinstance(t, Tensor)}
    gaps = {name: testing.noncontiguous(t) for name, t in tensors.items()}
    assert_same_bits(run(op, {**args, **gaps}), wanted)
    del tensors["example_ids"]
    for name, tensor in tensors.items():
        spread = testing.expanded(tensor)
        dense = run(op, {**args, name: spread.contiguous()})
        assert_same_bits(run(op, {**args, name: spread}), dense)


@each_op
def test_small_not_aligned(op: str) -> None:
    args = inputs(op, 5, 72, 33)
    wanted = run(op, args)
    for name in ("x", MATRIX[op], *(["lora_A"] if op == "mixed_lora" else [])):
        store = torch.full((args[name].numel() + 1,), NAN, dtype=BF16, device=DEVICE)
        store[1:] = args[name].flatten()
        assert_same_bits(run(op, {**args, name: store[1:].view(args[name].shape)}), wanted)
    wide = F.pad(args[MATRIX[op]], (0, 8), value=NAN)
    assert_same_bits(run(op, {**args, MATRIX[op]: wide[..., :72]}), wanted)


@each_op
def test_small_empty(op: str) -> None:
    for tokens, m, r, in_features, out_features in (
        (0, 2, 4, 16, 9),
        (3, 0, 4, 16, 9),
        (3, 2, 0, 16, 9),
        (3, 2, 4, 0, 9),
        (3, 2, 4, 16, 0),
    ):
        args = inputs(op, tokens, in_features, out_features, m, r)
        got, wanted = run(op, args), definitions(op, args)[1]
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
        if op == "mixed_lora" and m * r * in_features == 0:
            bare = F.linear(*(args[name].float() for name in ("x", "base_weight", "bias")))
            torch.testing.assert_close(got[0].float(), bare, rtol=1e-2, atol=1e-2)
            assert got[1].eq(0).all()


@each_pair
@pytest.mark.parametrize(("in_features", "out_features"), [(264, 70), (4096, 130)])
def test_row_bits_are_its_own(in_features: int, out_features: int, op: str, dtypes: Dtypes) -> None:
    """The same bits at any number of tokens, at any place, and in two runs."""
    args = inputs(op, 70, in_features, out_features, 3, 12, dtypes)
    wanted = run(op, args)
    ends = ((0, 1), (3, 10), (5, 13), (60, 70), (1, 18), (37, 70), (2, 67), (0, 70))
    for rows in (*(slice(*pair) for pair in ends), torch.randperm(70).to(DEVICE)):
        part = run(op, {**args, "x": args["x"][rows], "weights": args["weights"][rows]})
        assert_same_bits(part, tuple(t[rows] for t in wanted))


def test_u_is_ready_before_it_is_used() -> None:
    """Calls back to back, the second kernel of each started before the first has ended."""
    batches = [inputs("mixed_lora", 8, 4096, 512, 4, 16) for _ in range(3)]
    wanted = []
    for args in batches:
        wanted.append(run("mixed_lora", args))
        torch.cuda.synchronize()
    for _ in range(50):
        got = [run("mixed_lora", args) for args in batches]
        for one, other in zip(got, wanted, strict=True):
            assert_same_bits(one, other)


@each_op
def test_cuda_graph_replay(op: str) -> None:
    def fresh() -> Args:
        ids = torch.randint(0, 8, (8,), dtype=torch.int32, device=DEVICE)
        return {**inputs(op, 8, 4096, 4096, 4, 16, kind="zero"), "example_ids": ids}

    assert_graph_replays(lambda args: run(op, args), fresh)


@pytest.mark.slow
@each_op
def test_more_than_two_to_the_31_elements(op: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of GPU memory")
    small = inputs(op, 3, 4096, 64, bias=False)
    args, matrix = dict(small), small[MATRIX[op]]
    rows = 64 + (2**19 if op == "mixed_lora" else 2**18)
    args[MATRIX[op]] = torch.zeros(*matrix.shape[:-2], rows, 4096, dtype=BF16, device=DEVICE)
    args[MATRIX[op]][..., -64:, :] = matrix
    if op == "mixed_lora":
        args["lora_B"] = torch.randn(2, rows, 8, device=DEVICE).bfloat16()
        small["lora_B"] = args["lora_B"][:, -64:]
    y = run(op, args)[0]
    assert op == "mixed_lora" or not y[:, :-64].any()
    wide, same = definitions(op, small)
    testing.assert_within_budget(y[:, -64:], wide[0], same[0], name="y")


@each_op
def test_errors(op: str) -> None:
    public = {"mixed_lora": mixed_lora, "mixed_linear": mixed_linear}[op]
    tensors = {k: t for k, t in inputs(op, 4, 64, 40, bias=False).items() if isinstance(t, Tensor)}

    def call(**changed: Tensor) -> None:
        public(**{**tensors, **changed}, backend="cuda")

    with pytest.raises(RuntimeError, match=r"bfloat16 and float16, not torch\.float32"):
        call(**{name: t.float() for name, t in tensors.items()})
    with pytest.raises(ValueError, match=f"{MATRIX[op]} must be on cuda"):
        call(**{MATRIX[op]: tensors[MATRIX[op]].cpu()})
    with pytest.raises(ValueError, match="weights must have shape"):
        call(weights=tensors["weights"].new_empty(3, 2))
