"""Write a checkpoint folder as one GGUF file, by the conventions of llama.cpp's convert_hf_to_gguf.py.

Tensors pass one at a time.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.gguf import import_gguf
from neuroweave.checkpoint.gguf_families import model_metadata, open_config
from neuroweave.checkpoint.gguf_tensors import PlannedTensor, encode, plan_tensors
from neuroweave.checkpoint.gguf_vocabulary import tokenizer_metadata
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.staging import check_free_space

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
Progress = Callable[[int, int], None]  # bytes written, bytes in all
_HEADER_ROOM = 1 << 20


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote. `bytes` counts the file; `notes`: what llama.cpp does otherwise, and what that means."""

    output: str
    architecture: str
    type: str
    parameters: int
    tensors: int
    bytes: int
    pre: str
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_gguf(
    source: str | Path, out: str | Path, *, type: str = "q8_0", force: bool = False, progress: Progress | None = None
) -> ExportResult:
    """Write the checkpoint folder `source` as the file `out`, which appears whole or not at all.

    `type`: one of `TYPES`, of matrices; vectors are float32. Raises ValueError for what llama.cpp cannot run, for a
    folder that lacks something, for an `out` that exists (unless `force`), and when the disk fails.
    """
    if type not in TYPES:
        raise ValueError(f"type {type!r} is not known; choose from {', '.join(TYPES)}")
    folder, out = Path(source), Path(out)
    _check_file(out, force=force)
    with Checkpoint(folder) as checkpoint:
        config, family = open_config(folder)
        metadata, notes = model_metadata(folder, config, family)
        planned = plan_tensors(checkpoint, config, family, type)
        rows = next(tensor.shape[0] for tensor in planned if tensor.name == "token_embd.weight")
        metadata |= tokenizer_metadata(folder, config, family, rows)
        metadata["general.file_type"] = int(import_gguf().LlamaFileType[TYPES[type]])
        check_free_space(out.parent, sum(tensor.nbytes for tensor in planned) + _HEADER_ROOM + len(str(metadata)))
        with _staged_file(out, force=force) as staged:
            _write(staged, family.architecture, metadata, planned, progress)
            size = staged.stat().st_size
    parameters = sum(prod(tensor.shape) for tensor in planned)
    pre = metadata.get("tokenizer.ggml.pre", "")
    return ExportResult(str(out), family.architecture, type, parameters, len(planned), size, pre, notes)


def _check_file(out: Path, *, force: bool) -> None:
    if out.suffix != ".gguf":
        raise ValueError(f"{out}: expected a file name that ends in .gguf")
    if out.is_dir():
        raise ValueError(f"{out}: the output is a folder; give a file name that ends in .gguf")
    if (out.exists() or out.is_symlink()) and not force:
        raise ValueError(f"{out}: the output exists; choose another name, or add --force")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.absolute().parent}; make it first")


@contextmanager
def _staged_file(out: Path, *, force: bool) -> Iterator[Path]:
    """A hidden sibling to write, which becomes `out` when the block ends well and is removed when it does not."""
    staged = out.with_name(f".{out.name}.neuroweave-partial-{secrets.token_hex(4)}")
    try:
        yield staged
        if out.exists() and not force:
            raise ValueError(f"{out}: a file of this name appeared meanwhile; nothing was changed")
        os.replace(staged, out)
    except OSError as error:
        raise ValueError(
            f"{out}: could not be written ({error}); make room or choose another place, and run it again"
        ) from error
    finally:
        staged.unlink(missing_ok=True)


def _write(
    path: Path, architecture: str, metadata: dict[str, Any], planned: list[PlannedTensor], progress: Progress | None
) -> None:
    import numpy as np

    writer = import_gguf().GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor in planned:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(tensor.nbytes for tensor in planned)
        for tensor in planned:
            writer.write_tensor_data(encode(tensor))
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
