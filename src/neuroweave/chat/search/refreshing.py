"""Bring the index of a folder up to date: read what is new or changed, forget what has gone."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from neuroweave.chat.search.documents import KINDS, read_document
from neuroweave.chat.search.index_file import Entry, IndexFile, State
from neuroweave.chat.search.passages import passages
from neuroweave.chat.search.reading_process import ReadingProcess

# Not documents: what Sphinx keeps beside the pages that it made of them, and what programs keep for themselves.
SKIPPED = frozenset(("_sources", "_static", "_images", "node_modules", "__pycache__"))
IN_PROCESS = ("text", "markdown")  # kinds that no parser can hang on
LARGEST = 200 << 20  # bytes of a file
SECONDS = 120.0  # for one file
BATCH_SECONDS = 2.0
BATCH = 100  # documents
TIDIED = 50  # changed documents after which the index is tidied
# A file may change twice within the grain of a file system's clock: one as young as this is read again.
GRAIN = 2_000_000_000  # ns


@dataclass(frozen=True)
class Problem:
    """`read`: whether something of it is in the index all the same."""

    path: str
    reason: str
    read: bool


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did. `documents`, `passages`: in the index now."""

    index: Path
    documents: int
    passages: int
    added: int
    changed: int
    removed: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class File:
    place: str
    kind: str
    size: int
    modified: int


def refresh(folder: Path, index: IndexFile, *, progress: Callable[[int, int], None] | None = None) -> Refreshed:
    """Bring `index` up to date with `folder`. Killed in between it keeps what it has read so far.

    `progress` is called with (files looked at, files to be looked at).
    """
    closed: list[Problem] = []
    states = index.states()  # before the scan: what another process adds meanwhile has not gone
    files = dict(scan(folder, closed))
    gone = [path for path in states if path not in files]
    if gone:
        index.delete(gone)
    doubtful = [path for path, file in files.items() if path not in states or changed(file, states[path])]
    added = altered = 0
    with ReadingProcess() as reader:
        batch: list[Entry] = []
        since = time.monotonic()
        try:
            for at, path in enumerate(doubtful):
                entry = read_entry(path, files[path], states.get(path), reader)
                if entry is not None:
                    batch.append(entry)
                    added += path not in states
                    altered += path in states and entry.passages is not None
                if len(batch) >= BATCH or (batch and time.monotonic() - since > BATCH_SECONDS):
                    index.store(batch)
                    batch, since = [], time.monotonic()
                if progress is not None:
                    progress(at + 1, len(doubtful))
        finally:  # Ctrl-C
            if batch:
                index.store(batch)
    if added + altered + len(gone) >= TIDIED:
        index.tidy()
    documents, count = index.counts()
    problems = [*closed, *stored_problems(index)]
    return Refreshed(index.file, documents, count, added, altered, len(gone), tuple(problems))


def stored_problems(index: IndexFile) -> list[Problem]:
    return [
        Problem(path, state.problem or state.warning, not state.problem)
        for path, state in sorted(index.states().items())
        if state.problem or state.warning
    ]


def changed(file: File, state: State) -> bool:
    """Whether a file is to be looked at. One that could not be opened is always: who may open it is not in its time."""
    return (
        (file.size, file.modified) != (state.size, state.modified)
        or file.modified >= state.read - GRAIN
        or not state.digest
    )


def scan(folder: Path, closed: list[Problem]) -> Iterator[tuple[str, File]]:
    """(path inside the folder, file) of every document; no links, nothing hidden. Folders that cannot be opened are
    added to `closed`. Raises OSError where `folder` itself cannot be."""
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        try:
            entries = sorted(os.scandir(os.path.join(folder, inside)), key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise
            closed.append(Problem(shown(inside), f"cannot be opened ({error.strerror})", read=False))
            continue
        for entry in entries:
            with suppress(OSError):  # gone meanwhile
                path = os.path.join(inside, entry.name) if inside else entry.name
                if entry.name.startswith(".") or entry.name in SKIPPED:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                    continue
                kind = KINDS.get(os.path.splitext(entry.name)[1].lower())
                state = entry.stat(follow_symlinks=False) if kind else None
                if kind and state and stat.S_ISREG(state.st_mode):
                    yield shown(path), File(entry.path, kind, state.st_size, state.st_mtime_ns)


def shown(path: str) -> str:
    """A path as text with `/`; bytes of a name that are not UTF-8 are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace").replace(os.sep, "/")


def read_entry(path: str, file: File, known: State | None, reader: ReadingProcess) -> Entry | None:
    """The document in a file, or the reason why there is none; None where there is no such file any more."""
    state = State(file.size, file.modified, time.time_ns(), b"")
    try:
        content = file_content(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        same = known is not None and (known.digest, known.problem) == (b"", str(error))
        return Entry(path, replace(state, problem=str(error)), passages=None if same else ())
    state = replace(state, digest=hashlib.sha256(content).digest())
    if known is not None and known.digest == state.digest:
        return Entry(path, state, passages=None)
    name = os.path.splitext(os.path.basename(path))[0].replace("_", " ")
    try:
        if file.kind in IN_PROCESS:
            document = read_document(content, kind=file.kind, name=name)
        else:
            document = reader.read(content, kind=file.kind, name=name, seconds=SECONDS)
        found = passages(document)
        if not found:
            raise ValueError("no text in it")
    except ValueError as error:
        return Entry(path, replace(state, problem=str(error)))
    except Exception as error:  # one document, whatever it holds, costs the others nothing
        return Entry(path, replace(state, problem=f"cannot be read ({type(error).__name__})"))
    return Entry(path, replace(state, warning=document.warning), document.title, document.date, found)


def file_content(file: File) -> bytes:
    """Raises ValueError with the reason, or FileNotFoundError."""
    if file.size > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MB")
    try:
        return Path(file.place).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
