"""Gemma 4 31B without its 62 GB: exact names, shapes and shards as headers over sparse files; and three real layers.

    python benchmarks/gemma4_31b.py [--runs 3] [--bank derived.safetensors]   inspect, deltas --dry-run, fuse --dry-run
    python benchmarks/gemma4_31b.py --real [--bank derived.safetensors]       deltas, fuse and verify of three layers

Names and shapes come from transformers' own Gemma 4 classes on the meta device and are checked against the published
totals. In the sparse files only the rows that a dry run samples hold values. `--real` writes a checkpoint with the
embedding, the vision tower and three text layers (two sliding, one full) of exactly those shapes, all values random:
7 GB, and as much again for the output.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic_checkpoints import write_deltas, write_random, write_sparse
from transformers import AutoModelForImageTextToText, Gemma4Config
from whole_process import NEUROWEAVE, Run, folder_bytes, machine, print_rows, run

from neuroweave.checkpoint import TensorSpec, plan_shards
from neuroweave.surgery.fusion.estimate import SAMPLED_ROWS

TENSORS, PARAMETERS, BYTES = 1188, 31_273_088_876, 62_546_177_752  # published: the Hugging Face page of the model
SHARDS_GB = [49.8, 12.8]  # 10^9 bytes, published
MAX_SHARD_SIZE = "49.82GB"
LIMIT_SECONDS, LIMIT_MEMORY = 3, 200e6
FULL_EVERY = 6
TEXT = {
    "vocab_size": 262144, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
    "num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 4,
    "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "max_position_embeddings": 262144,
    "sliding_window": 1024, "final_logit_softcapping": 30.0,
}  # fmt: skip
VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 72, "patch_size": 16, "position_embedding_size": 10240, "standardize": True,
}  # fmt: skip


def configuration(layer_types: Sequence[str]) -> Gemma4Config:
    """The configuration of the 31B with these text layers."""
    text = TEXT | {"num_hidden_layers": len(layer_types), "layer_types": list(layer_types)}
    return Gemma4Config(
        text_config=text, vision_config=VISION, architectures=["Gemma4ForConditionalGeneration"], dtype="bfloat16"
    )


def tensors_of(config: Gemma4Config) -> list[TensorSpec]:
    """What a checkpoint of that configuration stores, in the order of the model; the tied head is not stored."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    return [TensorSpec(name, "BF16", tuple(value.shape)) for name, value in state.items()]


