"""The Triton kernels of mix_logits in Triton's interpreter, held to the reference."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import cases
import pytest
import torch
from cases import BF16, F16, F32, MODES, MixtureInputs
from launches import INTERPRETER, Recorder, Witness, listed_keys, replace_kernels

from clp_kernels import testing
from clp_kernels.ops.mix_logits import reference
from clp_kernels.ops.mix_logits import triton as backend
from clp_kernels.ops.mix_logits import triton_kernels as kernels

pytestmark = INTERPRETER
DTYPES = (F32, F16, BF16)
# The interpreter truncates where a GPU rounds to bfloat16; see the test of bfloat16 below.
EXACT = (F32, F16)
BOTH = [True, True]


class Case(NamedTuple):
    dtype: torch.dtype
    mode: str
    m: int
    batch: int
    vocab_size: int
    kind: str
    masked: bool
    strides: str


def inputs(case: Case) -> MixtureInputs:
    dtype, mode, m, batch, vocab_size, kind, masked, strides = case
    torch.manual_seed(hash(case[2:5]) % 2**31)
    options = {"mode": mode, "masked": masked, "strides": strides}
    return cases.mixture_inputs(m, batch, vocab_size, dtype, kind, **options)


def sampled(count: int) -> list[Case]:
    axes = (
        EXACT,
        MODES,
        (1, 2, 3, 5),
        (0, 1, 3),
        (1, 2, 7, 31, 64, 513, 3000),
        testing.WEIGHT_KINDS,
        (False, True),
        ("dense", "gaps", "expanded", "sliced"),
    )
    return cases.sampled(Case, axes, count, 5, lambda c: c.m * c.batch * c.vocab_size <= 10_000)


def test_sample_covers_every_value() -> None:
    columns = list(zip(*sampled(50), strict=True))
    assert [len(set(column)) for column in columns] == [2, 2, 4, 3, 7, 7, 2, 4]


@pytest.mark.parametrize("case", sampled(50), ids=cases.case_id)
def test_within_budget(case: Case) -> None:
    got, plain = cases.judge_mixture(backend, reference, inputs(case), case.mode)
    if case.mode == "geometric":
        assert torch.equal(got[0], plain[0])


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_before_and_after_the_last_rounding(mode: str) -> None:
    args = inputs(Case(BF16, mode, 3, 3, 513, "dirichlet", True, "dense"))
    z = backend.mixture(*args[1:], mode, F32)
    want = reference.mix_logits(args.logits.float(), args.weights, mode)
    torch.testing.assert_close(z, want, rtol=2e-6, atol=2e-6)
    rounded = backend.mix_logits(*args[1:], mode)
    assert rounded.dtype == BF16
    torch.testing.assert_close(rounded.float(), want, rtol=2**-7, atol=0)
    grads = backend.mix_logits_backward(*args, mode, BOTH)
    wanted = reference.mix_logits_backward(*cases.cast(args, F32), mode, BOTH)
    torch.testing.assert_close(grads[0].float(), wanted[0], rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(grads[1], wanted[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_partials_in_several_portions(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vocabularies of more than COMBINE_BLOCK slices."""
    args = inputs(Case(F32, mode, 2, 1, 3000, "dirichlet", True, "dense"))
    expected = outputs(args, mode)
    monkeypatch.setattr(backend, "COMBINE_BLOCK", 2)
    for got, want in zip(outputs(args, mode), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def small(mode: str = "geometric", vocab_size: int = 1100) -> MixtureInputs:
    case = Case(F32, mode, 3, 4, vocab_size, "all_different", False, "dense")
    return inputs(case)


outputs = partial(cases.mixture_results, backend)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_has_the_same_bits_in_any_batch_and_in_every_run(mode: str) -> None:
    args = small(mode)
    z, d_logits, d_weights = outputs(args, mode)
    for again, first in zip(outputs(args, mode), (z, d_logits, d_weights), strict=True):
        assert torch.equal(again, first)
    for rows in ([3], [2, 0, 2]):
        alone = outputs(args.rows(rows), mode)
        assert torch.equal(alone[0], z[rows])
        assert torch.equal(alone[1], d_logits[:, rows])
        assert torch.equal(alone[2], d_weights[rows])


@pytest.mark.parametrize("mode", MODES)
def test_gradients_not_asked_for_launch_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, launched = small(mode, 40), list[str]()
    complete = backend.mix_logits_backward(*args, mode, BOTH)
    replace_kernels(monkeypatch, kernels, lambda *named: Recorder(*named, launched))
    norms = ["row_sums", "log_norms"] if mode == "probability" else []
    sums = ["sum_slices"] if mode == "probability" else []
    again = ["gradients"] if mode == "probability" else []
    for needs, expected in (
        ([False, False], []),
        ([True, False], [*norms, "gradients", *sums, *again]),
        ([False, True], [*norms, "gradients", "sum_slices"]),
        (BOTH, [*norms, "gradients", "sum_slices", *again]),
    ):
        launched.clear()
        grads = backend.mix_logits_backward(*args, mode, needs)
        assert launched == expected
        for grad, need, full in zip(grads, needs, complete, strict=True):
            assert torch.equal(grad, full) if need else grad.shape == (0,)


def test_every_launch_is_a_listed_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, seen = listed_keys(backend.variants((8, 0))), set[Any]()
    replace_kernels(monkeypatch, kernels, lambda _, kernel: Witness(kernel, seen))
    for dtype, mode, needs in itertools.product(DTYPES, MODES, (BOTH, [True, False])):
        case = Case(dtype, mode, 2, 2, 64, "uniform", False, "dense")
        args = inputs(case)
        backend.mix_logits(*args[1:], mode)
        if mode == "probability" or needs == BOTH:
            backend.mix_logits_backward(*args, mode, needs)
    assert seen == listed
