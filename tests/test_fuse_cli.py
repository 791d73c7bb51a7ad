"""`neuroweave fuse` and its dry run as a user types them."""

import json
import subprocess
import sys

import pytest
import torch
from fusion_models import LAYERS, deltas_for, llama_config, mlp_names, weights, write_checkpoint
from safetensors.torch import load_file

from neuroweave.cli.console import layer_numbers
from neuroweave.cli.main import main


@pytest.fixture
def pair(tmp_path):
    tensors = weights()
    model = write_checkpoint(tmp_path / "model", tensors, shards=2, config=llama_config())
    return model, write_checkpoint(tmp_path / "deltas", deltas_for(tensors))


def run(capsys, *words):
    """(exit code, stdout, stderr) of `neuroweave WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def changed(out, model):
    old, new = ({k: v for f in sorted(d.glob("*.safetensors")) for k, v in load_file(f).items()} for d in (model, out))
    return {name for name, value in old.items() if not torch.equal(value, new[name])}


@pytest.mark.parametrize(
    ("words", "layers"),
    [([], {0, 1, 2}), (["--layers", "0", "2"], {0, 2}), (["--layers", "1-2"], {1, 2}), (["--layers", "0,1"], {0, 1})],
)
def test_layers(capsys, pair, tmp_path, words, layers):
    out = tmp_path / "out"
    code, text, _ = run(capsys, "fuse", "--model", pair[0], "--weights", pair[1], "--output", out, "--alpha", 9, *words)
    assert code == 0
    assert changed(out, pair[0]) == {mlp_names(layer)[role] for layer in layers for role in ("gate", "down")}
    lines = text.splitlines()
    assert lines[0] == f"{out}: contour, {2 * len(layers)} tensors changed"
    assert lines[2].split()[:2] == ["gate", str(len(layers))]
    assert lines[3].split()[:2] == ["down", str(len(layers))]


def test_json_and_a_warning_about_rounding(capsys, pair, tmp_path):
    words = ["fuse", "--model", pair[0], "--weights", pair[1], "--output"]
    code, text, _ = run(capsys, *words, tmp_path / "out", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["shards"] == {"rewritten": 2, "linked": 0, "copied": 0, "resumed": 0}
    down = found["tensors"][mlp_names(0)["down"]]
    # alpha * std(W) = 0.02 * 0.19: a relative change of 0.4 %, most of which a bfloat16 rounds away
    assert down["relative_change"] == pytest.approx(0.02 * 0.19, rel=0.05)
    assert 0.3 < down["changed"] / down["count"] < 0.7
    assert "3 bfloat16 tensors change by less than 0.5%" in found["notes"][0]
    _, _, err = run(capsys, *words, tmp_path / "two")
    assert "--rounding stochastic" in err


def test_dry_run_predicts_the_fuse_and_writes_nothing(capsys, pair, tmp_path):
    words = ["fuse", "--model", pair[0], "--weights", pair[1], "--alpha", 3, "--json"]
    code, text, _ = run(capsys, *words, "--dry-run", "--output", tmp_path / "out")
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deltas", "model"]
    planned = json.loads(text)
    _, text, _ = run(capsys, *words, "--output", tmp_path / "out")
    done = json.loads(text)["tensors"]
    assert {row["name"] for row in planned["tensors"]} == set(done)
    for row in planned["tensors"]:
        real = done[row["name"]]
        assert row["relative_change"] == pytest.approx(real["relative_change"], rel=0.1)
        assert row["share_changed"] == pytest.approx(real["changed"] / real["count"], abs=0.03)
        assert row["scale"] == (None if real["scale"] is None else pytest.approx(real["scale"], rel=0.05))
    assert planned["coverage"] == [
        {"layer": layer, "gate": 1.0, "up": 0.0, "down": 1.0, "other": 0.0} for layer in range(LAYERS)
    ]
    assert planned["deltas_not_used"] == LAYERS
    assert all(shard["rewritten"] for shard in planned["model"]["shards"].values())


def test_dry_run_table_for_people(capsys, pair):
    code, text, err = run(capsys, "fuse", "--model", *pair[:1], "--weights", pair[1], "--dry-run", "--layers", "1")
    assert code == 0
    lines = text.splitlines()
    assert "2 would change" in lines[0]
    assert "17 tensors in 2 shards, index sound" in lines[0]
    assert lines[2].split()[:4] == ["layer", "projection", "weights", "covered"]
    assert [line.split()[:3] for line in lines[3:5]] == [["1", "gate", "100.0%"], ["1", "down", "100.0%"]]
    assert "1 bfloat16 tensor changes by" in err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda deltas: deltas.pop(mlp_names(0)["gate"]), "no delta for model.layers.0.mlp.gate_proj.weight"),
        (
            lambda deltas: deltas.update({"model.layers.7.mlp.up_proj.weight": torch.ones(1, 1)}),
            "no tensor for the delta",
        ),
        (lambda deltas: deltas[mlp_names(2)["down"]].fill_(0.0), "no variance"),
        (lambda deltas: deltas[mlp_names(2)["down"]].fill_(torch.nan), "NaN or infinite"),
    ],
)
def test_dry_run_exits_1_when_the_fuse_would_fail(capsys, tmp_path, change, problem):
    tensors = weights()
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    deltas = deltas_for(tensors)
    change(deltas)
    folder = write_checkpoint(tmp_path / "deltas", deltas)
    words = ["fuse", "--model", model, "--weights", folder]
    code, text, err = run(capsys, *words, "--dry-run", "--json")
    assert code == 1
    assert any(problem in each for each in json.loads(text)["problems"])
    code, _, err = run(capsys, *words, "--output", tmp_path / "out")
    assert code == 2
    assert problem in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "deltas"], "--output is needed"),
        (["--output", "out"], "give either --weights"),
        (["--weights", "deltas", "--bank", "b", "--output", "out"], "give either --weights"),
        (["--weights", "deltas", "--neurons", "3", "--output", "out"], "belong to --bank"),
        (["--weights", "deltas", "--output", "out", "--workers", "0"], "--workers is at least 1"),
        (["--weights", "deltas", "--output", "out", "--layers", "5-"], "--layers takes numbers or ranges"),
        (["--weights", "deltas", "--output", "out", "stray"], "unexpected argument 'stray'"),
        (["--weights", "nowhere", "--output", "out"], "nowhere: no such folder"),
        (["--weights", "deltas", "--output", "model"], "the output is the source itself"),
    ],
)
def test_wrong_options(capsys, pair, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "fuse", "--model", pair[0], *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deltas", "model"]


def test_partial_deltas_say_what_they_cover(capsys, tmp_path):
    """The figures of the summary, and those of the whole tensors, against float64."""
    tensors = weights(torch.float32)
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    small = {
        name: (value[:, :37] if "down" in name else value[:37]).contiguous()
        for name, value in deltas_for(tensors, torch.float32, roles=("gate", "down")).items()
    }
    out = tmp_path / "out"
    words = ["fuse", "--model", model, "--weights", write_checkpoint(tmp_path / "deltas", small), "--output", out]
    code, text, _ = run(capsys, *words, "--alpha", 1)
    assert code == 0
    lines = text.splitlines()
    new = load_file(out / "model.safetensors")
    assert lines[0] == f"{out}: contour, 6 tensors changed"
    assert lines[1].split("  ")[-3:] == ["weights covered", "relative change of these", "of these that change"]
    for line, role in zip(lines[2:4], ("gate", "down"), strict=True):
        found = line.split()
        changes, changed, count = [], 0, 0
        for layer in range(LAYERS):
            name = mlp_names(layer)[role]
            block = (slice(None), slice(37)) if role == "down" else (slice(37),)
            old, edited = tensors[name][block].double(), new[name][block].double()
            changes.append(float((edited - old).norm() / old.norm()))
            changed, count = changed + int((edited != old).sum()), count + old.numel()
            assert torch.equal(new[name][:, 37:] if role == "down" else new[name][37:], tensors[name][..., 37:]
                               if role == "down" else tensors[name][37:])  # fmt: skip
        assert found[:3] == [role, "3", f"{37 / 307:.1%}"]
        assert [float(found[3]), float(found[5])] == pytest.approx([min(changes), max(changes)], rel=6e-3)
        assert found[-1] == f"{changed / count:.1%}"
    total = sum(tensors[name].numel() for name in small)
    share = sum(int((new[name] != tensors[name]).sum()) for name in small) / total
    assert lines[4] == (
        "the deltas cover 12.1% of the weights of these tensors, the rest is as it was: "
        f"{share:.1%} of all their weights changed"
    )


def test_alpha_0_changes_gates_alone(capsys, pair, tmp_path):
    words = ["fuse", "--model", pair[0], "--weights", pair[1], "--alpha", "0", "--layers", "1"]
    code, text, _ = run(capsys, *words, "--output", tmp_path / "out")
    assert code == 0
    assert text.splitlines()[0] == f"{tmp_path / 'out'}: contour, 1 tensor changed of 2 that deltas cover"
    assert changed(tmp_path / "out", pair[0]) == {mlp_names(1)["gate"]}
    assert "; 1 would change" in run(capsys, *words, "--dry-run")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gain", "2"], "--gain would have no effect: it is for --mode append, this is contour"),
        (["--mode", "additive", "--gain", "0"], "--gain would have no effect"),
        (["--mode", "additive", "--gamma-cap", "1"], "--gamma-cap would have no effect: it caps gates"),
        (["--targets", "down", "--gamma-cap", "1"], "--gamma-cap would have no effect"),
        (["--targets", "gate", "--alpha", "1"], "--alpha would have no effect: in --mode contour it is for down"),
        (["--targets", "gate", "--alpha-mode", "plain"], "--alpha-mode would have no effect"),
        (["--mode", "append", "--alpha", "1"], "--alpha would have no effect: --mode append leaves the weights"),
        (["--mode", "append", "--rounding", "nearest"], "--rounding would have no effect"),
        (["--mode", "append", "--targets", "gate,up,down"], "--targets would have no effect: --mode append brings"),
        (["--mode", "append", "--gamma-cap", "1"], "--gamma-cap would have no effect"),
        (["--seed", "7"], "--seed would have no effect: a folder of deltas has its own"),
        (["--gamma-cap", "-1"], "--gamma-cap is a number of at least 0, got -1.0"),
        (["--targets", "gates"], "--targets 'gates' is not known"),
        (["--targets", "up"], "--targets up: contour changes gate and down only"),
        (["--mode", "append", "--gain", "nan"], "--gain is a finite number, got nan"),
    ],
)
def test_options_without_effect_or_meaning(capsys, pair, tmp_path, words, message):
    code, _, err = run(capsys, "fuse", "--model", pair[0], "--weights", pair[1], "--output", tmp_path / "out", *words)
    assert code == 2
    assert err.startswith(f"neuroweave: {message}")
    assert not (tmp_path / "out").exists()


def test_options_with_effect(capsys, pair, tmp_path):
    words = ["fuse", "--model", pair[0], "--weights", pair[1], "--dry-run"]
    for more in (
        ["--rounding", "stochastic", "--seed", "7"],
        ["--targets", "gate", "--gamma-cap", "1"],
        ["--targets", "down", "--alpha", "2"],
        ["--mode", "additive", "--targets", "up", "--alpha", "2"],
    ):
        assert run(capsys, *words, *more)[0] == 0


def test_stochastic_rounding_of_float32(capsys, tmp_path):
    tensors = weights(torch.float32)
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    words = ["fuse", "--model", model, "--weights", write_checkpoint(tmp_path / "deltas", deltas_for(tensors))]
    _, _, err = run(capsys, *words, "--rounding", "stochastic", "--dry-run")
    assert "--rounding stochastic changes nothing here: every tensor to be changed is float32" in err
    assert "stochastic" not in run(capsys, *words, "--dry-run")[2]


def test_a_model_in_the_place_of_deltas(capsys, pair, tmp_path):
    for more in ([], ["--dry-run"]):
        words = ["--weights", pair[0], "--output", tmp_path / "out", *more]
        code, _, err = run(capsys, "fuse", "--model", pair[0], *words)
        assert code == 2
        assert err.startswith(f"neuroweave: {pair[0]}: a model, not deltas; `neuroweave deltas --base-model` makes")
    code, _, err = run(capsys, "fuse", "--model", pair[0], "--bank", pair[0], "--output", tmp_path / "out")
    assert code == 2
    assert f"{pair[0]}: a folder; a bank is one .safetensors file; it looks like a model: neuroweave neurons" in err
    # a whole model may be added, where that is asked for
    words = ["--weights", pair[0], "--output", tmp_path / "sum", "--mode", "additive", "--targets", "all"]
    assert run(capsys, "fuse", "--model", pair[0], *words, "--alpha-mode", "plain", "--alpha", "1")[0] == 0
    name = mlp_names(0)["up"]
    before, after = ({k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
                     for folder in (pair[0], tmp_path / "sum"))  # fmt: skip
    assert torch.equal(after[name], 2 * before[name])


def test_deltas_of_an_embedding_are_no_model(capsys, pair, tmp_path):
    deltas = {"model.embed_tokens.weight": torch.ones(57, 123, dtype=torch.bfloat16)}
    folder = write_checkpoint(tmp_path / "extracted", deltas)
    code, _, err = run(capsys, "fuse", "--model", pair[0], "--weights", folder, "--output", tmp_path / "out")
    assert code == 2
    assert "model.embed_tokens.weight: not a gate, up or down projection" in err


def test_stopped_and_taken_up_again(capsys, tmp_path, monkeypatch):
    """Ctrl-C says that the same command goes on; every shard is counted once."""
    from neuroweave.surgery.fusion import fuse as module

    tensors = weights()
    model = write_checkpoint(tmp_path / "model", tensors, shards=5, config=llama_config())
    deltas = write_checkpoint(tmp_path / "deltas", deltas_for(tensors))
    words = ["fuse", "--model", model, "--weights", deltas, "--output", tmp_path / "out", "--layers", "1", "2"]
    real, seen = module.Journal.complete, []

    def complete(journal, name, **entries):
        real(journal, name, **entries)
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module.Journal, "complete", complete)
        code, text, err = run(capsys, *words)
    assert (code, text) == (130, "")
    assert err.strip() == "neuroweave: stopped; the same command goes on from the shards that are complete"
    code, text, _ = run(capsys, *words, "--json")
    shards = json.loads(text)["shards"]
    assert code == 0
    assert shards["resumed"] == 2
    assert sum(shards.values()) == 5
    assert run(capsys, *words, "--overwrite")[1].splitlines()[-1] == "shards: 3 rewritten, 2 hard-linked"
    monkeypatch.setattr(module, "fuse_checkpoint", lambda *_, **__: (_ for _ in ()).throw(ValueError("full")))
    assert run(capsys, *words, "--overwrite")[2] == "neuroweave: full\n"


def test_layer_numbers():
    assert layer_numbers(["5", "11", "17"]) == (5, 11, 17)
    assert layer_numbers(["4-6,1", "5"]) == (1, 4, 5, 6)
    for bad in (["6-4"], ["x"], ["-1"], [""], ["1.5"], ["0-9999999999"]):
        with pytest.raises(ValueError, match="--layers takes"):
            layer_numbers(bad)


def test_no_torch_on_the_way(pair, tmp_path):
    script = (
        "import sys\nfrom neuroweave.cli.main import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    for words in (["--dry-run"], ["--output", tmp_path / "out"]):
        command = [sys.executable, "-c", script, "fuse", "--model", *pair[:1], "--weights", pair[1], *words]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
