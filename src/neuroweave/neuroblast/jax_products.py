"""Matrix products and causal convolutions in JAX, in the form that each platform's compiler is fast at.

XLA for CPUs is slow at two things, measured by `benchmarks/jax_step_time.py`: a convolution inside of a scan runs as
naive loops (its fast one is tried outside of loops alone), and the gradient of x W^T by W begins with dy turned about,
whose strided copy is fused with all that made dy. There the convolution is one product of unfolded columns and the
smaller of x and dy is turned. Letters: B batch, S columns at hand, T tokens, C channels in, D out, K taps.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def product(
    x: Float[Array, "... T C"], weight: Float[Array, "... D C"], platform: str, *, wide: bool = False
) -> Float[Array, "... T D"]:
    """x W^T: one matrix [D, C] for all of x, or one for each of the leading dimensions. `wide`: float32 comes out."""
    kind = jnp.float32 if wide else x.dtype
    return product_on_cpu(kind, x, weight) if platform == "cpu" else plain_product(kind, x, weight)


def plain_product(kind: Any, x: Array, weight: Array) -> Array:
    shared = tuple(range(weight.ndim - 2))
    dimensions = (((x.ndim - 1,), (weight.ndim - 1,)), (shared, shared))
    return lax.dot_general(x, weight, dimensions, preferred_element_type=kind)


product_on_cpu = jax.custom_vjp(plain_product, nondiff_argnums=(0,))


def product_forward(kind: Any, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return plain_product(kind, x, weight), (x, weight)


def product_backward(kind: Any, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = kept
    dy = lax.optimization_barrier(dy)  # made once, not again in each product that reads it
    shared = tuple(range(weight.ndim - 2))
    rows = tuple(range(weight.ndim - 2, x.ndim - 1))
    dx = lax.dot_general(dy, weight, (((dy.ndim - 1,), (weight.ndim - 2,)), (shared, shared)))
    if dy.shape[-1] <= x.shape[-1]:
        dweight = lax.dot_general(dy, x, ((rows, rows), (shared, shared)))
    else:
        dweight = lax.optimization_barrier(lax.dot_general(x, dy, ((rows, rows), (shared, shared)))).swapaxes(-1, -2)
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


product_on_cpu.defvjp(product_forward, product_backward)


def causal_convolution(
    x_BSC: Float[Array, "B S C"],
    weight_DCK: Float[Array, "D C K"],
    dilation: int,
    tokens: int,
    within_BT: Int[Array, "B T"] | None = None,
    *,
    platform: str,
) -> Float[Array, "B T D"]:
    """The outputs of the last `tokens` columns; columns that lack before the first one are zeros.

    `within_BT`: the place of each token in its document, where several are packed into a row; a tap that lies before
    the document meets zeros.
    """
    taps = weight_DCK.shape[-1]
    reach = (taps - 1) * dilation
    x_BSC = jnp.pad(x_BSC, ((0, 0), (max(0, tokens + reach - x_BSC.shape[1]), 0), (0, 0)))[:, -(tokens + reach) :]
    if platform == "cpu":
        unfolded = functools.partial(unfolded_product, dilation, tokens)
        return jax.checkpoint(unfolded)(x_BSC, weight_DCK, within_BT)  # keeps x, not its columns unfolded
    if within_BT is None:
        dimensions = ("NWC", "OIW", "NWC")
        return lax.conv_general_dilated(
            x_BSC, weight_DCK, (1,), [(0, 0)], rhs_dilation=(dilation,), dimension_numbers=dimensions
        )
    met = columns_met(x_BSC, taps, dilation, tokens, within_BT)
    return sum(
        (product(x_BTC, weight_DCK[..., tap], platform) for tap, x_BTC in enumerate(met)),
        start=jnp.zeros((), x_BSC.dtype),
    )


def unfolded_product(dilation: int, tokens: int, x_BSC: Array, weight_DCK: Array, within_BT: Any) -> Array:
    met = columns_met(x_BSC, weight_DCK.shape[-1], dilation, tokens, within_BT)
    weight = weight_DCK.transpose(0, 2, 1).reshape(weight_DCK.shape[0], -1)
    return product(jnp.concatenate(met, axis=-1), weight, "cpu")


def columns_met(x_BSC: Array, taps: int, dilation: int, tokens: int, within_BT: Any) -> list[Array]:
    """For each tap the columns [B, T, C] that it meets; zeros where they are another document's."""
    found = []
    for tap in range(taps):
        x_BTC = lax.slice_in_dim(x_BSC, tap * dilation, tap * dilation + tokens, axis=1)
        if within_BT is not None:
            near_BT1 = (within_BT >= (taps - 1 - tap) * dilation)[..., None]
            x_BTC = jnp.where(near_BT1, x_BTC, jnp.zeros((), x_BTC.dtype))
        found.append(x_BTC)
    return found
