"""A document as passages: short enough for a small model to read one, each with what it stands under."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from neuroweave.chat.search.documents import Document, Section

IDEAL = 800  # characters
SHORT = 400  # a passage this long ends before the next term
LONGEST = 1_200  # a paragraph beyond this is cut
HEADING_CHARACTERS = 400
BREAKS = (re.compile(r"\n"), re.compile(r"(?<=[.!?;])\s+"), re.compile(r"\s+"))


@dataclass(frozen=True)
class Passage:
    """`heading`: of its section. `terms`: the things that are defined in it, a line each."""

    heading: str
    terms: str
    text: str


def passages(document: Document) -> list[Passage]:
    """The document's text in order. A passage never crosses a heading."""
    return [passage for section in document.sections for passage in section_passages(section)]


def section_passages(section: Section) -> Iterator[Passage]:
    terms = section.terms or ("",) * len(section.paragraphs)
    parts: list[str] = []
    named: dict[str, None] = {}
    size = 0
    if not section.paragraphs:
        yield Passage(section.heading, "", "")
    for paragraph, term in zip(section.paragraphs, terms, strict=True):
        for piece in pieces(paragraph):
            new = bool(term) and term not in named
            if parts and (size + len(piece) > IDEAL or (new and size >= SHORT)):
                yield Passage(section.heading, joined(named), "\n\n".join(parts))
                parts, named, size = [], {}, 0
            parts.append(piece)
            named[term] = None
            size += len(piece)
    if parts:
        yield Passage(section.heading, joined(named), "\n\n".join(parts))


def joined(terms: dict[str, None]) -> str:
    return "\n".join(filter(None, terms))[:HEADING_CHARACTERS]


def pieces(paragraph: str) -> Iterator[str]:
    """The paragraph, cut at line ends, sentences or spaces where it is too long."""
    start = 0
    while len(paragraph) - start > LONGEST:
        place = next(filter(None, (last_break(paragraph, start, kind) for kind in BREAKS)), start + IDEAL)
        yield paragraph[start:place].rstrip()
        start = place
        while paragraph.startswith("\n", start):
            start += 1
    if rest := paragraph[start:].strip() and paragraph[start:]:
        yield rest


def last_break(paragraph: str, start: int, kind: re.Pattern[str]) -> int | None:
    ends = [match.end() for match in kind.finditer(paragraph, start + IDEAL // 2, start + IDEAL)]
    return ends[-1] if ends else None
