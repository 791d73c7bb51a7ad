"""Many changes of one model: what a sweep measures, keeps, takes up again, undoes and refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from tiny_llama import subject, texts, tiny_model, tiny_tokenizer

from neuroweave.checkpoint import loading
from neuroweave.cli.main import main
from neuroweave.cli.sweep import Change, Fusions, merged_recipe, parse_vary
from neuroweave.diagnose import Ledger, Subject, variants
from neuroweave.diagnose.report import frontier as report
from neuroweave.diagnose.results.sweep import BASE, Heading, ModelUsed, Point, PointsFile
from neuroweave.diagnose.variants import (
    Variant,
    frontier,
    make_heading,
    measure_into,
    measure_variants,
    on_frontier,
    scratch_beside,
    variant_plan,
)
from neuroweave.surgery.fusion.fuse import fuse_checkpoint
from neuroweave.surgery.fusion.generated import generated_deltas
from neuroweave.surgery.fusion.plan import FuseOptions
from neuroweave.surgery.neurons.bank import default_bank_path
from neuroweave.surgery.patching import patch
from neuroweave.surgery.recipe import Recipe
from neuroweave.text.sample import draw_sample

QUICK = ("--tokens", "300", "--window", "32")
PLAN = variant_plan(tokens=300, window=32, resamples=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints `model` and `other`, and a folder of texts."""
    root = tmp_path_factory.mktemp("sweep")
    for seed, name in enumerate(("model", "other")):
        tiny_model(seed).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    (root / "texts").mkdir()
    for text in texts():
        (root / "texts" / f"{text.name}.txt").write_text(text.text)
    return root


@pytest.fixture(autouse=True)
def figures_where_they_are_tested(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than measuring a tiny model; the first test draws."""
    if "by_hand" not in request.node.name:
        monkeypatch.setattr(report, "save_frontiers", lambda *_, **__: [])


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


def sweep(folder: Path, out: Path, *words: object, model: str = "model") -> int:
    return run("sweep", folder / model, "--data", folder / "texts", "--out", out, *QUICK, *words)


def read(path: Path) -> tuple[Heading, dict[str, Point]]:
    """The heading, and the points by name; the unchanged model's is `base`."""
    first, *lines = path.read_text().splitlines()
    points = [Point.model_validate_json(line) for line in lines]
    return Heading.model_validate_json(first), {BASE if point.key == BASE else point.name: point for point in points}


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits.numpy()


# ------------------------------------------------------------------------------------------------- what is measured


def by_hand(folder: Path, change: Any) -> dict[str, float]:
    """KL, perplexity ratio and share of zeros in float64 NumPy, over all windows but their last positions."""
    sample = draw_sample(documents(folder), tiny_tokenizer(), tokens=300, window=32, passage=PLAN.passage)
    base, other = tiny_model(), tiny_model()
    change(other)
    zeros: list[float] = []
    for layer in other.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs: zeros.append(float((inputs[0][0, :-1] == 0).double().mean()))
        )
    kl = gap = count = 0.0
    shares: list[float] = []
    for window in sample.windows:
        ids = torch.tensor([window.token_ids])
        with torch.no_grad():
            p, q = (log_softmax(model(ids).logits[0, :-1].double().numpy(), -1) for model in (base, other))
        kl += float((np.exp(p) * (p - q)).sum())
        at = np.arange(len(p)), np.array(window.token_ids[1:])
        gap += float((p[at] - q[at]).sum())
        shares.append(float(np.mean(zeros)) * len(p))
        zeros.clear()
        count += len(p)
    return {"kl": kl / count, "ratio": float(np.exp(gap / count)), "zero": sum(shares) / count}


def documents(folder: Path) -> list[Any]:
    from neuroweave.text import read_documents

    return read_documents(folder / "texts")


