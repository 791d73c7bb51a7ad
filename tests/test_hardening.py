"""Hardened mixtures compute what the hard mixtures computed, as a plain recipe."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from tiny_llama import tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import neuroweave
from neuroweave.activations.mixtures import NeuronMixture, SegmentMixture
from neuroweave.cli.main import main
from neuroweave.surgery.hardening import LEAST_BETA, harden
from neuroweave.surgery.modeling import PatchedModel

LEARNED = {"mixture": ["original", "relu", "tanh", "swish_beta"]}
IDS = torch.arange(3, 19)[None]
SHAPE = {
    "vocab_size": 123,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def build(family: str):
    torch.manual_seed(1)
    if family == "llama":
        return tiny_model()
    if family == "phi3":
        return Phi3ForCausalLM(Phi3Config(**SHAPE, num_key_value_heads=4, pad_token_id=0)).eval()
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=8)).eval()
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, hidden_act="silu")).eval()


def learned(family: str = "llama", activation=LEARNED, **more):
    """A model whose neurons have made up their minds, and betas of both signs."""
    model = build(family)
    neuroweave.patch(model, {"sites": [{"site": "mlp", "activation": activation}, *more.get("sites", [])]})
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, NeuronMixture):
            module.gating_logits.data = 3 * torch.randn(module.gating_logits.shape, generator=generator)
            if module.beta is not None:
                module.beta.data = 2 * torch.randn(module.beta.shape, generator=generator)
                module.beta.data = torch.where(module.beta.abs() < LEAST_BETA, 1.0, module.beta)
    return model


def logits(model, hard: bool = False):
    mixtures = [module for module in model.modules() if isinstance(module, NeuronMixture)]
    before = [module.hard for module in mixtures]
    for module in mixtures:
        module.hard = module.hard or hard
    with torch.no_grad():
        found = model(IDS).logits
    for module, was in zip(mixtures, before, strict=True):
        module.hard = was
    return found


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "gpt_neox"])
def test_hardened_equals_the_hard_mixture(family):
    model = learned(family)
    soft, expected = logits(model), logits(model, hard=True)
    done = harden(model)
    found = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (soft - expected).abs().max() > 1e-2
    assert not any(isinstance(module, NeuronMixture) for module in model.modules())
    for layer in done.layers:
        assert not layer.kept
        assert sum(layer.chosen.values()) == (48 if family == "llama" else 40)
        assert 0 < layer.lost < 1


def test_one_kind_alone_is_no_segment_and_its_original_no_patch():
    model = learned()
    mixtures = [module for module in model.modules() if isinstance(module, NeuronMixture)]
    for k, module in zip((0, 1, 3), mixtures, strict=True):
        module.gating_logits.data[:, k] = 100.0
    expected = logits(model, hard=True)
    done = harden(model)
    assert [layer.chosen for layer in done.layers] == [{"silu": 48}, {"relu": 48}, {"silu": 48}]
    assert done.recipe.to_dict()["sites"] == [{"site": ["mlp"], "activation": "relu", "layers": [1]}]
    assert not any(isinstance(module, SegmentMixture) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_all_original_is_the_original_model():
    plain, model = build("llama"), build("llama")
    neuroweave.patch(model, "learned-mixture")
    done = harden(model)
    assert done.recipe is None
    assert not isinstance(model, PatchedModel)
    assert torch.equal(logits(model), logits(plain))


def test_mixtures_outside_an_mlp_stay_hard():
    model = learned(sites=[{"site": "attention.o", "activation": {"mixture": ["original", "tanh"]}}])
    expected = logits(model, hard=True)
    done = harden(model)
    kept = [layer for layer in done.layers if layer.kept]
    assert [layer.path.split(".")[-3] for layer in kept] == ["o_proj"] * 3
    assert all("fixed place" in layer.kept for layer in kept)
    assert all(module.hard for module in model.modules() if isinstance(module, NeuronMixture))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_neurons_that_cannot_move_stay_where_they_are():
    """A norm over the neurons, with a weight for each, between the projections (as BitNet has)."""
    model = learned()
    for layer in model.model.layers:
        weight = torch.linspace(0.1, 3, 48)
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, weight=weight: (given[0] * weight,))
    expected = logits(model, hard=True)
    done = harden(model)
    assert all("not free to move" in layer.kept for layer in done.layers)
    assert torch.equal(logits(model), expected)


def test_a_beta_of_zero_is_taken_for_the_least():
    model = learned(activation={"mixture": ["original", "swish_beta"]})
    for module in model.modules():
        if isinstance(module, NeuronMixture):
            module.beta.data.zero_()
    expected = logits(model, hard=True)
    harden(model)
    torch.testing.assert_close(logits(model), expected, rtol=0.02, atol=0.02)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("recipe", [None, "phantom-mlp"])
def test_nothing_to_harden(recipe):
    model = build("llama")
    if recipe:
        neuroweave.patch(model, recipe)
    with pytest.raises(ValueError, match="no learned mixture"):
        harden(model)


def test_the_command_writes_a_plain_checkpoint(tmp_path, capsys):
    model = learned()
    expected = logits(model)
    for module in model.modules():
        if isinstance(module, NeuronMixture):
            module.hard = True
    expected = logits(model)
    model.save_pretrained(tmp_path / "mixed")
    tiny_tokenizer().save_pretrained(tmp_path / "mixed")
    with pytest.raises(SystemExit) as stop:
        main(["harden", str(tmp_path / "mixed"), str(tmp_path / "out")])
    assert stop.value.code == 0
    assert "silu" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert not [name for name in loaded.state_dict() if "gating" in name or name.endswith("beta")]
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["neuroweave"]["recipe"] == recipe
    assert len(config["neuroweave"]["hardening"]["layers"]) == 3
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    fresh = build("llama")
    neuroweave.patch(fresh, tmp_path / "out" / "recipe.yaml")
    fresh.load_state_dict(loaded.state_dict())
    assert torch.equal(logits(fresh), logits(loaded))
