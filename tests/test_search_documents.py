"""Bytes become documents and passages: titles, dates, headings, terms, code, and encodings of all kinds."""

from __future__ import annotations

import datetime
import io
import tracemalloc
from collections.abc import Callable

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from neuroweave.chat.search.dates import parse_date, updated_date
from neuroweave.chat.search.documents import Document, Section, read_document
from neuroweave.chat.search.passages import LONGEST, passages, pieces
from neuroweave.chat.search.reading_process import ReadingProcess

HTML = """<!DOCTYPE html><html><head><title>Tea &amp; cake &#8212; A guide 3.1</title>
<script type="application/ld+json">{"@type": "Article", "datePublished": "2025-11-02T08:00:00+01:00"}</script></head>
<body><nav><ul><li><a href="/">Home</a></li><li><a href="/x">Elsewhere</a></li></ul></nav><main>
<h1>Tea &amp; cake<a class="headerlink" href="#tea">\u00b6</a></h1><p>Use <code>try</code>\u2026<code>except</code>.</p>
<h2>Brewing</h2><dl><dt id="brew"><code>brew(pot, *, minutes=4)</code></dt><dd><p>Makes it.</p></dd>
<dt id="pour"><code>pour(pot)</code></dt><dd><p>Takes it.</p></dd></dl>
<pre>if a &lt; b:

    pour(pot)  # &lt;h2&gt;no heading&lt;/h2&gt;</pre>
<table><tr><th>Sort</th><th>Heat</th></tr><tr><td>Assam</td><td>95</td></tr></table></main>
<footer>Last updated on May 12, 2026.</footer></body></html>"""


LATIN = "Grüße aus Köln, schöne Wörter überall"


def read(text: str | bytes, kind: str = "html", charset: str | None = None) -> Document:
    content = text if isinstance(text, bytes) else text.encode()
    return read_document(content, kind=kind, name="a name", charset=charset)


def pdf(*pages: str, edit: Callable[[PdfWriter], object] = lambda writer: None) -> bytes:
    """A PDF of pages with one line of text each."""
    writer = PdfWriter()
    for text in pages:
        page = writer.add_blank_page(width=600, height=200)
        font = DictionaryObject({
            NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        })  # fmt: skip
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    edit(writer)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_html_keeps_what_a_reader_sees() -> None:
    document = read(HTML)
    assert (document.title, document.date, document.warning) == ("Tea & cake", datetime.date(2025, 11, 2), "")
    first, second = document.sections
    assert first == Section("Tea & cake", ("Use try\u2026except.",), ("",))
    assert second.heading == "Brewing"
    assert dict(zip(second.paragraphs, second.terms, strict=True)) == {
        "brew(pot, *, minutes=4)": "brew(pot, *, minutes=4)",
        "Makes it.": "brew(pot, *, minutes=4)",
        "pour(pot)": "pour(pot)",
        "Takes it.": "pour(pot)",
        "if a < b:\n\n    pour(pot)  # <h2>no heading</h2>": "pour(pot)",
        "Sort Heat\nAssam 95": "pour(pot)",
    }
    assert "Elsewhere" not in document.text


def test_html_without_much() -> None:
    assert read("<p>hello").title == "a name"
    assert read("<title>T</title><h1>Other</h1><p>x").title == "T"
    assert read("<h1>Only</h1><p>x").title == "Only"
    assert read("").sections == ()
    short = (  # nothing of it is content, to extractors that look for articles
        '<div class="related" role="navigation">index | next</div><div class="body"><section id="copyright">'
        '<h1>Copyright<a class="headerlink" href="#copyright">\u00b6</a></h1><p>Python is:</p>'
        '<p>Copyright \u00a9 2001 Python Software Foundation.</p></section></div><div class="footer">By a program</div>'
    )
    assert read(short).text == "Copyright\n\nPython is:\n\nCopyright \u00a9 2001 Python Software Foundation."
    marked = "<p>\ue000\u200bhidden marks \x07of\ufeff ours</p>"
    assert "\ue000" not in read(marked).text
    assert "\u200b" not in read(marked).text


@pytest.mark.parametrize(
    ("head", "date"),
    [
        ('<meta name="date" content="2024-02-30">', None),
        ('<meta property="article:published_time" content="2024-02-28T23:00:00Z">', "2024-02-28"),
        (
            '<meta name="dc.date" content="2020-01-01"><meta property="article:modified_time" content="2021-03-04">',
            "2021-03-04",
        ),
        ('<meta http-equiv="Last-Modified" content="Tue, 15 Nov 1994 12:45:26 GMT">', "1994-11-15"),
        ('<script type="application/ld+json">{"@graph": [{"dateModified": "2023-05-06"}]}</script>', "2023-05-06"),
        ('<script type="application/ld+json">{broken</script>', None),
        ("", None),
    ],
    ids=range(7),
)
def test_dates_of_pages(head: str, date: str | None) -> None:
    found = read(f"<html><head>{head}</head><body><p>text</p></body></html>").date
    assert (found and found.isoformat()) == date


