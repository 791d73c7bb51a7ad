"""Patching a 60 GB checkpoint takes seconds: a Llama-30B layout as headers over sparse files.

python benchmarks/patch_large.py [--recipe learned-mixture]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from neuroweave import patch_checkpoint
from neuroweave.checkpoint import Checkpoint, TensorSpec, describe_checkpoint, plan_shards
from neuroweave.checkpoint.header import build_header
from neuroweave.checkpoint.writer import write_index

SHAPE = {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52}


def sparse_checkpoint(folder: Path) -> None:
    config = LlamaConfig(**SHAPE, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir()
    config.save_pretrained(folder)
    shards = plan_shards(
        [TensorSpec(name, "BF16", tuple(value.shape)) for name, value in model.state_dict().items()], "5GB"
    )
    for shard in shards:
        raw, header = build_header(shard.tensors, shard.metadata)
        with open(folder / shard.file, "wb") as file:
            file.write(raw)
            os.ftruncate(file.fileno(), header.data_start + header.data_bytes)
    tensors = [(shard.file, tensor) for shard in shards for tensor in shard.tensors]
    weight_map = {tensor.name: file for file, tensor in tensors}
    total = sum(tensor.nbytes for _, tensor in tensors), sum(tensor.parameters for _, tensor in tensors)
    write_index(folder / "model.safetensors.index.json", weight_map, *total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="learned-mixture")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "original", Path(scratch) / "patched"
        sparse_checkpoint(source)
        with Checkpoint(source) as checkpoint:
            print(f"{checkpoint.nbytes / 1e9:.1f} GB in {len(checkpoint.shards)} shards")
        start = time.perf_counter()
        result = patch_checkpoint(source, out, arguments.recipe)
        print(f"patch {arguments.recipe}: {time.perf_counter() - start:.1f} s, {result.linked} shards linked")
        start = time.perf_counter()
        describe_checkpoint(out)
        print(f"inspect: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
