"""`neuroweave neurons` from files to files: what it writes, prints, draws and refuses."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import texts, tiny_model, tiny_tokenizer

from neuroweave.cli import main as main_module
from neuroweave.surgery.neurons.bank import DERIVATIVE, SOURCE, Bank, Neuron, load_bank, save_bank
from neuroweave.surgery.neurons.extraction import extract_neurons

COMMANDS_ENTRY = ("neurons", "Make, derive and show banks of neurons.")


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(main_module.COMMANDS, "neurons", COMMANDS_ENTRY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, and a bank with a measured, a defined and a derived neuron."""
    root = tmp_path_factory.mktemp("neurons")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "texts").mkdir()
    for text in texts():
        (root / "texts" / f"{text.name}.txt").write_text(text.text)
    measured = extract_neurons(tiny_model(), tiny_tokenizer(), texts(), count=1, window=32)
    behaviour = {"knots": [0.0, 1.0], "slopes": [0.0, 2.0], "range": 3.0, "tolerance": 0.05}
    moments = [{"token": "$\n", "text": "a $\nb", "start": 2, "end": 4, "document": "d", "value": -2.5}]
    neurons = [
        measured.neurons[0],
        Neuron("soft-threshold", SOURCE, {"spec": "behaviours.yaml"}, behaviour, fired=moments),
        Neuron("twin", DERIVATIVE, {"parent": "soft-threshold", "operation": "mirrored"}, fired=moments),
    ]
    rows = np.random.default_rng(0).standard_normal((3, 2, 32)).astype(np.float32)
    gate, up, down = (
        np.concatenate([own, more]) for own, more in zip((measured.gate, measured.up, measured.down), rows, strict=True)
    )
    save_bank(Bank(gate, up, down, neurons, measured.provenance), root / "bank.safetensors")
    return root


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main_module.main(["neurons", *map(str, words)])
    return int(stop.value.code or 0)


