"""Orthonormal frames around directions, and maps between hidden sizes, to the same bits on every machine.

A basis of size d is a cosine basis, h_j[i] = a_j cos(pi (i + 1/2) j / d) with a_0 = sqrt(1/d), a_j = sqrt(2/d) (the
orthonormal DCT-II), times random signs s_i. The frame around a unit direction c is the basis reflected: with
v = h_0 + c or h_0 - c, whichever is longer, f_j = h_j - 2 (v.h_j)/|v|^2 v for j > 0 and f_0 = c (Householder: the
reflection carries h_0 to c or -c, and everything orthogonal to h_0 to everything orthogonal to c). Rows are made on
demand; nothing here is ever d x d.

Why the bits agree: cosines come from integer arithmetic; basis entries and unit directions are multiples of 2^-24, so
that dot products of length d are sums of multiples of 2^-48 below 4 in size, which float64 holds exactly in any order,
with or without fused multiply-add; the rest is elementwise float32. The price is an error of up to 3e-6 (d = 5376) in
what should be 0 or 1.

Legend: N directions, d hidden size, J rows of a basis, I columns.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, UInt32

from neuroweave.surgery.neurons.randomness import permutation, random_bits

GRID = 1 << 24
LARGEST = 1 << 15  # hidden size; integers below stay in 32 and 63 bits
_CHUNK = 64  # directions, and rows of a basis, held at once
_ONE = 10**50  # fixed point for the cosines
_PI = 314159265358979323846264338327950288419716939937510


@functools.lru_cache(maxsize=4)
def cosine_table(size: int) -> Float32[np.ndarray, " table"]:
    """sqrt(2/d) cos(2 pi k / 4d) for k = 0 to 4d - 1, on the grid. Raises ValueError for a size that is no size."""
    if not 1 <= size <= LARGEST:
        raise ValueError(f"hidden size {size}: expected 1 to {LARGEST}")
    angle = _PI // (2 * size)
    cosine, term, n = 0, _ONE, 0
    while term:
        cosine += -term if n % 4 else term
        n += 2
        term = term * angle * angle // (_ONE * _ONE * n * (n - 1))
    values = [_ONE, cosine]
    while len(values) <= size:  # cos((k + 1) x) = 2 cos(x) cos(k x) - cos((k - 1) x)
        values.append(2 * cosine * values[-1] // _ONE - values[-2])
    amplitude = math.isqrt(2 * (GRID * _ONE) ** 2 // size)
    quarter = np.array([(amplitude * value + _ONE**2 // 2) // _ONE**2 for value in values[: size + 1]], "f8") / GRID
    half = np.concatenate([quarter, -quarter[:-1][::-1]])
    table = np.concatenate([half, half[1:-1][::-1]]).astype("f4")
    table.flags.writeable = False
    return table


def level(size: int) -> np.float32:
    """sqrt(1/d) on the grid: every entry of the basis's row 0."""
    return np.float32(((math.isqrt(4 * GRID * GRID // size) + 1) // 2) / GRID)


def basis(size: int, rows: Int[np.ndarray, " J"], columns: Int[np.ndarray, " I"]) -> Float32[np.ndarray, "J I"]:
    """Entries of the cosine basis, signs left out."""
    odd = (2 * columns + 1).astype("u4")
    index = rows.astype("u4")[:, None] * odd
    index -= index // np.uint32(4 * size) * np.uint32(4 * size)  # three times as fast as a remainder
    entries = cosine_table(size).take(index)
    entries[rows == 0] = level(size)
    return entries


def unit_directions(vectors: Float[np.ndarray, "N d"]) -> Float32[np.ndarray, "N d"]:
    """The vectors divided by their lengths, on the grid. Raises ValueError for a vector without a direction."""
    units = np.empty(vectors.shape, "f4")
    for row, vector in enumerate(vectors):
        peak = float(np.abs(vector).max())
        if not (peak > 0 and math.isfinite(peak)):
            raise ValueError(f"direction {row} is {'zero' if peak == 0 else 'not finite'}; it has no unit vector")
        steps = np.rint(vector.astype("f8") / peak * GRID)
        whole = steps.astype("i8")
        length = math.sqrt(int((whole * whole).sum()))  # an integer below 2^63: the sum has no rounding
        units[row] = np.rint(steps * (GRID / length)) / GRID
    return units


def cosines(a: Float32[np.ndarray, "N d"], b: Float32[np.ndarray, "N d"]) -> Float64[np.ndarray, " N"]:
    """Cosines of the angles between unit directions on the grid; exactly 1 or -1 where they are equal or opposite."""
    return np.clip(_dot(a, b) / np.sqrt(_dot(a, a) * _dot(b, b)), -1, 1)


def _dot(a: Float32[np.ndarray, "N d"], b: Float32[np.ndarray, "N d"]) -> Float64[np.ndarray, " N"]:
    return np.array([float((x.astype("f8") * y.astype("f8")).sum()) for x, y in zip(a, b, strict=True)], "f8")


def carry_over(directions: Float32[np.ndarray, "N d"], size: int, seed: int) -> Float32[np.ndarray, "N e"]:
    """Unit directions carried to another hidden size by a seeded semi-orthogonal map M.

    Growing, M's columns are d rows of a signed basis of the new size and M^T M = I: lengths and angles stay. Shrinking,
    M's rows are rows of a signed basis of size d and M M^T = I: a projection, made unit length again.
    """
    count, old = directions.shape
    if size == old:
        return directions
    large, small = max(size, old), min(size, old)
    rows = permutation(seed, "map", old, size, "rows", count=large)[:small]
    signs = 1 - 2 * (random_bits(seed, "map", old, size, "signs", count=large) >> np.uint64(63)).astype("f8")
    columns, carried = np.arange(large), np.zeros((count, size), "f8")
    for begin in range(0, small, _CHUNK):
        part = slice(begin, begin + _CHUNK)
        block = basis(large, rows[part], columns) * signs
        if size > old:
            carried += directions[:, part].astype("f8") @ block
        else:
            carried[:, part] = directions.astype("f8") @ block.T
    return unit_directions(carried)


class Frames:
    """N frames of size d, one around each of N unit directions (on the grid), each with random signs of its own.

    Frames with signs of their own have nothing in common but chance: row j of one and row j of another meet at an angle
    whose cosine is about 1/sqrt(d). Memory: the directions, and N * d / 8 bytes.
    """

    def __init__(self, directions: Float32[np.ndarray, "N d"], seed: int, *identity: str | int) -> None:
        count, self.size = directions.shape
        self.directions = directions
        words = -(-self.size // 64)
        bits = random_bits(seed, *identity, "signs", count=count * words)
        self._signs = bits.astype("<u8").view("u1").reshape(count, 8 * words)
        self._level = level(self.size)
        leaning = np.empty(count, "f8")
        everything = slice(0, self.size)
        for begin in range(0, count, _CHUNK):
            some = np.arange(begin, min(begin + _CHUNK, count))
            leaning[some] = self.twisted(some, everything).astype("f8").sum(axis=1)
        self.orientation = np.where(leaning < 0, -1, 1).astype("f4")

    def sign_bits(self, which: Int[np.ndarray, " n"], columns: slice) -> UInt32[np.ndarray, "n I"]:
        """The sign bits of a float32, to be joined to numbers by exclusive or."""
        first = columns.start // 8
        packed = self._signs[which, first : -(-columns.stop // 8)]
        bits = np.unpackbits(packed, axis=1, bitorder="little")[:, columns.start - 8 * first : columns.stop - 8 * first]
        return bits.astype("u4") << np.uint32(31)

    def twisted(self, which: Int[np.ndarray, " n"], columns: slice) -> Float32[np.ndarray, "n I"]:
        """Columns of the directions times the frame's signs: in these coordinates the basis has no signs."""
        return (self.directions[which, columns].view("u4") ^ self.sign_bits(which, columns)).view("f4")

    def reflectors(self, which: Int[np.ndarray, " n"], columns: slice) -> Float32[np.ndarray, "n I"]:
        """Columns of v, in twisted coordinates."""
        v = self.twisted(which, columns)
        v *= self.orientation[which, None]
        v += self._level
        return v

    def coefficients(
        self, rows: Int[np.ndarray, " J"], which: Int[np.ndarray, " n"] | None = None
    ) -> Float32[np.ndarray, "J n"]:
        """-2 (v.h_j) / |v|^2 for rows j > 0 of some frames, or of all."""
        which = np.arange(len(self.directions)) if which is None else which
        columns, found = np.arange(self.size), np.empty((len(rows), len(which)), "f4")
        for begin in range(0, len(which), _CHUNK):
            some = slice(begin, begin + _CHUNK)
            v = self.reflectors(which[some], slice(0, self.size)).astype("f8")
            squares = (v * v).sum(axis=1)
            for first in range(0, len(rows), _CHUNK):
                part = slice(first, first + _CHUNK)
                products = basis(self.size, rows[part], columns).astype("f8") @ v.T
                found[part, some] = -2 * products / squares
        return found

    def reflected(
        self,
        which: Int[np.ndarray, " n"],
        entries: Float32[np.ndarray, "#n d"],
        coefficients: Float32[np.ndarray, " n"],
    ) -> Float32[np.ndarray, "n d"]:
        """s (entries + coefficient v): rows of frames, from entries of the unsigned basis and their coefficients."""
        signs = self.sign_bits(which, slice(0, self.size))
        rows = (self.directions[which].view("u4") ^ signs).view("f4")
        rows *= self.orientation[which, None]
        rows += self._level
        rows *= coefficients[:, None]
        rows += entries
        return (rows.view("u4") ^ signs).view("f4")

    def vectors(self, which: int, rows: Int[np.ndarray, " J"]) -> Float32[np.ndarray, "J d"]:
        """Rows f_j of one frame."""
        alone = np.array([which])
        entries = basis(self.size, rows, np.arange(self.size))
        found = self.reflected(np.full(len(rows), which), entries, self.coefficients(rows, alone)[:, 0])
        found[rows == 0] = self.directions[which]
        return found
