"""Attention in JAX, by name: softmax over float32 scores, with fewer key-value heads than query heads.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, N queries that share one, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

HIDDEN = -1e30  # a score that no softmax sees; finite, so that a row that sees nothing is no NaN
Drop = Callable[[Array], Array]


def plain_attention(
    query_BTHD: Float[Array, "B T H D"],
    key_BSGD: Float[Array, "B S G D"],
    value_BSGD: Float[Array, "B S G D"],
    mask_BTS: Bool[Array, "#B T S"],
    *,
    scale: float,
    drop: Drop,
) -> Float[Array, "B T H D"]:
    """Attention written out; head h reads key-value head h // N. `drop`: dropout of the weights."""
    B, T, H, D = query_BTHD.shape
    query = query_BTHD.reshape(B, T, key_BSGD.shape[2], -1, D)
    scores = jnp.einsum("btgnd,bsgd->bgnts", query, key_BSGD, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, HIDDEN), axis=-1)
    weights = drop(weights.astype(value_BSGD.dtype))
    return jnp.einsum("bgnts,bsgd->btgnd", weights, value_BSGD).reshape(B, T, H, D)


def default_attention(platform: str) -> str:
    """The name in `ATTENTION` to use on a kind of device."""
    return "splash" if platform == "tpu" else "plain"


ATTENTION: dict[str, Callable[..., Any]] = {"plain": plain_attention}
