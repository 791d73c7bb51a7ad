"""Every formula and mixture in JAX against SciPy in float64, and against the torch modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_activations import REFERENCE, X

from neuroweave.activations import FORMULAS
from neuroweave.activations.jax import build_function
from neuroweave.activations.mixtures import NeuronMixture, build_activation
from neuroweave.neuroblast.tensor_table import mixture_shapes

MIXTURES: list[Any] = [
    {"segments": ["relu", "silu"]},
    {"segments": ["relu", "gelu", "silu"]},
    {"segments": {"members": ["phantom", "original"], "sizes": [3, 120]}},
    {"segments": ["relu", {"swish_beta": {"beta": 1.7}}]},
    {"swish_beta": {"beta": 0.3}},
    {"mixture": {"members": ["silu", "relu", "swish_beta"], "neutral": 0}},
    {"mixture": {"members": ["tanh", "original"], "neutral": 1, "hard": True}},
    "original",
]


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_equals_float64(name):
    got = build_function(name, original="identity")(jnp.asarray(X, jnp.float32), {})
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got, np.float64), REFERENCE[name](X), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("spec", MIXTURES)
def test_mixture_equals_torch_with_its_gradients(spec):
    """Values within 1e-6, and the gradients of input, gates and betas."""
    neurons, draw = 123, np.random.default_rng(0)
    module = build_activation(spec, original=build_activation("silu"), neurons=neurons)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(draw.normal(size=parameter.shape)))
    weights = {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in module.named_parameters()}
    assert {name: array.shape for name, array in weights.items()} == mixture_shapes(spec, neurons)
    x, factor = (draw.normal(size=(2, 5, neurons)).astype(np.float32) * 2 for _ in range(2))
    function = build_function(spec, original="silu")

    def total(x, weights):
        return (function(x, weights) * factor).sum()

    theirs = torch.from_numpy(x).requires_grad_()
    out = module(theirs)
    (out * torch.from_numpy(factor)).sum().backward()
    np.testing.assert_allclose(function(jnp.asarray(x), weights), out.detach().numpy(), rtol=1e-6, atol=1e-6)
    to_x, to_weights = jax.grad(total, argnums=(0, 1))(jnp.asarray(x), weights)
    np.testing.assert_allclose(to_x, theirs.grad.numpy(), rtol=1e-5, atol=1e-5)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(to_weights[name], parameter.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_a_mixture_begins_as_the_original():
    mixture = NeuronMixture([build_activation("silu"), build_activation("relu")], neurons=7, neutral=0, hard=True)
    weights = {"gating_logits": jnp.asarray(mixture.gating_logits.detach().numpy())}
    spec = {"mixture": {"members": ["silu", "relu"], "neutral": 0, "hard": True}}
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_array_equal(build_function(spec, original="silu")(x, weights), jax.nn.silu(x))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rleu", "activation 'rleu' is not known; known: identity, relu"),
        ({"blend": ["relu"]}, "activation kind 'blend' is not known; known: swish_beta, segments, mixture"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message):
        build_function(spec, original="silu")


def test_segments_of_another_width_are_refused():
    function = build_function({"segments": {"members": ["relu", "silu"], "sizes": [2, 3]}}, original="silu")
    with pytest.raises(ValueError, match=r"segments of \[2, 3\] neurons are 5 in all, but there are 7"):
        function(jnp.zeros(7), {})
