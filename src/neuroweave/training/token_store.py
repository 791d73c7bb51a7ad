"""The token ids of a corpus in a folder: made once, then read by index from the disk, by any number of processes."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64
from pydantic import ValidationError

from neuroweave.checkpoint.staging import staged_folder
from neuroweave.training.document_reading import DocumentReader
from neuroweave.training.document_tokens import DocumentTokens, batches, largest_id, tokenizer_name, tokenizer_sha256
from neuroweave.training.packing import ends_between
from neuroweave.training.sources import Source, file_sha256, shipped_texts, source_files, source_kind
from neuroweave.training.store_files import (
    DOCUMENTS,
    HELD_OUT,
    RECORD,
    SHARD_TOKENS,
    VERSION,
    FileRecord,
    SourceRecord,
    StoreRecord,
    StoreWriter,
    TokenizerRecord,
    shard_name,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Listed = tuple[Source, list[Path]]
Progress = Callable[[int, Any], None]  # done, and in all or None: `progress.follow(bar)`
NO_TOKENS = "no tokens in it"  # the reason of a row that the tokenizer makes nothing of


class TokenStore:
    """The documents of a store one after another; `held_out` is the store of those that were held out, or None.

    Memory-mapped: opening takes no memory, and a copy that is sent to another process is its path alone.
    """

    def __init__(self, folder: Path, record: StoreRecord, *, held_out: bool = False) -> None:
        part = record.held_out if held_out else record.training
        if part is None:
            raise ValueError(f"{folder}: this store holds nothing out")
        self.folder, self.record, self._is_held_out = folder, record, held_out
        self.tokens, self.documents, self.largest_token = part.tokens, part.documents, part.largest_token
        self.source_tokens = part.source_tokens
        place = folder / HELD_OUT if held_out else folder
        self._ends = _mapped(place / DOCUMENTS, part.documents, "int64")
        sizes = [min(record.shard_tokens, part.tokens - at) for at in range(0, part.tokens, record.shard_tokens)]
        self._shards = [_mapped(place / shard_name(at), size, record.dtype) for at, size in enumerate(sizes)]
        self.held_out = TokenStore(folder, record, held_out=True) if record.held_out and not held_out else None

    @classmethod
    def open(cls, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None) -> TokenStore:
        """The store in `folder`.

        Raises ValueError for a folder that is none, a damaged one, and one that was not made with `tokenizer`.
        """
        folder = Path(folder)
        try:
            record = StoreRecord.model_validate_json((folder / RECORD).read_bytes())
        except (OSError, ValidationError) as error:
            raise ValueError(f"{folder}: not a token store of version {VERSION}; build it again") from error
        if record.version != VERSION:
            raise ValueError(f"{folder}: a token store of version {record.version}, not {VERSION}; build it again")
        if tokenizer is not None:
            made = record.tokenizer
            given = tokenizer_sha256(tokenizer, chats=made.chats)
            if given != made.sha256:
                raise ValueError(
                    f"{folder}: made with the tokenizer {made.name} ({made.sha256[:12]}), not with "
                    f"{tokenizer_name(tokenizer)} ({given[:12]}); build the store again with this one"
                )
        return cls(folder, record)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows of all sources that gave no document, by the reason."""
        counts: dict[str, int] = {}
        for source in self.record.sources:
            for reason, count in source.dropped.items():
                counts[reason] = counts.get(reason, 0) + count
        return counts

    def tokens_at(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of all documents, as they are stored (uint16 or uint32)."""
        if not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"tokens {start} to {stop} of a store of {self.tokens}")
        size = self.record.shard_tokens
        parts = [
            self._shards[shard][max(0, start - shard * size) : stop - shard * size]
            for shard in range(start // size, -(-stop // size))
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.record.dtype)

    def starts_between(self, start: int, stop: int) -> Int64[np.ndarray, " documents"]:
        """Where documents begin after token `start` and before token `stop`."""
        return ends_between(self._ends, start, stop)

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError when the store holds a token id that a model with `size` embedding rows does not know."""
        largest = max(self.largest_token, self.held_out.largest_token if self.held_out else -1)
        if largest >= size:
            raise ValueError(
                f"{self.folder}: holds token id {largest}, the model's vocabulary ends at {size - 1}; the tokenizer "
                f"{self.record.tokenizer.name} does not match the model: use the model's own, or add the tokens to it"
            )

    def __reduce__(self) -> tuple:
        return _reopened, (str(self.folder), self._is_held_out)


def _reopened(folder: str, held_out: bool) -> TokenStore:
    store = TokenStore.open(folder)
    return store.held_out or store if held_out else store


def _mapped(file: Path, length: int, dtype: str) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r" if length else None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: missing or damaged ({error}); build the store again") from error
    if array.shape != (length,) or array.dtype != dtype:
        raise ValueError(
            f"{file}: {array.shape} {array.dtype}, ({length},) {dtype} was expected; build the store again"
        )
    return array