def test_dates_as_people_write_them() -> None:
    day = datetime.date(2026, 5, 12)
    spellings = [
        "2026-05-12", "2026-05-12T10:00:00Z", "D:20260512101500+02'00'", "12 May 2026", "May 12, 2026", "12th of",
        "12. May 2026", "Tue, 12 May 2026 09:00:00 +0000", "Sept. 12, 2026",
    ]  # fmt: skip
    assert [parse_date(text) == day for text in spellings] == [True] * 5 + [False, True, True, False]
    assert parse_date("Sept. 12, 2026") == datetime.date(2026, 9, 12)
    assert [parse_date(text) for text in ("", None, "3/4/2026", "today", "2026-13-01", "99 Mai 2026")] == [None] * 6
    assert updated_date("Last updated on May 12, 2026. Created with Sphinx.") == day
    assert updated_date("Last changed: 2026-05-12") == day
    assert updated_date("nothing of the kind") is None


def test_dates_that_no_calendar_has() -> None:
    assert parse_date("Mon, 01 Jan 99999999999999999999 00:00:00 +0000") is None
    assert parse_date(f"D:{'9' * 8}") is None


def test_headings_of_any_length() -> None:
    text = "# C#\n\n## A # b ##\n\n# #\n\n#" + " " * 200_000 + "x" + "# " * 200_000 + "y\n\n#" + "\t " * 100_000
    headings = [section.heading for section in read(text, "markdown").sections]
    assert headings[:2] == ["C#", "A # b"]
    assert headings[-1].startswith("x# # #")


def test_markdown_sections() -> None:
    text = (
        "---\ntitle: 'Leave policy'\ndate: 2026-01-31\n---\n\nIntro.\n\n# Days\n\nYou get 31.\n\n```python\n"
        "# a comment, no heading\n\nx = 1\n```\n\nOver\n====\nLate.\n\n## Carry `over` ##\n"
    )
    document = read(text, "markdown")
    assert (document.title, document.date) == ("Leave policy", datetime.date(2026, 1, 31))
    assert [(section.heading, section.paragraphs) for section in document.sections] == [
        ("", ("Intro.",)),
        ("Days", ("You get 31.", "```python\n# a comment, no heading\n\nx = 1\n```")),
        ("Over", ("Late.",)),
        ("Carry `over`", ()),
    ]
    assert read("no heading", "markdown").title == "a name"
    assert read("# First\n\ntext", "markdown").title == "First"


def test_plain_text_sections() -> None:
    text = "=====\nTitle\n=====\n\nWords.\n\n-----\n\n# not a heading\n\nPart\n----\nMore\nlines\n"
    assert [(section.heading, section.paragraphs) for section in read(text, "text").sections] == [
        ("Title", ("Words.", "# not a heading")),
        ("Part", ("More\nlines",)),
    ]


@pytest.mark.parametrize(
    ("content", "charset", "text", "warning"),
    [
        (b"plain", None, "plain", ""),
        ("für".encode(), None, "für", ""),
        ("\ufefffür".encode(), None, "für", ""),
        ("für".encode("utf-16"), None, "für", ""),
        ("für".encode("utf-16-be"), "utf-16-be", None, "a binary file"),
        (LATIN.encode("latin-1"), None, LATIN, "not UTF-8, read as"),
        ("für".encode("cp1252"), "windows-1252", "für", ""),
        ("für".encode(), "no-such-charset", "für", ""),
        ("schön ".encode() + b"\xfc" + "ber, größer".encode(), None, "schön \ufffdber, größer", "1 of its characters"),
        ("the sign \ufffd itself".encode(), None, "the sign \ufffd itself", ""),
        ("Привет, мир. Это русский текст.".encode("koi8-r"), "koi8-r", "Привет, мир. Это русский текст.", ""),
        (b"a\0b", None, None, "a binary file"),
        (b"one\r\ntwo\rthree\x07", None, "one\ntwo\nthree", ""),
    ],
    ids=range(13),
)  # fmt: skip
def test_encodings(content: bytes, charset: str | None, text: str | None, warning: str) -> None:
    if text is None:
        with pytest.raises(ValueError, match=warning):
            read(content, "text", charset)
        return
    document = read(content, "text", charset)
    assert document.text == text
    assert document.warning.startswith(warning)
    assert bool(document.warning) == bool(warning)


