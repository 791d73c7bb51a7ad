"""The formulas and mixtures as functions on JAX arrays, from the same descriptions that the torch modules are built of.

Letters: n neurons, K members of a mixture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neuroweave.activations.formulas import FORMULAS, Primitives, swish_beta, swish_member

Weights = Mapping[str, Array]
Function = Callable[[Array, Weights], Array]  # x [..., n], the activation's own weights by name -> [..., n]


class JaxPrimitives:
    """What `formulas` is written in, for JAX."""

    relu = staticmethod(jax.nn.relu)
    silu = staticmethod(jax.nn.silu)
    gelu = staticmethod(functools.partial(jax.nn.gelu, approximate=False))
    gelu_tanh = staticmethod(functools.partial(jax.nn.gelu, approximate=True))
    tanh = staticmethod(jnp.tanh)
    sigmoid = staticmethod(jax.nn.sigmoid)
    sin = staticmethod(jnp.sin)


PRIMITIVES = cast(Primitives, JaxPrimitives)


def build_function(spec: str | dict[str, Any], *, original: str) -> Function:
    """The function that a recipe's `activation` describes; `original`: the formula that this name stands for.

    Forms are those of `mixtures.build_activation`. Raises ValueError for what it does not know.
    """
    if isinstance(spec, str):
        name = original if spec == "original" else spec
        if name not in FORMULAS:
            raise ValueError(f"activation {name!r} is not known; known: {', '.join(FORMULAS)}")
        return lambda x, weights: FORMULAS[name](x, PRIMITIVES)
    [(kind, settings)] = spec.items()
    if kind == "swish_beta":
        beta = float(settings["beta"])
        return lambda x, weights: swish_beta(x, PRIMITIVES, beta=beta)
    if kind not in ("segments", "mixture"):
        raise ValueError(f"activation kind {kind!r} is not known; known: swish_beta, segments, mixture")
    named = settings["members"] if isinstance(settings, dict) else settings
    members = [build_function(member, original=original) for member in named]
    if kind == "segments":
        sizes = settings["sizes"] if isinstance(settings, dict) else None
        return functools.partial(run_segments, members, sizes)
    return functools.partial(run_mixture, members, swish_member(named), bool(settings.get("hard", False)))


def run_segments(
    members: list[Function], sizes: list[int] | None, x: Float[Array, "... n"], weights: Weights
) -> Float[Array, "... n"]:
    """Member k on the k-th segment of the neurons; even ones as `torch.chunk` cuts where no sizes are given."""
    neurons = x.shape[-1]
    if sizes is None:
        most = -(-neurons // len(members))
        sizes = [min(most, max(0, neurons - most * k)) for k in range(len(members))]
    if sum(sizes) != neurons:
        raise ValueError(f"segments of {sizes} neurons are {sum(sizes)} in all, but there are {neurons}")
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes) - 1)]
    parts = jnp.split(x, ends, axis=-1)
    return jnp.concatenate([member(part, weights) for member, part in zip(members, parts, strict=True)], axis=-1)


def run_mixture(
    members: list[Function], swish: int | None, hard: bool, x: Float[Array, "... n"], weights: Weights
) -> Float[Array, "... n"]:
    """sum_k softmax(gating_logits)[i, k] * act_k(x_i); `hard`: that of the largest alone, straight through."""
    soft_nK = jax.nn.softmax(weights["gating_logits"].astype(jnp.float32), axis=-1)
    gates_nK = soft_nK
    if hard:
        chosen_nK = jax.nn.one_hot(soft_nK.argmax(-1), len(members), dtype=soft_nK.dtype)
        gates_nK = chosen_nK + (soft_nK - jax.lax.stop_gradient(soft_nK))
    total = jnp.zeros((), x.dtype)
    for k, member in enumerate(members):
        acted = swish_beta(x, PRIMITIVES, beta=weights["beta"].astype(x.dtype)) if k == swish else member(x, weights)
        total = total + gates_nK[:, k].astype(x.dtype) * acted
    return total
