"""NeuroBLAST in PyTorch: attention layers and dilated causal convolutions in three stages, bridged by the embedding.

    e = embed(ids);  h = sensory(e)
    h = associative(h + norm(silu(e)))
    h = motor(h + norm(silu(-e)));  logits = head(norm(h))

Built as transformers builds its models, with its caches: keys and values for attention layers, the last
(kernel_size - 1) * dilation columns for convolutions. Letters: B batch, T time, C hidden size, H heads, D head size.
Source: the published NeuroBLAST V3, from its description; transformers' lfm2 for the conventions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from neuroweave.neuroblast.configuration import NeuroBlastConfig
from neuroweave.neuroblast.convolution import CausalConvolution
from neuroweave.neuroblast.layer_plan import BRIDGES, STAGES, PlannedLayer, plan_layers

MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "conv": create_recurrent_attention_mask,
}


# ----------------------------------------------------------------------------------------------------------- parts


class NeuroBlastRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class NeuroBlastRotaryEmbedding(nn.Module):
    """Cosines and sines [B, T, D] of the rotary positions, with any of transformers' scalings."""

    inv_freq: Tensor

    def __init__(self, config: NeuroBlastConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        settings: Any = config.rope_parameters  # the configuration has filled it in
        self.rope_type: str = settings["rope_type"]
        initial: Callable[..., Any] = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        frequencies, self.attention_scaling = initial(config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: NeuroBlastConfig, **_: Any) -> tuple[Tensor, float]:
        settings: Any = config.rope_parameters
        exponents_D = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / settings["rope_theta"] ** exponents_D, 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeuroBlastRotaryEmbedding:
        """As of any module, but `.to(bfloat16)` leaves the frequencies in float32: rounded ones turn far positions."""
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles_BTD = position_ids[..., None].float() * self.inv_freq.float().to(x.device)
        angles_BTD = torch.cat((angles_BTD, angles_BTD), dim=-1)
        scaling = self.attention_scaling
        return (angles_BTD.cos() * scaling).to(x.dtype), (angles_BTD.sin() * scaling).to(x.dtype)


def rotate(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """x turned by its position: channel i and channel i + D / 2 are a pair."""
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_BTD[:, None] + torch.cat((-second, first), dim=-1) * sin_BTD[:, None]


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, softmax in float32; query [B, H, T, D], key and value with their own number of heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class NeuroBlastAttention(nn.Module):
    """Grouped-query attention with a norm on each query and key head; rotary positions or none."""

    def __init__(self, config: NeuroBlastConfig, planned: PlannedLayer) -> None:
        super().__init__()
        self.config, self.layer_idx, self.rotary = config, planned.number, planned.rotary
        self.head_dim, self.scaling, self.is_causal = config.head_dim, config.head_dim**-0.5, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window = config.sliding_window if planned.type == "sliding_attention" else None
        inner, key_value = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)
        self.q_norm = NeuroBlastRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = NeuroBlastRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_BHTD = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key_BHTD = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value_BHTD = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.rotary:
            query_BHTD, key_BHTD = rotate(query_BHTD, *position_embeddings), rotate(key_BHTD, *position_embeddings)
        if past_key_values is not None:
            key_BHTD, value_BHTD = past_key_values.update(key_BHTD, value_BHTD, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            query_BHTD,
            key_BHTD,
            value_BHTD,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape[:-2], -1).contiguous()), weights


class NeuroBlastMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: NeuroBlastConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


# ---------------------------------------------------------------------------------------------------------- layers


class NeuroBlastLayer(GradientCheckpointingLayer):
    """A layer of either kind. `bridge` [B, T, C] is added to the output of a stage's last layer."""


class NeuroBlastAttentionLayer(NeuroBlastLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NeuroBlastConfig, planned: PlannedLayer) -> None:
        super().__init__()
        self.self_attn = NeuroBlastAttention(config, planned)
        self.mlp = NeuroBlastMLP(config)
        self.input_layernorm = NeuroBlastRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = NeuroBlastRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        bridge: Tensor | None = None,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states if bridge is None else hidden_states + bridge


class BackProjection(nn.Linear):
    """From a narrow convolution's channels to the hidden size: a 1 x 1 convolution in the published model."""


