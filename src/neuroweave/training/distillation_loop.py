"""The loop of a heal: the guarded Trainer with a distillation loss, a blend that follows the step, and an early stop.

Letters: B rows, T tokens of a row, N predictions (positions with a next token), D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neuroweave.training.distillation import (
    IGNORED,
    chunk_rows,
    chunked_mean,
    full_kl,
    hidden_distance,
    next_token_loss,
    top_of,
    topk_kl,
)
from neuroweave.training.teacher_logits import TeacherLogits
from neuroweave.training.torch_loop import GuardedTrainer

KL = "eval_kl"
KEPT_BYTES = 1 << 30  # of the teacher's last states, for each of training and held-out text
Head = Callable[[Tensor], Tensor]
FindHead = Callable[[nn.Module, Any], Head | None]


@runtime_checkable
class Blend(Protocol):
    """What moves a student from its old activations (0) to its new ones (1)."""

    amount: float

    def set(self, amount: float) -> None: ...
    def undo(self) -> None: ...


class Predictor:
    """A model as two parts: what it computes up to its output head, and logits of some positions from that.

    `head`: from last hidden states to logits, None where the model's head cannot be run by itself; then the first part
    gives all logits, and the second is the identity.
    """

    def __init__(self, model: nn.Module, head: Head | None) -> None:
        self.model, self.head = model, head
        names = inspect.signature(model.forward).parameters
        self.plain = {"use_cache": False} if "use_cache" in names else {}

    def states(
        self, model: nn.Module, input_ids: Int[Tensor, "B T"], *, hidden: bool = False
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """What `logits` takes, [B, T, D or V], and the hidden states behind every layer where they are asked for.

        `model`: this one, or what is wrapped around it.
        """
        more: dict[str, Any] = dict(self.plain)
        if self.head is not None:
            more["logits_to_keep"] = 1
        wanted = hidden or self.head is not None
        out = model(input_ids=input_ids, output_hidden_states=wanted, **more)
        layers = out.hidden_states[1:] if wanted else ()
        return (out.logits if self.head is None else out.hidden_states[-1]), layers

    def logits(self, states: Tensor) -> Tensor:
        return states if self.head is None else self.head(states)

    def parameters(self) -> list[Tensor]:
        """The weights that `logits` uses."""
        projection = getattr(self.head, "projection", self.head)
        return list(projection.parameters()) if isinstance(projection, nn.Module) else []


def predictor(model: PreTrainedModel, input_ids: Int[Tensor, "B T"], find_head: FindHead | None) -> Predictor:
    """The model as a `Predictor`; `find_head` gets it and the output of a forward pass over `input_ids`."""
    if find_head is None:
        return Predictor(model, None)
    with torch.no_grad():
        out = model(input_ids=input_ids.to(model.device), output_hidden_states=True)
    return Predictor(model, find_head(model, out))


class Windows:
    """Windows of text as the rows of a run, epoch after epoch, each epoch in an order of its own.

    `row` in a row: which window it is. A window's first label counts for nothing: nothing stands before it.
    """

    def __init__(self, windows_RT: Int[Tensor, "R T"], *, seed: int | None = None) -> None:
        self.windows, self.seed = windows_RT, seed

    def number(self, index: int) -> int:
        """Which window is sample `index` of the run."""
        epoch, place = divmod(index, len(self.windows))
        if self.seed is None:
            return place
        return int(np.random.RandomState([self.seed, epoch]).permutation(len(self.windows))[place])

    def row(self, index: int) -> dict[str, Any]:
        number = self.number(index)
        input_ids = self.windows[number]
        labels = input_ids.clone()
        labels[0] = IGNORED
        return {"input_ids": input_ids, "labels": labels, "row": number}


@dataclass(frozen=True)
class Objective:
    """What is made small. `top_k`: 0 for the whole vocabulary. `hidden`, `cross_entropy`: weights beside the KL's 1."""

    top_k: int = 0
    hidden: float = 0.0
    cross_entropy: float = 0.0
    temperature: float = 1.0


