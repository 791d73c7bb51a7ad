"""Answers kept on disk for a while, so that asking again costs nothing and nobody.

An SQLite file of JSON, not diskcache: that is no longer kept and unpickles what it finds on disk. Keys are digests of
what was asked; nothing here ever sees a key or password of a provider.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from neuroweave.chat.search.sources import Source
from neuroweave.user_cache import user_cache

EXPIRY = 3600.0  # seconds
ENTRIES = 5_000
BUSY = 5.0  # seconds to wait for another process


class SourceCache:
    """Lists of sources by what was asked, for `expiry` seconds. One that cannot be used is no error: it is empty."""

    def __init__(
        self, file: Path | None = None, *, expiry: float = EXPIRY, clock: Callable[[], float] = time.time
    ) -> None:
        self.file = user_cache() / "search" / "answers.sqlite" if file is None else file
        self.expiry = expiry
        self.clock = clock

    def get(self, *asked: object) -> list[Source] | None:
        with contextlib.suppress(sqlite3.Error, OSError, ValueError, KeyError, TypeError), self._open() as database:
            row = database.execute(
                "SELECT sources FROM answers WHERE key = ? AND ? - kept < ? AND kept <= ?",
                (key_of(asked), self.clock(), self.expiry, self.clock()),
            ).fetchone()
            return None if row is None else [source_from(each) for each in json.loads(row[0])]
        return None

    def put(self, sources: Sequence[Source], *asked: object) -> None:
        rows = [vars(source) | {"date": source.date and source.date.isoformat()} for source in sources]
        with contextlib.suppress(sqlite3.Error, OSError, ValueError), self._open() as database:
            values = (key_of(asked), self.clock(), json.dumps(rows, ensure_ascii=False))
            database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", values)
            database.execute("DELETE FROM answers WHERE ? - kept >= ?", (self.clock(), self.expiry))
            database.execute(
                "DELETE FROM answers WHERE key NOT IN (SELECT key FROM answers ORDER BY kept DESC LIMIT ?)", (ENTRIES,)
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with contextlib.closing(self._connect()) as database, database:
                yield database
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError):  # not a database: start anew next time
                self.file.unlink(missing_ok=True)
            raise

    def _connect(self) -> sqlite3.Connection:
        with contextlib.suppress(FileExistsError):  # what people ask is their own affair
            os.close(os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        database = sqlite3.connect(self.file, timeout=BUSY)
        try:
            database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, kept REAL, sources TEXT)")
        except sqlite3.Error:
            database.close()
            raise
        return database


def key_of(asked: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([str(each) for each in asked]).encode()).hexdigest()


def source_from(row: dict[str, object]) -> Source:
    date = row["date"]
    found = datetime.date.fromisoformat(str(date)) if date else None
    return Source(str(row["title"]), str(row["address"]), str(row["text"]), found, float(str(row["score"])))
