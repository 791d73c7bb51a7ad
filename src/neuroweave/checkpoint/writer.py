"""Write a checkpoint shard by shard: headers first, then data by position, one block in memory at a time."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.header import DTYPE_BITS, DTYPE_NAMES, Header, TensorSpec, build_header
from neuroweave.checkpoint.reader import INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_SHARD_SIZE = "2GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """One file to write: its name, its tensors in the order of their data, and the header's metadata."""

    file: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})


def parse_size(size: int | str) -> int:
    """Bytes from a count or a text such as `2GB` (10^9), `500 MiB` (2^20). Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    nbytes = int(float(match[1]) * unit) if match and unit else 0
    if nbytes < 1:
        raise ValueError(f"size {size!r} is not understood; give a size such as 2GB, 500MB or 1GiB")
    return nbytes


def plan_shards(tensors: Iterable[TensorSpec], max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE) -> list[Shard]:
    """Split tensors, in the order given, into files of at most `max_shard_size` bytes of data (one tensor at least).

    One shard is `model.safetensors`, several are `model-00001-of-0000N.safetensors`. Inside a shard wider dtypes come
    first, so that every tensor starts at a multiple of its element size.
    """
    limit = parse_size(max_shard_size)
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    names = [SINGLE_FILE]
    if len(groups) > 1:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [
        Shard(name, tuple(sorted(group, key=lambda tensor: -DTYPE_BITS[tensor.dtype])))
        for name, group in zip(names, groups, strict=True)
    ]


class ShardWriter:
    """Fills the files of a plan with data, in any order of tensors and blocks, from any thread.

    On entry to the `with` block the headers are written and each file gets its final length. On a normal exit every
    tensor must be complete, and the index is written when there is more than one shard; after an error the writer's
    own files are removed. Files get the mode that the umask gives.
    Raises ValueError for tensors that are not planned, do not fit, are written twice or are missing at the end, and
    OSError (disk full) from the system.
    """

    def __init__(self, folder: str | os.PathLike[str], shards: Sequence[Shard]) -> None:
        self.folder = Path(folder)
        self.shards = list(shards)
        self.total_size = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
        self.total_parameters = sum(tensor.parameters for shard in shards for tensor in shard.tensors)
        self._headers: dict[str, Header] = {}
        self._file_of = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        self._written = dict.fromkeys(self._file_of, 0)
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        if len(self._file_of) != sum(len(shard.tensors) for shard in shards):
            raise ValueError("a tensor name is planned for two places")

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name to file name."""
        return dict(self._file_of)

    def __enter__(self) -> ShardWriter:
        try:
            for shard in self.shards:
                raw, header = build_header(shard.tensors, shard.metadata)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                self._descriptors[shard.file] = os.open(self.folder / shard.file, flags, 0o666)
                self._headers[shard.file] = header
                self._write(shard.file, memoryview(raw), 0)
                os.ftruncate(self._descriptors[shard.file], header.data_start + header.data_bytes)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, data: Any) -> None:
        """Write a whole tensor: a torch tensor or numpy array of the planned shape, or its bytes.

        A torch tensor must have the planned dtype; an array or bytes only the planned size.
        """
        spec = self.spec(name)
        if hasattr(data, "detach"):
            data = _torch_bytes(data, spec)
        elif hasattr(data, "shape"):
            if tuple(data.shape) != spec.shape:
                raise ValueError(f"{name}: shape {list(data.shape)} came, {list(spec.shape)} was planned")
            data = data.tobytes() if not data.flags.c_contiguous else data.reshape(-1).view("u1")
        view = memoryview(data).cast("B") if spec.nbytes else memoryview(b"")
        if view.nbytes != spec.nbytes:
            raise ValueError(f"{name}: {view.nbytes} bytes came, {spec.nbytes} were planned")
        self.write_at(name, 0, view)

    def write_at(self, name: str, begin: int, data: bytes | bytearray | memoryview) -> None:
        """Write some bytes of a tensor, starting `begin` bytes into it. Each byte is to be written once."""
        spec = self.spec(name)
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        if begin < 0 or begin + view.nbytes > spec.nbytes or self._written[name] + view.nbytes > spec.nbytes:
            raise ValueError(
                f"{name}: {view.nbytes} bytes at {begin} are too many, or came twice ({spec.nbytes} in all)"
            )
        file = self._file_of[name]
        header = self._headers[file]
        self._write(file, view, header.data_start + header.tensors[name].begin + begin)
        with self._lock:
            self._written[name] += view.nbytes

    def spec(self, name: str) -> TensorSpec:
        """What was planned for a tensor. Raises ValueError when it was not planned, or the writer is not open."""
        if name not in self._file_of:
            raise ValueError(f"{name}: this tensor was not planned")
        if self._file_of[name] not in self._descriptors:
            raise ValueError(f"{name}: the writer is not open")
        return self._headers[self._file_of[name]].tensors[name]

    def _write(self, file: str, view: memoryview, position: int) -> None:
        while view:
            count = os.pwrite(self._descriptors[file], view[: 1 << 30], position)
            view, position = view[count:], position + count

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
            return
        try:
            missing = [name for name, count in self._written.items() if count != self.spec(name).nbytes]
            if missing:
                raise ValueError(f"{len(missing)} planned tensors are incomplete, the first is {missing[0]!r}")
            if len(self.shards) > 1:
                write_index(self.folder / INDEX_FILE, self._file_of, self.total_size, self.total_parameters)
        except BaseException:
            self._discard()
            raise
        self._close()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _discard(self) -> None:
        files = [*self._descriptors, *([INDEX_FILE] if len(self.shards) > 1 and self._descriptors else [])]
        self._close()
        for file in files:
            (self.folder / file).unlink(missing_ok=True)


def write_index(path: Path, weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> None:
    """Write `model.safetensors.index.json` as transformers does. Sizes in bytes and elements."""
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    content = {"metadata": metadata, "weight_map": dict(weight_map)}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def dtype_code(dtype: torch.dtype | str) -> str:
    """The safetensors name of a dtype, such as `BF16` for bfloat16. Raises ValueError when there is none."""
    name = str(dtype).removeprefix("torch.")
    for code, known in DTYPE_NAMES.items():
        if known == name:
            return code
    raise ValueError(f"dtype {name!r} cannot be stored in safetensors")


def cast_to(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor in the dtype of `spec`. Raises ValueError when a finite value would become infinite in float16."""
    import torch

    dtype = getattr(torch, DTYPE_NAMES[spec.dtype])
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    # bfloat16 has the range of float32: only the narrow float16 is looked at
    if dtype == torch.float16 and bool(converted.isinf().any()) and bool((converted.isinf() & tensor.isfinite()).any()):
        largest = float(tensor[tensor.isfinite()].abs().max())
        raise ValueError(f"{spec.name}: values up to {largest:.3g} do not fit {DTYPE_NAMES[spec.dtype]}")
    return converted


def _torch_bytes(tensor: torch.Tensor, spec: TensorSpec) -> Any:
    import torch

    if tuple(tensor.shape) != spec.shape or dtype_code(tensor.dtype) != spec.dtype:
        raise ValueError(
            f"{spec.name}: {dtype_code(tensor.dtype)} of shape {list(tensor.shape)} came, "
            f"{spec.dtype} of shape {list(spec.shape)} was planned"
        )
    if not tensor.numel():
        return b""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
