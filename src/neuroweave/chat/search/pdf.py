"""PDF as a document: a section for each page. By pypdf: it is kept, and needs nothing but Python."""

from __future__ import annotations

import contextlib
import io
import logging

from pypdf import PdfReader
from pypdf.errors import DependencyError, PyPdfError

from neuroweave.chat.search.dates import parse_date
from neuroweave.chat.search.documents import Document, Section, clean, one_line

PAGES = 5_000
UNTITLED = ("untitled", "untitled document", "(anonymous)")  # as programs write it where nobody gave a title


def pdf_document(content: bytes, name: str) -> Document:
    """Raises ValueError, with the reason alone, for a locked or broken file and for one without text."""
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of each oddity of a file on stderr
    try:
        reader = PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("encrypted; save it without a password")
        metadata = reader.metadata
        sections, broken = [], 0
        for number, page in enumerate(reader.pages[:PAGES], start=1):
            try:
                text = clean(page.extract_text())
            except Exception:  # a broken page, of which there are many kinds, costs the others nothing
                broken += 1
                continue
            paragraphs = tuple(part.strip() for part in text.split("\n\n") if part.strip())
            if paragraphs:
                sections.append(Section(f"page {number}", paragraphs))
    except DependencyError as error:
        raise ValueError("encrypted with AES; save it without a password") from error
    except (PyPdfError, OSError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"a broken PDF ({one_line(str(error)) or type(error).__name__})") from error
    if not sections:
        raise ValueError("no text in it (a scan? run OCR over it first)" if not broken else "no page can be read")
    title, dates = "", [""]
    with contextlib.suppress(Exception):  # metadata that is not what the format says
        title = one_line(clean(str((metadata and metadata.title) or "")))
        title = "" if title.casefold() in UNTITLED else title
        dates = [str((metadata and metadata.get(key)) or "") for key in ("/ModDate", "/CreationDate")]
    date = next((day for day in map(parse_date, dates) if day), None)
    warning = f"{broken} of its pages cannot be read" if broken else ""
    return Document(title or name, tuple(sections), date, warning)
