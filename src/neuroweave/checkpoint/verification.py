"""Is a checkpoint whole and sound: index, shards, values, and the hashes that are known for its files.

What is wrong is collected, not raised: one run names everything. Tensor data is read once, block by block.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neuroweave.checkpoint.describe import base_config, text_config
from neuroweave.checkpoint.header import Header, TensorEntry, read_header
from neuroweave.checkpoint.known_files import known_files
from neuroweave.checkpoint.layers import find_embedding, find_stacks
from neuroweave.checkpoint.manifest import MANIFEST_FILE, sha256_of
from neuroweave.checkpoint.reader import INDEX_FILE, SINGLE_FILE, list_files, read_config, read_index
from neuroweave.checkpoint.scanning import FileScan, scan_file

_MARKS = ("config.json", "adapter_config.json", MANIFEST_FILE)  # of a folder whose tensor files belong together
PROBLEM, WARNING, NOTE = "problem", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. `level`: a problem makes the checkpoint unsound; a warning and a note do
    not. `kind`: a word or two to group by. `file` is a name in the folder, `tensor` a name or ""."""

    level: str
    kind: str
    file: str
    tensor: str
    text: str


@dataclass
class Verification:
    """What `verify_checkpoint` found. `files`: shard to `{"bytes", "tensors", "sha256"}` (the hash if it was asked
    for); `matched`: number of files whose hash was known and is right; `source`: where the known hashes come from."""

    path: Path
    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    matched: int = 0
    source: str = ""
    values: bool = True
    findings: list[Finding] = field(default_factory=list)

    def at(self, level: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    @property
    def sound(self) -> bool:
        return not self.at(PROBLEM)

    def add(self, level: str, kind: str, file: str, text: str, tensor: str = "") -> None:
        self.findings.append(Finding(level, kind, file, tensor, text))


def verify_checkpoint(
    path: str | os.PathLike[str], *, hashed: bool = True, values: bool = True, threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:  # fmt: skip
    """Check a checkpoint folder, or one safetensors file.

    Always: every header against its file, the index against the headers, config.json's vocabulary and layers, file
    sizes known from a manifest or the hub. `values`: no float is NaN or infinite. `hashed`: the SHA-256 of each shard,
    and of every file whose hash is known. `threads`: files read at a time (default: the processors, at most 4).
    `progress(done, total)`: bytes of shards, from any thread.
    Raises ValueError for a path that is no checkpoint at all.
    """
    path = Path(path)
    found = Verification(path, values=values)
    folder, names = (path.parent, [path.name]) if path.is_file() else (path, _shards(path, found))
    headers: dict[str, Header] = {}
    for name in names:
        try:
            headers[name] = read_header(folder / name)
        except ValueError as error:
            found.add(PROBLEM, "file", name, _without_path(error, folder / name))
    found.tensors = sum(len(header.tensors) for header in headers.values())
    found.parameters = sum(entry.parameters for header in headers.values() for entry in header.tensors.values())
    found.nbytes = sum(header.data_bytes for header in headers.values())
    for name in names:
        tensors = len(headers[name].tensors) if name in headers else None
        found.files[name] = {"bytes": (folder / name).stat().st_size, "tensors": tensors}
    if path.is_dir():
        _check_index(found, headers)
        _check_config(found, headers)
        _check_strays(found, names)
    if hashed or values:
        _check_data(found, folder, headers, hashed=hashed, threads=threads, progress=progress)
    if path.is_dir():
        _check_known(found, hashed=hashed)
    return found


# Which files


def _shards(folder: Path, found: Verification) -> list[str]:
    """The safetensors files that loaders read: the single file, else the index's, else all at the top."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such file or folder; expected a checkpoint folder or a .safetensors file")
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        try:
            named = set(read_index(folder / INDEX_FILE)["weight_map"].values())
            return sorted(name for name in named if (folder / name).is_file())
        except ValueError:
            pass  # reported by `_check_index`; what lies in the folder can be checked all the same
    names = sorted(item.name for item in folder.glob("*.safetensors") if item.is_file())
    if (folder / INDEX_FILE).is_file():
        return names
    if not names or not any((folder / mark).is_file() for mark in _MARKS):
        raise ValueError(f"{folder}: no checkpoint in this folder{_elsewhere(folder, names)}")
    found.add(NOTE, "layout", "", f"no {SINGLE_FILE} and no {INDEX_FILE}: each .safetensors file is checked alone")
    return names


def _elsewhere(folder: Path, files: list[str]) -> str:
    """What a person may have meant by a folder that is no checkpoint: folders in it that are, and files."""
    inside = sorted(item.name for item in folder.iterdir() if item.is_dir())
    checkpoints = [
        name for name in inside if any((folder / name / file).is_file() for file in (SINGLE_FILE, INDEX_FILE))
    ]
    parts = [f"the folders {_some(checkpoints)} in it are"] if len(checkpoints) > 1 else []
    parts += [f"the folder {checkpoints[0]} in it is"] if len(checkpoints) == 1 else []
    parts += [f"to check a file alone, name it: {_some(files)}"] if files else []
    return "".join(f"; {part}" for part in ["nothing was checked", *parts])


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_strays(found: Verification, names: list[str]) -> None:
    for name in list_files(found.path):
        if name.endswith(".safetensors") and name not in names:
            found.add(WARNING, "stray file", name, "not part of the checkpoint; not checked")


# The index


def _check_index(found: Verification, headers: dict[str, Header]) -> None:
    path = found.path / INDEX_FILE
    if not path.is_file():
        return
    try:
        index = read_index(path)
    except ValueError as error:
        found.add(PROBLEM, "index", INDEX_FILE, _without_path(error, path))
        return
    weight_map: dict[str, str] = index["weight_map"]
    if SINGLE_FILE in found.files and set(weight_map.values()) != {SINGLE_FILE}:
        found.add(WARNING, "index", INDEX_FILE, f"loaders ignore it: {SINGLE_FILE} lies beside it")
        return
    homes: dict[str, list[str]] = {}
    for file, header in headers.items():
        for name in header.tensors:
            homes.setdefault(name, []).append(file)
    absent: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if file not in found.files:
            absent.setdefault(file, []).append(name)
        elif file in headers and name not in headers[file].tensors:
            where = f"it is in {homes[name][0]}" if name in homes else "no shard holds it"
            found.add(PROBLEM, "missing tensor", file, f"the index sends it here, but {where}", name)
    for file, missing in absent.items():
        found.add(PROBLEM, "missing file", file, f"the index sends {len(missing)} tensors here, such as {missing[0]}")
    for name, files in homes.items():
        for file in files:
            if name not in weight_map:
                found.add(PROBLEM, "orphan tensor", file, "the index does not name it", name)
            elif weight_map[name] != file and len(files) > 1:
                found.add(PROBLEM, "orphan tensor", file, f"the index takes it from {weight_map[name]}", name)
    if len(headers) == len(found.files) and not absent:
        _check_total_size(found, index.get("metadata", {}).get("total_size"))


def _check_total_size(found: Verification, stated: Any) -> None:
    """Loaders ignore the figure; but one that nothing explains may be the trace of a shard that went missing."""
    if stated is None or stated == found.nbytes:
        return
    text = f"total_size is {stated}, the tensors take {found.nbytes} bytes"
    explanations = {
        found.parameters: "it counts parameters",
        sum(entry["bytes"] for entry in found.files.values()): "it counts whole files, headers too",
        2 * found.nbytes: "it is of a type twice as wide",
        found.nbytes // 2: "it is of a type half as wide",
    }
    if isinstance(stated, int) and stated in explanations:
        found.add(WARNING, "total size", INDEX_FILE, f"{text}: {explanations[stated]}; loaders ignore it")
    else:
        found.add(PROBLEM, "total size", INDEX_FILE, text)


# config.json


def _check_config(found: Verification, headers: dict[str, Header]) -> None:
    """Vocabulary and number of layers against the tensors; warnings, because a few families count otherwise."""
    if not (found.path / "config.json").is_file():
        return
    try:
        config = text_config(base_config(read_config(found.path))[0])
    except ValueError as error:
        found.add(PROBLEM, "config", "config.json", _without_path(error, found.path / "config.json"))
        return
    tensors = [entry for header in headers.values() for entry in header.tensors.values()]
    embedding, vocabulary = find_embedding(tensors), config.get("vocab_size")
    if embedding is not None and type(vocabulary) is int and embedding.shape[:1] != (vocabulary,):
        text = f"vocab_size is {vocabulary}, the embedding has shape {list(embedding.shape)}"
        found.add(WARNING, "config", "config.json", text, embedding.name)
    stacks, layers = find_stacks(tensors), config.get("num_hidden_layers")
    if stacks and type(layers) is int and 0 < layers <= 10_000:
        absent = [number for number in range(layers) if number not in stacks[0].layers]
        if absent:
            text = f"num_hidden_layers is {layers}; {len(absent)} layers have no tensor, the first is {absent[0]}"
            found.add(WARNING, "config", "config.json", text, stacks[0].prefix)


# The data


def _check_data(
    found: Verification, folder: Path, headers: dict[str, Header], *, hashed: bool, threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    lock, stop, done = threading.Lock(), threading.Event(), 0
    total = sum(entry["bytes"] for entry in found.files.values())

    def count(nbytes: int) -> None:
        nonlocal done
        if stop.is_set():
            raise InterruptedError("stopped")
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    def scan(name: str) -> FileScan | ValueError:
        try:
            return scan_file(folder / name, headers.get(name), hashed=hashed, values=found.values, progress=count)
        except ValueError as error:
            return error

    names = list(found.files)
    pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 4))
    try:
        for name, scanned in zip(names, pool.map(scan, names), strict=True):
            if isinstance(scanned, ValueError):
                found.add(PROBLEM, "file", name, _without_path(scanned, folder / name))
                continue
            if scanned.sha256 is not None:
                found.files[name]["sha256"] = scanned.sha256
            if name in headers:
                _report_values(found, name, headers[name], scanned)
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _report_values(found: Verification, file: str, header: Header, scanned: FileScan) -> None:
    for name, values in scanned.values.items():
        entry = header.tensors[name]
        if values.first is not None:
            parts = [f"{count} {word}" for count, word in ((values.nan, "NaN"), (values.infinite, "infinite")) if count]
            where = f"the first at {_place(values.first, entry)}"
            text = f"{' and '.join(parts)} of {entry.parameters} values; {where}"
            found.add(PROBLEM, "not finite", file, text, name)
        elif values.zero:
            found.add(NOTE, "all zero", file, f"all {entry.parameters} values are zero", name)


def _place(flat: int, entry: TensorEntry) -> str:
    return str([int(index) for index in np.unravel_index(flat, entry.shape)]) if entry.shape else "[]"


# Known sizes and hashes


def _check_known(found: Verification, *, hashed: bool) -> None:
    try:
        known = known_files(found.path)
    except ValueError as error:
        found.add(PROBLEM, "manifest", MANIFEST_FILE, _without_path(error, found.path / MANIFEST_FILE))
        return
    found.source = known.source
    for name, (size, sha256) in known.files.items():
        path = found.path / name
        if not path.is_file():
            found.add(PROBLEM, "missing file", name, f"{known.source} names it, it is not there")
        elif size is not None and path.stat().st_size != size:
            text = f"{path.stat().st_size} bytes, {size} according to {known.source}"
            found.add(PROBLEM, "changed file", name, text)
        elif hashed and sha256 is not None:
            actual = found.files.get(name, {}).get("sha256") or sha256_of(path)
            if actual == sha256:
                found.matched += 1
            else:
                text = f"SHA-256 {actual}, {sha256} according to {known.source}"
                found.add(PROBLEM, "changed file", name, text)
    for name in known.unnamed:
        found.add(WARNING, "extra file", name, f"{known.source} does not name it")


def _without_path(error: ValueError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{path.parent}: ")
