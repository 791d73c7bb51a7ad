"""The rows that a run is trained and evaluated on, whatever framework trains: of a token store, or of a stream."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.packing import PackedRows
from neuroweave.training.separate_rows import SeparateRows
from neuroweave.training.token_store import TokenStore, build_store

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Share:
    """Which of a run's processes this is. `first`: inside it, the first process goes ahead and the others wait."""

    index: int = 0
    count: int = 1
    first: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class RunRows:
    """`training`: row(i) is sample i of the run (a `StreamedRows` gives this process's rows one after another).
    `held_out`: the rows to evaluate on, the first `held_out_count` of them; None where there are none. `epoch`: rows of
    an epoch, None for a stream."""

    training: Any
    held_out: Any
    held_out_count: int
    epoch: int | None


@dataclass(frozen=True)
class ListedRows:
    """Rows that are in memory."""

    rows: list[dict[str, Any]]

    def row(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def open_rows(
    configuration: TrainConfiguration,
    tokenizer: Any,
    *,
    vocabulary: int,
    share: Share | None = None,
    progress: Progress | None = None,
) -> RunRows:
    """The rows of a configuration; the first process tokenises what is not tokenised yet.

    `vocabulary`: rows of the model's embedding. Raises ValueError for text that cannot be used or does not fit it.
    """
    opened = open_stream if configuration.data.streaming else open_store
    return opened(configuration, tokenizer, vocabulary, share or Share(), progress)


def open_store(
    configuration: TrainConfiguration, tokenizer: Any, vocabulary: int, share: Share, progress: Progress | None
) -> RunRows:
    data, seed = configuration.data, configuration.training.seed
    folder = Path(data.store or Path(configuration.output.folder) / "data")
    with share.first():
        store = build_store(
            folder,
            data.sources,
            tokenizer,
            end_of_document=data.end_of_document,
            held_out=data.held_out,
            progress=progress,
        )
    store.check_vocabulary(vocabulary)
    length, pad_token = data.sequence_length, tokenizer.pad_token_id or 0
    weights = [source.weight for source in data.sources]
    if not data.packing and any(weight != 1 for weight in weights):
        raise ValueError("data.sources: weights need data.packing: true")
    rows: Any
    if data.packing:
        rows = PackedRows(store, length, seed=seed, weights=weights)
    else:
        rows = SeparateRows(store, length, seed=seed, pad_token=pad_token)
    held_out, count = held_out_rows(store.held_out, configuration, pad_token)
    return RunRows(rows, held_out, count, len(rows))


def open_stream(
    configuration: TrainConfiguration, tokenizer: Any, vocabulary: int, share: Share, progress: Progress | None
) -> RunRows:
    """Without a store: documents are read and tokenised while the run goes on."""
    from neuroweave.training.streaming import StreamedRows

    data, training = configuration.data, configuration.training
    if not data.packing or training.steps is None or training.workers:
        raise ValueError("data.streaming needs data.packing: true, training.steps (not epochs) and training.workers: 0")

    def stream(**options: Any) -> StreamedRows:
        return StreamedRows(
            data.sources,
            tokenizer,
            data.sequence_length,
            held_out=data.held_out,
            end_of_document=data.end_of_document,
            vocabulary_size=vocabulary,
            **options,
        )

    rows = stream(seed=training.seed, process_index=share.index, process_count=share.count)
    kept: list[dict[str, Any]] = []
    if data.held_out:
        aside = stream(part="held_out", repeat=False)
        kept = list(itertools.islice(aside, configuration.metrics.held_out_rows))
        aside.close()
    return RunRows(rows, ListedRows(kept) if kept else None, len(kept), None)


def held_out_rows(store: TokenStore | None, configuration: TrainConfiguration, pad_token: int) -> tuple[Any, int]:
    """(rows of the held-out documents, in order, and how many are evaluated); (None, 0) where there are none."""
    if store is None or store.tokens < 2:
        return None, 0
    data = configuration.data
    kind: Any = PackedRows if data.packing else SeparateRows
    rows = kind(store, data.sequence_length, pad_token=pad_token)
    return rows, min(len(rows), configuration.metrics.held_out_rows)
