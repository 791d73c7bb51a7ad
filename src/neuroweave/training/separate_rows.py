"""Rows that hold one document each, padded at the end: for models that cannot keep packed documents apart.

A document longer than a row is cut into several. Letters: T tokens of a row.
"""

from __future__ import annotations

import numpy as np

from neuroweave.training.packing import IGNORED, PackedRow, Tokens


class SeparateRows:
    """The documents of `store`, a row of `length` tokens each, by their index in the whole run; see `PackedRows`.

    Padding stands at the end, where no real token sees it in a causal model, and its labels are ignored.
    """

    def __init__(self, store: Tokens, length: int, *, seed: int | None = None, pad_token: int = 0) -> None:
        self.store, self.length, self.seed, self.pad_token = store, length, seed, pad_token
        begins = np.concatenate(([0], store.starts_between(0, store.tokens)))
        self._bounds = np.append(begins, store.tokens)
        self._first_row = np.concatenate(([0], np.cumsum(-(-np.diff(self._bounds) // length))))  # of each document
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def row(self, index: int) -> PackedRow:
        """The row that comes `index` rows after the first row of the first epoch."""
        epoch, place = divmod(int(index), len(self))
        number = place if self.seed is None else int(self._epoch_order(epoch)[place])
        document = int(np.searchsorted(self._first_row, number, side="right")) - 1
        start = int(self._bounds[document]) + (number - int(self._first_row[document])) * self.length
        stop = min(start + self.length, int(self._bounds[document + 1]))
        input_ids = np.full(self.length, self.pad_token, dtype=np.int64)
        input_ids[: stop - start] = self.store.tokens_at(start, stop)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        labels[1 : stop - start] = input_ids[1 : stop - start]
        return PackedRow(input_ids, np.arange(self.length, dtype=np.int64), labels)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.RandomState([self.seed or 0, epoch]).permutation(len(self)))
        return self._order[1]
