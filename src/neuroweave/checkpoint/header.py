"""The header of a safetensors file: parsed, checked and built without reading tensor data.

A file is 8 bytes of header length (little endian), the header (JSON), and the data. Offsets in the header count from
the start of the data. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import Any, NoReturn

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_JSON_BYTES = 100_000_000  # of an index or a configuration: far more than any has
_MAX_ELEMENTS = (1 << 64) - 1  # what the library can count, and what keeps products of absurd shapes small

# bits per element; F4 and the F6 pair pack several elements into one byte
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# what people and config.json call the dtypes; the rest keep the name of the file format
DTYPE_NAMES: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool", "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, before it has a place: name, dtype (a key of `DTYPE_BITS`) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return byte_count(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class TensorEntry(TensorSpec):
    """One line of a header: the tensor's bytes are `[begin, end)`, counted from the start of the data."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `tensors` keeps the order of the file's JSON; `data_start` is an offset in the file."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)
    data_start: int = 0

    @property
    def data_bytes(self) -> int:
        return max((entry.end for entry in self.tensors.values()), default=0)


def byte_count(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor takes. Raises ValueError when packed elements do not fill whole bytes."""
    bits = DTYPE_BITS[dtype] * prod(shape)
    if bits % 8:
        raise ValueError(f"shape {list(shape)} of {dtype} does not fill whole bytes")
    return bits // 8


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of the safetensors file at `path`, checked against the file's size.

    Raises ValueError, naming the file, for anything that is not a whole and consistent safetensors file.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: {size} bytes is too short for a safetensors file; was the download cut off?")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: the header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed; "
                "this is not a safetensors file, or it is corrupt"
            )
        if 8 + length > size:
            raise ValueError(
                f"{path}: truncated: the header needs {8 + length} bytes, the file has {size}; fetch it again"
            )
        raw = file.read(length)
    return parse_header(raw, file=str(path), file_bytes=size)


def parse_header(raw: bytes, *, file: str, file_bytes: int) -> Header:
    """A checked `Header` from the JSON bytes between the length and the data.

    `file` is the name that errors carry; `file_bytes` the size of the whole file, length prefix included.
    Raises ValueError for invalid JSON or UTF-8, wrong types, duplicate names, unknown dtypes, sizes that disagree
    with dtype and shape, and offsets that overlap, leave a gap, or do not end where the file ends. What passes here
    passes in the safetensors library; that lets through more: names that appear twice, unknown fields, an entry
    written as a list, `null` as metadata.
    """
    if not raw.startswith(b"{"):
        raise ValueError(f"{file}: the header starts with {raw[:1]!r}, expected '{{'; is it a safetensors file?")
    content = parse_json(raw, file=file, what="header")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: __metadata__ must map strings to strings")
    tensors = {name: _parse_entry(name, value, file) for name, value in content.items()}
    _check_layout(tensors, file=file, data_bytes=file_bytes - 8 - len(raw))
    return Header(tensors, metadata, data_start=8 + len(raw))


def build_header(tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> tuple[bytes, Header]:
    """The bytes before the data (length prefix included) for tensors laid out in the order given, and their `Header`.

    The JSON is padded with spaces so that the data starts at a multiple of 8, as the safetensors library does.
    Raises ValueError for a duplicate or reserved name, an unknown dtype, or a header over the size limit.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    entries: dict[str, TensorEntry] = {}
    position = 0
    for spec in tensors:
        if spec.name in entries or spec.name == "__metadata__":
            raise ValueError(f"tensor name {spec.name!r} is {'taken twice' if spec.name in entries else 'reserved'}")
        if spec.dtype not in DTYPE_BITS:
            raise ValueError(f"tensor {spec.name}: dtype {spec.dtype!r} is unknown; known: {', '.join(DTYPE_BITS)}")
        end = position + spec.nbytes
        entries[spec.name] = TensorEntry(spec.name, spec.dtype, tuple(spec.shape), position, end)
        content[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(entries)} tensors make a header of {len(raw)} bytes; at most {MAX_HEADER_BYTES} fit")
    return len(raw).to_bytes(8, "little") + raw, Header(entries, dict(metadata or {}), data_start=8 + len(raw))


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """The JSON object in a file, as `parse_json`. Raises ValueError for a file of absurd size, before it is read."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes are too many for the {what}; at most {MAX_JSON_BYTES} are read")
    return parse_json(path.read_bytes(), file=str(path), what=what)


def parse_json(raw: bytes, *, file: str, what: str) -> dict[str, Any]:
    """A JSON object from `raw`, in which no key appears twice and every text is Unicode.

    Raises ValueError with the file's name.
    """

    def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DuplicateKeyError(f"{file}: the {what} names {_short(twice)} twice")
        return result

    def refuse_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    options: dict[str, Any] = {"object_pairs_hook": object_without_duplicates, "parse_constant": refuse_constant}
    if b"-0" in raw:  # a float, as in other languages: so that it is no size
        options["parse_int"] = lambda text: -0.0 if text == "-0" else int(text)
    try:
        value = json.loads(raw.decode("utf-8"), **options)
        if _SURROGATE.search(raw):  # only then, for speed: json.loads lets half a pair through
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{file}: the {what} holds half of a surrogate pair, which is no text") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: the {what} is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise ValueError(f"{file}: the {what} is nested too deeply") from error
    except DuplicateKeyError:
        raise
    except ValueError as error:
        raise ValueError(f"{file}: the {what} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: the {what} is a JSON {type(value).__name__}, expected an object")
    return value


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class DuplicateKeyError(ValueError):
    """A JSON object with the same key twice."""


def _parse_entry(name: str, value: Any, file: str) -> TensorEntry:
    where = f"{file}: tensor {_short(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets, got {_short(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{where}: unknown dtype {_short(dtype)}; known: {', '.join(DTYPE_BITS)}")
    if not _is_sizes(shape):
        raise ValueError(f"{where}: shape {_short(shape)} is not a list of sizes")
    # also where a size of 0 makes the product small: the library counts up to each
    if max(shape, default=0) > _MAX_ELEMENTS or any(count > _MAX_ELEMENTS for count in accumulate(shape, mul)):
        raise ValueError(f"{where}: shape {_short(shape)} has more elements than can be counted")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: data_offsets {_short(offsets)} are not [begin, end]")
    begin, end = offsets
    try:
        expected = byte_count(dtype, shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if end - begin != expected:
        raise ValueError(
            f"{where}: {dtype} of shape {_short(shape)} takes {expected} bytes, its data_offsets span {end - begin}"
        )
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _check_layout(tensors: dict[str, TensorEntry], *, file: str, data_bytes: int) -> None:
    """The tensors must tile the data exactly: no gap, no overlap, nothing after the last one."""
    position, previous = 0, "the start"
    for entry in sorted(tensors.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            how = "overlaps" if entry.begin < position else f"leaves a gap of {entry.begin - position} bytes after"
            raise ValueError(f"{file}: tensor {_short(entry.name)} {how} {previous}")
        position, previous = entry.end, _short(entry.name)
    if position > data_bytes:
        raise ValueError(
            f"{file}: truncated: tensor {previous} ends at data byte {position}, the file holds {data_bytes}; "
            "fetch it again"
        )
    if position < data_bytes:
        raise ValueError(f"{file}: {data_bytes - position} bytes after the last tensor belong to no tensor")


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
