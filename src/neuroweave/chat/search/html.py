"""HTML as a document.

By resiliparse: a page of Python's documentation takes it 7 ms, trafilatura 130 (resiliparse 2.0.1, trafilatura 2.3.1;
benchmarks/search_python_docs.py --extractors). Lists of links go, code and tables stay, headings lose their permalink
marks. Some hostile pages take it quadratic time: see `reading_process.py`.
"""

from __future__ import annotations

import datetime
import html
import json
import re
from collections.abc import Iterator
from typing import Any

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from neuroweave.chat.search.dates import parse_date, updated_date
from neuroweave.chat.search.documents import Document, Section, clean, decode, one_line

TERM = "\ue000"  # put before the text of a <dt> that has a name
DEFINED = re.compile(r"<dt\b[^>]*\bid=[^>]*>", re.IGNORECASE)
# resiliparse drops a lone character beyond U+07FF as a permalink, also the ellipsis in `try...except` and an ideograph.
LONE = re.compile(r"(?<=>)\s*[\u0800-\uffff]\s*(?=<(?!/a>))")
MARKS = "\u00b6\uf0c1#\u00a7"  # a permalink that a page draws itself
CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
BLOCK = re.compile(r"<h([1-6])>(.*?)</h\1>|<pre>(.*?)</pre>", re.DOTALL)
TAG = re.compile(r"</?(?:p|ul|ol|li|pre|h[1-6])\b[^>]*>|<br>\n?")
TERM_CHARACTERS = 120
ASIDE = [
    "nav", "header", "footer", "aside", "form", "script", "style", "[role=navigation]", "[role=search]",
    "[role=banner]", "[role=contentinfo]", ".footer", ".navbar", ".sidebar",
]  # fmt: skip
# Newest first: a page that was changed is as new as its change.
DATE_NAMES = (
    "article:modified_time", "og:updated_time", "last-modified", "dcterms.modified", "datemodified",
    "article:published_time", "og:published_time", "datepublished", "citation_publication_date", "dc.date",
    "dc.date.issued", "dcterms.created", "dcterms.date", "pubdate", "publishdate", "parsely-pub-date", "date",
)  # fmt: skip


def html_document(content: bytes, name: str, charset: str | None) -> Document:
    """The page's main content, without navigation. Its title is the first heading, if the <title> holds it."""
    declared = CHARSET.search(content, 0, 4096)
    text, warning = decode(content, charset or (declared[1].decode("ascii", "replace") if declared else None))
    tree = HTMLTree.parse(LONE.sub("\\g<0>\u200b", DEFINED.sub(f"\\g<0>{TERM}", text)))
    sections = tuple(html_sections(plain_text(tree, main=True))) or tuple(html_sections(plain_text(tree, main=False)))
    return Document(page_title(tree, sections) or name, sections, page_date(tree, text), warning)


def plain_text(tree: HTMLTree, *, main: bool) -> str:
    """`main`: what is judged to be the page's content, which is nothing for some short pages; else all but what is
    marked as navigation."""
    skipped = None if main else ASIDE
    return str(
        extract_plain_text(
            tree, main_content=main, preserve_formatting="minimal_html", alt_texts=False, skip_elements=skipped
        )
    )


def html_sections(plain: str) -> Iterator[Section]:
    """Sections of what resiliparse calls minimal HTML: headings, paragraphs, lists and <pre>, well formed."""
    heading, term = "", ""
    paragraphs: list[tuple[str, str]] = []
    place = 0
    for match in [*BLOCK.finditer(plain), None]:
        for block in re.split(r"\n\s*\n", plain[place : match.start() if match else len(plain)]):
            for part in re.split(f"(?={TERM})", block):
                body = untagged(part)
                if body.startswith(TERM):
                    body = body.strip(TERM).strip()
                    term = one_line(body)[:TERM_CHARACTERS]
                if body:
                    paragraphs.append((body, term))
        if match is None:
            break
        place = match.end()
        if match[1]:
            yield from html_section(heading, paragraphs)
            heading, term, paragraphs = one_line(untagged(match[2])).rstrip(MARKS).strip(), "", []
        elif code := clean(html.unescape(match[3])).strip("\n"):
            paragraphs.append((code, term))
    yield from html_section(heading, paragraphs)


def html_section(heading: str, paragraphs: list[tuple[str, str]]) -> Iterator[Section]:
    if heading or paragraphs:
        yield Section(heading, tuple(text for text, _ in paragraphs), tuple(term for _, term in paragraphs))


def untagged(part: str) -> str:
    """A block's text; a term keeps its mark in front."""
    text = html.unescape(TAG.sub("\n", part))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    body = "\n".join(line for line in lines if line and line != "\u2022")
    mark = TERM if TERM in body[:3] else ""
    return mark + clean(body)


def page_title(tree: HTMLTree, sections: tuple[Section, ...]) -> str:
    title = one_line(clean(tree.title or ""))
    first = next((section.heading for section in sections if section.heading), "")
    return first if first and (not title or first.casefold() in title.casefold()) else title


def page_date(tree: HTMLTree, text: str) -> datetime.date | None:
    if tree.document is None:
        return None
    values: dict[str, str] = {}
    for meta in tree.document.query_selector_all("meta[content]"):
        for key in ("property", "name", "http-equiv", "itemprop"):
            if named := meta.getattr(key):
                values.setdefault(named.lower(), meta.getattr("content") or "")
    found = [parse_date(values.get(name)) for name in DATE_NAMES]
    found += [parse_date(time.getattr("datetime")) for time in tree.document.query_selector_all("time[datetime]")[:1]]
    return next((date for date in found if date), None) or linked_date(text) or updated_date(text[-4000:])


def linked_date(text: str) -> datetime.date | None:
    """The date in a page's JSON-LD."""
    for block in re.findall(r"<script[^>]+application/ld\+json[^>]*>(.*?)</script>", text, re.DOTALL)[:5]:
        try:
            data: Any = json.loads(block)
        except (ValueError, RecursionError):
            continue
        graph = data.get("@graph", [data]) if isinstance(data, dict) else data
        for entry in graph if isinstance(graph, list) else []:
            for key in ("dateModified", "datePublished"):
                if isinstance(entry, dict) and isinstance(value := entry.get(key), str) and (date := parse_date(value)):
                    return date
    return None
