"""Rows of packed tokens straight from the sources, with no store made before: for data that is read about once.

The documents run through grain, whose iterators know their place exactly. Where a corpus is passed over several times,
or by many processes, a `TokenStore` is better: there each of them reads and tokenises on its own.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from neuroweave.training.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUFFER = 1_000  # rows that are shuffled together
PREFETCH = 64  # rows that wait ready
REMEMBERED = 4_096  # rows that may have been taken and not yet trained on when a state is asked for


class StreamedRows:
    """Packed rows of `length` tokens as dicts of arrays (`PackedRow.arrays`), in an iterator that can be resumed.

    `seed`: rows are shuffled within windows of `buffer`; None: in the order of the text. Process `process_index` of
    `process_count` takes every n-th document. `part`: which side of the `held_out` split. `repeat`: epochs without end;
    otherwise one, whose tokens beyond the last full row are left out. Several sources are drawn from by `weight` if
    repeated, and read one after another otherwise. `workers`: processes that read and tokenise; 0: a thread of this.

    `state()` is JSON; `restore(state)` goes on with the very next row, in a stream of the same arguments (ValueError
    otherwise). `state_at(rows)` is the state when only so many rows had been taken, for loops that fetch ahead.
    `vocabulary_size`: the rows of the model's embedding; a token beyond them is refused.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        seed: int | None = None,
        buffer: int = BUFFER,
        process_index: int = 0,
        process_count: int = 1,
        held_out: float = 0.0,
        part: Literal["training", "held_out"] = "training",
        repeat: bool = True,
        end_of_document: bool = True,
        prefetch: int = PREFETCH,
        workers: int = 0,
        remembered: int = REMEMBERED,
        vocabulary_size: int | None = None,
    ) -> None:
        if not sources:
            raise ValueError("no sources were given; name at least one under data.sources")
        if length < 2:
            raise ValueError(f"rows of {length} tokens: nothing to predict; give a length of 2 or more")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}: they are counted from 0")
        if part == "held_out" and not held_out:
            raise ValueError("part held_out: give the fraction held_out that is held out")
        self.length, self.rows, self.vocabulary_size = length, 0, vocabulary_size
        self._arguments = {
            "sources": [source.model_dump(mode="json") for source in sources],
            "length": length,
            "seed": seed,
            "buffer": buffer,
            "process": [process_index, process_count],
            "held_out": [held_out, part],
            "repeat": repeat,
            "end_of_document": end_of_document,
            "workers": workers,
        }
        dataset = _pipeline(tuple(sources), tokenizer, self._arguments, prefetch=prefetch)
        self._open = [iter(dataset)]
        self._closing = weakref.finalize(self, _close, self._open)  # or when the program ends, before grain is gone
        self._states: deque[tuple[int, Any]] = deque([(0, self._open[0].get_state())], maxlen=remembered + 1)

    def __iter__(self) -> StreamedRows:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        found = next(self._open[0])
        if self.vocabulary_size is not None and (largest := int(found["input_ids"].max())) >= self.vocabulary_size:
            raise ValueError(
                f"the tokenizer gives token id {largest}, the model's vocabulary ends at {self.vocabulary_size - 1}; "
                "use the model's own tokenizer, or add the tokens to the model"
            )
        self.rows += 1
        self._states.append((self.rows, self._open[0].get_state()))
        return found

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Row `index` of the whole run: the next one, or a later one, for which those between are read and left out."""
        if index < self.rows:
            raise ValueError(
                f"row {index} of a stream that has given {self.rows}: it only runs forward; restore a state"
            )
        while self.rows < index:
            next(self)
        return next(self)

    def state(self) -> dict[str, Any]:
        """Where the next row stands; JSON values."""
        return self.state_at(self.rows)

    def state_at(self, rows: int) -> dict[str, Any]:
        """The state when `rows` rows of the run had been taken. Raises ValueError for one that is not remembered."""
        for number, state in self._states:
            if number == rows:
                return {"rows": rows, "arguments": self._arguments, "iterator": copy.deepcopy(state)}
        first, last = self._states[0][0], self._states[-1][0]
        raise ValueError(f"the state at row {rows} is not known; rows {first} to {last} are (see remembered)")

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the rows that had been taken at `state`."""
        given = state["arguments"]
        changed = [name for name, value in self._arguments.items() if given.get(name) != value]
        if changed:
            raise ValueError(
                f"the stream cannot go on from this state: {', '.join(changed)} changed; set it back, or start anew"
            )
        self._open[0].set_state(copy.deepcopy(state["iterator"]))
        self.rows = int(state["rows"])
        self._states.clear()
        self._states.append((self.rows, copy.deepcopy(state["iterator"])))

    def close(self) -> None:
        """End the thread or the workers, and close what they read."""
        self._closing()


def _close(opened: list[Any]) -> None:
    while opened:
        opened.pop().close()


def _pipeline(
    sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], *, prefetch: int
) -> Any:
    grain = _grain()
    from neuroweave.training.grain_documents import Choice, PackedStream, ShuffledStream, StreamedDocuments

    (process_index, process_count), (held_out, part) = arguments["process"], arguments["held_out"]
    choice = Choice(process_index, process_count, held_out, part == "held_out", arguments["repeat"])
    end = arguments["end_of_document"]
    drawn = tuple(source for source in sources if source.weight)
    if not drawn:
        raise ValueError("every source has weight 0; give at least one a larger weight")
    if choice.repeat and len(drawn) > 1:
        parts = [StreamedDocuments((source,), tokenizer, choice, end_of_document=end) for source in drawn]
        dataset = grain.IterDataset.mix(parts, [source.weight for source in drawn])
    else:
        dataset = StreamedDocuments(drawn, tokenizer, choice, end_of_document=end)
    dataset = PackedStream(dataset, length=arguments["length"])
    if arguments["seed"] is not None:
        dataset = ShuffledStream(dataset, window=arguments["buffer"], seed=arguments["seed"])
    if arguments["workers"]:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain's workers read flags, which only a program of absl's own parses
            flags.FLAGS.mark_as_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(
            num_workers=arguments["workers"], per_worker_buffer_size=max(1, prefetch // arguments["workers"])
        )
        return dataset.mp_prefetch(options)
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)


def _grain() -> Any:
    """The library; without its warning, when imported, that JAX is not there to profile it."""
    try:
        from absl import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)
        try:
            import grain
        finally:
            logging.set_verbosity(verbosity)
    except ImportError as error:
        raise ValueError("streaming needs grain: pip install 'neuroweave[train]', or make a token store") from error
    return grain