def test_a_grid_is_measured_as_by_hand(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ("--vary", "mlp.activation=relu, gelu", "--vary", "attention.q.activation=original,tanh")
    assert sweep(folder, out, *words) == 0
    printed = capsys.readouterr()
    heading, points = read(out / "sweep.jsonl")
    assert list(points) == [
        BASE,
        "mlp.activation=relu, attention.q.activation=original",
        "mlp.activation=relu, attention.q.activation=tanh",
        "mlp.activation=gelu, attention.q.activation=original",
        "mlp.activation=gelu, attention.q.activation=tanh",
    ]
    assert sum(heading.predictions) == heading.text.predictions
    assert (heading.plan.speed, heading.plan.gradient, heading.plan.sampling, heading.plan.weights) == (None,) * 3 + (
        False,
    )
    for name, sites in {
        "mlp.activation=relu, attention.q.activation=original": {"mlp": "relu"},
        "mlp.activation=gelu, attention.q.activation=tanh": {"mlp": "gelu", "attention.q": "tanh"},
    }.items():
        recipe = {"sites": [{"site": site, "activation": activation} for site, activation in sites.items()]}
        wanted = by_hand(folder, lambda model, recipe=recipe: patch(model, recipe))
        outcome = points[name].outcome
        assert outcome is not None
        assert outcome.zero is not None
        assert outcome.kl.value == pytest.approx(wanted["kl"], rel=1e-5)
        assert outcome.perplexity_ratio.value == pytest.approx(wanted["ratio"], rel=1e-5)
        assert outcome.zero.value == pytest.approx(wanted["zero"], abs=1e-12)
        assert outcome.kl.low is not None
        assert outcome.kl.low < outcome.kl.value
        assert sum(outcome.kl_sums) == pytest.approx(outcome.kl.value * sum(heading.predictions), rel=1e-12)
        assert len(outcome.activations) == 3
    base = points[BASE].outcome
    assert base is not None
    assert (base.kl.value, base.perplexity_ratio.value) == (0, 1)
    relu = points["mlp.activation=relu, attention.q.activation=original"].outcome
    assert relu is not None
    assert relu.perplexity.value / base.perplexity.value == pytest.approx(relu.perplexity_ratio.value, rel=1e-9)
    header, *rows = printed.out.splitlines()
    assert header.split() == ["settings", "perplexity", "ratio", "KL", "zeros", "near", "zeros", "frontier"]
    assert rows[0].split()[:2] == ["model", "(unchanged)"]
    by_kl = sorted((point.outcome.kl.value, name) for name, point in points.items() if point.outcome and name != BASE)
    for number, (row, (_, name)) in enumerate(zip(rows[1:], by_kl, strict=True), start=1):
        assert row.startswith(f"{number}  {name} ")
        assert f"{number}  {name[:10]}" in (out / "sweep-perplexity.svg").read_text()
    figures = sorted(path.name for path in out.iterdir() if path.suffix in (".svg", ".png"))
    assert figures == [f"sweep-{name}.{kind}" for name in ("perplexity", "sparsity") for kind in ("png", "svg")]


def test_the_models_own_activation_changes_nothing(folder: Path, tmp_path: Path) -> None:
    words = ("--vary", "mlp.activation=original,silu", "--vary", "fuse.alpha=0", "--vary", "fuse.gamma_cap=0")
    assert sweep(folder, tmp_path / "points.jsonl", *words) == 0
    _, points = read(tmp_path / "points.jsonl")
    for name in ("original", "silu"):
        outcome = points[f"mlp.activation={name}, fuse.alpha=0, fuse.gamma_cap=0"].outcome
        assert outcome is not None
        assert outcome.kl.model_dump() == {"value": 0, "low": 0, "high": 0}
        assert outcome.perplexity_ratio.model_dump() == {"value": 1, "low": 1, "high": 1}


def test_a_recipe_is_where_every_point_begins(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("sites:\n- {site: [mlp, attention.v], activation: tanh, layers: [1]}\n")
    assert sweep(folder, tmp_path / "points.jsonl", "--recipe", recipe, "--vary", "mlp.activation=relu") == 0
    _, points = read(tmp_path / "points.jsonl")
    point = points[f"recipe={recipe}, mlp.activation=relu"]
    assert point.outcome is not None
    made = {"sites": [
        {"site": "attention.v", "activation": "tanh", "layers": [1]},
        {"site": "mlp", "activation": "relu", "layers": [1]},
    ]}  # fmt: skip
    assert point.outcome.kl.value == pytest.approx(by_hand(folder, lambda model: patch(model, made))["kl"], rel=1e-5)


def test_too_few_units_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(folder, tmp_path / "p.jsonl", "--vary", "mlp.activation=relu", "--tokens", "60") == 0
    assert "units of text: 2, too few for intervals" in capsys.readouterr().err
    assert all(point.outcome and point.outcome.kl.low is None for point in read(tmp_path / "p.jsonl")[1].values())
    assert sweep(folder, tmp_path / "r.jsonl", "--vary", "mlp.activation=relu", "--tokens", "190") == 0
    assert "units of text: 6, the intervals are likely too narrow" in capsys.readouterr().err
    assert sweep(folder, tmp_path / "q.jsonl", "--vary", "mlp.activation=relu") == 0
    assert "too narrow" not in capsys.readouterr().err


def test_two_runs_at_once_do_not_mix(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused while the first measures; one that read the file before the first was done, too."""
    out, words = tmp_path / "points.jsonl", ("--vary", "mlp.activation=relu")
    with scratch_beside(out) as scratch:
        (scratch / "state").write_text("of the first run")
        assert sweep(folder, out, *words) == 2
        assert "another run is measuring into this file" in capsys.readouterr().err
        assert (scratch / "state").read_text() == "of the first run"
    assert not scratch.exists()

    def late(file: PointsFile, *_: object) -> Iterator[Point]:
        monkeypatch.undo()
        assert sweep(folder, out, *words) == 0  # the other run, from its beginning to its end
        return measure_into(file, *_)

    monkeypatch.setattr(variants, "measure_into", late)
    assert sweep(folder, out, "--vary", "mlp.activation=tanh") == 2
    assert "another run has written to this file meanwhile" in capsys.readouterr().err
    assert set(read(out)[1]) == {BASE, "mlp.activation=relu"}
    assert sweep(folder, out, "--vary", "mlp.activation=tanh") == 0
    assert set(read(out)[1]) == {BASE, "mlp.activation=relu", "mlp.activation=tanh"}


def test_a_killed_runs_scratch_is_taken_over(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / ".points.jsonl.scratch" / "measured-so-far"
    left.mkdir(parents=True)
    (left / "old.npz").write_bytes(b"")
    assert sweep(folder, tmp_path / "points.jsonl", "--vary", "mlp.activation=relu") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["points.jsonl"]


def test_the_point_that_changes_nothing_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--vary", "mlp.activation=relu,tanh", "--vary", "everywhere.activation=original,relu")
    assert sweep(folder, tmp_path / "points.jsonl", *words) == 2
    assert "mlp.activation=relu, everywhere.activation=original: recipe" in capsys.readouterr().err


def test_a_site_that_the_recipe_lacks_is_added() -> None:
    start = Recipe.parse({"name": "r", "sites": [{"site": "mlp", "activation": "relu", "layers": [0]}]})
    merged = merged_recipe(start, {"attention.q": "tanh", "head": "silu"}, "1-2")
    assert merged is not None
    assert [(edit.site, edit.activation, edit.layers) for edit in merged.sites] == [
        (["mlp"], "relu", [0]), (["attention.q"], "tanh", "1-2"), (["head"], "silu", "all"),
    ]  # fmt: skip
    assert merged_recipe(start, {"mlp": "original"}, "all") is None
    assert merged_recipe(None, {}, "all") is None


# ------------------------------------------------------------------------------------------------- fusing in memory


@pytest.mark.parametrize(
    ("stored", "computed"), [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")]
)
@pytest.mark.parametrize("numbers", [
    {"alpha": 0.5},
    {"alpha": 0.1, "alpha_mode": "relative", "gamma_cap": 0.2, "gate_scale": 0.4},
    {"alpha": 2.0, "rounding": "stochastic"},
])  # fmt: skip
def test_fusing_in_memory_gives_the_weights_of_the_fused_folder(
    tmp_path: Path, stored: str, computed: str, numbers: dict[str, Any]
) -> None:
    source = tmp_path / "model"
    tiny_model().to(getattr(torch, stored)).save_pretrained(source)
    model, _ = loading.load_model(source, dtype=computed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fusion = Fusions(source, model, layers="1-2", bank="default", seed=7).get(**numbers)
    options = {key: value for key, value in numbers.items() if key != "gate_scale"}
    scale = {"gate_scale": numbers["gate_scale"]} if "gate_scale" in numbers else {}
    deltas = generated_deltas(source, default_bank_path(), seed=7, **scale)
    fuse_checkpoint(source, tmp_path / "fused", deltas, FuseOptions(layers=(1, 2), seed=7, **options))
    wanted, _ = loading.load_model(tmp_path / "fused", dtype=computed)
    with fusion.applied(model):
        inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name for name in before if not same_bytes(before[name], inside[name])}
    assert changed == {f"model.layers.{n}.mlp.{each}_proj.weight" for n in (1, 2) for each in ("gate", "down")}
    for name, tensor in wanted.state_dict().items():
        assert same_bytes(inside[name], tensor), name
    for name, tensor in model.state_dict().items():
        assert same_bytes(before[name], tensor), name


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
        if a.dtype != torch.bfloat16
        else torch.equal(a.view(torch.int16), b.view(torch.int16))
    )


def test_a_change_is_undone_to_the_bit_also_after_an_error(folder: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = -0.0
    weights = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    own = logits(model)
    source = folder / "own"
    model.save_pretrained(source)
    base = Subject("tiny", model, tiny_tokenizer(), str(source))
    change = Change(
        {"x": "y"},
        Recipe.parse({"sites": [{"site": "everywhere", "activation": "relu"}]}),
        Fusions(source, model, layers="all", bank="default", seed=1).get(alpha=3.0),
    )

    def fail_inside() -> None:
        with change.variant(base).applied() as changed:
            assert changed.model is model
            assert not np.allclose(logits(changed.model), own)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail_inside()
    assert {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()} == weights
    assert logits(model).tobytes() == own.tobytes()
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_model_that_is_not_the_file_is_not_fused(folder: Path) -> None:
    model = tiny_model()
    fusion = Fusions(folder / "model", model, layers="all", bank="default", seed=1).get(alpha=1.0)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 3] += 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = r"layers\.2\.mlp\.down_proj\.weight: the model in memory has other weights"
    with pytest.raises(ValueError, match=told), fusion.applied(model):
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ----------------------------------------------------------------------------------- variants that do not go as planned


def in_place(base: Subject, write: Any) -> Any:
    """A context that writes into the model's weights and takes it back."""

    def applied() -> AbstractContextManager[Subject]:
        @contextmanager
        def changed() -> Iterator[Subject]:
            kept = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
            try:
                with torch.no_grad():
                    write(base.model)
                yield base
            finally:
                base.model.load_state_dict(kept)

        return changed()

    return applied


def scaled_down(factor: float) -> Any:
    def write(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight.mul_(factor)

    return write


def test_a_variant_that_fails_is_a_point_and_not_the_end(tmp_path: Path) -> None:
    base = subject("tiny", tiny_model())

    def stop(model: Any) -> None:
        raise RuntimeError("no room")

    def write_head(model: Any) -> None:
        model.lm_head.weight.mul_(1.5)

    writes = {
        "good": scaled_down(2),
        "nan": scaled_down(float("nan")),
        "broken": stop,
        "head": write_head,
        "last": scaled_down(2),
    }
    variants = [Variant(name, {"x": name}, in_place(base, write)) for name, write in writes.items()]
    points = {
        point.name: point for point in measure_variants(base, texts(), variants, plan=PLAN, ledger=Ledger(tmp_path))
    }
    assert points["nan"].outcome is None
    assert points["nan"].failure == (
        "nan gives logits that are not numbers (window 0, position 0 of it); the first hidden state that is not finite "
        "is the output of layer 1"
    )
    assert points["broken"].failure == "no room"
    assert "writes into the weights of the output head" in (points["head"].failure or "")
    good, last = points["good"].outcome, points["last"].outcome
    assert good is not None
    assert good == last  # what came between has left no trace
    assert good.kl.value > 0
    assert points["tiny"].key == BASE


def test_without_signal_there_is_no_sparsity(tmp_path: Path) -> None:
    base = subject("tiny", tiny_model())
    plan = PLAN.model_copy(update={"signal": False})
    variant = Variant("half", {"x": 1}, in_place(base, scaled_down(0.5)))
    first, second = measure_variants(base, texts(), [variant], plan=plan, ledger=Ledger(tmp_path))
    assert first.outcome is not None
    assert second.outcome is not None
    assert (second.outcome.zero, second.outcome.activations) == (None, [])
    assert on_frontier([first, second]) == {BASE: [], second.key: ["perplexity"]}


def test_numbers_that_do_not_fit_are_a_failure(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--vary", "fuse.alpha=1e39,1")
    assert sweep(folder, tmp_path / "out", *words) == 1
    printed = capsys.readouterr()
    _, points = read(tmp_path / "out" / "sweep.jsonl")
    assert points["fuse.alpha=1"].outcome is not None
    assert points["fuse.alpha=1e+39"].outcome is None
    assert f"fuse.alpha=1e+39: could not be measured: {points['fuse.alpha=1e+39'].failure}" in printed.err
    assert "fuse.alpha=1e+39" not in printed.out


# ------------------------------------------------------------------------------------------------------ taken up again


def test_points_in_the_file_are_not_measured_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "points.jsonl"
    assert sweep(folder, out, "--vary", "mlp.activation=relu") == 0
    first = out.read_bytes()
    assert sweep(folder, out, "--vary", "mlp.activation=gelu,relu") == 0
    assert "1 of 2 points are in" in capsys.readouterr().err
    second = out.read_bytes()
    assert second.startswith(first)
    assert list(read(out)[1]) == [BASE, "mlp.activation=relu", "mlp.activation=gelu"]
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("nothing is left to be measured"))
    capsys.readouterr()
    assert sweep(folder, out, "--vary", "mlp.activation=relu,gelu", "--json") == 0
    assert out.read_bytes() == second
    printed = json.loads(capsys.readouterr().out)
    assert printed["points"][0]["name"] == "model"
    assert {name for point in printed["points"] for name in point["frontier"]} == {"perplexity", "sparsity"}
    assert printed["heading"]["model"]["sha256"] == read(out)[0].model.sha256


def test_a_half_written_line_is_measured_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "points.jsonl"
    words = ("--vary", "mlp.activation=relu,gelu")
    assert sweep(folder, out, *words) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:-40])
    assert sweep(folder, out, *words) == 0
    again = read(out)[1]["mlp.activation=gelu"]
    kept = Point.model_validate_json(whole.splitlines()[-1])
    assert again.model_copy(update={"seconds": 0.0}) == kept.model_copy(update={"seconds": 0.0})
    lines = out.read_bytes().split(b"\n")
    assert lines[:3] == whole.split(b"\n")[:3]
    assert (len(lines), lines[4]) == (5, b"")


def a_heading() -> Heading:
    model = ModelUsed(name="tiny", source="", sha256="0", dtype="float32", device="cpu")
    return make_heading("sweep", model, tiny_tokenizer(), texts(), plan=PLAN)


def a_point(name: str) -> Point:
    return Point(key=name, name=name, settings={"x": name}, failure="none of it fits", seconds=1.5)


def test_a_file_is_read_back_whatever_it_was_cut_to(tmp_path: Path) -> None:
    path, heading = tmp_path / "points.jsonl", a_heading()
    file = PointsFile(path, heading)
    assert not path.exists()
    for name in "abc":
        file.append(a_point(name))
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    assert list(PointsFile(path, heading).points.values()) == [a_point(name) for name in "abc"]
    for length in range(ends[0], len(whole)):
        path.write_bytes(whole[:length])
        cut = PointsFile(path, heading)
        assert list(cut.points) == list("abc")[: sum(end <= length for end in ends) - 1]
        assert path.stat().st_size == length  # nothing is written by reading
    cut.append(a_point("d"))
    assert list(PointsFile(path, heading).points) == ["a", "b", "d"]
    path.write_bytes(whole[: ends[0] - 1])
    PointsFile(path, heading).append(a_point("e"))
    assert list(PointsFile(path, heading).points) == ["e"]


def test_damaged_files_are_refused_and_overwrite_begins_anew(tmp_path: Path) -> None:
    path, heading = tmp_path / "points.jsonl", a_heading()
    first, a, b = (f"{line.model_dump_json()}\n".encode() for line in (heading, a_point("a"), a_point("b")))
    for content, told in [
        (b"my notes\n" + a, "not a file of points of schema version 1"),
        (b"my notes", "not a file of points of schema version 1"),
        (first.replace(b'"schema_version":1', b'"schema_version":7'), "schema_version: input should be 1"),
        (first + a[:50] + b"\n" + b, "line 2: damaged"),
        (first + a + b.replace(b'"settings"', b'"set"'), "line 3: not a point"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=told):
            PointsFile(path, heading)
        assert path.read_bytes() == content
        PointsFile(path, heading, overwrite=True).append(a_point("b"))
        assert path.read_bytes() == first + b
    assert [each.name for each in tmp_path.iterdir()] == ["points.jsonl"]


def test_ctrl_c_keeps_what_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "points.jsonl"
    out.parent.mkdir()
    words = ("--vary", "mlp.activation=relu,gelu,tanh")

    def interrupted(self: Change, base: Subject, make: Any = Change.variant) -> Variant:
        variant = make(self, base)
        if "gelu" not in variant.name:
            return variant

        @contextmanager
        def applied() -> Iterator[Subject]:
            with variant.applied():
                raise KeyboardInterrupt
            yield

        return Variant(variant.name, variant.settings, applied, variant.change)

    with monkeypatch.context() as patched:
        patched.setattr(Change, "variant", interrupted)
        assert sweep(folder, out, *words) == 130
    kept = out.read_bytes()
    assert list(read(out)[1]) == [BASE, "mlp.activation=relu"]
    assert [path.name for path in out.parent.iterdir()] == ["points.jsonl"]  # no scratch folder is left
    assert sweep(folder, out, *words) == 0
    assert out.read_bytes().startswith(kept)
    assert list(read(out)[1]) == [BASE, *(f"mlp.activation={name}" for name in ("relu", "gelu", "tanh"))]
    assert "1 of 3 points" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "points.jsonl"
    vary = ("--vary", "mlp.activation=relu")
    assert sweep(folder, out, *vary) == 0
    before = out.read_bytes()
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("refused before the model is loaded"))
    (tmp_path / "texts").mkdir()
    for text in texts(seed=5):
        (tmp_path / "texts" / f"{text.name}.txt").write_text(text.text)
    given = {"model": folder / "model", "--data": folder / "texts", "--tokens": 300, "--window": 32, "--dtype": "auto"}
    for other, told in [
        ({"model": folder / "other"}, "model model ("),
        ({"--tokens": 299}, "tokens 300, not 299"),
        ({"--window": 16}, "window 32, not 16"),
        ({"--data": tmp_path / "texts"}, "text of 10 units ("),
        ({"--dtype": "bfloat16"}, "dtype float32, not bfloat16"),
        ({"command": "sensitivity", "--activation": "relu"}, "command sweep, not sensitivity"),
    ]:
        options = {"command": "sweep"} | given | other
        words = [options.pop("command"), options.pop("model"), *itertools.chain(*options.items())]
        words += [] if "--activation" in options else vary
        capsys.readouterr()
        assert run(*words, "--out", out) == 2
        message = capsys.readouterr().err
        assert f"its points were measured with {told}" in message
        assert "choose another file, or add --overwrite" in message
        assert out.read_bytes() == before


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to vary: give --vary KEY=VALUE,VALUE; known keys: mlp.activation, "),
        (["--vary", "mlp.activation"], "--vary takes KEY=VALUE,VALUE, got 'mlp.activation'"),
        (["--vary", "mlp.activaton=relu"], "--vary mlp.activaton: not known (did you mean 'mlp.activation'?); known: "),
        (["--vary", "fuse.beta=1"], "--vary fuse.beta: not known"),
        (["--vary", "mlp.activation=rellu"], "activation 'rellu' is not known (did you mean 'relu'?)"),
        (["--vary", "mlp.activation="], "--vary mlp.activation: an empty value"),
        (["--vary", "mlp.activation=relu,,gelu"], "--vary mlp.activation: an empty value"),
        (["--vary", "mlp.activation=relu, relu"], "--vary mlp.activation: relu is given twice"),
        (["--vary", "fuse.alpha=1,1.0"], "--vary fuse.alpha: 1.0 is given twice"),
        (["--vary", "fuse.alpha=1", "--vary", "fuse.alpha=2"], "--vary fuse.alpha is given twice"),
        (["--vary", "fuse.alpha=-1"], "--vary fuse.alpha: alpha is a number of at least 0, got -1.0"),
        (["--vary", "fuse.alpha=nan"], "--vary fuse.alpha: alpha is a number of at least 0, got nan"),
        (["--vary", "fuse.gamma_cap=inf"], "gamma_cap is a number of at least 0, got inf"),
        (["--vary", "fuse.alpha=big"], "--vary fuse.alpha: takes numbers, got 'big'"),
        (["--vary", "fuse.alpha_mode=none"], "alpha_mode 'none' is not known"),
        (["--vary", "mlp.activation=relu", "--layers", "1-9"], "layer 3 does not exist: the model has layers 0 to 2"),
        (["--vary", "fuse.alpha=1", "--layers", "7"], "layer 7 does not exist: the model has layers 0 to 2"),
        (["--vary", "mlp.activation=relu", "--layers", "some"], 'layers is "all", a list of numbers'),
        (["--vary", "mlp.activation=relu", "--seed", "1"], "--bank and --seed belong to fuse.*"),
        (["--vary", "mlp.activation=relu", "--recipe", "phantom"], "no such recipe file"),
        (["--vary", "fuse.alpha=1", "--bank", "nowhere"], "nowhere"),
        (["--vary", "mlp.activation=relu", "--window", "65"], "--window 65 is more than the model can read (64)"),
        (["--vary", "mlp.activation=relu", "--tokens", "1"], "--tokens 1: input should be greater than or equal to 2"),
        (["--vary", "mlp.activation=relu", "--tokens", "9999"], "the text holds only 384 tokens in usable windows of "
         "the 9,999 asked for; give more text, or --tokens 384"),
        (["--vary", "mlp.activation=relu", "--data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
    ],
)  # fmt: skip
def test_refused_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: list[str], told: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("refused before the model is loaded"))
    out = tmp_path / "out"
    data = ["--data", folder / "texts"] if "--data" not in words else []
    assert run("sweep", folder / "model", "--out", out, *data, *QUICK, *words) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_outputs_that_cannot_be_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.txt").write_text("mine")
    for out, told in [
        (tmp_path / "file.txt", "does not end in .jsonl"),
        (tmp_path / "no" / "p.jsonl", "not the name of"),
    ]:
        assert sweep(folder, out, "--vary", "mlp.activation=relu") == 2
        assert told in capsys.readouterr().err
    assert (tmp_path / "file.txt").read_text() == "mine"


def test_a_patched_model_cannot_be_patched_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    assert run("patch", tmp_path / "model", tmp_path / "patched", "--mlp", "gelu") == 0
    words = ("sweep", tmp_path / "patched", "--data", folder / "texts", *QUICK, "--out", tmp_path / "out")
    assert run(*words, "--vary", "mlp.activation=relu") == 2
    assert "already patched" in capsys.readouterr().err
    assert run(*words, "--vary", "fuse.alpha=1") == 0


def test_values_are_read_as_they_are_meant() -> None:
    assert parse_vary(["mlp.activation=relu | silu,gelu", "fuse.alpha=0.02,1,4e0", "fuse.rounding=stochastic"]) == {
        "mlp.activation": ["relu|silu", "gelu"], "fuse.alpha": [0.02, 1.0, 4.0], "fuse.rounding": ["stochastic"],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- frontiers


@given(st.lists(st.tuples(*[st.integers(0, 6).map(float)] * 2), max_size=12))
def test_the_frontier_is_the_staircase_of_sorted_points(costs: list[tuple[float, float]]) -> None:
    lowest, stairs = float("inf"), set()
    for x, y in sorted(set(costs)):  # by x, then y: a point is on it when it is lower than everything to the left
        if y < lowest:
            stairs.add((x, y))
            lowest = y
    assert frontier(costs) == [cost in stairs for cost in costs]
