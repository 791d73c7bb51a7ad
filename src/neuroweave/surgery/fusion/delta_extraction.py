"""The delta that turns checkpoint A into checkpoint B: D = B - A, written like generated deltas.

Applied by the additive fuse: B' = round(A + D), A and D in float32, one rounding to the stored dtype. With D in
float32, B' is B except where |A| is so much larger than |B| that the places of D are coarser than those of B (or where
B is a power of two, whose places below are half as wide): then no D reaches B. (The set of D that do is an interval
around B - A no wider than the places of B, so the D nearest to B - A is in it when any is; trying its neighbours mended
none of 4 million such elements.) Every element is checked.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neuroweave.checkpoint.header import DTYPE_NAMES, TensorSpec
from neuroweave.checkpoint.manifest import file_entry, write_manifest
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.staging import check_free_space, staged_folder
from neuroweave.checkpoint.tensor_difference import paired_blocks, same_bytes
from neuroweave.checkpoint.writer import DEFAULT_MAX_SHARD_SIZE, ShardWriter, plan_shards

STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
DELTA_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
APPLIED_BY = {"mode": "additive", "alpha_mode": "plain", "alpha": 1.0, "targets": "all"}
"""The options of `neuroweave fuse` that apply an extracted delta."""


@dataclass
class Misses:
    """Elements that A + D does not give back to the bit, and the largest |B' - B| of one."""

    count: int = 0
    largest: float = 0.0


@dataclass
class ExtractedDelta:
    """What `extract_delta` wrote. `same`: tensors equal in A and B, which the delta leaves out; `misses`: tensor to
    what the fuse will miss there."""

    folder: Path
    tensors: int
    elements: int
    nbytes: int
    same: int
    misses: dict[str, Misses] = field(default_factory=dict)

    @property
    def missed(self) -> int:
        return sum(miss.count for miss in self.misses.values())


def extract_delta(
    a: str | os.PathLike[str], b: str | os.PathLike[str], output: str | os.PathLike[str], *,
    dtype: str = "float32", max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE, overwrite: bool = False,
    hashed: bool = True, threads: int | None = None, progress: Callable[[int, int], None] | None = None,
) -> ExtractedDelta:  # fmt: skip
    """Write the folder `output`: D = B - A for every tensor that differs, as `dtype` (a key of `DELTA_DTYPES`).

    `hashed`: the manifest records the SHA-256 of both inputs' shards and of the outputs, not only their sizes.
    `progress(done, total)`: bytes of D, from any thread.
    Raises ValueError, before anything is written, when nothing differs, when names, shapes or types do, and when a
    tensor that differs is not float32, float16 or bfloat16; and, leaving no output, for values that are not finite.
    """
    if dtype not in DELTA_DTYPES:
        raise ValueError(f"dtype {dtype!r} cannot store a delta; choose {' or '.join(DELTA_DTYPES)}")
    workers = threads or min(os.cpu_count() or 1, 4)
    with Checkpoint(a) as first, Checkpoint(b) as second:
        changed = _changed(first, second, workers)
        specs = [TensorSpec(name, DELTA_DTYPES[dtype], first[name].shape) for name in changed]
        nbytes = sum(spec.nbytes for spec in specs)
        check_free_space(output, nbytes)
        with staged_folder(output, overwrite=overwrite, sources=[a, b]) as folder:
            with ShardWriter(folder, plan_shards(specs, max_shard_size)) as writer:
                found = _write_all(first, second, writer, changed, workers, progress)
            _write_manifest(folder, {"model": first, "result": second}, dtype, found, hashed=hashed)
        elements = sum(spec.parameters for spec in specs)
        misses = {name: miss for name, miss in found.items() if miss.count}
        return ExtractedDelta(Path(output), len(specs), elements, nbytes, len(first) - len(specs), misses)


