"""The layers of NeuroBLAST in vLLM: attention on its paged cache, convolutions with one state for each sequence.

The layer order, the rotary positions and the formulas are the ones of `neuroblast/`. Letters: T tokens of a packed
batch, R sequences, C hidden size, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from neuroweave.neuroblast.layer_plan import PlannedLayer, plan_layers
from neuroweave.neuroblast.modeling import rotate
from neuroweave.vllm_plugin.neuroblast_plan import PlannedActivations
from neuroweave.vllm_plugin.neuron_shards import WHOLE, Shard
from neuroweave.vllm_plugin.packed_convolution import Columns, convolve, find_columns


@dataclass(frozen=True)
class Batch:
    """What all convolutions of one forward pass share. `tokens`: those that are no padding. `starts` [R + 1]: the first
    token of each sequence. `begins` [R]: sequences without a past. `columns`: by dilation, found when first asked for.
    """

    tokens: int
    starts: Tensor
    begins: Tensor
    columns: dict[int, Columns]


def read_batch(layer: str, tokens: int, device: torch.device) -> Batch:
    """The batch that vLLM is running, from what it says about one convolution layer; alone where it says nothing."""
    facts = metadata_of(layer)
    if facts is None:  # vLLM tries out how much memory a pass takes, before there are states
        return Batch(
            tokens, torch.tensor([0, tokens], device=device), torch.ones(1, dtype=torch.bool, device=device), {}
        )
    decoded = len(facts.state_indices_tensor_d) if facts.num_prefills == 0 else facts.num_decodes
    starts = torch.arange(decoded + 1, device=device)
    begins = torch.zeros(decoded, dtype=torch.bool, device=device)
    if facts.num_prefills:  # vLLM puts sequences that are being continued, one token each, before all others
        starts = torch.cat((starts[:-1], facts.query_start_loc_p.long() + decoded))
        begins = torch.cat((begins, ~facts.has_initial_states_p))
    return Batch(decoded + facts.num_prefill_tokens, starts, begins, {})


def metadata_of(layer: str) -> Any:
    metadata = get_forward_context().attn_metadata
    return None if metadata is None else metadata[layer]


class PackedConvolution(MambaBase, nn.Module):
    """`CausalConvolution` with a state for each sequence: as long as vLLM has the sequence, in a block of its cache.

    Every rank computes the whole convolution: each output channel needs all input channels, and so does the norm after.
    """

    is_kv_cache_tp_replicated = True  # a property there

    def __init__(self, vllm_config: Any, name: str, dilation: int) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.name, self.dilation, self.taps = name, dilation, config.kernel_size
        self.reach = (self.taps - 1) * dilation
        self.shape = state_shape(config)
        self.dtypes = state_dtypes(vllm_config)
        self.weight = nn.Parameter(
            torch.empty(config.convolution_channels, self.taps, config.hidden_size), requires_grad=False
        )
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"two layers are called {name}")
        layers[name] = self
        self.kv_cache = (torch.tensor([]),)

    def forward(self, x_TC: Tensor, batch: Batch) -> Tensor:
        if self.dilation not in batch.columns:
            batch.columns[self.dilation] = find_columns(batch.starts, batch.tokens, self.taps, self.dilation)
        columns, facts = batch.columns[self.dilation], metadata_of(self.name)
        if facts is None:
            return convolve(x_TC, self.weight, columns, x_TC.new_zeros(1, self.reach, x_TC.shape[1]))[0]
        parts = (facts.state_indices_tensor_d, facts.state_indices_tensor_p)
        blocks = torch.cat([part.flatten() for part in parts if part is not None])[: len(batch.begins)].long()
        states_NSC = self.kv_cache[0]
        states_RSC = states_NSC[blocks, : self.reach].masked_fill(batch.begins[:, None, None], 0).to(x_TC.dtype)
        y_TD, kept_RSC = convolve(x_TC[: batch.tokens], self.weight, columns, states_RSC)
        states_NSC[blocks, : self.reach] = kept_RSC.to(states_NSC.dtype)
        return functional.pad(y_TD, (0, 0, 0, len(x_TC) - batch.tokens))

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        return (self.shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.SHORT_CONV


def state_shape(config: Any) -> tuple[int, int]:
    """(columns, channels) of a convolution's state: in every layer those that the widest dilation needs.

    Nothing is lost by it: vLLM pads all states to the size of one page of keys and values.
    """
    widest = max(layer.dilation or 0 for layer in plan_layers(config))
    return max((config.kernel_size - 1) * widest, 1), config.hidden_size


def state_dtypes(vllm_config: Any) -> tuple[torch.dtype, ...]:
    kept = vllm_config.cache_config.mamba_cache_dtype
    return MambaStateDtypeCalculator.short_conv_state_dtype(vllm_config.model_config.dtype, kept)


class ConvolutionLayer(nn.Module):
    """`NeuroBlastConvolutionLayer`: x + norm_out(f(norm_in(x)))."""

    def __init__(self, vllm_config: Any, planned: PlannedLayer, activations: PlannedActivations) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert planned.dilation is not None
        self.gated = config.scale > 1
        self.input_activation = activations.on_input(f"model.{planned.name}")
        self.norm_in = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conv = PackedConvolution(vllm_config, f"model.layers.{planned.number}.conv", planned.dilation)
        self.norm_out = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.scale < 1:
            channels = config.convolution_channels
            self.proj_back = ReplicatedLinear(channels, config.hidden_size, bias=False, return_bias=False)

    def forward(self, x_TC: Tensor, rotary: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        x_TC = self.input_activation(x_TC)
        y = self.conv(self.norm_in(x_TC), batch)
        if self.gated:
            gate, value = y.chunk(2, dim=-1)
            y = value * functional.softmax(gate, dim=-1, dtype=torch.float32).to(value.dtype)
        elif hasattr(self, "proj_back"):
            y = self.proj_back(y)
        return x_TC + self.norm_out(y.contiguous())


class AttentionLayer(nn.Module):
    """`NeuroBlastAttentionLayer`: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, vllm_config: Any, planned: PlannedLayer, activations: PlannedActivations) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.input_activation = activations.on_input(f"model.{planned.name}")
        self.self_attn = ServedAttention(vllm_config, planned, activations)
        self.mlp = ServedMLP(config, f"model.{planned.name}.mlp", activations)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TC: Tensor, rotary: tuple[Tensor, Tensor], batch: Batch | None) -> Tensor:
        x_TC = self.input_activation(x_TC)
        x_TC = x_TC + self.self_attn(self.input_layernorm(x_TC), rotary)
        return x_TC + self.mlp(self.post_attention_layernorm(x_TC))


