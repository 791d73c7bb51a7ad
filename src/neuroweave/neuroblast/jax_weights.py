"""Weights of the JAX model: begun anew, read from safetensors straight into sharded arrays, and written back.

A checkpoint's tensor and the array that it goes into hold the same bytes in the same order; equal layers are stacked.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from transformers import GenerationConfig

from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.reader import WEIGHT_FILES, Checkpoint, list_files, read_config
from neuroweave.checkpoint.sealed import KEY, unseal
from neuroweave.checkpoint.writer import ShardWriter, plan_shards
from neuroweave.neuroblast.configuration import NeuroBlastConfig, build_configuration
from neuroweave.neuroblast.tensor_table import Edit, TensorRow
from neuroweave.neuroblast.weight_map import check_tied_head, from_published, layout_of, misfits

if TYPE_CHECKING:
    from jax.sharding import Sharding

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
Params = dict[str, Array]
Place = Callable[[TensorRow], "Sharding | None"]


@dataclass(frozen=True)
class StoredModel:
    """What a checkpoint folder says of its model: the configuration, and the plan of a patched one."""

    folder: Path
    config: NeuroBlastConfig
    plan: list[Edit]


def describe_stored(folder: str | Path) -> StoredModel:
    """The model in a checkpoint folder, patched or published ones included. Raises ValueError for other models."""
    folder = Path(folder)
    fields = read_config(folder)
    plan: list[Edit] = []
    if KEY in fields:
        plan, fields = fields[KEY]["plan"], unseal(fields)
    if fields.get("model_type") != NeuroBlastConfig.model_type:
        raise ValueError(
            f"{folder}: a {fields.get('model_type')} model; the JAX backend runs NeuroBLAST models, patched or not; "
            f"use the torch backend for others"
        )
    return StoredModel(folder, build_configuration(fields), plan)


# ---------------------------------------------------------------------------------------------------------- begin


def initial_params(table: Sequence[TensorRow], *, seed: int, place: Place | None = None) -> Params:
    """Fresh float32 weights, the same for the same seed on any number of devices; `place`: where each array lies."""

    def begin(key: Array) -> Params:
        return {row.key: initial_array(row, jax.random.fold_in(key, number)) for number, row in enumerate(table)}

    shardings = None if place is None else {row.key: place(row) for row in table}
    return jax.jit(begin, out_shardings=shardings)(jax.random.key(seed))


def initial_array(row: TensorRow, key: Array) -> Array:
    initial = row.initial
    if initial is None:
        raise ValueError(f"{row.key}: added by a patch, so it begins as a checkpoint holds it; load that")
    if initial.kind == "constant":
        return jnp.full(row.array_shape, initial.size, jnp.float32)
    if initial.kind == "uniform":
        return jax.random.uniform(key, row.array_shape, jnp.float32, -initial.size, initial.size)
    array = initial.size * jax.random.normal(key, row.array_shape, jnp.float32)
    return array if initial.zero_row is None else array.at[initial.zero_row].set(0.0)


# ----------------------------------------------------------------------------------------------------------- read


def load_params(stored: StoredModel, table: Sequence[TensorRow], *, place: Place | None = None) -> Params:
    """The checkpoint's weights as float32 arrays, published layouts included; each process reads what it holds.

    Raises ValueError for a checkpoint that lacks tensors, has others, or has them in other shapes.
    """
    names = {name for row in table for name in row.names}
    with Checkpoint(stored.folder, allow_orphans=True) as checkpoint:
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.items()}
        layout = layout_of(shapes)
        plain = {name: shape for name, shape in shapes.items() if name not in names or not is_added(name, table)}
        problems = misfits(plain, stored.config, layout)
        problems += [f"missing: {name}" for name in sorted(names - set(shapes))]
        if problems:
            raise ValueError(f"{stored.folder}: does not fit its configuration ({'; '.join(problems[:3])})")
        check_tied_head(checkpoint, stored.config)
        return {row.key: load_array(checkpoint, row, None if place is None else place(row)) for row in table}


def is_added(name: str, table: Sequence[TensorRow]) -> bool:
    """Whether a patch put this tensor in."""
    return any(name in row.names and row.initial is None for row in table)


def load_array(checkpoint: Checkpoint, row: TensorRow, sharding: Sharding | None) -> Array:
    """One array of the pytree, its parts on the devices that hold them; tensors are read one after the other."""

    @functools.cache
    def read(name: str) -> np.ndarray:
        return np.asarray(from_published(name, checkpoint.read_numpy(name))).astype(np.float32).reshape(row.shape)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not row.stacked:
            return read(row.names[0])[index]
        return np.stack([read(name)[index[1:]] for name in row.names[index[0]]])

    if sharding is None:
        return jnp.asarray(part(tuple(slice(None) for _ in row.array_shape)))
    return jax.make_array_from_callback(row.array_shape, sharding, part)  # type: ignore[arg-type]  # it gives slices


# ---------------------------------------------------------------------------------------------------------- write


def save_model(
    folder: Path,
    params: Params,
    table: Sequence[TensorRow],
    *,
    model: StoredModel | NeuroBlastConfig,
    writes: bool = True,
) -> None:
    """Write an ordinary checkpoint into the folder, without a tokenizer; `model`: what it began from, or the
    configuration of a fresh one. All processes must call this; those without `writes` only hand over their parts."""
    specs = [TensorSpec(name, "F32", row.shape) for row in table for name in row.names]
    if not writes:
        for _ in named_arrays(params, table):
            pass
        return
    with ShardWriter(folder, plan_shards(specs)) as writer:
        for name, array in named_arrays(params, table):
            writer.write(name, array)
    if isinstance(model, StoredModel) and model.plan:  # its configuration holds the recipe, and its code carries it out
        for name in list_files(model.folder):
            if not name.endswith(WEIGHT_FILES):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(model.folder / name, folder / name)
        stored = read_config(folder)
        (folder / CONFIG_FILE).write_text(json.dumps(stored | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
        return
    config: Any = model.config if isinstance(model, StoredModel) else model
    config.architectures, config.dtype = ["NeuroBlastForCausalLM"], "float32"
    config.save_pretrained(folder)
    own = model.folder / GENERATION_FILE if isinstance(model, StoredModel) else None
    if own is not None and own.is_file():
        shutil.copyfile(own, folder / GENERATION_FILE)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def named_arrays(params: Params, table: Sequence[TensorRow]) -> Iterator[tuple[str, np.ndarray]]:
    """(checkpoint name, float32 array) of every tensor, in the table's order; a collective where several processes
    hold parts, so that each of them must run through it."""
    for row in table:
        whole = whole_array(params[row.key])
        for number, name in enumerate(row.names):
            yield name, np.ascontiguousarray(whole[number] if row.stacked else whole)


def whole_array(array: Array) -> np.ndarray:
    """All of an array, which may lie in parts on other processes' devices."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
