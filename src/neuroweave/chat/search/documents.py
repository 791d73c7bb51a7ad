"""A file's bytes as a document: title, date, and sections of text under their headings."""

from __future__ import annotations

import codecs
import contextlib
import datetime
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from neuroweave.chat.search.dates import parse_date
from neuroweave.chat.search.sources import TITLE_CHARACTERS

KINDS = {
    ".txt": "text", ".rst": "text", ".md": "markdown", ".markdown": "markdown",
    ".html": "html", ".htm": "html", ".xhtml": "html", ".pdf": "pdf",
}  # fmt: skip
REPLACED = "\ufffd"
# No text: other control characters, and the private ones and the invisible space that mark places on the way here.
NOISE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ue000-\uf8ff]")
HEADING = re.compile(r"#{1,6}[ \t]+(\S.*)")
CLOSING = re.compile(r"(?:^|[ \t])#+$")
UNDERLINE = re.compile(r"([=\-~^\"'`*+#.:_])\1{2,}\s*")
FENCE = re.compile(r" {0,3}(```|~~~)")
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Section:
    """Paragraphs under one heading. `terms`: for each paragraph the thing that it defines, or an empty text."""

    heading: str
    paragraphs: tuple[str, ...]
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """`warning`: what went wrong on the way, where something could be read all the same."""

    title: str
    sections: tuple[Section, ...]
    date: datetime.date | None = None
    warning: str = ""

    @property
    def text(self) -> str:
        parts = [part for section in self.sections for part in (section.heading, *section.paragraphs)]
        return "\n\n".join(part for part in parts if part)


def read_document(content: bytes, *, kind: str, name: str, charset: str | None = None) -> Document:
    """The document in `content`. `kind`: text, markdown, html or pdf. `name`: its title where it has none. `charset`:
    what a server says of it. Raises ValueError, with the reason alone, for what cannot be read."""
    return READERS[kind](content, name, charset)


def read_text(content: bytes, name: str, charset: str | None) -> Document:
    text, warning = decode(content, charset)
    sections = list(marked_sections(text.splitlines(), hashes=False))
    return Document(name, tuple(sections), warning=warning)


def read_markdown(content: bytes, name: str, charset: str | None) -> Document:
    text, warning = decode(content, charset)
    values: dict[str, str] = {}
    if front := FRONT_MATTER.match(text):
        pairs = (line.partition(":") for line in front[1].splitlines())
        values = {key.strip().lower(): value.strip().strip("\"'") for key, _, value in pairs}
        text = text[front.end() :]
    sections = tuple(marked_sections(text.splitlines(), hashes=True))
    first = next((section.heading for section in sections if section.heading), "")
    return Document(one_line(values.get("title") or first) or name, sections, parse_date(values.get("date")), warning)


def read_html(content: bytes, name: str, charset: str | None) -> Document:
    from neuroweave.chat.search.html import html_document

    return html_document(content, name, charset)


def read_pdf(content: bytes, name: str, charset: str | None) -> Document:
    from neuroweave.chat.search.pdf import pdf_document

    return pdf_document(content, name)


READERS: dict[str, Callable[[bytes, str, str | None], Document]] = {
    "text": read_text,
    "markdown": read_markdown,
    "html": read_html,
    "pdf": read_pdf,
}


def decode(content: bytes, charset: str | None = None) -> tuple[str, str]:
    """(text, what was wrong). What is not in its encoding is replaced; never fails but for a binary file."""
    for mark, name in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if content.startswith(mark):
            text = content.decode(name, "replace")
            return clean(text.removeprefix("\ufeff")), replacements(text, content, name)
    if b"\0" in content[:8192]:
        raise ValueError("a binary file (it holds NUL bytes)")
    if charset and (declared := known(charset)) not in (None, "utf-8", "ascii"):
        with contextlib.suppress(UnicodeError, LookupError):  # of codecs that are for something else than texts
            text = content.decode(str(declared), "replace")
            return clean(text), replacements(text, content, str(declared))
    try:
        return clean(content.decode("utf-8")), ""
    except UnicodeDecodeError:
        text = content.decode("utf-8", "replace")
    # A slip in UTF-8 leaves the letters around it whole; in another encoding hardly one is.
    whole = sum(map(len, re.findall(r"[^\x00-\x7f\ufffd]+", text)))
    if text.count(REPLACED) <= whole:
        return clean(text), replacements(text, content, "utf-8")
    legacy = detected(content)
    return clean(content.decode(legacy, "replace")), f"not UTF-8, read as {legacy}"


def known(charset: str) -> str | None:
    try:
        return codecs.lookup(charset.strip("\"' ")).name
    except (LookupError, ValueError):
        return None


def detected(content: bytes) -> str:
    """The most likely encoding of bytes that are not UTF-8."""
    from resiliparse.parse.encoding import detect_encoding

    found = known(detect_encoding(content[: 1 << 17]) or "")
    return found if found not in (None, "utf-8", "ascii") else "cp1252"


def replacements(text: str, content: bytes, charset: str) -> str:
    """A warning where decoding replaced something; a text may hold the sign that stands for it, too."""
    if REPLACED not in text:
        return ""
    kept = content.decode(charset, "ignore").count(REPLACED)
    count = text.count(REPLACED) - kept
    return f"{count} of its characters were broken and are replaced" if count else ""


def clean(text: str) -> str:
    return NOISE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(text: str) -> str:
    return " ".join(text.split())[:TITLE_CHARACTERS]


def marked_sections(lines: list[str], *, hashes: bool) -> Iterator[Section]:
    """Sections of plain text: a heading is a line over a line of `====`, or, with `hashes`, one after `#`."""
    heading, paragraphs, paragraph, fence = "", list[str](), list[str](), ""

    def finish() -> None:
        if paragraph:
            paragraphs.append("\n".join(paragraph))
            paragraph.clear()

    for line in lines:
        if hashes and (match := FENCE.match(line)) and fence in ("", match[1]):
            fence = "" if fence else match[1]
            paragraph.append(line)
        elif fence:
            paragraph.append(line)
        elif hashes and (match := HEADING.fullmatch(line)):
            finish()
            yield from section(heading, paragraphs)
            heading, paragraphs = CLOSING.sub("", match[1].rstrip()).rstrip(), []
        elif len(paragraph) == 1 and UNDERLINE.fullmatch(line) and underlines(line, paragraph[0]):
            title = paragraph.pop().strip()
            yield from section(heading, paragraphs)
            heading, paragraphs = title, []
        elif not line.strip() or (not paragraph and UNDERLINE.fullmatch(line)):
            finish()
        else:
            paragraph.append(line.rstrip())
    finish()
    yield from section(heading, paragraphs)


def underlines(line: str, title: str) -> bool:
    return len(title.strip()) <= len(line.rstrip()) + 2 and bool(re.search(r"\w", title))


def section(heading: str, paragraphs: list[str]) -> Iterator[Section]:
    if heading or paragraphs:
        yield Section(one_line(heading), tuple(paragraphs))
