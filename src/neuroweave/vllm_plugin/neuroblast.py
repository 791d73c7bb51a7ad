"""NeuroBLAST in vLLM, patched or not: three stages, the embedding coming back between them.

Source: `neuroblast/modeling.py`, whose names and order are kept, so that a checkpoint's tensors find their places.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import regex
import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from neuroweave.checkpoint.sealed import KEY
from neuroweave.neuroblast.layer_plan import BRIDGES, STAGES, plan_layers
from neuroweave.neuroblast.modeling import NeuroBlastRotaryEmbedding
from neuroweave.neuroblast.weight_map import HEAD, from_published
from neuroweave.vllm_plugin.neuroblast_layers import (
    AttentionLayer,
    ConvolutionLayer,
    read_batch,
    state_dtypes,
    state_shape,
)
from neuroweave.vllm_plugin.neuroblast_plan import PlannedActivations
from neuroweave.vllm_plugin.registration import refuse
from neuroweave.vllm_plugin.served_config import opened

NAMES = WeightsMapper(
    orig_to_new_regex={
        regex.compile(r"\.(\w+)_proj\.activation_after\."): r".after.\1.",
        regex.compile(r"^lm_head\.activation_before\."): "head_activation.",
    },
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".gate_proj": (".gate_up_proj", 0),
        ".up_proj": (".gate_up_proj", 1),
    },
)


class NeuroBlastModel(nn.Module):
    """The model without its head: hidden states [T, C] of a packed batch."""

    def __init__(self, vllm_config: Any, config: Any, activations: PlannedActivations) -> None:
        super().__init__()
        self.config, self.planned = config, plan_layers(config)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        for stage in STAGES:
            layers = [layer for layer in self.planned if layer.stage == stage]
            built: list[nn.Module] = []
            for layer in layers:
                kind = ConvolutionLayer if layer.is_convolution else AttentionLayer
                built.append(kind(vllm_config, layer, activations))
            self.add_module(f"{stage}_layers", nn.ModuleList(built))
            if stage in BRIDGES and config.bridges:
                self.add_module(BRIDGES[stage], RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = NeuroBlastRotaryEmbedding(config)
        first = next(layer.number for layer in self.planned if layer.is_convolution)
        self.a_convolution = f"model.layers.{first}.conv"

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None) -> Tensor:
        embedded_TC = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch = read_batch(self.a_convolution, len(embedded_TC), embedded_TC.device)
        rotary = self.rotary_emb(embedded_TC, positions[None])
        x_TC = embedded_TC
        for stage in STAGES:
            for layer in self.get_submodule(f"{stage}_layers").children():
                x_TC = layer(x_TC, rotary, batch)
            if stage in BRIDGES and self.config.bridges:
                signed_TC = embedded_TC if stage == "sensory" else -embedded_TC
                x_TC = x_TC + self.get_submodule(BRIDGES[stage])(functional.silu(signed_TC))
        return self.norm(x_TC)


class NeuroBlastForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The model as vLLM runs it. Not split over pipeline stages: the embedding is needed in all of them."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        refuse(vllm_config)
        config = vllm_config.model_config.hf_config
        self.config = opened(config) if hasattr(config, KEY) else config
        activations = PlannedActivations(self.config)
        self.model = NeuroBlastModel(vllm_config, self.config, activations)
        self.lm_head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size)
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.head_activation = activations.before_head()
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        activations.check_all_taken()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, self.head_activation(hidden_states))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """From this layout or the published one; a convolution's weight is turned into one product's."""
        tied = {HEAD} if self.config.tie_word_embeddings else set()
        needed = ((name, laid_out(name, stored)) for name, stored in weights if name not in tied)
        return AutoWeightsLoader(self).load_weights(needed, mapper=NAMES)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, int]]:
        return (state_shape(vllm_config.model_config.hf_config),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return MambaStateCopyFuncCalculator.short_conv_state_copy_func()


def laid_out(name: str, stored: Tensor) -> Tensor:
    """A checkpoint's tensor as the layers here hold it."""
    stored = from_published(name, stored)
    return stored.transpose(1, 2).contiguous() if name.endswith(".conv.weight") else stored
