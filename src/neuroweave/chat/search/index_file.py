"""The index of a folder: one SQLite file with two full-text tables, one of passages and one of whole documents."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neuroweave.chat.search.passages import Passage
from neuroweave.chat.search.queries import spaced, unspaced
from neuroweave.chat.search.sources import SearchError
from neuroweave.user_cache import user_cache

NAME = ".neuroweave-index.sqlite"
VERSION = 1  # of the tables, of how text is read and cut; another one is built anew
BUSY = 60.0  # seconds to wait for another process
TOKENS = "porter unicode61 remove_diacritics 2"
TABLES = ("documents", "passages", "pages")
SCHEMA = (
    """CREATE TABLE documents (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, size INTEGER, modified INTEGER,
    read INTEGER, digest BLOB, title TEXT, date TEXT, warning TEXT, problem TEXT, first INTEGER, passages INTEGER)""",
    f"""CREATE VIRTUAL TABLE passages USING fts5(title, heading, terms, place, text, document UNINDEXED,
    tokenize = '{TOKENS}')""",
    # Only the index of whole documents; their text is that of their passages.
    f"CREATE VIRTUAL TABLE pages USING fts5(title, text, content = '', tokenize = '{TOKENS}')",
)
PROBES = (
    "SELECT id, path, size, modified, read, digest, title, date, warning, problem, first, passages FROM documents "
    "LIMIT 0",
    "SELECT title, heading, terms, place, text, document FROM passages LIMIT 0",
    "SELECT title, text FROM pages LIMIT 0",
)
# What a word counts for in a title, a heading, a defined term, the path, the text: bm25's weights. Those from 1 to 8
# find as much on the development half of benchmarks/data/python_docs_questions.json; without the titles it is less.
PASSAGE_WEIGHTS = "bm25(4, 2, 2, 1, 1)"
PAGE_WEIGHTS = "bm25(2, 1)"
# Of a document's score as a whole, and of the better neighbour's, added to that of its best passage. Without the first,
# 5 in 100 answers more are not among the first five; the sum of several passages in place of the best loses 8.
WHOLE = 0.6
NEIGHBOUR = 0.15
PASSAGES_RANKED = 300
PAGES_RANKED = 100


@dataclass(frozen=True)
class State:
    """What is known of a file. `read`: when it was last read, in ns. `problem`: why it could not be."""

    size: int
    modified: int
    read: int
    digest: bytes
    problem: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Entry:
    """A document to be stored. `passages` None: its content is what is stored; it was looked at."""

    path: str
    state: State
    title: str = ""
    date: datetime.date | None = None
    passages: Sequence[Passage] | None = ()


@dataclass(frozen=True)
class Found:
    """A document that matches. `passages`: rows of its passages, the best first, with their scores."""

    document: int
    score: float
    passages: list[tuple[int, float]] = field(default_factory=list)


def index_place(folder: Path) -> Path:
    """The index of a folder: in it, or, where that cannot be written, in the user's cache."""
    own = folder / NAME
    writable = os.access(folder, os.W_OK) and (not own.exists() or os.access(own, os.W_OK))
    if writable and not own.is_symlink():
        return own
    return user_cache() / "indexes" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.sqlite"


