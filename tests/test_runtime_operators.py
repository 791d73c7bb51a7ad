"""Rounded linear layers in any model equal the numbers they stand for; torch.compile sees one operator."""

from __future__ import annotations

import pytest
import torch
from test_runtime import TOKENS, native, tiny  # noqa: F401
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from neuroweave.runtime.operators import RoundedLinear, round_linears
from neuroweave.runtime.weights import pack


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [(), (1,), (3, 2), (20,)])
def test_equals_the_numbers_it_stands_for(format, tokens, native):  # noqa: F811
    torch.manual_seed(0)
    linear = nn.Linear(123, 17)
    x = torch.randn(*tokens, 123)
    expected = nn.functional.linear(x, pack(linear.weight, format).whole(), linear.bias)
    found = RoundedLinear(linear, format)(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.detach().abs().max()))


def test_compilers_see_one_operator():
    made = RoundedLinear(nn.Linear(64, 8, bias=False), "int8")
    torch.library.opcheck(torch.ops.neuroweave.rounded_linear.default,
                          (torch.randn(2, 64), made.data, made.scales, None, "int8", 64))  # fmt: skip
    graph = make_fx(made, tracing_mode="real")(torch.randn(1, 64)).graph
    assert torch.ops.neuroweave.rounded_linear.default in [node.target for node in graph.nodes]


@torch.no_grad()
def test_a_whole_model():
    model, exact = tiny("qwen3"), tiny("qwen3")
    for name, module in exact.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.copy_(pack(module.weight, "int8").whole())
    assert round_linears(model, "int8") == 14
    expected = exact(TOKENS[None]).logits
    torch.testing.assert_close(model(TOKENS[None]).logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    with pytest.raises(ValueError, match="rounds nothing"):
        RoundedLinear(nn.Linear(2, 2), "float32")
