"""How long the training step takes to trace and compile, by depth: the default model of 72 layers against 12 layers.

    python benchmarks/jax_compile_time.py [--rounds 3] [--unrolled]

Alternates between the two; prints medians and the ratio. `--unrolled`: the same with every layer by itself, for
comparison. On one CPU device, rows of 256 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from neuroweave.diagnose.environment import describe_environment
from neuroweave.neuroblast.configuration import NeuroBlastConfig
from neuroweave.neuroblast.jax_modeling import Computation, NeuroBlast
from neuroweave.training import jax_mesh
from neuroweave.training.configuration import JaxSection, build_configuration
from neuroweave.training.jax_loop import abstract_state
from neuroweave.training.jax_step import Loss, build_optimizer, train_step

DEPTHS = {
    12: {"num_sensory_layers": 4, "num_associative_layers": 6, "num_motor_layers": 2},
    72: {"num_sensory_layers": 24, "num_associative_layers": 32, "num_motor_layers": 16},
}
ROWS, LENGTH = 2, 256


def compile_seconds(depth: int, *, unrolled: bool) -> float:
    """Of one fresh trace, lowering and compilation."""
    jax.clear_caches()
    mesh = jax_mesh.make_mesh(JaxSection(), jax.devices()[:1])
    config = NeuroBlastConfig(**DEPTHS[depth])
    computation = Computation(sharding=jax_mesh.place_hidden(mesh), remat="full", unroll=unrolled)
    model = NeuroBlast(config, computation=computation)
    value: dict[str, Any] = {"tokenizer": {"path": "x"}, "training": {"steps": 1}, "output": {"folder": "x"}}
    optimizer = build_optimizer(build_configuration(value).training, model.table)
    rows = jax.ShapeDtypeStruct((1, ROWS, LENGTH), jnp.int32, sharding=jax_mesh.place_rows(mesh))
    batch = dict.fromkeys(("input_ids", "labels", "position_ids"), rows)
    state = abstract_state(model.table, optimizer, mesh)
    step = functools.partial(train_step, model, optimizer, Loss(), 1.0, 0)
    began = time.perf_counter()
    jax.jit(step, donate_argnums=0).lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unrolled", action="store_true")
    options = parser.parse_args()
    compile_seconds(12, unrolled=False)  # what is loaded once
    found: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for _ in range(options.rounds):
        for depth in DEPTHS:
            found[depth].append(compile_seconds(depth, unrolled=options.unrolled))
    few, many = (statistics.median(found[depth]) for depth in (12, 72))
    ratios = [b / a for a, b in zip(found[12], found[72], strict=True)]
    machine = describe_environment()
    print(
        f"{machine.cpu}, {datetime.date.today()}: 12 layers {few:.1f} s, 72 layers {many:.1f} s, ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
