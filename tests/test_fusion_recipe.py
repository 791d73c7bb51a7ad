"""The same bytes from a bank and a seed: two steps, one step, and replayed from a recipe of a few kilobytes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from fusion_models import HIDDEN, llama_config, weights, write_checkpoint
from safetensors.torch import save_file

from neuroweave.checkpoint.manifest import read_manifest, sha256_of
from neuroweave.cli.main import main
from neuroweave.surgery.neurons.bank import Bank, Neuron, save_bank


@pytest.fixture
def bank(tmp_path):
    make = np.random.default_rng(7)
    gate, up, down = make.standard_normal((3, 5, HIDDEN)).astype("f4")
    neurons = [Neuron(f"n{number}", "source", {"layer": 0, "index": number}) for number in range(5)]
    save_bank(Bank(gate, up, down, neurons, {"activation": "silu"}), tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "model", weights(), shards=2, config=llama_config())


def run(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def outputs(folder):
    return {path.name: sha256_of(path) for path in folder.iterdir() if path.name != "neuroweave_manifest.json"}


OPTIONS = ["--alpha", "3", "--gamma-cap", "0.5", "--layers", "0", "2"]


def test_one_step_and_two_steps_give_the_same_bytes(capsys, bank, model, tmp_path):
    words = ["deltas", "--base-model", model, "--bank", bank, "--output-dir", tmp_path / "deltas", "--seed", 11]
    assert run(capsys, *words)[0] == 0
    fuse = ["fuse", "--model", model, "--output"]
    assert run(capsys, *fuse, tmp_path / "two", "--weights", tmp_path / "deltas", *OPTIONS)[0] == 0
    assert run(capsys, *fuse, tmp_path / "one", "--bank", bank, "--seed", 11, "--workers", 3, *OPTIONS)[0] == 0
    assert run(capsys, *fuse, tmp_path / "other", "--bank", bank, "--seed", 12, *OPTIONS)[0] == 0
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")
    assert outputs(tmp_path / "one") != outputs(tmp_path / "other")


@pytest.mark.parametrize("steps", ["one", "two"])
def test_a_recipe_replays_to_the_same_bytes(capsys, bank, model, tmp_path, steps):
    source = ["--bank", bank, "--seed", 5]
    if steps == "two":
        words = ["deltas", "--base-model", model, "--bank", bank, "--output-dir", tmp_path / "d", "--seed", 5]
        assert run(capsys, *words, "--gate-scale", "0.05")[0] == 0
        source = ["--weights", tmp_path / "d"]
    assert run(capsys, "fuse", "--model", model, "--output", tmp_path / "out", *source, *OPTIONS)[0] == 0
    code, text, _ = run(capsys, "recipe", "show", tmp_path / "out")
    assert code == 0
    assert len(text) < 6000
    assert json.loads(text)["deltas"]["generation"]["bank"]["sha256"] == sha256_of(bank)
    (tmp_path / "recipe.json").write_text(text)
    replay = ["recipe", "replay", tmp_path / "recipe.json", "--model", model, "--output", tmp_path / "again"]
    code, text, err = run(capsys, *replay, "--bank", bank, "--workers", 1)
    assert code == 0, err
    assert "each with the SHA-256 that the recipe records" in text
    assert outputs(tmp_path / "again") == outputs(tmp_path / "out")


def test_a_replay_with_other_inputs_writes_nothing(capsys, bank, model, tmp_path):
    words = ["fuse", "--model", model, "--bank", bank, "--output"]
    assert run(capsys, *words, tmp_path / "out", *OPTIONS)[0] == 0
    _, text, _ = run(capsys, "recipe", "show", tmp_path / "out")
    recipe = json.loads(text)

    def refused(message, changed=None, **paths):
        (tmp_path / "recipe.json").write_text(json.dumps(changed or recipe))
        given = {"model": model, "bank": bank} | paths
        options = [word for name, path in given.items() if path for word in (f"--{name}", path)]
        code, _, err = run(capsys, "recipe", "replay", tmp_path / "recipe.json", "--output", tmp_path / "no", *options)
        assert code == 2
        assert message in err
        assert not (tmp_path / "no").exists()

    other = write_checkpoint(tmp_path / "other", weights(seed=9), shards=2, config=llama_config())
    shards = "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"
    refused(f"{other}: this is not the model of the recipe: {shards} have another SHA-256; nothing was", model=other)
    whole = write_checkpoint(tmp_path / "whole", weights(), config=llama_config())
    refused(
        f"{shards}, model.safetensors.index.json are missing; model.safetensors is not in the recipe",
        model=whole,
    )
    another = shutil.copytree(model, tmp_path / "another")
    with (another / "model-00002-of-00002.safetensors").open("r+b") as file:  # the norm's last weight
        file.seek(-1, 2)
        file.write(b"\x40")
    refused("not the model of the recipe: model-00002-of-00002.safetensors has another SHA-256", model=another)
    name = sorted(recipe["outputs"])[0]
    refused(
        f"this is not the recipe's output: {name} has another SHA-256",
        recipe | {"outputs": recipe["outputs"] | {name: "0" * 64}},
    )
    refused("give the recorded one with --bank", bank=None)
    refused("not a fusion recipe", {"recipe": 9})
    refused("the recipe has no scales", {key: value for key, value in recipe.items() if key != "scales"})
    refused("alpha is a number", recipe | {"parameters": recipe["parameters"] | {"alpha": -1}})
    refused("the recorded options give", recipe | {"parameters": recipe["parameters"] | {"alpha": 9.0}})
    refused("expected a number", recipe | {"scales": dict.fromkeys(recipe["scales"], "1")})
    refused("needs parameters and a bank", recipe | {"deltas": {"kind": "bank", "generation": 3}})
    generation = recipe["deltas"]["generation"]
    for bad in ({"seed": []}, {"neurons": True}, {"beta": 1}, {"layers": 3}):
        parameters = {"parameters": generation["parameters"] | bad}
        refused(next(iter(bad)), recipe | {"deltas": recipe["deltas"] | {"generation": generation | parameters}})
    refused("not those of a fuse", recipe | {"parameters": recipe["parameters"] | {"beta": 1}})


def test_what_has_no_recipe(capsys, bank, model, tmp_path):
    assert "no neuroweave_manifest.json" in run(capsys, "recipe", "show", model)[2]
    words = ["fuse", "--model", model, "--bank", bank, "--output", tmp_path / "fast", "--no-hash"]
    assert run(capsys, *words)[0] == 0
    assert "fused with --no-hash" in run(capsys, "recipe", "show", tmp_path / "fast")[2]


def test_foreign_deltas_are_replayed_from_their_folder(capsys, model, tmp_path):
    from fusion_models import deltas_for

    tensors = deltas_for(weights())
    folder = write_checkpoint(tmp_path / "foreign", tensors)
    assert run(capsys, "fuse", "--model", model, "--weights", folder, "--output", tmp_path / "out")[0] == 0
    _, text, _ = run(capsys, "recipe", "show", tmp_path / "out")
    (tmp_path / "recipe.json").write_text(text)
    words = ["recipe", "replay", tmp_path / "recipe.json", "--model", model, "--output"]
    assert "give it with --weights" in run(capsys, *words, tmp_path / "no")[2]
    assert run(capsys, *words, tmp_path / "again", "--weights", folder)[0] == 0
    assert outputs(tmp_path / "again") == outputs(tmp_path / "out")
    save_file({name: value * 2 for name, value in tensors.items()}, folder / "model.safetensors")
    other = f"{folder}: these are not the deltas of the recipe: model.safetensors has another SHA-256"
    assert other in run(capsys, *words, tmp_path / "third", "--weights", folder)[2]
    (folder / "model.safetensors").rename(folder / "bank.safetensors")
    words += [tmp_path / "third", "--bank", folder / "bank.safetensors"]
    assert "--bank would not be read: the recipe records deltas that no bank" in run(capsys, *words)[2]
    assert read_manifest(tmp_path / "out")["inputs"]["deltas"]["kind"] == "deltas"


def test_an_output_that_would_replace_what_is_read(capsys, bank, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "bank.safetensors").write_bytes(bank.read_bytes())
    words = ["--model", model, "--bank", out / "bank.safetensors", "--output", out, "--overwrite"]
    code, _, err = run(capsys, "fuse", *words)
    assert (code, "contains the source" in err) == (2, True)
    assert run(capsys, "fuse", "--model", model, "--bank", bank, "--output", tmp_path / "done")[0] == 0
    (out / "recipe.json").write_text(run(capsys, "recipe", "show", tmp_path / "done")[1])
    (out / "bank.safetensors").unlink()
    words = ["recipe", "replay", out / "recipe.json", "--model", model, "--bank", bank, "--output", out, "--overwrite"]
    code, _, err = run(capsys, *words)
    assert (code, "contains the source" in err) == (2, True)
    assert (out / "recipe.json").is_file()


def test_a_damaged_manifest_has_no_recipe(capsys, bank, model, tmp_path):
    assert run(capsys, "fuse", "--model", model, "--bank", bank, "--output", tmp_path / "out")[0] == 0
    path = tmp_path / "out" / "neuroweave_manifest.json"
    manifest = json.loads(path.read_text())
    for broken in ({"tensors": [1]}, {"inputs": {"model": {}, "deltas": {}}}, {"outputs": {"x": 3}}):
        path.write_text(json.dumps(manifest | broken))
        code, _, err = run(capsys, "recipe", "show", tmp_path / "out")
        assert code == 2
        assert "the manifest is damaged" in err