class IndexFile:
    """An open index. Other processes may read and write it meanwhile; every change is there whole or not at all."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.new = False  # whether there was none that could be used
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileExistsError):  # whoever may read it can read the documents
                os.close(os.open(file, os.O_CREAT | os.O_EXCL, mode=0o600))
            self.database = self._opened()
        except OSError as error:
            raise SearchError(f"{file}: the index cannot be written ({error.strerror})") from error
        except sqlite3.DatabaseError as error:
            if not broken(error):
                raise SearchError(f"{file}: the index cannot be opened ({error})") from error
            discard(file)
            self.database = self._opened()

    def _opened(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.file, timeout=BUSY, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer
            database.execute("PRAGMA synchronous = NORMAL")
            if database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                self.new = True
                with transaction(database):
                    if database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                        for table in TABLES:
                            database.execute(f"DROP TABLE IF EXISTS {table}")
                        for statement in SCHEMA:
                            database.execute(statement)
                        database.execute(f"PRAGMA user_version = {VERSION}")
            for probe in PROBES:
                database.execute(probe)
        except BaseException:
            database.close()
            raise
        return database

    def __enter__(self) -> IndexFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.database.close()

    def states(self) -> dict[str, State]:
        rows = self.database.execute("SELECT path, size, modified, read, digest, problem, warning FROM documents")
        return {row[0]: State(*row[1:]) for row in rows}

    def counts(self) -> tuple[int, int]:
        """(documents that can be found, their passages)."""
        row = self.database.execute("SELECT count(*), sum(passages) FROM documents WHERE problem = ''").fetchone()
        return row[0], row[1] or 0

    def store(self, entries: Sequence[Entry]) -> None:
        """Put documents in, in place of what was under their paths; those that another process has put are left."""
        with transaction(self.database):
            for entry in entries:
                if entry.passages is None:
                    self._touch(entry.path, entry.state)
                elif not self._stored(entry):
                    self._delete(entry.path)
                    self._insert(entry, entry.passages)

    def delete(self, paths: Sequence[str]) -> None:
        with transaction(self.database):
            for path in paths:
                self._delete(path)

    def tidy(self) -> None:
        """Merge what many small changes left behind, after a large one."""
        with contextlib.suppress(sqlite3.OperationalError):  # another process is at it
            for table in ("passages", "pages"):
                self.database.execute(f"INSERT INTO {table}({table}) VALUES ('optimize')")
            self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _touch(self, path: str, state: State) -> None:
        self.database.execute(
            "UPDATE documents SET size = ?, modified = ?, read = ? WHERE path = ? AND digest = ?",
            (state.size, state.modified, state.read, path, state.digest),
        )

    def _stored(self, entry: Entry) -> bool:
        row = self.database.execute(
            "SELECT digest, modified, problem FROM documents WHERE path = ?", (entry.path,)
        ).fetchone()
        return row == (entry.state.digest, entry.state.modified, entry.state.problem)

    def _delete(self, path: str) -> None:
        row = self.database.execute(
            "SELECT id, title, first, passages FROM documents WHERE path = ?", (path,)
        ).fetchone()
        if row is None:
            return
        number, title, first, count = row
        if count:  # a table without content is told what it held
            text = self._whole_text(first, count)
            self.database.execute(
                "INSERT INTO pages(pages, rowid, title, text) VALUES ('delete', ?, ?, ?)", (number, title, text)
            )
            self.database.execute("DELETE FROM passages WHERE rowid >= ? AND rowid < ?", (first, first + count))
        self.database.execute("DELETE FROM documents WHERE id = ?", (number,))

    def _whole_text(self, first: int, count: int) -> str:
        rows = self.database.execute(
            "SELECT heading, text FROM passages WHERE rowid >= ? AND rowid < ? ORDER BY rowid", (first, first + count)
        )
        return "\n".join(f"{heading}\n{text}" for heading, text in rows)

    def _insert(self, entry: Entry, passages: Sequence[Passage]) -> None:
        state, title = entry.state, spaced(entry.title)
        last = self.database.execute("SELECT max(first + passages) FROM documents").fetchone()[0] or 1
        count = len(passages)
        number = self.database.execute(
            "INSERT INTO documents VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (entry.path, state.size, state.modified, state.read, state.digest, title,
             entry.date and entry.date.isoformat(), state.warning, state.problem, last, count),
        ).lastrowid  # fmt: skip
        place = spaced(os.path.splitext(entry.path)[0])
        self.database.executemany(
            "INSERT INTO passages(rowid, title, heading, terms, place, text, document) VALUES (?, ?, ?, ?, ?, ?, ?)",
            ((last + at, title, spaced(each.heading), spaced(each.terms), place, spaced(each.text), number)
             for at, each in enumerate(passages)),
        )  # fmt: skip
        if count:
            text = self._whole_text(last, count)
            self.database.execute("INSERT INTO pages(rowid, title, text) VALUES (?, ?, ?)", (number, title, text))

    def search(self, expression: str, *, most: int) -> list[Found]:
        """The documents that match best."""
        passages = self.database.execute(
            f"SELECT rowid, document, -rank FROM passages WHERE passages MATCH ? AND rank MATCH '{PASSAGE_WEIGHTS}' "
            f"ORDER BY rank LIMIT {PASSAGES_RANKED}", (expression,),
        ).fetchall()  # fmt: skip
        pages = self.database.execute(
            f"SELECT rowid, -rank FROM pages WHERE pages MATCH ? AND rank MATCH '{PAGE_WEIGHTS}' "
            f"ORDER BY rank LIMIT {PAGES_RANKED}", (expression,),
        ).fetchall()  # fmt: skip
        whole: dict[int, float] = dict(pages)
        scores = {row: score for row, _, score in passages}
        by_document: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for row, document, score in passages:
            beside = max(scores.get(row - 1, 0.0), scores.get(row + 1, 0.0))
            by_document[document].append((row, score + NEIGHBOUR * beside))
        found = []
        for document, rows in by_document.items():
            rows.sort(key=lambda each: -each[1])
            found.append(Found(document, rows[0][1] + WHOLE * whole.get(document, 0.0), rows))
        return sorted(found, key=lambda each: (-each.score, each.document))[:most]

    def describe(self, document: int) -> tuple[str, str, datetime.date | None] | None:
        """(title, path, date) of a document, unless it has gone."""
        row = self.database.execute("SELECT title, path, date FROM documents WHERE id = ?", (document,)).fetchone()
        return row and (unspaced(row[0]), row[1], datetime.date.fromisoformat(row[2]) if row[2] else None)

    def passages(self, document: int, rows: Sequence[int]) -> list[tuple[str, str]]:
        """(heading, text) of those of the rows that are the document's, in their order in it."""
        marks = ", ".join("?" * len(rows))
        found = self.database.execute(
            f"SELECT heading, text FROM passages WHERE rowid IN ({marks}) AND document = ? ORDER BY rowid",
            [*rows, document],
        )
        return [(unspaced(heading), unspaced(text)) for heading, text in found]


def broken(error: sqlite3.DatabaseError) -> bool:
    """Whether the index has to be built anew: it is no database, or one of other tables. What a disk, its owner or
    another process is in the way of may pass."""
    return (
        not isinstance(error, sqlite3.OperationalError)
        or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
    )


def discard(file: Path) -> None:
    """Remove a broken index; it holds nothing that is not in the documents."""
    for end in ("", "-wal", "-shm"):
        file.with_name(file.name + end).unlink(missing_ok=True)


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # SQLite has ended it by itself where the disk is full
            database.execute("ROLLBACK")
        raise
