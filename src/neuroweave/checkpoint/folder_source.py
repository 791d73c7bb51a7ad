"""A checkpoint folder as a source: its tensors one by one, from safetensors or from `pytorch_model.bin`."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.header import TensorSpec, parse_json
from neuroweave.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint, list_files
from neuroweave.checkpoint.writer import ShardWriter, cast_to, dtype_code

if TYPE_CHECKING:
    import torch

BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_BLOCK_BYTES = 1 << 24


def open_folder(folder: Path, *, dtype: str) -> SafetensorsSource | BinSource:
    """The folder's weights, to be written in `dtype` (`auto` keeps each tensor's own).

    Raises ValueError when there are none.
    """
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return SafetensorsSource(folder, dtype)
    if (folder / BIN_FILE).is_file() or (folder / BIN_INDEX_FILE).is_file():
        return BinSource(folder, dtype)
    gguf = [name for name in list_files(folder) if name.endswith(".gguf")]
    hint = f"; it holds {', '.join(gguf[:3])}: give that file" if gguf else ""
    raise ValueError(f"{folder}: no {SINGLE_FILE}, {INDEX_FILE} or {BIN_FILE} in this folder{hint}")


def target_spec(spec: TensorSpec, dtype: str) -> TensorSpec:
    """The tensor as it will be written: floats in `dtype`, anything else as it is."""
    if dtype == "auto" or spec.dtype not in _FLOATS:
        return spec
    return TensorSpec(spec.name, dtype_code(dtype), spec.shape)


class SafetensorsSource:
    """Safetensors shards: copied block by block, converted where the dtype differs."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.checkpoint = Checkpoint(folder)
        self.specs = [target_spec(tensor, dtype) for tensor in self.checkpoint.values()]
        self.files = {*self.checkpoint.shards, *([INDEX_FILE] if self.checkpoint.index is not None else [])}

    def stream(self, writer: ShardWriter) -> Iterator[int]:
        """Write every tensor; yields the number of bytes just written."""
        for spec in self.specs:
            stored = self.checkpoint[spec.name]
            if stored.dtype == spec.dtype:
                for begin in range(0, stored.nbytes, _BLOCK_BYTES):
                    block = self.checkpoint.read_bytes(spec.name, begin, min(begin + _BLOCK_BYTES, stored.nbytes))
                    writer.write_at(spec.name, begin, block)
                    yield len(block)
            else:
                writer.write(spec.name, cast_to(self.checkpoint.read_torch(spec.name), spec))
                yield spec.nbytes

    def close(self) -> None:
        self.checkpoint.close()


class BinSource:
    """`pytorch_model.bin` files: unpickled as weights only, mapped where the format allows."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        self.files = {BIN_FILE}
        if not (folder / BIN_FILE).is_file():
            self.files = {BIN_INDEX_FILE, *_bin_shards(folder)}
        self._state: dict[str, torch.Tensor] = {}
        for name in sorted(self.files - {BIN_INDEX_FILE}):
            for key, value in _load_bin(folder / name).items():
                if key in self._state:
                    raise ValueError(f"{folder / name}: tensor {key!r} is also in another file")
                self._state[key] = value
        self.specs = [
            target_spec(TensorSpec(key, dtype_code(value.dtype), tuple(value.shape)), dtype)
            for key, value in self._state.items()
        ]

    def stream(self, writer: ShardWriter) -> Iterator[int]:
        """Write every tensor; yields the number of bytes just written."""
        for spec in self.specs:
            writer.write(spec.name, cast_to(self._state[spec.name], spec))
            yield spec.nbytes

    def close(self) -> None:
        self._state.clear()


def _bin_shards(folder: Path) -> set[str]:
    path = folder / BIN_INDEX_FILE
    weight_map = parse_json(path.read_bytes(), file=str(path), what="index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path}: no weight_map; expected an object that maps tensor names to files")
    for file in sorted(set(weight_map.values())):
        if os.path.basename(file) != file or "\\" in file or file in ("", ".", ".."):
            raise ValueError(f"{path}: {file!r} is not a plain file name of this folder")
        if not (folder / file).is_file():
            raise ValueError(f"{path}: names {file}, which is not in the folder; fetch the missing file")
    return set(weight_map.values())


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read as weights ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected names with tensors")
    return content
