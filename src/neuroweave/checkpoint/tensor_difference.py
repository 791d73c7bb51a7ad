"""How one tensor differs from another of the same shape: bytes first, then values, block by block in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from neuroweave.checkpoint.header import DTYPE_BITS
from neuroweave.checkpoint.reader import Checkpoint, StoredTensor, numpy_dtype

BLOCK_ELEMENTS = 1 << 18
_COMPARED_BYTES = 1 << 22
_DOT = 1 << 13  # longer dot products would start the threads of the BLAS
PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # several elements in a byte: compared as bytes only


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors A and B of one name and shape. Figures are None where they mean nothing.

    `differing`: elements with other values (bits, where the dtypes are equal), of `elements`. `largest`: the largest
    |b - a|. `relative`: ||B - A|| / ||A||, None for A = 0. `cosine`: of A and B, None if one is 0. These three are over
    the elements that are finite in both; `not_finite` counts the others.
    """

    name: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    elements: int
    differing: int | None
    largest: float | None = None
    relative: float | None = None
    cosine: float | None = None
    not_finite: int = 0

    @property
    def share(self) -> float | None:
        """Share of the elements that differ."""
        return self.differing / self.elements if self.differing is not None and self.elements else None


def same_bytes(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Whether a tensor of one dtype and shape has the same bytes in both; one file with two names is not read."""
    first, second = a[name], b[name]
    if first.offset == second.offset and os.path.samestat(
        os.fstat(a.descriptor(first.file)), os.fstat(b.descriptor(second.file))
    ):
        return True
    for begin in range(0, first.nbytes, _COMPARED_BYTES):
        end = min(begin + _COMPARED_BYTES, first.nbytes)
        if a.read_bytes(name, begin, end) != b.read_bytes(name, begin, end):
            return False
    return True


def compare_tensor(a: Checkpoint, b: Checkpoint, name: str) -> TensorDifference | None:
    """The difference of a tensor whose shape is the same in both, or None when dtype and bytes are equal too.

    A pair of the same bytes is read once; another is read again from its start for the figures.
    """
    first, second = a[name], b[name]
    if first.dtype == second.dtype and same_bytes(a, b, name):
        return None
    dtypes, size = (first.dtype, second.dtype), first.parameters
    if set(dtypes) & set(PACKED):
        return TensorDifference(name, dtypes, first.shape, size, None)
    sums = _Sums()
    for old, new in paired_blocks(a, b, name):
        sums.add(old, new)
    largest, relative, cosine = (value if value is None or math.isfinite(value) else None for value in sums.figures())
    return TensorDifference(name, dtypes, first.shape, size, sums.differing, largest, relative, cosine, sums.not_finite)


def paired_blocks(a: Checkpoint, b: Checkpoint, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The elements of both tensors as flat arrays of their stored types, `BLOCK_ELEMENTS` at a time."""
    for begin in range(0, a[name].parameters, BLOCK_ELEMENTS):
        end = min(begin + BLOCK_ELEMENTS, a[name].parameters)
        yield _elements(a, a[name], begin, end), _elements(b, b[name], begin, end)


def _elements(checkpoint: Checkpoint, tensor: StoredTensor, begin: int, end: int) -> np.ndarray:
    width = DTYPE_BITS[tensor.dtype] // 8
    data = checkpoint.read_bytes(tensor.name, begin * width, end * width)
    return np.frombuffer(data, dtype=numpy_dtype(tensor.dtype, tensor.name))


def as_float64(block: np.ndarray) -> np.ndarray:
    """Any type in float64, exactly (64-bit integers: rounded); a complex number becomes two values."""
    if block.dtype.itemsize == 1 and block.dtype.kind in "fV":  # a float8 of ml_dtypes
        return _float8_values(block.dtype)[block.view("u1")]
    if block.dtype.kind == "V" or block.dtype.itemsize == 2:
        return block.astype("f4").astype("f8")  # ml_dtypes is fast to float32 only
    return (block.view("<f4") if block.dtype.kind == "c" else block).astype("f8")


@cache
def _float8_values(dtype: np.dtype) -> np.ndarray:
    return np.arange(256, dtype="u1").view(dtype).astype("f8")


@dataclass
class _Sums:
    differing: int = 0
    largest: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    not_finite: int = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        wide_a, wide_b = as_float64(a), as_float64(b)
        if a.dtype == b.dtype:
            bits = f"u{a.itemsize}"
            self.differing += int(np.count_nonzero(a.view(bits) != b.view(bits)))
        else:
            both_nan = np.isnan(wide_a) & np.isnan(wide_b)
            self.differing += int(np.count_nonzero((wide_a != wide_b) & ~both_nan))
        with np.errstate(over="ignore", invalid="ignore"):
            delta = wide_b - wide_a
            parts = _dots(wide_a, wide_b, delta)
            if not math.isfinite(sum(parts)):
                finite = np.isfinite(wide_a) & np.isfinite(wide_b)
                self.not_finite += int(np.count_nonzero(~finite))
                wide_a, wide_b, delta = wide_a[finite], wide_b[finite], delta[finite]
                parts = _dots(wide_a, wide_b, delta)
        self.aa, self.bb, self.ab, self.dd = (
            total + part for total, part in zip((self.aa, self.bb, self.ab, self.dd), parts, strict=True)
        )
        if delta.size:
            self.largest = max(self.largest, float(delta.max()), -float(delta.min()))

    def figures(self) -> tuple[float, float | None, float | None]:
        relative = math.sqrt(self.dd / self.aa) if self.aa else None
        norms = math.sqrt(self.aa) * math.sqrt(self.bb)
        return self.largest, relative, max(-1.0, min(1.0, self.ab / norms)) if norms else None


def _dots(a: np.ndarray, b: np.ndarray, delta: np.ndarray) -> tuple[float, float, float, float]:
    """a.a, b.b, a.b and delta.delta, in pieces of a fixed size: the same sums on any number of threads."""
    totals = [0.0, 0.0, 0.0, 0.0]
    for start in range(0, a.size, _DOT):
        x, y, d = a[start : start + _DOT], b[start : start + _DOT], delta[start : start + _DOT]
        for at, (left, right) in enumerate(((x, x), (y, y), (x, y), (d, d))):
            totals[at] += float(np.dot(left, right))
    return totals[0], totals[1], totals[2], totals[3]
