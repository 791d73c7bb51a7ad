"""From what a person names as a model to a local folder: a folder as it is, a hub id by download."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ALLOWED = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    "*.py",
    "*.md",
    "LICENSE*",
    "NOTICE*",
]
_WITHOUT_SAFETENSORS = [*_ALLOWED, "*.bin"]
_IGNORED = ["*/*", "consolidated*"]  # other formats and copies of the weights live in subfolders


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like owner/name and is nothing on this disk."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def local_folder(source: str) -> Path:
    """The folder of a checkpoint named by a path or a hub id, downloaded to the hub's cache when needed.

    Raises ValueError when there is no such folder, or the hub cannot give it.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{source}: a file; expected a checkpoint folder or a hub id")
    if not is_hub_id(source):
        raise ValueError(f"{source}: no such folder, and not a hub id of the form owner/name")
    return download(source)


def download(repository: str) -> Path:
    """A snapshot of a hub repository: safetensors where it has them, else `pytorch_model.bin` files.

    Raises ValueError that names the repository and the hub's reason.
    """
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(repository, allow_patterns=_WITHOUT_SAFETENSORS, ignore_patterns=_IGNORED)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{repository}: no such folder, and the hub could not give it ({reason[:200]})") from error
    return folder