class ServedAttention(nn.Module):
    """`NeuroBlastAttention`, its projections in one; activations of a recipe follow on each part."""

    def __init__(self, vllm_config: Any, planned: PlannedLayer, activations: PlannedActivations) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.head_dim, self.rotary = config.head_dim, planned.rotary
        heads, key_values = config.num_attention_heads, config.num_key_value_heads
        parts = min(ranks, key_values)  # with fewer heads of keys and values than ranks, several ranks have the same
        widths = {"q": heads * self.head_dim, "k": key_values * self.head_dim, "v": key_values * self.head_dim}
        shards = {"q": Shard(rank, ranks)} | dict.fromkeys("kv", Shard(rank // (ranks // parts), parts))
        self.sizes = [widths[part] // shards[part].parts for part in "qkv"]
        bias = config.attention_bias
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.head_dim, heads, key_values, bias=bias, return_bias=False
        )
        self.o_proj = RowParallelLinear(widths["q"], config.hidden_size, bias=bias, return_bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        path = f"model.{planned.name}.self_attn"
        after = {part: activations.after(f"{path}.{part}_proj", widths[part], shards[part]) for part in "qkv"}
        after["o"] = activations.after(f"{path}.o_proj", config.hidden_size, WHOLE)
        self.after = nn.ModuleDict(after)
        self.attn = Attention(
            heads // ranks,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=key_values // parts,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=config.sliding_window if planned.type == "sliding_attention" else None,
            prefix=f"model.layers.{planned.number}.self_attn.attn",
        )

    def forward(self, x_TC: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        split = self.qkv_proj(x_TC).split(self.sizes, dim=-1)
        query, key, value = (through(self.after[part], states) for part, states in zip("qkv", split, strict=True))
        query_THD, key_THD = self.heads(query, self.q_norm, rotary), self.heads(key, self.k_norm, rotary)
        return through(self.after["o"], self.o_proj(self.attn(query_THD.flatten(1), key_THD.flatten(1), value)))

    def heads(self, states: Tensor, norm: nn.Module, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[T, H, D]: each head normed, and turned by its position where the layer has positions."""
        states_THD = norm(states.reshape(len(states), -1, self.head_dim))
        if not self.rotary:
            return states_THD
        return rotate(states_THD.transpose(0, 1)[None], *rotary)[0].transpose(0, 1)


class ServedMLP(nn.Module):
    """`NeuroBlastMLP`, gate and up projection in one; activations of a recipe follow on each part."""

    def __init__(self, config: Any, path: str, activations: PlannedActivations) -> None:
        super().__init__()
        hidden, neurons = config.hidden_size, config.intermediate_size
        shard = Shard(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        self.gate_up_proj = MergedColumnParallelLinear(hidden, [neurons] * 2, bias=False, return_bias=False)
        self.down_proj = RowParallelLinear(neurons, hidden, bias=False, return_bias=False)
        self.act_fn = activations.of_mlp(f"{path}.act_fn", neurons, shard)
        after = {part: activations.after(f"{path}.{part}_proj", neurons, shard) for part in ("gate", "up")}
        self.after = nn.ModuleDict(after | {"down": activations.after(f"{path}.down_proj", hidden, WHOLE)})

    def forward(self, x_TC: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x_TC).chunk(2, dim=-1)
        x = self.act_fn(through(self.after["gate"], gate)) * through(self.after["up"], up)
        return through(self.after["down"], self.down_proj(x))


def through(activations: Any, x: Tensor) -> Tensor:
    for activation in activations:
        x = activation(x)
    return x
