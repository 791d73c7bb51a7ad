"""What the tests of the JAX side share: a torch model's weights as the JAX twin's arrays, without going by a file."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from neuroweave.neuroblast.jax_modeling import Computation, NeuroBlast
from neuroweave.neuroblast.tensor_table import TensorRow


def twin(model: Any, **computation: Any) -> tuple[NeuroBlast, dict[str, Any]]:
    """The JAX model of a torch model, and its arrays."""
    plan = getattr(model.config, "neuroweave", {}).get("plan", [])
    made = NeuroBlast(model.config, plan, computation=Computation(**computation))
    return made, arrays_of(made.table, model.state_dict())


def arrays_of(table: list[TensorRow], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    def array(row: TensorRow) -> np.ndarray:
        parts = [tensors[name].detach().numpy() for name in row.names]
        return np.stack(parts) if row.stacked else parts[0]

    return {row.key: jnp.asarray(array(row)) for row in table}


def tensors_of(table: list[TensorRow], arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays by the names of the checkpoint's tensors."""
    found = {}
    for row in table:
        array = np.asarray(arrays[row.key])
        found |= {name: array[number] if row.stacked else array for number, name in enumerate(row.names)}
    return found
