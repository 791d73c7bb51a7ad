"""What a run will do, and what came out of it, whatever framework trains."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuroweave import __version__
from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.metrics import METRICS_FILE, read_metrics
from neuroweave.training.rows import RunRows

MODEL_FOLDER, RECORD_FILE = "model", "training.json"


class NotFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite. `step`: the first step at which."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step

    @classmethod
    def at(cls, step: int, good: Path | None) -> NotFiniteError:
        """`good`: the last good checkpoint."""
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint was saved before"
        return cls(
            f"the loss or its gradient is not finite at step {step}; training is stopped, {kept}; "
            f"a lower learning rate, a longer warmup or stronger clipping may help",
            step,
        )


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

    @classmethod
    def of_run(cls, folder: str, plan: TrainPlan, seconds: float, *, main: bool) -> TrainResult:
        """What a run's metrics say at its end; only the process that writes them (`main`) knows losses."""
        entries = read_metrics(Path(folder) / METRICS_FILE) if main else []
        last = {name: value for entry in entries for name, value in entry.items()}
        return cls(folder, str(Path(folder) / MODEL_FOLDER), plan, last.get("loss"), last.get("eval_loss"), seconds)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def record(self, configuration: TrainConfiguration) -> dict[str, Any]:
        """What `training.json` beside the model says."""
        return {
            "neuroweave": __version__,
            "configuration": configuration.model_dump(mode="json"),
            "plan": self.plan.as_dict(),
            "loss": self.loss,
            "held_out_loss": self.held_out_loss,
        }


def plan_run(
    configuration: TrainConfiguration, rows: RunRows, *, parameters: int, trained: int, **facts: Any
) -> TrainPlan:
    """The plan of a run; `facts`: accumulation, processes, precision, device. Raises ValueError for a schedule that
    does not fit the steps."""
    training, data = configuration.training, configuration.data
    steps = training.steps or math.ceil(float(training.epochs or 0) * (rows.epoch or 0) / training.batch_size)
    training.decay(steps)
    return TrainPlan(
        parameters=parameters,
        trained=trained,
        rows=rows.epoch,
        held_out_rows=rows.held_out_count,
        steps=steps,
        epochs=steps * training.batch_size / rows.epoch if rows.epoch else None,
        tokens=steps * training.batch_size * data.sequence_length,
        state_bytes=4 * parameters + 12 * trained,  # float32: weight; gradient and two moments where trained
        checkpoint_bytes=4 * parameters + 8 * trained,
        **facts,
    )
