"""Where training text comes from: what a person writes under `data.sources`, and the files that it stands for."""

from __future__ import annotations

import glob
import hashlib
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from neuroweave.text import documents
from neuroweave.text.reading import SUFFIXES, text_files

FileKind = Literal["text", "jsonl", "parquet"]
Kind = Literal["text", "jsonl", "parquet", "hub", "shipped"]
SHIPPED = "shipped:"
SHIPPED_SPLITS = ("training", "calibration")  # the evaluation split stays out: results are measured on it

_ENDINGS: dict[FileKind, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson"),
    "text": SUFFIXES,
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SYNTH = ("query", "synthetic_reasoning", "synthetic_answer", "exercise", "constraints")


class Source(BaseModel):
    """One source of documents: files, a dataset of the hub, or a split of the shipped prose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        min_length=1,
        description="a file, a folder, a pattern (data/*.parquet), a dataset of the hub (owner/name), "
        "or shipped:training, shipped:calibration",
    )
    kind: Literal["auto", "text", "jsonl", "parquet", "hub"] = Field(
        "auto", description="what the files hold; auto: told from their names"
    )
    field: str | None = Field(
        None, min_length=1, description="the column that holds the text (text), or the messages of a chat (messages)"
    )
    chat: Literal["synth", "messages"] | None = Field(
        None,
        description="make a chat of each row: synth, the columns of PleIAs/SYNTH; messages, a list of role, content",
    )
    config: str | None = Field(None, description="hub: the configuration of the dataset")
    split: str = Field("train", min_length=1, description="hub: the split")
    revision: str | None = Field(None, description="hub: a commit or tag; without one the newest is read")
    data_files: tuple[str, ...] | None = Field(
        None, description="hub: only these files of the dataset, patterns allowed"
    )
    weight: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="how often one epoch passes over it (streamed: how often it is drawn)",
    )
    limit: int | None = Field(None, ge=1, description="read no more than this many documents")

    @model_validator(mode="after")
    def _fitting(self) -> Source:
        if self.kind == "text" and self.chat is not None:
            raise ValueError(f"{self.path}: plain text has no rows to make a chat of; leave out chat, or kind: text")
        if self.chat == "synth" and self.field is not None:
            raise ValueError(f"{self.path}: chat: synth reads columns of its own; leave out field: {self.field}")
        for_hub = [name for name in ("config", "revision", "data_files") if getattr(self, name) is not None]
        if for_hub and self.kind not in ("auto", "hub"):
            raise ValueError(f"{self.path}: {', '.join(for_hub)} only go with a dataset of the hub (kind: hub)")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read of a row."""
        if self.chat == "synth":
            return _SYNTH
        return (self.field or ("messages" if self.chat == "messages" else "text"),)


def source_kind(source: Source) -> Kind:
    """What `source` is. Raises ValueError for a path that is nothing, and a folder of files of several kinds."""
    if source.path.startswith(SHIPPED):
        split = source.path.removeprefix(SHIPPED)
        if split not in SHIPPED_SPLITS:
            raise ValueError(
                f"{source.path}: choose from {', '.join(SHIPPED + name for name in SHIPPED_SPLITS)} "
                "(the evaluation split is kept for measuring)"
            )
        if source.chat is not None or source.kind not in ("auto", "text"):
            raise ValueError(f"{source.path}: this is plain text; leave out kind and chat")
        return "shipped"
    if source.kind != "auto":
        return source.kind
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _folder_kind(path)
    if path.exists() or glob.has_magic(source.path):
        return file_kind(path)
    if _HUB_NAME.fullmatch(source.path):
        return "hub"
    raise ValueError(f"{source.path}: no such file or folder, and not the name of a hub dataset (owner/name)")


def file_kind(file: Path) -> FileKind:
    """By the end of its name; what is not known is plain text."""
    name = file.name.lower()
    if name.endswith(".json"):  # many datasets name JSON lines so
        return "jsonl"
    return next((kind for kind, endings in _ENDINGS.items() if name.endswith(endings)), "text")


def _folder_kind(folder: Path) -> FileKind:
    kinds = [kind for kind in _ENDINGS if _files_below(folder, kind)]
    if not kinds:
        endings = ", ".join(ending for group in _ENDINGS.values() for ending in group)
        raise ValueError(f"{folder}: no file to read in this folder; files that end in {endings} were expected")
    if len(kinds) > 1:
        raise ValueError(f"{folder}: holds files of several kinds ({', '.join(kinds)}); say which with kind:")
    return kinds[0]


def _files_below(folder: Path, kind: FileKind) -> list[Path]:
    below = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.name.lower().endswith(_ENDINGS[kind]))
    visible = (folder / name for name in below if not any(part.startswith(".") for part in name.parts))
    return [file for file in visible if file.is_file()]


def source_files(source: Source, kind: Kind) -> list[Path]:
    """The files of `source` in the order of their names; none of a hub dataset or the shipped prose.

    Raises ValueError when there is none, or an empty one.
    """
    if kind == "hub" or kind == "shipped":
        return []
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = text_files(path) if kind == "text" else _files_below(path, kind)
    elif path.is_file():
        files = [path]
    else:
        found = map(Path, sorted(glob.glob(str(path), recursive=True))) if glob.has_magic(source.path) else ()
        files = [file for file in found if file.is_file()]
    if not files:
        raise ValueError(f"{source.path}: no such file; give a {kind} file, a folder of them, or a pattern")
    empty = [file for file in files if file.stat().st_size == 0]
    if empty:
        raise ValueError(f"{empty[0]}: empty; give a file that has text in it, or take it out")
    return files


def shipped_texts(source: Source) -> list[str]:
    """The passages of a split of the shipped prose."""
    return [document.text for document in documents(source.path.removeprefix(SHIPPED))]


def file_sha256(file: Path) -> str:
    """Of the bytes of `file`, read once from end to end."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
