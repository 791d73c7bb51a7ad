"""Every kind of source: what is read of it, what is dropped and counted, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError
from tiny_llama import tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from neuroweave.text.reading import read_text
from neuroweave.training import document_reading, row_reading
from neuroweave.training.chat_mapping import chat_text
from neuroweave.training.document_reading import DocumentReader
from neuroweave.training.sources import Source
from neuroweave.training.token_store import build_store

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
SYNTH = {
    "query": "Why?",
    "synthetic_reasoning": "Think.",
    "synthetic_answer": "So.",
    "exercise": "memorization",
    "constraints": "Use the text.",
    "language": "en",
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test waits for the hub."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(source: Source, tokenizer: Any = None) -> list[str]:
    return [document.text for document in DocumentReader(source, tokenizer or tiny_tokenizer())]


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **settings)
    return file


# What is read


def test_each_kind_gives_the_same_documents(tmp_path: Path) -> None:
    found = [f"Document {number}.\n" * (number + 1) for number in range(1000)]
    rows = [{"other": number, "text": text} for number, text in enumerate(found)]
    (tmp_path / "text").mkdir()
    for number, text in enumerate(found):
        (tmp_path / "text" / f"{number:04d}.txt").write_text(text)
    lines = write_lines(tmp_path / "rows.jsonl", rows)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(lines.read_bytes())
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "train-0.parquet", rows[:600], row_group_size=100)
    write_parquet(tmp_path / "hub" / "train-1.parquet", rows[600:], row_group_size=100)
    sources = [
        Source(path=str(tmp_path / "text")),
        Source(path=str(tmp_path / "rows.jsonl")),
        Source(path=str(tmp_path / "rows.jsonl.gz")),
        Source(path=str(tmp_path / "hub")),
        Source(path=str(tmp_path / "h*" / "*.parquet")),
        Source(path=str(tmp_path / "hub"), kind="hub"),
    ]
    for source in sources:
        assert read(source) == found, source
    assert read(sources[3].model_copy(update={"limit": 7})) == found[:7]
    store = build_store(tmp_path / "store", [sources[5]], tiny_tokenizer())  # a hub dataset has no files to hash
    assert store.documents == 1000
    assert store.record.sources[0].files == ()


@pytest.mark.parametrize("name", ["a.txt", "rows.jsonl", "rows.jsonl.gz", "rows.parquet", "hub"])
def test_reading_goes_on_exactly_where_it_stood(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a long document, which is given in pieces."""
    monkeypatch.setattr(row_reading, "PIECE", 300)
    monkeypatch.setattr(document_reading, "PIECE", 300)
    monkeypatch.setattr(row_reading, "_BLOCK", 100)
    texts = [f"{number} " + "word " * (5 if number % 7 else 500) + "end." for number in range(40)]
    rows = [{"text": text} for text in texts]
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("\n\n".join(texts))
    elif name == "rows.jsonl":
        write_lines(path, rows)
    elif name == "rows.jsonl.gz":
        path.write_bytes(gzip.compress(write_lines(tmp_path / "plain", rows).read_bytes()))
    elif name == "rows.parquet":
        write_parquet(path, rows, row_group_size=6)
    else:
        path.mkdir()
        write_parquet(path / "train-0.parquet", rows[:17], row_group_size=6)
        write_parquet(path / "train-1.parquet", rows[17:])
    source, tokenizer = Source(path=str(path), kind="hub" if name == "hub" else "auto"), tiny_tokenizer()
    reader = DocumentReader(source, tokenizer)
    positions, found = [json.dumps(reader.position())], []
    for document in reader:
        found.append(document)
        positions.append(json.dumps(reader.position()))
    assert len(found) > 45
    assert " ".join(" ".join(document.text for document in found).split()) == " ".join(" ".join(texts).split())
    for at in [*range(0, len(found), 5), len(found) - 1, len(found)]:
        again = DocumentReader(source, tokenizer, position=json.loads(positions[at]))
        assert list(again) == found[at:]
        assert again.documents == len(found)