def build_store(
    folder: str | Path,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_of_document: bool = True,
    held_out: float = 0.0,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """Tokenise `sources` into `folder`, or open what an earlier run made of the same sources, tokenizer and options.

    `held_out`: the fraction of documents, chosen by a hash of their text, that goes into a part of its own. A store of
    other sources or another tokenizer is replaced; any other folder with files in it is refused. `progress` is told
    bytes done and bytes in all (characters and None where a source has no files). For one process at a time: the others
    wait, and open it.
    Raises ValueError for sources that cannot be read or give no document, a part without a document, a full disk.
    """
    if not sources:
        raise ValueError("no sources were given; name at least one under data.sources")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out {held_out}: a fraction of the documents was expected, 0 or more and below 1")
    folder = Path(folder)
    chats = any(source.chat is not None for source in sources)
    made_by = TokenizerRecord(
        name=tokenizer_name(tokenizer), sha256=tokenizer_sha256(tokenizer, chats=chats), chats=chats
    )
    listed = [(source, source_files(source, source_kind(source))) for source in sources]
    fingerprint = _fingerprint(listed, made_by.sha256, end_of_document, held_out, shard_tokens)
    if (found := _made_before(folder, fingerprint, listed)) is not None:
        return found
    encoder = DocumentTokens(tokenizer, end_of_document=end_of_document)
    dtype = np.dtype(np.uint16 if largest_id(tokenizer) < 2**16 else np.uint32)
    inputs = [file for _, files in listed for file in files]
    try:
        with staged_folder(folder, overwrite=(folder / RECORD).is_file(), sources=inputs) as staging:
            writer = StoreWriter(staging, dtype, held_out=held_out, sources=len(sources), shard_tokens=shard_tokens)
            with closing(writer):
                tell = _Told(progress, listed)
                read = [
                    _read_source(number, source, files, writer, encoder, tokenizer, tell)
                    for number, (source, files) in enumerate(listed)
                ]
                training, kept = writer.finish()
            record = StoreRecord(
                version=VERSION,
                fingerprint=fingerprint,
                tokenizer=made_by,
                end_of_document=end_of_document,
                held_out_fraction=held_out,
                dtype=dtype.name,
                shard_tokens=shard_tokens,
                sources=tuple(read),
                training=training,
                held_out=kept,
            )
            (staging / RECORD).write_text(record.model_dump_json(indent=1), encoding="utf-8")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(f"{folder}: the disk is full, no store was made; make room or use another disk") from error
    return TokenStore.open(folder)


class _Told:
    """How far the reading is: bytes of files, and characters of what has no file."""

    def __init__(self, progress: Progress | None, listed: Sequence[Listed]) -> None:
        self._progress, self._before = progress, 0
        self._total = sum(file.stat().st_size for _, files in listed for file in files)
        self._known = all(files for _, files in listed)

    def at(self, done: int) -> None:
        """`done` of the source that is being read."""
        if self._progress is not None:
            self._progress(self._before + done, self._total if self._known else None)

    def finish(self, done: int) -> None:
        """The source is read."""
        self._before += done


def _read_source(
    number: int,
    source: Source,
    files: list[Path],
    writer: StoreWriter,
    encoder: DocumentTokens,
    tokenizer: PreTrainedTokenizerBase,
    tell: _Told,
) -> SourceRecord:
    reader = DocumentReader(source, tokenizer)
    characters, written = 0, 0
    with closing(reader):
        for batch in batches(reader):
            for document, token_ids in zip(batch, encoder.encode(batch), strict=True):
                characters += len(document.text)
                if len(token_ids):
                    writer.append(token_ids, key=document.key, source=number)
                    written += 1
                else:
                    reader.dropped[NO_TOKENS] += 1
            tell.at(reader.bytes_read if files else characters)
        tell.finish(reader.bytes_read if files else characters)
    if not written:
        raise ValueError(
            f"{source.path}: the tokenizer {tokenizer_name(tokenizer)} makes no tokens of this text; "
            "choose a tokenizer that knows its characters"
        )
    return SourceRecord(
        settings=_settings(source),
        files=tuple(_file_record(file) for file in files),
        rows=reader.rows,
        dropped=dict(reader.dropped),
    )


def _settings(source: Source) -> dict:
    """What decides its documents: how often a run passes over it does not."""
    settings = source.model_dump(exclude={"weight"}, mode="json")
    if source_kind(source) == "shipped":
        settings["sha256"] = hashlib.sha256("\0".join(shipped_texts(source)).encode("utf-8")).hexdigest()
    return settings


def _file_record(file: Path) -> FileRecord:
    state = file.stat()
    return FileRecord(path=str(file), size=state.st_size, modified=state.st_mtime_ns, sha256=file_sha256(file))


def _fingerprint(listed: Sequence[Listed], *options: object) -> str:
    """Of the settings, the names and sizes of the files, and the options."""
    described = [[_settings(source), [[str(file), file.stat().st_size] for file in files]] for source, files in listed]
    return hashlib.sha256(json.dumps([VERSION, described, options]).encode("utf-8")).hexdigest()


def _made_before(folder: Path, fingerprint: str, listed: Sequence[Listed]) -> TokenStore | None:
    """The store in `folder`, if it is whole, has this fingerprint, and its files are as they were."""
    try:
        store = TokenStore.open(folder)
    except ValueError:
        return None
    if store.record.fingerprint != fingerprint:
        return None
    for (_, files), source in zip(listed, store.record.sources, strict=True):
        for file, record in zip(files, source.files, strict=True):
            if file.stat().st_mtime_ns != record.modified and file_sha256(file) != record.sha256:
                return None
    return store
