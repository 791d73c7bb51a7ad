"""Paired bootstrap over units of text, never over tokens: tokens of one text are not independent of each other.

Every statistic is computed on the same draws, so two models are always compared on the same resampled text (that is
what makes the interval paired), and equal models differ by exactly 0 in every draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt

from neuroweave.diagnose.results.records import Estimate

FEWEST_UNITS = 10  # below this, percentile intervals are known to come out too narrow; the report says so
# Below this there are none for text: of no difference at all they would make one in 49 % of cases with two units, 26 %
# with three, 20 % with four, 17 % with five (normal differences, 1,500 trials each; 13 % with six, 7 % with twenty).
LEAST_UNITS = 6
ROWS_AT_ONCE = 64
Statistic = Callable[..., np.ndarray]


class Bootstrap:
    """Draws of `units` units with replacement, `resamples` times, from one seed; no intervals with fewer than `least`
    units."""

    def __init__(self, units: int, *, resamples: int = 2000, seed: int = 0, least: int = 2) -> None:
        if units < 1:
            raise ValueError(f"a bootstrap needs at least one unit of text, got {units}")
        self.units, self.least = units, max(least, 2)
        draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
        self._times_drawn: UInt[np.ndarray, "resamples units"] = draws.astype(np.uint32)

    def totals(self, sums: Float[np.ndarray, "units columns"]) -> Float[np.ndarray, "resamples columns"]:
        """The drawn units' sums, added up in every draw."""
        starts = range(0, len(self._times_drawn), ROWS_AT_ONCE)
        drawn = (self._times_drawn[start : start + ROWS_AT_ONCE].astype(np.float64) @ sums for start in starts)
        return np.concatenate(list(drawn))

    def means(self, sums: Float[np.ndarray, "units columns"], counts: Any) -> Float[np.ndarray, "resamples columns"]:
        """The mean per token in every draw: the drawn units' sums over their counts.

        `sums`: a statistic summed over the tokens of each unit; `counts` [units]: its tokens.
        """
        return self.totals(sums) / self.totals(np.asarray(counts, dtype=np.float64)[:, None])

    def estimate(self, sums: Float[np.ndarray, " units"], counts: Any, *, exponential: bool = False) -> Estimate:
        """The mean per token over all units with its 95 % percentile interval; `exponential`: exp of the mean.

        No interval with too few units, or when a sum is not finite.
        """
        return self.estimates(sums[:, None], counts, exponential=exponential)[0]

    def estimates(
        self, sums: Float[np.ndarray, "units columns"], counts: Any, *, exponential: bool = False
    ) -> list[Estimate]:
        """`estimate` for every column at once."""
        transform = np.exp if exponential else np.asarray
        divisor = np.asarray(counts, dtype=np.float64)[:, None]
        return self.statistic(lambda total, count: transform(total / count), sums, divisor)

    def statistic(self, function: Statistic, *sums: Float[np.ndarray, "units _"]) -> list[Estimate]:
        """Any function of sums over units: `function(*totals)`, each [draws, columns], gives [draws, results].

        The value is that of all units once, the interval that of the draws. Where a draw gives NaN (0 / 0: a draw with
        nothing to count), it is left out; a result whose own value is NaN is given as NaN, without an interval.
        """
        with np.errstate(all="ignore"):
            values = function(*(part.sum(0, keepdims=True) for part in sums))[0]
            if self.units < self.least or not all(np.isfinite(part).all() for part in sums):
                return [Estimate(value=float(value)) for value in values]
            drawn = function(*(self.totals(part) for part in sums))
        return [with_interval(float(value), draws) for value, draws in zip(values, drawn.T, strict=True)]


def with_interval(value: float, draws: Float[np.ndarray, " draws"]) -> Estimate:
    """The estimate with the middle 95 % of its draws, never missing the value itself (a rounding away, it can)."""
    draws = draws[~np.isnan(draws)]
    if np.isnan(value) or not draws.size:
        return Estimate(value=value)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))
