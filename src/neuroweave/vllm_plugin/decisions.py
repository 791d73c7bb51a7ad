"""What vLLM serves, and what is refused with its reason. Nothing here needs vLLM.

A plan (see `surgery/plan.py`) is what a recipe came to on a model; vLLM builds the same family with layers of its own,
so each kind of edit needs somebody who puts it there. Whatever is not known to be right here is refused: an activation
that is dropped shows in no token of a greedy decoding as long as the largest logit stays the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neuroweave.checkpoint.sealed import ARCHITECTURE, KEY
from neuroweave.neuroblast.bundle import MODEL_TYPE as NEUROBLAST

PATCHED_NEUROBLAST = "NeuroweaveNeuroBlastForCausalLM"
# Families whose patched models were compared with transformers, by log-probabilities: `benchmarks/vllm_equality.py`.
PROVEN_FAMILIES = (
    "cohere", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "helium", "llama", "mistral", "nemotron", "olmo2",
    "olmo3", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
# Rotary scalings whose frequencies change with the length of a sequence: one batch holds many lengths.
BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Engine:
    """What a person asked of vLLM, as far as a decision depends on it."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    quantization: str | None = None
    lora: bool = False
    speculative: bool = False
    generates: bool = True


def refusal(config: Any, engine: Engine) -> str | None:
    """Why this model (a transformers config of ours) is not served so, in one sentence; None when it is."""
    patched = hasattr(config, KEY)
    family = base_family(config)
    if not engine.generates:
        return "it generates text; as an embedding, pooling or scoring model it was not tried"
    if engine.quantization:
        return (
            f"quantization {engine.quantization!r} was not tried with it; leave it out, or quantize with "
            f"`neuroweave round` and serve with `neuroweave serve`"
        )
    if engine.lora:
        return "LoRA adapters were not tried with it; merge the adapter into the weights first"
    if family == NEUROBLAST:
        return refusal_of_neuroblast(config, engine)
    if patched and family not in PROVEN_FAMILIES:
        return (
            f"it is a patched {family!r}; in vLLM, patched models were proven equal to transformers for "
            f"{', '.join(PROVEN_FAMILIES)} alone; `neuroweave serve` serves the others"
        )
    return refusal_of_ranks(config, engine) if patched else None


def refusal_of_ranks(config: Any, engine: Engine) -> str | None:
    """A block whose projections have activations is cut without vLLM's fused layer, which can copy heads."""
    heads = getattr(config.get_text_config(), "num_key_value_heads", None)
    sites = {site for edit in getattr(config, KEY)["plan"] if edit["op"] == "projection" for site in edit["site"]}
    if heads and heads % engine.tensor_parallel and any(site.startswith("attention") for site in sites):
        return (
            f"its recipe changes the attention's projections, so its {heads} heads of keys and values have to divide "
            f"among the ranks; tensor_parallel_size {engine.tensor_parallel} does not"
        )
    return None


def refusal_of_neuroblast(config: Any, engine: Engine) -> str | None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in BY_LENGTH:
        return (
            f"its rotary scaling {rope!r} depends on a sequence's length, and a batch holds sequences of many lengths"
        )
    if engine.pipeline_parallel > 1:
        return "its embedding comes back between the stages, so its layers stay together; use tensor parallelism"
    if engine.speculative:
        return "its convolution states cannot take back tokens that are rejected; leave speculative decoding out"
    if not any(kind == "conv" for kind in config.layer_types):
        return "it has no convolution layer, and as a hybrid model vLLM expects one"
    return None


def base_family(config: Any) -> str:
    """The `model_type` of the family: of a patched model, the one that it was."""
    entry = getattr(config, KEY, None)
    return entry["base"]["model_type"] if entry else config.model_type


def architecture_of(config: Any) -> str:
    """The architecture under which the plugin registers the class for this patched model."""
    return PATCHED_NEUROBLAST if base_family(config) == NEUROBLAST else ARCHITECTURE
