"""The config.json of a patched checkpoint: sealed, so that no engine takes it for the unpatched model.

Whatever names an architecture or an activation is replaced by a name that no engine knows; the originals, the recipe
and its plan are kept under one key. Plain JSON in, plain JSON out.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Container
from typing import Any

KEY = MODEL_TYPE = "neuroweave"
ARCHITECTURE = "NeuroweaveForCausalLM"
FORMAT_VERSION = 1
MODELING_FILE = "modeling_neuroweave.py"
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim_model")
AUTO_CLASSES = {
    "AutoConfig": "NeuroweaveConfig",
    "AutoModel": "NeuroweaveModel",
    "AutoModelForCausalLM": "NeuroweaveForCausalLM",
}


def seal(config: dict[str, Any], activations: Container[str]) -> dict[str, Any]:
    """The config.json of a patched model, from its plain fields and its `neuroweave` entry.

    `activations`: the names that engines know. Fields with such a value get the name `neuroweave` instead.
    """
    sealed = copy.deepcopy(config)
    fields: dict[str, Any] = {}
    for path, owner, name in activation_fields(sealed, activations):
        fields[path] = owner[name]
        owner[name] = MODEL_TYPE
    if not fields:  # the activation is in the family's code, or left to its default: then the width must stop others
        for width in [name for name in WIDTHS if isinstance(sealed.get(name), int)][:1]:
            fields[width], sealed[width] = sealed[width], MODEL_TYPE
    if "hidden_act" not in sealed:
        fields["hidden_act"] = None  # the family has no such key: it is dropped again on loading
        sealed["hidden_act"] = MODEL_TYPE
    sealed[KEY]["base"]["fields"] = fields
    sealed["model_type"] = MODEL_TYPE
    sealed["architectures"] = [ARCHITECTURE]
    module = MODELING_FILE.removesuffix(".py")
    sealed["auto_map"] = {auto: f"{module}.{name}" for auto, name in AUTO_CLASSES.items()}
    return sealed


def unseal(config: dict[str, Any]) -> dict[str, Any]:
    """The plain fields of the original family, from a patched model's config.json; the inverse of `seal`.

    Raises ValueError for a format that this version does not know, and for an entry that does not fit the rest.
    """
    entry = config[KEY]
    version = entry.get("version") if isinstance(entry, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"config.json: patched in format {version}, this code reads format {FORMAT_VERSION}; "
            f"update neuroweave (or load with the neuroweave that wrote it)"
        )
    plain = copy.deepcopy({key: value for key, value in config.items() if key not in (KEY, "auto_map")})
    try:
        base = entry["base"]
        for path, value in base.get("fields", {}).items():
            *parents, name = path.split(".")
            owner = functools.reduce(lambda node, key: node[key], parents, plain)
            if value is None:
                owner.pop(name, None)
            else:
                owner[name] = value
        plain["model_type"] = base["model_type"]
        plain["architectures"] = base["architectures"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json: the {KEY!r} entry does not fit the rest of the file ({error!r})") from error
    return plain


def activation_fields(
    config: dict[str, Any], activations: Container[str], path: str = ""
) -> list[tuple[str, dict[str, Any], str]]:
    """(dotted path, owning dict, key) of every field of the text model that names an activation function."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict) and key not in (KEY, "vision_config", "audio_config"):
            found += activation_fields(value, activations, f"{path}{key}.")
            if "act" in key and value.get("name") in activations:  # DBRX: ffn_act_fn: {name: silu}
                found.append((f"{path}{key}.name", value, "name"))
        elif isinstance(value, str) and value in activations and ("act" in key or key == "afn"):
            found.append((f"{path}{key}", config, key))
    return found
