"""The paired bootstrap: exact for equal models, paired, over units, seeded; against SciPy where SciPy can do it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from neuroweave.diagnose.bootstrap import LEAST_UNITS, Bootstrap
from neuroweave.diagnose.results.comparison import Estimate

COUNTS = np.array([511, 7, 123, 1, 300])


def sums(seed: int, counts: np.ndarray = COUNTS) -> np.ndarray:
    return np.random.default_rng(seed).gamma(3, size=len(counts)) * counts


def test_a_model_against_itself_differs_by_exactly_zero() -> None:
    own, bootstrap = sums(0), Bootstrap(5)
    assert bootstrap.estimate(own - own, COUNTS) == Estimate(value=0, low=0, high=0)
    assert bootstrap.estimate(own - own, COUNTS, exponential=True) == Estimate(value=1, low=1, high=1)
    assert bootstrap.estimate(COUNTS.astype(float), COUNTS) == Estimate(value=1, low=1, high=1)


def test_values_are_means_over_tokens() -> None:
    own = sums(0)
    estimate = Bootstrap(5).estimate(own, COUNTS)
    assert estimate.value == pytest.approx(own.sum() / COUNTS.sum(), rel=1e-14)
    assert Bootstrap(5).estimate(own, COUNTS, exponential=True).value == pytest.approx(
        np.exp(estimate.value), rel=1e-14
    )


@pytest.mark.parametrize("units", [1, 2, LEAST_UNITS - 1, LEAST_UNITS])
def test_too_few_units_have_no_interval(units: int) -> None:
    counts = np.arange(1, units + 1)
    found = Bootstrap(units, least=LEAST_UNITS).estimate(sums(0, counts), counts)
    assert (found.low is not None) == (units == LEAST_UNITS)
    assert found.value == sums(0, counts).sum() / counts.sum()


def test_interval_matches_scipy() -> None:
    """Units of unequal size, as a ratio of sums; the draws differ, so the ends agree up to the noise of drawing."""
    counts = np.random.default_rng(1).integers(1, 500, size=40)
    own = sums(2, counts)
    wanted = stats.bootstrap(
        (own, counts),
        lambda x, n, axis: x.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    estimate = Bootstrap(40, resamples=20000, seed=3).estimate(own, counts)
    width = wanted.high - wanted.low
    assert estimate.low == pytest.approx(wanted.low, abs=0.04 * width)
    assert estimate.high == pytest.approx(wanted.high, abs=0.04 * width)


def test_pairing_makes_the_interval_narrow() -> None:
    """The second model is 0.02 worse everywhere, give or take little; texts differ by far more."""
    counts = np.full(30, 200)
    base = sums(0, counts)
    other = base + counts * np.random.default_rng(1).normal(0.02, 0.01, size=30)
    bootstrap = Bootstrap(30)
    paired = bootstrap.estimate(other - base, counts)
    alone = bootstrap.estimate(other, counts)
    assert paired.excludes(0.0)
    assert (alone.high - alone.low) > 20 * (paired.high - paired.low)


def test_units_are_drawn_not_tokens() -> None:
    """Ten times the tokens in the same units is no more evidence."""
    own = sums(0)
    few, many = Bootstrap(5).estimate(own, COUNTS), Bootstrap(5).estimate(10 * own, 10 * COUNTS)
    assert many.low == pytest.approx(few.low, rel=1e-12)
    assert many.high == pytest.approx(few.high, rel=1e-12)


def test_interval_covers_the_truth_about_95_times_of_100() -> None:
    counts = np.full(40, 10)
    covered = 0
    for seed in range(200):
        own = counts * np.random.default_rng(seed).normal(1.0, 1.0, size=40)
        covered += not Bootstrap(40, resamples=400, seed=seed).estimate(own, counts).excludes(1.0)
    assert 0.90 <= covered / 200 <= 0.985


def test_seed_decides() -> None:
    counts = np.full(40, 10)
    own = sums(0, counts)
    assert Bootstrap(40, seed=1).estimate(own, counts) == Bootstrap(40, seed=1).estimate(own, counts)
    assert Bootstrap(40, seed=1).estimate(own, counts) != Bootstrap(40, seed=2).estimate(own, counts)


def test_columns_are_estimated_like_one_by_one() -> None:
    own = np.stack([sums(0), sums(1), sums(2)], axis=1)
    bootstrap = Bootstrap(5)
    for one, column in zip(bootstrap.estimates(own, COUNTS), own.T, strict=True):
        assert one.low == pytest.approx(bootstrap.estimate(column, COUNTS).low, rel=1e-12)
    assert bootstrap.estimates(np.zeros((5, 0)), COUNTS) == []


def test_no_interval_where_there_is_none_to_have() -> None:
    assert Bootstrap(1).estimate(np.array([2.0]), [4]) == Estimate(value=0.5)
    assert Bootstrap(2).estimate(np.array([np.inf, 1.0]), [1, 1]) == Estimate(value=np.inf)
    assert not Estimate(value=2.0).excludes(1.0)
    with pytest.raises(ValueError, match="at least one unit of text, got 0"):
        Bootstrap(0)
