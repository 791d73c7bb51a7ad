"""One layer at a time: what a sensitivity run measures, how it ranks, what it keeps and refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import bootstrap
from tiny_llama import texts, tiny_model, tiny_tokenizer

from neuroweave.checkpoint import loading
from neuroweave.cli.main import main
from neuroweave.cli.sensitivity import check_result
from neuroweave.diagnose.report import frontier as report
from neuroweave.diagnose.results.records import Estimate
from neuroweave.diagnose.results.sweep import Outcome, Point, Sensitivity
from neuroweave.diagnose.variants import rank_layers, variant_plan
from neuroweave.surgery.patching import patch
from neuroweave.text import read_documents
from neuroweave.text.sample import draw_sample

QUICK = ("--tokens", "300", "--window", "32")
PLAN = variant_plan(tokens=300, window=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint `model` of seven layers, and a folder of texts."""
    root = tmp_path_factory.mktemp("sensitivity")
    seven().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "texts").mkdir()
    for text in texts():
        (root / "texts" / f"{text.name}.txt").write_text(text.text)
    return root


def seven() -> Any:
    """Layer 0, before all others, matters most; layer 5 is made to do nothing."""
    model = tiny_model(num_hidden_layers=7)
    with torch.no_grad():
        model.model.layers[5].mlp.down_proj.weight.zero_()
    return model


def run(folder: Path, out: Path, *words: object) -> int:
    options = ["sensitivity", folder / "model", "--data", folder / "texts", "--out", out, *QUICK, *words]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in options])
    return int(stop.value.code or 0)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "save_sensitivity", lambda *_, **__: [])


# --------------------------------------------------------------------------------------------------------- measured


def kl_by_hand(folder: Path, layer: int) -> float:
    """Mean KL in float64 NumPy of a fresh model with one layer patched."""
    documents = read_documents(folder / "texts")
    sample = draw_sample(documents, tiny_tokenizer(), tokens=300, window=32, passage=PLAN.passage)
    base, other = seven(), seven()
    patch(other, {"sites": [{"site": "mlp", "activation": "relu", "layers": [layer]}]})
    kl = count = 0.0
    for window in sample.windows:
        ids = torch.tensor([window.token_ids])
        with torch.no_grad():
            p, q = (log_softmax(model(ids).logits[0, :-1].double().numpy(), -1) for model in (base, other))
        kl += float((np.exp(p) * (p - q)).sum())
        count += len(p)
    return kl / count


def test_each_layer_is_changed_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(folder, out, "--activation", "relu") == 0
    printed = capsys.readouterr()
    result = Sensitivity.model_validate_json((out / "sensitivity.json").read_text())
    assert [point.settings.get("layer") for point in result.points] == [None, *range(7)]
    by_layer = {layer.layer: layer for layer in result.ranking}
    assert sorted(by_layer) == list(range(7))
    for number in (0, 2, 6):
        assert by_layer[number].kl.value == pytest.approx(kl_by_hand(folder, number), rel=1e-5)
    first, last = result.ranking[0], result.ranking[-1]
    assert (first.layer, first.rank, first.first, first.last) == (0, 1, 1, 1)
    assert (last.layer, last.rank, last.first, last.last) == (5, 7, 7, 7)
    assert (last.kl.value, last.kl.low, last.kl.high) == (0, 0, 0)
    outcome = next(point.outcome for point in result.points if point.settings.get("layer") == 0)
    assert outcome is not None
    zeros = {each.layer: each.zero.value for each in outcome.activations}
    assert 0.3 < zeros.pop(0) < 0.7
    assert set(zeros.values()) == {0.0}
    header, top, *_ = printed.out.splitlines()
    assert header.split("  ")[0] == "rank"
    assert top.split()[:3] == ["1", "1", "0"]
    assert sorted(path.name for path in out.iterdir()) == [
        f"sensitivity.{kind}" for kind in ("json", "jsonl", "png", "svg")
    ]
    svg = (out / "sensitivity.svg").read_text()
    assert "Sensitivity of each layer: mlp relu" in svg
    assert "the one layer that is changed" in svg


@pytest.mark.usefixtures("no_figures")
def test_layers_in_the_file_are_not_measured_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "layers.jsonl"
    assert run(folder, out, "--activation", "relu", "--layers", "every 3rd") == 0
    kept = out.read_bytes()
    assert kept.count(b"\n") == 1 + 1 + 3
    assert run(folder, out, "--activation", "relu", "--layers", "0-3") == 0
    assert "2 of 4 points are in" in capsys.readouterr().err
    assert out.read_bytes().startswith(kept)
    assert out.read_bytes().count(b"\n") == 1 + 1 + 5
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("nothing is left to be measured"))
    capsys.readouterr()
    assert run(folder, out, "--activation", "relu", "--layers", "2,3,6", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "layers.json").read_text())
    assert sorted(layer["layer"] for layer in printed["ranking"]) == [2, 3, 6]


