"""What differs between two checkpoints: tensors, configuration, other files. Tensor data is read block by block."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.manifest import file_entry
from neuroweave.checkpoint.reader import Checkpoint, read_config
from neuroweave.checkpoint.tensor_difference import TensorDifference, compare_tensor

_CONFIG = "config.json"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass
class Difference:
    """What `compare_checkpoints` found, A before B everywhere.

    `only_a`, `only_b`: tensors of one side. `shapes`: (A's, B's) tensor where the shapes differ. `changed`: common
    tensors with other values or another dtype. `same`: number of tensors equal to the byte. `config`: dotted key to
    `{"a", "b"}`, of which one is absent where the key is. `files`: every other file that differs, to `{"a", "b"}` with
    bytes and SHA-256.
    """

    same: int = 0
    only_a: list[TensorSpec] = field(default_factory=list)
    only_b: list[TensorSpec] = field(default_factory=list)
    shapes: list[tuple[TensorSpec, TensorSpec]] = field(default_factory=list)
    changed: list[TensorDifference] = field(default_factory=list)
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        return not (self.only_a or self.only_b or self.shapes or self.changed or self.config or self.files)


@dataclass(frozen=True)
class Family:
    """Changed tensors whose names differ only in their numbers (`*`): `layers` are the first numbers, sorted.

    `worst`: the member with the largest relative change (one from zero counts as the largest of all).
    """

    name: str
    layers: list[int]
    members: list[TensorDifference]
    worst: TensorDifference

    @property
    def share(self) -> float | None:
        """Share of the elements that differ, over all members."""
        if any(member.differing is None for member in self.members):
            return None
        return sum(member.differing or 0 for member in self.members) / sum(member.elements for member in self.members)


def compare_checkpoints(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:  # fmt: skip
    """Compare two checkpoint folders. How tensors are spread over shards, and their order, does not count.

    `threads`: tensors compared at a time (default: the processors, at most 4). `progress(done, total)`: bytes of A's
    tensors. Raises ValueError for a folder that is no checkpoint.
    """
    found = Difference()
    with Checkpoint(a) as first, Checkpoint(b) as second:
        found.only_a = [first[name] for name in first if name not in second]
        found.only_b = [second[name] for name in second if name not in first]
        common = [name for name in first if name in second]
        found.shapes = [(first[name], second[name]) for name in common if first[name].shape != second[name].shape]
        names = [name for name in common if first[name].shape == second[name].shape]
        done, total = 0, sum(first[name].nbytes for name in names)
        pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 4))
        try:
            compared = pool.map(lambda name: compare_tensor(first, second, name), names)
            for name, difference in zip(names, compared, strict=True):
                if difference is not None:
                    found.changed.append(difference)
                done += first[name].nbytes
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C only what runs is waited for
        found.same = len(names) - len(found.changed)
        found.config = compare_configs(first.folder, second.folder)
        found.files = _compare_files(first, second)
    return found


def compare_configs(a: Path, b: Path) -> dict[str, dict[str, Any]]:
    """Keys of config.json that differ, nested ones dotted, to `{"a": value, "b": value}`; an absent key is left out."""
    if not ((a / _CONFIG).is_file() and (b / _CONFIG).is_file()):
        return {}  # one that is missing counts as a file
    sides = dict(_flat(read_config(a))), dict(_flat(read_config(b)))
    return {
        key: {side: values[key] for side, values in zip("ab", sides, strict=True) if key in values}
        for key in dict.fromkeys([*sides[0], *sides[1]])
        if key not in sides[0] or key not in sides[1] or not _equal(sides[0][key], sides[1][key])
    }


def families(changed: Iterable[TensorDifference]) -> list[Family]:
    """Changed tensors by family and pair of dtypes, the worst first."""
    groups: dict[tuple[str, tuple[str, str]], list[TensorDifference]] = {}
    for item in changed:
        groups.setdefault((_NUMBER.sub("*", item.name), item.dtypes), []).append(item)
    found = []
    for (name, _), members in groups.items():
        numbers = {first_number(member.name) for member in members}
        layers = sorted(number for number in numbers if number is not None)
        found.append(Family(name, layers, members, max(members, key=badness)))
    return sorted(found, key=lambda family: badness(family.worst), reverse=True)


def first_number(name: str) -> int | None:
    """The first part of a tensor's name that is a number: its layer, for almost every tensor that has one."""
    match = _NUMBER.search(name)
    return int(match[0]) if match else None


def badness(item: TensorDifference) -> float:
    """What tensors are sorted by: the relative change, infinite for one from zero or without values."""
    if item.relative is not None:
        return item.relative
    return 0.0 if item.differing == 0 else float("inf")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _equal(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)  # in Python, True == 1


def _compare_files(a: Checkpoint, b: Checkpoint) -> dict[str, dict[str, Any]]:
    names = [set(side.other_files) for side in (a, b)]
    both_configs = all(_CONFIG in side for side in names)
    found = {}
    for name in sorted(names[0] | names[1]):
        if name == _CONFIG and both_configs:
            continue
        paths = {label: side.folder / name for label, side, own in zip("ab", (a, b), names, strict=True) if name in own}
        sides = {label: file_entry(path) for label, path in paths.items() if path.is_file()}
        if len(sides) < 2 or sides["a"] != sides["b"]:
            found[name] = sides
    return found
