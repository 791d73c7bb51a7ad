"""A checkpoint folder, opened by its headers; tensor data is read only when asked for, whole or by rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.copying import read_into
from neuroweave.checkpoint.header import DTYPE_NAMES, Header, TensorSpec, read_header, read_json

if TYPE_CHECKING:
    import numpy as np
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The ends of the names of files that hold weights, in any form, and of their indices.
WEIGHT_FORMS = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".ckpt", ".safetensors")
WEIGHT_FILES = (*WEIGHT_FORMS, ".index.json")
SKIPPED_FOLDERS = (".git", ".cache")  # version control and the hub's download notes: not part of a checkpoint
_MAX_NAME_BYTES = 255

_NUMPY_NAMES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip
_ML_DTYPES = {  # what numpy itself has no type for
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_TORCH_NAMES = DTYPE_NAMES | {
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorSpec):
    """A tensor and its place: its bytes are `[offset, offset + nbytes)` of `file`, a name inside the folder."""

    file: str
    offset: int


class Checkpoint(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint folder by name, in the order of the shards' headers.

    Opens `model.safetensors`, or else `model.safetensors.index.json` and its shards; reads headers only. Data is read
    by position, so one `Checkpoint` may be read from several threads. Use it as a context manager, or `close` it.

    Attributes: `folder`; `shards` (file name to `Header`, in order); `index` (the index file's content, or None);
    `orphans` (tensors in a shard that the index does not send there); `other_files` (every other file of the folder,
    as sorted relative paths, links followed).
    Raises ValueError for a folder without weights, a bad index, a missing or truncated shard, and, unless
    `allow_orphans`, for orphans.
    """

    def __init__(self, folder: str | os.PathLike[str], *, allow_orphans: bool = False) -> None:
        self.folder = Path(folder)
        self.index: dict[str, Any] | None = None
        self.shards: dict[str, Header] = {}
        self.orphans: list[StoredTensor] = []
        self._descriptors: dict[str, int] = {}
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; expected a checkpoint folder")
        weight_map: dict[str, str] | None = None
        if (self.folder / SINGLE_FILE).is_file():
            self.shards[SINGLE_FILE] = read_header(self.folder / SINGLE_FILE)
        elif (self.folder / INDEX_FILE).is_file():
            self.index = read_index(self.folder / INDEX_FILE)
            weight_map = self.index["weight_map"]
            for name in sorted(set(weight_map.values())):
                if not (self.folder / name).is_file():
                    count = sum(file == name for file in weight_map.values())
                    raise ValueError(
                        f"{self.folder / INDEX_FILE}: {count} tensors are said to be in {name}, which is not in the "
                        "folder; fetch the missing file"
                    )
                self.shards[name] = read_header(self.folder / name)
        else:
            raise ValueError(f"{self.folder}: no {SINGLE_FILE} and no {INDEX_FILE} in this folder")
        self.tensors = self._collect(weight_map)
        if self.orphans and not allow_orphans:
            first = self.orphans[0]
            raise ValueError(
                f"{self.folder / first.file}: holds {first.name!r}, which {INDEX_FILE} "
                + (f"sends to {weight_map[first.name]}" if weight_map and first.name in weight_map else "does not name")
                + (f" (and {len(self.orphans) - 1} more)" if len(self.orphans) > 1 else "")
            )

    def _collect(self, weight_map: dict[str, str] | None) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        for file, header in self.shards.items():
            for entry in header.tensors.values():
                stored = StoredTensor(entry.name, entry.dtype, entry.shape, file, header.data_start + entry.begin)
                if weight_map is None or weight_map.get(entry.name) == file:
                    tensors[entry.name] = stored
                else:
                    self.orphans.append(stored)
        for name, file in (weight_map or {}).items():
            if name not in tensors:
                raise ValueError(
                    f"{self.folder / INDEX_FILE}: {name!r} is said to be in {file}, which does not hold it"
                )
        return tensors

    # The mapping

    def __getitem__(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(f"{self.folder}: no tensor named {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    # Totals and neighbours

    @property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(tensor.parameters for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def other_files(self) -> list[str]:
        own = {*self.shards, *([INDEX_FILE] if self.index is not None else [])}
        return [name for name in list_files(self.folder) if name not in own]

    @property
    def all_files(self) -> list[str]:
        """Every file of the folder as sorted relative paths, shards and index included."""
        return list_files(self.folder)

    def config(self) -> dict[str, Any]:
        """The content of `config.json`. Raises ValueError when it is missing or not an object."""
        return read_config(self.folder)

    # Data

    def read_bytes(self, name: str, begin: int = 0, end: int | None = None) -> bytearray:
        """Bytes `[begin, end)` of a tensor. Raises ValueError for a range outside it, or a file that shrank."""
        tensor = self[name]
        end = tensor.nbytes if end is None else end
        if not 0 <= begin <= end <= tensor.nbytes:
            raise ValueError(f"{name}: bytes {begin} to {end} asked for, the tensor has {tensor.nbytes}")
        buffer = bytearray(end - begin)
        self.read_into(name, memoryview(buffer), begin)
        return buffer

    def read_into(self, name: str, view: memoryview, begin: int = 0) -> None:
        """Fill `view` (bytes) from a tensor's bytes, starting at `begin`. Raises ValueError as `read_bytes` does."""
        tensor = self[name]
        if not 0 <= begin <= begin + view.nbytes <= tensor.nbytes:
            raise ValueError(f"{name}: {view.nbytes} bytes at {begin} asked for, the tensor has {tensor.nbytes}")
        try:
            read_into(self.descriptor(tensor.file), view, tensor.offset + begin)
        except ValueError as error:
            where = self.folder / tensor.file
            raise ValueError(f"{where}: truncated while it was being read (tensor {name!r})") from error

    def read_numpy(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or the rows asked for along its first axis, as a writable array of its own.

        bfloat16 and float8 come in the types of the library ml_dtypes.
        """
        import numpy as np

        tensor = self[name]
        dtype = numpy_dtype(tensor.dtype, name)
        data, shape = self._read_rows(tensor, rows)
        return np.frombuffer(data, dtype=dtype).reshape(shape)

    def read_torch(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or the rows asked for along its first axis, as a torch tensor of its own."""
        import torch

        tensor = self[name]
        dtype = getattr(torch, _TORCH_NAMES.get(tensor.dtype, ""), None)
        if dtype is None:
            raise ValueError(f"{name}: this torch cannot hold {tensor.dtype}; read its bytes")
        data, shape = self._read_rows(tensor, rows)
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)

    def _read_rows(self, tensor: StoredTensor, rows: slice | None) -> tuple[bytearray, tuple[int, ...]]:
        if rows is None:
            return self.read_bytes(tensor.name), tensor.shape
        if not tensor.shape or rows.step not in (None, 1):
            raise ValueError(f"{tensor.name}: rows {rows} of a tensor of shape {list(tensor.shape)} cannot be read")
        start, stop, _ = rows.indices(tensor.shape[0])
        stop = max(start, stop)
        row_bytes = TensorSpec("", tensor.dtype, tensor.shape[1:]).nbytes if prod(tensor.shape) else 0
        data = self.read_bytes(tensor.name, start * row_bytes, stop * row_bytes)
        return data, (stop - start, *tensor.shape[1:])

    # Open files

    def descriptor(self, file: str) -> int:
        """An open file descriptor of a shard, for reading by position; it is closed with the checkpoint."""
        if file not in self._descriptors:
            # two threads may open the same file: setdefault keeps one, the other is closed at once
            descriptor = os.open(self.folder / file, os.O_RDONLY)
            if self._descriptors.setdefault(file, descriptor) != descriptor:
                os.close(descriptor)
        return self._descriptors[file]

    def close(self) -> None:
        """Close the files that were opened for data; reading again reopens them."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()


def numpy_dtype(code: str, name: str = "tensor") -> np.dtype:
    """The numpy type of a safetensors dtype (of ml_dtypes, where numpy has none). Raises ValueError when none fits."""
    import numpy as np

    if code in _NUMPY_NAMES:
        return np.dtype(_NUMPY_NAMES[code])
    if code not in _ML_DTYPES:
        raise ValueError(f"{name}: numpy cannot hold {code}; read its bytes")
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, _ML_DTYPES[code]))


def read_index(path: Path) -> dict[str, Any]:
    """The content of an index file, whose `weight_map` sends every tensor to a plain file name of the same folder.

    Raises ValueError for anything else, such as a path that leaves the folder.
    """
    index = read_json(path, what="index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: no weight_map; expected an object that maps tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: {name!r} maps to {file!r}, expected the name of a .safetensors file")
        if any(mark in file for mark in ("/", "\\", "\0", ":")) or file.startswith("."):
            raise ValueError(f"{path}: {name!r} maps to {file!r}, which is not a plain file name of this folder")
        if len(file.encode()) > _MAX_NAME_BYTES:
            raise ValueError(f"{path}: {name!r} maps to a file name of {len(file)} letters, which no system can hold")
    if not isinstance(index.get("metadata", {}), dict):
        raise ValueError(f"{path}: metadata is not an object")
    return index


def read_config(folder: Path) -> dict[str, Any]:
    """The content of the folder's `config.json`. Raises ValueError when it is missing or not an object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json in this folder; is it a checkpoint?")
    return read_json(path, what="configuration")


def list_files(folder: Path) -> list[str]:
    """Every file under `folder` as a sorted relative path; folders of version control and download notes left out."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in files]
    return sorted(found)
