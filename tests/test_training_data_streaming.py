"""Streamed rows: the same as those of a store, and after a stop the very next one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import texts, tiny_tokenizer

from neuroweave.training.grain_documents import Choice, StreamedDocuments
from neuroweave.training.packing import PackedRows
from neuroweave.training.sources import Source
from neuroweave.training.streaming import StreamedRows
from neuroweave.training.token_store import build_store

LENGTH = 13


def write(file: Path, *, count: int = 60, seed: int = 0) -> Source:
    """Documents from 1 to 60 words: shorter and longer than a row."""
    found = [" ".join(text.text.split()[: 1 + 7 * number % 60]) for number, text in enumerate(texts(count, 60, seed))]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
    return Source(path=str(file))


def numbered(file: Path, count: int) -> Source:
    """Document n is word n alone, so that tokens tell which documents a stream read."""
    file.write_text("".join(json.dumps({"text": f"w{number}"}) + "\n" for number in range(count)), encoding="utf-8")
    return Source(path=str(file))


def as_lists(row: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: array.tolist() for name, array in row.items()}


def some(stream: StreamedRows, count: int) -> list[dict[str, list[int]]]:
    return [as_lists(next(stream)) for _ in range(count)]


def documents_of(rows: list[dict[str, list[int]]]) -> list[int]:
    """The words of a `numbered` source, which the tiny tokenizer numbers from 3 on."""
    return [token - 3 for row in rows for token in row["input_ids"] if token != 2]


def test_one_epoch_in_order_is_what_a_store_holds(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", seed=1)]
    rows = PackedRows(build_store(tmp_path / "store", sources, tiny_tokenizer(start=True)), LENGTH)
    streamed = [as_lists(row) for row in StreamedRows(sources, tiny_tokenizer(start=True), LENGTH, repeat=False)]
    assert streamed == [as_lists(rows.row(number).arrays()) for number in range(len(rows))]
    assert {str(array.dtype) for array in rows.row(0).arrays().values()} == {"int64"}


def test_a_seed_shuffles_within_windows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl")

    def epoch(**settings: Any) -> list[dict[str, list[int]]]:
        return [as_lists(row) for row in StreamedRows([source], tiny_tokenizer(), LENGTH, repeat=False, **settings)]

    plain, one, other = epoch(), epoch(seed=1, buffer=20), epoch(seed=2, buffer=20)
    assert plain != one != other
    assert one == epoch(seed=1, buffer=20)
    for start in range(0, len(plain), 20):
        window = sorted(json.dumps(row) for row in plain[start : start + 20])
        assert window == sorted(json.dumps(row) for row in one[start : start + 20])


STREAMS: dict[str, dict[str, Any]] = {
    "in order": {},
    "shuffled": {"seed": 7, "buffer": 9},
    "one of two processes": {"seed": 7, "buffer": 9, "process_index": 1, "process_count": 2},
    "held out": {"held_out": 0.3, "part": "held_out"},
    "one epoch": {"seed": 7, "buffer": 9, "repeat": False},
    "prefetches little": {"seed": 7, "buffer": 9, "prefetch": 1},
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("several", [False, True])
def test_a_stream_goes_on_with_the_very_next_row(tmp_path: Path, name: str, several: bool) -> None:
    """Though its thread has read far ahead; the epoch has some 128 rows."""
    sources = [write(tmp_path / "a.jsonl")]
    if several:
        sources.append(write(tmp_path / "b.jsonl", seed=1).model_copy(update={"weight": 0.5}))

    def stream() -> StreamedRows:
        return StreamedRows(sources, tiny_tokenizer(), LENGTH, **STREAMS[name])

    first = stream()
    rows = some(first, 100)
    states = {at: json.loads(json.dumps(first.state_at(at))) for at in (0, 1, 8, 9, 10, 50, 99)}
    rows += some(first, 20)
    for at, state in states.items():
        again = stream()
        again.restore(state)
        assert some(again, 120 - at) == rows[at:], at
        again.restore(states[50])  # a stream that has run takes up another state too
        assert some(again, 30) == rows[50:80]
        assert again.rows == 80
        again.close()
    first.close()


def test_workers_read_side_by_side_and_resume(tmp_path: Path) -> None:
    """Two processes are started, which takes most of the time."""
    stream = StreamedRows([numbered(tmp_path / "a.jsonl", 120)], tiny_tokenizer(), 4, repeat=False, workers=2)
    rows = some(stream, 10)
    state = json.loads(json.dumps(stream.state()))
    following = some(stream, 20)
    stream.restore(state)
    rest = [as_lists(row) for row in stream]
    stream.close()
    assert rest[:20] == following
    assert sorted(documents_of(rows + rest)) == list(range(120))


def test_a_worker_takes_its_share_of_what_its_process_has(tmp_path: Path) -> None:
    dataset = StreamedDocuments(
        (numbered(tmp_path / "a.jsonl", 20),), tiny_tokenizer(), Choice(1, 3, 0.0, False, False), end_of_document=False
    )
    dataset.set_slice(slice(1, None, 2))
    assert [int(token_ids[0]) - 3 for token_ids in dataset] == [4, 10, 16]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_the_documents(tmp_path: Path, count: int) -> None:
    """Disjoint, and together all of them: 120 documents of two tokens in rows of four."""
    source = numbered(tmp_path / "a.jsonl", 120)
    found: list[list[int]] = []
    for index in range(count):
        stream = StreamedRows(
            [source], tiny_tokenizer(), 4, seed=1, repeat=False, process_index=index, process_count=count
        )
        found.append(documents_of([as_lists(row) for row in stream]))
    assert sorted(document for documents in found for document in documents) == list(range(120))
    assert [len(documents) for documents in found] == [120 // count] * count


def test_epochs_repeat_and_sources_are_drawn_by_weight(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl", 20)
    assert documents_of(some(StreamedRows([source], tiny_tokenizer(), 4), 25)) == [*range(20), *range(20), *range(10)]
    two = tmp_path / "b.jsonl"
    two.write_text('{"text": "w100"}\n')
    none = write(tmp_path / "c.jsonl").model_copy(update={"weight": 0.0})
    stream = StreamedRows([source, none, Source(path=str(two), weight=3.0)], tiny_tokenizer(), 4)
    drawn = Counter(document == 100 for document in documents_of(some(stream, 40)))
    assert drawn == {True: 60, False: 20}


def test_the_held_out_side_is_the_one_of_a_store(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl", 120)
    store = build_store(tmp_path / "store", [source], tiny_tokenizer(), held_out=0.25)
    assert store.held_out is not None
    for part, tokens in (("training", store), ("held_out", store.held_out)):
        stream = StreamedRows([source], tiny_tokenizer(), 2, held_out=0.25, part=part, repeat=False)  # type: ignore[arg-type]
        stored = [token - 3 for token in tokens.tokens_at(0, tokens.tokens).tolist() if token != 2]
        assert documents_of([as_lists(row) for row in stream]) == stored


def test_rows_by_their_number_run_forward(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl")
    rows = some(StreamedRows([source], tiny_tokenizer(), LENGTH), 9)
    stream = StreamedRows([source], tiny_tokenizer(), LENGTH)
    assert [as_lists(stream.row(at)) for at in (0, 1, 5, 8)] == [rows[0], rows[1], rows[5], rows[8]]
    with pytest.raises(ValueError, match="row 3 of a stream that has given 9: it only runs forward; restore a state"):
        stream.row(3)


def test_refusals(tmp_path: Path) -> None:
    source, tokenizer = numbered(tmp_path / "a.jsonl", 3), tiny_tokenizer()
    stream = StreamedRows([source], tokenizer, 2, remembered=2)
    some(stream, 5)
    with pytest.raises(ValueError, match=r"the state at row 2 is not known; rows 3 to 5 are"):
        stream.state_at(2)
    with pytest.raises(ValueError, match="cannot go on from this state: length, seed changed; set it back"):
        StreamedRows([source], tokenizer, 3, seed=1).restore(stream.state())
    stream.close()
    with pytest.raises(ValueError, match="no sources were given"):
        StreamedRows([], tokenizer, 2)
    with pytest.raises(ValueError, match="process 2 of 2: they are counted from 0"):
        StreamedRows([source], tokenizer, 2, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="rows of 1 tokens"):
        StreamedRows([source], tokenizer, 1)
    with pytest.raises(ValueError, match="every source has weight 0"):
        StreamedRows([source.model_copy(update={"weight": 0.0})], tokenizer, 2)
    with pytest.raises(ValueError, match="3 documents, and none of them falls to this process"):
        next(StreamedRows([source], tokenizer, 2, process_index=3, process_count=4))
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        next(StreamedRows([Source(path=str(tmp_path / "none.txt"))], tokenizer, 2))
    assert len(some(StreamedRows([source], tokenizer, 2, vocabulary_size=6), 3)) == 3
    with pytest.raises(ValueError, match="token id 5, the model's vocabulary ends at 4"):
        some(StreamedRows([source], tokenizer, 2, vocabulary_size=5), 3)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        StreamedRows([source], tokenizer, 2)
