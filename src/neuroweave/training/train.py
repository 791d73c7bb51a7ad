"""Train a model as a configuration says: tokenise, check, run, and write the model as an ordinary checkpoint.

    RUN/run.json  RUN/data/  RUN/checkpoint-N/  RUN/metrics.jsonl  RUN/model/

The same command goes on from the newest complete checkpoint. Started by `torchrun` or `accelerate launch`, every
process runs this code; the first one prepares the data and writes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments

from neuroweave.activations.neuron_choices import gate_entropy
from neuroweave.checkpoint.staging import check_free_space, staged_folder
from neuroweave.training import agreement
from neuroweave.training.arguments import training_arguments
from neuroweave.training.choice_log import ChoiceLog
from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.fused_mlps import fuse_mlps
from neuroweave.training.metrics import MetricsFile, check_trackers
from neuroweave.training.model_to_train import (
    build_model,
    check_packing,
    choose_precision,
    embedding_rows,
    load_training_tokenizer,
)
from neuroweave.training.outcome import RECORD_FILE, TrainPlan, TrainResult, plan_run
from neuroweave.training.rows import Share, open_rows
from neuroweave.training.run_folder import check_run_folder, clear_run, write_run_file
from neuroweave.training.stream_dataset import StreamDataset
from neuroweave.training.torch_loop import GuardedTrainer, RowDataset
from neuroweave.training.trainable import select

Say = Callable[[str], None]


@dataclass
class Prepared:
    """Everything that a run needs, checked."""

    configuration: TrainConfiguration
    model: PreTrainedModel
    tokenizer: Any
    rows: Any
    held_out: Any
    plan: TrainPlan
    arguments: TrainingArguments


def train(
    configuration: TrainConfiguration,
    *,
    resume: bool | None = None,
    report: Say | None = None,
    note: Say | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Run it to the end. `resume`: True needs a checkpoint, False starts anew and removes those of an earlier run of
    this configuration's folder, None goes on where there is one. `report`: a line per entry of the metrics. `note`:
    what a person should know. `progress`: bytes done and in all, of the tokenising.

    Raises ValueError for what does not fit, NotFiniteError, and KeyboardInterrupt after Ctrl-C, when a checkpoint is
    saved.
    """
    began = time.perf_counter()
    main = agreement.is_first()
    check_run_folder(configuration, resume=resume)
    prepared = prepare(configuration, note=note if main else None, progress=progress if main else None)
    if main:
        if resume is False:
            clear_run(Path(configuration.output.folder))
        write_run_file(configuration)
    plan = prepared.plan
    run = Path(configuration.output.folder)
    trainer = GuardedTrainer(
        prepared.model,
        prepared.arguments,
        prepared.rows,
        prepared.held_out,
        callbacks=[MetricsFile(plan.tokens // plan.steps, report=report if main else None), ChoiceLog()],
        gate_entropy=configuration.training.gate_entropy,
        label_smoothing=configuration.training.label_smoothing,
        tokenizer=prepared.tokenizer,
        keep=configuration.output.keep,
        note=note if main else None,
    )
    fused = fuse_mlps(prepared.model, device=plan.device, precision=getattr(torch, plan.precision))
    trainer.train(resume_from_checkpoint=True if resume is not False else None)
    fused()
    result = TrainResult.of_run(str(run), plan, time.perf_counter() - began, main=main)
    write_model(trainer, prepared, result)
    return result


def prepare(
    configuration: TrainConfiguration, *, note: Say | None = None, progress: Callable[[int, int], None] | None = None
) -> Prepared:
    """Tokenise what is not tokenised yet, build the model, and check that everything fits."""
    training, data = configuration.training, configuration.data
    check_trackers(configuration.metrics.report_to)
    device, processes = start_processes()
    precision = choose_precision(training.precision, device)
    accumulation = training.accumulation(processes)
    tokenizer = load_training_tokenizer(configuration)
    model = build_model(configuration, tokenizer)
    if data.packing and agreement.is_first():  # the others may have no weights yet: accelerate sends them
        check_packing(model, rows=training.micro_batch_size)
    chosen = select(model, training.parts)
    if training.gate_entropy:
        gate_entropy(model)  # raises where there is none
    state = PartialState()
    share = Share(state.process_index, state.num_processes, state.main_process_first)
    found = open_rows(configuration, tokenizer, vocabulary=embedding_rows(model), share=share, progress=progress)
    plan = plan_run(
        configuration,
        found,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=chosen.count,
        accumulation=accumulation,
        processes=processes,
        precision=str(precision).removeprefix("torch."),
        device=device,
    )
    held_out = None if found.held_out is None else RowDataset(found.held_out, found.held_out_count)
    check_free_space(configuration.output.folder, (configuration.output.keep + 1) * plan.checkpoint_bytes)
    arguments = training_arguments(
        configuration,
        steps=plan.steps,
        accumulation=accumulation,
        device=device,
        precision=precision,
        evaluates=held_out is not None,
    )
    if held_out is None and note is not None:
        note("no document is held out (data.held_out, or too little text): the run is not evaluated")
    count = plan.steps * training.batch_size
    dataset = (
        StreamDataset(found.training, count, process=share.index)
        if data.streaming
        else RowDataset(found.training, count)
    )
    return Prepared(configuration, model, tokenizer, dataset, held_out, plan, arguments)


def start_processes() -> tuple[str, int]:
    """(device type, number of processes); joins the group of processes when a launcher has started several."""
    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    state = PartialState(cpu=on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"))
    return state.device.type, state.num_processes


def write_model(trainer: GuardedTrainer, prepared: Prepared, result: TrainResult) -> None:
    """The trained model in RUN/model, whole or not at all, with its tokenizer and `training.json`."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if state:  # of tied tensors one is stored
        state = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    if trainer.args.process_index == 0:
        record = result.record(prepared.configuration)
        with staged_folder(result.model, overwrite=True) as folder, trainer.configuration_as_given():
            model.save_pretrained(folder, state_dict=state)
            prepared.tokenizer.save_pretrained(folder)
            (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