@pytest.mark.parametrize("charset", ["hex", "rot13", "zip", "idna", "undefined", "no-such"])
def test_charsets_that_are_none_of_texts(charset: str) -> None:
    page = f"<meta charset={charset}><p>Tea at four, caf\u00e9.</p>".encode()
    assert read(page).text == "Tea at four, caf\u00e9."


def test_html_declares_its_encoding() -> None:
    page = '<html><head><meta charset="iso-8859-1"></head><body><p>für</p></body></html>'.encode("latin-1")
    assert read(page).text == "für"
    assert read(page, charset="iso-8859-1").text == "für"


def test_pdf() -> None:
    made = pdf(
        "Tea is served at four",
        "Cake at five",
        edit=lambda writer: writer.add_metadata({"/Title": "Times", "/CreationDate": "D:20260512090000Z"}),
    )
    document = read(made, "pdf")
    assert (document.title, document.date) == ("Times", datetime.date(2026, 5, 12))
    assert document.sections == (
        Section("page 1", ("Tea is served at four",)),
        Section("page 2", ("Cake at five",)),
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pdf("secret", edit=lambda writer: writer.encrypt("open sesame", algorithm="RC4-128")), "encrypted; save it"),
        (pdf("secret", edit=lambda writer: writer.encrypt("open sesame", algorithm="AES-256")), "encrypted; save it"),
        (pdf(""), "no text in it"),
        (pdf("text")[:400], "a broken PDF"),
        (b"%PDF-1.7\n", "a broken PDF"),
        (b"", "a broken PDF"),
    ],
    ids=["encrypted", "encrypted with AES", "scan", "cut off", "only a start", "empty"],
)
def test_pdf_that_cannot_be_read(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(content, "pdf")


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_pdf_locked_for_its_owner_only_is_read(algorithm: str) -> None:
    made = pdf("for all", edit=lambda writer: writer.encrypt("", "owner", algorithm=algorithm))
    assert read(made, "pdf").sections == (Section("page 1", ("for all",)),)


def test_a_long_line_is_cut_once() -> None:
    """That it is not copied for each passage: 200 MB of copies here, and hours for a file of 200 MB."""
    text = "some words of it " * 60_000
    tracemalloc.start()
    size = sum(len(piece) for piece in pieces(text))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(text) * 0.99 < size <= len(text)
    assert most < 100_000


def test_passages_are_short_whole_and_in_order() -> None:
    words = " ".join(f"Sentence {number} is here." for number in range(400))
    long = "x" * 5_000
    document = Document("t", (Section("One", (words, "short", long)), Section("Two", ()), Section("", ("end",))))
    found = passages(document)
    assert max(len(passage.text) for passage in found) <= LONGEST
    assert [passage.heading for passage in found] == ["One"] * (len(found) - 2) + ["Two", ""]
    joined = "".join("".join(passage.text.split()) for passage in found)
    assert joined == "".join((words + "short" + long + "end").split())


def test_a_passage_names_what_it_defines() -> None:
    paragraphs = ("a()", "text " * 90, "b()", "text", "c()", "text")
    terms = ("a()", "a()", "b()", "b()", "c()", "c()")
    found = passages(Document("t", (Section("One", paragraphs, terms),)))
    assert [passage.terms for passage in found] == ["a()", "b()\nc()"]


def test_the_process_reads_as_this_one_does_and_outlives_what_it_cannot_read() -> None:
    with ReadingProcess() as reader:
        assert reader.read(HTML.encode(), kind="html", name="a name") == read(HTML)
        with pytest.raises(ValueError, match="a broken PDF"):
            reader.read(b"%PDF-1.7", kind="pdf", name="x")
        with pytest.raises(ValueError, match=r"reading it took longer than 0\.3 s"):
            reader.read(b"<div>x" * 300_000, kind="html", name="x", seconds=0.3)
        assert reader.read(b"<p>again", kind="html", name="x", seconds=30.0).text == "again"
        process = reader._process
        assert process is not None
        process.kill()
        process.wait()
        with pytest.raises(ValueError, match="the process that reads documents ended"):
            reader.read(b"<p>dead", kind="html", name="x")
        assert reader.read(b"<p>alive", kind="html", name="x").text == "alive"


def test_the_process_does_not_get_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read where Linux shows a process's environment, by its own number."""
    monkeypatch.setenv("TAVILY_API_KEY", "tvly-secret")
    with ReadingProcess() as reader:
        reader.read(b"<p>x", kind="html", name="x")
        assert reader._process is not None
        with open(f"/proc/{reader._process.pid}/environ", "rb") as shown:
            assert b"tvly-secret" not in shown.read()
