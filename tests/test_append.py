"""Appending synthetic neurons: at gain 0 the function is kept, and what is added is what transformers computes."""

from __future__ import annotations

import json

import pytest
import torch
from fusion_models import deltas_for, llama_config, mlp_names, weights, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from neuroweave.cli.main import main
from neuroweave.surgery.fusion.fuse import fuse_checkpoint, stored_deltas
from neuroweave.surgery.fusion.plan import FuseOptions

ADDED = 13


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    make = torch.Generator().manual_seed(5)
    deltas = {}
    for layer in range(3):
        names = mlp_names(layer)
        deltas |= {names[role]: torch.randn(ADDED, 24, generator=make) for role in ("gate", "up")}
        deltas[names["down"]] = torch.randn(24, ADDED, generator=make)
    write_checkpoint(tmp_path / "deltas", deltas)
    return model, deltas


def append(tmp_path, gain: float):
    source = stored_deltas(tmp_path / "deltas")
    out = tmp_path / f"gain{gain}"
    fuse_checkpoint(tmp_path / "model", out, source, FuseOptions(mode="append", gain=gain))
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def test_gain_zero_keeps_the_function(tiny, tmp_path):
    model, deltas = tiny
    grown = append(tmp_path, 0.0)
    assert grown.config.intermediate_size == 37 + ADDED
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(grown(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)
    mlp = grown.model.layers[1].mlp
    assert torch.equal(mlp.gate_proj.weight[37:], deltas[mlp_names(1)["gate"]])
    assert torch.equal(mlp.up_proj.weight[37:], deltas[mlp_names(1)["up"]])
    assert not mlp.down_proj.weight[:, 37:].any()


def test_a_gain_adds_the_new_neurons_output(tiny, tmp_path):
    model, deltas = tiny
    grown = append(tmp_path, 0.25)
    x = torch.randn(5, 24)
    for layer in range(3):
        names = mlp_names(layer)
        h = torch.nn.functional.silu(x @ deltas[names["gate"]].T) * (x @ deltas[names["up"]].T)
        with torch.no_grad():
            wanted = model.model.layers[layer].mlp(x) + 0.25 * h @ deltas[names["down"]].T
            torch.testing.assert_close(grown.model.layers[layer].mlp(x), wanted, rtol=1e-5, atol=1e-5)


def test_shards_index_and_nested_configuration(tmp_path):
    tensors = weights(prefix="model.language_model.layers")
    config = {"model_type": "gemma3", "text_config": llama_config(), "vision_config": {"intermediate_size": 307}}
    model = write_checkpoint(tmp_path / "model", tensors, shards=3, config=config)
    few = {
        name: (value[:, :ADDED] if "down" in name else value[:ADDED]).contiguous()
        for name, value in deltas_for(tensors).items()
    }
    source = stored_deltas(write_checkpoint(tmp_path / "deltas", few))
    out = tmp_path / "out"
    fuse_checkpoint(model, out, source, FuseOptions(mode="append", gain=2.0))
    written = json.loads((out / "config.json").read_text())
    assert written == config | {"text_config": llama_config(wide=307 + ADDED)}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    new = {name: value for part in found.values() for name, value in part.items()}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in new.values())
    assert all(name in found[file] for name, file in index["weight_map"].items())
    for name, old in tensors.items():
        if name not in few:
            assert torch.equal(new[name], old)
        elif "down" in name:
            assert torch.equal(new[name], torch.cat([old, (few[name].float() * 2).bfloat16()], dim=1))
        else:
            assert torch.equal(new[name], torch.cat([old, few[name]]))


def refused(model, deltas, match):
    with pytest.raises(ValueError, match=match):
        fuse_checkpoint(model, model.parent / "no", stored_deltas(deltas), FuseOptions(mode="append"))
    assert not (model.parent / "no").exists()


def test_what_cannot_grow(tmp_path):
    tensors = weights()
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    deltas = deltas_for(tensors)
    one_layer = {name: value for name, value in deltas.items() if ".1." in name}
    refused(model, write_checkpoint(tmp_path / "one", one_layer), "only to all layers")
    no_up = {name: value for name, value in deltas.items() if "up_proj" not in name}
    refused(model, write_checkpoint(tmp_path / "no_up", no_up), "no delta for")
    names = mlp_names(1)
    uneven = deltas | {names["down"]: deltas[names["down"]][:, :9].contiguous()}
    refused(model, write_checkpoint(tmp_path / "uneven", uneven), "the same number of neurons")
    narrow = {name: (v[:100] if "down" in name else v[:, :100]).contiguous() for name, v in deltas.items()}
    refused(model, write_checkpoint(tmp_path / "narrow", narrow), "neurons of hidden size 123 are needed")
    biased = write_checkpoint(
        tmp_path / "biased", tensors | {names["up"].replace("weight", "bias"): torch.ones(307)}, config=llama_config()
    )
    refused(biased, write_checkpoint(tmp_path / "all", deltas), "an MLP with biases cannot grow")
    infinite = deltas | {names["up"]: torch.full_like(deltas[names["up"]], torch.inf)}
    refused(model, write_checkpoint(tmp_path / "inf", infinite), "NaN or infinite")


def test_what_the_command_says(tiny, tmp_path, capsys):
    words = ["fuse", "--model", tmp_path / "model", "--weights", tmp_path / "deltas", "--mode", "append"]
    for more in (["--output", tmp_path / "out"], ["--dry-run"]):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in [*words, *more]])
        assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"{tmp_path / 'out'}: neurons appended to 3 layers: 37 to 50, gain 0"
    assert err == ""
