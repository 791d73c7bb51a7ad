"""Train a model as a configuration says: tokenise, check, run, and write the model as an ordinary checkpoint.

    RUN/run.json  RUN/data/  RUN/checkpoint-N/  RUN/metrics.jsonl  RUN/model/

The same command goes on from the newest complete checkpoint. Started by `torchrun` or `accelerate launch`, every
process runs this code; the first one prepares the data and writes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments

from neuroweave import __version__
from neuroweave.activations.neuron_choices import gate_entropy
from neuroweave.checkpoint.staging import check_free_space, staged_folder
from neuroweave.training import agreement
from neuroweave.training.arguments import training_arguments
from neuroweave.training.choice_log import ChoiceLog
from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.metrics import METRICS_FILE, MetricsFile, check_trackers, read_metrics
from neuroweave.training.model_to_train import (
    build_model,
    check_packing,
    choose_precision,
    embedding_rows,
    load_training_tokenizer,
)
from neuroweave.training.packing import PackedRows
from neuroweave.training.run_folder import check_run_folder, write_run_file
from neuroweave.training.separate_rows import SeparateRows
from neuroweave.training.stream_dataset import StreamDataset
from neuroweave.training.token_store import TokenStore, build_store
from neuroweave.training.torch_loop import GuardedTrainer, RowDataset
from neuroweave.training.trainable import select

MODEL_FOLDER, RECORD_FILE = "model", "training.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainPlan:
    """What a run will do.

    `trained`: those of the `parameters` that change. `rows`: of an epoch, `epochs`: passes over them, both None for a
    stream. `tokens`: of all steps. `state_bytes`: of weights, gradients and optimizer. `checkpoint_bytes`: of one
    checkpoint.
    """

    parameters: int
    trained: int
    rows: int | None
    held_out_rows: int
    steps: int
    epochs: float | None
    tokens: int
    accumulation: int
    processes: int
    precision: str
    device: str
    state_bytes: int
    checkpoint_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrainResult:
    """What came out. Losses are nats per token: of the last line of the training, and of the held-out documents."""

    folder: str
    model: str
    plan: TrainPlan
    loss: float | None
    held_out_loss: float | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    check_run_folder(configuration, resume=resume, main=main)
    prepared = prepare(configuration, note=note if main else None, progress=progress if main else None)
    if main:
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
        tokenizer=prepared.tokenizer,
        keep=configuration.output.keep,
        note=note if main else None,
    )
    trainer.train(resume_from_checkpoint=True if resume is not False else None)
    losses = read_metrics(run / METRICS_FILE) if main else []
    last = {name: value for entry in losses for name, value in entry.items()}
    result = TrainResult(
        str(run), str(run / MODEL_FOLDER), plan, last.get("loss"), last.get("eval_loss"), time.perf_counter() - began
    )
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
    opened = open_stream if data.streaming else open_store
    rows, held_out, epoch_rows = opened(configuration, tokenizer, model, progress)
    steps = training.steps or math.ceil(float(training.epochs or 0) * (epoch_rows or 0) / training.batch_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plan = TrainPlan(
        parameters=parameters,
        trained=chosen.count,
        rows=epoch_rows,
        held_out_rows=0 if held_out is None else len(held_out),
        steps=steps,
        epochs=steps * training.batch_size / epoch_rows if epoch_rows else None,
        tokens=steps * training.batch_size * data.sequence_length,
        accumulation=accumulation,
        processes=processes,
        precision=str(precision).removeprefix("torch."),
        device=device,
        state_bytes=4 * parameters + 12 * chosen.count,  # float32: weight; gradient and two moments where trained
        checkpoint_bytes=4 * parameters + 8 * chosen.count,
    )
    training.decay(steps)
    check_free_space(configuration.output.folder, (configuration.output.keep + 1) * plan.checkpoint_bytes)
    arguments = training_arguments(
        configuration,
        steps=steps,
        accumulation=accumulation,
        device=device,
        precision=precision,
        evaluates=held_out is not None,
    )
    if held_out is None and note is not None:
        note("no document is held out (data.held_out, or too little text): the run is not evaluated")
    count = steps * training.batch_size
    dataset = (
        StreamDataset(rows, count, process=PartialState().process_index) if data.streaming else RowDataset(rows, count)
    )
    return Prepared(configuration, model, tokenizer, dataset, held_out, plan, arguments)


def start_processes() -> tuple[str, int]:
    """(device type, number of processes); joins the group of processes when a launcher has started several."""
    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    state = PartialState(cpu=on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"))
    return state.device.type, state.num_processes


def open_store(
    configuration: TrainConfiguration,
    tokenizer: Any,
    model: PreTrainedModel,
    progress: Callable[[int, int], None] | None,
) -> tuple[Any, RowDataset | None, int | None]:
    """(rows of the run, held-out rows or None, rows of an epoch). The first process tokenises, the others wait."""
    data, seed = configuration.data, configuration.training.seed
    folder = Path(data.store or Path(configuration.output.folder) / "data")
    with PartialState().main_process_first():
        store = build_store(
            folder,
            data.sources,
            tokenizer,
            end_of_document=data.end_of_document,
            held_out=data.held_out,
            progress=progress,
        )
    store.check_vocabulary(embedding_rows(model))
    length = data.sequence_length
    weights = [source.weight for source in data.sources]
    if not data.packing and any(weight != 1 for weight in weights):
        raise ValueError("data.sources: weights need data.packing: true")
    rows: Any
    if data.packing:
        rows = PackedRows(store, length, seed=seed, weights=weights)
    else:
        rows = SeparateRows(store, length, seed=seed, pad_token=tokenizer.pad_token_id or 0)
    held_out = held_out_rows(store.held_out, configuration, tokenizer.pad_token_id or 0)
    return rows, held_out, len(rows)


def open_stream(
    configuration: TrainConfiguration, tokenizer: Any, model: PreTrainedModel, progress: Any
) -> tuple[Any, RowDataset | None, None]:
    """As `open_store`, without a store: documents are read and tokenised while the run goes on."""
    from neuroweave.training.streaming import StreamedRows

    data, training, state = configuration.data, configuration.training, PartialState()
    if not data.packing or training.steps is None or training.workers:
        raise ValueError("data.streaming needs data.packing: true, training.steps (not epochs) and training.workers: 0")

    def stream(**options: Any) -> StreamedRows:
        return StreamedRows(
            data.sources,
            tokenizer,
            data.sequence_length,
            held_out=data.held_out,
            end_of_document=data.end_of_document,
            vocabulary_size=embedding_rows(model),
            **options,
        )

    rows = stream(seed=training.seed, process_index=state.process_index, process_count=state.num_processes)
    if not data.held_out:
        return rows, None, None
    aside = stream(part="held_out", repeat=False)
    kept = list(itertools.islice(aside, configuration.metrics.held_out_rows))
    aside.close()
    return rows, RowDataset(ListedRows(kept), len(kept)) if kept else None, None


@dataclass(frozen=True)
class ListedRows:
    """Rows that are in memory."""

    rows: list[dict[str, Any]]

    def row(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def held_out_rows(store: TokenStore | None, configuration: TrainConfiguration, pad_token: int) -> RowDataset | None:
    """The rows of the held-out documents, in order; None where there are none."""
    if store is None or store.tokens < 2:
        return None
    data = configuration.data
    kind: Any = PackedRows if data.packing else SeparateRows
    rows = kind(store, data.sequence_length, pad_token=pad_token)
    return RowDataset(rows, min(len(rows), configuration.metrics.held_out_rows))


def write_model(trainer: GuardedTrainer, prepared: Prepared, result: TrainResult) -> None:
    """The trained model in RUN/model, whole or not at all, with its tokenizer and `training.json`."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if state:  # of tied tensors one is stored
        state = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    if trainer.args.process_index == 0:
        record = {
            "neuroweave": __version__,
            "configuration": prepared.configuration.model_dump(mode="json"),
            "plan": result.plan.as_dict(),
            "loss": result.loss,
            "held_out_loss": result.held_out_loss,
        }
        with staged_folder(result.model, overwrite=True) as folder, trainer.configuration_as_given():
            model.save_pretrained(folder, state_dict=state)
            prepared.tokenizer.save_pretrained(folder)
            (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
