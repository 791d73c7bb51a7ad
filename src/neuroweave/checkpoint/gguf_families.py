"""What llama.cpp knows: the models that its graphs compute, and what a GGUF file says of them.

What a file cannot say, and llama.cpp would therefore compute otherwise, is refused.
https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.gguf import import_gguf
from neuroweave.checkpoint.reader import read_config
from neuroweave.checkpoint.sealed import KEY, MODEL_TYPE, unseal

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig

_GEMMA_PERIOD = 6  # llama.cpp: every sixth layer of gemma3 attends to everything
_GEMMA_27B_LAYERS = 62  # llama.cpp goes by this number of layers, and then scales attention by the model's width


@dataclass(frozen=True)
class Family:
    """What llama.cpp makes of a model type: the architecture's name, its activation under the names that mean it, and
    what the file must change: `permuted` query and key rows, `shifted` norms. `biases`: projections that may have one.
    """

    architecture: str
    activations: tuple[str, ...] = ("silu", "swish")
    permuted: bool = False
    shifted: bool = False
    biases: tuple[str, ...] = ()


_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": Family("llama", permuted=True, biases=_ATTENTION + _MLP),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2", biases=_ATTENTION[:3]),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", ("gelu_pytorch_tanh", "gelu_tanh", "gelu_new"), shifted=True),
}


def open_config(folder: Path) -> tuple[PreTrainedConfig, Family]:
    """The checkpoint's configuration and family. Raises ValueError when llama.cpp has no graph that computes it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    content = read_config(folder)
    is_patched = content.get("model_type") == MODEL_TYPE
    plain = unseal(content) if is_patched else content
    family = FAMILIES.get(str(plain.get("model_type")))
    if family is None:
        raise ValueError(
            f"{folder}: model type {plain.get('model_type')!r} cannot be exported; known are {', '.join(FAMILIES)}"
        )
    if "quantization_config" in plain:
        raise ValueError(f"{folder}: quantized weights cannot be exported; give the checkpoint before quantization")
    name = "hidden_activation" if family.shifted else "hidden_act"
    config = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
    if is_patched and _patched_away(folder, content[KEY], family, config.num_hidden_layers):
        setattr(config, name, family.activations[0])
    activation = getattr(config, name)
    if activation not in family.activations:
        raise ValueError(
            f"{folder}: {name} is {activation!r}; llama.cpp's graph for {family.architecture!r} always computes "
            f"{family.activations[0]}, so the model cannot run there; use transformers"
        )
    _refuse_unknown_settings(folder, config, family)
    return config, family


def _patched_away(folder: Path, entry: dict[str, Any], family: Family, layers: int) -> bool:
    """Whether the patch puts llama.cpp's own activation into every MLP. Raises ValueError when it puts in another."""
    foreign: dict[str, None] = {}
    changed: set[int] = set()
    for edit in entry.get("plan", []):
        activation = edit.get("activation")
        if edit.get("op") == "activation" and edit.get("site") == ["mlp"] and activation in family.activations:
            changed.update(edit.get("layers", []))
            continue
        where = ", ".join(edit.get("site", [])) or edit.get("path", "a module")
        found = [edit[key] for key in ("activation", "before") if edit.get(key)]
        found += [part["activation"] for part in edit.get("after", [])]
        foreign |= {f"{name if isinstance(name, str) else json.dumps(name)} ({where})": None for name in found}
    if foreign:
        raise ValueError(
            f"{folder}: patched with {', '.join(foreign)}; llama.cpp has no such activation there: its graph for "
            f"{family.architecture!r} always computes {family.activations[0]}; export the unpatched model, or run this "
            "one with transformers"
        )
    return changed == set(range(layers))


def _refuse_unknown_settings(folder: Path, config: PreTrainedConfig, family: Family) -> None:
    def refuse(what: str, reason: str) -> None:
        raise ValueError(f"{folder}: {what}; {reason}; llama.cpp would compute another model, so use transformers")

    for key in ("partial_rotary_factor", "attn_logit_softcapping", "use_bidirectional_attention"):
        value = getattr(config, key, None)
        if value not in (None, False, 1, 1.0):
            refuse(f"{key} is {value}", f"the graph for {family.architecture!r} has no place for it")
    if not family.shifted:
        return
    kinds = [
        "full_attention" if (i + 1) % _GEMMA_PERIOD == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    if config.layer_types != kinds:
        refuse("layer_types differ", f"in 'gemma3' every {_GEMMA_PERIOD}th layer is full_attention, the others sliding")
    wide = config.num_hidden_layers == _GEMMA_27B_LAYERS
    scalar = config.hidden_size / config.num_attention_heads if wide else config.head_dim
    if config.query_pre_attn_scalar != scalar:
        refuse(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}", f"this size of 'gemma3' has {scalar:g}")


def model_metadata(folder: Path, config: PreTrainedConfig, family: Family) -> tuple[dict[str, Any], list[str]]:
    """Key to value of all that is no tokenizer, and notes. Integers become uint32, floats float32."""
    gguf = import_gguf()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(full["rope_theta"]),
    } | _rope_scaling(folder, config, full)
    notes = []
    window = getattr(config, "sliding_window", None)
    if family.shifted:
        values["attention.sliding_window"] = window
        values["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        if config.final_logit_softcapping:
            values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    elif window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        notes.append(f"{family.architecture} in llama.cpp has no sliding window: texts beyond {window} tokens differ")
    general = {
        "general.type": "model",
        "general.name": folder.resolve().name,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    return general | {f"{family.architecture}.{key}": value for key, value in values.items()}, notes


def _rope_scaling(folder: Path, config: PreTrainedConfig, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # llama3 is a tensor of factors
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    odd = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
    if kind != "yarn" or odd:
        detail = f" with {', '.join(odd)}" if odd else ""
        raise ValueError(
            f"{folder}: rope type {kind!r}{detail} cannot be exported; known are default, linear, llama3 and plain yarn"
        )
    extra = {f"rope.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow") if rope.get(key)}
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return extra | {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": original,
    }


def rope_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """By what llama3's rule divides each rotary frequency, or None for another rule."""
    import numpy as np

    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / rope["factor"] + blend)).astype(np.float32)
