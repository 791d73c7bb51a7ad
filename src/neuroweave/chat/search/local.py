"""The provider that is always there: a folder of documents, with an index beside them. No network."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from neuroweave.chat.search.documents import KINDS
from neuroweave.chat.search.index_file import Found, IndexFile, broken, discard, index_place
from neuroweave.chat.search.queries import match_expression
from neuroweave.chat.search.refreshing import Refreshed, refresh
from neuroweave.chat.search.sources import SearchError, Source, alike, shingles

PASSAGES = 3  # of a document in one source
NEAR = 0.5  # of the best passage's score that the others must have
SPARE = 2  # documents looked at for each that is wanted: some say the same
REST = 2.0  # seconds between looks at the folder
SHARE = 20  # looking takes at most one part in so many of the time


class LocalFolder:
    """Documents in a folder: text, Markdown, HTML, PDF. The index follows the folder by itself. Threads may share it.

    `address` of a source is the document's path inside the folder. Raises ValueError where there is no such folder.
    """

    def __init__(self, folder: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.name = f"local:{folder}"
        if not str(folder) or not self.folder.is_dir():
            found = "a file" if self.folder.exists() else "no such folder"
            raise ValueError(f"{folder}: {found}; give a folder of {endings()} files")
        self._clock = clock
        self._next = 0.0
        self._turn = threading.Lock()

    def __repr__(self) -> str:
        return f"LocalFolder({str(self.folder)!r})"

    def refresh(self, *, progress: Callable[[int, int], None] | None = None) -> Refreshed:
        """Bring the index up to date. Raises SearchError where that cannot be done, or nothing is there to search."""
        with self._turn:
            done = self._refresh(progress)
        if not done.documents and not done.problems:
            discard(done.index)
            raise SearchError(f"{self.folder}: nothing to search; put {endings()} files into it")
        return done

    def search(self, query: str, *, count: int) -> list[Source]:
        """The documents that answer a question best, each with its best passages, after a look at what has changed."""
        expression = match_expression(query)
        if not expression or count < 1:
            return []
        if not self.folder.is_dir():
            raise SearchError(f"{self.folder}: the folder has gone")
        with self._turn:
            if self._clock() >= self._next and not self._refresh(None).documents:
                self._next = 0.0
                raise SearchError(f"{self.folder}: nothing to search; neuroweave index tells why")
        try:
            return self._ask(expression, count)
        except sqlite3.DatabaseError as error:
            if not broken(error):
                raise SearchError(f"{self.folder}: the index cannot be read ({error})") from error
            with self._turn:
                discard(index_place(self.folder))
                self._refresh(None)
            return self._ask(expression, count)

    def _ask(self, expression: str, count: int) -> list[Source]:
        with IndexFile(index_place(self.folder)) as index:
            if index.new:  # what was there was broken, or has gone
                with self._turn:
                    self._refresh(None)
            return sources_of(index, index.search(expression, most=SPARE * count), count)

    def _refresh(self, progress: Callable[[int, int], None] | None, *, again: bool = True) -> Refreshed:
        start = self._clock()
        place = index_place(self.folder)
        try:
            with IndexFile(place) as index:
                done = refresh(self.folder, index, progress=progress)
        except OSError as error:
            raise SearchError(f"{self.folder}: cannot be read ({error.strerror or error})") from error
        except sqlite3.Error as error:
            if again and isinstance(error, sqlite3.DatabaseError) and broken(error):
                discard(place)
                return self._refresh(progress, again=False)
            raise SearchError(f"{self.folder}: the index cannot be written ({error})") from error
        end = self._clock()
        self._next = end + max(REST, SHARE * (end - start))
        return done


def endings() -> str:
    *most, last = KINDS
    return f"{', '.join(most)} or {last}"


def sources_of(index: IndexFile, found: list[Found], count: int) -> list[Source]:
    """The first `count` of the documents whose passages do not say what a better one's say."""
    sources: list[Source] = []
    texts: list[frozenset[str]] = []
    for document in found:
        described = index.describe(document.document)
        text = excerpt(index.passages(document.document, rows_read(document.passages)))
        shingled = shingles(text)
        if described is None or any(alike(shingled, other) for other in texts):
            continue
        title, path, date = described
        texts.append(shingled)
        sources.append(Source(title, path, text, date, float(f"{document.score:.6g}")))
        if len(sources) == count:
            break
    return sources


def rows_read(passages: list[tuple[int, float]]) -> list[int]:
    """The best passages of a document, and what stands before and behind the best: answers often run on."""
    best, score = passages[0]
    return [best - 1, best + 1, *(row for row, other in passages[:PASSAGES] if other >= NEAR * score)]


def excerpt(passages: list[tuple[str, str]]) -> str:
    """Passages in reading order, each under its heading."""
    parts: list[str] = []
    last = ""
    for heading, text in passages:
        if heading and heading != last:
            parts.append(heading)
        last = heading
        parts.append(text)
    return "\n\n".join(part for part in parts if part)
