"""Carry out a plan on one model instance, and undo it.

A plan is plain JSON: a list of edits, each at a module path. It is what a recipe resolves to on one architecture
(`sites.py`), it is stored in the patched checkpoint's config, and this file needs nothing but the plan to repeat it.
Three kinds of edit:

- `activation`: the activation child of an MLP is replaced;
- `projection`: activations before and after a projection (a linear layer), which keeps its parameters and their names;
- `layer_input`: an activation on the hidden states that enter a decoder layer.

Nothing but the given instance is touched: no class, module or function of PyTorch or transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from neuroweave.activations.mixtures import build_activation
from neuroweave.activations.torch import Activation

Edit = dict[str, Any]
Plan = list[Edit]
Function = TypeVar("Function", bound=Callable[..., Any])
Undo = Callable[[], None]  # objects, not closures: a copied or pickled model takes its own along


def once(function: Function) -> Function:
    """`functools.cache`, typed as the function it is given: classes made here are made once."""
    return functools.cache(function)  # type: ignore[return-value]


class CalledActivation(nn.Module):
    """A plain function that a model keeps as its activation, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class ProjectionPart(nn.Module):
    """An activation on the features `start:stop` of the last dimension, the rest unchanged (fused projections)."""

    def __init__(self, activation: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.activation = activation
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        left, middle, right = x.tensor_split((self.start, self.stop), dim=-1)
        return torch.cat((left, self.activation(middle), right), dim=-1)


class ActivatedProjection(nn.Module):
    """after(projection(before(x))), with the projection's own parameters under their own names.

    Deliberately no subclass of the projection's class: what replaces or adapts linear layers by class (quantizers,
    LoRA, serving engines) must not take this for a bare one and drop the activation. The parameters are the
    projection's: both share one dictionary, so loading, moving, tying and saving see them once, as before.
    """

    def __init__(self, projection: nn.Module, before: nn.Module | None, after: list[nn.Module]) -> None:
        super().__init__()
        self.__dict__["projection"] = projection  # not a child: a child would rename the parameters
        self._parameters = projection._parameters
        self._buffers = projection._buffers
        self._non_persistent_buffers_set = projection._non_persistent_buffers_set
        self._modules.update(projection._modules)
        self.training = projection.training
        if before is not None:
            self.activation_before = before
        self.activation_after = nn.ModuleList(after)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "activation_before" in self._modules:
            x = self.activation_before(x)
        x = self.projection(x, *args, **kwargs)
        for activation in self.activation_after:
            x = activation(x)
        return x

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["projection"], name)  # in_features and the like


