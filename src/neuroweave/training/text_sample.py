"""A bounded sample of text for training a tokenizer: the same text gives the same sample."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from neuroweave.training.document_reading import DocumentReader
from neuroweave.training.sources import Source

CHUNK = 2_000  # characters that sentencepiece gets as one sentence, about
DEFAULT_SAMPLE_BYTES = 100_000_000
_WITHOUT_TEMPLATE: Any = SimpleNamespace(chat_template=None, bos_token=None, eos_token=None)  # chats in the plain form


@dataclass(frozen=True)
class TextSample:
    """`chunks` of text in their order; `read`: bytes of UTF-8 that were seen, `used`: those of the chunks."""

    chunks: list[str]
    documents: int
    read: int
    used: int


def sample_text(
    sources: Sequence[Source], *, limit: int = DEFAULT_SAMPLE_BYTES, progress: Callable[[int], None] | None = None
) -> TextSample:
    """The documents of all sources in chunks, or, where they are more than `limit` bytes, chunks drawn evenly.

    Memory is bounded by `limit`. `progress` is called with bytes read. Raises ValueError for sources that cannot be
    read or are empty.
    """
    documents = read = used = 0
    kept: dict[int, str] = {}
    by_draw: list[tuple[int, int, int]] = []  # (-draw, number, bytes): the largest draw leaves first
    bound = 1 << 64
    number = 0
    for document in _documents(sources):
        documents += 1
        for chunk in cut_chunks(document):
            size = len(chunk.encode("utf-8"))
            read += size
            if progress is not None:
                progress(size)
            if (draw := _draw(number)) < bound:
                kept[number] = chunk
                heapq.heappush(by_draw, (-draw, number, size))
                used += size
            while used > limit and len(by_draw) > 1:
                worst, left_out, left_size = heapq.heappop(by_draw)
                bound = -worst
                used -= left_size
                del kept[left_out]
            number += 1
    return TextSample([kept[each] for each in sorted(kept)], documents, read, used)


def cut_chunks(text: str) -> Iterator[str]:
    """`text` in pieces of at most `CHUNK` characters, which joined are the text; cut before a space or after a line."""
    start = 0
    while len(text) - start > CHUNK:
        end = text.rfind(" ", start + CHUNK // 2, start + CHUNK)
        if end < 0:
            end = text.rfind("\n", start + CHUNK // 2, start + CHUNK) + 1
        if end <= start:
            end = start + CHUNK
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _documents(sources: Iterable[Source]) -> Iterator[str]:
    for source in sources:
        reader = DocumentReader(source, _WITHOUT_TEMPLATE)
        try:
            for document in reader:
                yield document.text
        finally:
            reader.close()


def _draw(number: int) -> int:
    """64 bits that depend on the chunk's place alone."""
    return int.from_bytes(hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest(), "little")
