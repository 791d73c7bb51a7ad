"""What is counted of neurons while text streams past: moments of every neuron, response and peaks of the chosen ones.

Legend: T positions of one window, m neurons of a layer, K chosen ones. `s = gate.x` is a neuron's pre-activation and
`h = act(s) * (up.x)` its activation. Everything is summed in float64, and nothing grows with the length of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

FINE = 64  # histogram cells in one bin of the response curve: quantiles are right to 1 / (FINE * bins) of the range
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Moments:
    """Count, mean and the sums of the 2nd, 3rd and 4th powers of the distance to it, of each of m variables.

    Two parts are merged with the formulas of Pebay, "Formulas for robust, one-pass parallel computation of covariances
    and arbitrary-order statistical moments" (Sandia report SAND2008-6212).
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = np.zeros(size)
        self.power2, self.power3, self.power4 = np.zeros(size), np.zeros(size), np.zeros(size)

    def add(self, x: Float64[np.ndarray, "T m"]) -> None:
        """Take T more values of each variable."""
        more = len(x)
        if not more:
            return
        mean = x.mean(axis=0)
        distance = x - mean
        square = distance * distance
        power2 = square.sum(axis=0)
        power3 = np.einsum("tm,tm->m", square, distance)
        power4 = np.einsum("tm,tm->m", square, square)
        before, total = self.count, self.count + more
        step = mean - self.mean
        self.power4 += (
            power4
            + step**4 * before * more * (before**2 - before * more + more**2) / total**3
            + 6 * step**2 * (before**2 * power2 + more**2 * self.power2) / total**2
            + 4 * step * (before * power3 - more * self.power3) / total
        )
        self.power3 += (
            power3
            + step**3 * before * more * (before - more) / total**2
            + 3 * step * (before * power2 - more * self.power2) / total
        )
        self.power2 += power2 + step**2 * before * more / total
        self.mean += step * more / total
        self.count = total

    @property
    def deviation(self) -> Float64[np.ndarray, " m"]:
        """Population standard deviation."""
        return np.sqrt(self.power2 / max(self.count, 1))

    @property
    def kurtosis(self) -> Float64[np.ndarray, " m"]:
        """Fourth central moment over the squared variance: 3 for a normal variable, 0 for one that never changes."""
        squared = self.power2**2
        return np.divide(self.count * self.power4, squared, out=np.zeros_like(squared), where=squared > 0)


class LayerStatistics:
    """First pass: statistics of all m neurons of a layer."""

    def __init__(self, size: int) -> None:
        self.activation, self.input = Moments(size), Moments(size)
        self.absolute, self.peak = np.zeros(size), np.zeros(size)
        self.open = np.zeros(size, np.int64)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, s: Float[np.ndarray, "T m"], h: Float[np.ndarray, "T m"]) -> None:
        """Take the pre-activations and activations at T more positions."""
        wide_h, wide_s = h.astype(np.float64), s.astype(np.float64)
        self.activation.add(wide_h)
        self.input.add(wide_s)
        np.abs(wide_h, out=wide_h)
        self.absolute += wide_h.sum(axis=0)
        self.peak = np.maximum(self.peak, wide_h.max(axis=0, initial=0))
        self.open += (s > 0).sum(axis=0)
        self.low = np.minimum(self.low, wide_s.min(axis=0, initial=np.inf))
        self.high = np.maximum(self.high, wide_s.max(axis=0, initial=-np.inf))

    @property
    def mean_absolute(self) -> Float64[np.ndarray, " m"]:
        return self.absolute / max(self.activation.count, 1)

    def of(self, index: int) -> dict[str, float]:
        """The statistics of one neuron by name."""
        return {
            "positions": float(self.activation.count),
            "mean": self.activation.mean[index],
            "mean_absolute": self.mean_absolute[index],
            "deviation": self.activation.deviation[index],
            "peak": self.peak[index],
            "kurtosis": self.activation.kurtosis[index],
            "open_share": self.open[index] / max(self.activation.count, 1),
            "input_mean": self.input.mean[index],
            "input_deviation": self.input.deviation[index],
            "input_minimum": self.low[index],
            "input_maximum": self.high[index],
        }


@dataclass(frozen=True)
class Peak:
    """One of a neuron's strongest activations: `value` of h at `position` of window number `window`."""

    value: float
    window: int
    position: int


