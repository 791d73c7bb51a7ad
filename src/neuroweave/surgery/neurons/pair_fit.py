"""Odd piecewise-linear functions as small groups of sign-symmetric pairs, fitted and verified.

A pair at gain a computes (a s) [act(a s) + act(-a s)] of a direction's coordinate s. With act(s) = s phi(s) and
phi(s) + phi(-s) = 1 (SiLU, GELU, tanh-GELU) that is (a s)^2 [phi(a s) - phi(-a s)]: turned in sign with s, because the
bracket is. Sums of such terms are odd too, so a group of pairs can be an odd function and nothing else: a behaviour is
stated for s >= 0, and its other half follows. Near 0 a term goes as s^3, beyond 1/a as s |s|; a group is a difference
of such terms.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from neuroweave.activations.formulas import FORMULAS
from neuroweave.activations.numpy import PRIMITIVES
from neuroweave.surgery.neurons.plain_values import echo, is_number, shorten

SYMMETRIC = ("silu", "gelu", "gelu_tanh")
DEFAULT_RANGE, DEFAULT_TOLERANCE = 4.0, 0.05
PAIR_COUNTS = (1, 2, 3, 4, 6, 8)
# Gains are range^-1 times 2^(k/4), k = 0 to 36; those of a group are evenly spaced.
_PER_OCTAVE, _LAST, _LAST_FIRST, _SPACINGS = 4, 36, 20, (1, 2, 4, 6, 8, 10)
_POINTS, _CHECKED, _ROUNDS, _RIDGE, _DIGITS = 128, 1000, 6, 1e-3, 5
# Sizes of knots, slopes and ranges: squares, sums and the gains that follow stay far inside float32.
_SMALLEST, _LARGEST = 1e-6, 1e6
# The terms of a group may exceed the function this many times: each is stored rounded, to 1 in 500 in bfloat16.
_CANCELLATION = 64.0


@dataclass(frozen=True)
class PiecewiseLinear:
    """An odd function of s: 0 from 0 to the first knot (all >= 0), then of slope `slopes[k]` after `knots[k]`.

    `range`: it is fitted and verified on [-range, range]; `tolerance`: the largest error, as a share of the largest
    value there, that a realisation may have.
    """

    knots: tuple[float, ...]
    slopes: tuple[float, ...]
    range: float = DEFAULT_RANGE
    tolerance: float = DEFAULT_TOLERANCE

    def __call__(self, s: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        size, total, before = np.abs(s), np.zeros_like(s), 0.0
        for knot, slope in zip(self.knots, self.slopes, strict=True):
            total = total + (slope - before) * np.maximum(size - knot, 0)
            before = slope
        return np.sign(s) * total

    def to_dict(self) -> dict[str, Any]:
        """As a bank stores it."""
        about = {"knots": list(self.knots), "slopes": list(self.slopes)}
        return about | {"range": self.range, "tolerance": self.tolerance}

    @classmethod
    def from_dict(cls, about: dict[str, Any]) -> PiecewiseLinear:
        """From a bank. Raises ValueError for what is no odd piecewise-linear function."""
        for key in ("knots", "slopes", "range", "tolerance"):
            value, several = about.get(key, 0), key in ("knots", "slopes")
            if several and key in about:
                sound = isinstance(value, list | tuple) and all(map(is_number, value))
            else:
                sound = is_number(value)
            if not sound:
                expected = "a list of numbers" if several else "a number"
                raise ValueError(f"the behaviour's {key} is {echo(value)}; expected {expected}")
        try:
            return piecewise_linear(**about)
        except TypeError as error:
            raise ValueError(f"the behaviour {echo(about)} is not one of knots, slopes, range and tolerance") from error


@dataclass(frozen=True)
class PairFit:
    """Pair k computes weights[k] (gains[k] s) [act(gains[k] s) + act(-gains[k] s)]. `error`: max |error| / max |f|."""

    gains: tuple[float, ...]
    weights: tuple[float, ...]
    error: float

    def __call__(self, s: Float64[np.ndarray, " n"], activation: str) -> Float64[np.ndarray, " n"]:
        return sum(
            (weight * pair_output(gain * s, activation) for gain, weight in zip(self.gains, self.weights, strict=True)),
            np.zeros_like(s),
        )


def pair_output(s: np.ndarray, activation: str) -> np.ndarray:
    """s [act(s) + act(-s)]"""
    act = FORMULAS[activation]
    return s * (act(s, PRIMITIVES) + act(-s, PRIMITIVES))


def piecewise_linear(
    knots: Sequence[float | int],
    slopes: Sequence[float | int],
    range: float | int = DEFAULT_RANGE,
    tolerance: float = DEFAULT_TOLERANCE,
) -> PiecewiseLinear:
    """A checked `PiecewiseLinear`. Knots below 0 state the negative half too, which must agree with the positive one.

    Before a first knot below 0 the slope is that after the last one. Raises ValueError, also for a function that is not
    odd: no group of pairs can realise it.
    """
    if not knots or len(knots) != len(slopes):
        raise ValueError(f"{len(knots)} knots and {len(slopes)} slopes; expected one slope for each knot, one at least")
    if not all(map(math.isfinite, (*knots, *slopes, range, tolerance))):
        raise ValueError("knots, slopes, range and tolerance must be finite numbers")
    for what, numbers in (("knot", knots), ("slope", slopes), ("range", [range])):
        for number in numbers:
            if number and not _SMALLEST <= abs(number) <= _LARGEST:
                other = "" if what == "range" else ", or 0"
                raise ValueError(f"{what} {number:g}: expected a size from {_SMALLEST:g} to {_LARGEST:g}{other}")
    if any(after <= before for before, after in itertools.pairwise(knots)):
        raise ValueError(f"knots {shorten(str(list(knots)))} do not ascend")
    if not range > 0:
        raise ValueError(f"range {range}: expected more than 0")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance {tolerance}: expected more than 0 and less than 1")
    if knots[0] < 0:
        knots, slopes = _positive_half(knots, slopes, range)
    found = PiecewiseLinear(tuple(map(float, knots)), tuple(map(float, slopes)), float(range), float(tolerance))
    if not np.abs(found(np.linspace(0, found.range, _CHECKED))).max() > 0:
        raise ValueError(f"the function is 0 everywhere on [{-range:g}, {range:g}]")
    return found


def _positive_half(
    knots: Sequence[float | int], slopes: Sequence[float | int], range: float | int
) -> tuple[list[float | int], list[float | int]]:
    def slope_at(s: float) -> float | int:
        at = sum(knot < s for knot in knots) - 1
        return slopes[at] if at >= 0 else slopes[-1]

    edges = [0.0, *sorted({abs(knot) for knot in knots if 0 < abs(knot) < range})]
    halves: list[float | int] = []
    for low, high in itertools.pairwise([*edges, range]):
        right, left = slope_at((low + high) / 2), slope_at(-(low + high) / 2)
        if right != left:
            raise ValueError(
                f"not an odd function: slope {left:g} on [{-high:g}, {0 - low:g}] and {right:g} on [{low:g}, {high:g}]"
                "; sign-symmetric pairs realise odd functions only: give knots of 0 or more, and the other half follows"
            )
        halves.append(right)
    return edges, halves


@functools.lru_cache(maxsize=4096)
def fit_pairs(behaviour: PiecewiseLinear, activation: str) -> PairFit:
    """The smallest group of pairs that realises a behaviour within its tolerance.

    Least squares on the range, repeated with more weight where the error is large; weights are rounded to five digits,
    so that the last digits of a platform's linear algebra do not reach them, and the error is verified after that, on
    other points. Raises ValueError with the best error reached when no group of at most 8 pairs is good enough.
    """
    if activation not in SYMMETRIC:
        raise ValueError(f"activation {activation!r}: sign-symmetric pairs need one of {', '.join(SYMMETRIC)}")
    best = math.inf
    for count in PAIR_COUNTS:
        fit = _best_fit(behaviour, activation, count)
        if fit is not None:
            best = min(best, fit.error)
            if fit.error <= behaviour.tolerance:
                return fit
    raise ValueError(
        f"up to {PAIR_COUNTS[-1]} pairs of {activation} reach an error of {best:.3f} of the largest value on "
        f"[{-behaviour.range:g}, {behaviour.range:g}], the tolerance is {behaviour.tolerance:g}; a gentler "
        "turn, or one further from 0 for its range, is easier; or raise the tolerance"
    )


def _best_fit(behaviour: PiecewiseLinear, activation: str, count: int) -> PairFit | None:
    """The group of `count` pairs with the smallest error, among those whose terms do not cancel too much."""
    points = np.arange(1, _POINTS + 1) * (behaviour.range / _POINTS)
    checked = np.arange(1, _CHECKED + 1) * (behaviour.range / _CHECKED)
    wanted, truth = behaviour(points), behaviour(checked)
    largest = float(np.abs(truth).max())
    gains, terms, checked_terms = _terms(behaviour.range, activation)
    best: PairFit | None = None
    for first, spacing in itertools.product(range(_LAST_FIRST + 1), _SPACINGS if count > 1 else (1,)):
        chosen = first + spacing * np.arange(count)
        if chosen[-1] > _LAST:
            continue
        sizes = terms[-1, chosen]
        for scaled in _weighted_fits(terms[:, chosen] / sizes, wanted):
            weights = np.array([float(f"{weight:.{_DIGITS - 1}e}") for weight in scaled / sizes])
            error = float(f"{np.abs(checked_terms[:, chosen] @ weights - truth).max() / largest:.4g}")
            if np.abs(weights * sizes).sum() <= _CANCELLATION * largest and (best is None or error < best.error):
                best = PairFit(tuple(gains[chosen].tolist()), tuple(weights.tolist()), error)
    return best


@functools.lru_cache(maxsize=16)
def _terms(range: float, activation: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All gains, and a pair's output at each (columns) on the points of the fit and on those of the check."""
    gains = np.array([float(f"{2 ** (k / _PER_OCTAVE) / range:.6g}") for k in np.arange(_LAST + 1)])
    points = np.arange(1, _POINTS + 1) * (range / _POINTS)
    checked = np.arange(1, _CHECKED + 1) * (range / _CHECKED)
    return gains, pair_output(np.outer(points, gains), activation), pair_output(np.outer(checked, gains), activation)


def _weighted_fits(terms: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """Ridge least squares, and again with the points weighted by their error so far (Lawson): a lower maximum."""
    count, weight, found = terms.shape[1], np.ones(len(wanted)), []
    ridge, zeros = _RIDGE * math.sqrt(len(wanted)) * np.eye(count), np.zeros(count)
    for _ in range(_ROUNDS + 1):
        root = np.sqrt(weight / weight.mean())
        solution = np.linalg.lstsq(
            np.vstack([terms * root[:, None], ridge]), np.append(wanted * root, zeros), rcond=None
        )[0]
        found.append(solution)
        error = np.abs(terms @ solution - wanted)
        weight = weight * (error + 1e-3 * error.max())
    return found
