"""A target tensor as pieces of work: moments first where the formula needs them, then blocks of rows, edited in place.

Everything is cut by the tensor's shape alone, so that results do not depend on threads or order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from neuroweave.checkpoint.copying import write_from
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.rewriting import Group, Piece
from neuroweave.surgery.fusion.arithmetic import (
    BLOCK,
    EXACT_BELOW,
    STORED,
    Edit,
    Effect,
    Moments,
    Workspace,
    block_moments,
    edit_block,
)
from neuroweave.surgery.fusion.compiled import Kernel
from neuroweave.surgery.fusion.delta_source import ThreadBuffer
from neuroweave.surgery.fusion.plan import DeltaSource, FuseOptions, Target

PIECE_BYTES = 1 << 22


class _Threads(threading.local):
    def __init__(self) -> None:
        self.space = Workspace()


class _Buffers:
    """Buffers of pieces between their edit and their writing, used again: fresh memory costs page faults."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque()

    def take(self, nbytes: int) -> np.ndarray:
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(0, "u1")
        return buffer if buffer.size >= nbytes else np.empty(nbytes, "u1")

    def give_back(self, buffer: np.ndarray) -> None:
        self._free.append(buffer)


_threads = _Threads()
_weights = ThreadBuffer()
_buffers = _Buffers()


@dataclass
class TensorEdit:
    """One target, its sources, and what came of it: `effects` by place, `scale` once the moments are known. `kernel`:
    the compiled arithmetic, or None for NumPy's."""

    target: Target
    checkpoint: Checkpoint
    deltas: DeltaSource
    options: FuseOptions
    scale: float | None = None  # given when a recorded fuse is replayed
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        self.effects: dict[int, Effect] = {}
        self.edit = Edit(
            name=self.target.stored.name,
            formula=self.target.formula,
            dtype=self.target.stored.dtype,
            alpha=self.options.alpha,
            gamma=self.options.gamma_cap,
            seed=self.options.seed
            if self.options.rounding == "stochastic" and self.target.stored.dtype != "F32"
            else None,
        )

    @property
    def effect(self) -> Effect:
        return Effect.join(self.effects[place] for place in sorted(self.effects))

    @property
    def needs_moments(self) -> bool:
        return self.target.formula != "contour gate" and self.options.alpha_mode != "plain"

    def group(self, target_begin: int) -> Group:
        """The tensor's work, for the tensor's data starting at `target_begin` of the new file."""
        rows, columns = self.target.matrix
        row_bytes = columns * STORED[self.target.stored.dtype].itemsize
        step = rows_per_piece(row_bytes, block_rows(columns))
        pieces = [
            Piece(
                target_begin + begin * row_bytes,
                target_begin + min(begin + step, rows) * row_bytes,
                self._maker(begin, min(begin + step, rows), target_begin + begin * row_bytes),
            )
            for begin in range(0, rows, step)
        ]
        if not self.needs_moments:
            self.ready(self.options.alpha)
            return Group(pieces)
        jobs = [*self._moment_jobs(self._read_weights, self.target.matrix, self.target.stored.dtype)]
        cut = len(jobs)
        jobs += self._moment_jobs(self._read_delta, self.target.covered, self.target.delta.dtype)
        return Group(pieces, jobs, lambda results: self.ready(self._scale(results[:cut], results[cut:])))

    def ready(self, measured: float) -> Edit:
        """The edit with its scale, as every block needs it.

        A recorded scale is used to the bit (sums may differ in the last digits from machine to machine), but must be
        what the options and the tensors give. Raises ValueError when it is not.
        """
        if self.scale is not None and not abs(self.scale - measured) <= 1e-6 * abs(measured):
            raise ValueError(
                f"{self.edit.name}: the recorded scale is {self.scale:.9g}, the recorded options give {measured:.9g} "
                "with this model and these deltas"
            )
        self.scale = measured if self.scale is None else self.scale
        self.edit = replace(self.edit, scale=self.scale)
        return self.edit

    # Moments

    def _moment_jobs(
        self, read: Callable[[int, int], np.ndarray], matrix: tuple[int, int], dtype: str, shift: float = 0.0
    ) -> list[Callable[[], Moments]]:
        rows, columns = matrix
        step = rows_per_piece(columns * STORED[dtype].itemsize)
        exact = rows * columns < EXACT_BELOW
        moments = block_moments if self.kernel is None else self.kernel.block_moments

        def job(begin: int, end: int) -> Callable[[], Moments]:
            return lambda: moments(read(begin, end), exact=exact, shift=shift)

        return [job(begin, min(begin + step, rows)) for begin in range(0, rows, step)]

    def _scale(self, weights: list[Moments], deltas: list[Moments]) -> float:
        of_weights = self._std(weights, self._read_weights, self.target.matrix, self.target.stored.dtype, "the weights")
        of_delta = self._std(deltas, self._read_delta, self.target.covered, self.target.delta.dtype, "the delta")
        return self.options.scale(self.edit.name, self.target.formula, of_weights, of_delta)

    def _std(
        self,
        parts: list[Moments],
        read: Callable[[int, int], np.ndarray],
        matrix: tuple[int, int],
        dtype: str,
        what: str,
    ) -> float:
        moments = Moments.join(parts)
        if not moments.finite:
            hint = "" if what == "the weights" else "; generate it again"
            raise ValueError(
                f"{self.edit.name}: {what} hold NaN or infinite values{hint}".replace("delta hold", "delta holds")
            )
        if moments.nearly_constant:
            shift = moments.total / moments.count
            moments = Moments.join(job() for job in self._moment_jobs(read, matrix, dtype, shift))
        return moments.std

    # Reading and writing

    @property
    def row_bytes(self) -> int:
        return self.target.matrix[1] * STORED[self.target.stored.dtype].itemsize

    def _read_weights(self, begin: int, end: int, buffer: np.ndarray | None = None) -> np.ndarray:
        stored = self.target.stored
        dtype, columns = STORED[stored.dtype], self.target.matrix[1]
        row_bytes = columns * dtype.itemsize
        data = _weights.take((end - begin) * row_bytes) if buffer is None else buffer[: (end - begin) * row_bytes]
        self.checkpoint.read_into(stored.name, data.data, begin * row_bytes)
        return data.view(dtype).reshape(end - begin, columns)

    def _read_delta(self, begin: int, end: int) -> np.ndarray:
        return self.deltas.rows(self.target.delta.name, begin, end)

    def _maker(self, begin: int, end: int, position: int) -> Callable[[Edit | None], Callable[[int], None]]:
        def make(prepared: Edit | None) -> Callable[[int], None]:
            edit = prepared or self.edit
            buffer = _buffers.take((end - begin) * self.row_bytes)
            try:
                weights = self._read_weights(begin, end, buffer)
                covered_rows, covered_columns = self.target.covered
                if begin < covered_rows:
                    last = min(end, covered_rows)
                    delta = self._read_delta(begin, last)
                    part = weights[: last - begin, :covered_columns]
                    self.effects[begin] = edit_rows(edit, part, delta, begin, self.target.matrix[1], self.kernel)
            except BaseException:
                _buffers.give_back(buffer)
                raise

            def write(descriptor: int) -> None:
                try:
                    write_from(descriptor, weights.view("u1").reshape(-1).data, position)
                finally:
                    _buffers.give_back(buffer)

            return write

        return make


