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
SLACK = 200  # characters beyond the reach of a cut that are looked at: a place may begin or end there


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
    passages, start = [], 0
    for part in range(1, parts):
        end, following = nearest(text, length * part, length / 4)
        passages.append(text[start:end])
        start = following
    return [*passages, text[start:]]


def nearest(text: str, ideal: float, reach: float) -> tuple[int, int]:
    """The span closest to `ideal` of the first kind of place that has one within `reach`; else `ideal` itself.

    Only the text around `ideal` is searched: spans of a whole text of 200 MB would take more memory than a model.
    """
    first, last = max(0, int(ideal - reach) - SLACK), int(ideal + reach) + SLACK
    for kind in (BLANK_LINE, SENTENCE_END, SPACE):
        spans = [match.span(kind.groups) for match in kind.finditer(text, first, last)]
        near = [span for span in spans if abs(span[0] - ideal) <= reach]
        if near:
            start, end = min(near, key=lambda span: abs(span[0] - ideal))
            rest = SPACE.match(text, end)  # a run of spaces goes on where the search ended
            return start, rest.end() if rest else end
    return round(ideal), round(ideal)
