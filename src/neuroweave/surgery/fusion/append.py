"""Append synthetic neurons to every MLP: gate and up grow by rows, down by columns, and the configuration with them.

With a gain of 0 the new down columns are zero and the model computes what it did: each new neuron adds 0 * h.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neuroweave.checkpoint.copying import write_from
from neuroweave.checkpoint.describe import text_config
from neuroweave.checkpoint.header import TensorSpec, build_header
from neuroweave.checkpoint.reader import Checkpoint, read_index
from neuroweave.checkpoint.rewriting import Group, Piece, ShardRewrite, copy_pieces
from neuroweave.checkpoint.sealed import KEY
from neuroweave.surgery.fusion.arithmetic import STORED, Effect
from neuroweave.surgery.fusion.plan import DeltaSource, FusionPlan, Target
from neuroweave.surgery.fusion.tensor_edit import rows_per_piece

SIZE_KEY = "intermediate_size"


def check_append(checkpoint: Checkpoint, plan: FusionPlan) -> None:
    """Add to the plan's problems what makes it impossible to append: sizes that the configuration cannot say."""
    config = checkpoint.config()
    if KEY in config:
        plan.problems.append("a patched checkpoint has activations for each neuron; append to the original, then patch")
        return
    grown: dict[int | None, dict[str, int]] = {}
    for target in plan.targets:
        bias = target.stored.name.removesuffix(".weight") + ".bias"
        if bias in checkpoint:
            plan.problems.append(f"{bias}: an MLP with biases cannot grow: the new neurons bring none")
        (rows, columns), (new_rows, new_columns) = target.stored.shape, target.delta.shape
        width, count = (rows, new_columns) if target.projection == "down" else (columns, new_rows)
        if (new_rows if target.projection == "down" else new_columns) != width:
            plan.problems.append(
                f"{target.stored.name}: neurons of hidden size {width} are needed, the delta has shape "
                f"{list(target.delta.shape)}"
            )
        if target.projection in grown.setdefault(target.layer, {}):
            plan.problems.append(f"layer {target.layer} holds two MLPs: one intermediate size cannot say how they grow")
        grown[target.layer][target.projection] = count
    for layer, counts in grown.items():
        if set(counts) != {"gate", "up", "down"} or len(set(counts.values())) > 1:
            plan.problems.append(
                f"layer {layer}: gate, up and down must bring the same number of neurons, got {counts}"
            )
    try:
        grown_config(config, plan)
    except ValueError as error:
        plan.problems.append(str(error))


def grown_config(config: dict[str, Any], plan: FusionPlan) -> dict[str, Any]:
    """The configuration with the new intermediate size. Raises ValueError where one number cannot say it."""
    result = json.loads(json.dumps(config))
    text = text_config(result)
    holder = next((part for part in result.values() if part == text and isinstance(part, dict)), result)
    sizes = {target.layer: target for target in plan.targets if target.projection == "gate"}
    stated = holder.get(SIZE_KEY)
    layers = [layer for layer in sizes if layer is not None]
    if isinstance(stated, list):
        for layer in layers:
            stated[layer] = sizes[layer].stored.shape[0] + sizes[layer].delta.shape[0]
        return result
    before = {target.stored.shape[0] for target in sizes.values()}
    after = {target.stored.shape[0] + target.delta.shape[0] for target in sizes.values()}
    if before != {stated} or len(after) != 1 or plan.uncovered or plan.left_out:
        raise ValueError(
            f"config.json says {SIZE_KEY} {stated} for all layers at once: neurons can be appended only to all layers, "
            "the same number to each"
        )
    holder[SIZE_KEY] = after.pop()
    return result


def grown_index(index: dict[str, Any], plan: FusionPlan) -> dict[str, Any]:
    """The index with the new totals; files and names stay."""
    metadata = dict(index.get("metadata", {}))
    for key, added in (
        ("total_size", sum(added_bytes(target) for target in plan.targets)),
        ("total_parameters", sum(target.delta.parameters for target in plan.targets)),
    ):
        if isinstance(metadata.get(key), int):
            metadata[key] += added
    return index | ({"metadata": metadata} if "metadata" in index else {})


def added_bytes(target: Target) -> int:
    return target.delta.parameters * STORED[target.stored.dtype].itemsize