class HealingTrainer(GuardedTrainer):
    """Trains a student to predict what its teacher predicts.

    `student`, `teacher`: the parts of both models; `cached`: the teacher's top tokens, so that its model is not run.
    `blend`: set to (step + 1) / `blend_steps` at every step; nothing is evaluated before it is at 1. `patience`: stop
    after that many evaluations in a row that bring no better held-out KL.
    """

    objective: Objective
    blend: Blend | None

    def __init__(
        self,
        *arguments: Any,
        student: Predictor,
        teacher: Predictor,
        objective: Objective,
        cached: TeacherLogits | None = None,
        blend: Blend | None = None,
        blend_steps: int = 0,
        patience: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, callbacks=[Schedule(self), *callbacks], **settings)
        self.student, self.teacher, self.objective, self.cached = student, teacher, objective, cached
        self.blend, self.blend_steps, self.patience = blend, blend_steps, patience
        self.training_states: dict[int, Tensor] = {}  # by row: text comes again in the next epoch
        self.held_out_states: dict[int, Tensor] = {}

    # -------------------------------------------------------------------------------------------------- training

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over all predictions of KL, plus the weighted others."""
        aim = self.objective
        input_ids, at_BT = inputs["input_ids"], predictions(inputs["labels"])
        states, layers = self.student.states(model, input_ids, hidden=aim.hidden > 0)
        theirs_of, their_layers = self.targets(inputs, at_BT)
        labels_N = inputs["labels"].roll(-1, dims=1)[at_BT]

        def losses(part_ND: Tensor, part: slice) -> Tensor:
            logits = self.student.logits(part_ND)
            loss = theirs_of(logits, part)
            if aim.cross_entropy:
                loss = loss + aim.cross_entropy * next_token_loss(logits, labels_N[part])
            return loss

        mean = chunked_mean(losses, states[at_BT], rows=self.rows, parameters=self.student.parameters())
        if aim.hidden:
            mean = mean + aim.hidden * hidden_distance(layers, their_layers)
        count = int(at_BT.sum())
        return self.share_of_step(mean * count, num_items_in_batch, count)

    def targets(
        self, inputs: dict[str, Tensor], at_BT: Tensor
    ) -> tuple[Callable[[Tensor, slice], Tensor], Sequence[Tensor]]:
        """The KL of a part of the student's logits [n, V] as a function, and the teacher's hidden states."""
        aim, temperature = self.objective, self.objective.temperature
        if self.cached is not None:
            found = [each.to(at_BT.device)[at_BT] for each in self.cached.at(inputs["row"].tolist())]
            return lambda ours, part: topk_kl(ours, *(x[part] for x in found), temperature=temperature), ()
        with torch.no_grad(), self.in_its_own_dtype():
            if aim.hidden:
                states, layers = self.teacher.states(self.teacher.model, inputs["input_ids"], hidden=True)
            else:
                states, layers = self.their_states(inputs, self.training_states), ()
            states_ND = states[at_BT]

        def kl(ours: Tensor, part: slice) -> Tensor:
            with torch.no_grad(), self.in_its_own_dtype():
                theirs = self.teacher.logits(states_ND[part])
            if not aim.top_k:
                return full_kl(ours, theirs, temperature=temperature)
            return topk_kl(ours, *top_of(theirs, aim.top_k, temperature=temperature), temperature=temperature)

        return kl, layers

    def in_its_own_dtype(self) -> contextlib.AbstractContextManager[Any]:
        """The teacher is not run under the student's autocast: its predictions are what is aimed at."""
        return torch.autocast(self.args.device.type, enabled=False)

    @property
    def rows(self) -> int:
        config: Any = self.teacher.model.config
        return chunk_rows(config.get_text_config(decoder=True).vocab_size)

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluation_sums(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """KL(teacher || student) at temperature 1 over the whole vocabulary, whatever is trained on."""
        at_BT = predictions(inputs["labels"])
        with self.in_its_own_dtype():
            ours_ND = self.student.states(model, inputs["input_ids"])[0][at_BT]
            theirs_ND = self.their_states(inputs, self.held_out_states)[at_BT]

            def losses(ours: Tensor, part: slice) -> Tensor:
                return full_kl(self.student.logits(ours), self.teacher.logits(theirs_ND[part]))

            count = at_BT.sum()
            mean = chunked_mean(losses, ours_ND, rows=self.rows) if int(count) else torch.zeros(())
        return {"kl": mean.to(count.device) * count, "tokens": count}

    def their_states(self, inputs: dict[str, Tensor], kept: dict[int, Tensor]) -> Tensor:
        """The teacher's last states of the rows [B, T, D], from `kept` where it has them; else they are put there, as
        long as there is room (logits, of a teacher without a head of its own, are too large to keep)."""
        rows = inputs["row"].tolist()
        if all(row in kept for row in rows):
            return torch.stack([kept[row] for row in rows]).to(self.args.device)
        states, _ = self.teacher.states(self.teacher.model, inputs["input_ids"])
        if self.teacher.head is not None and (len(kept) + len(rows)) * states[0].nbytes <= KEPT_BYTES:
            kept |= dict(zip(rows, states.cpu(), strict=True))
        return states

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were all no better than one before them."""
        history = [entry[KL] for entry in self.state.log_history if KL in entry and entry["step"] > 0]
        if self.patience is None or len(history) <= self.patience:
            return False
        return min(history[-self.patience :]) >= min(history[: -self.patience])


def predictions(labels_BT: Int[Tensor, "B T"]) -> Tensor:
    """Which positions have a next token to predict, as booleans [B, T]."""
    return torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED) != IGNORED


class Schedule(TrainerCallback):
    """What depends on the step alone, so that a resumed run does the same: the blend, and when to look at the KL."""

    def __init__(self, trainer: HealingTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        steps = self.trainer.blend_steps
        if self.trainer.blend is not None:
            self.trainer.blend.set(min(1.0, (state.global_step + 1) / steps) if steps else 1.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < self.trainer.blend_steps:
            control.should_evaluate = False
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.is_in_train and self.trainer.out_of_patience():
            control.should_save = control.should_training_stop = True
