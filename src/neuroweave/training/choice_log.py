"""How the neurons of learned mixtures choose while they are trained: a line of JSON each time the trainer logs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neuroweave.activations.neuron_choices import neuron_choices
from neuroweave.training.metrics import cut_after

CHOICES_FILE = "neuron_choices.jsonl"


class ChoiceLog(TrainerCallback):
    """Appends `{"step", "mixtures": [NeuronChoices, ...]}` to `neuron_choices.jsonl` in the run's folder: at the start,
    and whenever a loss is logged. A resumed run drops the lines after the step that it goes on from."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = log_file(args)
        if state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_after(path, state.global_step)
        if not state.global_step:
            self.write(path, state, kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in (kwargs.get("logs") or {}):
            self.write(log_file(args), state, kwargs["model"])

    def write(self, path: Path, state: TrainerState, model: Any) -> None:
        found = [asdict(choices) for choices in neuron_choices(model)]  # on every process: weights may be sharded
        if found and state.is_world_process_zero:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "mixtures": found}) + "\n")


def log_file(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / CHOICES_FILE