def edit_rows(
    edit: Edit, weights: np.ndarray, delta: np.ndarray, first_row: int, row_length: int, kernel: Kernel | None = None
) -> Effect:
    """Edit rows of any number and length in place, block by block. `row_length`: of the whole tensor."""
    change = edit_block if kernel is None else kernel.edit_block
    return Effect.join(
        change(edit, weights[rows, columns], delta[rows, columns], place, _threads.space)
        for rows, columns, place in blocks(weights.shape, first_row, row_length)
    )


def blocks(shape: tuple[int, ...], first_row: int, row_length: int) -> Iterator[tuple[slice, slice, int]]:
    """Cut a matrix into blocks of at most `BLOCK` elements: rows, columns, and the place of the first element."""
    rows, columns = shape
    step = block_rows(row_length)
    for begin in range(0, rows, step):
        for start in range(0, columns, BLOCK):
            yield (
                slice(begin, min(begin + step, rows)),
                slice(start, min(start + BLOCK, columns)),
                (first_row + begin) * row_length + start,
            )


def block_rows(row_length: int) -> int:
    """Rows of a block, at least one: by the tensor's own row length, so that blocks do not depend on pieces."""
    return max(1, BLOCK // max(1, row_length))


def rows_per_piece(row_bytes: int, multiple: int = 1) -> int:
    """Rows of about `PIECE_BYTES`: a multiple of `multiple`, at least one of it."""
    return max(1, PIECE_BYTES // max(1, row_bytes) // multiple) * multiple
