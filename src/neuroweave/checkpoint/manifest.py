"""The manifest that a generated or fused folder carries: what went in, what was done, and the SHA-256 of every file.

    {"format": 1, "neuroweave": "0.1.0", "operation": "fuse", "parameters": {...},
     "inputs": {"model": {"files": {"model.safetensors": {"bytes": 538090408, "sha256": "..."}}}},
     "outputs": {"model.safetensors": {"bytes": 538090408, "sha256": "..."}}}

`neuroweave verify` checks `outputs` again. With hashing switched off a file's entry has no `sha256`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroweave import __version__
from neuroweave.checkpoint.header import read_json

if TYPE_CHECKING:
    from neuroweave.checkpoint.reader import Checkpoint

MANIFEST_FILE = "neuroweave_manifest.json"
FORMAT_VERSION = 1
_BLOCK_BYTES = 1 << 22


def file_entry(path: str | os.PathLike[str], *, hashed: bool = True) -> dict[str, Any]:
    """Size in bytes and, unless switched off, SHA-256 of a file."""
    entry: dict[str, Any] = {"bytes": os.path.getsize(path)}
    return entry | {"sha256": sha256_of(path)} if hashed else entry


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; one block in memory at a time."""
    digest, buffer = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def fingerprints(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """File -> size and SHA-256 of its safetensors header (of all of config.json): takes no time at any size."""
    config = (checkpoint.folder / "config.json").read_bytes()
    found = {"config.json": {"bytes": len(config), "sha256": hashlib.sha256(config).hexdigest()}}
    for name, header in checkpoint.shards.items():
        path = checkpoint.folder / name
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(header.data_start)).hexdigest()
        found[name] = {"bytes": path.stat().st_size, "header_sha256": digest}
    return found


def write_manifest(
    folder: Path, *, operation: str, parameters: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write the manifest of `folder` and return it. `outputs`: file name to `file_entry`."""
    content: dict[str, Any] = {"format": FORMAT_VERSION, "neuroweave": __version__, "operation": operation}
    content |= {"parameters": parameters, "inputs": inputs, **more, "outputs": dict(sorted(outputs.items()))}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    return json.loads(text)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of a folder, or None where there is none. Raises ValueError for one that cannot be understood."""
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        return None
    content = read_json(path, what="manifest")
    if content.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: manifest format {content.get('format')!r}; this version reads format {FORMAT_VERSION}"
        )
    for key in ("parameters", "inputs", "outputs"):
        if not isinstance(content.get(key), dict):
            raise ValueError(f"{path}: the manifest has no {key}")
    return content


def stamp(path: Path) -> list[int]:
    """What changes when a file is written to: size, time in nanoseconds, and its number on the disk."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]
