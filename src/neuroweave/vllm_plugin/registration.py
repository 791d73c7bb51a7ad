"""What vLLM is told: our architectures, our config, and a look at the engine's settings before anything is started."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from neuroweave.checkpoint.sealed import ARCHITECTURE, MODEL_TYPE
from neuroweave.neuroblast.conversion import PUBLISHED_ARCHITECTURE
from neuroweave.vllm_plugin.decisions import NEUROBLAST, PATCHED_NEUROBLAST, Engine, base_family, refusal
from neuroweave.vllm_plugin.served_config import ServedConfig

PATCHED_MODEL = "neuroweave.vllm_plugin.patched:NeuroweaveForCausalLM"
NEUROBLAST_MODEL = "neuroweave.vllm_plugin.neuroblast:NeuroBlastForCausalLM"
# By name, so that nothing of a model is imported where only its name is needed.
CLASSES = {
    ARCHITECTURE: PATCHED_MODEL,
    "NeuroBlastForCausalLM": NEUROBLAST_MODEL,
    PUBLISHED_ARCHITECTURE: NEUROBLAST_MODEL,
    PATCHED_NEUROBLAST: NEUROBLAST_MODEL,
}


def register_architectures() -> None:
    """May be called again: the same names get the same classes."""
    AutoConfig.register(MODEL_TYPE, ServedConfig, exist_ok=True)
    for architecture, where in CLASSES.items():
        ModelRegistry.register_model(architecture, where)
        MODELS_CONFIG_MAP[architecture] = CheckedSettings


class CheckedSettings(VerifyAndUpdateConfig):
    """vLLM asks this, by architecture, once its settings are complete and before it starts a process."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        refuse(vllm_config)
        cache = vllm_config.cache_config
        if base_family(vllm_config.model_config.hf_config) == NEUROBLAST and cache.enable_prefix_caching:
            # A prefix that is found in the cache has keys and values but no convolution state. vLLM can keep states
            # at block boundaries too ("align"), with kernels that were not tried here.
            cache.enable_prefix_caching = False


def refuse(vllm_config: Any) -> None:
    """Raise ValueError when the model is not served with these settings; the message says why."""
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    engine = Engine(
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        quantization=model.quantization,
        lora=vllm_config.lora_config is not None,
        speculative=vllm_config.speculative_config is not None,
        generates=model.runner_type == "generate",
    )
    if reason := refusal(model.hf_config, engine):
        raise ValueError(f"{model.model}: not served by vLLM: {reason}")
