"""A user's own text: files and folders of plain text, cut into passages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from neuroweave.text.documents import Document
from neuroweave.text.passages import cut

SUFFIXES = (".txt", ".md")
USER_SPLIT = "user"


def read_documents(paths: str | Path | Iterable[str | Path]) -> list[Document]:
    """The text in `paths`, each file cut at blank lines into passages of about a chapter's length.

    A folder stands for every .txt and .md file below it, in the order of their names; a file that is reached twice is
    read once. Passages are named `<file>#<number>`. Raises ValueError when a path is missing, a folder has no such
    file, or a file is empty, binary or not UTF-8.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise ValueError("no text was given; name a text file, or a folder of .txt or .md files")
    found: dict[Path, None] = {}
    for path in given:
        found.update(dict.fromkeys(file.resolve() for file in text_files(Path(path))))
    labels = dict(zip(found, short_names(list(found)), strict=True))
    return [
        Document(f"{label}#{number}", text, file.stem, author="", source=label, licence="", split=USER_SPLIT)
        for file, label in labels.items()
        for number, text in enumerate(cut(read_text(file)), start=1)
    ]


def text_files(path: Path) -> list[Path]:
    """The files that `path` stands for: itself, or the text files in the folder that it is."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give a text file, or a folder of .txt or .md files")
    below = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    visible = [name for name in below if not any(part.startswith(".") for part in name.parts)]
    files = [path / name for name in sorted(visible) if (path / name).is_file()]
    if not files:
        raise ValueError(f"{path}: no .txt or .md file in this folder; give a folder that has some, or name the files")
    return files


def short_names(files: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell all files apart: their names, or names with the folders above."""
    deepest = max(len(file.parts) for file in files)
    for depth in range(1, deepest + 1):
        names = ["/".join(file.parts[-depth:]) for file in files]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]


def read_text(file: Path) -> str:
    """The content of a UTF-8 text file, with line ends as a newline and without a byte order mark."""
    content = file.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{file}: a binary file (it holds NUL bytes); give plain text, saved as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); save it as UTF-8"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{file}: empty; give a file that has text in it")
    return text
