"""One pass over a safetensors file: its SHA-256, and the values of every tensor that are not finite.

Values are judged by their bits, as unsigned integers: no value is converted, so this runs at the speed of memory and
the hash sets the pace.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from neuroweave.checkpoint.header import Header, TensorEntry

BLOCK_BYTES = 1 << 22
_PIECE_BYTES = 1 << 20  # of the scratch array, which stays in the processor's cache


@dataclass(frozen=True)
class FloatBits:
    """A float format as an integer sees it: `bits & mask` (`bits ^ flip`) is not finite from `limit` on; `infinity` is
    infinite, the rest NaN."""

    unsigned: str
    mask: int
    limit: int
    infinity: int | None = None
    flip: int = 0
    has_zero: bool = True


def _ieee(unsigned: str, sign: int, infinity: int) -> FloatBits:
    return FloatBits(unsigned, sign - 1, infinity, infinity)


# the formats that can hold a value that is not finite: the packed ones (F4, F6) cannot
FLOAT_BITS = {
    "F64": _ieee("<u8", 1 << 63, 0x7FF << 52),
    "F32": _ieee("<u4", 1 << 31, 0xFF << 23),
    "C64": _ieee("<u4", 1 << 31, 0xFF << 23),  # two float32 make an element
    "F16": _ieee("<u2", 1 << 15, 0x1F << 10),
    "BF16": _ieee("<u2", 1 << 15, 0xFF << 7),
    "F8_E5M2": _ieee("u1", 1 << 7, 0x1F << 2),
    "F8_E4M3": FloatBits("u1", 0x7F, 0x7F),
    "F8_E4M3FNUZ": FloatBits("u1", 0xFF, 0xFF, flip=0x7F),  # NaN is 0x80, which elsewhere is minus zero
    "F8_E5M2FNUZ": FloatBits("u1", 0xFF, 0xFF, flip=0x7F),
    "F8_E8M0": FloatBits("u1", 0xFF, 0xFF, has_zero=False),  # a power of two
}


@dataclass
class Values:
    """What was found in a tensor: values that are not finite, the flat index of the first, whether all are zero."""

    nan: int = 0
    infinite: int = 0
    first: int | None = None
    zero: bool = True


@dataclass
class FileScan:
    """`sha256` is None when it was not asked for; `values` holds the tensors of the formats in `FLOAT_BITS`."""

    sha256: str | None = None
    values: dict[str, Values] = field(default_factory=dict)


def scan_file(
    path: str | os.PathLike[str], header: Header | None, *, hashed: bool = True, values: bool = True,
    progress: Callable[[int], object] | None = None,
) -> FileScan:  # fmt: skip
    """Read a file once, block by block. `header`: None for a file that has no (sound) header; it is only hashed.

    Hashing has a thread of its own, beside reading and judging. Two blocks of memory, whatever the sizes.
    `progress` is called with the number of bytes of each block. Raises ValueError when the file ends too early.
    """
    found = FileScan()
    size = os.path.getsize(path)
    entries = sorted(header.tensors.values(), key=lambda entry: (entry.begin, entry.end)) if header and values else []
    start = header.data_start if header else 0
    digest = hashlib.sha256() if hashed else None
    # at most one block is being hashed: waiting for it before the next is submitted frees the other buffer
    buffers, pending, turn = (bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)), None, 0
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for entry, begin, count in _blocks(entries, start, size):
            view = memoryview(buffers[turn])[:count]
            _fill(file, view, path)
            if pending is not None:
                pending.result()
                pending = None
            if digest is not None:
                pending = hasher.submit(digest.update, view)
            if entry is not None:
                judge(view, entry.dtype, found.values.setdefault(entry.name, Values()), begin)
            turn = 1 - turn
            if progress is not None:
                progress(count)
        if pending is not None:
            pending.result()
    found.sha256 = digest.hexdigest() if digest is not None else None
    return found


def judge(block: memoryview | bytes | bytearray, dtype: str, values: Values, begin: int = 0) -> None:
    """Add to `values` what a block of a tensor holds. `begin`: its first byte's place in the tensor."""
    bits = FLOAT_BITS[dtype]
    array = np.frombuffer(block, bits.unsigned)
    length = _PIECE_BYTES // array.itemsize
    scratch = np.empty(min(length, len(array)), array.dtype)
    for start in range(0, len(array), length):
        piece = array[start : start + length]
        magnitude = scratch[: len(piece)]
        if bits.flip:
            np.bitwise_xor(piece, array.dtype.type(bits.flip), out=magnitude)
        else:
            np.bitwise_and(piece, array.dtype.type(bits.mask), out=magnitude)
        peak = int(magnitude.max())
        if values.zero:
            values.zero = bits.has_zero and not (piece.any() if bits.flip else peak)
        if peak >= bits.limit:
            _count(magnitude, bits, dtype, values, begin // array.itemsize + start)


def _count(magnitude: np.ndarray, bits: FloatBits, dtype: str, values: Values, at: int) -> None:
    bad = magnitude >= bits.limit
    infinite = int(np.count_nonzero(magnitude == bits.infinity)) if bits.infinity is not None else 0
    values.infinite += infinite
    values.nan += int(np.count_nonzero(bad)) - infinite
    if values.first is None:
        values.first = (at + int(bad.argmax())) // (2 if dtype == "C64" else 1)


def _blocks(
    entries: Iterable[TensorEntry], start: int, size: int
) -> Iterable[tuple[TensorEntry | None, int, int]]:  # fmt: skip
    """The file from its first to its last byte as (tensor or None, place in it, bytes); a tensor begins a new block.

    A block without a tensor is to be hashed only: the header, formats that are always finite, all of an unknown file.
    """
    position = 0
    for entry in entries:
        if entry.dtype in FLOAT_BITS and entry.end > entry.begin:
            yield from _cut(None, start + entry.begin - position)
            yield from _cut(entry, entry.end - entry.begin)
            position = start + entry.end
    yield from _cut(None, size - position)


def _cut(entry: TensorEntry | None, length: int) -> Iterable[tuple[TensorEntry | None, int, int]]:
    for begin in range(0, length, BLOCK_BYTES):
        yield entry, begin, min(BLOCK_BYTES, length - begin)


def _fill(file: BinaryIO, view: memoryview, path: str | os.PathLike[str]) -> None:
    position = 0
    while position < len(view):
        count = file.readinto(view[position:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{Path(path)}: truncated while it was being read")
        position += count
