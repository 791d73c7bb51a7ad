"""Healing a tiny patched model: what it brings, that it resumes bit for bit, what is written, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_llama import Text, texts, tiny_model, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from neuroweave.cli.heal import command
from neuroweave.diagnose.probes.head import find_head
from neuroweave.surgery.blending import Blending
from neuroweave.surgery.on_disk import patch_checkpoint
from neuroweave.training.distillation_loop import Windows
from neuroweave.training.heal import HealOptions, heal_checkpoint
from neuroweave.training.healing_inputs import split_windows
from neuroweave.training.metrics import METRICS_FILE, read_metrics

RELU = {"sites": [{"site": "mlp", "activation": "relu"}]}
DOCUMENTS = texts(count=24, words=64)
QUICK = {
    "train": "all",
    "precision": "float32",
    "tokens": 32 * 2 * 24,
    "window": 32,
    "batch": 2,
    "learning_rate": 1e-3,
    "evaluate_every": 12,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, the same one patched, and one patched with a learned mixture."""
    folder = tmp_path_factory.mktemp("models")
    teacher = tiny_model(tie_word_embeddings=True)
    teacher.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "base" / "LICENSE").write_text("free")
    patch_checkpoint(folder / "base", folder / "patched", RELU)
    members = ["silu", "relu", {"swish_beta": {"beta": 1.0}}]
    mixture = {"sites": [{"site": "mlp", "activation": {"mixture": {"members": members, "start_logit": 0.5}}}]}
    patch_checkpoint(folder / "base", folder / "mixture", mixture)
    return folder


def heal(models: Path, out: Path, patched: str = "patched", **settings: object):
    options = HealOptions(**(QUICK | {k: v for k, v in settings.items() if k in HealOptions.__dataclass_fields__}))
    others = {k: v for k, v in settings.items() if k not in HealOptions.__dataclass_fields__}
    where = {"blend": Blending, "find_head": find_head} | others.pop("tools", {})
    return heal_checkpoint(models / patched, models / "base", out, DOCUMENTS, options=options, **where, **others)


def divergence(folder: Path, models: Path) -> float:
    """KL(teacher || student) on the held-out windows, in float64, computed here."""
    held_out = split_windows(DOCUMENTS, tiny_tokenizer(), window=32, held_out_tokens=8192).held_out
    ours, theirs = (AutoModelForCausalLM.from_pretrained(x).eval() for x in (folder, models / "base"))
    with torch.no_grad():
        log_q, log_p = (model(held_out).logits[:, :-1].double().log_softmax(-1) for model in (ours, theirs))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def weights_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 0.8),
        ({"loss": "topk", "top_k": 16}, 0.8),
        ({"hidden": 0.5, "cross_entropy": 0.01, "temperature": 1.5, "accumulate": 2, "batch": 1}, 0.9),
        ({"train": "mlp", "learning_rate": 3e-3, "tools": {"find_head": None}}, 0.8),
        ({"train": "lora", "learning_rate": 2e-3, "lora_rank": 4}, 0.95),
    ],
)
def test_a_heal_lowers_the_held_out_kl(models, tmp_path, settings, most):
    done = heal(models, tmp_path / "out", **settings)
    before, after = (divergence(folder, models) for folder in (models / "patched", tmp_path / "out"))
    assert done.kl_before == pytest.approx(before, rel=1e-4)
    assert done.kl_after == pytest.approx(after, rel=1e-4)
    assert 0 < after < most * before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # the work folder is gone
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    config, patched = (json.loads((x / "config.json").read_text()) for x in (tmp_path / "out", models / "patched"))
    healing = config["neuroweave"].pop("healing")
    assert config == patched
    assert healing["kl_after"] == done.kl_after
    assert healing["options"]["train"] == settings.get("train", "all")
    assert healing["tokens"] == done.tokens == done.steps * 64
    assert "model.safetensors" in healing["teacher"]["files"]
    assert list(load_file(tmp_path / "out/model.safetensors")) == list(load_file(models / "patched/model.safetensors"))


class KilledError(RuntimeError):
    pass


