"""A configuration in the words of transformers' Trainer."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.optimisation import SCHEDULES, schedule_options


def training_arguments(
    configuration: TrainConfiguration,
    *,
    steps: int,
    accumulation: int,
    device: str,
    precision: torch.dtype,
    evaluates: bool,
) -> TrainingArguments:
    """The arguments of a run of `steps` steps; `accumulation`: passes of a step; `device`: cpu, cuda or mps."""
    training, metrics, output = configuration.training, configuration.metrics, configuration.output
    if training.tf32 and device == "cuda":
        torch.set_float32_matmul_precision("high")
    run = Path(output.folder)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "tensorboard")  # the Trainer's callback has no other way to hear
    options: dict[str, Any] = {checkpointing_field(): training.gradient_checkpointing}
    return TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=training.micro_batch_size,
        per_device_eval_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=SCHEDULES[training.schedule],
        lr_scheduler_kwargs=schedule_options(training, steps),
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.clip,
        bf16=precision == torch.bfloat16,
        use_cpu=device == "cpu",
        torch_compile=training.compile,
        seed=training.seed,
        dataloader_num_workers=training.workers,
        dataloader_prefetch_factor=4 if training.workers else None,
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,
        logging_steps=metrics.log_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=metrics.evaluate_every or output.save_every,
        save_strategy="steps",
        save_steps=output.save_every,
        report_to=metrics.report_to,
        run_name=run.name,
        **options,
    )


def checkpointing_field() -> str:
    """transformers 5.23 calls it activation checkpointing."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