@once
def with_input_activation(layer_class: type[Any]) -> type[Any]:
    """A subclass of a decoder layer's class (same name) that runs `input_activation` on the hidden states it gets."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (self.input_activation(args[0]), *args[1:])
        elif "hidden_states" in kwargs:
            kwargs["hidden_states"] = self.input_activation(kwargs["hidden_states"])
        else:
            raise TypeError(f"{layer_class.__name__} was called without hidden states; got {sorted(kwargs)}")
        return layer_class.forward(self, *args, **kwargs)

    def reduce(self: Any, _: Any) -> tuple[Any, ...]:  # the class is made here, so pickle cannot find it by its name
        return blank_layer, (layer_class,), vars(self)

    names: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce}
    names |= {"__module__": layer_class.__module__, "__qualname__": layer_class.__qualname__}
    return type(layer_class.__name__, (layer_class,), names)


def blank_layer(layer_class: type[nn.Module]) -> nn.Module:
    return object.__new__(with_input_activation(layer_class))


def apply_plan(model: nn.Module, plan: Plan, prefix: str = "") -> list[Undo]:
    """Make every edit of `plan` on `model`; returns what undoes them, last first.

    `prefix`: the attribute under which the plan's root holds this model, when `model` is only its base model (paths
    lose it). Raises ValueError when a path of the plan does not exist in the model; then nothing was changed.
    """
    undos: list[Undo] = []
    try:
        for edit in plan:
            for path in paths_of(edit):
                undos.insert(0, EDITS[edit["op"]](model, path.removeprefix(prefix), edit))
    except BaseException:
        for undo in undos:
            undo()
        raise
    return undos


def paths_of(edit: Edit) -> Iterator[str]:
    """Every module path of an edit: its `path`, with `{}` filled by each of its `layers`."""
    if "layers" not in edit:
        yield edit["path"]
    for layer in edit.get("layers", ()):
        yield edit["path"].replace("{}", str(layer))


def locate(model: nn.Module, path: str) -> tuple[nn.Module, str, Any]:
    """(parent module, attribute name, what is there). Raises ValueError when there is no such place."""
    parent_path, _, name = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        return parent, name, getattr(parent, name)
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} has no {path!r}, which the recipe changes; was the checkpoint patched for "
            f"another architecture, or under another version of transformers?"
        ) from error


@dataclass
class Replacement:
    """A child module was set; calling this puts back what was there, a plain function included."""

    parent: nn.Module
    name: str
    old: Any
    order: list[str]

    def __call__(self) -> None:
        delattr(self.parent, self.name)
        if isinstance(self.old, nn.Module):
            self.old.train(self.parent.training)
        setattr(self.parent, self.name, self.old)
        children = self.parent._modules
        for child in self.order:  # children keep their order: it decides the order of parameters
            if child in children:
                children[child] = children.pop(child)


def replace(parent: nn.Module, name: str, new: nn.Module) -> Undo:
    """Set a child module; returns what undoes it."""
    undo = Replacement(parent, name, getattr(parent, name), list(parent._modules))
    setattr(parent, name, new)
    return undo


def beside(module: nn.Module, new: nn.Module) -> nn.Module:
    """`new` on the device, in the dtype and in the mode of the module that it joins."""
    weight = next(module.parameters(), None)
    if weight is not None and any(True for _ in new.parameters()):
        new = new.to(weight.device, weight.dtype if weight.is_floating_point() else None)
    return new.train(module.training)


@dataclass
class LayerInput:
    """A layer was given an input activation; calling this takes it away."""

    layer: nn.Module
    old_class: type[nn.Module]

    def __call__(self) -> None:
        self.layer.__class__ = self.old_class
        del self.layer.input_activation


def edit_activation(model: nn.Module, path: str, edit: Edit) -> Undo:
    parent, name, old = locate(model, path)
    original = old if isinstance(old, nn.Module) else CalledActivation(old)
    new = build_activation(edit["activation"], original=original, neurons=edit.get("neurons"))
    return replace(parent, name, beside(parent, new))


def edit_projection(model: nn.Module, path: str, edit: Edit) -> Undo:
    parent, name, old = locate(model, path)
    if isinstance(old, ActivatedProjection):
        raise ValueError(f"{path} already has activations around it; undo that patch first")
    before = None
    if "before" in edit:
        before = build_activation(edit["before"], original=Activation("identity"), neurons=edit.get("neurons"))
    after = []
    for part in edit.get("after", ()):
        new = build_activation(part["activation"], original=Activation("identity"), neurons=part.get("neurons"))
        after.append(ProjectionPart(new, part["start"], part["stop"]) if "start" in part else new)
    return replace(parent, name, beside(old, ActivatedProjection(old, before, after)).train(parent.training))


def edit_layer_input(model: nn.Module, path: str, edit: Edit) -> Undo:
    _, _, layer = locate(model, path)
    if "forward" in vars(layer):
        raise ValueError(f"{path}: its forward was already wrapped by something else; patch the model before that")
    new = build_activation(edit["activation"], original=Activation("identity"), neurons=edit.get("neurons"))
    old_class = type(layer)
    layer.input_activation = beside(layer, new)
    layer.__class__ = with_input_activation(old_class)
    return LayerInput(layer, old_class)


EDITS: dict[str, Callable[[nn.Module, str, Edit], Undo]] = {
    "activation": edit_activation,
    "projection": edit_projection,
    "layer_input": edit_layer_input,
}
