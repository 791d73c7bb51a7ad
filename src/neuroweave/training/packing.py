"""Rows of a fixed length over the tokens of many documents: index arithmetic, so another length needs no new store.

Row i of an epoch holds tokens i * T to (i + 1) * T of all documents one after another. Within it positions begin anew
at each document, which is how attention and convolutions know the boundaries, and no document's first token is
predicted from the document before it. T: tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Integer

IGNORED = -100  # a label that no loss counts: transformers' convention


@runtime_checkable
class Tokens(Protocol):
    """The tokens of documents one after another: a `TokenStore`, or `TokensInMemory`."""

    @property
    def tokens(self) -> int: ...
    @property
    def source_tokens(self) -> tuple[int, ...]: ...
    def tokens_at(self, start: int, stop: int) -> np.ndarray: ...
    def starts_between(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class PackedRow:
    """One row of T tokens, all int64.

    `position_ids` count from 0 at the start of the row and of every document in it. `labels` are the input (a causal
    model shifts them itself), `IGNORED` where the position is 0: no token stands before these in their document.
    """

    input_ids: Int64[np.ndarray, " T"]
    position_ids: Int64[np.ndarray, " T"]
    labels: Int64[np.ndarray, " T"]

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names that models of transformers take."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "labels": self.labels}


def packed_row(token_ids: Integer[np.ndarray, " T"], starts: Integer[np.ndarray, " documents"]) -> PackedRow:
    """The row of `token_ids`, in which documents begin at the offsets `starts` (ascending; 0 may be among them)."""
    input_ids = token_ids.astype(np.int64)
    begins = np.concatenate(([0], starts[starts > 0])).astype(np.int64)
    lengths = np.diff(np.append(begins, len(input_ids)))
    position_ids = np.arange(len(input_ids), dtype=np.int64) - np.repeat(begins, lengths)
    return PackedRow(input_ids, position_ids, np.where(position_ids == 0, IGNORED, input_ids))


class PackedRows:
    """The rows of `store`, `length` tokens each, by their index in the whole run: epoch after epoch.

    Row `index` is the same for any number of processes and any order of asking, so a run is resumed by its index alone.
    `seed`: every epoch in an order of its own, drawn by `np.random.RandomState`, whose stream NumPy has frozen; None:
    in the order of the text. `weights`, one for each source of the store: how often an epoch passes over its rows; of
    a fraction (0.25, or the last part of 2.5) each epoch draws other rows. A row belongs to the source of its first
    token. Tokens beyond the last full row are left out, unless `pad_token` is given: then a last row is filled up with
    it, and no label counts there. Raises ValueError when there is not one row.
    """

    def __init__(
        self,
        store: Tokens,
        length: int,
        *,
        seed: int | None = None,
        weights: Sequence[float] | None = None,
        pad_token: int | None = None,
    ) -> None:
        if length < 2:
            raise ValueError(f"rows of {length} tokens: nothing to predict; give a length of 2 or more")
        if seed is not None and not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed}: a number from 0 to {2**32 - 1} was expected")
        self.store, self.length, self.seed, self.pad_token = store, length, seed, pad_token
        self.rows = store.tokens // length if pad_token is None else -(-store.tokens // length)
        if not self.rows:
            raise ValueError(f"{store.tokens} tokens do not fill one row of {length}; give more text, or shorter rows")
        self.weights = self._checked(weights)
        self._count = self.rows if self.weights is None else sum(self._picks())
        if not self._count:
            raise ValueError(f"weights {list(self.weights or ())} leave no row of {self.rows}; give larger weights")
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Rows of one epoch."""
        return self._count

    def row(self, index: int) -> PackedRow:
        """The row that comes `index` rows after the first row of the first epoch."""
        if index < 0:
            raise ValueError(f"row {index}: rows are counted from 0")
        epoch, place = divmod(int(index), self._count)
        number = place if self.seed is None else int(self._epoch_order(epoch)[place])
        start = number * self.length
        stop = min(start + self.length, self.store.tokens)
        token_ids = self.store.tokens_at(start, stop)
        starts = self.store.starts_between(start, stop) - start
        missing = self.length - len(token_ids)
        if not missing:
            return packed_row(token_ids, starts)
        filled = np.concatenate((token_ids.astype(np.int64), np.full(missing, self.pad_token, dtype=np.int64)))
        row = packed_row(filled, np.append(starts, len(token_ids)))
        row.labels[len(token_ids) :] = IGNORED
        return row

    def _checked(self, weights: Sequence[float] | None) -> tuple[float, ...] | None:
        sources = len(self.store.source_tokens)
        if weights is None:
            return None
        if len(weights) != sources:
            raise ValueError(f"{len(weights)} weights for {sources} sources; give one for each, in their order")
        if any(not 0 <= weight < float("inf") for weight in weights):
            raise ValueError(f"weights {list(weights)}: each must be 0 or a positive number")
        if all(weight == 1 for weight in weights):
            return None
        if self.seed is None:
            raise ValueError("weights draw rows at random: give a seed")
        return tuple(float(weight) for weight in weights)

    def _firsts(self) -> list[int]:
        """The first row of each source, and the end of the last one's."""
        ends = np.cumsum((0, *self.store.source_tokens))
        return [min(-(-int(end) // self.length), self.rows) for end in ends]

    def _picks(self) -> list[int]:
        """How many rows of each source an epoch has."""
        firsts = self._firsts()
        sizes = (last - first for first, last in pairwise(firsts))
        return [round(weight * size) for weight, size in zip(self.weights or (), sizes, strict=True)]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The rows of one epoch; drawing it takes 4 bytes and some 70 ns a row, and the last one is kept."""
        if self._order is not None and self._order[0] == epoch:
            return self._order[1]
        draw = np.random.RandomState([self.seed or 0, epoch])
        kind = np.uint32 if self.rows < 2**32 else np.uint64
        if self.weights is None:
            order = np.arange(self.rows, dtype=kind)
        else:
            parts = []
            for (first, last), picks in zip(pairwise(self._firsts()), self._picks(), strict=True):
                rows = np.arange(first, last, dtype=kind)
                copies, rest = divmod(picks, max(1, len(rows)))
                parts += [rows] * copies + [draw.permutation(rows)[:rest]]
            order = np.concatenate(parts)
        draw.shuffle(order)
        self._order = (epoch, order)
        return order


class TokensInMemory:
    """`documents`, lists of token ids, one after another; empty ones are left out."""

    def __init__(self, documents: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(document, dtype=np.int64) for document in documents]
        arrays = [array for array in arrays if len(array)]
        self._tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
        self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return len(self._tokens)

    @property
    def source_tokens(self) -> tuple[int, ...]:
        """One source."""
        return (self.tokens,)

    def tokens_at(self, start: int, stop: int) -> Int64[np.ndarray, " tokens"]:
        """Tokens `start` to `stop`."""
        return self._tokens[start:stop]

    def starts_between(self, start: int, stop: int) -> Int64[np.ndarray, " documents"]:
        """Where documents begin after token `start` and before token `stop`."""
        return ends_between(self._ends, start, stop)


def ends_between(ends: Int64[np.ndarray, " documents"], start: int, stop: int) -> Int64[np.ndarray, " some"]:
    """Those of the ascending `ends` after `start` and before `stop`."""
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
    return np.asarray(ends[first:last])


def packed_documents(
    documents: Iterable[Sequence[int]], length: int, *, seed: int | None = None, pad_token: int | None = None
) -> PackedRows:
    """Rows over lists of token ids that are in memory; see `PackedRows`."""
    return PackedRows(TokensInMemory(documents), length, seed=seed, pad_token=pad_token)
