"""What both loops must agree on: the learning rate of each step, and which weights decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neuroweave.training.configuration import TrainingSection

# transformers' names of the schedules
SCHEDULES = {"wsd": "warmup_stable_decay", "cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def schedule_options(training: TrainingSection, steps: int) -> dict[str, Any]:
    """What transformers' schedule of this name takes beside warmup and steps."""
    if training.schedule != "wsd":
        return {}
    return {
        "num_decay_steps": training.decay(steps),
        "decay_type": training.decay_shape,
        "min_lr_ratio": training.final_learning_rate,
    }


def learning_rates(training: TrainingSection, steps: int) -> Callable[[int], float]:
    """Step (counted from 0) -> its learning rate: transformers' schedule, by its own formula."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    schedule: Any = get_scheduler(
        SCHEDULES[training.schedule],
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=steps,
        scheduler_specific_kwargs=schedule_options(training, steps),
    )
    share = schedule.lr_lambdas[0]
    return lambda step: training.learning_rate * share(step)


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay pulls a tensor to zero: matrices, but not norms, biases and what gates learned mixtures."""
    return dimensions > 1 and not name.endswith("gating_logits")