def targets(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The gate and down projections of the text decoder: the vision tower's look-alikes are none."""
    ends = ("mlp.gate_proj.weight", "mlp.down_proj.weight")
    return [spec for spec in specs if spec.name.startswith("model.language_model.") and spec.name.endswith(ends)]


def full_size() -> tuple[dict[str, Any], list[TensorSpec]]:
    """config.json and tensors of the 31B. Raises AssertionError when they are not the published ones."""
    kinds = ["full_attention" if (n + 1) % FULL_EVERY == 0 else "sliding_attention" for n in range(60)]
    config = configuration(kinds)
    specs = tensors_of(config)
    assert len(specs) == TENSORS, len(specs)
    assert sum(spec.parameters for spec in specs) == PARAMETERS
    assert sum(spec.nbytes for spec in specs) == BYTES
    assert len(targets(specs)) == 120
    return config.to_dict(), specs


def sparse_31b(model: Path, deltas: Path) -> None:
    """The 31B and deltas for its 120 targets as sparse files, with values in the rows that a dry run samples."""
    config, specs = full_size()
    shards = plan_shards(specs, MAX_SHARD_SIZE)
    found = [round(sum(spec.nbytes for spec in shard.tensors) / 1e9, 1) for shard in shards]
    assert found == SHARDS_GB, found
    edited = targets(specs)
    filled = {
        spec.name: np.unique(np.linspace(0, spec.shape[0] - 1, SAMPLED_ROWS).astype(int)).tolist() for spec in edited
    }
    write_sparse(model, shards, config, filled_rows=filled)
    write_sparse(deltas, plan_shards(edited, MAX_SHARD_SIZE), filled_rows=filled, start=1 << 20)


def three_layers() -> tuple[dict[str, Any], list[TensorSpec]]:
    """config.json and tensors of the 31B cut down to two sliding layers and a full one."""
    config = configuration(["sliding_attention", "sliding_attention", "full_attention"])
    return config.to_dict(), tensors_of(config)


def dry_runs(scratch: Path, bank: Path | None, runs: int) -> None:
    model, deltas = scratch / "model", scratch / "deltas"
    sparse_31b(model, deltas)
    print(f"{folder_bytes(model) / 1e9:.1f} GB, {TENSORS} tensors, {PARAMETERS:,} parameters", flush=True)
    base, source = ["--base-model", str(model)], ["--bank", str(bank)] if bank else []
    commands = [
        ["inspect", str(model)],
        ["deltas", *base, *source, "--output-dir", str(scratch / "out"), "--dry-run"],
        ["fuse", "--model", str(model), "--weights", str(deltas), "--dry-run"],
    ]
    if bank:
        commands.append(["fuse", "--model", str(model), *source, "--dry-run"])
    rows = []
    for words in commands:
        run([NEUROWEAVE, *words], bytecode=scratch / "bytecode")  # compiles what it imports
        found = [run([NEUROWEAVE, *words], bytecode=scratch / "bytecode", watched=True) for _ in range(runs)]
        label = " ".join(word for word in words if not word.startswith("/"))
        rows.append(row(label, found, LIMIT_SECONDS))
    print_rows(("neuroweave", "seconds, median (range)", "processor s", "peak memory", "limit"), rows)


def real(scratch: Path, bank: Path | None, gaussian: bool) -> None:
    """Write three layers for real, generate deltas, fuse, verify."""
    model, deltas, out = scratch / "model", scratch / "generated_weights", scratch / "out"
    config, specs = three_layers()
    write_random(model, specs, config, max_shard_size="5GB")
    print(f"{folder_bytes(model) / 1e9:.2f} GB, {len(specs)} tensors, {len(targets(specs))} targets", flush=True)
    rows = []
    if gaussian:
        write_deltas(deltas, specs)
    else:
        command = [NEUROWEAVE, "deltas", "--base-model", str(model), "--output-dir", str(deltas)]
        command += ["--bank", str(bank)] if bank else []
        rows.append(row("deltas", [run(command, bytecode=scratch / "bytecode", watched=True)], None))
    command = [NEUROWEAVE, "fuse", "--model", str(model), "--weights", str(deltas), "--output", str(out)]
    fused = run(command, bytecode=scratch / "bytecode", watched=True)
    rows.append(row("fuse", [fused], None))
    verified = run([NEUROWEAVE, "verify", str(out)], bytecode=scratch / "bytecode", watched=True)
    rows.append(row("verify", [verified], None))
    print(fused.output)
    print_rows(("neuroweave", "seconds", "processor s", "peak memory", "limit"), rows)


def row(label: str, found: list[Run], limit: float | None) -> tuple[str, ...]:
    seconds, peak = [each.seconds for each in found], max(each.peak for each in found)
    spread = f" ({min(seconds):.2f} to {max(seconds):.2f})" if len(found) > 1 else ""
    met = peak <= LIMIT_MEMORY and (limit is None or statistics.median(seconds) <= limit)
    limits = ([] if limit is None else [f"{limit} s"]) + [f"{LIMIT_MEMORY / 1e6:.0f} MB"]
    cells = (f"{statistics.median(seconds):.2f}{spread}", f"{statistics.median(each.processor for each in found):.2f}")
    return label, *cells, f"{peak / 1e6:.0f} MB", f"at most {', '.join(limits)}: {'met' if met else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="three layers with values, from deltas to verify")
    parser.add_argument("--bank", type=Path, help="the bank of the deltas; default: the one that deltas itself takes")
    parser.add_argument("--gaussian", action="store_true", help="with --real: Gaussian deltas, not generated ones")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each command")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to use; default: the system's own")
    arguments = parser.parse_args()
    bank = arguments.bank.resolve() if arguments.bank else None
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        print(machine(scratch), flush=True)
        if arguments.real:
            real(scratch, bank, arguments.gaussian)
        else:
            dry_runs(scratch, bank, arguments.runs)


if __name__ == "__main__":
    main()
