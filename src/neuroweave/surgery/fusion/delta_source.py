"""Deltas from a folder, read by rows. Their twin that generates rows on demand is `deltas.LayerDeltas`."""

from __future__ import annotations

import os
import threading
from math import prod

import numpy as np

from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.surgery.fusion.arithmetic import STORED


class ThreadBuffer(threading.local):
    """A byte buffer of each thread, which grows to the largest size asked for: fresh memory costs page faults."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, "u1")

    def take(self, nbytes: int) -> np.ndarray:
        """`nbytes` bytes, valid until the same thread asks again."""
        if self._bytes.size < nbytes:
            self._bytes = np.empty(nbytes, "u1")
        return self._bytes[:nbytes]


class StoredDeltas:
    """The delta tensors of a checkpoint folder. Raises ValueError as `Checkpoint` does."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.checkpoint = Checkpoint(folder)
        self.specs: dict[str, TensorSpec] = {
            tensor.name: TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in self.checkpoint.values()
        }
        self._buffer = ThreadBuffer()

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows `[begin, end)` in the stored dtype, valid until the same thread reads again."""
        spec = self.specs[name]
        dtype, columns = STORED[spec.dtype], spec.shape[-1] if spec.shape else 1
        row_bytes = columns * dtype.itemsize
        data = self._buffer.take((end - begin) * row_bytes)
        self.checkpoint.read_into(name, data.data, begin * row_bytes)
        return data.view(dtype).reshape(end - begin, columns)

    def close(self) -> None:
        self.checkpoint.close()


def row_count(spec: TensorSpec) -> int:
    return prod(spec.shape[:-1]) if spec.shape else 1
