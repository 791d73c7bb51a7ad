"""The guarded training loop: exact resume, losses that are not finite, disks that fill, Ctrl-C, evaluation."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_llama import tiny_model
from tiny_training import LENGTH, RandomRows, SendAt, StopAt, losses, make_trainer, tiny_neuroblast, weights
from transformers import AutoModelForCausalLM

from neuroweave.training import safe_checkpoints
from neuroweave.training.metrics import as_text, check_trackers, read_metrics
from neuroweave.training.torch_loop import GuardedTrainer, NotFiniteError, RowDataset, stack_rows


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "neuroblast"])
def test_resume_is_bit_exact(tmp_path: Path, family: str) -> None:
    """With dropout, an optimizer with memory, a schedule and evaluations in between."""
    make = tiny_neuroblast if family == "neuroblast" else lambda: tiny_model(attention_dropout=0.1)
    whole = make_trainer(tmp_path / "whole", model=make(), held_out=3)
    whole.train()
    make_trainer(tmp_path / "parts", model=make(), held_out=3, callbacks=[StopAt(5)]).train()
    rest = make_trainer(tmp_path / "parts", model=make(), held_out=3)
    rest.train(resume_from_checkpoint=True)
    assert list(losses(tmp_path / "whole")) == list(range(1, 11))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert same(weights(whole.model), weights(rest.model))
    without_dropout = make_trainer(tmp_path / "other", model=tiny_model() if family == "llama" else make(), steps=2)
    without_dropout.train()  # the losses do depend on what is drawn
    if family == "llama":
        assert losses(tmp_path / "other")[1] != losses(tmp_path / "whole")[1]


def test_resume_in_the_middle_of_what_one_line_averages(tmp_path: Path) -> None:
    """A checkpoint at a step that is not logged anyway: its line is written, so none spans the resume."""
    make_trainer(tmp_path / "whole", logging_steps=4, save=3).train()
    make_trainer(tmp_path / "parts", logging_steps=4, save=3, callbacks=[StopAt(3)]).train()
    make_trainer(tmp_path / "parts", logging_steps=4, save=3).train(resume_from_checkpoint=True)
    assert list(losses(tmp_path / "whole")) == [3, 4, 6, 8, 9, 10]
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_resume_with_another_micro_batch_sees_the_same_samples(tmp_path: Path) -> None:
    class Remember(RandomRows):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def row(self, index: int) -> Any:
            self.seen.append(index)
            return super().row(index)

    first, second = Remember(), Remember()
    model = tiny_model()
    make_trainer(tmp_path, model=model, rows=first, callbacks=[StopAt(5)]).train()
    make_trainer(tmp_path, model=tiny_model(), rows=second, micro=1).train(resume_from_checkpoint=True)
    assert second.seen == list(range(20, 40))
    assert set(first.seen[:20]) == set(range(20))
    whole = make_trainer(tmp_path / "whole", model=tiny_model())
    whole.train()
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(tmp_path / "whole").values()), rtol=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_of_the_step(tmp_path: Path) -> None:
    """Rows with different numbers of labels: neither a mean of means over passes nor over rows."""

    class Uneven(RandomRows):
        def row(self, index: int) -> Any:
            row = super().row(index)
            row["labels"][2 + 3 * (index % 4) :] = -100
            return row

    model = tiny_model()
    trainer = make_trainer(tmp_path, model=model, rows=Uneven(), steps=1, batch=8, micro=2, learning_rate=1e-9)
    batch = stack_rows([trainer.train_dataset[index] for index in range(8)])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    logits, targets = logits[:, :-1].double().flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, targets)
    passes = [
        torch.nn.functional.cross_entropy(logits[at : at + 32], targets[at : at + 32]) for at in range(0, 128, 32)
    ]
    trainer.train()
    assert losses(tmp_path)[1] == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(torch.stack(passes).mean()) - float(expected)) > 1e-3


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_evaluation_is_per_token_and_counts_every_row_once(tmp_path: Path, rows: int) -> None:
    class Uneven(RandomRows):
        def row(self, index: int) -> Any:
            row = super().row(index)
            row["labels"][3 + 2 * index :] = -100
            return row

    model = tiny_model()
    trainer = make_trainer(tmp_path, model=model)
    found = trainer.evaluate(RowDataset(Uneven(), rows))
    batch = stack_rows([{name: torch.as_tensor(x) for name, x in Uneven().row(index).items()} for index in range(rows)])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), targets)
    assert found == {"eval_loss": pytest.approx(float(expected), rel=1e-6), "eval_tokens": int((targets != -100).sum())}


def test_evaluation_of_nothing_is_refused(tmp_path: Path) -> None:
    class Empty(RandomRows):
        def row(self, index: int) -> Any:
            return super().row(index) | {"labels": np.full(LENGTH, -100)}

    with pytest.raises(ValueError, match="no token to predict"):
        make_trainer(tmp_path).evaluate(RowDataset(Empty(), 2))


class PoisonedAt(SendAt):
    """Puts a value into the weights before a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = self.number


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, value: float) -> None:
    trainer = make_trainer(tmp_path, callbacks=[PoisonedAt(7, value)], logging_steps=100)
    with pytest.raises(NotFiniteError, match=r"not finite at step 8; .*last good checkpoint is .*checkpoint-5") as stop:
        trainer.train()
    assert stop.value.step == 8
    good = safe_checkpoints.newest_complete(tmp_path)
    assert good is not None
    assert good.name == "checkpoint-5"
    assert AutoModelForCausalLM.from_pretrained(good)(torch.tensor([[3, 4]])).logits.isfinite().all()
    resumed = make_trainer(tmp_path)  # without the poison
    resumed.train(resume_from_checkpoint=True)
    assert list(losses(tmp_path)) == [5, 6, 7, 8, 9, 10]


