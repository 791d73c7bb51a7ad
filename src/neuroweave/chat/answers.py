"""From tokens to an answer's text as it comes: whole characters, stop strings, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from neuroweave.runtime.batching import Token
from neuroweave.runtime.writing import Stream


@dataclass(frozen=True)
class TokenText:
    """A token as a person sees it, its log-probability, and the best few in its place. None: it is the first of all."""

    text: str
    logprob: float | None
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that came, the tokens it came with, and why it is the last: "stop", "length"; None: it is not."""

    text: str
    tokens: tuple[TokenText, ...] = ()
    last: str | None = None


@dataclass(eq=False)
class Assembly:
    """Tokens in, pieces out. A text that may turn out to begin a stop string is held back until it is known."""

    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[str] = ()
    told: bool = False  # whether pieces carry their tokens
    prompt: Sequence[int] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""  # all that was given out
    held: str = ""
    waiting: list[TokenText] = field(default_factory=list)
    stream: Any = None

    def __post_init__(self) -> None:
        self.fresh: list[str] = []
        self.stream = Stream(self.tokenizer, self.fresh.append)
        self.stream.put(torch.tensor(list(self.prompt), dtype=torch.long))

    def put(self, token: Token) -> Piece | None:
        """The piece that the token completes, if any. After one with `last` there must be no other token."""
        if self.told:
            self.waiting.append(self._told(token))
        self.ids.append(token.id)
        self.stream.put(torch.tensor([token.id]))
        if token.last:
            self.stream.end()
        self.held += "".join(self.fresh)
        self.fresh.clear()
        place, stop = first_stop(self.held, self.stops)
        if stop is not None:
            return self._give(place, "stop")
        if token.last:
            return self._give(len(self.held), token.last)
        return self._give(len(self.held) - begun(self.held, self.stops), None)

    def _give(self, length: int, last: str | None) -> Piece | None:
        text, self.held = self.held[:length], "" if last else self.held[length:]
        if not text and not last:
            return None
        self.text += text
        tokens, self.waiting = tuple(self.waiting), []
        return Piece(text, tokens, last)

    def _told(self, token: Token) -> TokenText:
        before = self.ids[-1:] or list(self.prompt[-1:])
        best = tuple((shown(self.tokenizer, before, id), logprob) for id, logprob in token.likeliest)
        return TokenText(shown(self.tokenizer, before, token.id), token.logprob, best)


def shown(tokenizer: PreTrainedTokenizerBase, before: list[int], id: int) -> str:
    """What a token adds to the one before: decoders of the Llama 2 kind strip a space from what comes alone."""
    decode: Any = tokenizer.decode
    start = decode(before, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return decode([*before, id], skip_special_tokens=False, clean_up_tokenization_spaces=False)[len(start) :]


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str | None]:
    """Where the first of the stop strings begins, and which."""
    found = [(place, stop) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found) if found else (len(text), None)


def begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    lengths = (length for stop in stops for length in range(min(len(stop) - 1, len(text)), 0, -1))
    return max((length for length in lengths if any(text.endswith(stop[:length]) for stop in stops)), default=0)
