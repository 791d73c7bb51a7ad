"""A training run of seconds: random rows by index, a tiny Llama or NeuroBLAST with dropout, and the guarded trainer.

Run as a script it trains in a process of its own: `python tests/tiny_training.py '[{"folder": ...}]'`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_llama import tiny_model
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from neuroweave.neuroblast.configuration import NeuroBlastConfig
from neuroweave.neuroblast.modeling import NeuroBlastForCausalLM
from neuroweave.training.metrics import METRICS_FILE, MetricsFile, read_metrics
from neuroweave.training.torch_loop import GuardedTrainer, RowDataset

LENGTH = 17


class RandomRows:
    """Row i: two packed documents of tokens drawn by a generator of its own."""

    def __init__(self, length: int = LENGTH, vocabulary: int = 123) -> None:
        self.length, self.vocabulary = length, vocabulary

    def row(self, index: int) -> dict[str, np.ndarray]:
        draw = np.random.RandomState(index)
        ids = draw.randint(3, self.vocabulary, self.length)
        cut = draw.randint(1, self.length)
        positions = np.concatenate((np.arange(cut), np.arange(self.length - cut)))
        return {"input_ids": ids, "position_ids": positions, "labels": np.where(positions == 0, -100, ids)}


def tiny_neuroblast(seed: int = 0, **settings: Any) -> NeuroBlastForCausalLM:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 123,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_sensory_layers": 2,
        "num_associative_layers": 4,
        "num_motor_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        "dropout": 0.1,
    }
    return NeuroBlastForCausalLM(NeuroBlastConfig(**shape | settings))


class StopAt(TrainerCallback):
    """Ends the run after a step, as if it had been the last one of this session."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


class SendAt(TrainerCallback):
    """Sends this process a signal at the beginning of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)
            time.sleep(0.05)


def make_trainer(
    folder: Path | str,
    *,
    model: PreTrainedModel | None = None,
    steps: int = 10,
    batch: int = 4,
    micro: int = 2,
    save: int = 5,
    callbacks: Any = (),
    held_out: int = 0,
    kind: type[GuardedTrainer] = GuardedTrainer,
    keep: int = 2,
    note: Any = None,
    rows: Any = None,
    **arguments: Any,
) -> GuardedTrainer:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=batch // micro // processes,
        save_strategy="steps",
        save_steps=save,
        eval_strategy="steps" if held_out else "no",
        eval_steps=save,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **{"learning_rate": 1e-2, "logging_steps": 1} | arguments,
    )
    return kind(
        tiny_model(attention_dropout=0.1) if model is None else model,
        settings,
        RowDataset(RandomRows() if rows is None else rows, steps * batch),
        RowDataset(RandomRows(), held_out) if held_out else None,
        callbacks=[MetricsFile(batch * LENGTH), *callbacks],
        keep=keep,
        note=note,
    )


def losses(folder: Path | str) -> dict[int, float]:
    """Step -> loss, as metrics.jsonl has them, all digits."""
    return {entry["step"]: entry["loss"] for entry in read_metrics(Path(folder) / METRICS_FILE) if "loss" in entry}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def main(folder: str, settings: dict[str, Any]) -> None:
    """`kill_at`: SIGKILL at that step. `file_limit`: bytes of the largest file, from step `limit_at` on."""
    torch.set_num_threads(1)
    callbacks: list[Any] = []
    if (step := settings.pop("kill_at", None)) is not None:
        callbacks.append(SendAt(step, signal.SIGKILL))
    if (step := settings.pop("interrupt_at", None)) is not None:
        callbacks.append(SendAt(step, signal.SIGINT))
    if (step := settings.pop("stop_at", None)) is not None:
        callbacks.append(StopAt(step))
    limit, at = settings.pop("file_limit", None), settings.pop("limit_at", 0)

    class Limit(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if limit and state.global_step == at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    resume = settings.pop("resume", False)
    model = settings.pop("model", None)
    chosen = tiny_neuroblast(dropout=0.0) if model == "neuroblast" else tiny_model(tie_word_embeddings=model == "tied")
    dropout = settings.pop("dropout", 0.0)
    chosen.config.attention_dropout = dropout
    for layer in getattr(chosen.model, "layers", []):
        layer.self_attn.attention_dropout = dropout
    trainer = make_trainer(folder, model=chosen, callbacks=[*callbacks, Limit()], **settings)
    trainer.train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    for run in json.loads(sys.argv[1]):
        main(run.pop("folder"), run)