def test_an_infinite_loss_with_a_finite_gradient_stops_the_run_too(tmp_path: Path) -> None:
    class Infinite(GuardedTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + (float("inf") if self.state.global_step == 2 else 0)

    with pytest.raises(NotFiniteError, match=r"not finite at step 3; .*no checkpoint was saved before"):
        make_trainer(tmp_path, kind=Infinite).train()


def test_a_bad_gradient_under_a_finite_loss_is_seen_late_but_never_saved(tmp_path: Path) -> None:
    """As on an accelerator, where nobody looks at every step: the first bad step is named, nothing bad is saved."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.state.global_step = 11
    trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(float("nan")))
    trainer.state.global_step = 14
    trainer._watch(torch.tensor(float("inf")))
    with pytest.raises(NotFiniteError, match="not finite at step 12"):
        trainer._save_checkpoint(trainer.model, None)
    assert not (tmp_path / "checkpoint-14").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.state.global_step = 11
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(NotFiniteError, match="weights are not finite after step 11"):
        trainer._save_checkpoint(trainer.model, None)
    assert safe_checkpoints.last_sealed(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("where", ["weights", "optimizer", "complete.json"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    make_trainer(tmp_path, callbacks=[StopAt(5)]).train()
    full = OSError(28, "No space left on device")

    def fail(*_: Any, **__: Any) -> None:
        raise full

    trainer = make_trainer(tmp_path)
    if where == "weights":
        monkeypatch.setattr(type(trainer.model), "save_pretrained", fail)
    elif where == "optimizer":
        monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail)
    else:
        monkeypatch.setattr(safe_checkpoints, "seal_checkpoint", fail)
    with pytest.raises(
        ValueError, match=r"checkpoint-10: could not be saved \(.*No space left.*last good .*checkpoint-5"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert not (tmp_path / "checkpoint-10").exists()
    monkeypatch.undo()
    make_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert list(losses(tmp_path)) == list(range(1, 11))


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    needed = trainer._checkpoint_bytes()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed - 1}))
    with pytest.raises(ValueError, match=r"checkpoint-5: could not be saved .* are needed here.*no earlier checkpoint"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_estimate_of_a_checkpoint_fits(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=tiny_model(hidden_size=128, intermediate_size=512))
    trainer.train()
    taken = sum(path.stat().st_size for path in (tmp_path / "checkpoint-10").iterdir())
    assert taken <= trainer._checkpoint_bytes() <= 1.1 * taken + 2_000_000


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-8 is saved; the same command goes on"):
        make_trainer(tmp_path / "parts", callbacks=[SendAt(7, signal.SIGINT)]).train()
    assert signal.getsignal(signal.SIGINT) is before
    make_trainer(tmp_path / "parts").train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "whole").train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    class Twice(SendAt):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control)
            super().on_step_begin(args, state, control)

    with pytest.raises(KeyboardInterrupt) as stop:
        make_trainer(tmp_path, callbacks=[Twice(7, signal.SIGINT)]).train()
    assert not str(stop.value)
    assert safe_checkpoints.last_sealed(tmp_path) == tmp_path / "checkpoint-5"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def test_damaged_and_half_checkpoints_are_passed_over(tmp_path: Path) -> None:
    make_trainer(tmp_path, save=2, keep=5).train()
    assert [step for step, _ in safe_checkpoints.checkpoint_folders(tmp_path)] == [2, 4, 6, 8, 10]
    flip(tmp_path / "checkpoint-10" / "model.safetensors")
    (tmp_path / "checkpoint-8" / "complete.json").unlink()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"short")
    notes: list[str] = []
    assert safe_checkpoints.newest_complete(tmp_path, note=notes.append) == tmp_path / "checkpoint-4"
    assert "checkpoint-10 is passed over: model.safetensors is not the bytes that were written" in notes[0]
    assert "checkpoint-8 is passed over: it is not complete" in notes[1]
    assert "checkpoint-6 is passed over: optimizer.pt has 5 bytes" in notes[2]
    whole = losses(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-10: cannot be resumed: model\.safetensors is not the bytes"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    make_trainer(tmp_path, save=2, note=notes.append).train(resume_from_checkpoint=True)
    assert losses(tmp_path) == whole


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    make_trainer(tmp_path, save=2, keep=2).train()
    assert [step for step, _ in safe_checkpoints.checkpoint_folders(tmp_path)] == [8, 10]
    safe_checkpoints.rotate(tmp_path, keep=1, spare=tmp_path / "checkpoint-8")
    assert [step for step, _ in safe_checkpoints.checkpoint_folders(tmp_path)] == [8, 10]
    safe_checkpoints.rotate(tmp_path, keep=1)
    assert [step for step, _ in safe_checkpoints.checkpoint_folders(tmp_path)] == [10]


def test_a_folder_of_an_earlier_run_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="checkpoint-10 is of an earlier run; resume it, or choose another"):
        make_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="it is not complete"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_is_an_ordinary_folder(tmp_path: Path) -> None:
    model = tiny_model()
    assert model.config.use_cache
    make_trainer(tmp_path, model=model).train()
    folder = tmp_path / "checkpoint-10"
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True  # the Trainer switches it off
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert same(stored, weights(model))
    content = json.loads((folder / "complete.json").read_text())
    assert content["step"] == 10
    assert set(content["files"]) == {path.name for path in folder.iterdir()} - {"complete.json"}


def test_metrics_are_one_history(tmp_path: Path) -> None:
    make_trainer(tmp_path, held_out=2, callbacks=[StopAt(7)]).train()
    make_trainer(tmp_path, held_out=2).train(resume_from_checkpoint=True)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 11))
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [5, 10]
    assert entries[0].keys() == {
        "step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "memory_gb", "seconds",
    }  # fmt: skip
    assert [entry["tokens"] for entry in entries if "loss" in entry] == [68 * step for step in range(1, 11)]
    assert as_text(entries[0], total=10).startswith(f"step 1/10  loss {entries[0]['loss']:.4f}  grad ")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste', encoding="utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_trackers_are_checked() -> None:
    assert check_trackers(["tensorboard"]) == ["tensorboard"]
    with pytest.raises(ValueError, match="'tensorbord' is not known; choose from tensorboard, trackio, wandb"):
        check_trackers(["tensorbord"])


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="wandb is not installed; pip install wandb, or leave it out"):
        check_trackers(["wandb"])


def test_weight_decay_pulls_matrices_alone(tmp_path):
    """Not the norms that transformers does not know by their names: norm_in, norm_out and those of the bridges."""
    from tiny_training import tiny_neuroblast

    model = tiny_neuroblast()
    decaying = set(make_trainer(tmp_path, model=model).get_decay_parameter_names(model))
    norms = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert {"model.sensory_to_motor.weight", "model.sensory_layers.1.norm_in.weight", "model.norm.weight"} <= norms
    assert decaying == {name for name, _ in model.named_parameters()} - norms
