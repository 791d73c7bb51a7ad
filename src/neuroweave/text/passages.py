"""Cut a long text into passages of about a chapter's length."""

from __future__ import annotations

import re

PASSAGE = 8_500  # characters: some 1,500 words of English prose

BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")
# The end of a sentence and the space after it; not after a title or an initial ("Mr. Darcy", "George W. Bush").
SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bNo\.)(?<!\bSt\.)(?<!\b[A-Z]\.)"
    r"[\"'\u201d\u2019)\]]*(\s+)(?=[\"'\u201c\u2018(\[]*[A-Z])"
)
SPACE = re.compile(r"\s+")


def cut(text: str, *, size: int = PASSAGE) -> list[str]:
    """`text` as passages of nearly equal length, each between half of `size` and twice `size` characters.

    Nothing is lost but the space where a cut falls. A cut is made at the blank line nearest to the ideal place; where
    none is near, after the nearest sentence; failing that at a space, and in a text without spaces anywhere. A text
    shorter than one and a half `size` stays whole; an empty one gives no passages.
    """
    text = text.strip()
    if not text:
        return []
    parts = max(1, round(len(text) / size))
    length = len(text) / parts
    kinds = (BLANK_LINE, SENTENCE_END, SPACE)
    places = [[match.span(kind.groups) for match in kind.finditer(text)] for kind in kinds] if parts > 1 else []
    passages, start = [], 0
    for part in range(1, parts):
        end, following = nearest(places, length * part, length / 4)
        passages.append(text[start:end])
        start = following
    return [*passages, text[start:]]


def nearest(places: list[list[tuple[int, int]]], ideal: float, reach: float) -> tuple[int, int]:
    """The span closest to `ideal` among the first kind of places that has one within `reach`; else `ideal` itself."""
    for spans in places:
        closest = min(spans, key=lambda span: abs(span[0] - ideal), default=None)
        if closest is not None and abs(closest[0] - ideal) <= reach:
            return closest
    return round(ideal), round(ideal)