def _changed(a: Checkpoint, b: Checkpoint, workers: int) -> list[str]:
    """The names of the tensors that differ, in A's order. Raises ValueError for what no delta can express."""
    for side, own, other in (("A", a, b), ("B", b, a)):
        alone = [name for name in own if name not in other]
        if alone:
            names = ", ".join(alone[:3]) + (f" and {len(alone) - 3} more" if len(alone) > 3 else "")
            raise ValueError(f"only in {side} ({own.folder}): {names}; a delta needs the same tensors in A and B")
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(
                f"{name}: shape {list(a[name].shape)} in A, {list(b[name].shape)} in B; a delta needs equal shapes"
            )
        if a[name].dtype != b[name].dtype:
            raise ValueError(
                f"{name}: {_named(a[name])} in A, {_named(b[name])} in B; a fuse keeps A's type, so that no delta "
                "gives B; store both in one type"
            )
    pool = ThreadPoolExecutor(workers)
    try:
        equal = list(pool.map(lambda name: same_bytes(a, b, name), a))
    finally:
        pool.shutdown(cancel_futures=True)
    changed = [name for name, same in zip(a, equal, strict=True) if not same]
    if not changed:
        raise ValueError(f"nothing differs: the tensors of {a.folder} and {b.folder} are equal to the byte")
    for name in changed:
        if a[name].dtype not in STORED:
            allowed = ", ".join(DTYPE_NAMES[code] for code in STORED)
            raise ValueError(f"{name}: differs and is {_named(a[name])}; a delta is added to {allowed} only")
    return changed


def _named(spec: TensorSpec) -> str:
    return DTYPE_NAMES.get(spec.dtype, spec.dtype)


def _write_all(
    a: Checkpoint, b: Checkpoint, writer: ShardWriter, names: list[str], workers: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Misses]:  # fmt: skip
    lock, done = threading.Lock(), 0

    def write(name: str) -> Misses:
        nonlocal done
        spec, miss, position = writer.spec(name), Misses(), 0
        for old, new in paired_blocks(a, b, name):
            delta = delta_block(old, new, STORED[spec.dtype])
            if not (np.isfinite(delta.astype("f4")) & np.isfinite(old.astype("f4"))).all():
                raise ValueError(_not_finite(name, old, new))
            _check(name, old, new, delta, miss)
            writer.write_at(name, position, delta.view("u1").data)
            position += delta.nbytes
            with lock:
                done += delta.nbytes
                if progress is not None:
                    progress(done, writer.total_size)
        return miss

    pool = ThreadPoolExecutor(workers)
    try:
        return dict(zip(names, pool.map(write, names), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def delta_block(old: np.ndarray, new: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """new - old in float32, rounded to `dtype`; -0 where the two are equal, because x + -0 is x even for x = -0."""
    with np.errstate(over="ignore", invalid="ignore"):
        delta = new.astype("f4") - old.astype("f4")
    bits = f"u{old.itemsize}"
    np.copyto(delta, np.float32(-0.0), where=old.view(bits) == new.view(bits))
    return delta.astype(dtype)


def _check(name: str, old: np.ndarray, new: np.ndarray, delta: np.ndarray, miss: Misses) -> None:
    """Add the elements of a block that the fuse will not give back: its arithmetic, on A and the D that is stored."""
    with np.errstate(over="ignore"):
        fused = (old.astype("f4") + delta.astype("f4")).astype(old.dtype)
    bits = f"u{old.itemsize}"
    wrong = fused.view(bits) != new.view(bits)
    count = int(np.count_nonzero(wrong))
    if count:
        miss.count += count
        gap = np.abs(fused[wrong].astype("f8") - new[wrong].astype("f8"))
        miss.largest = max(miss.largest, float(gap.max()))
        if not math.isfinite(miss.largest):
            raise ValueError(f"{name}: A + D leaves the range of the stored type; store the delta as float32")


def _not_finite(name: str, old: np.ndarray, new: np.ndarray) -> str:
    for side, block in (("A", old), ("B", new)):
        if not np.isfinite(block.astype("f4")).all():
            return f"{name}: {side} holds NaN or infinite values; a fuse refuses them (neuroweave verify shows where)"
    return f"{name}: the difference of A and B does not fit the delta's type"


def _write_manifest(
    folder: Path, inputs: dict[str, Checkpoint], dtype: str, found: dict[str, Misses], *, hashed: bool
) -> dict[str, Any]:
    sources = {
        label: {"files": {name: file_entry(side.folder / name, hashed=hashed) for name in sorted(side.shards)}}
        for label, side in inputs.items()
    }
    outputs = {path.name: file_entry(path, hashed=hashed) for path in sorted(folder.iterdir())}
    parameters = {"dtype": dtype, "fuse": APPLIED_BY}
    missed = {name: miss.count for name, miss in found.items() if miss.count}
    return write_manifest(
        folder, operation="extract-delta", parameters=parameters, inputs=sources, outputs=outputs, not_reproduced=missed
    )