def test_extraction_from_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bank.safetensors"
    words = ["--data", folder / "texts", "--count", 4, "--window", 32, "--layers", "1-2", "--tokens", 0]
    assert run("extract", "--model", folder / "model", *words, "--output", out) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 4 neurons of hidden size 32, 0.0")
    assert printed.err.splitlines()[-1] == "reading model twice"
    bank = load_bank(out)
    assert [neuron.origin["layer"] for neuron in bank.neurons] == [1, 1, 2, 2]
    model = bank.provenance["model"]
    assert (model["name"], model["model_type"]) == ("model", "llama")
    assert set(model["files"]) == {"config.json", "model.safetensors"}
    assert all(len(entry["sha256"]) == 64 for entry in model["files"].values())
    assert bank.provenance["text"]["tokens"] == 12 * 40 - 12 * 8  # a rest of 8 is less than half a window of 32
    assert bank.provenance["text"]["documents"][0] == "text-0.txt#1"
    assert bank.provenance["neuroweave"]
    assert str(folder) not in out.read_bytes().decode("latin-1")
    # the same again gives the same bytes
    assert run("extract", "--model", folder / "model", *words, "--output", out, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == bank.sha256


def test_the_output_is_checked_before_the_model_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuroweave.checkpoint import loading

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_model", never)
    out = tmp_path / "bank.safetensors"
    out.write_bytes(b"mine")
    for words in (
        ["extract", "--model", folder / "model"],
        ["define", "--spec", "behaviours.yaml"],
        ["derive", folder / "bank.safetensors"],
    ):
        assert run(*words, "--output", out) == 2
        error = capsys.readouterr().err
        assert error == f"neuroweave: {out}: exists already; choose another name, or add --overwrite\n"
        assert run(*words, "--output", tmp_path / "absent" / "bank") == 2
        assert "not the name of a file in a folder that exists" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extract", "--model", "absent"], "absent: no such folder, and not a hub id"),
        (["extract", "--model", "model", "--count", "1000"], "1000 neurons asked for"),
        (["extract", "--model", "model", "--layers", "2-5"], "layer 3 does not exist: the model has layers 0 to 2"),
        (["extract", "--model", "model", "--layers", "some"], "layers is"),
        (["extract", "--model", "model", "--select", "size"], "'size' is not one of"),
        (["extract", "--model", "model", "--data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["extract"], "Missing option '--model'"),
        (["derive", "."], ".: a folder; a bank is one .safetensors file; name a file in it, such as bank.safetensors"),
        (["derive", "absent.safetensors"], "absent.safetensors: no such file; expected a neuron bank"),
        (["derive", "model/model.safetensors"], "a safetensors file, but not a neuron bank"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    data = ["--data", "texts"] if words[0] == "extract" and "--data" not in words else []
    window = ["--window", "32"] if words[0] == "extract" else []
    assert run(*words, *data, *window, "--output", tmp_path / "out.safetensors") == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("neuroweave: ")
    assert message in last
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------- show


def test_a_bank_is_shown_as_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", folder / "bank.safetensors") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    bank = load_bank(folder / "bank.safetensors")
    assert lines[0] == "bank.safetensors: 3 neurons (2 source, 1 derivative), hidden size 32"
    assert lines[1] == f"sha256 {bank.sha256}"
    assert "activation: silu" in lines
    header, *rows = lines[-4:]
    assert header.split()[:7] == ["neuron", "kind", "origin", "gate", "up", "down", "mean"]
    measured, defined, derived = rows
    known = bank.neurons[0].statistics
    assert measured.split()[:4] == [bank.neurons[0].name, "source", "layer", "1"]
    assert f"{known['gate_norm']:.3g}" in measured
    assert f"{known['contribution']:.3g}" in measured
    assert "behaviours.yaml" in defined
    assert "▁▂▂▃▄▅▅▅▅▅▅▅▆▇▇█" in defined
    assert f"{np.linalg.norm(bank.down[1]):.3g}" in defined
    assert "mirrored soft-threshold" in derived
    assert derived.endswith("  $↵")
    assert printed.err == ""


def test_one_neuron_is_shown_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = load_bank(folder / "bank.safetensors")
    neuron = bank.neurons[0]
    assert run("show", folder / "bank.safetensors", "--neuron", neuron.name) == 0
    printed = capsys.readouterr().out
    for name, value in neuron.statistics.items():
        assert any(
            line.split()[:-1] == name.split("_") and float(line.split()[-1]) == pytest.approx(value, rel=1e-5)
            for line in printed.splitlines()
            if line.startswith("  ")
        ), name
    assert "●" in printed
    assert f"  index: {neuron.origin['index']}" in printed.splitlines()
    moments = [line for line in printed.splitlines() if "»" in line]
    assert len(moments) == len(neuron.fired) == 8
    columns = {line.index("»") for line in moments}
    assert len(columns) == 1
    for line, moment in zip(moments, neuron.fired, strict=True):
        assert f"»{moment['token']}«" in line
        assert line.split()[0] == f"{moment['value']:+.4g}"
        assert line.endswith(f"({moment['document']})")


def test_a_defined_neuron_is_drawn_as_its_function(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", folder / "bank.safetensors", "--neuron", "soft-threshold") == 0
    printed = capsys.readouterr().out
    assert "  tolerance: 0.05" in printed
    assert "4 ┤" in printed
    assert "-4 ┤" in printed


def test_an_unknown_neuron_is_refused_with_the_nearest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", folder / "bank.safetensors", "--neuron", "soft-treshold") == 2
    assert "no neuron named 'soft-treshold'; did you mean 'soft-threshold'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model"],
            "model: a folder; a bank is one .safetensors file; it looks like a model: neuroweave neurons extract",
        ),
        (["texts"], "texts: a folder; a bank is one .safetensors file; name a file"),
        (["--overwrite"], "--overwrite belongs to --figure: nothing else is written"),
        (["bank.safetensors", "--neuron", "twin", "--limit", "24"], "--limit is for the table of all neurons"),
    ],
)
def test_what_cannot_be_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    assert run("show", *words) == 2
    assert capsys.readouterr().err.startswith(f"neuroweave: {message}")


def test_json_and_limit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = load_bank(folder / "bank.safetensors")
    assert run("show", folder / "bank.safetensors", "--json", "--limit", 2) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["count"], shown["hidden_size"], shown["sha256"]) == (3, 32, bank.sha256)
    assert [neuron["name"] for neuron in shown["neurons"]] == [neuron.name for neuron in bank.neurons[:2]]
    assert shown["neurons"][0]["fired"] == bank.neurons[0].fired
    assert shown["neurons"][1]["norms"]["up"] == pytest.approx(np.linalg.norm(bank.up[1].astype(np.float64)))
    assert shown["provenance"] == bank.provenance
    assert run("show", folder / "bank.safetensors", "--limit", 1) == 0
    printed = capsys.readouterr()
    assert "soft-threshold" not in printed.out
    assert printed.err == "2 more: --limit 0 shows all, --neuron NAME everything about one\n"
    assert run("show", folder / "bank.safetensors", "--limit", -1) == 2


