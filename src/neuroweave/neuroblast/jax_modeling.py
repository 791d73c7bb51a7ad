"""NeuroBLAST in JAX, the twin of `modeling.py`: the same parts in the same order, as functions on a dict of arrays.

    e = embed(ids);  h = sensory(e)
    h = associative(h + norm(silu(e)))
    h = motor(h + norm(silu(-e)));  logits = head(norm(h))

Equal layers run in one `lax.scan`, so that compiling takes no longer for more of them. The residual stream, norms,
softmax and rotary angles are float32, matrix products in the dtype that is asked for. Weights have the checkpoint's
names and shapes (`tensor_table`). Letters: B batch, T time, S time of the cache, C hidden size, H heads, G key-value
heads, D head size, R units of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from neuroweave.activations.jax import Function, build_function
from neuroweave.neuroblast.jax_attention import ATTENTION, Sight
from neuroweave.neuroblast.jax_products import causal_convolution, product
from neuroweave.neuroblast.layer_plan import BRIDGES, STAGES, PlannedLayer
from neuroweave.neuroblast.tensor_table import Block, Edit, blocks_of, edits_by_module, layer_edits, tensor_table
from neuroweave.neuroblast.weight_map import EMBEDDING, HEAD

Params = Mapping[str, Array]
Cache = dict[str, Any]

# What of a layer's forward pass is kept for the backward pass; the rest is computed again.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Computation:
    """How the model is computed. `dtype`: of matrix products. `attention`: a name in `ATTENTION`. `remat`: one in
    `REMAT`. `sharding`: of hidden states [B, T, C], None on one device. `unroll`: no scan over equal layers.
    `platform`: what it is compiled for."""

    dtype: Any = jnp.float32
    attention: str = "plain"
    remat: str = "none"
    sharding: Any = None
    unroll: bool = False
    platform: str = field(default_factory=jax.default_backend)


@dataclass(frozen=True)
class Context:
    """What every layer is given. `cos`, `sin` [B, T, D]; `sights`: what tokens see, by the layer's type;
    `padding` [B, T]: False where a token is padding; `within` [B, T]: the token's place in its document, where rows are
    packed; `seen`: tokens in the cache."""

    cos: Array
    sin: Array
    sights: dict[str, Sight]
    padding: Array | None
    within: Array | None
    dropout_keys: Array | None
    seen: Array | int


# ----------------------------------------------------------------------------------------------------------- parts


def rms_norm(x: Float[Array, "... C"], weight: Float[Array, " C"], eps: float) -> Float[Array, "... C"]:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in float32."""
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps) * weight.astype(jnp.float32)


def rotary_frequencies(config: Any) -> tuple[Array, float]:
    """(inverse frequencies [D / 2], attention scaling) of the configuration's rotary scaling.

    Raises ValueError for scalings that change with the length of the text.
    """
    from neuroweave.neuroblast.modeling import NeuroBlastRotaryEmbedding

    rotary = NeuroBlastRotaryEmbedding(config)
    if rotary.rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_parameters: rope_type {rotary.rope_type!r} changes with the length of the text, which the JAX model "
            f"does not follow; use the torch backend, or default, linear, yarn or llama3"
        )
    return jnp.asarray(rotary.inv_freq.numpy()), float(rotary.attention_scaling)


def rotate(x_BTHD: Array, cos_BTD: Array, sin_BTD: Array) -> Array:
    """x turned by its position: channel i and channel i + D / 2 are a pair."""
    first, second = jnp.split(x_BTHD, 2, axis=-1)
    return x_BTHD * cos_BTD[:, :, None] + jnp.concatenate((-second, first), axis=-1) * sin_BTD[:, :, None]


def dropout(x: Float[Array, "B ..."], rate: float, keys: Array | None) -> Float[Array, "B ..."]:
    """Each row drops by a key of its own [B], so that it does not matter which rows are computed together."""
    if keys is None or rate == 0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


# ---------------------------------------------------------------------------------------------------------- layers


