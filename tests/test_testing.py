"""The error budget and the makers of inputs: a gate that cannot fail is not a gate."""

import math

import pytest
import torch
from cases import F64

from clp_kernels import testing


def test_budget_passes_and_fails() -> None:
    ref = torch.tensor([1.0, -2.0, 4.0], dtype=F64)
    same = (ref + 0.5e-3).float()
    assert testing.assert_within_budget((ref + 0.9e-3).float(), ref, same) == pytest.approx(
        0.9, abs=0.01
    )
    with pytest.raises(AssertionError, match=r"index \[1\]: got -1\.9.*ence64 -2.*dtype -1\.99"):
        testing.assert_within_budget((ref + torch.tensor([0, 1.1e-3, 0])).float(), ref, same)
    floor = 4e-6
    testing.assert_within_budget((ref + 0.9 * floor).to(F64).float(), ref, ref.float())
    with pytest.raises(AssertionError, match="budget"):
        testing.assert_within_budget((ref + 1.3 * floor).to(F64).float(), ref, ref.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_budget_sees_values_that_are_not_finite(bad: float) -> None:
    ref = torch.tensor([1.0, -math.inf], dtype=F64)
    assert testing.assert_within_budget(ref.float(), ref, ref.float()) == 0
    with pytest.raises(AssertionError, match=r"index \[0\]"):
        testing.assert_within_budget(torch.tensor([bad, -math.inf]), ref, ref.float())
    with pytest.raises(AssertionError, match=r"index \[1\]"):
        testing.assert_within_budget(torch.tensor([1.0, 7.0]), ref, ref.float())


def test_budget_refuses_other_shapes_and_a_reference_in_low_precision() -> None:
    ref = torch.zeros(3, dtype=F64)
    with pytest.raises(AssertionError, match="shapes differ"):
        testing.assert_within_budget(torch.zeros(1, 3), ref, torch.zeros(3))
    with pytest.raises(AssertionError, match="must be float64"):
        testing.assert_within_budget(torch.zeros(3), ref.float(), torch.zeros(3))


def test_input_makers() -> None:
    for kind in testing.WEIGHT_KINDS:
        rows = testing.weight_rows(kind, 6, 3)
        assert rows.shape == (6, 3)
        assert rows.isfinite().all()
        if kind not in ("negative", "zero"):
            torch.testing.assert_close(rows.sum(-1), torch.ones(6))
            assert (rows >= 0).all()
        assert (len(rows.unique(dim=0)) == 1) == (kind in ("uniform", "all_equal"))
    assert (testing.weight_rows("zero", 6, 3)[::2] == 0).all()
    assert (testing.weight_rows("negative", 6, 3) < 0).any()
    with pytest.raises(ValueError, match="kind must be one of"):
        testing.weight_rows("flat", 2, 2)
    t = torch.randn(2, 3, 4)
    assert torch.equal(testing.noncontiguous(t), t)
    assert testing.noncontiguous(t).stride() == (2, 8, 48)
    assert testing.expanded(t, 1).stride()[1] == 0
    assert torch.equal(testing.expanded(t, 1)[:, 2], t[:, 0])
