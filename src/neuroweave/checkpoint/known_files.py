"""What the files of a folder should be, where that was written down: by this program's manifest, or by the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from neuroweave.checkpoint.manifest import MANIFEST_FILE, read_manifest
from neuroweave.checkpoint.reader import list_files

_DOWNLOAD_NOTES = Path(".cache/huggingface/download")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class KnownFiles:
    """`files`: name to (bytes, SHA-256), each None where unknown. `unnamed`: files that a manifest should name."""

    source: str = ""
    files: dict[str, tuple[int | None, str | None]] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)


def known_files(folder: Path) -> KnownFiles:
    """Sizes and hashes from the manifest, else the hashes that a download from the hub left behind.

    Raises ValueError for a manifest that is damaged, or names a file outside the folder.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        files: dict[str, tuple[int | None, str | None]] = {name: (None, sha) for name, sha in _hub_hashes(folder)}
        return KnownFiles("the hub" if files else "", files)
    known = KnownFiles(MANIFEST_FILE)
    for name, entry in manifest["outputs"].items():
        size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"{folder / MANIFEST_FILE}: its output {name!r} is not a file of this folder")
        if type(size) is not int or not (sha256 is None or (isinstance(sha256, str) and _SHA256.fullmatch(sha256))):
            raise ValueError(f"{folder / MANIFEST_FILE}: its output {name!r} lacks a size in bytes, or a SHA-256")
        known.files[name] = (size, sha256)
    known.unnamed = [name for name in list_files(folder) if name not in known.files and name != MANIFEST_FILE]
    return known


def _hub_hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, SHA-256) of the large files of a download: in the name of the cached blob, or noted beside the folder.

    The layout is that of huggingface_hub; small files have a git hash of 40 digits in its place.
    """
    for name in list_files(folder):
        path, notes = folder / name, folder / _DOWNLOAD_NOTES / f"{name}.metadata"
        mark = ""
        if path.is_symlink():
            blob = Path(os.readlink(path))
            mark = blob.name if blob.parent.name == "blobs" else ""
        elif notes.is_file():
            lines = notes.read_text(encoding="utf-8", errors="replace").splitlines()
            mark = lines[1].strip() if len(lines) > 1 else ""
        if _SHA256.fullmatch(mark):
            yield name, mark