def killer(step: int):
    """A reporter that ends the run at once after a step, as a kill would."""

    def report(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise KilledError

    return report


@pytest.mark.parametrize("live", [{"loss": "topk", "hidden": 0.5}, {"loss": "topk"}, {"hidden": 0.5}])
def test_the_loss_of_a_step_is_what_the_options_say(models, tmp_path, live):
    settings = {"cross_entropy": 0.1, "temperature": 1.5, "accumulate": 2, "batch": 1, "top_k": 5} | live
    with pytest.raises(KilledError):
        heal(models, tmp_path / "out", **settings, report=killer(1))
    logged = read_metrics(tmp_path / ".out.neuroweave-heal" / "run" / METRICS_FILE)[-1]
    rows = Windows(split_windows(DOCUMENTS, tiny_tokenizer(), window=32, held_out_tokens=0).training, seed=0)
    ids = torch.stack([rows.row(index)["input_ids"] for index in range(2)])
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(models / name).eval()(ids, output_hidden_states=True)
            for name in ("patched", "base")
        )
    p, q = ((out.logits[:, :-1].double() / 1.5).softmax(-1) for out in (theirs, ours))
    if live.get("loss"):
        first = p.topk(5).indices
        p, q = (torch.cat([x.gather(-1, first), 1 - x.gather(-1, first).sum(-1, True)], -1) for x in (p, q))
    expected = 1.5**2 * (p * (p / q).log()).sum(-1).mean()
    expected += 0.1 * cross_entropy(ours.logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        distance = ((a - b).double().square().sum(-1) / b.double().square().sum(-1)).mean() / 3
        expected += live.get("hidden", 0) * distance
    assert logged["step"] == 1
    cached = live == {"loss": "topk"}  # log probabilities in float16
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-3 if cached else 1e-4)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"blend": 14, "evaluate_every": 5, "accumulate": 2, "batch": 1}, "checkpoint-10"),
        (
            {"train": "lora", "loss": "topk", "evaluate_every": 5, "learning_rate": 1e-2, "lora_rank": 2},
            "checkpoint-10",
        ),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(models, tmp_path, settings, most):
    whole = heal(models, tmp_path / "whole", **settings)
    with pytest.raises(KilledError):
        heal(models, tmp_path / "out", **settings, report=killer(12))
    work = tmp_path / ".out.neuroweave-heal"
    assert not (tmp_path / "out").exists()
    assert (work / "run" / most / "complete.json").is_file()
    with pytest.raises(ValueError, match=r"is of a heal of other models, text or options, stopped after checkpoint-10"):
        heal(models, tmp_path / "out", **settings | {"seed": 9})
    lines: list[str] = []
    again = heal(models, tmp_path / "out", **settings, report=lines.append)
    assert lines[0].startswith("step 11/24")
    assert weights_sha256(tmp_path / "out") == weights_sha256(tmp_path / "whole")
    assert (again.kl_before, again.kl_after, again.best_step) == (whole.kl_before, whole.kl_after, whole.best_step)
    assert not work.exists()


def test_fresh_drops_what_another_heal_left(models, tmp_path):
    with pytest.raises(KilledError):
        heal(models, tmp_path / "out", report=killer(12), evaluate_every=5)
    done = heal(models, tmp_path / "out", resume=False, seed=9, tokens=640)
    assert done.steps == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_only_mixtures_move(models, tmp_path):
    done = heal(models, tmp_path / "out", "mixture", train="mixtures", learning_rate=0.1)
    before = {}
    for file in (models / "mixture").glob("*.safetensors"):
        before |= load_file(file)
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{n}.mlp.act_fn.{name}" for n in range(3) for name in ("gating_logits", "beta")}
    assert done.trained == 3 * 48 * 4
    assert done.kl_after < done.kl_before
    assert (tmp_path / "out" / "neuron_choices.jsonl").is_file()


def test_it_stops_early_and_keeps_the_best_weights(models, tmp_path):
    notes: list[str] = []
    done = heal(models, tmp_path / "out", learning_rate=0.3, evaluate_every=3, patience=2, note=notes.append)
    assert done.steps % 3 == 0
    assert 9 <= done.steps < 24
    assert (done.best_step, done.kl_after) == (0, done.kl_before)
    assert notes == [f"the held-out KL never came below {done.kl_before:.4f}: the weights stay as they were"]
    for name, tensor in load_file(models / "patched" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], tensor)


