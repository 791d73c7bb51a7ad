"""What a run says about itself: `metrics.jsonl`, a line for the person, and the trackers that are asked for.

A line of metrics.jsonl: {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "seconds",
"memory_gb"} while training (loss: nats per token, the mean since the line before), {"step", "eval_loss", ...} after an
evaluation on the held-out text. The file is one history: a resumed run cuts off what lies after its checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

METRICS_FILE = "metrics.jsonl"
# name: (module that must be there, package to install)
TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check_trackers(names: Sequence[str]) -> list[str]:
    """The names. Raises ValueError for one that is not known, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"report_to: {name!r} is not known; choose from {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise ValueError(f"report_to: {name} is not installed; pip install {TRACKERS[name]}, or leave it out")
    return list(names)


class RunMetrics:
    """Writes `metrics.jsonl` in the run's folder and tells a line per entry to `report`, whatever framework trains.

    `tokens_per_step`: of all processes together. `report`: gets one line of text, without a newline. `memory`: the most
    that was held, in GB. `trackers`: accelerate's, started, that hear of every entry too.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tokens_per_step: int,
        report: Callable[[str], None] | None = None,
        memory: Callable[[], float] | None = None,
        trackers: Sequence[Any] = (),
    ) -> None:
        self.path, self.tokens_per_step, self.report = Path(folder) / METRICS_FILE, tokens_per_step, report
        self.memory, self.trackers = memory or memory_gb, trackers
        self.began = self.last_time = time.perf_counter()
        self.last_step = 0

    def begin(self, step: int) -> None:
        """The run starts, or goes on, after `step` steps."""
        self.began = self.last_time = time.perf_counter()
        self.last_step = step
        cut_after(self.path, step)

    def tell(self, step: int, values: dict[str, Any], *, total: int) -> None:
        """An entry: of training where `values` have a loss, else of something that was measured meanwhile."""
        now = time.perf_counter()
        entry: dict[str, Any] = {"step": step, **values}
        if "loss" in values:
            entry["tokens"] = step * self.tokens_per_step
            entry["tokens_per_second"] = (
                (step - self.last_step) * self.tokens_per_step / max(now - self.last_time, 1e-9)
            )
            entry["memory_gb"] = self.memory()
            self.last_step = step
        entry["seconds"] = now - self.began
        self.last_time = now  # an evaluation's seconds are not the training's
        append_line(self.path, entry)
        for tracker in self.trackers:
            tracker.log({name: value for name, value in entry.items() if name != "step"}, step=step)
        if self.report is not None:
            self.report(as_text(entry, total=total))

    def pause(self) -> None:
        """What was done since the last entry (a save) is not the training's time."""
        self.last_time = time.perf_counter()

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def start_trackers(names: Sequence[str], run: Path) -> list[Any]:
    """accelerate's trackers of these names, for a loop that is not transformers' Trainer."""
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # the trackers ask it which process this is
    started = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(run.name, run / name) if kind.requires_logging_directory else kind(run.name)
        tracker.start()
        started.append(tracker)
    return started


class MetricsFile(TrainerCallback):
    """`RunMetrics` of a run of transformers' Trainer; its arguments."""

    def __init__(self, tokens_per_step: int, *, report: Callable[[str], None] | None = None) -> None:
        self.tokens_per_step, self.report = tokens_per_step, report
        self.metrics: RunMetrics | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.of(args).begin(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        kept = {name: value for name, value in logs.items() if name != "epoch" and not name.endswith("_per_second")}
        self.of(args).tell(state.global_step, kept, total=state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.metrics is not None:
            self.metrics.pause()

    def of(self, args: TrainingArguments) -> RunMetrics:
        if self.metrics is None:  # an evaluation may come before the training
            self.metrics = RunMetrics(str(args.output_dir), tokens_per_step=self.tokens_per_step, report=self.report)
        return self.metrics


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add a line. A loss that is not finite is written as null, since JSON has no other word for it."""
    plain = {
        name: round(value, 6) if isinstance(value, float) and name not in ("learning_rate", "loss") else value
        for name, value in entry.items()
        if isinstance(value, int | float | str)
    }
    written = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in plain.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(written) + "\n")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a last line that a killed run left half written is left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def cut_after(path: Path, step: int) -> None:
    """Drop the entries after `step`: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = [entry for entry in read_metrics(path) if entry["step"] <= step] if step else []
    draft = path.with_suffix(".partial")
    draft.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    os.replace(draft, path)


def memory_gb() -> float:
    """The most memory that this process has held: on the accelerator where there is one, else its resident set."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else resident_gb()


def resident_gb() -> float:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def as_text(entry: dict[str, Any], *, total: int) -> str:
    """One line: `step 40/1000  loss 5.1234  grad 0.81  lr 4.00e-03  1,234 tokens/s  2.1 GB`."""
    parts = [f"step {entry['step']}/{total}"]
    for name, form in (("loss", "loss {:.4f}"), ("eval_loss", "held-out loss {:.4f}"), ("grad_norm", "grad {:.3g}")):
        if name in entry:
            parts.append(form.format(entry[name]))
    others = [name for name in entry if name.startswith("eval_") and name not in ("eval_loss", "eval_tokens")]
    parts += [f"{name.removeprefix('eval_').replace('_', ' ')} {entry[name]:.4g}" for name in others]
    if "tokens_per_second" in entry:
        parts.append(f"lr {entry['learning_rate']:.2e}")
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{entry['memory_gb']:.1f} GB")
    return "  ".join(parts)
