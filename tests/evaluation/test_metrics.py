"""Figures of curves against their definitions, and on the digitised curves of CLP's figure 1."""

import itertools

import numpy as np
import pytest
from scipy import stats

from clp.evaluation.metrics import (
    additive_epsilon,
    dominated,
    hypervolume,
    inner_product,
    mean_rewards,
    paired_bootstrap,
    spearman,
)

# arXiv:2407.15762, figure 1 (nli, rouge), read off to about 0.004; w from (0, 1) to (1, 0).
SOUPS = np.array([
    (.395, .945), (.467, .929), (.547, .890), (.614, .854), (.665, .790), (.720, .718),
    (.766, .616), (.797, .520), (.824, .380), (.834, .253), (.842, .121),
])  # fmt: skip
FULL_CLP = np.array([
    (.550, .948), (.594, .948), (.633, .934), (.667, .925), (.695, .898), (.725, .889),
    (.742, .845), (.767, .808), (.779, .752), (.793, .699), (.804, .626),
])  # fmt: skip
PROMPT = np.array([(.727, .885), (.739, .873), (.756, .812)])  # fmt: skip
CORNER = (0.395, 0.121)  # the worst of Rewarded Soups


def test_figure_1_of_the_paper():
    found = [hypervolume(points, CORNER) for points in (SOUPS, FULL_CLP, PROMPT)]
    assert found == pytest.approx([0.279, 0.319, 0.274], abs=5e-4)
    assert (dominated(SOUPS, FULL_CLP), dominated(FULL_CLP, SOUPS)) == (8, 0)
    # Soups reach further in nli, by .842 - .804; CLP covers more elsewhere.
    assert additive_epsilon(FULL_CLP, SOUPS) == pytest.approx(0.038)
    assert additive_epsilon(SOUPS, FULL_CLP) > additive_epsilon(FULL_CLP, SOUPS)
    w = np.linspace(0, 1, 11)
    assert spearman(w, SOUPS[:, 0]) == 1 and spearman(w, SOUPS[:, 1]) == -1
    assert np.ptp(SOUPS, 0) == pytest.approx([0.447, 0.824])


@pytest.mark.parametrize("m", [2, 3])
def test_hypervolume_is_the_volume_of_the_union_of_boxes(m):
    """Counted on the grid that the points' coordinates make; some are below the reference."""
    generator = np.random.default_rng(m)
    for _ in range(20):
        points = generator.uniform(-0.3, 1, (6, m))
        reference = generator.uniform(-0.1, 0.3, m)
        edges = [np.unique([reference[i], *np.maximum(points[:, i], reference[i])])
                 for i in range(m)]  # fmt: skip
        volume = 0.0
        for cell in itertools.product(*(range(len(e) - 1) for e in edges)):
            top = np.array([edges[i][c + 1] for i, c in enumerate(cell)])
            low = np.array([edges[i][c] for i, c in enumerate(cell)])
            volume += np.prod(top - low) * (points >= top).all(1).any()
        assert hypervolume(points, reference) == pytest.approx(volume, abs=1e-12)


def test_larger_is_better():
    """The sign of each figure: a better point counts for more, and covers the worse one."""
    worse, better = np.array([[0.2, 0.3]]), np.array([[0.5, 0.4]])
    assert hypervolume(worse, (0, 0)) == pytest.approx(0.06)
    assert hypervolume(better, (0, 0)) == pytest.approx(0.2)
    assert hypervolume(worse, (0.3, 0)) == 0
    assert (dominated(worse, better), dominated(better, worse)) == (1, 0)
    assert dominated(worse, worse) == 0  # equal points do not dominate each other
    assert additive_epsilon(worse, better) == pytest.approx(0.3)
    assert additive_epsilon(better, worse) == pytest.approx(-0.1)
    even = np.full((1, 2), 0.5)
    gains = [inner_product(p, even, offset=np.zeros(2), scale=np.ones(2)) for p in (worse, better)]
    assert gains == pytest.approx([0.25, 0.45])


def test_a_reference_point_has_a_number_for_each_objective():
    with pytest.raises(ValueError, match=r"reference must have shape \[2\], got \[3\]"):
        hypervolume(SOUPS, (0, 0, 0))


def test_epsilon_covers_exactly():
    generator = np.random.default_rng(0)
    for m in (1, 2, 3):
        a, b = generator.random((5, m)), generator.random((4, m))
        eps = additive_epsilon(a, b)

        def covers(amount, a=a, b=b):
            return all(((a + amount) >= q).all(1).any() for q in b)

        assert covers(eps + 1e-9) and not covers(eps - 1e-9)


