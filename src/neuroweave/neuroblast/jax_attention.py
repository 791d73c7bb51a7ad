"""Attention in JAX, by name: softmax over float32 scores, with fewer key-value heads than query heads.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, N queries that share one, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from neuroweave.neuroblast.jax_products import product

HIDDEN = -1e30  # a score that no softmax sees; finite, so that a row that sees nothing is no NaN
LANES = 128  # of a TPU: what splash attention's sizes are multiples of
BLOCKS = (1024, 512, 256, 128)


@dataclass(frozen=True)
class Sight:
    """What a token sees. `mask`: the keys, whole. The rest says the same of a whole row without a cache or padding:
    what came before it in its document (`documents`: a number for each of a row, None for one document a row), at most
    `window` tokens back."""

    mask: Bool[Array, "#B T S"]
    documents: Int[Array, "B T"] | None = None
    window: int | None = None


def plain_attention(
    query_BTHD: Float[Array, "B T H D"],
    key_BSGD: Float[Array, "B S G D"],
    value_BSGD: Float[Array, "B S G D"],
    sight: Sight,
    *,
    scale: float,
    drop: Callable[[Array], Array],
    sharding: Any = None,
    platform: str,
) -> Float[Array, "B T H D"]:
    """Attention written out; head h reads key-value head h // N. `drop`: dropout of the weights."""
    B, T, H, D = query_BTHD.shape
    G, S = key_BSGD.shape[2], key_BSGD.shape[1]
    query_BGMD = query_BTHD.reshape(B, T, G, -1, D).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, D)  # M: N times T
    scores = product(query_BGMD, key_BSGD.swapaxes(1, 2), platform, wide=True).reshape(B, G, -1, T, S) * scale
    weights = jax.nn.softmax(jnp.where(sight.mask[:, None, None], scores, HIDDEN), axis=-1)
    weights_BGMS = drop(weights.astype(value_BSGD.dtype)).reshape(B, G, -1, S)
    out = product(weights_BGMS, value_BSGD.transpose(0, 2, 3, 1), platform)
    return out.reshape(B, G, -1, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


def splash_attention(
    query_BTHD: Float[Array, "B T H D"],
    key_BSGD: Float[Array, "B S G D"],
    value_BSGD: Float[Array, "B S G D"],
    sight: Sight,
    *,
    scale: float,
    drop: Callable[[Array], Array],
    sharding: Any = None,
    platform: str,
) -> Float[Array, "B T H D"]:
    """JAX's block-wise kernel for TPUs, which never holds the scores; elsewhere it is interpreted (for tests).

    For whole rows alone: without a cache, padding or dropout. `sharding`: of hidden states, whose mesh it runs on.
    `platform`: what the program is compiled for.
    """
    B, T, _, D = query_BTHD.shape
    missing_T, missing_D = -T % LANES, -D % LANES
    grown = [
        jnp.pad(x, ((0, 0), (0, missing_T), (0, 0), (0, missing_D))).swapaxes(1, 2)
        for x in (query_BTHD * scale, key_BSGD, value_BSGD)
    ]
    documents = jnp.zeros((B, T), jnp.int32) if sight.documents is None else sight.documents
    documents = jnp.pad(documents, ((0, 0), (0, missing_T)), mode="edge")  # causal: what stands behind is not seen
    interpret = platform != "tpu"
    run: Any = functools.partial(run_splash, window=sight.window, interpret=interpret)
    if sharding is not None:
        rows, tensor = sharding.spec[0], "tensor"
        heads = P(rows, tensor, None, None)
        run = jax.shard_map(  # the compiler cannot cut a kernel by itself
            run, mesh=sharding.mesh, in_specs=(heads, heads, heads, P(rows, None)), out_specs=heads, check_vma=False
        )
    out = run(*grown, documents)
    return out.swapaxes(1, 2)[:, :T, :, :D]


def run_splash(
    query_BHTD: Array, key_BGTD: Array, value_BGTD: Array, documents_BT: Array, *, window: int | None, interpret: bool
) -> Array:
    """The kernel on one device's rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, tokens = query_BHTD.shape[1:3]
    block = next(size for size in BLOCKS if tokens % size == 0)
    shape = (tokens, tokens)
    one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        interpret=interpret,
    )
    ids = kernel.SegmentIds(q=documents_BT, kv=documents_BT)
    return jax.vmap(attend)(query_BHTD, key_BGTD, value_BGTD, ids)


def default_attention(platform: str, *, dropout: float = 0.0) -> str:
    """The name in `ATTENTION` to train with on a kind of device."""
    return "splash" if platform == "tpu" and not dropout else "plain"


ATTENTION: dict[str, Callable[..., Any]] = {"plain": plain_attention, "splash": splash_attention}
