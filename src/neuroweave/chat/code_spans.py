"""Which parts of a Markdown text are code, as the text comes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["prose", "inline", "fence"]
TOKEN = re.compile(r"`+|~+|\n|[^`~\n]+")
GROWING = re.compile(r"(?:`+|~+)$")  # what comes next may make it longer


@dataclass(eq=False)
class CodeSpans:
    """Text in, (kind, text) out; all of the text, in its order. Code inside of a line ends with it at the latest.

    Source: CommonMark 0.31, sections 4.5 and 6.1; a fence may be indented at will.
    """

    inline: str = ""  # the marks of the code that the text is in
    fence: str = ""
    opening: bool = False  # this line opened the fence
    line: str = ""  # so far
    held: str = ""

    def put(self, text: str) -> list[tuple[Kind, str]]:
        text = self.held + text
        growing = GROWING.search(text)
        place = growing.start() if growing else len(text)
        self.held = text[place:]
        return self._split(text[:place])

    def end(self) -> list[tuple[Kind, str]]:
        text, self.held = self.held, ""
        return self._split(text)

    def _split(self, text: str) -> list[tuple[Kind, str]]:
        parts: list[tuple[Kind, str]] = []
        for token in TOKEN.findall(text):
            kind = self._newline() if token == "\n" else self._kind(token)
            if parts and parts[-1][0] == kind:
                parts[-1] = (kind, parts[-1][1] + token)
            else:
                parts.append((kind, token))
        return parts

    def _newline(self) -> Kind:
        kind: Kind = "fence" if self.fence else "prose"
        marks = self.line.strip()
        if self.fence and not self.opening and marks == self.fence[0] * max(len(marks), len(self.fence)):
            self.fence = ""
        self.inline, self.line, self.opening = "", "", False
        return kind

    def _kind(self, token: str) -> Kind:
        first = not self.line.strip()
        self.line += token
        if self.fence:
            return "fence"
        if self.inline:
            self.inline = "" if token == self.inline else self.inline
            return "inline"
        if first and token[0] in "`~" and len(token) >= 3:
            self.fence, self.opening = token, True
            return "fence"
        if token[0] == "`":
            self.inline = token
            return "inline"
        return "prose"


def code_spans(text: str) -> list[tuple[Kind, str]]:
    """A whole text at once."""
    spans = CodeSpans()
    return spans.put(text) + spans.end()
