"""How a JAX run lies over its devices: one mesh (data, fsdp, tensor), a place on it for weights and for rows.

Rows are divided over data and fsdp, weights over fsdp and tensor; what goes between devices follows from that, and the
compiler puts it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from neuroweave.neuroblast.tensor_table import TensorRow
from neuroweave.training.configuration import JaxSection

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")


def mesh_shape(section: JaxSection, devices: int) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor. Raises ValueError where the settings do not make use of all devices."""
    data = section.data
    if data is None:
        data, rest = divmod(devices, section.shards)
        if rest or not data:
            raise ValueError(
                f"jax.fsdp {section.fsdp} x jax.tensor {section.tensor} = {section.shards} devices share the weights, "
                f"but all hosts together have {devices}, which is no multiple of that; change jax.fsdp or jax.tensor"
            )
    if data * section.shards != devices:
        raise ValueError(
            f"jax.data {data} x jax.fsdp {section.fsdp} x jax.tensor {section.tensor} = {data * section.shards} "
            f"devices, but there are {devices}; change them, or leave out jax.data"
        )
    return data, section.fsdp, section.tensor


def make_mesh(section: JaxSection, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, of all processes; placed by JAX along the hardware's links."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(section, len(devices))
    automatic = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=automatic, devices=np.asarray(devices).reshape(-1).tolist())


def place_weights(row: TensorRow, mesh: Any) -> NamedSharding:
    """Where an array lies: cut along its axes where their size divides its own, whole on every device where not."""
    cut = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(row.array_axes, row.array_shape, strict=True)
    ]
    return NamedSharding(mesh, P(*cut))


def whole(mesh: Any) -> NamedSharding:
    """The same everywhere."""
    return NamedSharding(mesh, P())


def place_hidden(mesh: Any) -> NamedSharding:
    """Hidden states [B, T, C]: rows divided."""
    return NamedSharding(mesh, P(ROWS, None, None))


def place_rows(mesh: Any) -> NamedSharding:
    """The rows of a step [passes, B, T]: those of each pass divided."""
    return NamedSharding(mesh, P(None, ROWS, None))


def row_places(mesh: Any) -> int:
    """How many groups of devices take rows of their own."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"])
