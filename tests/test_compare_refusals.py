"""`neuroweave compare` on bad input: refused before anything is measured; what was measured is kept when it fails."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny_llama import WITHOUT_SPEED, changed, subject, texts, tiny_model, tiny_tokenizer

from neuroweave.cli import compare as compare_cli
from neuroweave.cli.main import main
from neuroweave.diagnose import Comparison, Ledger, compare, preflight
from neuroweave.diagnose.bootstrap import LEAST_UNITS
from neuroweave.diagnose.probes import prediction, tasks
from neuroweave.diagnose.report import verdict
from neuroweave.text.sample import draw_sample

QUICK = ["--window", "32", "--tokens", "300", "--no-speed", "--no-gradients", "--no-sampling", "--no-weights"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that can be compared and models that cannot, and a folder of texts."""
    root = tmp_path_factory.mktemp("refusals")
    base = tiny_model()
    odd = tiny_tokenizer(words=[f"v{n}" for n in range(120)])
    for name, model, tokenizer in [
        ("base", base, tiny_tokenizer()),
        ("other", changed(base, 0.3), tiny_tokenizer()),
        ("odd", base, odd),
        ("start", base, tiny_tokenizer(start=True)),
        ("wide", tiny_model(vocab_size=128), tiny_tokenizer()),
        ("short", tiny_model(max_position_embeddings=16), tiny_tokenizer()),
    ]:
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name in ("bare", "cut", "list"):
        shutil.copytree(root / "base", root / name)
    (root / "bare" / "model.safetensors").unlink()
    (root / "cut" / "config.json").write_text((root / "base" / "config.json").read_text()[:99])
    (root / "list" / "config.json").write_text("[]")
    (root / "texts").mkdir()
    for text in texts():
        (root / "texts" / f"{text.name}.txt").write_text(text.text)
    return root


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than measuring a tiny model, and is tested elsewhere."""
    monkeypatch.setattr(
        compare_cli, "write_outputs", lambda comparison, out, **_: comparison.write(out / "comparison.json")
    )


def run(folder: Path, out: Path, *words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, words), "--data", str(folder / "texts"), "--out", str(out), *QUICK])
    return int(stop.value.code or 0)


# ------------------------------------------------------------------------------------- refused before a weight is read


@pytest.mark.parametrize(
    ("other", "words", "message"),
    [
        ("odd", (), "odd has another vocabulary than base"),
        ("start", (), "start cuts the same text into other tokens than base"),
        ("wide", (), "wide predicts over 128 entries and base over 123"),
        ("short", (), "a window of 32 tokens is more than short can read (16)"),
        ("bare", (), "no weights in this folder; expected model.safetensors, or shards with an index"),
        ("cut", (), "config.json' is not a valid JSON file"),
        ("list", (), "Unrecognized model in"),
        ("other", ("--prompts", "long.txt"), "(30 tokens) and 40 new tokens are more than base can read (64)"),
        ("other", ("--tasks", "task.yaml"), "task.yaml: not YAML that can be read"),
        ("other", ("--tasks", "./absent.yaml"), "absent.yaml: no such file or folder"),
    ],
)
@pytest.mark.parametrize("apart", [True, False])
def test_what_cannot_be_compared_is_refused_before_a_weight_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, apart: bool,
    other: str, words: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("w1 " * 30)
    Path("task.yaml").write_text("task: [unclosed\n x: {")
    monkeypatch.setattr(compare_cli, "load_subject", lambda *_: pytest.fail("a model was loaded"))
    more = ["--one-by-one"] if apart else []
    assert run(folder, tmp_path / "out", folder / "base", folder / other, *words, *more) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt", "task.yaml"]


def test_benchmarks_are_loaded_before_a_weight_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_cli, "load_subject", lambda *_: pytest.fail("a model was loaded"))
    words = [folder / "base", folder / "other", "--tasks", "neuroweave_continuation"]
    assert run(folder, tmp_path / "out", *words, "--limit", "1000000") == 2
    assert "a limit of 1000000 questions is more than there are" in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    assert run(folder, tmp_path / "out", *words) == 2
    assert 'benchmarks need lm_eval: pip install "neuroweave[eval]"' in capsys.readouterr().err


def test_the_shipped_prompts_are_not_refused_where_they_do_not_fit() -> None:
    from neuroweave.diagnose import Plan

    plan = Plan(tokens=100, window=16)
    outlines = [subject(name, tiny_model(max_position_embeddings=16)) for name in ("base", "other")]
    preflight.check_models(outlines, texts(), plan)
    with pytest.raises(ValueError, match="are more than base can read"):
        preflight.check_models(outlines, texts(), plan.model_copy(update={"prompts": ("w1",)}))


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfw1 w2\r\nw3\r\n")
    assert compare_cli.read_prompts(tmp_path / "prompts.txt") == ("w1 w2", "w3")


# ------------------------------------------------------------------------------------------------ files of other people


def test_overwrite_takes_nothing_away_that_no_comparison_wrote(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [folder / "base", folder / "base"]
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / "comparison.json").write_text("{")
    for name, text in (("notes.txt", "mine"), ("README.md", "# mine")):
        (out / name).write_text(text)
        assert run(folder, out, *words, "--overwrite") == 2
        assert f"{name}: not written by a comparison" in capsys.readouterr().err
        assert (out / name).read_text() == text
        (out / name).unlink()
    (out / "README.md").write_text("---\ntags:\n- neuroweave\n---\n\n# A card\n")
    assert run(folder, out, *words, "--overwrite") == 0
    assert [path.name for path in out.iterdir()] == ["comparison.json"]


# ----------------------------------------------------------------------------------------- what was measured is kept


def test_a_full_disk_at_the_end_costs_nothing_that_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = [folder / "base", folder / "other"]
    with monkeypatch.context() as patched:
        patched.setattr(compare_cli, "write_outputs", full)
        assert run(folder, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert "what was measured until now is kept; the same command goes on with it" in error
    assert error.strip().endswith("neuroweave: [Errno 28] No space left on device")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(prediction.LiveReader, "read", lambda *_: pytest.fail("the text was read again"))
    assert run(folder, tmp_path / "out", *words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_damaged_part_of_the_ledger_is_measured_again(tmp_path: Path, damage: bytes) -> None:
    ledger = Ledger(tmp_path)
    assert not ledger.holds_any
    ledger.keep_arrays("a", {"x": np.arange(7)})
    assert ledger.holds_any
    [file] = (tmp_path / "measured-so-far").iterdir()
    whole = file.read_bytes()
    for content in (damage, whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(content)
        assert ledger.arrays("a") is None
    file.write_bytes(whole)
    assert ledger.arrays("a") is not None


def test_a_task_file_that_was_edited_is_another_comparison(tmp_path: Path) -> None:
    def state() -> Any:
        return compare_cli.task_state(compare_cli.make_plan(**given))

    (tmp_path / "d.jsonl").write_text('{"q": "w1"}\n')
    task = "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: d.jsonl}\ndoc_to_text: '{{q}}'\n"
    (tmp_path / "t.yaml").write_text(task)
    names = ("prompts", "tokens", "window", "limit")
    flags = ("no_signal", "no_gradients", "no_sampling", "no_weights", "no_speed")
    given: dict[str, Any] = dict.fromkeys(names) | dict.fromkeys(flags, False) | {"tasks": [str(tmp_path / "t.yaml")]}
    first = state()
    assert state() == first
    (tmp_path / "t.yaml").write_text(task.replace("{{q}}", "{{q}}?"))
    second = state()
    (tmp_path / "d.jsonl").write_text('{"q": "w1 w2"}\n')
    assert len({json.dumps(each) for each in (first, second, state())}) == 3


# ------------------------------------------------------------------------------------------ what few texts allow to say


@pytest.mark.parametrize("units", [LEAST_UNITS - 1, LEAST_UNITS])
def test_no_direction_is_named_from_too_few_texts(units: int) -> None:
    """A model that is far too sure of itself does worse on every text, which five are too few to call a finding."""
    base, other = tiny_model(), tiny_model()
    other.lm_head.weight.data *= 9
    plan = WITHOUT_SPEED.model_copy(update={"tokens": 40 * units, "gradient": None, "sampling": None})
    comparison = compare(subject("base", base), [subject("other", other)], texts(units), plan=plan)
    assert comparison.text.units == units
    said = " ".join(verdict.sentences(comparison, comparison.others[0]))
    few = units < LEAST_UNITS
    assert ("too little text was read for an interval" in said) == few
    assert ("It predicts this text worse" in said) == (not few)
    assert any("too little for intervals" in note for note in comparison.notes) == few


def test_intervals_against_numpy_and_scipy() -> None:
    """Perplexity ratio from logits of the two models by a bootstrap over texts that shares nothing with ours."""
    base = tiny_model()
    models, documents = (base, changed(base, 0.3)), texts(12)
    plan = WITHOUT_SPEED.model_copy(update={"gradient": None, "sampling": None, "resamples": 4000})
    comparison = compare(subject("base", base), [subject("other", models[1])], documents, plan=plan)
    sample = draw_sample(documents, tiny_tokenizer(), tokens=plan.tokens, window=plan.window, passage=plan.passage)
    gaps, counts = np.zeros(len(sample.passages)), np.zeros(len(sample.passages))
    for window in sample.windows:
        ids = np.array(window.token_ids)
        losses = []
        for model in models:
            logits = model(prediction.torch.tensor(ids)[None]).logits[0, :-1].detach().double().numpy()
            log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            losses.append(-log_p[np.arange(len(ids) - 1), ids[1:]].sum())
        gaps[window.unit] += losses[1] - losses[0]
        counts[window.unit] += len(ids) - 1
    found = comparison.others[0].difference.perplexity_ratio
    assert found.value == pytest.approx(np.exp(gaps.sum() / counts.sum()), rel=1e-9)
    wanted = stats.bootstrap(
        (gaps, counts), lambda gap, count, axis: np.exp(gap.sum(axis) / count.sum(axis)), paired=True, vectorized=True,
        method="percentile", n_resamples=20_000, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert found.low is not None
    assert found.high is not None
    width = wanted.high - wanted.low
    assert found.low == pytest.approx(wanted.low, abs=0.06 * width)
    assert found.high == pytest.approx(wanted.high, abs=0.06 * width)


def test_a_stored_comparison_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    for content, message in [
        (b"{", "the file: Invalid JSON"),
        (b"", "the file: Invalid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b'{"schema_version": 3}', "schema_version: Input should be 2"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Comparison.read(path)
