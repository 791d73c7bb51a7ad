"""The files of a token store: what `store.json` says, and the arrays, written as they grow.

```
store.json                            what is in it, and what it was made from
tokens-00000.npy, tokens-00001.npy    token ids, uint16 or uint32, `shard_tokens` in every shard but the last
documents.npy                         where each document ends, int64
held_out/                             the same arrays, for the documents that are held out
```
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from pydantic import BaseModel, ConfigDict

from neuroweave.training.document_reading import is_held_out

VERSION = 1
RECORD, DOCUMENTS, HELD_OUT = "store.json", "documents.npy", "held_out"
SHARD_TOKENS = 1 << 28  # 0.5 or 1 GiB


class FileRecord(BaseModel):
    """A file that was read. `modified`: in nanoseconds; while it and the size stay, the hash is not computed again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    modified: int
    sha256: str


class SourceRecord(BaseModel):
    """A source: its settings, files, rows read, and rows dropped by their reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    files: tuple[FileRecord, ...]
    rows: int
    dropped: dict[str, int]


class PartRecord(BaseModel):
    """The training part, or the held-out part; `source_*` in the order of the sources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    documents: int
    largest_token: int
    source_tokens: tuple[int, ...]
    source_documents: tuple[int, ...]


class TokenizerRecord(BaseModel):
    """The tokenizer that made the ids; `sha256` covers what decides them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    chats: bool


class StoreRecord(BaseModel):
    """What `store.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    fingerprint: str
    tokenizer: TokenizerRecord
    end_of_document: bool
    held_out_fraction: float
    dtype: str
    shard_tokens: int
    sources: tuple[SourceRecord, ...]
    training: PartRecord
    held_out: PartRecord | None


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"tokens-{number:05d}.npy"


class GrowingArray:
    """A one-dimensional .npy file that is appended to; its length is written into the header at the end."""

    def __init__(self, file: Path, dtype: np.dtype) -> None:
        self.dtype, self.length = dtype.newbyteorder("<"), 0
        self._handle: IO[bytes] = file.open("wb", buffering=1 << 20)
        self._write_header()
        self._start = self._handle.tell()

    def append(self, values: np.ndarray) -> None:
        """`values` behind what is there."""
        self._handle.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.length += len(values)

    def finish(self) -> None:
        """Write the length and close."""
        self._handle.seek(0)
        self._write_header()
        if self._handle.tell() != self._start:  # NumPy leaves room for any length in a header
            raise RuntimeError("the header of a growing .npy file has changed its size")
        self._handle.close()

    def close(self) -> None:
        """Close the file as it is: the folder that it lies in will be removed."""
        self._handle.close()

    def _write_header(self) -> None:
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        npy.write_array_header_1_0(self._handle, header)


class PartWriter:
    """The arrays of one part, written into `folder`."""

    def __init__(self, folder: Path, dtype: np.dtype, *, sources: int, shard_tokens: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._ends = GrowingArray(folder / DOCUMENTS, np.dtype(np.int64))
        self._shard: GrowingArray | None = None
        self._shards = 0
        self._largest = -1
        self._tokens, self._documents = [0] * sources, [0] * sources

    @property
    def documents(self) -> int:
        """Written so far."""
        return sum(self._documents)

    def append(self, token_ids: np.ndarray, *, source: int) -> None:
        """One document of the source numbered `source`."""
        self._tokens[source] += len(token_ids)
        self._documents[source] += 1
        self._ends.append(np.array([sum(self._tokens)]))
        self._largest = max(self._largest, int(token_ids.max()))
        while len(token_ids):
            if self._shard is None or self._shard.length == self._shard_tokens:
                self._next_shard()
            assert self._shard is not None
            room = self._shard_tokens - self._shard.length
            self._shard.append(token_ids[:room])
            token_ids = token_ids[room:]

    def _next_shard(self) -> None:
        if self._shard is not None:
            self._shard.finish()
        self._shard = GrowingArray(self._folder / shard_name(self._shards), self._dtype)
        self._shards += 1

    def finish(self) -> PartRecord:
        """Close the files, and say what is in them."""
        if self._shard is not None:
            self._shard.finish()
        self._ends.finish()
        return PartRecord(
            tokens=sum(self._tokens),
            documents=self.documents,
            largest_token=self._largest,
            source_tokens=tuple(self._tokens),
            source_documents=tuple(self._documents),
        )

    def close(self) -> None:
        """Close what is open, after an error."""
        self._ends.close()
        if self._shard is not None:
            self._shard.close()


class StoreWriter:
    """Both parts of a store in a new folder; a document is held out by its key."""

    def __init__(self, folder: Path, dtype: np.dtype, *, held_out: float, sources: int, shard_tokens: int) -> None:
        self._fraction = held_out
        self._training = PartWriter(folder, dtype, sources=sources, shard_tokens=shard_tokens)
        self._held_out: PartWriter | None = None
        if held_out:
            self._held_out = PartWriter(folder / HELD_OUT, dtype, sources=sources, shard_tokens=shard_tokens)

    def append(self, token_ids: np.ndarray, *, key: int, source: int) -> None:
        """One document, which has at least one token."""
        chosen = self._held_out is not None and is_held_out(key, self._fraction)
        part = self._held_out if chosen and self._held_out is not None else self._training
        part.append(token_ids, source=source)

    def finish(self) -> tuple[PartRecord, PartRecord | None]:
        """Close all files. Raises ValueError when one of the parts has no document."""
        training, held_out = self._training.finish(), self._held_out.finish() if self._held_out else None
        for name, part in (("held-out", held_out), ("training", training)):
            if part is not None and not part.documents:
                total = training.documents + (held_out.documents if held_out else 0)
                raise ValueError(
                    f"held_out {self._fraction} of {total} documents leaves none in the {name} part; "
                    "give more documents (a plain text file is one), or another fraction"
                )
        return training, held_out

    def close(self) -> None:
        """Close what is open, after an error."""
        self._training.close()
        if self._held_out is not None:
            self._held_out.close()
