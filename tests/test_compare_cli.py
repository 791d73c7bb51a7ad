"""`neuroweave compare` from folders to files: what it writes, prints and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_llama import changed, texts, tiny_model, tiny_tokenizer

from neuroweave.cli import compare as compare_cli
from neuroweave.cli.main import main
from neuroweave.diagnose import Comparison, experiment
from neuroweave.diagnose.probes import prediction

QUICK = ["--window", "32", "--tokens", "300"]
LESS = ["--no-speed", "--no-gradients", "--no-sampling", "--no-weights"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, other (noisy), odd (another vocabulary) and a folder of texts."""
    root = tmp_path_factory.mktemp("compare")
    base = tiny_model()
    for name, model, tokenizer in [
        ("base", base, tiny_tokenizer()),
        ("other", changed(base, 0.3), tiny_tokenizer()),
        ("odd", base, tiny_tokenizer(words=[f"v{n}" for n in range(120)])),
    ]:
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "texts").mkdir()
    for text in texts():
        (root / "texts" / f"{text.name}.txt").write_text(text.text)
    return root


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, words)])
    return int(stop.value.code or 0)


def test_a_comparison_from_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3\n")
    out = tmp_path / "out"
    code = run(
        folder / "base", folder / "other", folder / "base", "--data", folder / "texts", "--out", out, *QUICK,
        "--no-speed", "--prompts", tmp_path / "prompts.txt",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert sorted(path.name for path in out.iterdir()) == ["comparison.json", "figures", "report.html"]
    drawn = {path.name for path in (out / "figures").iterdir()}
    assert {"kl-by-position.svg", "kl-by-position.png"} <= drawn
    comparison = Comparison.read(out / "comparison.json")
    names = [model.name for model in comparison.models]
    assert names == ["base (1)", "other", "base (2)"]
    assert comparison.others[1].difference.perplexity_ratio.value == 1
    assert comparison.others[0].difference.kl.value > 0.01
    assert len(comparison.text.documents) == comparison.text.units == 10
    assert set(comparison.text.documents) <= {f"text-{n}.txt#1" for n in range(12)}
    wanted = [("w1 w2", "greedy"), ("w3", "greedy"), ("w1 w2", "sampled"), ("w3", "sampled")]
    assert [(generated.prompt, generated.mode) for generated in comparison.generated] == wanted
    assert comparison.plan.speed is None
    header, *rows = printed.out.splitlines()
    assert all(name in header for name in names)
    assert [row.split("  ")[0] for row in rows[:5]] == [
        "perplexity",
        "ratio to the base's",
        "mean KL, nats",
        "cosine of logits",
        "top-1 agreement",
    ]
    assert rows[2].endswith("0 [0, 0]")
    assert "the same as" in printed.out
    assert "It predicts this text worse" in printed.out or "does not differ beyond noise" in printed.out


def test_json_is_the_stored_comparison(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = [folder / "base", folder / "other", "--data", folder / "texts", "--out", out, *QUICK, *LESS]
    assert run(*words, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "comparison.json").read_text())
    assert printed["base"]["name"] == "base"
    assert run(*words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*words, "--overwrite") == 0


def test_one_after_the_other_when_memory_is_short(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_cli, "MEMORY_SHARE", 0.0)
    words = [folder / "base", folder / "other", folder / "base", "--data", folder / "texts", *QUICK, *LESS]
    assert run(*words, "--out", tmp_path / "apart") == 0
    assert "one after the other" in capsys.readouterr().err
    monkeypatch.setattr(compare_cli, "MEMORY_SHARE", 0.7)
    assert run(*words, "--out", tmp_path / "together") == 0
    assert "one after the other" not in capsys.readouterr().err
    apart, together = (Comparison.read(tmp_path / name / "comparison.json") for name in ("apart", "together"))
    assert apart.others == together.others


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "odd"], "odd has another vocabulary than base"),
        (["base", "absent"], "no such folder, and not a hub id"),
        (["base", "other", "--window", "65"], "a window of 65 tokens is more than base can read (64)"),
        (["base", "other", "--window", "1"], "--window 1: input should be greater than or equal to 2"),
        (["base", "other", "--dtype", "float8"], "'float8' is not one of 'auto'"),
        (["base", "other", "--prompts", "prompts.txt"], "prompts.txt, line 2: an empty prompt"),
        (["base", "other", "--data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["base", "other", "--limit", "5"], "--limit says how many questions of a benchmark to ask"),
        (["base"], "Missing argument 'OTHER [MORE ...]'"),
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
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("w1\n\nw2\n")
    places = [str(folder / word) if word in ("base", "other", "odd", "absent") else word for word in words]
    data = [] if "--data" in words else ["--data", folder / "texts"]
    assert run(*places, *data, "--out", tmp_path / "out", *LESS, *([] if "--window" in words else QUICK)) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("neuroweave: ")
    assert message in last
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]


def test_a_stopped_run_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the pass over the text: the next run of the same command does not read it again."""
    words = [folder / "base", folder / "other", "--data", folder / "texts", *QUICK, *LESS, "--card"]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "write_all", interrupted)
        assert run(*words, "--out", tmp_path / "out") == 130
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1] == (
        "neuroweave: stopped; what was measured is kept, the same command goes on with it"
    )
    assert re.search(r"^measuring: \d+ windows$", error, re.MULTILINE)
    assert not (tmp_path / "out").exists()
    reads: list[int] = []
    read = prediction.LiveReader.read
    monkeypatch.setattr(
        prediction.LiveReader, "read", lambda self, window, number: reads.append(number) or read(self, window, number)
    )
    assert run(*words, "--out", tmp_path / "out") == 0
    assert "going on with what an interrupted run has measured" in capsys.readouterr().err
    assert reads == []
    assert run(*words, "--out", tmp_path / "again") == 0
    assert reads
    first, second = (Comparison.read(tmp_path / name / "comparison.json") for name in ("out", "again"))
    assert first.model_dump(exclude={"environment"}) == second.model_dump(exclude={"environment"})
    assert "measured-so-far" not in {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


def test_a_broken_model_is_named_and_the_rest_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tiny_model()
    broken.model.layers[2].mlp.up_proj.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    out = tmp_path / "out"
    words = [folder / "base", folder / "other", tmp_path / "broken", "--data", folder / "texts", *QUICK, *LESS]
    assert run(*words, "--out", out) == 1
    error = capsys.readouterr().err
    assert "broken: Not measured (prediction): broken gives logits that are not numbers" in error
    assert "the output of layer 2" in error
    assert [other.model.name for other in Comparison.read(out / "comparison.json").others] == ["other"]
    assert (
        run(folder / "base", tmp_path / "broken", "--data", folder / "texts", *QUICK, "--out", out, "--overwrite") == 1
    )
    assert Comparison.read(out / "comparison.json").others == []
    assert (out / "report.html").is_file()


def test_names_tell_models_apart() -> None:
    assert compare_cli.name_models(["a/x", "b/y"]) == ["x", "y"]
    assert compare_cli.name_models(["a/x", "b/x", "c/y"]) == ["a/x", "b/x", "y"]
    assert compare_cli.name_models(["a/x", "a/x"]) == ["x (1)", "x (2)"]


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    assert "BASE OTHER [MORE ...]" in printed
    for name, default in [("tokens", 8192), ("window", 512)]:
        assert f"[default: {default}]" in printed
        from neuroweave.diagnose import Plan

        assert Plan.model_fields[name].default == default
