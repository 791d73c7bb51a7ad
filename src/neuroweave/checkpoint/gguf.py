"""The header of a GGUF file: a fast, strict parse, and a small stand-in file with the same metadata.

transformers reads metadata through `gguf.GGUFReader`, which needs seconds for a large vocabulary and is called several
times; the parse here needs a fraction of one. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8
_MAX_STRING = 1 << 26
_CHUNK_ELEMENTS = 1 << 17  # dequantizing whole tensors costs twice as much: temporaries fall out of the cache
# floating types that are stored as values; all others are blocks of quantized values
PLAIN_TYPES = {0: "float32", 1: "float16", 28: "float64", 30: "bfloat16"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: `shape` in torch order (rows first), `type` a ggml type number, bytes `[offset, offset + nbytes)`."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """A checked header: metadata with every array in full, and the tensors in the file's order."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]
    spans: dict[str, tuple[int, int]]  # where each metadata pair lies in the file
    tensor_table: tuple[int, int]
    version: int
    alignment: int
    file_bytes: int

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def is_quantized(self) -> bool:
        return any(tensor.type not in PLAIN_TYPES for tensor in self.tensors)

    @property
    def stored_dtype(self) -> str:
        """float32 when anything is quantized; else the narrowest float there is (norms of half files are float32)."""
        names = {PLAIN_TYPES.get(tensor.type, "quantized") for tensor in self.tensors}
        if "quantized" in names:
            return "float32"
        return next(name for name in ("bfloat16", "float16", "float32", "float64") if name in names)


def read_gguf_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """The header of a GGUF file, checked against the file's size.

    Raises ValueError, naming the file and the byte where the trouble is, for a file that is no GGUF, is big-endian,
    split, truncated or corrupt.
    """
    path = Path(path)
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{path}: {size} bytes is too short for a GGUF file; was the download cut off?")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
        return _Parser(path, blob, size).parse()


