"""Delta weights for every gated MLP of a checkpoint, from a bank and a seed: on demand, or written as a folder.

`plan_deltas` says what they will be, `GeneratedDeltas` gives any rows of any of them, `write_deltas` writes them all.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.manifest import file_entry, write_manifest
from neuroweave.checkpoint.reader import INDEX_FILE
from neuroweave.checkpoint.staging import check_free_space, check_output, staged_folder
from neuroweave.checkpoint.writer import DEFAULT_MAX_SHARD_SIZE, ShardWriter, plan_shards
from neuroweave.surgery.neurons.bank import Bank
from neuroweave.surgery.neurons.delta_plan import GATE_SCALE, PROJECTIONS, DeltaLayer, DeltaPlan, plan_deltas
from neuroweave.surgery.neurons.layer_deltas import SYMMETRIES, LayerDeltas, PreparedBank, Projection

__all__ = ["GATE_SCALE", "DeltaPlan", "GeneratedDeltas", "default_workers", "plan_deltas", "write_deltas"]

_BLOCK_BYTES = 4 << 20
_OPEN_LAYERS = 4
_MOST_WORKERS = 8
_MEMORY = Path("/proc/meminfo")


class GeneratedDeltas:
    """The deltas of a plan, by key and rows, from any thread; nothing is kept but a few layers' frames.

    `rows` gives what `write_deltas` writes, to the byte. Raises ValueError for a bank with a zero direction.
    """

    def __init__(self, plan: DeltaPlan, bank: Bank) -> None:
        self.plan = plan
        self.specs: dict[str, TensorSpec] = plan.specs
        self._bank = PreparedBank(bank, plan.hidden, plan.parameters["seed"])
        self._places: dict[str, tuple[DeltaLayer, Projection]] = {
            layer.specs[name].name: (layer, name) for layer in plan.layers for name in PROJECTIONS
        }
        self._open: OrderedDict[str, LayerDeltas] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows `[begin, end)` of the delta called `name`, in its stored dtype."""
        layer, projection = self._places[name]
        return self.layer(layer).block(projection, begin, end)

    def layer(self, layer: DeltaLayer) -> LayerDeltas:
        """The generator of one layer of the plan; the last few stay open."""
        key = layer.specs["gate"].name
        with self._lock:
            if key not in self._open:
                self._open[key] = LayerDeltas(
                    self._bank,
                    self.plan.slots[layer.activation],
                    seed=self.plan.parameters["seed"],
                    layer=layer.layer,
                    path=layer.path,
                    neurons=layer.neurons,
                    dtypes={name: spec.dtype for name, spec in layer.specs.items()},
                    gate_scale=self.plan.parameters["gate_scale"],
                    symmetry=self.plan.parameters["symmetry"],
                )
                while len(self._open) > _OPEN_LAYERS:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]

    def close(self) -> None:
        self._open.clear()


def write_deltas(
    base_model: str | Path, bank: Bank, out: str | Path, *, seed: int = 42, dtype: str | None = None,
    gate_scale: float | int = GATE_SCALE, neurons: int | None = None, layers: Sequence[int] | None = None,
    symmetry: str = SYMMETRIES[0], workers: int | None = None, max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False, progress: Callable[[int, int], None] | None = None,
) -> DeltaPlan:  # fmt: skip
    """Write `out`: safetensors shards with the target's own keys, an index, and a manifest. Returns the plan.

    For the settings see `plan_deltas`. The bytes depend on the bank, the target's headers and config, and the settings,
    not on `workers` (threads; default: one a core, at most 8). `progress(done, total)`: bytes, from any thread.
    `out` appears whole or not at all. Raises ValueError, before anything is written, for what cannot be planned, an
    output that cannot be used, and too little memory or disk space; OSError from the system.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"{workers} workers: expected 1 or more")
    check_output(out, overwrite=overwrite, sources=[base_model])
    plan = plan_deltas(
        base_model, bank, seed=seed, dtype=dtype, gate_scale=gate_scale, neurons=neurons, layers=layers,
        symmetry=symmetry,
    )  # fmt: skip
    count = workers or default_workers()
    check_free_space(out, plan.nbytes)
    check_free_memory(12 * len(bank) * (bank.hidden_size + plan.hidden) + 4 * _BLOCK_BYTES * count)
    deltas = GeneratedDeltas(plan, bank)
    shards = plan_shards(plan.specs.values(), max_shard_size)
    with staged_folder(out, overwrite=overwrite, sources=[base_model]) as folder:
        with ShardWriter(folder, shards) as writer, ThreadPoolExecutor(count) as pool:
            done = 0

            def write(block: tuple[str, int, int]) -> int:
                name, begin, end = block
                rows = deltas.rows(name, begin, end)
                spec = deltas.specs[name]
                row_bytes = spec.nbytes // spec.shape[0]
                writer.write_at(name, begin * row_bytes, rows.reshape(-1).view("u1").data)
                return rows.nbytes

            for nbytes in pool.map(write, list(_blocks(plan.specs.values()))):
                done += nbytes
                if progress is not None:
                    progress(done, plan.nbytes)
            files = [shard.file for shard in shards]
        files += [INDEX_FILE] if len(shards) > 1 else []
        with ThreadPoolExecutor(count) as pool:
            outputs = dict(zip(files, pool.map(file_entry, [folder / name for name in files]), strict=True))
        about = plan.to_dict()
        write_manifest(
            folder,
            operation="deltas",
            parameters=plan.parameters,
            inputs={"base_model": plan.base_model, "bank": plan.bank},
            outputs=outputs,
            **{key: about[key] for key in ("hidden", "layers", "left_out", "realised")},
        )
    return plan


def _blocks(specs: Any) -> Iterator[tuple[str, int, int]]:
    """All rows of all tensors in blocks of about `_BLOCK_BYTES`."""
    for spec in specs:
        rows = spec.shape[0]
        step = max(1, _BLOCK_BYTES * rows // spec.nbytes)
        for begin in range(0, rows, step):
            yield spec.name, begin, min(begin + step, rows)


def default_workers() -> int:
    """One for each core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def check_free_memory(nbytes: int) -> None:
    """Raise ValueError when less than `nbytes` of memory are available, where the system says how much there is."""
    if not _MEMORY.is_file():
        return
    for line in _MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:") and (free := 1024 * int(line.split()[1])) < nbytes:
            raise ValueError(
                f"{nbytes / 1e9:.2f} GB of memory are needed, {free / 1e9:.2f} GB are available; take a smaller bank "
                "or fewer workers"
            )
