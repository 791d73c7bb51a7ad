"""Does the default NeuroBLAST fit a pod? Its training step, lowered for meshes of 8 to 256 devices that nobody needs to
have: the tables of docs/jax.md.

    python benchmarks/jax_plan.py                 # lower for abstract meshes: some seconds each
    python benchmarks/jax_plan.py --compile 64    # compile for 64 simulated CPU devices: minutes; shows collectives
    python benchmarks/jax_plan.py --write         # put the first table into docs/jax.md

Lowering proves that shapes, divisions and annotations fit together. Bytes of the state on a device follow from where
each array lies. Collectives exist only after the compiler has cut the program: those are counted in the compiled text,
a loop's body once. FLOPs are those of `training_plan.py`.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from training_plan import UTILISATION, flops_of_token

from neuroweave.neuroblast.configuration import NeuroBlastConfig
from neuroweave.neuroblast.jax_attention import default_attention
from neuroweave.neuroblast.jax_modeling import Computation, NeuroBlast
from neuroweave.training import jax_mesh
from neuroweave.training.configuration import JaxSection, build_configuration
from neuroweave.training.jax_loop import abstract_state
from neuroweave.training.jax_step import Loss, build_optimizer, pieces_for, train_step

PAGE = Path(__file__).parent.parent / "docs" / "jax.md"
BEGIN, END = "<!-- jax_plan.py -->\n", "<!-- end -->\n"
LENGTH, ROWS, PASSES = 1280, 2, 4
# (data, fsdp, tensor)
MESHES = [(8, 1, 1), (1, 8, 1), (8, 8, 1), (16, 16, 1), (8, 16, 2)]
# bfloat16 FLOP/s and memory of a chip, from Google's documentation
CHIPS = {"TPU v5e": (197e12, 16e9), "TPU v5p": (459e12, 95e9), "TPU v6e": (918e12, 32e9)}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def abstract_mesh(shape: tuple[int, int, int]) -> AbstractMesh:
    return AbstractMesh(shape, jax_mesh.AXES, axis_types=(AxisType.Auto,) * 3)


def traced_step(mesh: Any, config: NeuroBlastConfig, *, attention: str = default_attention("tpu")) -> tuple[Any, Any]:
    """(the training step traced for a mesh, the abstract state): bfloat16 products, layers computed twice, in
    the form for TPUs."""
    computation = Computation(
        dtype=jnp.bfloat16,
        attention=attention,
        remat="full",
        sharding=jax_mesh.place_hidden(mesh),
        platform="tpu",
    )
    rows, passes = ROWS, PASSES
    model = NeuroBlast(config, computation=computation)
    value = {"tokenizer": {"path": "x"}, "training": {"steps": 1}, "output": {"folder": "x"}}
    optimizer = build_optimizer(build_configuration(value).training, model.table)
    state = abstract_state(model.table, optimizer, mesh)
    shape = (passes, rows * jax_mesh.row_places(mesh), LENGTH)
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax_mesh.place_rows(mesh))
    batch = dict.fromkeys(("input_ids", "labels", "position_ids"), row)
    loss = Loss(pieces=pieces_for(LENGTH, rows, config.vocab_size, mesh.shape["tensor"]))
    step = functools.partial(train_step, model, optimizer, loss, 1.0, 0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, jax_mesh.whole(mesh)))
    return jitted.trace(state, batch, jax.ShapeDtypeStruct((), jnp.float32)), state


def bytes_on_a_device(state: Any) -> int:
    """Of weights and moments; gradients take as much as the weights once more while a step runs."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )


def table(config: NeuroBlastConfig) -> str:
    of_weights, of_attention = flops_of_token(config, LENGTH)
    flops = of_weights + of_attention
    lines = [
        f"Rows of {LENGTH:,} tokens, {ROWS} a device and pass, {PASSES} passes a step; {flops:.3g} FLOPs a token "
        f"(6 for each multiplied weight, {of_weights:.3g}, and {of_attention:.2g} for attention).",
        "",
        "| data x fsdp x tensor | devices | state on a device | with gradients | tokens a step | FLOPs of a device "
        "and step | lowered in |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in MESHES:
        mesh = abstract_mesh(shape)
        began = time.perf_counter()
        traced, state = traced_step(mesh, config)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        seconds = time.perf_counter() - began
        if "sharding" not in text:
            raise SystemExit("the lowered program says nothing of shardings")
        devices, own = math.prod(shape), bytes_on_a_device(state)
        gradients = bytes_on_a_device(state["params"])
        tokens = PASSES * ROWS * jax_mesh.row_places(mesh) * LENGTH
        lines.append(
            f"| {' x '.join(map(str, shape))} | {devices} | {own / 1e9:.2f} GB | {(own + gradients) / 1e9:.2f} GB | "
            f"{tokens:,} | {tokens * flops / devices:.3g} | {seconds:.0f} s |"
        )
    lines += [
        "",
        f"| chip | peak, bfloat16 | memory | tokens/s of a chip at {UTILISATION:.0%} of the peak |",
        "|---|---|---|---|",
    ]
    for name, (peak, memory) in CHIPS.items():
        rate = f"{peak * UTILISATION / flops:,.0f} = {UTILISATION} x {peak:.3g} / {flops:.3g}"
        lines.append(f"| {name} | {peak / 1e12:.0f} TFLOP/s | {memory / 1e9:.0f} GB | {rate} |")
    return "\n".join(lines) + "\n"


def compiled_report(devices: int, config: NeuroBlastConfig) -> None:
    """Compile for simulated devices, and count what the compiler put between them."""
    for section in (JaxSection(), JaxSection(fsdp=devices // 4), JaxSection(fsdp=devices // 8, tensor=2)):
        mesh = jax_mesh.make_mesh(section, jax.devices()[:devices])
        began = time.perf_counter()
        traced, _ = traced_step(mesh, config, attention="plain")
        compiled = traced.lower().compile()
        seconds = time.perf_counter() - began
        found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        for line in compiled.as_text().splitlines():
            kind = next((name for name in COLLECTIVES if re.search(rf"= .*\b{name}(-start)?\(", line)), None)
            if kind is not None:
                found[kind][0] += 1
                found[kind][1] += result_bytes(line.split(f" {kind}")[0])
        memory = compiled.memory_analysis()
        names = " x ".join(str(mesh.shape[axis]) for axis in jax_mesh.AXES)
        told = ", ".join(f"{count} {kind} ({size / 1e6:.1f} MB)" for kind, (count, size) in sorted(found.items()))
        print(f"| {names} | {seconds:.0f} s | {told} | {memory.argument_size_in_bytes / 1e9:.2f} GB |", flush=True)


def result_bytes(text: str) -> int:
    """Of the arrays that a line of compiled text makes."""
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1, "u32": 4, "f16": 2, "u8": 1, "s8": 1}
    return sum(
        sizes.get(kind, 4) * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in re.findall(r"\b(f32|bf16|s32|pred|u32|f16|u8|s8)\[([\d,]*)\]", text)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, metavar="DEVICES", help="compile for so many simulated devices")
    parser.add_argument("--write", action="store_true", help="put the table into docs/jax.md")
    options = parser.parse_args()
    if options.compile:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.compile}"
        print("| data x fsdp x tensor | compiled in | collectives (of loops: once) | arguments of a device |")
        print("|---|---|---|---|", flush=True)
        compiled_report(options.compile, NeuroBlastConfig())
        return
    found = table(NeuroBlastConfig())
    print(found)
    if options.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + found + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