def append_shard(
    checkpoint: Checkpoint, file: str, targets: Sequence[Target], deltas: DeltaSource, gain: float
) -> tuple[dict[str, Effect], ShardRewrite]:
    """The shard with its grown tensors, in the order of its data; metadata is kept."""
    header, source = checkpoint.shards[file], checkpoint.descriptor(file)
    grown = {target.stored.name: target for target in targets}
    entries = sorted(header.tensors.values(), key=lambda entry: (entry.begin, entry.end))
    specs = [TensorSpec(entry.name, entry.dtype, _shape(entry.shape, grown.get(entry.name))) for entry in entries]
    head, new = build_header(specs, header.metadata)
    groups = []
    for entry in entries:
        begin, new_begin = header.data_start + entry.begin, new.data_start + new.tensors[entry.name].begin
        target = grown.get(entry.name)
        if target is not None and target.projection == "down":
            groups.append(Group(_down_pieces(checkpoint, target, deltas, gain, new_begin)))
            continue
        groups.append(Group(copy_pieces(source, begin, new_begin, entry.nbytes)))
        if target is not None:
            groups.append(Group(_row_pieces(target, deltas, new_begin + entry.nbytes)))
    effects = {target.stored.name: Effect(target.delta.parameters, target.delta.parameters) for target in targets}
    return effects, ShardRewrite(file, head, new.data_start + new.data_bytes, groups)


def _shape(shape: tuple[int, ...], target: Target | None) -> tuple[int, ...]:
    if target is None:
        return shape
    rows, columns = target.delta.shape
    return (shape[0], shape[1] + columns) if target.projection == "down" else (shape[0] + rows, shape[1])


def _row_pieces(target: Target, deltas: DeltaSource, position: int) -> list[Piece]:
    rows, columns = target.delta.shape
    dtype = STORED[target.stored.dtype]
    step = rows_per_piece(columns * dtype.itemsize)

    def piece(begin: int, end: int) -> Piece:
        start = position + begin * columns * dtype.itemsize

        def make(prepared: Any) -> Callable[[int], None]:
            block = _finite(deltas.rows(target.delta.name, begin, end).astype(dtype), target)
            return lambda descriptor: write_from(descriptor, block.view("u1").reshape(-1).data, start)

        return Piece(start, position + end * columns * dtype.itemsize, make)

    return [piece(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _down_pieces(
    checkpoint: Checkpoint, target: Target, deltas: DeltaSource, gain: float, position: int
) -> list[Piece]:
    rows, old = target.stored.shape
    new = target.delta.shape[1]
    dtype = STORED[target.stored.dtype]
    row_bytes = (old + new) * dtype.itemsize
    step = rows_per_piece(row_bytes)

    def piece(begin: int, end: int) -> Piece:
        start = position + begin * row_bytes

        def make(prepared: Any) -> Callable[[int], None]:
            block = np.empty((end - begin, old + new), dtype)
            raw = checkpoint.read_bytes(target.stored.name, begin * old * dtype.itemsize, end * old * dtype.itemsize)
            block[:, :old] = np.frombuffer(raw, dtype).reshape(end - begin, old)
            added = deltas.rows(target.delta.name, begin, end).astype("f4")
            with np.errstate(over="ignore", invalid="ignore"):
                block[:, old:] = np.multiply(added, np.float32(gain)) if gain else 0
            _finite(added, target)
            _finite(block[:, old:], target)
            return lambda descriptor: write_from(descriptor, block.view("u1").reshape(-1).data, start)

        return Piece(start, position + end * row_bytes, make)

    return [piece(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _finite(block: np.ndarray, target: Target) -> np.ndarray:
    if not np.isfinite(block.astype("f4")).all():
        raise ValueError(
            f"{target.stored.name}: the new neurons hold NaN or infinite values, or do not fit {target.stored.dtype}"
        )
    return block


def write_grown_files(stage: Path, checkpoint: Checkpoint, plan: FusionPlan, index_name: str) -> list[str]:
    """Write config.json and the index with the new sizes; returns their names."""
    names = ["config.json"]
    _replace_json(stage / "config.json", grown_config(checkpoint.config(), plan))
    if (checkpoint.folder / index_name).is_file():  # a single file may have an index too
        names.append(index_name)
        _replace_json(stage / index_name, grown_index(read_index(checkpoint.folder / index_name), plan))
    return names


def _replace_json(path: Path, content: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
