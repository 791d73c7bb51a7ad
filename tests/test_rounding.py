"""Weights rounded on text: less error than rounding each number, on a grid that packs without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_runtime import tiny

from neuroweave.runtime.engine import Engine
from neuroweave.runtime.lowering import lower
from neuroweave.runtime.weights import pack
from neuroweave.surgery.rounding.four_bits import round_to_four_bits
from neuroweave.surgery.rounding.on_disk import matrices_of, round_layers


def inputs(tokens: int, columns: int, seed: int) -> torch.Tensor:
    """Correlated, one column large."""
    torch.manual_seed(0)
    mixing = torch.eye(columns) + 1.2 * torch.randn(columns, columns) / columns**0.5
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) @ mixing
    x[:, 3] *= 3
    return x


@pytest.mark.parametrize("columns", [64, 100, 288])
def test_rounding_on_inputs_beats_rounding_numbers(columns):
    weight = torch.randn(31, columns, generator=torch.Generator().manual_seed(1))
    seen, unseen = inputs(4000, columns, 1), inputs(1000, columns, 2)
    plain = pack(weight, "int4").whole()
    made = round_to_four_bits(weight, seen.T @ seen)
    errors = [float((unseen @ (each - weight).T).norm() / (unseen @ weight.T).norm()) for each in (plain, made)]
    assert errors[1] < 0.8 * errors[0], errors
    torch.testing.assert_close(pack(made, "int4").whole(), made, rtol=0, atol=1e-7 * float(made.abs().max()))


def test_uncorrelated_inputs_leave_nothing_to_gain():
    """GPTQ on a unit Gram matrix is plain rounding."""
    weight = torch.randn(9, 64)
    torch.testing.assert_close(round_to_four_bits(weight, torch.eye(64)), pack(weight, "int4").whole())


def test_inputs_that_never_come_do_no_harm():
    gram = inputs(500, 64, 1)
    gram[:, 7] = 0
    made = round_to_four_bits(torch.randn(5, 64), gram.T @ gram)
    assert torch.isfinite(made).all()
    with pytest.raises(ValueError, match="not finite"):
        round_to_four_bits(torch.full((2, 64), torch.nan), torch.eye(64))


def test_layers_are_rounded_in_order(tmp_path: Path):
    """Every matrix of the layers, keys and values to int8; the packed model equals the rounded one."""
    model = tiny("llama", attention_bias=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    windows = torch.randint(3, 97, (8, 32), generator=torch.Generator().manual_seed(3))
    done = round_layers(model, windows, folder=tmp_path)
    assert done.matrices == {"int8": 9, "int4": 5}
    assert all(0.001 < error < 0.2 for error in done.errors), done.errors
    for name, tensor in model.state_dict().items():
        changed = not torch.equal(tensor, before[name])
        assert changed == (name.endswith("proj.weight")), name
    assert set(matrices_of(model.model.layers[0])) == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    }
    tokens = windows[0, :9].tolist()
    program = lower(model, format="int4", head_format="float32")
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1]
    found = Engine(program, positions=16).read_prompt(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert list(tmp_path.iterdir()) == []