class _Parser:
    """A position in the header, and what can be read there; every read is checked against the file's end."""

    def __init__(self, path: Path, blob: mmap.mmap, size: int) -> None:
        self.path, self.blob, self.size, self.position = path, blob, size, 0

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self.path}: {what} (at byte {self.position}); the file is truncated or corrupt")

    def take(self, layout: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from("<" + layout, self.blob, self.position)
        except struct.error:
            self.fail("the header runs past the end of the file")
        self.position += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        end = self.position + length
        if length > _MAX_STRING or end > self.size:
            self.fail(f"a text claims {length} bytes")
        raw = self.blob[self.position : end]
        self.position = end
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.fail(f"metadata of unknown type {kind}")
        element, count = self.take("IQ")
        if count > self.size:
            self.fail(f"an array claims {count} elements")
        if element in _SCALARS:
            return list(self.take(f"{count}{_SCALARS[element]}"))
        if element != _STRING:
            self.fail(f"an array with elements of type {element}")
        return [self.string() for _ in range(count)]

    def parse(self) -> GGUFHeader:
        if self.blob[:4] != MAGIC:
            raise ValueError(f"{self.path}: starts with {self.blob[:4]!r}, expected {MAGIC!r}; is it a GGUF file?")
        self.position = 4
        version, tensor_count, pair_count = self.take("IQQ")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise ValueError(f"{self.path}: a big-endian GGUF file; convert it to little-endian first")
            raise ValueError(f"{self.path}: GGUF version {version}; versions 2 and 3 are understood")
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(pair_count):
            start, key = self.position, self.string()
            if key in metadata:
                self.fail(f"metadata names {key!r} twice")
            metadata[key] = self.value(self.take("I")[0])
            spans[key] = (start, self.position)
        if not isinstance(metadata.get("general.architecture"), str):
            raise ValueError(f"{self.path}: the metadata has no general.architecture; is it a language model?")
        if metadata.get("split.count", 1) > 1:
            raise ValueError(
                f"{self.path}: one of {metadata['split.count']} parts; join them first (llama-gguf-split --merge)"
            )
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment % 8 or alignment > 1 << 20:
            self.fail(f"alignment {alignment!r}")
        tensors, table = self.tensors(tensor_count, alignment)
        return GGUFHeader(self.path, metadata, tensors, spans, table, version, alignment, self.size)

    def tensors(self, count: int, alignment: int) -> tuple[tuple[GGUFTensor, ...], tuple[int, int]]:
        start = self.position
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.string()
            (dimensions,) = self.take("I")
            if dimensions > _MAX_DIMENSIONS:
                self.fail(f"tensor {name!r} claims {dimensions} dimensions")
            shape = self.take(f"{dimensions}Q")
            kind, offset = self.take("IQ")
            if name in infos:
                self.fail(f"tensor {name!r} is listed twice")
            infos[name] = tuple(reversed(shape)), kind, offset
        table = (start, self.position)
        data_start = -(-self.position // alignment) * alignment
        tensors, end, last = [], 0, ""
        for name, (shape, kind, offset) in infos.items():
            nbytes = self.tensor_bytes(name, shape, kind)
            if offset % alignment:
                self.fail(f"tensor {name!r} starts at {offset}, no multiple of {alignment}")
            tensors.append(GGUFTensor(name, shape, kind, data_start + offset, nbytes))
            if data_start + offset + nbytes > end:
                end, last = data_start + offset + nbytes, name
        if end > self.size:
            raise ValueError(
                f"{self.path}: truncated: tensor {last!r} ends at byte {end}, the file has {self.size}; fetch it again"
            )
        self.check_overlap(tensors)
        return tuple(tensors), table

    def tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        gguf = import_gguf()
        try:
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            self.fail(f"tensor {name!r} has type {kind}, which the installed gguf package does not know")
        if not shape or shape[-1] % per_block:
            self.fail(f"tensor {name!r} of shape {list(shape)} does not fill blocks of {per_block}")
        return prod(shape) // per_block * block_bytes

    def check_overlap(self, tensors: list[GGUFTensor]) -> None:
        ordered = sorted(tensors, key=lambda tensor: tensor.offset)
        for before, after in itertools.pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                self.fail(f"tensors {before.name!r} and {after.name!r} overlap")


def import_gguf() -> Any:
    """The `gguf` package. Raises ImportError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError('reading GGUF files needs the gguf package: pip install "neuroweave[gguf]"') from error
    return gguf


def write_stand_in(header: GGUFHeader, path: Path) -> None:
    """A small GGUF file with the same metadata and tensor table, without the tokenizer's arrays and without data.

    Two made-up tokens stand for the vocabulary, so that readers which count it find something.
    The data section is a hole of the right length, so that readers which map the tensors accept the file.
    """
    kept = [
        key for key in header.metadata if not (key.startswith("tokenizer.") and isinstance(header.metadata[key], list))
    ]
    with header.path.open("rb") as source, path.open("wb") as out:

        def copy(span: tuple[int, int]) -> None:
            source.seek(span[0])
            out.write(source.read(span[1] - span[0]))

        out.write(MAGIC + struct.pack("<IQQ", header.version, len(header.tensors), len(kept) + 1))
        for key in kept:
            copy(header.spans[key])
        tokens = b"tokenizer.ggml.tokens"
        out.write(struct.pack("<Q", len(tokens)) + tokens + struct.pack("<IIQ", _ARRAY, _STRING, 2))
        out.write((struct.pack("<Q", 1) + b"?") * 2)
        copy(header.tensor_table)
        data_start = -(-header.tensor_table[1] // header.alignment) * header.alignment
        out.truncate(-(-out.tell() // header.alignment) * header.alignment + header.file_bytes - data_start)


@contextmanager
def open_tensors(header: GGUFHeader) -> Iterator[GGUFData]:
    """The tensors' data, mapped: pages are read when a tensor is."""
    import numpy as np

    blob = np.memmap(header.path, mode="r", dtype=np.uint8)
    try:
        yield GGUFData(header, blob)
    finally:
        del blob


class GGUFData:
    """Values of a GGUF file's tensors, as float32 arrays."""

    def __init__(self, header: GGUFHeader, blob: np.ndarray) -> None:
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._blob = blob
        self._path = header.path

    def read(self, name: str) -> np.ndarray:
        """The tensor's values in torch order, dequantized by the gguf package.

        Raises ValueError for a quantization that the installed gguf package cannot undo.
        """
        import numpy as np

        gguf = import_gguf()
        tensor = self._tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.type)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        columns = tensor.shape[-1]
        raw = self._blob[tensor.offset : tensor.offset + tensor.nbytes].reshape(-1, columns // per_block * block_bytes)
        values = np.empty((len(raw), columns), dtype=np.float32)
        rows = max(1, _CHUNK_ELEMENTS // columns)
        try:
            for start in range(0, len(raw), rows):
                block = raw[start : start + rows]
                is_double = PLAIN_TYPES.get(tensor.type) == "float64"
                values[start : start + rows] = block.view("<f8") if is_double else gguf.dequantize(block, kind)
        except NotImplementedError as error:
            raise ValueError(f"{self._path}: tensor {name!r}: {kind.name} cannot be dequantized ({error})") from error
        return values.reshape(tensor.shape)
