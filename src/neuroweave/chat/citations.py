"""Numbers after the sentences of an answer that say which source they stand on, put there and checked by code.

A small model that is told to cite does so a quarter of the time, so a sentence without a number gets that of the
passage that holds most of its words; a number that points to no passage is taken out and counted. Code stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from neuroweave.chat.code_spans import CodeSpans, Kind, code_spans
from neuroweave.chat.search.queries import JOINT, STOP_WORDS, units, unspaced

GRAMMAR = re.compile(f"[\u3040-\u309f{JOINT}]+")
WORD = re.compile(r"[^\W_]+", re.UNICODE)
NUMBER = re.compile(r"[ \t]*\[(\d{1,3}(?:\s*,\s*\d{1,3})*)\]")
# What may turn into a number, stand before one, or be followed by what makes it none.
BEGUN = re.compile(r"[ \t]*\[[\d,\s]{0,16}(\]\.?)?$|[ \t]+$")
# Code outside of code marks, and links: what stands before a bracket that is no citation, and after it.
OPERATOR = re.compile(r"[=+<{]\s*$")
INDEXED = re.compile(r"(?:(?<!\w)\w|\w*_\w*)$")
APPLIED = re.compile(r"[(=]|\.[^\W\d]")
END = re.compile(r"([.!?])([\"'\u201d\u2019)\]]*)(?=\s|$)|([\u3002\uff01\uff1f])([\u300d\u300f\uff09]*)|\n")
SHARE = 0.6  # of a sentence's words that a passage must hold to be its source
FEWEST = 2  # words that they must share


def content_words(text: str) -> list[str]:
    """The words of a text that carry it, lower case, plurals cut; of a run of ideographs its pairs, but not those of
    hiragana, which are grammar for the most part, where there are others."""
    found = [unit for word in WORD.findall(text.lower()) if word not in STOP_WORDS for unit in units(word)]
    telling = [unit for unit in found if not GRAMMAR.fullmatch(unit)]
    return [stem(unspaced(unit)) for unit in telling or found]


def stem(word: str) -> str:
    for ending in ("ies", "es", "s", "ed", "ing", "ly"):
        if len(word) > len(ending) + 3 and word.endswith(ending):
            return word[: -len(ending)]
    return word


@dataclass(eq=False)
class Citer:
    """Text in, text with citations out, sentence by sentence. `cited`: numbers that were given, in their order;
    `removed`: numbers that pointed nowhere."""

    passages: Sequence[str]
    cited: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    text: str = ""  # of the sentence so far, as it was given out
    held: str = ""
    numbers: list[int] = field(default_factory=list)  # of the sentence so far
    adjacent: bool = False  # to a number: nothing has come since
    spans: CodeSpans = field(default_factory=CodeSpans)

    def __post_init__(self) -> None:
        self.words = [frozenset(content_words(passage)) for passage in self.passages]

    def put(self, text: str) -> str:
        """What can be shown by now."""
        return self._take(self.spans.put(text))

    def end(self, *, cut: bool = False) -> str:
        """The rest. The last sentence gets its number even where it does not end, unless it was `cut`."""
        out = self._take(self.spans.end()) + self._flow(last=True)
        return out if self.spans.inline or (cut and not self.numbers) else out + self._marks()

    def _take(self, parts: list[tuple[Kind, str]]) -> str:
        out = ""
        for kind, text in parts:
            if kind == "prose":
                self.held += text
                out += self._flow(last=False)
            else:
                out += self._flow(last=True)
                out += text if kind == "fence" else self._pass(text)
        return out

    def _flow(self, *, last: bool) -> str:
        out = ""
        while True:
            number, stop = self._number(last=last), END.search(self.held)
            if stop and not last and stop.end() == len(self.held) and stop[0] != "\n":
                stop = None  # 3. may become 3.5
            if number and (stop is None or number.start() < stop.start()):
                out += self._pass(self.held[: number.start()])
                self._read(number[1])
                self.held = self.held[number.end() :]
            elif stop:
                line = stop[0] == "\n"  # a number after it is of the next line
                after = None if line else NUMBER.match(self.held, stop.end())  # "a sentence. [1]"
                after = after if after and self._cites(after, last=last) else None
                if after is None and not line and not last and BEGUN.match(self.held, stop.end()):
                    break
                if after:
                    self._read(after[1])
                out += self._pass(self.held[: stop.start()])
                closing = stop[2] or stop[4] or ""
                out += stop[0] + self._marks() if closing else self._marks() + stop[0]
                self.held = self.held[after.end() if after else stop.end() :]
            else:
                break
        keep = len(self.held)
        if not last:
            tail = BEGUN.search(self.held)
            keep = tail.start() if tail else keep
            stop = END.search(self.held)  # not known yet to be an end, or what follows it is not
            keep = min(keep, stop.start()) if stop else keep
        out += self._pass(self.held[:keep])
        self.held = self.held[keep:]
        return out

    def _number(self, *, last: bool) -> re.Match[str] | None:
        return next((match for match in NUMBER.finditer(self.held) if self._cites(match, last=last)), None)

    def _cites(self, match: re.Match[str], *, last: bool) -> bool:
        """False as long as what follows is not known."""
        if APPLIED.match(self.held, match.end()) or (not last and self.held[match.end() :] in ("", ".")):
            return False
        before = (self.text + self.held[: match.start()])[-64:]
        if OPERATOR.search(before):
            return False
        attached = match[0].startswith("[") and not (self.adjacent and match.start() == 0)
        return not (attached and INDEXED.search(before))

    def _pass(self, text: str) -> str:
        self.text += text
        self.adjacent = self.adjacent and not text
        return text

    def _read(self, numbers: str) -> None:
        self.adjacent = True
        for number in (int(each) for each in numbers.split(",")):
            if 1 <= number <= len(self.passages):
                self.numbers.append(number)
            else:
                self.removed.append(number)

    def _marks(self) -> str:
        """The numbers of the sentence that ends here."""
        numbers = list(dict.fromkeys(self.numbers)) or self._source()
        self.text, self.numbers, self.adjacent = "", [], False
        self.cited += [number for number in numbers if number not in self.cited]
        return "".join(f" [{number}]" for number in numbers)

    def _source(self) -> list[int]:
        words = set(content_words(self.text))
        if len(words) < FEWEST:
            return []
        shares = [(len(words & passage) / len(words), -place) for place, passage in enumerate(self.words)]
        share, place = max(shares, default=(0.0, 0))
        return [1 - place] if share >= SHARE and share * len(words) >= FEWEST else []


def citations_in(text: str, count: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, number) of each citation of one of `count` passages, outside of code."""
    place = 0
    for kind, part in code_spans(text):
        for mark in re.finditer(r"\[(\d{1,3})\]", part) if kind == "prose" else ():
            if 1 <= int(mark[1]) <= count:
                yield place + mark.start(), place + mark.end(), int(mark[1])
        place += len(part)


def cite(answer: str, passages: Sequence[str]) -> tuple[str, Citer]:
    """A whole answer at once."""
    citer = Citer(passages)
    return citer.put(answer) + citer.end(), citer