def test_the_dtype_stays_and_teachers_may_have_another(models, tmp_path):
    for name in ("patched", "base"):
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.bfloat16).save_pretrained(
            tmp_path / f"half-{name}"
        )
        tiny_tokenizer().save_pretrained(tmp_path / f"half-{name}")
    options = HealOptions(**QUICK)
    done = heal_checkpoint(tmp_path / "half-patched", models / "base", tmp_path / "a", DOCUMENTS, options=options)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a/model.safetensors").values()} == {torch.bfloat16}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    ours.save_pretrained(tmp_path / "a32")
    assert done.kl_after == pytest.approx(divergence(tmp_path / "a32", models), rel=1e-4)  # of the rounded weights
    done = heal_checkpoint(models / "patched", tmp_path / "half-base", tmp_path / "b", DOCUMENTS, options=options)
    assert done.kl_after < done.kl_before
    assert {tensor.dtype for tensor in load_file(tmp_path / "b/model.safetensors").values()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_the_run(models, tmp_path):
    with pytest.raises(ValueError, match="the loss or its gradient is not finite at step"):
        heal(models, tmp_path / "out", learning_rate=1e30, evaluate_every=1, patience=30)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_anything_is_loaded(models, tmp_path, monkeypatch):
    monkeypatch.setattr("neuroweave.training.heal.Heal.__init__", lambda *_: pytest.fail("models were loaded"))
    tiny_model(num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(tmp_path / "small")
    tiny_model(vocab_size=130, tie_word_embeddings=True).save_pretrained(tmp_path / "words")
    shutil.copytree(models / "patched", tmp_path / "renamed")
    tiny_tokenizer(words=[f"v{n}" for n in range(120)]).save_pretrained(tmp_path / "renamed")
    out, options = tmp_path / "out", HealOptions(**QUICK)
    patched, base = models / "patched", models / "base"
    for student, teacher, message in (
        (base, base, "not a patched model; heal brings a patched one back"),
        (patched, tmp_path / "small", "num_hidden_layers is 3, the teacher's is 2; the teacher is the model before"),
        (patched, tmp_path / "words", "vocab_size is 123, the teacher's is 130"),
        (tmp_path / "renamed", base, "its tokenizer is not the teacher's"),
        (tmp_path / "none", base, "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            heal_checkpoint(student, teacher, out, DOCUMENTS, options=options)
    for documents, settings, message in (
        ([Text("a", "w1 w2")], {}, "0 of 1 different documents fill a window of 32 tokens"),
        (DOCUMENTS, {"window": 65}, "a window of 65 tokens; this model reads 64 at most"),
        (DOCUMENTS, {"tokens": 63}, "tokens 63 are less than one step of 64"),
        (DOCUMENTS, {"blend": 2}, "blend needs something that blends"),
    ):
        with pytest.raises(ValueError, match=message):
            heal_checkpoint(patched, base, out, documents, options=HealOptions(**(QUICK | settings)))
    for settings, message in (
        ({"train": "head"}, "train 'head' is not known; choose from mixtures, mlp, lora, all"),
        ({"loss": "reverse"}, "loss 'reverse' is not known"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"hidden": -1.0}, "hidden must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            HealOptions(**settings)
    with pytest.raises(ValueError, match="blend over 24 steps, but the run has 24"):
        HealOptions(**QUICK, blend=24).steps()
    assert not out.exists()


def test_the_command(models, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for document in DOCUMENTS:
        (text / f"{document.name}.txt").write_text(document.text)
    words = [models / "patched", "--teacher", models / "base", "--data", text, "--output", tmp_path / "out"]
    options = "--train mlp --tokens 640 --window 32 --batch 2 --learning-rate 1e-3 --precision float32 --json"
    words += options.split()
    done = CliRunner().invoke(command, [str(word) for word in words], obj={"debug": False})
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["kl_after"] < report["kl_before"]
    assert report["options"]["tokens"] == 640
    again = CliRunner().invoke(command, [str(word) for word in words], obj={"debug": False})
    assert isinstance(again.exception, ValueError)
    assert "the output folder is not empty" in str(again.exception)
    short = CliRunner().invoke(command, [str(word) for word in [*words, "--tokens", 10]], obj={"debug": False})
    assert str(short.exception).startswith("--tokens 10 are less than one step of")