def test_a_large_text_is_read_in_blocks_as_it_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks cut line ends and characters of four bytes in two; the byte order mark goes."""
    monkeypatch.setattr(row_reading, "PIECE", 1_000)
    monkeypatch.setattr(row_reading, "_BLOCK", 7)
    text = "".join(f"Line {number} 🙂é\r\n" + ("\r\n" if number % 9 == 0 else "") for number in range(999))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    whole = read_text(tmp_path / "a.txt")
    pieces = [row["text"] for row, _ in row_reading.text_rows(tmp_path / "a.txt", ("text",), 0)]
    assert 10 < len(pieces) < 60
    assert max(map(len, pieces)) < 2_000
    at = 0
    for piece in pieces:  # in order, and nothing but space between them
        start = whole.index(piece, at)
        assert not whole[at:start].strip()
        at = start + len(piece)
    assert not whole[at:].strip()
    (tmp_path / "bad.txt").write_bytes(text.encode() + b"\xff" + text.encode())
    with pytest.raises(ValueError, match=rf"bad.txt: not UTF-8 text \(near byte {len(text.encode())}\)"):
        read(Source(path=str(tmp_path / "bad.txt")))
    (tmp_path / "bad.txt").write_bytes(text.encode() + "🙂".encode()[:2])
    with pytest.raises(ValueError, match="it ends within a character"):
        read(Source(path=str(tmp_path / "bad.txt")))
    (tmp_path / "bad.txt").write_bytes(text.encode() + b"\0")
    with pytest.raises(ValueError, match="a binary file"):
        read(Source(path=str(tmp_path / "bad.txt")))
    (tmp_path / "bad.txt").write_bytes(b" \n" * 9_999)
    with pytest.raises(ValueError, match=r"bad.txt: empty"):
        read(Source(path=str(tmp_path / "bad.txt")))


# Chats


def test_a_row_of_synth_becomes_question_and_answer(tmp_path: Path) -> None:
    rows = [
        SYNTH,
        SYNTH | {"exercise": "rag exercise"},
        SYNTH | {"exercise": None},
        SYNTH | {"synthetic_reasoning": None},
        {name: value for name, value in SYNTH.items() if name != "query"},
        SYNTH | {"exercise": "rag", "constraints": None},
    ]
    lines, table = write_lines(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)
    answer = "<|assistant|><think>\nThink.\n</think>\n\nSo.</s>\n"
    expected = [
        f"<|user|>Why?</s>\n{answer}",
        f"<|user|>Why?\nUse the text.</s>\n{answer}",
        f"<|user|>Why?</s>\n{answer}",
    ]
    for path in (lines, table):
        reader = DocumentReader(Source(path=str(path), chat="synth"), chat_tokenizer())
        assert [document.text for document in reader] == expected
        assert reader.dropped == {"no synthetic_reasoning": 1, "no query": 1, "no constraints": 1}
        assert reader.rows == 6
    store = build_store(tmp_path / "store", [Source(path=str(table), chat="synth")], chat_tokenizer())
    assert store.dropped == {"no synthetic_reasoning": 1, "no query": 1, "no constraints": 1}


def test_messages_are_rendered_by_the_template_or_plainly(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "w1?"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": chat}, {"messages": "w1"}, {"messages": [{"role": "user"}]}])
    source = Source(path=str(path), chat="messages")
    assert read(source) == ["System: Be brief.\n\nUser: w1?"]
    assert read(source, chat_tokenizer()) == ["<|system|>Be brief.</s>\n<|user|>w1?</s>\n"]
    assert chat_text(chat, chat_tokenizer()) == read(source, chat_tokenizer())[0]
    other = write_parquet(tmp_path / "a.parquet", [{"turns": chat}])
    assert read(Source(path=str(other), chat="messages", field="turns")) == ["System: Be brief.\n\nUser: w1?"]


@pytest.mark.parametrize(
    "template", [TEMPLATE, "{{ bos_token }}" + TEMPLATE, "{% for m in messages %}{{ m.content }}{% endfor %}"]
)
def test_start_and_end_tokens_stand_once_whatever_the_template_brings(tmp_path: Path, template: str) -> None:
    tokenizer = tiny_tokenizer(start=True)
    tokenizer.chat_template = template
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": " w1 w2 "}]}])
    store = build_store(tmp_path / "store", [Source(path=str(path), chat="messages")], tokenizer)
    ids = store.tokens_at(0, store.tokens).tolist()
    assert ids[0] == 1
    assert ids[-1] == 2
    assert ids.count(1) == 1
    assert ids.count(2) == 1


def test_a_chat_that_the_template_refuses_is_dropped_and_counted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
    )
    good, bad = [{"role": "user", "content": "w1"}], [{"role": "system", "content": "w1"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": good}, {"messages": bad}])
    store = build_store(tmp_path / "store", [Source(path=str(path), chat="messages")], tokenizer)
    assert store.dropped == {"refused by the chat template": 1}
    path = write_lines(tmp_path / "b.jsonl", [{"messages": bad}])
    with pytest.raises(ValueError, match=r"none of 1 rows gives a document .*\(user first\)"):
        read(Source(path=str(path), chat="messages"), tokenizer)


def test_a_new_chat_template_makes_a_new_store(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "w1 w2"}]}])
    source = Source(path=str(path), chat="messages")
    plain = build_store(tmp_path / "store", [source], tiny_tokenizer())
    assert plain.record.fingerprint != build_store(tmp_path / "store", [source], chat_tokenizer()).record.fingerprint
    text = Source(path=str(write_lines(tmp_path / "b.jsonl", [{"text": "w1"}])))
    plain = build_store(tmp_path / "store", [text], tiny_tokenizer())
    assert plain.record.fingerprint == build_store(tmp_path / "store", [text], chat_tokenizer()).record.fingerprint


# What is dropped, and what is refused


def test_rows_without_text_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"text": "w1 w2"},
        {"other": 1},
        {"text": None},
        {"text": " \n"},
        {"text": 7},
        {"text": "\ud800"},
        {"text": "w3"},
    ]
    store = build_store(
        tmp_path / "store", [Source(path=str(write_lines(tmp_path / "a.jsonl", rows)))], tiny_tokenizer()
    )
    assert store.dropped == {"no text": 3, "empty text": 1, "text with lone surrogates": 1}
    assert store.documents == 2
    assert store.record.sources[0].rows == 7


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_source_in_which_no_row_has_the_field_names_the_columns(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "a", "story": "b"}] * 3
    path = tmp_path / f"a.{kind}"
    if kind == "hub":
        path.mkdir()
        write_parquet(path / "train.parquet", rows)
    else:
        {"jsonl": write_lines, "parquet": write_parquet}[kind](path, rows)
    source = Source(path=str(path), kind=kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no row has a usable text; the columns are prompt, story; name one"):
        read(source)
    assert read(source.model_copy(update={"field": "story"})) == ["b"] * 3
    with pytest.raises(ValueError, match=r"usable query, synthetic_reasoning and synthetic_answer; .* prompt, story"):
        read(source.model_copy(update={"chat": "synth"}))


def test_a_wrong_field_is_noticed_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_reading, "PATIENCE", 20)
    path = write_lines(tmp_path / "a.jsonl", [{"story": "b"}] * 30)
    with pytest.raises(ValueError, match="20 rows read; no text: 20"):
        read(Source(path=str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: empty"),
        ("a.txt", b" \n", "a.txt: empty"),
        ("a.txt", b"a\0b", "a.txt: a binary file"),
        ("a.txt", b"a\xff", "a.txt: not UTF-8 text"),
        ("a.jsonl", b"", "a.jsonl: empty"),
        ("a.jsonl", b"\n\n", "a.jsonl: no rows in it"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b"\x89PNG\r\n\x1a\n\0", "a.jsonl, line 1: not JSON"),
        ("a.json", b'[{"text": "a"}]', "a.json, line 1: a JSON list; one object a line"),
        ("a.jsonl", b'{"text": "a"}' + b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl.gz", b"not gzip", "a damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "a damaged gzip file"),
        ("a.parquet", b"PAR1 not really", "a.parquet: cannot be read as parquet"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_store(tmp_path / "store", [Source(path=str(tmp_path / name))], tiny_tokenizer())
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("a")
    (tmp_path / "mixed" / "b.jsonl").write_text("{}")
    (tmp_path / "mixed" / ".hidden.parquet").write_text("")
    for path, message in {
        str(tmp_path / "none.txt"): "none.txt: no such file or folder",
        str(tmp_path / "none*.txt"): "no such file; give a text file, a folder of them, or a pattern",
        str(tmp_path / "empty"): "no file to read in this folder",
        str(tmp_path / "mixed"): r"holds files of several kinds \(jsonl, text\); say which with kind:",
        "nobody/nothing": "no such file or folder here, and as a dataset of the hub it cannot be opened",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(Source(path=path))
    assert read(Source(path=str(tmp_path / "mixed"), kind="text")) == ["a"]


def test_settings_that_do_not_fit_are_refused() -> None:
    for settings, message in (
        ({"kind": "text", "chat": "synth"}, "plain text has no rows to make a chat of"),
        ({"chat": "synth", "field": "a"}, "leave out field: a"),
        ({"kind": "jsonl", "revision": "main"}, "revision only go with a dataset of the hub"),
        ({"weight": -1.0}, "weight"),
        ({"columns": "a"}, "Extra inputs"),
    ):
        with pytest.raises(ValidationError, match=message):
            Source(path="a", **settings)
    with pytest.raises(ValueError, match="shipped:training: this is plain text; leave out kind and chat"):
        read(Source(path="shipped:training", chat="synth"))


def test_a_tokenizer_that_makes_nothing_of_the_text_is_refused(tmp_path: Path) -> None:
    """BPE without an unknown token leaves out what it does not know."""
    latin = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"</s>": 0, "a": 1}, [])), eos_token="</s>")
    rows = [{"text": "\u03b1\u03b2"}, {"text": "aa"}]
    store = build_store(tmp_path / "store", [Source(path=str(write_lines(tmp_path / "a.jsonl", rows)))], latin)
    assert store.tokens_at(0, store.tokens).tolist() == [1, 1, 0]
    assert store.dropped == {"no tokens in it": 1}
    path = write_lines(tmp_path / "b.jsonl", rows[:1])
    with pytest.raises(ValueError, match="makes no tokens of this text"):
        build_store(tmp_path / "store", [Source(path=str(path))], latin)
