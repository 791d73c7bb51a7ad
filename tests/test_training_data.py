"""The token store and the rows that are packed from it, against plain lists of token ids."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import WORDS, texts, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from neuroweave.text import documents
from neuroweave.training import store_files
from neuroweave.training.document_reading import TextDocument, is_held_out, text_key
from neuroweave.training.document_tokens import DocumentTokens
from neuroweave.training.packing import IGNORED, PackedRows, packed_documents
from neuroweave.training.sources import Source
from neuroweave.training.token_store import TokenStore, build_store

END = 2  # of the tiny tokenizer


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Source:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(file))


def corpus(file: Path, *, count: int = 12, words: int = 40, seed: int = 0) -> tuple[Source, list[str]]:
    """Documents of different lengths, in a file of JSON lines."""
    found = [text.text[: 20 + 17 * number] for number, text in enumerate(texts(count, words, seed))]
    return write_rows(file, [{"text": text} for text in found]), found


def expected_row(documents: list[list[int]], row: int, length: int) -> dict[str, list[int]]:
    """Token by token, from the definition."""
    stream = [(token, place) for document in documents for place, token in enumerate(document)]
    part = stream[row * length : (row + 1) * length]
    positions: list[int] = []
    for at, (_, place) in enumerate(part):
        positions.append(0 if at == 0 or place == 0 else positions[-1] + 1)
    tokens = [token for token, _ in part]
    labels = [IGNORED if position == 0 else token for token, position in zip(tokens, positions, strict=True)]
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


def as_lists(row: Any) -> dict[str, list[int]]:
    return {name: array.tolist() for name, array in row.arrays().items()}


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("length", [2, 7, 123])
def test_rows_of_a_store_are_the_tokens_of_all_documents_in_order(tmp_path: Path, length: int, start: bool) -> None:
    """Shards of 50 tokens: rows cross their edges, and those of documents."""
    source, found = corpus(tmp_path / "text.jsonl")
    tokenizer = tiny_tokenizer(start=start)
    store = build_store(tmp_path / "store", [source], tokenizer, shard_tokens=50)
    ids = [[*tokenizer(text)["input_ids"], END] for text in found]
    assert (store.documents, store.tokens) == (12, sum(map(len, ids)))
    assert len(list((tmp_path / "store").glob("tokens-*.npy"))) == -(-store.tokens // 50)
    rows = PackedRows(store, length)
    assert len(rows) == store.tokens // length
    for number in range(len(rows)):
        assert as_lists(rows.row(number)) == expected_row(ids, number, length)
    assert as_lists(rows.row(len(rows))) == as_lists(rows.row(0))  # the next epoch
    memory = packed_documents(ids, length)
    assert as_lists(memory.row(len(rows) - 1)) == as_lists(rows.row(len(rows) - 1))


def test_without_an_end_token_documents_follow_each_other_directly(tmp_path: Path) -> None:
    source, found = corpus(tmp_path / "text.jsonl", count=3)
    store = build_store(tmp_path / "store", [source], tiny_tokenizer(), end_of_document=False)
    assert store.tokens_at(0, store.tokens).tolist() == [
        id for text in found for id in tiny_tokenizer()(text)["input_ids"]
    ]


def test_a_document_of_one_token_and_a_row_that_ends_with_a_document() -> None:
    row = packed_documents([[5], [6], [7, 8, 9], [10]], 6).row(0)
    assert row.position_ids.tolist() == [0, 0, 0, 1, 2, 0]
    assert row.labels.tolist() == [IGNORED, IGNORED, IGNORED, 8, 9, IGNORED]
    assert packed_documents([[5, 6], [], [7, 8]], 2).row(1).input_ids.tolist() == [7, 8]


def test_documents_that_begin_at_the_edges_of_a_span_are_not_between_them() -> None:
    store = packed_documents([[5, 6], [7, 8], [9, 10, 11], [12]], 2).store
    assert store.starts_between(0, 8).tolist() == [2, 4, 7]
    assert store.starts_between(2, 7).tolist() == [4]
    assert store.starts_between(5, 6).tolist() == []


def test_a_last_row_is_filled_up_where_a_pad_token_is_given() -> None:
    rows = packed_documents([[5, 6, 7], [8, 9]], 4, pad_token=0)
    assert len(rows) == 2
    assert as_lists(rows.row(1)) == {
        "input_ids": [9, 0, 0, 0],
        "position_ids": [0, 0, 1, 2],
        "labels": [IGNORED] * 4,
    }
    assert len(packed_documents([[5, 6, 7], [8, 9]], 4)) == 1


def test_a_seed_gives_each_epoch_every_row_once_in_an_order_that_stays() -> None:
    ids = [[number] * 3 for number in range(100)]
    rows = packed_documents(ids, 3, seed=3407)
    epochs = [[int(rows.row(epoch * 100 + at).input_ids[0]) for at in range(100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0][:8] == [4, 15, 90, 16, 46, 21, 83, 80]  # golden: a run that is resumed years later
    again = packed_documents(ids, 3, seed=3407)
    assert int(again.row(217).input_ids[0]) == epochs[2][17]  # asked for out of order
    other = packed_documents(ids, 3, seed=3408)
    assert [int(other.row(at).input_ids[0]) for at in range(100)] != epochs[0]


def test_weights_say_how_often_an_epoch_passes_over_a_source(tmp_path: Path) -> None:
    sources = [write_rows(tmp_path / f"{name}.jsonl", [{"text": f"w{name} " * 9}] * 20) for name in range(3)]
    store = build_store(tmp_path / "store", sources, tiny_tokenizer())
    assert store.source_tokens == (200, 200, 200)
    rows = PackedRows(store, 10, seed=1, weights=[2.0, 0.25, 0.0])
    assert len(rows) == 45

    def drawn(epoch: int) -> list[int]:
        return [int(rows.row(epoch * 45 + at).input_ids[0]) - 3 for at in range(45)]

    assert sorted(drawn(0)) == [0] * 40 + [1] * 5
    numbers = {epoch: sorted(rows._epoch_order(epoch)[rows._epoch_order(epoch) >= 20].tolist()) for epoch in range(9)}
    assert len({row for epoch in numbers.values() for row in epoch}) > 15  # another quarter in each epoch
    assert len(PackedRows(store, 10, seed=1, weights=[1.0, 1.0, 1.0])) == len(PackedRows(store, 10, seed=1)) == 60


def test_documents_that_are_held_out_are_told_by_their_text_alone(tmp_path: Path) -> None:
    source, found = corpus(tmp_path / "text.jsonl", count=60)
    again, _ = corpus(tmp_path / "again.jsonl", count=60)
    tokenizer = tiny_tokenizer()

    def texts_of(store: TokenStore) -> set[str]:
        ends = store._ends.tolist()
        return {
            tokenizer.decode(store.tokens_at(start, end - 1)) for start, end in zip([0, *ends[:-1]], ends, strict=True)
        }

    few = build_store(tmp_path / "few", [source, again], tokenizer, held_out=0.1)
    many = build_store(tmp_path / "many", [again], tokenizer, held_out=0.3)
    assert few.held_out is not None
    assert many.held_out is not None
    whole = {tokenizer.decode(tokenizer(text)["input_ids"]) for text in found}
    assert texts_of(few) | texts_of(few.held_out) == whole
    assert not texts_of(few) & texts_of(few.held_out)  # though every document is there twice
    assert texts_of(few.held_out) < texts_of(many.held_out)
    assert few.documents + few.held_out.documents == 120
    assert few.held_out.source_tokens[0] == few.held_out.source_tokens[1]
    keys = [text_key(f"text {number}") for number in range(20_000)]
    assert abs(sum(is_held_out(key, 0.05) for key in keys if key is not None) - 1000) < 100  # 3.2 standard deviations


def test_a_store_is_reused_while_nothing_changed(tmp_path: Path) -> None:
    source, _ = corpus(tmp_path / "text.jsonl")
    folder, tokenizer = tmp_path / "store", tiny_tokenizer()
    build_store(folder, [source], tokenizer)

    def made() -> int:
        return (folder / "store.json").stat().st_mtime_ns

    first = made()
    build_store(folder, [source.model_copy(update={"weight": 3.0})], tokenizer)
    os.utime(source.path, ns=(1, 1))  # touched, not changed
    build_store(folder, [source], tokenizer)
    assert made() == first
    content = Path(source.path).read_text(encoding="utf-8")
    Path(source.path).write_text(content.replace("w1", "w2"), encoding="utf-8")
    store = build_store(folder, [source], tokenizer)
    second = made()
    assert second != first
    assert 4 not in store.tokens_at(0, store.tokens)  # w1
    build_store(folder, [source], tokenizer, end_of_document=False)
    assert made() != second
    third = made()
    store = build_store(folder, [source], tiny_tokenizer(words=WORDS[::-1]), end_of_document=False)
    assert made() != third
    assert store.record.tokenizer.sha256 == TokenStore.open(folder).record.tokenizer.sha256


def test_another_tokenizer_is_refused_when_a_store_is_opened(tmp_path: Path) -> None:
    source, _ = corpus(tmp_path / "text.jsonl")
    build_store(tmp_path / "store", [source], tiny_tokenizer())
    TokenStore.open(tmp_path / "store", tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"made with the tokenizer .* not with .* build the store again with this one"):
        TokenStore.open(tmp_path / "store", tokenizer=tiny_tokenizer(start=True))


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", [write_rows(tmp_path / "a.jsonl", [{"text": "w1 w119"}])], tiny_tokenizer())
    store.check_vocabulary(123)
    with pytest.raises(ValueError, match="holds token id 122, the model's vocabulary ends at 121"):
        store.check_vocabulary(122)


@pytest.mark.parametrize("words", [65_533, 65_534])
def test_ids_beyond_16_bits_take_32(tmp_path: Path, words: int) -> None:
    """Three special tokens come before the words."""
    tokenizer = tiny_tokenizer(words=[f"w{number}" for number in range(words)])
    source = write_rows(tmp_path / "a.jsonl", [{"text": f"w0 w{words - 1}"}])
    store = build_store(tmp_path / "store", [source], tokenizer)
    assert store.tokens_at(0, 3).tolist() == [3, words + 2, END]
    assert store.record.dtype == ("uint16" if words == 65_533 else "uint32")


def test_a_store_travels_to_another_process_as_its_path(tmp_path: Path) -> None:
    source, _ = corpus(tmp_path / "text.jsonl", count=60)
    store = build_store(tmp_path / "store", [source], tiny_tokenizer(), held_out=0.2)
    for part in (store, store.held_out):
        assert part is not None
        content = pickle.dumps(part)
        assert len(content) < 1000
        assert pickle.loads(content).tokens_at(0, 20).tolist() == part.tokens_at(0, 20).tolist()
        assert pickle.loads(content).tokens == part.tokens


def test_the_shipped_prose_is_a_source(tmp_path: Path) -> None:
    source = Source(path="shipped:calibration", limit=2)
    store = build_store(tmp_path / "store", [source], tiny_tokenizer())
    words = [len(document.text.split()) for document in documents("calibration")[:2]]
    assert store.documents == 2
    assert store.tokens == sum(words) + 2
    assert store.record.sources[0].settings["sha256"]
    with pytest.raises(ValueError, match="shipped:evaluation: choose from shipped:training, shipped:calibration"):
        build_store(tmp_path / "other", [Source(path="shipped:evaluation")], tiny_tokenizer())


def test_progress_counts_the_bytes_of_the_files(tmp_path: Path) -> None:
    one, _ = corpus(tmp_path / "one.jsonl")
    two, _ = corpus(tmp_path / "two.jsonl")
    size = sum(Path(source.path).stat().st_size for source in (one, two))
    told: list[tuple[int, Any]] = []
    build_store(tmp_path / "store", [one, two], tiny_tokenizer(), progress=lambda *at: told.append(at))
    assert told[-1] == (size, size)
    build_store(
        tmp_path / "other",
        [one, Source(path="shipped:training", limit=1)],
        tiny_tokenizer(),
        progress=lambda *at: told.append(at),
    )
    assert told[-1][1] is None


def test_long_documents_give_no_warning_and_all_tokens_though_the_tokenizer_truncates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    long = "w1 w2 w3 " * 1000
    (tmp_path / "a.txt").write_text(long)

    def truncating() -> PreTrainedTokenizerFast:
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 8
        tokenizer.backend_tokenizer.enable_truncation(8)
        tokenizer.backend_tokenizer.enable_padding(length=8)
        return tokenizer

    assert build_store(tmp_path / "store", [Source(path=str(tmp_path / "a.txt"))], truncating()).tokens == 3001
    tokenizer = truncating()
    documents = [TextDocument(text, 0) for text in (long, "w1")]
    assert [len(token_ids) for token_ids in DocumentTokens(tokenizer).encode(documents)] == [3001, 2]
    assert caplog.text == ""
    tokenizer(long)
    assert "longer than the specified maximum" in caplog.text  # what was not heard above


TEXTS = [
    "Hello, wörld!",
    "  two  spaces\n\nand lines ",
    "日本語のテキスト",
    "<|end|> a special token in the text",
    "🙂" * 9,
    "x",
]


def bytes_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "<|end|>"])
    tokenizer.train_from_iterator([text.text for text in texts()] + TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **settings)


@pytest.mark.parametrize("make", [bytes_tokenizer, ByT5Tokenizer])
def test_ids_are_those_that_transformers_gives(tmp_path: Path, make: Any) -> None:
    """A fast tokenizer, and one in Python."""
    tokenizer = make()
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    store = build_store(tmp_path / "store", [source], tokenizer)
    expected = [
        token
        for text in TEXTS
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    assert store.tokens_at(0, store.tokens).tolist() == expected
    assert TokenStore.open(tmp_path / "store", tokenizer=make()).documents == len(TEXTS)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = corpus(tmp_path / "text.jsonl")

    def full(self: Any, values: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store_files.GrowingArray, "append", full)
        with pytest.raises(ValueError, match="the disk is full, no store was made"):
            build_store(tmp_path / "store", [source], tiny_tokenizer())
    assert [file.name for file in tmp_path.iterdir()] == ["text.jsonl"]


def test_refusals_of_stores(tmp_path: Path) -> None:
    source, _ = corpus(tmp_path / "text.jsonl", count=1)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no sources were given"):
        build_store(tmp_path / "store", [], tokenizer)
    with pytest.raises(ValueError, match=r"held_out 1.0: a fraction"):
        build_store(tmp_path / "store", [source], tokenizer, held_out=1.0)
    with pytest.raises(ValueError, match=r"held_out 0.01 of 1 documents leaves none in the held-out part"):
        build_store(tmp_path / "store", [source], tokenizer, held_out=0.01)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        build_store(tmp_path / "mine", [source], tokenizer)
    with pytest.raises(ValueError, match="contains the source"):
        build_store(tmp_path, [source], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"it has no end token to put between documents.*end_of_document: false"):
        build_store(tmp_path / "store", [source], tokenizer)
    assert not (tmp_path / "store").exists()


def test_refusals_of_damaged_stores(tmp_path: Path) -> None:
    source, _ = corpus(tmp_path / "text.jsonl")
    folder = tmp_path / "store"
    store = build_store(folder, [source], tiny_tokenizer())
    with pytest.raises(ValueError, match="not a token store"):
        TokenStore.open(tmp_path)
    shard = folder / "tokens-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens-00000\.npy: missing or damaged"):
        TokenStore.open(folder)
    again = build_store(folder, [source], tiny_tokenizer())
    assert again.tokens == store.tokens
    record = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(record | {"version": 2}))
    with pytest.raises(ValueError, match="of version 2, not 1; build it again"):
        TokenStore.open(folder)


def test_refusals_of_rows() -> None:
    with pytest.raises(ValueError, match="3 tokens do not fill one row of 7; give more text, or shorter rows"):
        packed_documents([[1, 2, 3]], 7)
    with pytest.raises(ValueError, match="rows of 1 tokens: nothing to predict"):
        packed_documents([[1, 2, 3]], 1)
    with pytest.raises(ValueError, match="row -1: rows are counted from 0"):
        packed_documents([[1, 2, 3]], 2).row(-1)
    with pytest.raises(ValueError, match="seed -1"):
        packed_documents([[1, 2, 3]], 2, seed=-1)
    store = packed_documents([[1, 2, 3]], 2).store
    with pytest.raises(ValueError, match="2 weights for 1 sources"):
        PackedRows(store, 2, seed=0, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="give a seed"):
        PackedRows(store, 2, weights=[2.0])
    with pytest.raises(ValueError, match="leave no row"):
        PackedRows(store, 2, seed=0, weights=[0.0])
    with pytest.raises(ValueError, match="must be 0 or a positive number"):
        PackedRows(store, 2, seed=0, weights=[-1.0])