class ChosenStatistics:
    """Second pass: of K chosen neurons the response curve, quantiles of the input, and the strongest moments.

    `low`, `high`: the range of s, seen in the first pass; `peak`: the largest |h|; the curve has `bins` of equal width.
    """

    def __init__(
        self,
        low: Float64[np.ndarray, " K"],
        high: Float64[np.ndarray, " K"],
        peak: Float64[np.ndarray, " K"],
        *,
        bins: int,
        moments: int,
    ) -> None:
        size = len(low)
        self.low, self.width = low, np.where(high > low, high - low, 1.0)
        self.peak, self.bins, self.moments = peak, bins, moments
        self.cells = np.zeros((size, bins * FINE), np.int64)
        self.sum_s, self.sum_h, self.sum_hh = (np.zeros((size, bins)) for _ in range(3))
        self.strong = np.zeros(size, np.int64)
        self.values = np.zeros((size, 0))
        self.places = np.zeros((size, 0, 2), np.int64)

    def add(self, s: Float[np.ndarray, "T K"], h: Float[np.ndarray, "T K"], *, window: int, first: int) -> None:
        """Take T more positions, numbered from `first` in their window."""
        wide_s, wide_h = s.astype(np.float64), h.astype(np.float64)
        size, cells = self.cells.shape
        cell = np.clip((wide_s - self.low) / self.width * cells, 0, cells - 1).astype(np.int64)
        rows = np.arange(size)
        self.cells += np.bincount((rows * cells + cell).ravel(), minlength=size * cells).reshape(size, cells)
        flat = (rows * self.bins + cell // FINE).ravel()
        for total, amount in ((self.sum_s, wide_s), (self.sum_h, wide_h), (self.sum_hh, wide_h**2)):
            total += np.bincount(flat, weights=amount.ravel(), minlength=total.size).reshape(total.shape)
        self.strong += (np.abs(wide_h) > self.peak / 2).sum(axis=0)
        self._add_peaks(wide_h, window, first)

    def _add_peaks(self, h: Float64[np.ndarray, "T K"], window: int, first: int) -> None:
        best = np.argsort(-np.abs(h), axis=0, kind="stable")[: self.moments]  # [moments, K]
        places = np.stack([np.full(best.T.shape, window), best.T + first], axis=2)
        values = np.concatenate([self.values, np.take_along_axis(h, best, axis=0).T], axis=1)
        order = np.argsort(-np.abs(values), axis=1, kind="stable")[:, : self.moments]  # of equal ones the earlier
        self.values = np.take_along_axis(values, order, axis=1)
        self.places = np.take_along_axis(np.concatenate([self.places, places], axis=1), order[:, :, None], axis=1)

    def response(self, index: int) -> dict[str, list[float]]:
        """The curve of one neuron: in each bin that was seen, mean s, mean and deviation of h, and how often."""
        count = self.cells[index].reshape(self.bins, FINE).sum(axis=1)
        seen = count > 0
        mean = self.sum_h[index][seen] / count[seen]
        spread = np.sqrt(np.maximum(self.sum_hh[index][seen] / count[seen] - mean**2, 0))
        values = {"input": self.sum_s[index][seen] / count[seen], "mean": mean, "deviation": spread}
        return {name: list(map(float, numbers)) for name, numbers in (values | {"count": count[seen]}).items()}

    def quantiles(self, index: int) -> dict[str, float]:
        """Quantiles of s (see `FINE`), and the share of positions where |h| is more than half its peak."""
        below = np.concatenate([[0], np.cumsum(self.cells[index])])
        total = max(below[-1], 1)
        edges = np.linspace(0, 1, len(below)) * self.width[index] + self.low[index]
        named = {f"input_q{round(100 * q):02d}": np.interp(q * total, below, edges) for q in QUANTILES}
        return named | {"strong_share": self.strong[index] / total}

    def peaks(self, index: int) -> list[Peak]:
        """The strongest moments of one neuron, strongest first."""
        pairs = zip(self.values[index], self.places[index], strict=True)
        return [Peak(float(value), int(window), int(position)) for value, (window, position) in pairs]


def rounded(value: float, digits: int = 6) -> float:
    """`value` to so many significant digits, which keeps a bank's description short; whole numbers stay as they are."""
    return float(value) if float(value).is_integer() else float(f"{value:.{digits}g}")