@pytest.mark.usefixtures("no_figures")
def test_another_site_and_activation_are_other_points(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "layers.jsonl"
    for words in (["tanh"], ["gelu|silu"], ["tanh", "--site", "attention.v"]):
        assert run(folder, out, "--layers", "1", "--activation", *words) == 0
    points = [Point.model_validate_json(line) for line in out.read_text().splitlines()[1:]]
    assert [point.name for point in points[1:]] == [
        "layer=1, mlp.activation=tanh", "layer=1, mlp.activation=gelu|silu", "layer=1, attention.v.activation=tanh",
    ]  # fmt: skip
    assert len({point.outcome.kl.value for point in points if point.outcome}) == 4


# ----------------------------------------------------------------------------------------------------------- ranked


def a_layer(layer: int, sums: Sequence[float], counts: Sequence[int]) -> Point:
    one, kl = Estimate(value=1.0), Estimate(value=float(np.sum(sums) / np.sum(counts)))
    outcome = Outcome(
        perplexity=one, perplexity_ratio=one, kl=kl, kl_sums=list(sums), logit_cosine=one, top1_agreement=one
    )
    return Point(key=str(layer), name=str(layer), settings={"layer": layer}, outcome=outcome, seconds=0.0)


def test_layers_are_told_apart_unit_by_unit() -> None:
    """Units differ far more than layers do: alone, the layers' intervals overlap; paired they do not."""
    draw = np.random.default_rng(0)
    counts = draw.integers(50, 200, 40)
    level = draw.lognormal(0, 1, 40) * counts
    noise = draw.normal(0, 0.1, 40) * counts
    sums = {3: level, 0: level * 1.1, 9: level + noise, 4: level * 0.5}
    points = [a_layer(layer, each.tolist(), counts.tolist()) for layer, each in sums.items()]
    ranking = {layer.layer: layer for layer in rank_layers(points, counts.tolist(), plan=PLAN)}
    assert (ranking[0].rank, ranking[0].first, ranking[0].last) == (1, 1, 1)
    assert {ranking[3].rank, ranking[9].rank} == {2, 3}
    assert (ranking[3].first, ranking[3].last) == (ranking[9].first, ranking[9].last) == (2, 3)
    assert (ranking[4].rank, ranking[4].first, ranking[4].last) == (4, 4, 4)
    for one, other, apart in ((0, 3, True), (3, 9, False), (4, 9, True)):

        def difference(a: Any, b: Any, count: Any, axis: int = -1) -> Any:
            return (a.sum(axis) - b.sum(axis)) / count.sum(axis)

        found = bootstrap((sums[one], sums[other], counts), difference, paired=True, method="percentile", rng=1)
        low, high = found.confidence_interval
        assert (low > 0 or high < 0) == apart
    alone = bootstrap((sums[0], counts), lambda a, c, axis=-1: a.sum(axis) / c.sum(axis), paired=True, rng=1)
    assert alone.confidence_interval.low < sums[3].sum() / counts.sum()


def test_noise_is_what_the_middle_95_percent_hold() -> None:
    """Differences of exactly 1.5 and 2.7 standard errors: the first is within noise; the second is not, although a few
    of 2,000 draws turn it round."""
    noise = np.random.default_rng(1).normal(size=40)
    noise = (noise - noise.mean()) / noise.std()
    level, error = np.linspace(1, 9, 40), 1 / 40**0.5
    for errors, span in ((1.5, (1, 2)), (2.7, (1, 1))):
        above = level + 0.1 * (noise + errors * error)
        points = [a_layer(0, (100 * above).tolist(), [100] * 40), a_layer(1, (100 * level).tolist(), [100] * 40)]
        ranking = rank_layers(points, [100] * 40, plan=PLAN)
        assert (ranking[0].layer, ranking[0].first, ranking[0].last) == (0, *span)
        found = bootstrap((above - level,), np.mean, method="percentile", rng=1)
        assert (found.confidence_interval.low > 0) == (span == (1, 1))
        assert found.bootstrap_distribution.min() < 0


def test_equal_layers_share_their_ranks_and_one_unit_has_none() -> None:
    counts = [10, 20, 30, 10, 20, 30]
    all_sums = ((1, [1.0, 2, 3] * 2), (0, [1.0, 2, 3] * 2), (2, [9.0] * 6))
    points = [a_layer(layer, sums, counts) for layer, sums in all_sums]
    ranking = rank_layers(points, counts, plan=PLAN)
    assert [(layer.layer, layer.rank, layer.first, layer.last) for layer in ranking] == [
        (2, 1, 1, 1), (0, 2, 2, 3), (1, 3, 2, 3),
    ]  # fmt: skip
    single = rank_layers([a_layer(0, [1.0], [5]), a_layer(1, [2.0], [5])], [5], plan=PLAN)
    assert [(layer.layer, layer.rank, layer.first, layer.last) for layer in single] == [
        (1, 1, None, None),
        (0, 2, None, None),
    ]
    assert rank_layers([], counts, plan=PLAN) == []


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_json_that_is_no_ranking_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    check_result(path, overwrite=False)
    for text in ("mine", "[]", '{"heading": {}, "points": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a ranking of layers"):
            check_result(path, overwrite=False)
        check_result(path, overwrite=True)
    path.write_text('{"heading": {}, "points": [], "ranking": []}')
    check_result(path, overwrite=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--activation", "rellu"], "activation 'rellu' is not known (did you mean 'relu'?)"),
        (["--activation", " "], "--activation is empty"),
        (["--activation", "original"], "--activation original changes nothing"),
        (["--activation", "relu", "--layers", "5-7"], "layer 7 does not exist: the model has layers 0 to 6"),
        (["--activation", "relu", "--layers", "first"], 'layers is "all", a list of numbers'),
        (["--activation", "relu", "--layers", ""], 'layers is "all", a list of numbers'),
        (["--activation", "relu", "--site", "head"], "--site head: no site of a layer"),
        (["--activation", "relu", "--site", "mlp.gat"], "no site of a layer (did you mean 'mlp.gate'?)"),
        (["--activation", "relu", "--window", "99"], "--window 99 is more than the model can read (64)"),
        (["--activation", "relu", "--tokens", "385"], "the text holds only 384 tokens in usable windows of the 385"),
    ],
)  # fmt: skip
def test_refused_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: list[str], told: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("refused before the model is loaded"))
    assert run(folder, tmp_path / "points.jsonl", *words) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
