"""`neuroweave patch` and `neuroweave audit` as a user types them."""

import json
import shutil

import families
import pytest

from neuroweave.cli.main import main


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "original"
    families.tiny_model("llama").save_pretrained(folder)
    return folder


def run(capsys, *words):
    """(exit code, stdout, stderr) of `neuroweave WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_what_it_says(capsys, original, tmp_path):
    code, out, err = run(capsys, "patch", original, tmp_path / "out", "--mlp", "relu|silu", "--layers", "every 2nd")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{tmp_path / 'out'}: mlp: relu|silu",
        "  mlp  1 layer",
        "  1 shard hard-linked; 0 parameters added",
    ]


def test_json(capsys, original, tmp_path):
    code, out, _ = run(capsys, "patch", original, tmp_path / "out", "--recipe", "learned-mixture", "--copy", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["layers_changed"] == {"mlp": 2}
    assert (found["shards_linked"], found["shards_copied"]) == (0, 1)
    assert found["parameters_added"] == 2 * 40 * 5
    assert found["recipe"]["name"] == "learned-mixture"


@pytest.mark.parametrize(
    ("recipe", "code", "ran"),
    [
        ("phantom-everywhere", 0, {"tanh", "sin"}),
        ("silu-tanh-everywhere", 1, {"tanh", "silu"}),
        ("phantom-mlp", 0, {"tanh", "sin"}),
    ],
)
def test_audit_of_a_patched_checkpoint(capsys, original, tmp_path, recipe, code, ran):
    assert run(capsys, "patch", original, tmp_path / "out", "--recipe", recipe)[0] == 0
    found = run(capsys, "audit", tmp_path / "out", "--forbid", "silu,gelu", "--json")
    runs = json.loads(found[1])["runs"]
    assert found[0] == code
    assert {
        each["operation"] for each in runs if each["kind"] == "activation" and "softmax" not in each["operation"]
    } == ran


def test_list(capsys):
    code, out, _ = run(capsys, "patch", "--list")
    assert code == 0
    assert "phantom-everywhere" in out
    assert "0.9 * tanh(x) + 0.1 * sin(x)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to change: give --recipe, or --mlp"),
        (
            ["--mlp", "phantm"],
            "options: sites.0.activation: activation 'phantm' is not known (did you mean 'phantom'?)",
        ),
        (["--mlp", "relu", "--layers", "7"], "layer 7 does not exist: the model has layers 0 to 1"),
        (["--mlp", "relu", "--recipe", "phantom-mlp"], "give either --recipe or shortcuts such as --mlp, not both"),
        (["--recipe", "phantom-mlp", "--layers", "1"], "--layers belongs to the shortcuts"),
        (["--site", "mlp"], "--site takes SITE=ACTIVATION, got 'mlp'"),
        (["--site", "mpl=relu"], "site 'mpl' is not known (did you mean 'mlp'?)"),
        (["--recpie", "x"], "No such option '--recpie'"),
    ],
)
def test_a_slip_is_one_line_and_exit_2(capsys, original, tmp_path, words, message):
    code, out, err = run(capsys, "patch", original, tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert err.startswith("neuroweave: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "/no/such/folder"])
def test_a_model_that_is_nowhere(capsys, tmp_path, source):
    code, _, err = run(capsys, "patch", source, tmp_path / "out", "--mlp", "relu")
    assert (code, err) == (2, f"neuroweave: {source}: no such folder, and not a hub id of the form owner/name\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fuze"], "There is no command 'fuze'. Did you mean 'fuse'?"),
        (["audit", "x", "--forbid", " , "], "--forbid names no activation"),
        (["patch", "x", "y", "--head", "relu", "--layers", "3"], "--layers cannot mean head"),
        (["patch", "x", "y", "--mlp", "relu", "--site", "mlp=silu"], "site mlp is given twice"),
    ],
)
def test_words_that_mean_nothing(capsys, words, message):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err


def test_a_damaged_shard_is_named_before_loading(capsys, original, tmp_path):
    shutil.copytree(original, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    code, _, err = run(capsys, "audit", tmp_path / "cut")
    assert code == 2
    assert "model.safetensors: truncated" in err
