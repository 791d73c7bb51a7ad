"""`neuroweave neuroblast new|convert`, `inspect` and surgery on NeuroBLAST checkpoints."""

from __future__ import annotations

import ast
import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_neuroblast import CASES, DATA, published_folder, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import neuroweave
from neuroweave.checkpoint.layers import find_projections, find_stacks
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.cli import neuroblast as cli
from neuroweave.cli.main import main, program
from neuroweave.neuroblast.bundle import MODULES
from neuroweave.neuroblast.configuration import PRESETS
from neuroweave.neuroblast.conversion import LAYOUTS, convert
from neuroweave.neuroblast.weight_map import from_published, to_published
from neuroweave.surgery.bundle import MODULES as SURGERY_MODULES


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(program, [str(each) for each in arguments], obj={"debug": False})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neuroblast") / "tiny"
    run("neuroblast", "new", folder, "--preset", "tiny", "--vocab-size", "300")
    return folder


# ----------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("case", CASES)
def test_convert_and_back(case, tmp_path):
    """The same logits, the published names and shapes again, zeros where nothing was alive, other files unchanged."""
    published = published_folder(case, tmp_path / "published")
    (published / "tokenizer.json").write_text('{"a": 1}')
    (published / "modeling_neuroblast.py").write_text("raise SystemExit")
    out = run("neuroblast", "convert", published, tmp_path / "ours")
    assert "this layout" not in out
    stored = load_file(DATA / f"{case}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    mask = stored["attention_mask"]
    logits = model(input_ids=stored["input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], stored["logits"][mask.bool()], rtol=0, atol=1e-4)
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == '{"a": 1}'
    assert "SystemExit" not in (tmp_path / "ours" / "modeling_neuroblast.py").read_text()

    run("neuroblast", "convert", tmp_path / "ours", tmp_path / "back", "--to", "published")
    before, after = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "back"))
    assert {name: tensor.shape for name, tensor in after.items()} == {n: tensor.shape for n, tensor in before.items()}
    for name, tensor in after.items():
        if name.endswith("conv.weight"):
            middle = tensor.shape[2] // 2
            assert torch.equal(tensor[:, :, middle], before[name][:, :, middle])
            assert tensor.count_nonzero() == tensor[:, :, middle].count_nonzero()
        else:
            assert torch.equal(tensor, before[name])
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["NeuroBLASTForCausalLM"]
    assert config["rope_theta"] == 10000.0
    assert set(config["layer_types"]) == {"full_attention"}
    run("neuroblast", "convert", tmp_path / "back", tmp_path / "again")
    again, ours = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "ours"))
    assert again == ours


def test_convert_says_what_it_drops(tmp_path, capsys):
    published = published_folder("scale1_k5", tmp_path / "published")
    weights = load_file(published / "model.safetensors")
    dead = sum(
        int(tensor.count_nonzero() - tensor[:, :, 2].count_nonzero())
        for name, tensor in weights.items()
        if name.endswith("conv.weight")
    )
    assert convert(published, tmp_path / "ours").dead == dead > 0
    with pytest.raises(SystemExit):
        main(["neuroblast", "convert", str(published), str(tmp_path / "again")])
    assert f"{dead:,} published weights that were not zero, but never met data, are left out" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weight_map_round_trip(dtype):
    kernel = np.arange(3 * 4 * 5).reshape(3, 4, 5).astype(dtype)
    back = np.arange(12).reshape(4, 3).astype(dtype)
    for name, array in (("x.conv.weight", kernel), ("x.proj_back.weight", back), ("x.norm.weight", back)):
        published = to_published(name, array)
        assert published.dtype == dtype
        assert np.array_equal(from_published(name, published), array)
    assert to_published("x.conv.weight", kernel).shape == (3, 4, 5, 5)
    assert to_published("x.proj_back.weight", back).shape == (4, 3, 1, 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bridges=false", "bridges is False, which the published model would ignore"),
        ("max_dilation=4", "max_dilation is 4, which the published model would ignore"),
        ("rope_parameters={rope_type: linear, factor: 2.0, rope_theta: 10000.0}", "rotary scaling 'linear'"),
    ],
)
def test_what_the_published_model_would_ignore_is_not_published(setting, message, tmp_path):
    run("neuroblast", "new", tmp_path / "m", "--preset", "tiny", "--vocab-size", "40", "--set", setting)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "m", tmp_path / "out", to="published")
    assert not (tmp_path / "out").exists()


