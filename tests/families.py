"""Tiny random models of every family that `AutoModelForCausalLM` knows, for the proofs that need "each family".

`DECODER_FAMILIES` are the decoder-only text models, `OTHER_FAMILIES` the rest with the reason. A tiny configuration is
the family's own default with the sizes of `SIZES` put over it by field name, one layer of each kind that the default
mixes, and the few keywords of `KEYWORDS` where that is not enough. Sizes differ from each other so that a swapped pair
of dimensions fails. Both lists follow the installed transformers: a family that it lacks is left out.
"""

import copy
import dataclasses
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN, INTERMEDIATE, EXPERT = 32, 40, 24
HEADS, GROUPS, HEAD = 4, 2, 8
VOCABULARY, FIRST_PLAIN_TOKEN = 99, 16


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_each(HIDDEN, "hidden_size d_model n_embd emb_dim embedding_dim embedding_size hidden_size_global"),
    **_each(HIDDEN, "input_embedding_size output_embedding_size word_embed_proj_dim adapter_in_dim adapter_out_dim"),
    **_each(HIDDEN, "adapter_input_size out_hidden_size backbone_hidden_size nemo_conv_channels ext_pw_out_channel"),
    **_each(HIDDEN, "depthwise_separable_out_channel"),
    **_each(INTERMEDIATE, "intermediate_size ffn_dim n_inner dff dim_ff d_inner encoder_ffn_dim decoder_ffn_dim"),
    **_each(INTERMEDIATE, "feed_forward_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size"),
    **_each(INTERMEDIATE, "prefix_dense_intermediate_size mlp_dim"),
    **_each(EXPERT, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    **_each(EXPERT, "expert_ffn_hidden_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    **_each(HEADS, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    **_each(HEADS, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    **_each(HEADS, "swa_num_attention_heads"),
    **_each(GROUPS, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    **_each(GROUPS, "linear_num_value_heads linear_num_heads index_n_heads indexer_n_heads"),
    **_each(HEAD, "head_dim d_head dim_head attention_head_size v_head_dim swa_head_dim kv_channels"),
    **_each(HEAD, "qk_nope_head_dim qk_rope_head_dim rotary_dim index_head_dim indexer_head_dim linear_head_dim"),
    **_each(HEAD, "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim hidden_size_per_layer_input"),
    **_each(8, "mamba_n_heads mamba_num_heads n_mamba_heads laurel_rank router_hidden_size"),
    **_each(8, "chunk_size mamba_chunk_size"),
    **_each(4, "mamba_d_state ssm_state_size state_size index_topk indexer_budget sliding_window sliding_window_size"),
    **_each(4, "window_size attention_window_size num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_each(2, "num_experts_per_tok top_k_experts moe_k moe_top_k moe_topk indexer_compress_ratio"),
    **_each(2, "n_layer n_layers num_layers num_hidden_layers depth encoder_layers decoder_layers"),
    **_each(2, "num_encoder_layers num_decoder_layers num_blocks zero_expert_num"),
    **_each(1, "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts indexer_kv_heads"),
    **_each(1, "first_k_dense_replace"),
    **_each(12, "kv_lora_rank"),
    **_each(16, "q_lora_rank o_lora_rank"),
    **_each(64, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    **_each(64, "max_target_positions max_source_positions"),
    **_each(VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"),
    **_each(VOCABULARY, "pronunciation_vocab_size shape_vocab_size audio_vocab_size"),
    **_each(0, "pad_token_id"),
    **_each(1, "bos_token_id decoder_start_token_id"),
    **_each(2, "eos_token_id forced_eos_token_id"),
    **_each(0.2, "initializer_range init_std initializer_factor"),
    "embedding_multiplier": 3.0,
    "hc_lowrank": 8,
    "mlp_only_layers": [0],
    **_each(True, "is_decoder causal"),
}
"""Field name to value, for every configuration class that has the field."""

_MIXED_ATTENTION = ["sliding_attention", "full_attention"]
_ROPE_OF_FOUR = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
_BLT_PART = {"vocab_size": 260, "num_key_value_heads": HEADS}

KEYWORDS: dict[str, dict[str, Any]] = {
    # one layer of each kind, where the kinds are not given by a list as long as the model
    "afmoe": {"mup_enabled": True},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": _MIXED_ATTENTION,
        "rope_parameters": dict.fromkeys(_MIXED_ATTENTION, _ROPE_OF_FOUR),
    },
    "flint": {"layer_types": _MIXED_ATTENTION},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": 2 * _MIXED_ATTENTION,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        "intermediate_size": INTERMEDIATE,
    },
    "gemma4_text": {"enable_moe_block": True, "global_head_dim": 2 * HEAD},
    "gemma4_assistant.text_config": {
        "num_kv_shared_layers": 2,
        "global_head_dim": 2 * HEAD,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    },
    "gemma4_unified_assistant.text_config": {"num_kv_shared_layers": 2, "global_head_dim": 2 * HEAD},
    "gemma4_unified_text": {"global_head_dim": 2 * HEAD},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "conv", "full_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 2 * HEAD,
        "num_key_value_heads": HEADS,
        "n_mamba_heads": 2,
    },
    # sizes that depend on each other
    "blt": {"vocab_size": 260, "encoder_hash_byte_group_vocab": 64, "local_attention_window_len": 8},
    "blt_patcher": _BLT_PART,
    "blt_local_encoder": _BLT_PART,
    "blt_local_decoder": _BLT_PART,
    "blt_global_transformer": {"num_key_value_heads": HEADS},
    "DbrxAttentionConfig": {"rope_theta": 10_000.0, "clip_qkv": 8.0},
    "dots3_note_text": {
        "head_dim": 2 * HEAD,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 12,
        "swa_head_dim": 2 * HEAD,
        "swa_qk_nope_head_dim": HEAD,
        "swa_v_head_dim": HEAD,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"], "per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    "xlstm": {
        "hidden_size": 64,
        "embedding_dim": 64,
        "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 8,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type of a configuration class (or the class's name, or `family.field`) to what it needs besides `SIZES`."""

_ENCODER = "an encoder used as a decoder"
_HALF = "the decoder half of a sequence-to-sequence model"
_WRAPPER = "a multimodal wrapper: its text model is listed as {}"
_DRAFTER = "a drafter that reads the keys and values of {}"
_NO_MLP = "a state-space model without an MLP"
_ALIAS = "an alias: the classes of {}"

_OTHERS: dict[str, str] = {
    **_each(_ENCODER, "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert"),
    **_each(_ENCODER, "roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod"),
    "xlnet": "a permutation language model: without a permutation mask every token sees every other",
    **_each(
        _HALF, "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp pegasus"
    ),
    **_each(_HALF, "plbart prophetnet trocr whisper"),
    "dots3_note": _WRAPPER.format("dots3_note_text"),
    "fuyu": _WRAPPER.format("persimmon"),
    "gemma3": _WRAPPER.format("gemma3_text"),
    "gemma3n": _WRAPPER.format("gemma3n_text") + "; its vision tower needs timm",
    "gemma4": _WRAPPER.format("gemma4_text"),
    "gemma4_unified": _WRAPPER.format("gemma4_unified_text"),
    "git": "a multimodal wrapper around an encoder used as a decoder",
    "got_ocr2": _WRAPPER.format("qwen2"),
    "llama4": _WRAPPER.format("llama4_text"),
    "moss_transcribe_diarize": _WRAPPER.format("qwen3"),
    "qwen3_5": _WRAPPER.format("qwen3_5_text"),
    "qwen3_5_moe": _WRAPPER.format("qwen3_5_moe_text"),
    "qwen4_exp": _WRAPPER.format("qwen4_exp_text"),
    "gemma4_assistant": _DRAFTER.format("gemma4"),
    "gemma4_unified_assistant": _DRAFTER.format("gemma4_unified"),
    **_each(_NO_MLP, "falcon_mamba mamba mamba2"),
    "gpt-sw3": _ALIAS.format("gpt2"),
    **_each(_ALIAS.format("llama"), "internlm3 iquestcoder"),
}

OTHER_FAMILIES: dict[str, str] = {
    name: reason for name, reason in _OTHERS.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
}
"""Model types with a causal head that are not decoder-only text families of their own, and why."""

DECODER_FAMILIES: tuple[str, ...] = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in _OTHERS)
"""Model types whose text model is decoder-only; one that a newer transformers adds counts until it is listed above."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The family's configuration: two to four decoder layers, mostly 13 to 90 thousand parameters."""
    return _shrunk(_default(model_type), model_type)


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The family's causal model in float32, eager attention, eval mode; equal seeds give equal weights."""
    build = (
        _model_class(model_type)._from_config if model_type in _UNKNOWN_TO_AUTO else AutoModelForCausalLM.from_config
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(tiny_config(model_type), dtype=torch.float32, attn_implementation="eager")
        _wake(model)
    return model.eval()


def tiny_inputs(model_type: str, batch: int = 2, length: int = 7) -> dict[str, Any]:
    """Keywords for one forward pass: random ordinary tokens and whatever else the family cannot do without."""
    generator = torch.Generator().manual_seed(length)
    if model_type in _DRAFTERS:
        return _drafter_inputs(batch, length, generator)
    rows = batch * getattr(tiny_config(model_type), "num_codebooks", 1) if model_type in _UNKNOWN_TO_AUTO else batch
    inputs = {"input_ids": torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (rows, length), generator=generator)}
    if model_type == "moshi":  # transformers 5.17 masks nothing, the future included, when it gets no mask
        return inputs | {"attention_mask": torch.ones(rows, length, dtype=torch.long)}
    if model_type in ("blt", "rwkv"):  # blt's configuration has no length for a cache, rwkv's cache breaks the gradient
        return inputs | {"use_cache": False}
    return inputs


_UNKNOWN_TO_AUTO = ("musicgen", "musicgen_melody")
"""AutoModelForCausalLM knows the whole's configuration, but their causal models take only the decoder's."""

_DRAFTERS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers")


def _model_class(model_type: str) -> type[PreTrainedModel]:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _default(model_type: str) -> PreTrainedConfig:
    if model_type in _UNKNOWN_TO_AUTO:
        return _model_class(model_type).config_class()
    if model_type in _DRAFTERS:  # they refuse the defaults of their own text configuration
        text = {"model_type": _DRAFTERS[model_type], "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        return CONFIG_MAPPING[model_type](text_config=text)
    return CONFIG_MAPPING[model_type]()


def _shrunk(default: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The same class again with `SIZES`, one layer of each kind, small nested configurations and `KEYWORDS[name]`."""
    default.allow_global_per_layer_attribute_access = True
    values = {field.name: getattr(default, field.name, None) for field in dataclasses.fields(default)}
    keywords: dict[str, Any] = {field: SIZES[field] for field in values if field in SIZES}
    keywords |= {field: 0.0 for field, value in values.items() if _is_noise(field, value)}
    if "kv_lora_rank" in values:  # latent attention has no groups
        keywords["num_key_value_heads"] = HEADS
    other_tokens = sorted(field for field in values if field.endswith(("_token_id", "_token_index")))
    for token, field in enumerate((field for field in other_tokens if field not in SIZES), start=3):
        if isinstance(values[field], int):
            keywords[field] = token
    keywords |= _one_layer_of_each_kind(values)
    for field, value in values.items():
        if isinstance(value, PreTrainedConfig):
            nested = f"{name}.{field}"
            keywords[field] = _shrunk(value, nested if nested in KEYWORDS else value.model_type or type(value).__name__)
    return type(default)(**copy.deepcopy(keywords | KEYWORDS.get(name, {})))  # a configuration may edit its lists


def _is_noise(field: str, value: Any) -> bool:
    return isinstance(value, float) and any(word in field for word in ("drop", "jitter"))


def _one_layer_of_each_kind(values: dict[str, Any]) -> dict[str, Any]:
    """Cuts every list with one entry per layer to the first layer of each kind, to two layers at least."""
    layers = values.get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 2:
        return {}
    lists = {
        field: value for field, value in values.items() if isinstance(value, list | tuple) and len(value) == layers
    }
    kinds = [tuple(lists[field][layer] for field in _KINDS if field in lists) for layer in range(layers)]
    chosen = sorted({kinds.index(kind) for kind in kinds} | {0})
    if len(chosen) == 1:
        chosen.append(1)
    keywords: dict[str, Any] = {field: [value[layer] for layer in chosen] for field, value in lists.items()}
    if set(keywords.get("mlp_layer_types", ())) == {"sparse"}:
        keywords["mlp_layer_types"][0] = "dense"
    return keywords | {"num_hidden_layers": len(chosen)}


@torch.no_grad()
def _wake(model: PreTrainedModel) -> None:
    """Noise for what starts constant: a bias of 0 or a norm of 1 hides its loss, xlstm's gates of 0 the whole MLP."""
    for parameter in model.parameters():
        if parameter.numel() and parameter.is_floating_point() and parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _drafter_inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    def states(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    heads = {"full_attention": 2 * HEAD, "sliding_attention": HEAD}
    return {
        "inputs_embeds": states(length, 2 * HIDDEN),
        "shared_kv_states": {
            kind: (states(GROUPS, length, size), states(GROUPS, length, size)) for kind, size in heads.items()
        },
        "position_ids": torch.arange(length).expand(batch, -1),
    }