class NeuroBlastConvolutionLayer(NeuroBlastLayer):
    """x + dropout(norm_out(f(norm_in(x)))); f: a causal dilated convolution, gated at scale 2, narrow below 1."""

    def __init__(self, config: NeuroBlastConfig, planned: PlannedLayer) -> None:
        super().__init__()
        assert planned.dilation is not None
        channels = config.convolution_channels
        self.layer_idx, self.dropout, self.gated = planned.number, config.dropout, config.scale > 1
        self.norm_in = NeuroBlastRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conv = CausalConvolution(config.hidden_size, channels, config.kernel_size, planned.dilation)
        self.norm_out = NeuroBlastRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.scale < 1:
            self.proj_back = BackProjection(channels, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        bridge: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        seq_idx: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """`attention_mask` [B, T]: 0 where a token is padding. `seq_idx` [B, T]: the packed sequence of a token."""
        x = self.norm_in(hidden_states)
        if attention_mask is not None:  # right before the convolution: padding must not reach later tokens
            x = x.masked_fill(attention_mask[..., None] == 0, 0)
        x_BCS = x.transpose(1, 2)
        if past_key_values is not None:
            kept = max(self.conv.reach, 1)
            x_BCS = past_key_values.update_conv_state(x_BCS, self.layer_idx, conv_kernel_size=kept)
        x = self.conv(x_BCS, hidden_states.shape[1], sequences_BT=seq_idx)
        if self.gated:
            gate, value = x.chunk(2, dim=-1)
            x = value * functional.softmax(gate, dim=-1, dtype=torch.float32).to(value.dtype)
        elif hasattr(self, "proj_back"):
            x = self.proj_back(x)
        x = functional.dropout(self.norm_out(x), p=self.dropout, training=self.training)
        hidden_states = hidden_states + x
        return hidden_states if bridge is None else hidden_states + bridge


# ------------------------------------------------------------------------------------------------------- the whole


class NeuroBlastPreTrainedModel(PreTrainedModel):
    config: NeuroBlastConfig
    config_class = NeuroBlastConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NeuroBlastAttentionLayer", "NeuroBlastConvolutionLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": NeuroBlastLayer, "attentions": NeuroBlastAttention}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a checkpoint that lacks tensors or has others is refused by name."""
        wanted = kwargs.pop("output_loading_info", False)
        any_shape = kwargs.pop("ignore_mismatched_sizes", False)
        options = kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        model, info = loaded
        others = {name for name in info["unexpected_keys"] if cls is not NeuroBlastModel or "lm_head" not in name}
        shapes = [f"{name} {list(came)}, expected {list(fits)}" for name, came, fits in info["mismatched_keys"]]
        for what, found in (
            ("lacks", info["missing_keys"] - {name for name, *_ in info["mismatched_keys"]}),
            ("has tensors that the model has not:", others),
            ("has tensors of another shape:", [] if any_shape else shapes),
        ):
            if found:
                listed = sorted(found)
                more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
                raise ValueError(f"{pretrained_model_name_or_path}: {what} {', '.join(listed[:3])}{more}")
        return loaded if wanted else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, initializer_range), and uniform convolutions with the bound of the published K x K kernel."""
        if isinstance(module, CausalConvolution):
            _, channels, taps = module.weight.shape
            bound = (channels * taps * taps) ** -0.5
            initialization.uniform_(module.weight, -bound, bound)
        elif isinstance(module, BackProjection):
            bound = module.in_features**-0.5
            initialization.uniform_(module.weight, -bound, bound)
        else:
            super()._init_weights(module)


class NeuroBlastModel(NeuroBlastPreTrainedModel):
    """The model without its head: hidden states [B, T, C] after the final norm."""

    def __init__(self, config: NeuroBlastConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        planned = plan_layers(config)
        for stage in STAGES:
            layers = nn.ModuleList(build_layer(config, layer) for layer in planned if layer.stage == stage)
            self.add_module(f"{stage}_layers", layers)
            if stage in BRIDGES and config.bridges:
                self.add_module(BRIDGES[stage], NeuroBlastRMSNorm(config.hidden_size, config.rms_norm_eps))
        self.norm = NeuroBlastRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = NeuroBlastRotaryEmbedding(config)
        self.bridge_act = nn.SiLU()
        self.gradient_checkpointing = False
        self.planned = planned
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Rows of several sequences: `position_ids` [B, T] start anew in each; `seq_idx` [B, T] may number them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if seq_idx is not None and (position_ids is None or attention_mask is not None or past_key_values is not None):
            raise ValueError(
                "seq_idx needs position_ids that start anew in each sequence (attention knows sequences by those), "
                "no attention_mask and no past_key_values"
            )
        alone = seq_idx is None and attention_mask is None and past_key_values is None
        # a compiler cannot branch on what the positions are: there, rows of one sequence must still get their cache
        if alone and position_ids is not None and not (use_cache and torch.compiler.is_compiling()):
            seq_idx = find_packed_sequence_indices(position_ids.expand(embedded.shape[0], -1))
        if use_cache and past_key_values is None and seq_idx is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(embedded.shape[1], device=embedded.device) + seen)[None]
        masks = attention_mask
        if not isinstance(masks, dict):
            given = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
            kinds = dict.fromkeys(layer.type for layer in self.planned)
            masks = {kind: MASKS[kind](config=self.config, inputs_embeds=embedded, **given) for kind in kinds}
        hidden_states, after = self._bridges(embedded)
        position_embeddings = self.rotary_emb(embedded, position_ids)
        for layer in self.planned:
            hidden_states = self.get_submodule(layer.name)(
                hidden_states,
                after.get(layer.number),
                attention_mask=masks[layer.type],
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                position_ids=position_ids,
                seq_idx=seq_idx,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _bridges(self, embedded: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """What the first layer gets, and what each layer that ends a stage adds to its output, by layer number.

        A layer adds its stage's bridge itself, so that recorded hidden states are what the next layer gets.
        """
        if not self.config.bridges:
            return embedded, {}
        after: dict[int, Tensor] = {}
        first, ended = embedded, 0
        for stage, name in BRIDGES.items():
            ended += sum(layer.stage == stage for layer in self.planned)
            signed = embedded if stage == "sensory" else -embedded
            term = self.get_submodule(name)(self.bridge_act(signed))
            if ended == 0:
                first = first + term
            else:
                after[ended - 1] = after[ended - 1] + term if ended - 1 in after else term
        return first, after


def build_layer(config: NeuroBlastConfig, planned: PlannedLayer) -> NeuroBlastLayer:
    return (NeuroBlastConvolutionLayer if planned.is_convolution else NeuroBlastAttentionLayer)(config, planned)


class NeuroBlastForCausalLM(NeuroBlastPreTrainedModel, GenerationMixin):
    """The model with its head: logits [B, T, V]; loss as transformers' causal language models."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: NeuroBlastConfig) -> None:
        super().__init__(config)
        self.model = NeuroBlastModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`logits_to_keep`: only the last so many positions, or these positions, get logits."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states: Any = outputs.last_hidden_state
        logits = self.lm_head(keep_positions(hidden_states, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As of any model; refused with convolution layers, of whose states the paged cache keeps none."""
        if any(layer.is_convolution for layer in self.model.planned):
            raise ValueError(
                "continuous batching keeps keys and values in pages, but this model also has convolution layers, whose "
                "states belong to a sequence as a whole; use generate() on a padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)


def keep_positions(hidden_states: Tensor, kept: int | Tensor) -> Tensor:
    """The positions of [B, T, C] that `logits_to_keep` names: the last so many (0: all), or by number, or by mask."""
    if isinstance(kept, int):
        return hidden_states[:, -kept:]
    if kept.ndim == 1:
        return hidden_states[:, kept]
    if kept.dtype == torch.bool:
        return hidden_states[kept]
    return torch.take_along_dim(hidden_states, kept[..., None], dim=1)


def register_neuroblast() -> None:
    """Let the Auto classes know NeuroBLAST."""
    AutoConfig.register(NeuroBlastConfig.model_type, NeuroBlastConfig, exist_ok=True)
    AutoModel.register(NeuroBlastConfig, NeuroBlastModel, exist_ok=True)
    AutoModelForCausalLM.register(NeuroBlastConfig, NeuroBlastForCausalLM, exist_ok=True)


if __name__ == "neuroweave.neuroblast.modeling":  # not in a checkpoint's copy: that one speaks for its checkpoint alone
    register_neuroblast()
