"""Weight rows: draws, grids, parsing."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clp.data.weights import (
    FACES,
    draw_from_dirichlet,
    draw_from_grid,
    draw_on_faces,
    parse_rows,
    parse_weights,
    weight_grid,
)

NAMES = ("joy", "brief")


def draw(count=4000, m=3, concentration=1.0, corner=0.0, seed=0):
    return draw_from_dirichlet(count, m, concentration, corner, torch.Generator().manual_seed(seed))


def test_drawn_rows_lie_on_the_simplex_with_the_moments_of_the_dirichlet():
    rows = draw()
    assert float(rows.min()) >= 0
    torch.testing.assert_close(rows.sum(1), torch.ones(4000))
    # Dirichlet(1) in 3 dimensions: mean 1/3, variance 1/18.
    torch.testing.assert_close(rows.mean(0), torch.full((3,), 1 / 3), atol=0.015, rtol=0)
    torch.testing.assert_close(rows.var(0), torch.full((3,), 1 / 18), atol=0.005, rtol=0)


def test_corner_probability_moves_that_share_to_corners():
    share = (draw(corner=0.25) == 1).any(1).float().mean()
    assert 0.21 < float(share) < 0.29
    assert float((draw(corner=1.0).max(1).values == 1).float().mean()) == 1


def test_draws_depend_on_the_generator_alone():
    assert torch.equal(draw(seed=3), draw(seed=3))
    assert not torch.equal(draw(seed=3), draw(seed=4))


def test_faces_are_drawn_in_their_shares_and_uniformly_on_each():
    rows = draw_on_faces(20_000, 4, torch.Generator().manual_seed(0))
    assert rows.dtype == torch.float32 and float(rows.min()) >= 0
    torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))
    positive = (rows > 0).sum(1)
    for corners, share in zip((1, 2, 4), FACES, strict=True):
        assert float((positive == corners).float().mean()) == pytest.approx(share, abs=0.015)
    assert not (positive == 3).any()
    # All corners and edges alike.
    torch.testing.assert_close(rows.mean(0), torch.full((4,), 0.25), atol=0.015, rtol=0)
    edges = rows[positive == 2]
    pairs = {tuple(p.nonzero()[:, 0].tolist()) for p in edges > 0}
    assert len(pairs) == 6
    # Uniform on an edge: the larger of the two is uniform in [1/2, 1].
    larger = edges.max(1).values
    assert float(larger.mean()) == pytest.approx(0.75, abs=0.01)
    assert float(larger.var()) == pytest.approx(1 / 48, abs=0.002)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_faces_of_few_objectives(m):
    rows = draw_on_faces(4000, m, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows.sum(1), torch.ones(4000))
    share = float((rows.max(1).values == 1).float().mean())
    assert share == pytest.approx({1: 1.0, 2: FACES[0], 3: FACES[0]}[m], abs=0.03)


def test_draws_from_the_grid_are_all_its_weights():
    grid = {tuple(w) for w in weight_grid(3).tolist()}
    rows = draw_from_grid(1000, 3, torch.Generator().manual_seed(0))
    assert {tuple(w) for w in rows.tolist()} == grid


def test_grid_has_11_rows_for_two_objectives_and_das_dennis_above():
    two = weight_grid(2)
    torch.testing.assert_close(two[:, 0], torch.linspace(0, 1, 11))
    assert [len(weight_grid(m)) for m in (1, 2, 3, 4)] == [1, 11, 15, 20]
    for m in range(1, 6):
        grid = weight_grid(m)
        torch.testing.assert_close(grid.sum(1), torch.ones(len(grid)))
        assert len({tuple(r) for r in grid.tolist()}) == len(grid)
        assert all(row in grid.tolist() for row in torch.eye(m).tolist())


@pytest.mark.parametrize(
    "spec", ["joy=0.7,brief=0.3", " brief = 0.3 , joy = 0.7", "0.7,0.3", {"joy": 0.7, "brief": 0.3},
             [0.7, 0.3], torch.tensor([0.7, 0.3]), np.array([0.7, 0.3]), [np.float32(0.7), 0.3],
             {"joy": torch.tensor(0.7), "brief": np.float64(0.3)}, np.array([0.7, 0.3], "float32"),
             torch.nn.Parameter(torch.tensor([0.7, 0.3])), torch.tensor([[0.7, 9], [0.3, 9]])[:, 0],
             (np.array(0.7), torch.tensor(0.3, dtype=torch.float64)), np.array([7, 3], object) / 10,
             types.MappingProxyType({"joy": 0.7, "brief": 0.3}), "joy=.7, brief=3e-1,"],
)  # fmt: skip
def test_parse_accepts_every_way_of_saying_a_row(spec):
    torch.testing.assert_close(parse_weights(spec, NAMES), torch.tensor([0.7, 0.3]))
    assert parse_rows(spec, 3, NAMES).shape == (3, 2)


@pytest.mark.parametrize(
    "spec",
    [torch.tensor([0.9, 0.1], dtype=torch.bfloat16), np.array([0.9, 0.1], dtype=np.float16),
     {"joy": torch.tensor(0.9, dtype=torch.bfloat16), "brief": 0.1}],
)  # fmt: skip
def test_a_row_is_on_the_simplex_within_the_rounding_of_its_dtype(spec):
    # bfloat16 has 0.8984 + 0.1001.
    wanted = torch.tensor([0.9, 0.1])
    torch.testing.assert_close(parse_weights(spec, NAMES), wanted, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="sum to 1"):
        parse_weights([0.8984, 0.1001], NAMES)


def test_integers_of_numpy_and_rows_of_arrays():
    assert parse_weights(np.array([0, 1]), NAMES).tolist() == [0, 1]
    assert parse_weights({"joy": np.int64(1)}, NAMES).tolist() == [1, 0]
    assert parse_rows(np.eye(2), 2, NAMES).tolist() == [[1, 0], [0, 1]]
    mixed = [np.array([1, 0]), torch.tensor([0.0, 1.0], dtype=torch.bfloat16), "joy=1"]
    assert parse_rows(mixed, 3, NAMES).tolist() == [[1, 0], [0, 1], [1, 0]]


def test_a_missing_name_is_zero():
    assert parse_weights({"brief": 1}, NAMES).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("joi=1", "unknown objective 'joi'"),
        ("joy=0.5,0.5", "must look like"),
        ("", "must look like"),
        ("joy=x", "not a number"),
        ("joy=0.5,joy=0.5", "given twice"),
        ([1.0], "2 entries"),
        ([1.0, 0.0, 0.0], "2 entries"),
        ([float("nan"), 1.0], "joy must be finite"),
        ({"joy": float("inf")}, "joy must be finite"),
        ([10**400, 0], "joy must be finite"),
        ([0.0, 1e39], "brief must be finite"),
        (["a", "b"], "joy must be a number"),
        ([True, False], "joy must be a number"),
        (np.array([True, False]), "joy must be a number"),
        (np.array(["a", "b"]), "joy must be a number"),
        (np.array([np.nan, 1]), "joy must be finite"),
        (np.eye(2), "2 entries"),
        (torch.tensor(1.0), "2 entries"),
        ([torch.tensor([1.0]), 0], "joy must be a number"),
        (torch.tensor([1j, 0]), "joy must be a number"),
        ([0.7, 0.7], "sum to 1"),
        ([1.5, -0.5], "sum to 1"),
        (3.0, "string, mapping or sequence"),
    ],
)
def test_parse_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_weights(spec, NAMES)


def test_simplex_false_allows_any_finite_row():
    assert parse_weights([1.5, -0.5], NAMES, simplex=False).tolist() == [1.5, -0.5]


def test_parse_rows_takes_one_for_all_or_one_each():
    assert parse_rows("joy=1", 3, NAMES).tolist() == [[1, 0]] * 3
    assert parse_rows([0.25, 0.75], 2, NAMES).tolist() == [[0.25, 0.75]] * 2
    each = parse_rows([{"joy": 1.0}, "brief=1"], 2, NAMES)
    assert each.tolist() == [[1, 0], [0, 1]]
    assert parse_rows(torch.eye(2), 2, NAMES).tolist() == [[1, 0], [0, 1]]
    assert parse_rows([], 0, NAMES).shape == (0, 2)
    with pytest.raises(ValueError, match="given once or for all 3 prompts"):
        parse_rows([{"joy": 1.0}], 3, NAMES)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_parse_string_round_trips(values):
    text = ",".join(f"{n}={v!r}" for n, v in zip(NAMES, values, strict=True))
    got = parse_weights(text, NAMES, simplex=False)
    torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float32))
