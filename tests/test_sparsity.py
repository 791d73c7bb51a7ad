"""Skipped neurons are those that add least; a sparse step equals the dense one without them."""

from __future__ import annotations

import pytest
import torch
from test_runtime import TOKENS, assert_same_logits, every_logit, native, tiny  # noqa: F401

import neuroweave
from neuroweave.runtime.engine import Engine
from neuroweave.runtime.lowering import lower
from neuroweave.runtime.sparsity import find_thresholds, layer_thresholds

WINDOWS = [TOKENS.tolist(), TOKENS.flip(0).tolist()]


class Cut(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, least: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.least = inner, least

    def forward(self, x):
        y = self.inner(x)
        return torch.where(y.abs() > self.least, y, 0)


def pruned(model, thresholds):
    """The model with neurons below their thresholds at 0."""
    for number, least in thresholds.items():
        mlp = model.model.layers[number].mlp
        mlp.act_fn = Cut(mlp.act_fn, least)
    return model


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_sparse_step_equals_the_pruned_model(share, native):  # noqa: F811
    model = tiny("llama", attention_bias=False, mlp_bias=False)
    found = find_thresholds(model, WINDOWS, share)
    assert abs(found.mean_share - share) < 0.01
    engine = Engine(lower(model, thresholds=found.thresholds), positions=32, threads=2)
    logits = every_logit(engine, 9)
    with torch.no_grad():
        whole = model(TOKENS[None]).logits[0, 8:]
        expected = pruned(model, found.thresholds)(TOKENS[None]).logits[0, 8:]
    assert float((whole - expected).abs().max()) > 1e-3 * float(whole.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_exact_zeros_cost_nothing(native):  # noqa: F811
    model = tiny("llama", attention_bias=False, mlp_bias=False)
    neuroweave.patch(model, {"sites": [{"site": "mlp", "activation": {"segments": ["relu", "silu"]}}]})
    found = find_thresholds(model, WINDOWS, 0.0)
    assert 0.1 < found.mean_share < 0.4
    assert list(found.worth_it()) == [0, 1]
    assert_same_logits(model, native, thresholds=found.thresholds)


def test_int8_rows_of_down(native):  # noqa: F811
    model = tiny("llama", attention_bias=False, mlp_bias=False)
    found = find_thresholds(model, WINDOWS, 0.5)
    sparse = Engine(lower(model, format="int8", thresholds=found.thresholds), positions=32, threads=2)
    logits = every_logit(sparse, 9)
    with torch.no_grad():
        expected = pruned(model, found.thresholds)(TOKENS[None]).logits[0, 8:]
    assert float((logits - expected).norm() / expected.norm()) < 0.05


def test_one_cut_through_what_neurons_add():
    acted = torch.rand(50, 7)
    expected = torch.tensor([1.0, 2, 3, 4, 5, 6, 0])
    least = layer_thresholds(acted, expected, 0.5)
    adds = acted * expected
    skipped = acted <= least
    assert abs(float(skipped.float().mean()) - 0.5) < 0.01
    assert adds[skipped].max() <= adds[~skipped].min() + 1e-6
    assert skipped[:, 6].all()


def test_shares_that_are_none():
    with pytest.raises(ValueError, match="a share of 1"):
        find_thresholds(tiny("llama"), WINDOWS, 1.0)