def test_convert_refuses_what_does_not_fit(tmp_path, tiny):
    published = published_folder("tied", tmp_path / "published")
    for source, to, message in (
        (tiny, "neuroweave", "is in the neuroweave layout already"),
        (published, "published", "is in the published layout already"),
        (tmp_path / "none", "neuroweave", "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "out", to=to)
    with pytest.raises(ValueError, match="layout 'jax' is not known; choose from neuroweave, published"):
        convert(tiny, tmp_path / "out", to="jax")
    weights = load_file(published / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    head = weights["model.embed_tokens.weight"]
    damages = (
        ({"lm_head.weight": head + 1}, {}, "differs from model.embed_tokens.weight"),
        ({"model.extra": head.clone()}, {}, "unexpected: model.extra"),
        ({"model.norm.weight": None}, {}, "missing: model.norm.weight"),
        ({}, {"kernel_size": 3}, r"conv.weight has shape \[32, 32, 5, 5\], the configuration makes it"),
        ({}, {"model_type": "llama"}, "model_type is 'llama', expected 'neuroblast'"),
        ({}, {"scale": 1.5}, "scale must be 2, 1 or between 0 and 1"),
    )
    for number, (tensors, fields, message) in enumerate(damages):
        folder = tmp_path / f"damaged{number}"
        folder.mkdir()
        kept = {name: tensor for name, tensor in (weights | tensors).items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    save_file(weights | {"lm_head.weight": head.clone()}, published / "model.safetensors")
    assert "lm_head.weight" not in Checkpoint(convert(published, tmp_path / "out").folder)


def test_convert_keeps_bfloat16_and_shards(tmp_path):
    model = random_model(num_sensory_layers=3, num_associative_layers=2, num_motor_layers=1).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    convert(tmp_path / "ours", tmp_path / "published", to="published")
    convert(tmp_path / "published", tmp_path / "again")
    with Checkpoint(tmp_path / "again") as again, Checkpoint(tmp_path / "ours") as ours:
        assert len(again.shards) == len(ours.shards) > 2
        assert {tensor.dtype for tensor in again.values()} == {"BF16"}
        assert all(again.read_bytes(name) == ours.read_bytes(name) for name in ours)


# --------------------------------------------------------------------------------------------------------------- new


def test_presets_are_the_commands():
    assert tuple(PRESETS) == cli.PRESETS
    assert cli.LAYOUTS == LAYOUTS


def test_new_takes_the_tokenizer(tmp_path, smollm2):
    report = json.loads(
        run("neuroblast", "new", tmp_path / "m", "--preset", "tiny", "--tokenizer", smollm2, "--json", "--seed", "5")
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.config.vocab_size == len(tokenizer) == report["vocabulary"]
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    run("neuroblast", "new", tmp_path / "same", "--preset", "tiny", "--tokenizer", smollm2, "--seed", "5")
    run("neuroblast", "new", tmp_path / "other", "--preset", "tiny", "--tokenizer", smollm2, "--seed", "6")
    bytes_of = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("m", "same", "other")]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_a_tokenizer_without_padding_token_gets_one(tmp_path, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    size = len(tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = run("neuroblast", "new", tmp_path / "m", "--preset", "tiny", "--tokenizer", tmp_path / "tokenizer")
    assert "3," in out
    made = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (made.pad_token, made.pad_token_id, len(made)) == ("<|pad|>", size, size + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "foo=1"], "'foo' is no field of NeuroBlastConfig"),
        (["--set", "layer_types=[conv]"], "layer_types follows from num_sensory_layers"),
        (["--set", "hidden_size=ab"], "Field 'hidden_size' expected int, got str"),
        (["--set", "hidden_size"], "--set takes KEY=VALUE, got 'hidden_size'"),
        (["--set", "scale=1.5"], "scale must be 2, 1 or between 0 and 1, got 1.5"),
        (["--tokenizer", "/nowhere", "--vocab-size", "3"], "--tokenizer decides the vocabulary's size"),
        (["--tokenizer", "/nowhere"], "no such folder"),
    ],
)
def test_new_refuses(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("neuroblast", "new", tmp_path / "m", "--preset", "tiny", *arguments)
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------------ inspect, surgery, bundle


def test_inspect_prints_the_plan(tiny):
    out = run("inspect", tiny)
    assert "sensory: full attention, rotary" in out
    assert "associative: full attention, no positions" in out
    assert "associative: convolution, dilation 4" in out
    layers = json.loads(run("inspect", tiny, "--json"))["layers"]
    assert [layer["layer"] for layer in layers] == list(range(10))
    assert [layer["name"] for layer in layers][3:6] == [
        "sensory_layers.3",
        "associative_layers.0",
        "associative_layers.1",
    ]


def test_stages_are_one_stack_counted_through(tiny):
    with Checkpoint(tiny) as checkpoint:
        (stack,) = find_stacks(checkpoint.values())
        found, others = find_projections(checkpoint.values())
    assert sorted(stack.layers) == list(range(10))
    assert [mlp.layer for mlp in found] == [0, 2, 4, 6, 8, 9]
    assert sorted(others) == [1, 3, 5, 7]
    assert found[2].gate.name == "model.associative_layers.0.mlp.gate_proj.weight"


def test_a_patch_reaches_the_layers_that_are_named(tiny, tmp_path):
    run("patch", tiny, tmp_path / "patched", "--mlp", "relu", "--layers", "2,4,9")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.endswith("mlp.act_fn")}
    changed = [name for name, kind in kinds.items() if "SiLU" not in kind]
    assert changed == [
        "model.sensory_layers.2.mlp.act_fn",
        "model.associative_layers.0.mlp.act_fn",
        "model.motor_layers.1.mlp.act_fn",
    ]
    activations = {
        layer["layer"]: layer["activation"]
        for layer in json.loads(run("inspect", tmp_path / "patched", "--json"))["layers"]
    }
    assert {number for number, activation in activations.items() if activation == "relu"} == {2, 4, 9}
    original = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        reference, other = original(ids).logits, model(ids).logits
        assert not torch.allclose(reference, other, atol=1e-6)
        handle = neuroweave.patch(original, {"sites": [{"site": "mlp", "activation": "relu", "layers": [2, 4, 9]}]})
        assert torch.equal(original(ids).logits, other)
        handle.undo()
        assert torch.equal(original(ids).logits, reference)


def test_names_in_the_joined_files_are_unique():
    """One file is joined from these modules: a name that two of them define would be the later one's."""
    seen: dict[str, str] = {}
    for folder, name in (*MODULES, *SURGERY_MODULES):
        tree = ast.parse(importlib.resources.files("neuroweave").joinpath(folder, name).read_text())
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            names += [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            names += [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []
            for each in names:
                assert each not in seen, f"{each}: in {seen[each]} and {folder}/{name}"
                seen[each] = f"{folder}/{name}"
