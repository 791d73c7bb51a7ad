"""What the guarded Trainer costs over a bare PyTorch loop: the same model, rows, optimizer and schedule, in turn.

    python benchmarks/training_overhead.py [--pairs 7] [--steps 12] [--preset tiny] [--device cpu]

Each pair runs both loops for the same steps, from the same weights, the order alternating; the first two steps of each
are not timed. Prints tokens per second and the median of the pairwise ratios with their middle half. Both loops clip,
log every tenth step, and must end with the same weights to rounding: else they did not do the same work.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments, get_wsd_schedule
from transformers.utils import logging

from neuroweave.neuroblast.configuration import PRESETS, build_configuration
from neuroweave.neuroblast.modeling import NeuroBlastForCausalLM
from neuroweave.training.metrics import MetricsFile
from neuroweave.training.packing import packed_documents
from neuroweave.training.torch_loop import GuardedTrainer, RowDataset, stack_rows

VOCABULARY, UNTIMED = 4096, 2


class Clock(TrainerCallback):
    """When the timed steps began and when the last one ended."""

    def __init__(self, device: str) -> None:
        self.device, self.began, self.ended = device, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == UNTIMED:
            self.began = now(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = now(self.device)


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fresh_model(preset: str, device: str) -> NeuroBlastForCausalLM:
    torch.manual_seed(0)
    model = NeuroBlastForCausalLM(build_configuration(PRESETS[preset][0] | {"vocab_size": VOCABULARY}))
    return model.to(device).train()  # type: ignore[arg-type]


def bare(options: argparse.Namespace, rows: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of the timed steps of a loop as one writes it by hand, and the weights at the end."""
    model = fresh_model(options.preset, options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    schedule = get_wsd_schedule(optimizer, 0, 2, num_training_steps=options.steps)
    began, total = 0.0, torch.zeros((), device=options.device)
    for step in range(options.steps):
        if step == UNTIMED:
            began = now(options.device)
        first = step * options.batch
        batch = stack_rows([rows[index] for index in range(first, first + options.batch)])
        for start in range(0, options.batch, options.micro):
            part = {name: value[start : start + options.micro].to(options.device) for name, value in batch.items()}
            with torch.autocast(options.device, torch.bfloat16, enabled=options.bfloat16):
                count = (batch["labels"][:, 1:] != -100).sum().to(options.device)
                loss = model(**part, use_cache=False, num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            total.item()
            total.zero_()
    return now(options.device) - began, model.state_dict()


def guarded(options: argparse.Namespace, rows: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of the loop that `neuroweave train` runs."""
    clock = Clock(options.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.micro,
            gradient_accumulation_steps=options.batch // options.micro,
            learning_rate=1e-3,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": 2},
            max_grad_norm=1.0,
            bf16=options.bfloat16,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device == "cuda",
        )
        model = fresh_model(options.preset, options.device)
        callbacks = [MetricsFile(options.batch * options.length), clock]
        GuardedTrainer(model, arguments, rows, callbacks=callbacks).train()
    return clock.ended - clock.began, model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bfloat16", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    draw = np.random.RandomState(0)
    documents = [draw.randint(0, VOCABULARY, draw.randint(50, 900)).tolist() for _ in range(400)]
    rows = RowDataset(packed_documents(documents, options.length, seed=0), options.steps * options.batch)
    tokens = (options.steps - UNTIMED) * options.batch * options.length
    ratios, by_hand = [], []
    for pair in range(options.pairs):
        order = (bare, guarded) if pair % 2 == 0 else (guarded, bare)
        found = {loop: loop(options, rows) for loop in order}
        (one, weights), (other, others) = found[bare], found[guarded]
        apart = max(float((weights[name] - others[name]).abs().max()) for name in weights)
        if apart > 1e-4 and not options.bfloat16:
            raise SystemExit(f"the loops end {apart:.2g} apart: they did not do the same work")
        by_hand.append(tokens / one)
        ratios.append(one / other)
        print(
            f"bare {tokens / one:,.0f} tokens/s, guarded {tokens / other:,.0f}: {one / other:.3f} (weights {apart:.1e})"
        )
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    print(
        f"{datetime.date.today()}, {options.device}, {options.preset}, {options.batch} x {options.length} tokens: bare "
        f"{statistics.median(by_hand):,.0f} tokens/s; guarded / bare {middle:.3f} ({low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    main()
