"""Windows of tokens drawn from documents, each token knowing its place in the text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neuroweave.text.tokens import NamedText, start_tokens, token_ids_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SETTLED = 8  # the first position of a window that is measured, see extraction.py


@dataclass(frozen=True)
class Encoded:
    """A document as tokens: token i stands for `text[spans[i][0]:spans[i][1]]`."""

    document: str
    text: str
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window:
    """What one forward pass reads: `start` (a start token, or none), then tokens `begin:end` of a document."""

    encoded: Encoded
    begin: int
    end: int
    start: tuple[int, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.start, *self.encoded.token_ids[self.begin : self.end])

    def moment(self, position: int, *, before: int = 36, after: int = 24) -> dict[str, str | int]:
        """The token at `position` of the window with the text around it: characters `start:end` of `text` are it."""
        first, last = self.encoded.spans[self.begin + position - len(self.start)]
        left, right = max(0, first - before), last + after
        return {
            "token": self.encoded.text[first:last],
            "text": self.encoded.text[left:right],
            "start": first - left,
            "end": last - left,
            "document": self.encoded.document,
        }


def encode(document: NamedText, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The tokens of a document, without special ones; a tokenizer that knows no places decodes token by token."""
    if tokenizer.is_fast:
        found = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = tuple((int(first), int(last)) for first, last in found["offset_mapping"])
        return Encoded(document.name, document.text, tuple(found["input_ids"]), spans)
    ids = tuple(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"])
    pieces = [str(tokenizer.decode([token])) for token in ids]
    ends = [0, *itertools.accumulate(map(len, pieces))]
    return Encoded(document.name, "".join(pieces), ids, tuple(itertools.pairwise(ends)))


def draw_windows(
    documents: Iterable[NamedText], tokenizer: PreTrainedTokenizerBase, *, window: int, tokens: int | None, seed: int
) -> list[Window]:
    """Windows of at most `window` tokens that hold about `tokens` in all (None: the whole text), in the text's order.

    When there is more text than that, the documents are taken in an order drawn from `seed`, the first window of each
    in turn, then the second of each, and so on; documents that are not reached are not tokenized. Windows do not
    overlap. A last one shorter than half of `window` is left out, unless its document has no other.
    Raises ValueError when no window is longer than the positions that are not measured, `SETTLED`.
    """
    texts = list(documents)
    start = start_tokens(tokenizer)
    if window <= SETTLED:
        raise ValueError(
            f"a window of {window} tokens; expected more than {SETTLED}, as the first {SETTLED} are not measured"
        )
    if tokens is not None and tokens < 1:
        raise ValueError(f"{tokens} tokens of text; expected 1 or more")
    body = window - len(start)
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    encoded: dict[int, Encoded] = {}
    chosen: list[tuple[int, int]] = []
    total = 0
    for turn in itertools.count():
        reached = False
        for index in order:
            if tokens is not None and total >= tokens:
                break
            if index not in encoded:
                encoded[index] = encode(texts[index], tokenizer)
            size = min(body, len(encoded[index].token_ids) - turn * body)
            if size + len(start) > SETTLED and (turn == 0 or 2 * size >= body):
                chosen.append((index, turn))
                total += size + len(start)
                reached = True
        if not reached:
            break
    if not chosen:
        raise ValueError(f"no text to measure: {len(texts)} document(s) hold no more than {SETTLED} tokens each")
    return [
        Window(encoded[index], turn * body, min((turn + 1) * body, len(encoded[index].token_ids)), start)
        for index, turn in sorted(chosen)
    ]


def text_record(windows: Sequence[Window]) -> dict[str, object]:
    """What was read, for provenance: documents, number of tokens, SHA-256 of all ids as little-endian int64."""
    return {
        "documents": list(dict.fromkeys(window.encoded.document for window in windows)),
        "windows": len(windows),
        "tokens": sum(len(window.token_ids) for window in windows),
        "sha256": token_ids_sha256(window.token_ids for window in windows),
    }
