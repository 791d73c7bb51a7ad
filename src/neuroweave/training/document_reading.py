"""The documents of a source, one after another: rows become texts, what cannot is dropped and counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neuroweave.text.passages import cut
from neuroweave.training.chat_mapping import Chat, chat_text, messages_chat, plain_chat, synth_chat
from neuroweave.training.row_reading import PIECE, TEXT, FileRows, HubRows, Row, missing_columns
from neuroweave.training.sources import Source, shipped_texts, source_files, source_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PATIENCE = 10_000  # rows without a single document, after which a source is given up
EMPTY, NOT_UNICODE, REFUSED = "empty text", "text with lone surrogates", "refused by the chat template"


@dataclass(frozen=True)
class TextDocument:
    """One document; `starts`, `ends`: a start and an end token are to be added, its text brings none along.

    `key`: 64 bits of a hash of its text (of a chat: in the plain form), which decide whether it is held out.
    """

    text: str
    key: int
    starts: bool = True
    ends: bool = True


def is_held_out(key: int, fraction: float) -> bool:
    """Equal texts fall on the same side, and what is held out of 1 % is held out of 2 % too."""
    return key < fraction * 2**64


class ShippedRows:
    """The passages of the shipped prose, as rows."""

    def __init__(self, source: Source, *, position: dict[str, Any] | None) -> None:
        self._texts = shipped_texts(source)
        self._next = 0 if position is None else int(position["row"])
        self.bytes_in_all = sum(map(len, self._texts))
        self.bytes_read = sum(map(len, self._texts[: self._next]))

    def __iter__(self) -> ShippedRows:
        return self

    def __next__(self) -> Row:
        if self._next == len(self._texts):
            raise StopIteration
        text = self._texts[self._next]
        self._next += 1
        self.bytes_read += len(text)
        return {TEXT: text}

    def position(self) -> dict[str, Any]:
        """JSON values."""
        return {"row": self._next}

    def close(self) -> None:
        """Nothing is open."""


class DocumentReader:
    """The documents of `source` in order; a text of more than about `PIECE` characters comes as several.

    `rows` were read, `documents` given (those before `position` included), `dropped` counts the others by their reason.
    `position()` is a small dict of JSON values; a reader made with it goes on with the very next document. Raises
    ValueError for files that cannot be read, and when no row gives a document: at the end, or after `PATIENCE` rows.
    """

    def __init__(
        self, source: Source, tokenizer: PreTrainedTokenizerBase, *, position: dict[str, Any] | None = None
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self._kind = source_kind(source)
        given, skip = (None, 0) if position is None else (position["rows"], int(position["pieces"]))
        self._rows: FileRows | HubRows | ShippedRows
        if self._kind == "hub":
            self._rows = HubRows(source, position=given)
        elif self._kind == "shipped":
            self._rows = ShippedRows(source, position=given)
        else:
            columns = (TEXT,) if self._kind == "text" else source.columns
            self._rows = FileRows(source_files(source, self._kind), self._kind, columns, position=given)
        self.rows, self.documents = 0, 0 if position is None else int(position["documents"])
        self.dropped: Counter[str] = Counter()
        self._columns: dict[str, None] = {}
        self._refusal = ""
        self._before = self._rows.position()
        self._pieces: list[TextDocument] = []
        self._given = 0
        if skip:
            self._fetch()
            self._given = skip

    def __iter__(self) -> Iterator[TextDocument]:
        return self

    def __next__(self) -> TextDocument:
        if self.source.limit is not None and self.documents >= self.source.limit:
            raise StopIteration
        while self._given >= len(self._pieces):
            self._fetch()
        self._given += 1
        self.documents += 1
        return self._pieces[self._given - 1]

    @property
    def bytes_read(self) -> int:
        """Of the files; 0 of a hub dataset."""
        return self._rows.bytes_read

    def position(self) -> dict[str, Any]:
        """Where the next document stands."""
        if self._given < len(self._pieces):
            return {"rows": self._before, "pieces": self._given, "documents": self.documents}
        return {"rows": self._rows.position(), "pieces": 0, "documents": self.documents}

    def close(self) -> None:
        """Close what is open."""
        self._rows.close()

    def _fetch(self) -> None:
        """The documents of the next row."""
        self._before = self._rows.position()
        self._pieces, self._given = [], 0
        try:
            row = next(self._rows)
        except StopIteration:
            if not self.documents:
                raise ValueError(self._nothing()) from None
            raise
        self.rows += 1
        if len(self._columns) < 100:
            self._columns.update(dict.fromkeys(row))
        found = self._documents_of(row)
        if isinstance(found, str):
            self.dropped[found] += 1
            if not self.documents and self.rows >= PATIENCE:
                raise ValueError(self._nothing())
        else:
            self._pieces = found

    def _documents_of(self, row: Row) -> list[TextDocument] | str:
        if self.source.chat is not None:
            chat = synth_chat(row) if self.source.chat == "synth" else messages_chat(row, self.source.columns[0])
            return f"no {chat}" if isinstance(chat, str) else self._chat_document(chat)
        column = TEXT if self._kind in ("text", "shipped") else self.source.columns[0]
        text = row.get(column)
        if not isinstance(text, str):
            return f"no {column}"
        if not text.strip():
            return EMPTY
        pieces = [text] if len(text) <= 1.5 * PIECE else cut(text, size=PIECE)
        keys = [text_key(piece) for piece in pieces]
        if None in keys:
            return NOT_UNICODE
        return [TextDocument(piece, key) for piece, key in zip(pieces, keys, strict=True) if key is not None]

    def _chat_document(self, chat: Chat) -> list[TextDocument] | str:
        key = text_key(plain_chat(chat))
        if key is None:
            return NOT_UNICODE
        from jinja2 import TemplateError

        try:
            text = chat_text(chat, self.tokenizer)
        except TemplateError as error:
            self._refusal = self._refusal or str(error)
            return REFUSED
        start, end = self.tokenizer.bos_token, self.tokenizer.eos_token
        starts = not (start and text.startswith(start))
        return [TextDocument(text, key, starts=starts, ends=not (end and text.rstrip().endswith(end)))]

    def _nothing(self) -> str:
        if not self.rows:
            return f"{self.source.path}: no rows in it; give data that has some"
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
        if any(not reason.startswith("no ") for reason in self.dropped):
            refusal = f" ({self._refusal})" if self._refusal else ""
            return f"{self.source.path}: none of {self.rows} rows gives a document ({counts}){refusal}"
        return f"{missing_columns(self.source, list(self._columns))} ({self.rows} rows read; {counts})"


def text_key(text: str) -> int | None:
    """64 bits of the BLAKE2b hash of `text` in UTF-8; None where it cannot be written in UTF-8."""
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
