"""The rows of vllm_equality.py: tiny random checkpoints, and the settings of the engine that continues prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEW_TOKENS = 24
ENGINE: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 4, "block_size": 32}
CHUNKED = ENGINE | {"max_num_batched_tokens": 16, "max_num_seqs": 8}
TIGHT = ENGINE | {"num_gpu_blocks_override": 9, "max_num_seqs": 8}
COMPILED = ENGINE | {"enforce_eager": False}
TWO_RANKS = ENGINE | {"tensor_parallel_size": 2}
TWO_STAGES = COMPILED | {"pipeline_parallel_size": 2}  # eager stages stop vLLM 0.32.0 on a CPU, whatever the model

Build = Callable[[Path], None]
Sites = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """`build`: writes a checkpoint. `refused`: part of what vLLM has to say instead of serving it."""

    name: str
    build: Build
    engine: dict[str, Any] = field(default_factory=lambda: ENGINE)
    new: int = NEW_TOKENS
    refused: str = ""
    preempted: bool = False


def checkpoint(family: str, sites: Sites | None = None, **settings: Any) -> Build:
    """A random model of a family, patched; its learned mixtures have chosen at random."""

    def build(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import neuroweave
        from neuroweave.activations.mixtures import NeuronMixture

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, settings)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter += 0.1 * torch.randn_like(parameter)
            if sites:
                neuroweave.patch(model, {"name": "tried", "sites": sites})
            for module in model.modules():
                if isinstance(module, NeuronMixture):
                    for parameter in module.parameters(recurse=False):
                        parameter.copy_(1 + torch.randn_like(parameter))
        model.save_pretrained(folder)

    return build


def tiny_config(family: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    import neuroweave  # noqa: F401  (NeuroBLAST is a family of its own)

    known = AutoConfig.for_model(family)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    return AutoConfig.for_model(family, **sizes | FAMILIES.get(family, {}) | settings)


def published(folder: Path) -> None:
    """NeuroBLAST in the published layout, kernels with their dead rows."""
    from neuroweave.neuroblast.conversion import convert

    checkpoint("neuroblast")(folder / "ours")
    convert(folder / "ours", folder / "published", to="published")
    for file in (folder / "published").iterdir():
        file.rename(folder / file.name)


def site(names: str | list[str], activation: Any, layers: Any = "all") -> dict[str, Any]:
    return {"site": names, "activation": activation, "layers": layers}


# Heads of 32 at least: vLLM's attention on a CPU takes no smaller ones.
SIZES = {
    "vocab_size": 211, "hidden_size": 128, "intermediate_size": 186, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.08,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 48},
    "qwen2": {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 2},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 48, "query_pre_attn_scalar": 64},
    "gemma3_text": {"sliding_window": 48, "query_pre_attn_scalar": 64},
    "phi": {},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "olmo3": {"sliding_window": 48},
    "starcoder2": {},
    "stablelm": {},
    "smollm3": {},
    "cohere": {"logit_scale": 0.5},
    "glm": {},
    "glm4": {},
    "helium": {},
    "nemotron": {},
    "neuroblast": {
        "hidden_size": 64, "num_sensory_layers": 5, "num_associative_layers": 6, "num_motor_layers": 3,
        "num_hidden_layers": 14,
    },
}  # fmt: skip
MIXTURE = {"mixture": ["original", "relu", "gelu", "swish_beta"]}
ON_PROJECTIONS = {"mixture": ["identity", "tanh", "swish_beta"]}
PROJECTIONS = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"]
EVERYWHERE = [site("everywhere", "phantom")]
OF_ALL_KINDS = [
    site("mlp", "relu|silu|tanh", "every 2nd"),
    site("mlp", MIXTURE, "every 2nd from 1"),
    site(PROJECTIONS, "relu|tanh", [0]),
    site(PROJECTIONS, ON_PROJECTIONS, [2]),
    site("embedding", "tanh"),
    site("head", ON_PROJECTIONS),
]

RECIPES: dict[str, Sites] = {
    "mlp: relu": [site("mlp", "relu")],
    "mlp: segments in layer 1": [site("mlp", "relu|silu|gelu|tanh", [1])],
    "mlp: learned mixture": [site("mlp", MIXTURE)],
    "embedding: tanh": [site("embedding", "tanh")],
    "head: tanh": [site("head", "tanh")],
    "projections: segments, every 2nd layer": [site(PROJECTIONS, "relu|tanh", "every 2nd")],
    "projections: learned mixture in layer 1": [site(PROJECTIONS, ON_PROJECTIONS, [1])],
    "everywhere: phantom": EVERYWHERE,
    "all kinds": OF_ALL_KINDS,
}
BY_RECIPE = [
    Case("llama", checkpoint("llama")),
    *(Case(f"llama, {what}", checkpoint("llama", sites)) for what, sites in RECIPES.items()),
]
BY_ENGINE = [
    Case("llama, all kinds, chunked prefill", checkpoint("llama", OF_ALL_KINDS), CHUNKED),
    Case("llama, all kinds, preempted", checkpoint("llama", OF_ALL_KINDS), TIGHT, 60, preempted=True),
    Case("llama, all kinds, compiled", checkpoint("llama", OF_ALL_KINDS), COMPILED),
    Case("llama, all kinds, tensor parallel 2", checkpoint("llama", OF_ALL_KINDS), TWO_RANKS),
    Case("llama, all kinds, compiled, pipeline parallel 2", checkpoint("llama", OF_ALL_KINDS), TWO_STAGES),
]
BY_FAMILY = [
    Case(f"{family}, {what}", checkpoint(family, sites))
    for family in FAMILIES
    if family != "neuroblast"
    for what, sites in (("mlp: segments", [site("mlp", "relu|tanh")]), ("everywhere: phantom", EVERYWHERE))
]
OF_NEUROBLAST = [
    Case("neuroblast", checkpoint("neuroblast")),
    Case("neuroblast, chunked prefill", checkpoint("neuroblast"), CHUNKED),
    Case(
        "neuroblast, preempted", checkpoint("neuroblast"), TIGHT | {"num_gpu_blocks_override": 24}, 60, preempted=True
    ),
    Case("neuroblast, not eager", checkpoint("neuroblast"), COMPILED),
    Case("neuroblast, tensor parallel 2", checkpoint("neuroblast"), TWO_RANKS),
    Case("neuroblast, scale 2, chunked prefill", checkpoint("neuroblast", scale=2.0), CHUNKED),
    Case(
        "neuroblast, scale 0.5, head not tied, attention biases",
        checkpoint("neuroblast", scale=0.5, tie_word_embeddings=False, attention_bias=True),
    ),
    Case(
        "neuroblast, 3 taps, dilation to 16, sliding window of 48",
        checkpoint("neuroblast", kernel_size=3, max_dilation=16, use_sliding_window=True, sliding_window=48),
    ),
    Case("neuroblast, published layout", published),
    Case("neuroblast, everywhere: phantom", checkpoint("neuroblast", EVERYWHERE)),
    Case("neuroblast, all kinds", checkpoint("neuroblast", OF_ALL_KINDS), CHUNKED),
    Case("neuroblast, all kinds, tensor parallel 2", checkpoint("neuroblast", OF_ALL_KINDS), TWO_RANKS),
]
RELU = [site("mlp", "relu")]
REFUSED = [
    Case("granite, mlp: relu", checkpoint("granite", RELU), refused="it is a patched 'granite'"),
    Case("llama, mlp: relu, quantized", checkpoint("llama", RELU), ENGINE | {"quantization": "fp8"}, refused="'fp8'"),
    Case("llama, mlp: relu, with LoRA", checkpoint("llama", RELU), ENGINE | {"enable_lora": True}, refused="LoRA"),
    Case(
        "llama, mlp: relu, as the class LlamaForCausalLM",
        checkpoint("llama", RELU),
        ENGINE | {"hf_overrides": {"architectures": ["LlamaForCausalLM"]}},
        refused="Unsupported activation: neuroweave",
    ),
    Case(
        "llama, mlp: relu, as TransformersForCausalLM",
        checkpoint("llama", RELU),
        ENGINE | {"hf_overrides": {"architectures": ["TransformersForCausalLM"]}},
        refused="neuroweave",
    ),
    Case(
        "llama, mlp: relu, model_impl transformers",
        checkpoint("llama", RELU),
        ENGINE | {"model_impl": "transformers"},
        refused="NeuroweaveForCausalLM",
    ),
    Case("neuroblast, pipeline parallel 2", checkpoint("neuroblast"), TWO_STAGES, refused="its layers stay together"),
    Case(
        "neuroblast, speculative decoding",
        checkpoint("neuroblast"),
        ENGINE | {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        refused="cannot take back tokens",
    ),
]
CASES = (*BY_RECIPE, *BY_ENGINE, *BY_FAMILY, *OF_NEUROBLAST, *REFUSED)