class Layer:
    """One layer of a block: its plan, and the activations that a patch put into it."""

    def __init__(self, planned: PlannedLayer, config: Any, computation: Computation, edits: Mapping[str, Any]) -> None:
        self.planned, self.config, self.computation = planned, config, computation
        made = {where: edit for where, found in edits.items() for edit in found}
        own = hidden_activation(config)
        self.activation = build_function(
            made["mlp.act_fn"]["activation"] if "mlp.act_fn" in made else own, original=own
        )
        self.entering = build_function(made[""]["activation"], original="identity") if "" in made else None
        self.around = {where: around(edit) for where, edit in made.items() if edit["op"] == "projection"}
        if strange := sorted(set(made) - {"mlp.act_fn", ""} - set(self.around)):
            raise ValueError(f"{planned.name}.{strange[0]}: the JAX model has no activation there")

    def linear(self, weights: Params, name: str, x: Array) -> Array:
        """The projection called `name` and the activations around it."""
        return linear(x, weights, name, self.computation, self.around.get(name))

    def run(self, weights: Params, h: Array, context: Context, rotary: Any, number: Any, cache: Any) -> Any:
        """(hidden states [B, T, C], this layer's cache). `number`: the layer's, which decides what is dropped."""
        if self.entering is not None:
            h = self.entering(h, below(weights, "input_activation"))
        keys = context.dropout_keys
        key = None if keys is None else jax.vmap(lambda each: jax.random.fold_in(each, number))(keys)
        part = self.convolve if self.planned.is_convolution else self.attend
        h, cache = part(weights, h, context, rotary, key, cache)
        if not self.planned.is_convolution:
            x = rms_norm(h, weights["post_attention_layernorm.weight"], self.config.rms_norm_eps)
            h = h + self.mlp(weights, x).astype(h.dtype)
        if self.computation.sharding is not None:
            h = lax.with_sharding_constraint(h, self.computation.sharding)
        return h, cache

    def mlp(self, weights: Params, x: Array) -> Array:
        """down(act(gate(x)) * up(x))."""
        gate, up = self.linear(weights, "mlp.gate_proj", x), self.linear(weights, "mlp.up_proj", x)
        return self.linear(weights, "mlp.down_proj", self.activation(gate, below(weights, "mlp.act_fn")) * up)

    def attend(self, weights: Params, h: Array, context: Context, rotary: Any, key: Any, cache: Any) -> Any:
        """h + attention(norm(h)), with a norm on each query and key head; rotary positions or none."""
        config, eps, dtype = self.config, self.config.rms_norm_eps, self.computation.dtype
        x = rms_norm(h, weights["input_layernorm.weight"], eps)
        query, key_heads, value = (
            self.linear(weights, f"self_attn.{name}_proj", x).reshape(*x.shape[:2], -1, config.head_dim)
            for name in "qkv"
        )
        query = rms_norm(query, weights["self_attn.q_norm.weight"], eps)
        key_heads = rms_norm(key_heads, weights["self_attn.k_norm.weight"], eps)
        if rotary is not False:
            cos, sin = (context.cos, context.sin) if rotary is True else still(context, rotary)
            query, key_heads = rotate(query, cos, sin), rotate(key_heads, cos, sin)
        key_heads, value = key_heads.astype(dtype), value.astype(dtype)
        if cache is not None:
            cache, key_heads, value = remember(cache, key_heads, value, context.seen)
        kind = self.computation.attention if cache is None else "plain"
        out = ATTENTION[kind](
            query.astype(dtype),
            key_heads,
            value,
            context.sights[self.planned.type],
            scale=config.head_dim**-0.5,
            drop=functools.partial(dropout, rate=config.attention_dropout, keys=key),
            sharding=self.computation.sharding,
            platform=self.computation.platform,
        )
        out = self.linear(weights, "self_attn.o_proj", out.reshape(*x.shape[:2], -1))
        return h + out.astype(h.dtype), cache

    def convolve(self, weights: Params, h: Array, context: Context, _: Any, key: Any, cache: Any) -> Any:
        """h + dropout(norm_out(f(norm_in(h)))); f: a causal dilated convolution, gated at scale 2, narrow below 1."""
        config, dtype = self.config, self.computation.dtype
        x = rms_norm(h, weights["norm_in.weight"], config.rms_norm_eps).astype(dtype)
        if context.padding is not None:  # right before the convolution: padding must not reach later tokens
            x = jnp.where(context.padding[..., None], x, jnp.zeros((), dtype))
        tokens = x.shape[1]
        if cache is not None:
            columns, unit = cache
            x = jnp.concatenate((columns[unit].astype(dtype), x), axis=1)
            kept = x[:, x.shape[1] - columns.shape[2] :]
            cache = (lax.dynamic_update_index_in_dim(columns, kept.astype(columns.dtype), unit, 0), unit)
        assert self.planned.dilation is not None
        x = causal_convolution(
            x,
            weights["conv.weight"].astype(dtype),
            self.planned.dilation,
            tokens,
            context.within,
            platform=self.computation.platform,
        )
        if config.scale > 1:
            gate, value = jnp.split(x, 2, axis=-1)
            x = value * jax.nn.softmax(gate.astype(jnp.float32), axis=-1).astype(dtype)
        elif config.scale < 1:
            x = product(x, weights["proj_back.weight"].astype(dtype), self.computation.platform)
        x = rms_norm(x, weights["norm_out.weight"], config.rms_norm_eps)
        return h + dropout(x, config.dropout, key), cache


