"""Small checkpoints and deltas with awkward shapes, written by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, WIDE, LAYERS = 123, 307, 3
PREFIX = "model.layers"


def mlp_names(layer: int, prefix: str = PREFIX) -> dict[str, str]:
    return {role: f"{prefix}.{layer}.mlp.{role}_proj.weight" for role in ("gate", "up", "down")}


def weights(
    dtype: torch.dtype = torch.bfloat16, *, hidden: int = HIDDEN, wide: int = WIDE, layers: int = LAYERS,
    prefix: str = PREFIX, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """A text decoder's tensors: embedding, attention's output, norms and gated MLPs."""
    make = torch.Generator().manual_seed(seed)
    stem = prefix.removesuffix(".layers")
    tensors = {f"{stem}.embed_tokens.weight": torch.randn(57, hidden, generator=make)}
    for layer in range(layers):
        names = mlp_names(layer, prefix)
        tensors |= {
            f"{prefix}.{layer}.self_attn.o_proj.weight": torch.randn(hidden, hidden, generator=make),
            names["gate"]: torch.randn(wide, hidden, generator=make) * 0.11,
            names["up"]: torch.randn(wide, hidden, generator=make) * 0.07,
            names["down"]: torch.randn(hidden, wide, generator=make) * 0.19,
            f"{prefix}.{layer}.input_layernorm.weight": torch.ones(hidden),
        }
    tensors[f"{stem}.norm.weight"] = torch.ones(hidden)
    return {name: value.to(dtype) for name, value in tensors.items()}


def deltas_for(
    tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16, *, scale: float = 0.03, seed: int = 1,
    roles: tuple[str, ...] = ("gate", "up", "down"),
) -> dict[str, Tensor]:  # fmt: skip
    make = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(value.shape, generator=make) * scale).to(dtype)
        for name, value in tensors.items()
        if any(f"mlp.{role}_proj.weight" in name for role in roles)
    }


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], *, shards: int = 1, config: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """A folder with one file, or several and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    metadata = metadata or {"format": "pt", "note": "kept as it is"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
    else:
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
            save_file({name: tensors[name] for name in part}, folder / file, metadata=metadata)
            weight_map |= dict.fromkeys(part, file)
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama_config(hidden: int = HIDDEN, wide: int = WIDE, layers: int = LAYERS) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "hidden_act": "silu",
    }