def test_the_inner_product_is_in_the_units_that_are_given():
    w = np.array([[1.0, 0.0], [0.25, 0.75]])
    points = np.array([[3.0, 10.0], [2.0, 30.0]])
    found = inner_product(points, w, offset=np.array([1.0, 10.0]), scale=np.array([0.5, 20.0]))
    assert found == pytest.approx((4 + (0.25 * 2 + 0.75 * 1)) / 2)
    for bad, message in [
        ({"offset": np.zeros(3)}, "offset must be 2 finite numbers"),
        ({"offset": np.array([0, np.nan])}, "offset must be 2 finite numbers"),
        ({"scale": np.array([1.0, 0.0])}, "scale must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            inner_product(points, w, **({"offset": np.zeros(2), "scale": np.ones(2)} | bad))
    with pytest.raises(TypeError, match="scale"):  # no units, no figure
        inner_product(points, w, offset=np.zeros(2))


def test_spearman_is_scipys():
    generator = np.random.default_rng(0)
    w = np.linspace(0, 1, 11)
    rewards = generator.integers(0, 5, (30, 11)).astype(float)
    wanted = [stats.spearmanr(w, row).statistic for row in rewards]
    assert spearman(w, rewards) == pytest.approx(wanted)
    assert np.isnan(spearman(w, np.ones(11))) and np.isnan(spearman(np.ones(1), np.ones(1)))


def test_mean_rewards_leave_out_what_does_not_apply():
    rewards = np.array([[[1.0, np.nan]], [[3.0, np.nan]], [[8.0, 5.0]]])  # [P, W, m]
    counts = np.array([[1.0, 1, 1], [2, 1, 0], [0, 0, 3]])
    found = mean_rewards(rewards, counts)[:, 0]
    assert found[:, 0] == pytest.approx([4, 5 / 3, 8])
    assert found[[0, 2], 1] == pytest.approx([5, 5]) and np.isnan(found[1, 1])


def means(rewards, counts):
    return {"first": mean_rewards(rewards, counts)[:, 0, 0]}


def test_intervals_of_means_are_those_of_the_normal_distribution():
    """And those of differences are paired: what a prompt adds to both methods cancels."""
    generator = np.random.default_rng(0)
    prompt = generator.normal(0, 1, (400, 1, 1))
    methods = {
        "a": prompt + generator.normal(0, 0.1, (400, 1, 1)),
        "b": 0.05 + prompt + generator.normal(0, 0.1, (400, 1, 1)),
    }
    found = paired_bootstrap(means, methods, 400, resamples=4000)
    for name, rewards in methods.items():
        value, low, high = found[name].figures["first"]
        error = 1.96 * rewards.std() / 20
        assert value == pytest.approx(rewards.mean())
        assert (low, high) == pytest.approx((value - error, value + error), abs=0.1 * error)
    apart = methods["b"] - methods["a"]
    value, low, high = found["b"].differences["first"]
    error = 1.96 * apart.std() / 20
    assert value == pytest.approx(apart.mean())
    assert (low, high) == pytest.approx((value - error, value + error), abs=0.1 * error)
    assert found["a"].differences["first"] == (0, 0, 0)
    assert paired_bootstrap(means, methods, 400, resamples=4000) == found
    assert paired_bootstrap(means, methods, 400, resamples=4000, seed=1) != found


def test_any_figure_is_bootstrapped():
    """Resamples of the definition, one by one."""
    generator = np.random.default_rng(3)
    rewards = generator.random((30, 4, 2))

    def volume(rewards, counts):
        return {"volume": np.array([hypervolume(p, (0, 0)) for p in mean_rewards(rewards, counts)])}

    (found,) = paired_bootstrap(volume, {"a": rewards}, 30, resamples=300, seed=5).values()
    value, low, high = found.figures["volume"]
    assert value == pytest.approx(hypervolume(rewards.mean(0), (0, 0)))
    counts = np.random.default_rng(5).multinomial(30, [1 / 30] * 30, size=300)
    each = [hypervolume(np.repeat(rewards, c, 0).mean(0), (0, 0)) for c in counts]
    wanted = value + np.percentile(each - np.mean(each), [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(wanted))


def test_a_figure_that_is_undefined_has_no_interval():
    def constant(rewards, counts):
        return {"rho": spearman(np.arange(4.0), mean_rewards(rewards, counts)[..., 0])}

    found = paired_bootstrap(constant, {"a": np.ones((5, 4, 1))}, 5)["a"].figures["rho"]
    assert np.isnan(found).all()