def linear(x: Array, weights: Params, name: str, computation: Computation, activations: Any = None) -> Array:
    """x W^T + b in the dtype of products; `activations`: (before or None, those after)."""
    before, after = activations or (None, ())
    dtype = computation.dtype
    if before is not None:
        x = before(x, below(weights, f"{name}.activation_before"))
    y = product(x.astype(dtype), weights[f"{name}.weight"].astype(dtype), computation.platform)
    if f"{name}.bias" in weights:
        y = y + weights[f"{name}.bias"].astype(dtype)
    for k, activation in enumerate(after):
        y = activation(y, below(weights, f"{name}.activation_after.{k}"))
    return y


def around(edit: Edit) -> tuple[Function | None, list[Function]]:
    """The activations before and after a projection."""
    before = build_function(edit["before"], original="identity") if "before" in edit else None
    return before, [build_function(part["activation"], original="identity") for part in edit.get("after", ())]


def below(weights: Params, prefix: str) -> dict[str, Array]:
    """The weights under a module's path, by the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): array for name, array in weights.items() if name.startswith(start)}


def hidden_activation(config: Any) -> str:
    """Our name of the configuration's activation. Raises ValueError for one that has none."""
    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
             "relu": "relu", "relu2": "relu2", "tanh": "tanh", "sigmoid": "sigmoid", "linear": "identity"}  # fmt: skip
    if config.hidden_act not in names:
        raise ValueError(f"hidden_act {config.hidden_act!r} is not known to the JAX model; it knows {', '.join(names)}")
    return names[config.hidden_act]


def still(context: Context, rotary: Array) -> tuple[Array, Array]:
    """Cosines and sines that turn nothing where `rotary` is False."""
    one, zero = jnp.ones((), context.cos.dtype), jnp.zeros((), context.sin.dtype)
    return jnp.where(rotary, context.cos, one), jnp.where(rotary, context.sin, zero)


def remember(cache: Any, key_BTGD: Array, value_BTGD: Array, seen: Any) -> Any:
    """Put new keys and values behind those that were seen; all of this layer's come back, [B, S, G, D]."""
    keys, values, unit = cache
    place = (unit, 0, seen, 0, 0)
    keys = lax.dynamic_update_slice(keys, key_BTGD.astype(keys.dtype)[None], place)
    values = lax.dynamic_update_slice(values, value_BTGD.astype(values.dtype)[None], place)
    return (keys, values, unit), keys[unit].astype(key_BTGD.dtype), values[unit].astype(value_BTGD.dtype)


# ------------------------------------------------------------------------------------------------------- the whole


