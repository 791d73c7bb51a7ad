"""The shipped corpus: one file per document under `prose/<split>/`, all of them recorded in `prose/sources.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

SPLITS = ("calibration", "training", "evaluation")
MANIFEST = "sources.json"


@dataclass(frozen=True)
class Document:
    """One passage of running text, about a chapter long, and where it comes from.

    `name` is unique in its corpus, `title` and `author` are those of the whole work, `source` is the package (or the
    file) that it was taken from. Of a user's own files the author and the licence are not known and are empty.
    """

    name: str
    text: str
    title: str
    author: str
    source: str
    licence: str
    split: str


def documents(split: str, *, folder: str | Path | None = None) -> list[Document]:
    """Every document of one of `SPLITS`, in the order of the manifest; no work is in more than one of them.

    `folder`: a larger corpus that `benchmarks/build_corpus.py --large` wrote, in place of the shipped one.
    Raises ValueError for an unknown split, a folder without a manifest, and a document that is missing or was edited.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known; choose from {', '.join(SPLITS)}")
    corpus = Path(folder) if folder is not None else files("neuroweave.text") / "prose"
    manifest = corpus / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{corpus}: no {MANIFEST} in this folder; benchmarks/build_corpus.py --large builds a corpus")
    records = json.loads(manifest.read_text(encoding="utf-8"))["documents"]
    return [read_document(corpus, record) for record in records if record["split"] == split]


def read_document(corpus: Any, record: dict[str, Any]) -> Document:
    """The document that `record`, an entry of the manifest, describes; its bytes are checked against the manifest."""
    file = corpus / record["split"] / f"{record['name']}.txt"
    if not file.is_file():
        raise ValueError(f"{file}: in the manifest, but not there; build the corpus again (docs/text.md)")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"{file}: not the bytes that the manifest records; build the corpus again (docs/text.md)")
    fields = {key: record[key] for key in ("name", "title", "author", "source", "licence", "split")}
    return Document(text=content.decode("utf-8"), **fields)
