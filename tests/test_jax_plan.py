"""The default model's training step for 256 devices that are not there: it lowers, and is cut as it should be."""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import jax
from jax_plan import abstract_mesh, bytes_on_a_device, traced_step

from neuroweave.neuroblast import NeuroBlastConfig


def test_the_default_model_lowers_for_256_devices():
    """16-way sharded weights and moments: a sixteenth of the state, but for the norms, on each device."""
    config = NeuroBlastConfig()
    traced, state = traced_step(abstract_mesh((16, 16, 1)), config)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "@Sharding" in text or "sdy.sharding" in text
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert 1 / 16 <= bytes_on_a_device(state) / whole < 1.01 / 16
    assert whole == 12 * 416_371_200 + 3 * 4  # weights, two moments; the step, the bad step, Adam's count