class NeuroBlast:
    """The model of a configuration; `plan`: a patched checkpoint's. It holds no weights: they are handed in."""

    def __init__(self, config: Any, plan: Sequence[Edit] = (), *, computation: Computation | None = None) -> None:
        self.config, self.computation = config, computation or Computation()
        edits = edits_by_module(plan)
        self.table = tensor_table(config, edits)
        self.blocks = blocks_of(config, edits)
        self.layers = [
            [Layer(each, config, self.computation, layer_edits(edits, each)) for each in block.unit]
            for block in self.blocks
        ]
        self.head_activations = around(edits["lm_head"][0]) if "lm_head" in edits else None
        self.frequencies, self.scaling = rotary_frequencies(config)

    def hidden_states(
        self,
        params: Params,
        input_ids: Int[Array, "B T"],
        *,
        position_ids: Int[Array, "B T"] | None = None,
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        dropout_keys: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T C"], Cache | None]:
        """(hidden states after the final norm, the cache with these tokens).

        `position_ids` that begin anew shut the documents of a row off from each other (not with a cache, where they are
        positions and nothing more). `attention_mask`: 0 where a token is padding. `dropout_keys` [B]: None for none.
        """
        config = self.config
        table = params[EMBEDDING]
        if self.computation.sharding is not None:  # a lookup cannot be cut along the channels that fsdp cuts
            table = lax.with_sharding_constraint(
                table, NamedSharding(self.computation.sharding.mesh, P("tensor", None))
            )
        embedded = self.constrained(table[input_ids].astype(jnp.float32))
        if config.pad_token_id is not None:  # as torch's embedding: the padding row learns nothing from being read
            padded = (input_ids == config.pad_token_id)[..., None]
            embedded = jnp.where(padded, lax.stop_gradient(embedded), embedded)
        context, cache = self.context(input_ids, position_ids, attention_mask, dropout_keys, cache)
        caches = [None] * len(self.blocks) if cache is None else list(cache["layers"])
        h = embedded
        for stage in STAGES:
            for number, block in enumerate(self.blocks):
                if block.stage == stage:
                    h, caches[number] = self.run_block(params, number, h, context, caches[number])
            if stage in BRIDGES and config.bridges:
                signed = embedded if stage == "sensory" else -embedded
                h = h + rms_norm(jax.nn.silu(signed), params[f"model.{BRIDGES[stage]}.weight"], config.rms_norm_eps)
        h = rms_norm(h, params["model.norm.weight"], config.rms_norm_eps)
        if cache is not None:
            cache = cache | {"layers": caches, "seen": cache["seen"] + input_ids.shape[1]}
        return h, cache

    def logits(self, params: Params, h: Float[Array, "... C"]) -> Float[Array, "... V"]:
        """Of hidden states after the final norm, in float32."""
        return linear(h, self.head(params), "lm_head", self.computation, self.head_activations).astype(jnp.float32)

    def head(self, params: Params) -> dict[str, Array]:
        """The head's weights; the embedding's where they are tied."""
        own = {name: array for name, array in params.items() if name.startswith("lm_head.")}
        return own | ({HEAD: params[EMBEDDING]} if self.config.tie_word_embeddings else {})

    def constrained(self, h: Array) -> Array:
        """Hidden states where they are to lie."""
        sharding = self.computation.sharding
        return h if sharding is None else lax.with_sharding_constraint(h, sharding)

    # ------------------------------------------------------------------------------------------------- one block

    def run_block(self, params: Params, number: int, h: Array, context: Context, caches: Any) -> tuple[Array, Any]:
        """The units of a block, one after the other: with `lax.scan` where there are several."""
        block, layers = self.blocks[number], self.layers[number]
        weights = [below(params, f"model.{each.name}") for each in block.unit]
        rotary = [rotary_of(block, place) for place in range(len(layers))]
        numbers = jnp.asarray([[layer.number for layer in unit] for unit in block.units], jnp.int32)
        count = len(block.units)

        def run(carry: Any, unit: Any) -> tuple[Any, None]:
            h, caches = carry
            index, weights, turned = unit
            kept = []
            for place, layer in enumerate(layers):
                cache = None if caches is None else (*caches[place], index)
                turn = turned[place] if turned[place] is not None else rotary[place]
                h, cache = layer.run(weights[place], h, context, turn, numbers[index, place], cache)
                kept.append(None if cache is None else cache[:-1])
            return (h, None if caches is None else kept), None

        if self.computation.remat != "none" and caches is None:
            run = jax.checkpoint(run, policy=REMAT[self.computation.remat])
        turns = [None if isinstance(each, bool) else each for each in rotary]
        if count == 1:
            return run((h, caches), (0, weights, [None] * len(layers)))[0]
        if self.computation.unroll:
            for index in range(count):
                (h, caches), _ = run((h, caches), (index, *jax.tree.map(lambda x: x[index], (weights, turns))))  # noqa: B023
            return h, caches
        return lax.scan(run, (h, caches), (jnp.arange(count), weights, turns))[0]

    def context(
        self, input_ids: Array, position_ids: Any, attention_mask: Any, dropout_keys: Any, cache: Cache | None
    ) -> tuple[Context, Cache | None]:
        """What the layers are given, and the cache that knows which of these tokens are padding."""
        B, T = input_ids.shape
        seen = 0 if cache is None else cache["seen"]
        packed = position_ids is not None and cache is None and attention_mask is None
        index_T = seen + jnp.arange(T)
        positions = jnp.broadcast_to(index_T, (B, T)) if position_ids is None else position_ids
        angles = positions[..., None].astype(jnp.float32) * self.frequencies
        angles = jnp.concatenate((angles, angles), axis=-1)
        padding = None if attention_mask is None else attention_mask.astype(bool)
        within, first_BT = None, jnp.zeros((B, T), jnp.int32)
        if packed:
            anew = jnp.pad(positions[:, 1:] != positions[:, :-1] + 1, ((0, 0), (1, 0)), constant_values=True)
            first_BT = lax.cummax(jnp.where(anew, jnp.arange(T), 0), axis=1)
            within = jnp.arange(T) - first_BT
        valid_BS = padding
        if cache is not None:
            new = jnp.ones((B, T), bool) if padding is None else padding
            valid_BS = lax.dynamic_update_slice(cache["valid"], new, (0, seen))
            cache = cache | {"valid": valid_BS}
        keys_S = jnp.arange(T if valid_BS is None else valid_BS.shape[1])
        mask = (keys_S <= index_T[:, None])[None] & (keys_S >= first_BT[..., None])
        if valid_BS is not None:
            mask = mask & valid_BS[:, None]
        documents = first_BT if packed else None
        sights = {"full_attention": Sight(mask, documents)}
        if window := self.config.sliding_window:
            near = index_T[:, None] - keys_S < window
            sights["sliding_attention"] = Sight(mask & near, documents, window)
        cos, sin = jnp.cos(angles) * self.scaling, jnp.sin(angles) * self.scaling
        return Context(cos, sin, sights, padding, within, dropout_keys, seen), cache

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens in each of `batch` rows: keys and values, and the columns that taps reach."""
        config, dtype = self.config, self.computation.dtype
        layers = []
        for block in self.blocks:
            kept: list[tuple[Array, ...]] = []
            for layer in block.unit:
                if layer.is_convolution:
                    reach = (config.kernel_size - 1) * (layer.dilation or 0)
                    kept.append((jnp.zeros((len(block.units), batch, reach, config.hidden_size), dtype),))
                else:
                    shape = (len(block.units), batch, length, config.num_key_value_heads, config.head_dim)
                    kept.append((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
            layers.append(kept)
        return {"seen": jnp.zeros((), jnp.int32), "valid": jnp.zeros((batch, length), bool), "layers": layers}


def rotary_of(block: Block, place: int) -> bool | Array:
    """Whether the layer at this place of the units has rotary positions: one answer, or one of each unit."""
    flags = [unit[place].rotary for unit in block.units]
    return flags[0] if len(set(flags)) == 1 else jnp.asarray(flags)
