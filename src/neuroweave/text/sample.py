"""From documents to the windows of tokens that are measured, each knowing the passage it came from.

A *passage* is the unit that the bootstrap draws: a whole document, or, of a longer one, a piece of about `passage`
characters (`neuroweave.text.passages.cut`). A *window* is what one forward pass reads: the start token
where the tokenizer uses one, then up to `window` tokens in all. Windows do not overlap and never cross passages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from neuroweave.text.passages import cut
from neuroweave.text.tokens import NamedText, start_tokens, token_ids_sha256

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Passage:
    """A unit of text; `document` is the name of the document it was cut from."""

    document: str
    text: str


@dataclass(frozen=True)
class Window:
    """Token ids of one forward pass; `unit` counts the passages that are in use, from 0."""

    unit: int
    token_ids: tuple[int, ...]

    @property
    def predictions(self) -> int:
        """Tokens that have a token before them, so that they can be predicted."""
        return len(self.token_ids) - 1


@dataclass(frozen=True)
class Sample:
    """The text of one comparison: the windows in the order of the text, and the passages they are from."""

    windows: tuple[Window, ...]
    passages: tuple[Passage, ...]
    start_token: bool
    exhausted: bool  # the documents held less than what was asked for

    @property
    def predictions(self) -> int:
        return sum(window.predictions for window in self.windows)

    @property
    def documents(self) -> list[str]:
        return list(dict.fromkeys(passage.document for passage in self.passages))

    @property
    def sha256(self) -> str:
        """`token_ids_sha256` of the windows."""
        return token_ids_sha256(window.token_ids for window in self.windows)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Token ids of `text`, with the tokenizer's special tokens around it if `special`."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def cut_windows(token_ids: Sequence[int], *, start: Sequence[int], window: int) -> list[tuple[int, ...]]:
    """Windows of `window` tokens, `start` included; a last one that is shorter counts if at least half full.

    A text shorter than a window is one window. What holds no token to predict is left out.
    """
    body = window - len(start)
    pieces = [token_ids[at : at + body] for at in range(0, len(token_ids), body)]
    if len(pieces) > 1 and len(pieces[-1]) < body / 2:
        pieces.pop()
    return [(*start, *piece) for piece in pieces if len(start) + len(piece) >= 2]


def draw_sample(
    documents: Iterable[NamedText],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    window: int,
    passage: int,
) -> Sample:
    """About `tokens` tokens in windows, spread over as many passages as there are: the first window of each passage
    in turn, passages taken evenly from the whole text, then the second window of each, and so on. No randomness.

    Only the passages that are used are tokenized. Raises ValueError when there is no text to measure.
    """
    names: list[str] = []
    passages: list[Passage] = []
    for document in documents:
        names.append(document.name)
        passages.extend(Passage(document.name, text) for text in cut(document.text, size=passage))
    start = start_tokens(tokenizer)
    if window < len(start) + 1:
        raise ValueError(f"a window of {window} tokens holds nothing but the start token; give a larger one")

    pieces: dict[int, list[tuple[int, ...]]] = {}
    chosen: list[tuple[int, int]] = []
    total = 0
    evenly = sorted(range(len(passages)), key=lambda index: index * GOLDEN % 1)
    for turn in itertools.count():
        more = False
        for index in evenly:
            if total >= tokens:
                break
            if index not in pieces:
                pieces[index] = cut_windows(encode(tokenizer, passages[index].text), start=start, window=window)
            if turn < len(pieces[index]):
                chosen.append((index, turn))
                total += len(pieces[index][turn])
                more = True
        if total >= tokens or not more:
            break
    if not chosen:
        raise ValueError(
            f"no text to measure: {len(names)} document(s) hold fewer than two tokens together; give more text"
        )
    used = sorted({index for index, _ in chosen})
    units = {index: unit for unit, index in enumerate(used)}
    windows = tuple(Window(units[index], pieces[index][turn]) for index, turn in sorted(chosen))
    return Sample(windows, tuple(passages[index] for index in used), bool(start), total < tokens)
