"""Paired bootstrap over units of text, never over tokens: tokens of one text are not independent of each other.

Every statistic is computed on the same draws, so two models are always compared on the same resampled text (that is
what makes the interval paired), and equal models differ by exactly 0 in every draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, UInt

from neuroweave.diagnose.comparison import Estimate

FEWEST_UNITS = 10  # below this, percentile intervals are known to come out too narrow; the report says so
ROWS_AT_ONCE = 64


class Bootstrap:
    """Draws of `units` units with replacement, `resamples` times, from one seed."""

    def __init__(self, units: int, *, resamples: int = 2000, seed: int = 0) -> None:
        if units < 1:
            raise ValueError(f"a bootstrap needs at least one unit of text, got {units}")
        self.units = units
        draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
        self._times_drawn: UInt[np.ndarray, "resamples units"] = draws.astype(np.uint32)

    def means(self, sums: Float[np.ndarray, "units columns"], counts: Any) -> Float[np.ndarray, "resamples columns"]:
        """The mean per token in every draw: the drawn units' sums over their counts.

        `sums`: a statistic summed over the tokens of each unit; `counts` [units]: its tokens.
        """
        counts = np.asarray(counts, dtype=np.float64)
        rows = []
        for start in range(0, len(self._times_drawn), ROWS_AT_ONCE):
            weights = self._times_drawn[start : start + ROWS_AT_ONCE].astype(np.float64)
            rows.append((weights @ sums) / (weights @ counts)[:, None])
        return np.concatenate(rows)

    def estimate(self, sums: Float[np.ndarray, " units"], counts: Any, *, exponential: bool = False) -> Estimate:
        """The mean per token over all units with its 95 % percentile interval; `exponential`: exp of the mean.

        No interval with a single unit, or when a sum is not finite.
        """
        return self.estimates(sums[:, None], counts, exponential=exponential)[0]

    def estimates(
        self, sums: Float[np.ndarray, "units columns"], counts: Any, *, exponential: bool = False
    ) -> list[Estimate]:
        """`estimate` for every column at once."""
        transform = np.exp if exponential else np.asarray
        with np.errstate(over="ignore"):
            values = transform(sums.sum(0) / np.sum(counts))
            if self.units < 2 or not np.isfinite(sums).all():
                return [Estimate(value=float(value)) for value in values]
            lows, highs = np.percentile(transform(self.means(sums, counts)), [2.5, 97.5], axis=0)
        # An interval of a percentile kind can miss the estimate itself by a rounding; never let it.
        lows, highs = np.minimum(lows, values), np.maximum(highs, values)
        return [
            Estimate(value=float(value), low=float(low), high=float(high))
            for value, low, high in zip(values, lows, highs, strict=True)
        ]
