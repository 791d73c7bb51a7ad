"""Blend a patched model from the activations that it had to those of its recipe, gradually, while it is trained.

At every patched place the model computes (1 - a) * old(x) + a * new(x). Nothing is replaced: a hook behind each new
activation mixes the old one in, so parameters keep their names at every amount and what is saved is the patched model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from neuroweave.activations.torch import Activation
from neuroweave.surgery.apply import CalledActivation, beside, locate, paths_of
from neuroweave.surgery.modeling import PatchedModel, plan_for


class Blending:
    """Mixes the teacher's activations into a patched `student`; `set(a)` moves it, `undo()` takes the hooks away.

    `teacher`: the same model unpatched, whose activation modules are copied (so one with weights of its own comes with
    them). Around projections and before layers the old activation is the identity. Begins at 1, the patched model; at 0
    it computes bit for bit what the teacher does with the student's weights. A calibrated student's weights are made
    for its new activations, their neurons in another order: blend one that is patched and nothing else.
    Place the models on their devices before. Raises ValueError for a model that is not patched, or a patched teacher.
    """

    amount: float
    _handles: list[RemovableHandle]

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        if not isinstance(student, PatchedModel):
            raise ValueError(f"{type(student).__name__} is not a patched model; there is nothing to blend")
        if isinstance(teacher, PatchedModel):
            raise ValueError(
                "the teacher is patched itself; blending starts from the activations of an unpatched model"
            )
        pairs = list(places(student, teacher))  # all of them, before the first hook
        self.amount = 1.0
        self._hooks = [Mixed(self, old) for _, old in pairs]
        self._handles = [new.register_forward_hook(hook) for (new, _), hook in zip(pairs, self._hooks, strict=True)]

    def set(self, amount: float) -> None:
        """0: the old activations; 1: the new ones. Raises ValueError outside of that."""
        if not 0 <= amount <= 1:
            raise ValueError(f"a blend of {amount}; give a number from 0 (the old activations) to 1 (the new ones)")
        self.amount = float(amount)

    def undo(self) -> None:
        """The patched model is by itself again. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class Mixed:
    """The hook behind one new activation."""

    def __init__(self, blending: Blending, old: nn.Module) -> None:
        self.blending, self.old = blending, old

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        amount = self.blending.amount
        if amount == 1:
            return None  # the output stays as it is
        old = self.old(inputs[0])
        return old if amount == 0 else old.lerp(output, amount)


def places(student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(new activation in the student, old activation) at every place of the student's plan."""
    plan, prefix = plan_for(student, student.config.neuroweave)
    for edit in plan:
        for path in (path.removeprefix(prefix) for path in paths_of(edit)):
            parent, _, new = locate(student, path)
            if edit["op"] == "activation":
                _, _, old = locate(teacher, path)
                old = copy.deepcopy(old) if isinstance(old, nn.Module) else CalledActivation(old)
                yield new, beside(parent, old).requires_grad_(False)
            elif edit["op"] == "projection":
                before = [new.activation_before] if "activation_before" in new._modules else []
                yield from ((each, Activation("identity")) for each in (*before, *new.activation_after))
            else:
                yield new.input_activation, Activation("identity")
