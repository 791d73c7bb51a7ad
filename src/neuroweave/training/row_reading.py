"""The rows of one file, one after another, in bounded memory: plain text, JSON lines, parquet; and of a hub dataset.

Each reader takes the rows to skip and yields a row, a mapping of columns, with the bytes of the file that were read.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from neuroweave.text.passages import cut, nearest
from neuroweave.text.reading import read_text
from neuroweave.training.sources import FileKind, Source

Row = Mapping[str, Any]
Rows = Iterator[tuple[Row, int]]

PIECE = 500_000  # characters of the longest documents, about: some 125,000 tokens, beyond any row that is trained on
TEXT = "text"  # the column of a row of a plain text file
_BLOCK = 1 << 20  # bytes
_PARQUET_ROWS = 256  # at a time


def text_rows(file: Path, columns: tuple[str, ...], skip: int) -> Rows:
    """The whole file as one row; a file of more than about `PIECE` characters as several, cut at blank lines."""
    size = file.stat().st_size
    if size <= PIECE:
        pieces: Iterator[tuple[str, int]] = iter([(read_text(file), size)])
    else:
        pieces = _large_text(file)
    for number, (piece, done) in enumerate(pieces):
        if number >= skip:
            yield {TEXT: piece}, done


def _large_text(file: Path) -> Iterator[tuple[str, int]]:
    """`text.read_text` in blocks: the same line ends, byte order mark and refusals."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    kept, done, found = "", 0, False
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK):
            if b"\0" in block:
                raise ValueError(f"{file}: a binary file (it holds NUL bytes); give plain text, saved as UTF-8")
            waiting = len(decoder.getstate()[0])
            try:
                kept += lines.decode(block, final=False)
            except UnicodeDecodeError as error:
                place = done - waiting + error.start
                raise ValueError(f"{file}: not UTF-8 text (near byte {place}); save it as UTF-8") from error
            done += len(block)
            while len(kept) >= 2 * PIECE:
                end, following = nearest(kept, float(PIECE), PIECE / 4)
                if kept[:end].strip():
                    found = True
                    yield kept[:end], done
                kept = kept[following:]
    try:
        kept += lines.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (it ends within a character); save it as UTF-8") from error
    if not found and not kept.strip():
        raise ValueError(f"{file}: empty; give a file that has text in it")
    for piece in cut(kept, size=PIECE):
        yield piece, done


def jsonl_rows(file: Path, columns: tuple[str, ...], skip: int) -> Rows:
    """One object a line; blank lines do not count. Raises ValueError for a line that is not an object."""
    with file.open("rb") as raw:
        lines: Any = gzip.GzipFile(fileobj=raw) if file.name.lower().endswith(".gz") else raw
        number = 0
        try:
            for at, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                number += 1
                if number > skip:
                    yield _json_row(file, at, line), raw.tell()
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{file}: a damaged gzip file ({error}); get it again") from error


def _json_row(file: Path, at: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, line {at}: not JSON ({error}); one object a line was expected") from None
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {at}: a JSON {type(row).__name__}; one object a line was expected")
    return row


def parquet_rows(file: Path, columns: tuple[str, ...], skip: int) -> Rows:
    """Only `columns` are read, some rows at a time; a file that has none of them gives its first row as it is."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{file}: reading parquet needs pyarrow: pip install 'neuroweave[train]'") from error
    size = file.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
            present = [name for name in columns if name in table.schema_arrow.names]
            rows = table.metadata.num_rows
            if not present:
                empty = dict.fromkeys(table.schema_arrow.names)
                yield from ((empty, size * (number + 1) // rows) for number in range(skip, rows))
                return
            number = 0
            groups: list[int] = []
            for group in range(table.num_row_groups):
                size_of_group = table.metadata.row_group(group).num_rows
                if groups or number + size_of_group > skip:
                    groups.append(group)
                else:
                    number += size_of_group
            other = dict.fromkeys(name for name in table.schema_arrow.names if name not in present)
            for batch in table.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=present):
                for row in batch.to_pylist():
                    number += 1
                    if number > skip:
                        yield other | row, size * number // rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: cannot be read as parquet ({error})") from error


FILE_ROWS: dict[FileKind, Callable[[Path, tuple[str, ...], int], Rows]] = {
    "text": text_rows,
    "jsonl": jsonl_rows,
    "parquet": parquet_rows,
}


class FileRows:
    """The rows of `files`, one file after another. `position()` is where the next row stands."""

    def __init__(
        self, files: list[Path], kind: FileKind, columns: tuple[str, ...], *, position: dict[str, Any] | None
    ) -> None:
        self.files, self.kind, self.columns = files, kind, columns
        self._file, self._row = (0, 0) if position is None else (int(position["file"]), int(position["row"]))
        self._sizes = [file.stat().st_size for file in files]
        self._rows: Rows | None = None
        self.bytes_read, self.bytes_in_all = sum(self._sizes[: self._file]), sum(self._sizes)

    def __iter__(self) -> FileRows:
        return self

    def __next__(self) -> Row:
        while self._file < len(self.files):
            if self._rows is None:
                self._rows = FILE_ROWS[self.kind](self.files[self._file], self.columns, self._row)
            found = next(self._rows, None)
            before = sum(self._sizes[: self._file])
            if found is not None:
                self._row += 1
                self.bytes_read = before + found[1]
                return found[0]
            self.bytes_read = before + self._sizes[self._file]
            self._file, self._row, self._rows = self._file + 1, 0, None
        raise StopIteration

    def position(self) -> dict[str, Any]:
        """JSON values."""
        return {"file": self._file, "row": self._row}

    def close(self) -> None:
        """Close the file that is open."""
        if self._rows is not None:
            self._rows.close()  # type: ignore[attr-defined]
            self._rows = None


class HubRows:
    """The rows of a hub dataset as they stream in. `position()` is where the next row stands."""

    def __init__(self, source: Source, *, position: dict[str, Any] | None) -> None:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(f"{source.path}: reading it needs datasets: pip install 'neuroweave[train]'") from error
        try:
            dataset = load_dataset(
                source.path,
                name=source.config,
                split=source.split,
                revision=source.revision,
                data_files=list(source.data_files) if source.data_files else None,
                streaming=True,
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source.path}: no such file or folder here, and as a dataset of the hub it cannot be opened ({error})"
            ) from error
        names = dataset.column_names
        if names is not None:
            present = [name for name in source.columns if name in names]
            if not present:
                raise ValueError(missing_columns(source, names))
            dataset = dataset.select_columns(present)
        self._dataset = dataset
        if position is not None:
            dataset.load_state_dict(position)
        self._rows = iter(dataset)
        self.bytes_read = self.bytes_in_all = 0  # not known

    def __iter__(self) -> HubRows:
        return self

    def __next__(self) -> Row:
        return next(self._rows)

    def position(self) -> dict[str, Any]:
        """JSON values."""
        return self._dataset.state_dict()

    def close(self) -> None:
        """Close the connection."""
        if hasattr(self._rows, "close"):
            self._rows.close()


def missing_columns(source: Source, columns: list[str]) -> str:
    """What to say when no row has what is needed."""
    needed = "query, synthetic_reasoning and synthetic_answer" if source.chat == "synth" else source.columns[0]
    advice = "leave out chat: synth for other data" if source.chat == "synth" else "name one with field:"
    return f"{source.path}: no row has a usable {needed}; the columns are {', '.join(columns) or 'none'}; {advice}"
