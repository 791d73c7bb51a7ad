"""The arithmetic of a fuse, on blocks: W a block of stored weights, D the delta's block of the same shape.

Shape-contoured, down:  W + scale * D * W             scale = alpha * std(W) / std(D)
Shape-contoured, gate:  W * (1 + clamp(D, -gamma, gamma))
Additive:               W + scale * D

Float32 arithmetic, one rounding to the stored dtype; float64 where float32 is stored, so that four roundings do not add
up. Standard deviations are the population's, over the tensor. Source: the Fusion issue; docs/fusion.md.
`compiled.py` has the twin of `edit_block` and `block_moments`, to the same bits.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from neuroweave.surgery.neurons.randomness import random_bits

BLOCK = 1 << 18  # elements; with smaller blocks the threads wait for each other between array operations
_DOT = 1 << 13  # longer dot products would start the threads of the BLAS
EXACT_BELOW = 1 << 20  # smaller tensors are summed in float64
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16}
LANES = 1 << 10  # float32 sums side by side: an order of adding that NumPy and a compiler can both keep to


def contour_down(w: Any, d: Any, out: Any, *, scale: Any, gamma: Any) -> None:
    """out = w * (1 + scale * d), so that a scale of 0 gives back every bit, the sign of a zero too"""
    np.multiply(d, scale, out=out)
    np.add(out, out.dtype.type(1), out=out)
    np.multiply(w, out, out=out)


def contour_gate(w: Any, d: Any, out: Any, *, scale: Any, gamma: Any) -> None:
    """out = w * (1 + clamp(d, -gamma, gamma))"""
    np.clip(d, -gamma, gamma, out=out)
    np.add(out, out.dtype.type(1), out=out)
    np.multiply(w, out, out=out)


def add(w: Any, d: Any, out: Any, *, scale: Any, gamma: Any) -> None:
    """out = w + scale * d"""
    np.multiply(d, scale, out=out)
    np.add(w, out, out=out)


FORMULAS: dict[str, Callable[..., None]] = {"contour down": contour_down, "contour gate": contour_gate, "add": add}


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of some numbers."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total) and math.isfinite(self.squares)

    @property
    def std(self) -> float:
        """The population standard deviation; `nearly_constant` says when it cannot be trusted."""
        if not self.count:
            return 0.0
        mean = self.total / self.count
        return math.sqrt(max(0.0, self.squares / self.count - mean * mean))

    @property
    def nearly_constant(self) -> bool:
        """Whether the mean is so large that the difference of the sums has lost its digits."""
        return self.count > 0 and self.std**2 < 1e-4 * self.squares / self.count

    @staticmethod
    def join(parts: Iterable[Moments]) -> Moments:
        """The moments of everything, in the order given, so that they do not depend on threads."""
        parts = list(parts)
        return Moments(
            sum(part.count for part in parts),
            math.fsum(part.total for part in parts) if all(part.finite for part in parts) else math.nan,
            math.fsum(part.squares for part in parts) if all(part.finite for part in parts) else math.nan,
        )


class _Buffers(threading.local):
    """Where a thread widens a block to float32."""

    def __init__(self) -> None:
        self.wide = np.empty(BLOCK, "f4")


_buffers = _Buffers()


def block_moments(values: np.ndarray, *, exact: bool, shift: float = 0.0) -> Moments:
    """The moments of `values - shift`. `exact`: float64 throughout, else float32 in lanes (`_lane_sums`)."""
    flat = values.reshape(-1)
    if exact or shift:
        wide = flat.astype("f8") - shift
        with np.errstate(over="ignore", invalid="ignore"):
            return Moments(flat.size, float(wide.sum()), float((wide * wide).sum()))
    parts = [_lane_sums(flat[begin : begin + BLOCK]) for begin in range(0, flat.size, BLOCK)]
    return moments_of(values, parts)


def _lane_sums(part: np.ndarray) -> np.ndarray:
    """The sum and the sum of squares of at most `BLOCK` values: value i is added to lane i % `LANES`, in order."""
    lanes = np.zeros((2, LANES), "f4")
    wide = _buffers.wide[: part.size]
    np.copyto(wide, part, casting="unsafe")
    whole = part.size // LANES * LANES
    with np.errstate(over="ignore", invalid="ignore"):
        for sums in lanes:
            np.add.reduce(wide[:whole].reshape(-1, LANES), axis=0, initial=0, out=sums)
            sums[: part.size - whole] += wide[whole:]
            np.multiply(wide, wide, out=wide)
        return lanes.sum(axis=1, dtype="f8")


def moments_of(values: np.ndarray, parts: list[np.ndarray]) -> Moments:
    """The moments of `values` from the sums of their blocks, computed again where float32 could not hold those."""
    with np.errstate(over="ignore", invalid="ignore"):
        total, squares = (float(sum(part[which] for part in parts)) for which in (0, 1))
    lost = squares < 1e-30 * values.size  # squares that leave the range of float32 below, or above
    lost |= not (math.isfinite(total) and math.isfinite(squares)) and bool(np.isfinite(values.astype("f4")).all())
    return block_moments(values, exact=True) if lost else Moments(values.size, total, squares)


@dataclass(frozen=True)
class Edit:
    """What is done to one tensor: a formula with its numbers, the stored dtype, and how results are rounded.

    `seed` is None for rounding to nearest, ties to even; else results are rounded up or down at random, without bias,
    from random numbers keyed by (seed, tensor, place).
    """

    name: str
    formula: str
    dtype: str
    alpha: float | int
    gamma: float | int
    scale: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Effect:
    """What an edit did: weights that changed after rounding, out of how many; and the sums of squares of the weights
    and of their change before rounding, in one block of eight (by place)."""

    changed: int = 0
    count: int = 0
    squares: float = 0.0
    change: float = 0.0

    @property
    def relative_change(self) -> float:
        return math.sqrt(self.change / self.squares) if self.squares else 0.0

    @staticmethod
    def join(parts: Iterable[Effect]) -> Effect:
        parts = list(parts)
        return Effect(
            sum(part.changed for part in parts),
            sum(part.count for part in parts),
            math.fsum(part.squares for part in parts),
            math.fsum(part.change for part in parts),
        )


class Workspace:
    """The buffers of one thread, `BLOCK` elements each: three to compute in, by stored dtype, and the results."""

    def __init__(self) -> None:
        self._arithmetic: dict[str, list[np.ndarray]] = {}
        self._new: dict[str, np.ndarray] = {}
        self.differs = np.empty(BLOCK, bool)

    def arithmetic(self, stored: str) -> list[np.ndarray]:
        wide = "f8" if stored == "F32" else "f4"
        if wide not in self._arithmetic:
            self._arithmetic[wide] = [np.empty(BLOCK, wide) for _ in range(3)]
        return self._arithmetic[wide]

    def new(self, stored: str) -> np.ndarray:
        if stored not in self._new:
            self._new[stored] = np.empty(BLOCK, STORED[stored])
        return self._new[stored]


def edit_block(edit: Edit, w: np.ndarray, d: np.ndarray, place: int, space: Workspace) -> Effect:
    """Apply an edit to the stored weights `w` [rows, columns] in place, at most `BLOCK` of them; `d` of that shape.

    `place`: the index of the first weight in its tensor. Raises ValueError when a result is not finite.
    """
    size, shape = w.size, w.shape
    flat = [buffer[:size] for buffer in space.arithmetic(edit.dtype)]
    wide, delta, out = (buffer.reshape(shape) for buffer in flat)
    number = out.dtype.type
    np.copyto(wide, w, casting="unsafe")
    np.copyto(delta, d, casting="unsafe")
    new = space.new(edit.dtype)[:size].reshape(shape)
    with np.errstate(over="ignore", invalid="ignore"):
        FORMULAS[edit.formula](wide, delta, out, scale=number(edit.scale), gamma=number(edit.gamma))
        if edit.seed is None:
            np.copyto(new, out, casting="unsafe")
        else:
            round_at_random(out, new, edit, place)
        # one dot product tells that all is well, except where the result's range is the narrower one; a clamp hides
        # an infinite delta, and random rounding a NaN
        doubtful = edit.dtype != "BF16" or not math.isfinite(_squares(flat[2]))
        doubtful |= edit.formula == "contour gate" and not math.isfinite(_squares(flat[1]))
        if doubtful and not all(np.isfinite(part).all() for part in (new, out, delta)):
            raise ValueError(_not_finite(edit, wide, delta))
    bits = f"u{new.itemsize}"
    differs = np.not_equal(new.view(bits), w.view(bits), out=space.differs[:size].reshape(shape))
    changed = int(np.count_nonzero(differs))
    sampled = is_sampled(place)
    if sampled:
        np.subtract(out, wide, out=out)
    w[...] = new
    return effect_of(changed, flat[0], flat[2], sampled=sampled)


def is_sampled(place: int) -> bool:
    """Whether a block, by the place of its first weight, is one of the eighth whose change is measured."""
    return place // BLOCK % 8 == 0


def effect_of(changed: int, wide: np.ndarray, change: np.ndarray, *, sampled: bool) -> Effect:
    """The effect on one block, from its weights and their change before rounding, both flat."""
    squares = (_finite_squares(wide), _finite_squares(change)) if sampled else (0.0, 0.0)
    return Effect(changed, wide.size, *squares)


def _squares(flat: np.ndarray) -> float:
    """The sum of squares, over 8,192 at a time in one call."""
    whole = flat.size // _DOT * _DOT
    total = 0.0
    if whole:
        rows = flat[:whole].reshape(-1, 1, _DOT)
        total = float(np.matmul(rows, rows.reshape(-1, _DOT, 1)).sum(dtype="f8"))
    if whole < flat.size:
        total += float(np.dot(flat[whole:], flat[whole:]))
    return total


def _finite_squares(flat: np.ndarray) -> float:
    """The same where float32 cannot hold the squares."""
    with np.errstate(over="ignore"):
        squares = _squares(flat)
        return squares if math.isfinite(squares) else min(_squares(flat.astype("f8")), sys.float_info.max)


def _not_finite(edit: Edit, w: np.ndarray, d: np.ndarray) -> str:
    if not np.isfinite(d).all():
        return f"{edit.name}: the delta holds NaN or infinite values"
    if not np.isfinite(w).all():
        return f"{edit.name}: the model's own weights hold NaN or infinite values"
    largest = float(np.abs(w).max())
    return (
        f"{edit.name}: the result does not fit {edit.dtype} (weights up to {largest:.3g}); use a smaller --alpha or "
        "--gamma-cap"
    )


def round_at_random(x: np.ndarray, out: np.ndarray, edit: Edit, place: int) -> None:
    """Round float32 `x` to the dtype of `out` (bfloat16 or float16): up with the probability of the part cut off."""
    random = random_bits(edit.seed or 0, "rounding", edit.name, place, count=(x.size + 3) // 4)
    noise = random.view("<u2")[: x.size].reshape(x.shape)
    if out.dtype == BFLOAT16:
        out.view("u2")[...] = (x.view("u4") + noise) >> 16
        return
    bits = ((x.view("u4") + (noise >> 3)) >> 13) << 13  # a float16 keeps 10 of 23 digits ...
    out[...] = bits.view("f4")
    small = np.abs(x) < 2.0**-14  # ... or, below its normal range, multiples of 2^-24
    if small.any():
        size = np.floor(np.abs(x[small]).astype("f8") * 2.0**24 + noise[small] * 2.0**-16) * 2.0**-24
        out[small] = np.copysign(size, x[small])
