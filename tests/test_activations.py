"""Every formula and mixture against NumPy and SciPy in float64, which know nothing of this package."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf, expit
from transformers.activations import ACT2FN

from neuroweave.activations import FORMULAS
from neuroweave.activations.mixtures import NeuronMixture, SegmentMixture, build_activation
from neuroweave.activations.torch import Activation

REFERENCE = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": np.tanh,
    "sigmoid": expit,
    "silu_tanh": lambda x: x * expit(x) + 0.1 * np.tanh(x),
    "phantom": lambda x: 0.9 * np.tanh(x) + 0.1 * np.sin(x),
    "swish_beta": lambda x: x * expit(x),
}
X = np.concatenate([np.linspace(-20, 20, 4001), [0.0, -0.0, 1e-8, -1e-8, 60.0, -60.0]])


def test_every_formula_has_a_reference():
    assert set(REFERENCE) == set(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_formula_equals_float64_numpy(name, dtype, tolerance):
    got = Activation(name)(torch.tensor(X, dtype=dtype)).double().numpy()
    np.testing.assert_allclose(got, REFERENCE[name](X), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_by_central_differences(name):
    x = torch.tensor([-3.1, -1.0, -0.2, 0.3, 0.9, 4.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Activation(name), (x,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu", "relu"), ("relu2", "relu2")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_to_transformers(ours, theirs, dtype):
    x = torch.tensor(X, dtype=dtype)
    assert torch.equal(Activation(ours)(x), ACT2FN[theirs](x))


def test_swish_beta_with_a_number():
    got = Activation("swish_beta", beta=1.702)(torch.tensor(X)).numpy()
    np.testing.assert_allclose(got, X * expit(1.702 * X), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("neurons", [1, 2, 3, 7, 8, 123, 1536])
@pytest.mark.parametrize("names", [("relu", "silu"), ("relu", "gelu", "silu"), ("tanh", "relu", "gelu", "silu")])
def test_segments_cover_every_neuron_once(neurons, names):
    x = np.random.default_rng(neurons).normal(size=(2, 5, neurons))
    width = math.ceil(neurons / len(names))
    expected = np.concatenate(
        [REFERENCE[name](x[..., k * width : (k + 1) * width]) for k, name in enumerate(names)], axis=-1
    )
    got = SegmentMixture([Activation(name) for name in names])(torch.tensor(x)).numpy()
    assert got.shape == x.shape
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


def test_segments_of_an_image_run_over_channels():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 4))
    expected = np.concatenate([REFERENCE["relu"](x[:, :3]), REFERENCE["silu"](x[:, 3:])], axis=1)
    got = SegmentMixture([Activation("relu"), Activation("silu")])(torch.tensor(x)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


def test_segments_of_given_sizes():
    x = np.random.default_rng(0).normal(size=(2, 5, 7))
    parts = zip(("relu", "tanh", "silu"), np.split(x, [1, 5], -1), strict=True)
    expected = np.concatenate([REFERENCE[name](part) for name, part in parts], -1)
    module = build_activation({"segments": {"members": ["relu", "tanh", "silu"], "sizes": [1, 4, 2]}})
    np.testing.assert_allclose(module(torch.tensor(x)).numpy(), expected, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match=r"segments of \[1, 4, 2\] neurons are 7 in all, but there are 8"):
        module(torch.zeros(8))


@pytest.mark.parametrize("neurons", [1, 4, 7, 1536])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_even_segments_have_the_sizes_of_chunk(neurons, members):
    sizes = SegmentMixture([Activation("relu")] * members).segment_sizes(neurons)
    chunks = [len(part) for part in torch.arange(neurons).chunk(members)]
    assert sizes == chunks + [0] * (members - len(chunks))


def mixture(names=("silu", "relu", "gelu", "swish_beta"), neurons=7, **settings):
    settings = {"neutral": 0} | settings
    return NeuronMixture([Activation(name) for name in names], neurons=neurons, **settings)


def test_neuron_mixture_equals_numpy():
    module, rng = mixture().double(), np.random.default_rng(1)
    logits, beta, x = rng.normal(size=(7, 4)), rng.normal(size=7), rng.normal(size=(3, 2, 7))
    with torch.no_grad():
        module.gating_logits.copy_(torch.tensor(logits))
        module.beta.copy_(torch.tensor(beta))
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    members = [REFERENCE["silu"](x), REFERENCE["relu"](x), REFERENCE["gelu"](x), x * expit(beta * x)]
    expected = sum(weights[:, k] * member for k, member in enumerate(members))
    got = module(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_neuron_mixture_starts_neutral():
    module, x = mixture(), torch.randn(64, 7, generator=torch.Generator().manual_seed(0))
    weight = 1 / (1 + 3 * math.exp(-8.0))
    assert torch.allclose(module.weights()[:, 0], torch.full((7,), weight), atol=1e-6)
    assert (module(x) - torch.nn.functional.silu(x)).abs().max() < 3 * (1 - weight)
    assert torch.equal(mixture(hard=True)(x), torch.nn.functional.silu(x))


@pytest.mark.parametrize("hard", [False, True])
def test_neuron_mixture_trains_logits_and_beta(hard):
    module = mixture(hard=hard)
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(0))
    module(x).square().mean().backward()
    assert module.gating_logits.grad.abs().min(dim=0).values.max() > 0
    assert torch.isfinite(module.gating_logits.grad).all()
    assert (module.beta.grad.abs().max() > 0) == (not hard)  # a neuron that does not run Swish has no use for beta


def test_neuron_mixture_gradients_by_central_differences():
    module = mixture(start_logit=1.0).double()
    x = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(logits, beta):
        return torch.func.functional_call(module, {"gating_logits": logits, "beta": beta}, (x,)).square().sum()

    inputs = (module.gating_logits.detach().requires_grad_(), module.beta.detach().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-8)


def test_hard_mixture_runs_the_largest_logit_alone():
    module, x = mixture(hard=True), torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.gating_logits.copy_(torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1, 2])] * 3)
    names = ["silu", "relu", "gelu", "silu", "silu", "relu", "gelu"]
    expected = torch.stack([Activation(name)(x[:, i]) for i, name in enumerate(names)], dim=-1)
    assert torch.allclose(module(x), expected, atol=1e-7)


def test_build_activation_passes_every_setting_on():
    settings = {"members": ["silu", {"swish_beta": {"beta": 1.7}}], "neutral": 0, "start_logit": 3.0, "hard": True}
    module = build_activation({"mixture": settings}, neurons=5)
    assert (module.start_logit, module.hard, module.neutral) == (3.0, True, 0)
    assert torch.equal(module.beta, torch.full((5,), 1.7))
    assert torch.equal(module.gating_logits[:, 0], torch.full((5,), 3.0))
    assert build_activation({"swish_beta": {"beta": 1.7}}).beta == 1.7


def test_mixture_weights_are_float32_in_half_precision():
    module = mixture().to(torch.bfloat16)
    assert module.weights().dtype == torch.float32
    assert module(torch.randn(3, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_build_activation_keeps_the_original_module():
    original = torch.nn.SiLU()
    assert build_activation("original", original=original) is original
    module = build_activation({"segments": ["original", "relu"]}, original=original)
    assert module.members[0] is original


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Activation("sliu"), "activation 'sliu' is not known; known: identity, relu"),
        (lambda: Activation("relu", beta=2.0), "'relu' takes no beta"),
        (lambda: SegmentMixture([Activation("relu")]), "at least two activations, got 1"),
        (
            lambda: SegmentMixture([Activation("relu")] * 2, sizes=[3]),
            r"sizes \[3\]: give one of at least 1 for each of 2",
        ),
        (lambda: mixture(neutral=4), "neutral member has index 4, but there are 4 members"),
        (lambda: build_activation("original"), "has an activation of its own"),
        (lambda: build_activation({"mixture": {"members": ["relu", "silu"], "neutral": 0}}), "number of neurons"),
        (lambda: build_activation({"segment": ["relu", "silu"]}), "known: swish_beta, segments, mixture"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
