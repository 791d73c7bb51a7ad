"""Bytes on disk: the only place that reads or writes tensor files.

`Checkpoint` opens a folder by its headers and reads tensors on demand; `ShardWriter` fills planned shards by position;
`staged_folder` makes an output appear whole or not at all; `import_checkpoint` turns GGUF files, folders and hub ids
into checkpoints; `describe_checkpoint` says what a checkpoint is from its headers. Importing this room does not import
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroweave.checkpoint.describe import describe_checkpoint as describe_checkpoint
    from neuroweave.checkpoint.embedded import embedded_gguf as embedded_gguf
    from neuroweave.checkpoint.header import Header as Header
    from neuroweave.checkpoint.header import TensorSpec as TensorSpec
    from neuroweave.checkpoint.header import read_header as read_header
    from neuroweave.checkpoint.importing import import_checkpoint as import_checkpoint
    from neuroweave.checkpoint.reader import Checkpoint as Checkpoint
    from neuroweave.checkpoint.staging import check_free_space as check_free_space
    from neuroweave.checkpoint.staging import staged_folder as staged_folder
    from neuroweave.checkpoint.writer import ShardWriter as ShardWriter
    from neuroweave.checkpoint.writer import plan_shards as plan_shards

_ROOMS = {
    "Checkpoint": "reader",
    "Header": "header",
    "ShardWriter": "writer",
    "TensorSpec": "header",
    "check_free_space": "staging",
    "describe_checkpoint": "describe",
    "embedded_gguf": "embedded",
    "import_checkpoint": "importing",
    "plan_shards": "writer",
    "read_header": "header",
    "staged_folder": "staging",
}

__all__ = sorted(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
