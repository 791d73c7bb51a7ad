"""Tiny GGUF files with random weights, for one architecture of each kind that an import must handle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

VOCABULARY = [*bytes_to_unicode().values(), "ab", "12", "Ġ1", "<|end|>"]
MERGES = ["a b", "1 2", "Ġ 1"]
_COMMON = {
    "context_length": 64,
    "embedding_length": 32,
    "block_count": 2,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
_GPT2 = {
    "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 128,
    "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5,
}  # fmt: skip
_MIXTURE = _COMMON | {"expert_count": 4, "expert_used_count": 2, "attention.key_length": 8, "attention.value_length": 8}
_SHORT_CONVOLUTION = {key: value for key, value in _COMMON.items() if not key.startswith("attention.head_count_kv")} | {
    "attention.head_count_kv": [0, 2],
    "shortconv.l_cache": 3,
}

# architecture: (metadata under its name, configuration fields of the same model)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"rope.dimension_count": 8},
    "qwen2": _COMMON,
    "gpt2": _GPT2,
    "gemma2": _COMMON | {"attention.key_length": 8, "attention.sliding_window": 4},
    "qwen3moe": _MIXTURE,
    "lfm2": _SHORT_CONVOLUTION,
}


def write_header(writer: gguf.GGUFWriter, architecture: str, *, pre: str = "gpt-2", **extra: Any) -> None:
    for key, value in (ARCHITECTURES.get(architecture, _COMMON)).items():
        name = f"{architecture}.{key}"
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([1] * (len(VOCABULARY) - 1) + [3])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(len(VOCABULARY) - 1)
    for key, value in extra.items():
        writer.add_key_value(key, *value)


def write_tiny(path: Path, config: Any, architecture: str, *, dtype: str = "float32", seed: int = 0) -> None:
    """A GGUF file whose tensors have the names and shapes of llama.cpp and random values, for a model of `config`."""
    writer = gguf.GGUFWriter(path, architecture)
    write_header(writer, architecture)
    generator = np.random.default_rng(seed)
    for name, shape in gguf_shapes(config, architecture).items():
        values = generator.normal(0, 0.3, shape).astype("float32")
        writer.add_tensor(name, values if len(shape) == 1 else values.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_shapes(config: Any, architecture: str) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name to shape in torch order."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    if architecture == "lfm2":
        return _short_convolution_shapes(state)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, target in get_gguf_hf_weights_map(model, processor).items():
        if target not in state or target in (model.all_tied_weights_keys or {}):
            continue
        shape = tuple(state[target].shape)
        if architecture == "gpt2" and len(shape) == 2 and "blk" in name:
            shape = shape[::-1]  # Conv1D is stored the other way round
        if name.endswith("_exps"):
            name = f"{name}.weight"
            shape = (shape[0], shape[1] // 2, shape[2]) if "down" not in name else shape
        shapes[name] = shape
    return shapes


def _short_convolution_shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """LFM2 is mapped by transformers' newer path, whose renamings are undone here by hand."""
    parts = {
        "model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "model.layers": "blk",
        "operator_norm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down", "conv.conv": "shortconv.conv", "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj",
    }  # fmt: skip
    shapes = {}
    for target, tensor in state.items():
        if target == "lm_head.weight":
            continue
        name = target
        for theirs, ours in parts.items():
            name = name.replace(theirs, ours, 1) if f"shortconv.{theirs.split('.')[-1]}" not in name else name
        shape = tuple(tensor.shape)
        shapes[name] = (shape[0], shape[2]) if "shortconv.conv" in name else shape
    return shapes