def test_the_bank_of_the_package_is_shown_without_torch() -> None:
    code = (
        "import sys\nfrom neuroweave.cli import main\n"
        f"main.COMMANDS['neurons'] = {COMMANDS_ENTRY!r}\n"
        "try:\n    main.main(['neurons', 'show', '--limit', '0'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the bank of the package: 7")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    figure = tmp_path / f"curves{suffix}"
    assert run("show", folder / "bank.safetensors", "--figure", figure) == 0
    assert capsys.readouterr().err == f"drawn: {figure}\n"
    content = figure.read_bytes()
    if suffix == ".png":
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width > 600
        assert height > 300
    else:
        text = content.decode()
        bank = load_bank(folder / "bank.safetensors")
        assert f">{bank.neurons[0].name}<" in text
        assert ">soft-threshold<" in text
        assert ">twin<" not in text  # nothing is known of its curve
        assert "bank.safetensors, 3 neurons" in text
        assert "measured on text" in text
        assert "a defined neuron stands for" in text
    assert run("show", folder / "bank.safetensors", "--figure", figure) == 2
    assert "exists already" in capsys.readouterr().err
    assert run("show", folder / "bank.safetensors", "--figure", figure, "--overwrite") == 0
    assert figure.read_bytes() == content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--figure", "curves.gif"], "curves.gif: a figure is a .png or .svg file"),
        (["--figure", "absent/curves.png"], "absent/curves.png: no folder absent"),
        (["--figure", "curves.png", "--neuron", "twin"], "none of these neurons has a curve to draw"),
    ],
)
def test_figures_that_cannot_be_drawn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run("show", folder / "bank.safetensors", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_figure_without_matplotlib(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("show", folder / "bank.safetensors", "--figure", tmp_path / "curves.png") == 2
    assert 'a figure needs matplotlib: pip install "neuroweave[report]"' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- define and derive


def test_behaviours_are_defined_and_derived_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = Path(__file__).parents[1] / "examples" / "behaviours.yaml"
    bank, derived = tmp_path / "bank.safetensors", tmp_path / "derived.safetensors"
    assert run("define", "--spec", spec, "--output", bank) == 0
    assert capsys.readouterr().out.startswith(f"{bank}: 8 neurons of hidden size 576")
    assert run("derive", bank, "--output", derived, "--seed", 7) == 0
    capsys.readouterr()
    assert len(load_bank(derived)) > 8
    assert run("show", derived, "--limit", 0) == 0
    assert "derivative" in capsys.readouterr().out
    first = derived.read_bytes()
    assert run("derive", bank, "--output", derived, "--seed", 7, "--overwrite", "--json") == 0
    assert derived.read_bytes() == first
    assert json.loads(capsys.readouterr().out)["neurons"] == len(load_bank(derived))


def link(kind: str, output: Path, source: Path) -> Path:
    if kind == "symbolic":
        output.symlink_to(source)
    elif kind == "hard":
        os.link(source, output)
    return source if kind == "itself" else output


@pytest.mark.parametrize("kind", ["itself", "symbolic", "hard"])
@pytest.mark.parametrize(
    "command", ["define", "define from a bank", "derive", "extract", "extract from a folder", "model"]
)
def test_an_output_never_replaces_an_input(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    bank, spec = tmp_path / "b.safetensors", tmp_path / "spec.yaml"
    bank.write_bytes((folder / "bank.safetensors").read_bytes())
    spec.write_text(
        "hidden_size: 32\nneurons:\n- {name: n, knots: [0], slopes: [1], direction: {random: 1}, output: {bank: "
        "b.safetensors, neuron: twin}}\n"
    )
    text = tmp_path / "texts" / "deep" / "one.txt"
    text.parent.mkdir(parents=True)
    text.write_text("Some text.")
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    words, source = {
        "define": (["define", "--spec", spec], spec),
        "define from a bank": (["define", "--spec", spec], bank),
        "derive": (["derive", bank], bank),
        "extract": (["extract", "--model", folder / "model", "--data", text], text),
        "extract from a folder": (["extract", "--model", folder / "model", "--data", tmp_path / "texts"], text),
        "model": (["extract", "--model", tmp_path / "model"], weights),
    }[command]
    before = source.read_bytes()
    output = link(kind, tmp_path / "out.safetensors", source)
    for more in ([], ["--overwrite"]):
        assert run(*words, "--output", output, *more) == 2
        error = capsys.readouterr().err
        assert f"{output}: the output is {source}, which is read; choose another name" in error or not more
        assert source.read_bytes() == before


def test_a_figure_never_replaces_the_bank(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = tmp_path / "bank.png"
    bank.write_bytes((folder / "bank.safetensors").read_bytes())
    assert run("show", bank, "--figure", bank, "--overwrite") == 2
    assert "which is read" in capsys.readouterr().err
    assert load_bank(bank)


# --------------------------------------------------------------------------------------------------------- edited banks


def edited(source: Path, target: Path, changes: dict[str, Any], *, neuron: int = 0) -> Path:
    """The bank with fields of a neuron's record replaced in the file's JSON."""
    raw = source.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    about = json.loads(header["__metadata__"]["neuroweave_bank"])
    about["neurons"][neuron] |= changes
    header["__metadata__"]["neuroweave_bank"] = json.dumps(about)
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    target.write_bytes(struct.pack("<Q", len(written)) + written + raw[8 + size :])
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ["a"]}, "neuron 0: its name is ['a']; expected a text"),
        ({"name": ""}, "neuron 0: its name is ''; expected a text"),
        ({"kind": "other"}, "its kind is 'other'; expected source or derivative"),
        ({"origin": [1]}, "its origin is [1]; expected an object"),
        ({"origin": None}, "its origin is None; expected an object"),
        ({"origin": {"operation": "mirrored", "parent": []}}, "its origin's parent is []; expected a text"),
        ({"origin": {"gain": "2"}}, "its origin's gain is '2'; expected a number above 0 that float32 holds"),
        ({"origin": {"gain": 1e39}}, "its origin's gain is 1e+39"),
        ({"origin": {"statistics": "inherited"}}, "its statistics are inherited, but its origin has no parent"),
        ({"behaviour": "line"}, "its behaviour is 'line'; expected an object"),
        ({"behaviour": {"knots": "0", "slopes": [1]}}, "the behaviour's knots is '0'; expected a list of numbers"),
        ({"statistics": [1]}, "its statistics is [1]; expected an object"),
        ({"statistics": {"kurtosis": "high"}}, "its statistic 'kurtosis' is 'high'; expected a number"),
        (
            {"statistics": {"kurtosis": 10**400}},
            "its statistic 'kurtosis' is <integer of 1329 bits>; expected a number",
        ),
        ({"response": [1]}, "its response is [1]; expected an object"),
        ({"response": {"input": [1.0]}}, "its response's mean is None; expected a list of numbers"),
        ({"response": {"input": [1.0], "mean": [1.0, 2.0]}}, "has 1 inputs, but 2 numbers in mean"),
        ({"response": {"input": [1.0, 0.0], "mean": [1.0, 2.0]}}, "its response's inputs do not ascend"),
        ({"response": {"input": [1.0], "mean": [1.0], "odd": [1.0]}}, "its response's key 'odd' is not known"),
        ({"response": {"input": [1.0], "mean": ["x"]}}, "its response's mean is ['x']; expected a list of numbers"),
        ({"fired": {"a": 1}}, "its fired is {'a': 1}; expected a list"),
        ({"fired": ["a"]}, "its moment in fired is 'a'; expected an object"),
        ({"fired": [{"token": "a", "text": "a"}]}, "its moment in fired has the value None; expected a number"),
        (
            {"fired": [{"token": "a", "text": "a", "value": 1, "start": None}]},
            "has the start None; expected an integer",
        ),
        ({"weight": 1}, "its key 'weight' is not known; known: name, kind, origin"),
    ],
)
def test_a_bank_with_an_edited_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    bank = edited(folder / "bank.safetensors", tmp_path / "bank.safetensors", changes)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (compared below, as a whole text)
        load_bank(bank)
    assert str(error.value).startswith(f"{bank}: neuron ")
    assert message in str(error.value)
    for words in (["show", bank], ["show", bank, "--neuron", "twin"], ["derive", bank, "--output", tmp_path / "o"]):
        assert run(*words) == 2
        assert "unexpected" not in capsys.readouterr().err


def test_an_edit_that_changes_nothing_is_read(folder: Path, tmp_path: Path) -> None:
    bank = edited(folder / "bank.safetensors", tmp_path / "bank.safetensors", {"statistics": {"kurtosis": 3.0}})
    assert load_bank(bank).neurons[0].statistics == {"kurtosis": 3.0}


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for name in ("extract", "define", "derive", "show"):
        assert f"\n  {name} " in printed
    from neuroweave.surgery.neurons.extraction import TOKENS, WINDOW
    from neuroweave.surgery.neurons.selection import SELECTIONS

    assert run("extract", "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"[default: {TOKENS}]" in printed
    assert f"[default: {WINDOW}]" in printed
    assert f"[{'|'.join(SELECTIONS)}]" in printed
