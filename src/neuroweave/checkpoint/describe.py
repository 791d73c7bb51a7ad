"""What a checkpoint is, from its headers and its config.json alone: layers, MLPs, activations, attention, recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.header import DTYPE_NAMES, TensorSpec
from neuroweave.checkpoint.layers import MLP, attention_kind, find_embedding, find_mlps, find_stacks, has_head
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.sealed import KEY, unseal

_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function", "activation", "ffn_act", "ffn_act_fn")
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "decoder")


def describe_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON-ready description of a checkpoint folder, from headers and config.json, without torch or transformers.

    Sizes come from the tensors' shapes, never from the configuration. For a patched checkpoint `model_type` and
    `base_activation` are the base model's, `recipe` what was applied, and each layer's `activation` the one after it.
    Raises ValueError for a folder that is no checkpoint.
    """
    with Checkpoint(folder, allow_orphans=True) as checkpoint:
        stored = checkpoint.config()
        config, recipe, plan = base_config(stored)
        text = text_config(config)
        tensors = list(checkpoint.values())
        embedding, stacks = find_embedding(tensors), find_stacks(tensors)
        hidden = embedding.shape[-1] if embedding else 0
        activation = activation_name(text) or activation_name(config)
        layers = []
        for number, layer in sorted(stacks[0].layers.items()) if stacks else ():
            mlps = find_mlps(layer, hidden)
            layers.append(
                {
                    "layer": number,
                    "mlp": [_mlp(mlp) for mlp in mlps],
                    "activation": activation_after(plan, place_in_list(layer), activation) if mlps else None,
                    "attention": attention_kind(number, layer, text),
                    "parameters": sum(tensor.parameters for tensor in layer.values()),
                }
            )
        dtypes: dict[str, int] = {}
        for tensor in tensors:
            name = DTYPE_NAMES.get(tensor.dtype, tensor.dtype)
            dtypes[name] = dtypes.get(name, 0) + tensor.parameters
        return {
            "model": str(Path(folder)),
            "model_type": config.get("model_type"),
            "architectures": config.get("architectures"),
            "parameters": checkpoint.parameters,
            "bytes": checkpoint.nbytes,
            "dtypes": dict(sorted(dtypes.items(), key=lambda item: -item[1])),
            "tensors": len(tensors),
            "shards": {
                name: {"tensors": len(header.tensors), "bytes": header.data_bytes}
                for name, header in checkpoint.shards.items()
            },
            "orphans": [tensor.name for tensor in checkpoint.orphans],
            "hidden": hidden or None,
            "vocabulary": embedding.shape[0] if embedding else None,
            "tied_head": not has_head(tensors),
            "base_activation": activation,
            "recipe": recipe,
            "stack": stacks[0].prefix if stacks else None,
            "layers": layers,
            "other_stacks": {
                stack.prefix: {"layers": len(stack.layers), "parameters": stack.parameters} for stack in stacks[1:]
            },
        }


def base_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None, list[dict[str, Any]]]:
    """The configuration before a recipe was applied, the recipe (None for an unpatched checkpoint), and its plan."""
    if KEY not in config:
        return dict(config), None, []
    entry = config[KEY]
    plain = unseal(dict(config))  # first: it refuses an entry of another form
    recipe, plan = entry.get("recipe"), entry.get("plan")
    return plain, recipe if isinstance(recipe, dict) else {}, plan if isinstance(plan, list) else []


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that describes the text decoder: the whole, or its `text_config`."""
    for key in _TEXT_PARTS:
        part = config.get(key)
        if isinstance(part, dict) and part:
            return part
    return dict(config)


def activation_name(config: Mapping[str, Any]) -> str | None:
    """The activation that a configuration states, or None: some families have it only in their code."""
    for key in _ACTIVATION_KEYS:
        if isinstance(config.get(key), str):
            return config[key]
    feed_forward = config.get("ffn_config")
    if isinstance(feed_forward, dict) and isinstance(feed_forward.get("ffn_act_fn"), dict):
        return feed_forward["ffn_act_fn"].get("name")
    return None


def place_in_list(layer: Mapping[str, TensorSpec]) -> str:
    """The list that a layer is in and its number there, from its tensors' names: `layers.3`."""
    rest, tensor = next(iter(layer.items()))
    return ".".join(tensor.name.removesuffix(f".{rest}").split(".")[-2:])


def activation_after(plan: Sequence[Mapping[str, Any]], layer: str, base: str | None) -> Any:
    """The MLP activation of a layer (`layers.3`) after a recipe's plan: what was put in its place, else the base's."""
    for edit in plan:
        listed = edit.get("path", "").partition(".{}")[0].rpartition(".")[2]
        if edit.get("op") == "activation" and layer in (f"{listed}.{number}" for number in edit.get("layers", ())):
            return edit.get("activation")
    return base


def activation_text(activation: Any) -> str:
    """An activation in a table's cell, in a recipe's short form."""
    if activation is None:
        return "?"
    if isinstance(activation, dict) and "segments" in activation:
        segments = activation["segments"]
        if isinstance(segments, dict):
            named = zip(segments["members"], segments["sizes"], strict=True)
            return "|".join(f"{activation_text(member)} {size}" for member, size in named)
        return "|".join(map(activation_text, segments))
    if isinstance(activation, dict) and "mixture" in activation:
        return f"mixture of {', '.join(map(activation_text, activation['mixture']['members']))}"
    return activation if isinstance(activation, str) else json.dumps(activation, ensure_ascii=False)


def layer_groups(layers: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Equal consecutive layers together: (`0-29`, MLP, activation, attention), for people."""
    groups: list[list[Any]] = []
    for layer in layers:
        mlp = " + ".join(str(MLP(**part)) for part in layer["mlp"]) or "no MLP"
        activation = activation_text(layer["activation"]) if layer["mlp"] else ""
        row = (mlp, activation, layer["attention"])
        if groups and groups[-1][2] == row and groups[-1][1] == layer["layer"] - 1:
            groups[-1][1] = layer["layer"]
        else:
            groups.append([layer["layer"], layer["layer"], row])
    return [(str(first) if first == last else f"{first}-{last}", *row) for first, last, row in groups]


def _mlp(mlp: MLP) -> dict[str, Any]:
    return {"kind": mlp.kind, "hidden": mlp.hidden, "intermediate": mlp.intermediate, "experts": mlp.experts}
