"""Checkpoints to measure with: real random values of any size, written at the speed of the disk, or holes by header.

One block of Gaussian noise is made once; each tensor starts at another place of it. `write_sparse` writes headers over
sparse files: exact names, shapes and sizes that take no room.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neuroweave.checkpoint import ShardWriter, TensorSpec, plan_shards
from neuroweave.checkpoint.header import build_header
from neuroweave.checkpoint.writer import Shard, write_index

HIDDEN, WIDE, VOCABULARY = 2048, 8192, 32000
NOISE = 1 << 22  # values; a tensor repeats them with this period
_TARGETS = ("mlp.gate_proj.weight", "mlp.down_proj.weight")


def llama_specs(gigabytes: float, *, hidden: int = HIDDEN, wide: int = WIDE) -> list[TensorSpec]:
    """The bfloat16 tensors of a Llama of about that size (10^9 bytes): as many layers as fit, tied head."""
    matrix, vector = hidden * hidden, hidden
    layer_bytes = 2 * (4 * matrix + 3 * hidden * wide + 2 * vector)
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * hidden) / layer_bytes))
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (VOCABULARY, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        specs += [TensorSpec(f"{prefix}.self_attn.{x}_proj.weight", "BF16", (hidden, hidden)) for x in "qkvo"]
        specs += [
            TensorSpec(f"{prefix}.mlp.gate_proj.weight", "BF16", (wide, hidden)),
            TensorSpec(f"{prefix}.mlp.up_proj.weight", "BF16", (wide, hidden)),
            TensorSpec(f"{prefix}.mlp.down_proj.weight", "BF16", (hidden, wide)),
            TensorSpec(f"{prefix}.input_layernorm.weight", "BF16", (hidden,)),
            TensorSpec(f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,)),
        ]
    return [*specs, TensorSpec("model.norm.weight", "BF16", (hidden,))]


def llama_config(specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """The `config.json` that belongs to `llama_specs`."""
    shapes = {spec.name: spec.shape for spec in specs}
    wide, hidden = shapes["model.layers.0.mlp.gate_proj.weight"]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": wide, "vocab_size": shapes["model.embed_tokens.weight"][0],
        "num_hidden_layers": sum(name.endswith("mlp.gate_proj.weight") for name in shapes),
        "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128, "head_dim": 128,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip


def write_llama(model: Path, deltas: Path, gigabytes: float, *, max_shard_size: str = "100GB") -> int:
    """A Llama of about that size and Gaussian deltas for every gate and down; returns its bytes of tensors."""
    specs = llama_specs(gigabytes)
    write_random(model, specs, llama_config(specs), max_shard_size=max_shard_size)
    write_deltas(deltas, specs)
    return sum(spec.nbytes for spec in specs)


def write_deltas(folder: Path, specs: Iterable[TensorSpec]) -> None:
    """A folder of Gaussian deltas (standard deviation 0.02) for the text decoder's gate and down among `specs`."""
    write_random(folder, [spec for spec in specs if spec.name.endswith(_TARGETS)], start=NOISE // 3)


def write_random(
    folder: Path, specs: Sequence[TensorSpec], config: Mapping[str, Any] | None = None, *,
    max_shard_size: str = "100GB", start: int = 0,
) -> None:  # fmt: skip
    """A folder of Gaussian bfloat16 values, standard deviation 0.02. `start`: where in the noise the first begins."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, plan_shards(specs, max_shard_size)) as writer:
        for number, spec in enumerate(specs):
            block = noise(start + 977 * number)
            for begin in range(0, spec.nbytes, len(block)):
                writer.write_at(spec.name, begin, block[: min(len(block), spec.nbytes - begin)])
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def noise(start: int) -> memoryview:
    """The bytes of `NOISE` bfloat16 values of the one block, from the value numbered `start`, around the end."""
    begin = start % NOISE * 2
    return memoryview(_noise_twice())[begin : begin + 2 * NOISE]


@functools.cache
def _noise_twice() -> bytes:
    values = np.random.default_rng(0).standard_normal(NOISE, np.float32) * np.float32(0.02)
    return values.astype(ml_dtypes.bfloat16).tobytes() * 2


def write_sparse(
    folder: Path, shards: Sequence[Shard], config: Mapping[str, Any] | None = None, *,
    filled_rows: Mapping[str, Sequence[int]] | None = None, start: int = 0,
) -> None:  # fmt: skip
    """Headers and an index over sparse files: every tensor reads as zeros, but for `filled_rows` (by name): noise."""
    folder.mkdir(parents=True)
    for shard in shards:
        raw, header = build_header(shard.tensors, shard.metadata)
        with open(folder / shard.file, "wb") as file:
            file.write(raw)
            os.ftruncate(file.fileno(), header.data_start + header.data_bytes)
            for number, entry in enumerate(header.tensors.values()):
                row_bytes = entry.shape[-1] * 2
                for row in (filled_rows or {}).get(entry.name, ()):
                    place = header.data_start + entry.begin + row * row_bytes
                    os.pwrite(file.fileno(), noise(start + 977 * number + 31 * row)[:row_bytes], place)
    tensors = [(shard.file, tensor) for shard in shards for tensor in shard.tensors]
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, tensor in tensors}
        total = sum(tensor.nbytes for _, tensor in tensors), sum(tensor.parameters for _, tensor in tensors)
        write_index(folder / "model.safetensors.index.json", weight_map, *total)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
