"""Documents, and rows packed from them, as grain datasets: the part of streaming that needs grain.

A document is numbered as it is read; a process, or a worker within it, takes every n-th. All states are JSON values.
Packing and shuffling are not grain 0.2.18's own: the state of its `ConcatThenSplitIterDataset` holds tuples, which come
back from JSON as lists, and where a row ended with a document it then goes on with a wrong token; its window shuffle
takes 0.1 to 30 ms a row in windows of less than 1,000.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from neuroweave.training.document_reading import DocumentReader, is_held_out
from neuroweave.training.document_tokens import DocumentTokens
from neuroweave.training.packing import packed_row
from neuroweave.training.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Choice:
    """Which documents: number `first` and every `step`-th after it; of those, one side of the held-out split."""

    first: int
    step: int
    held_out: float
    from_held_out: bool
    repeat: bool


class StreamedDocuments(grain.IterDataset):
    """The token ids of the documents of `sources`, int64 arrays, one source after another."""

    def __init__(
        self, sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerBase, choice: Choice, *, end_of_document: bool
    ) -> None:
        super().__init__()
        self.sources, self.tokenizer, self.choice, self.end_of_document = sources, tokenizer, choice, end_of_document

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Every `sl.step`-th of these documents from the `sl.start`-th on: what grain gives one of its workers."""
        old = self.choice
        first, step = old.first + (sl.start or 0) * old.step, (sl.step or 1) * old.step
        self.choice = Choice(first, step, old.held_out, old.from_held_out, old.repeat)

    def __iter__(self) -> StreamedDocumentsIterator:
        return StreamedDocumentsIterator(self)


class StreamedDocumentsIterator(grain.DatasetIterator):
    """The state is the source, the position in it, and the numbers of documents read."""

    def __init__(self, dataset: StreamedDocuments) -> None:
        super().__init__()
        self._reader: DocumentReader | None = None
        self._sources, self._tokenizer, self._choice = dataset.sources, dataset.tokenizer, dataset.choice
        self._encoder = DocumentTokens(dataset.tokenizer, end_of_document=dataset.end_of_document)
        self._source, self._number, self._given = 0, 0, 0
        self._position: dict[str, Any] | None = None

    def __next__(self) -> np.ndarray:
        while True:
            if self._source == len(self._sources):
                self._next_epoch()
            if self._reader is None:
                self._reader = DocumentReader(self._sources[self._source], self._tokenizer, position=self._position)
            document = next(self._reader, None)
            if document is None:
                self._close_reader()
                self._source, self._position = self._source + 1, None
                continue
            number, self._number = self._number, self._number + 1
            choice = self._choice
            if number < choice.first or (number - choice.first) % choice.step:
                continue
            if choice.held_out and is_held_out(document.key, choice.held_out) != choice.from_held_out:
                continue
            (token_ids,) = self._encoder.encode([document])
            if len(token_ids):
                self._given += 1
                return token_ids

    def get_state(self) -> dict[str, Any]:
        """Where the next document stands."""
        position = self._position if self._reader is None else self._reader.position()
        return {"source": self._source, "position": position, "number": self._number, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with the document after those that were read when `state` was taken."""
        self._close_reader()
        self._source, self._position = state["source"], state["position"]
        self._number, self._given = state["number"], state["given"]

    def close(self) -> None:
        """Close the file that is open."""
        self._close_reader()
        super().close()

    def _next_epoch(self) -> None:
        """Start again. The count goes on, so that a process does not meet the same documents in every epoch."""
        if not self._choice.repeat:
            raise StopIteration
        if not self._given:
            raise ValueError(
                f"{', '.join(source.path for source in self._sources)}: {self._number} documents, and none "
                f"of them falls to this process (one in {self._choice.step}) and part; "
                "give more documents, or use fewer processes"
            )
        self._source = 0

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class PackedStream(grain.IterDataset):
    """The documents of `parent` as packed rows of `length` tokens, dicts of arrays; tokens beyond the last are left."""

    def __init__(self, parent: grain.IterDataset, *, length: int) -> None:
        super().__init__(parent)
        self.length = length

    def __iter__(self) -> PackedStreamIterator:
        return PackedStreamIterator(iter(self._parent), self.length)


class PackedStreamIterator(grain.DatasetIterator):
    """The state is that of the documents before the one that the next row begins in, and how much of it is used."""

    def __init__(self, documents: grain.DatasetIterator, length: int) -> None:
        super().__init__(documents)
        self._length = length
        self._document, self._used = np.empty(0, dtype=np.int64), 0
        self._before: dict[str, Any] = {}

    def __next__(self) -> dict[str, np.ndarray]:
        token_ids, starts, filled = np.empty(self._length, dtype=np.int64), [], 0
        while filled < self._length:
            if self._used == len(self._document):
                self._take()
            if not self._used:
                starts.append(filled)
            part = self._document[self._used : self._used + self._length - filled]
            token_ids[filled : filled + len(part)] = part
            filled += len(part)
            self._used += len(part)
        return packed_row(token_ids, np.array(starts, dtype=np.int64)).arrays()

    def get_state(self) -> dict[str, Any]:
        """Where the next row begins."""
        if self._used == len(self._document):
            return {"documents": self._parent.get_state(), "used": 0}
        return {"documents": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with the row that comes after `state`."""
        self._parent.set_state(state["documents"])
        self._document, self._used = np.empty(0, dtype=np.int64), 0
        if state["used"]:
            self._take()
            self._used = state["used"]

    def _take(self) -> None:
        """The next document."""
        self._before = self._parent.get_state()
        self._document, self._used = next(self._parent), 0


class ShuffledStream(grain.IterDataset):
    """The rows of `parent`, each `window` of them in an order of its own, drawn with `seed`."""

    def __init__(self, parent: grain.IterDataset, *, window: int, seed: int) -> None:
        super().__init__(parent)
        self.window, self.seed = window, seed

    def __iter__(self) -> ShuffledStreamIterator:
        return ShuffledStreamIterator(iter(self._parent), self.window, self.seed)


class ShuffledStreamIterator(grain.DatasetIterator):
    """The state is that before the window, its number, and how many of its rows were given: it is filled anew."""

    def __init__(self, rows: grain.DatasetIterator, window: int, seed: int) -> None:
        super().__init__(rows)
        self._window, self._seed = window, seed
        self._rows: list[dict[str, np.ndarray]] = []
        self._number, self._given = 0, 0
        self._before: dict[str, Any] = {}

    def __next__(self) -> dict[str, np.ndarray]:
        if self._given == len(self._rows):
            self._number += bool(self._rows)
            self._fill()
        if not self._rows:
            raise StopIteration
        self._given += 1
        return self._rows[self._given - 1]

    def get_state(self) -> dict[str, Any]:
        """Where the next row stands."""
        if self._given < len(self._rows):
            return {"rows": self._before, "window": self._number, "given": self._given}
        return {"rows": self._parent.get_state(), "window": self._number + bool(self._rows), "given": 0}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with the row that comes after `state`."""
        self._parent.set_state(state["rows"])
        self._number, self._rows, self._given = state["window"], [], 0
        if state["given"]:
            self._fill()
            self._given = state["given"]

    def _fill(self) -> None:
        self._before = self._parent.get_state()
        rows = list(islice(self._parent, self._window))
        order = np.random.RandomState([self._seed, self._number]).permutation(len(rows))
        self._rows, self._given = [rows[at] for at in order], 0
