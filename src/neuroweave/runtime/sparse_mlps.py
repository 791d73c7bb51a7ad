"""The gated MLPs of a transformers model, run without the neurons that act to a threshold at most. For GPUs.

One token goes through `neuroweave::sparse_glu`; a prompt is computed whole, with the same neurons at zero, so that the
model is one function however its text is cut. Letters: C hidden size, n neurons.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuroweave.activations.fused_glu import CLOSE, FORM, has_form, hooked, member_weights, mixtures_of, plan_of, probe
from neuroweave.runtime.lowering import decoder_layers
from neuroweave.runtime.sparse_glu_triton import sparse_glu

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class SparseMlps:
    """What `sparsify` did; calling it puts every MLP back. `sparse`: layers; `left`: layer -> why it runs dense."""

    sparse: list[int] = field(default_factory=list)
    left: dict[int, str] = field(default_factory=dict)
    blocks: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)

    def __call__(self) -> None:
        for block, old_class in self.blocks:
            put_back(block, old_class)
        self.blocks.clear()


def sparsify(model: Any, thresholds: dict[int, Tensor]) -> SparseMlps:
    """Skip neurons of this model instance: `thresholds` [n] by layer, each neuron's on |act(gate)|; what comes back
    undoes it.

    An MLP that is not `down_proj(act_fn(gate_proj(x)) * up_proj(x))` of plain layers, or gives another output on a
    probe with nothing skipped, stays as it is. `down_proj.weight` keeps its shape and numbers but lies neuron by neuron
    from then on, in the same memory; what a mixture has learned is read once. While gradients are recorded all is
    computed whole. Raises ValueError for layers that are not there and thresholds of another number of neurons.
    """
    layers, done = decoder_layers(model), SparseMlps()
    for number, least in thresholds.items():
        if not 0 <= number < len(layers):
            raise ValueError(f"thresholds for layer {number}, but the model has layers 0 to {len(layers) - 1}")
        neurons = getattr(getattr(getattr(layers[number], "mlp", None), "gate_proj", None), "out_features", None)
        if neurons is not None and list(least.shape) != [neurons]:
            raise ValueError(
                f"layer {number} has {neurons} neurons, its thresholds are {list(least.shape)}: give [{neurons}]"
            )
    for number, least in thresholds.items():
        try:
            sparsify_block(getattr(layers[number], "mlp", None), least, done)
            done.sparse.append(number)
        except ValueError as error:
            done.left[number] = str(error)
    return done


def sparsify_block(block: Any, least: Float[Tensor, " n"], done: SparseMlps) -> None:
    """Raises ValueError, and leaves the block as it was, where it cannot run sparse."""
    check_block(block)
    old_class: Any = type(block)
    thresholds = NeuronThresholds(block.act_fn, torch.zeros_like(least, device=block.down_proj.weight.device))
    C = block.gate_proj.in_features
    wanted = probe(block, C)
    turn(block.down_proj, by_neuron=True)
    block.neuron_thresholds = thresholds
    block.__class__ = with_sparse_glu(old_class)
    try:
        off = float((probe(RowByRow(block), C) - wanted).abs().max())
        if not off <= CLOSE.get(wanted.dtype, 3e-2) * float(wanted.abs().max()):
            raise ValueError("the sparse form gave another output")
    except ValueError:
        put_back(block, old_class)
        raise
    thresholds.least.copy_(least)
    done.blocks.append((block, old_class))


def check_block(block: Any) -> None:
    """Raises ValueError for an MLP that is not of the form, or whose layers are more than their weights."""
    block_class: Any = type(block)
    if not all(isinstance(getattr(block, name, None), nn.Module) for name in PROJECTIONS):
        raise ValueError("it has no gate, up and down projection")
    if hasattr(block, "neuron_thresholds"):
        raise ValueError("it is sparse already")
    if "forward" in vars(block):
        raise ValueError("its forward was wrapped")
    if not has_form(block_class):
        raise ValueError(f"the forward of {block_class.__name__} is not {FORM}")
    for name in PROJECTIONS:
        linear = getattr(block, name)
        if not plain(linear) or "forward" in vars(linear):
            raise ValueError(f"{name} is no plain linear layer without bias")
    kinds = {(getattr(block, name).weight.dtype, getattr(block, name).weight.device) for name in PROJECTIONS}
    if len(kinds) > 1:
        raise ValueError("its weights are of several dtypes or devices")


def plain(linear: Any) -> bool:
    return type(linear) is nn.Linear and linear.bias is None and not hooked(linear)


@torch.no_grad()
def turn(linear: nn.Linear, *, by_neuron: bool) -> None:
    """Lay a weight [D, n] out by columns, or by rows again; its shape and numbers stay."""
    weight = linear.weight
    weight.data = weight.data.t().contiguous().t() if by_neuron else weight.data.contiguous()


def put_back(block: Any, old_class: Any) -> None:
    block.__class__ = old_class
    del block.neuron_thresholds
    turn(block.down_proj, by_neuron=False)


class RowByRow(nn.Module):
    """A block that is given one row at a time, as decoding does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Float[Tensor, "rows C"]) -> Float[Tensor, "rows C"]:
        return torch.cat([self.block(row) for row in x.split(1)])


class NeuronThresholds(nn.Module):
    """The thresholds of an MLP's neurons and what its activation computes; in no state dict."""

    least: Tensor

    def __init__(self, activation: Any, least: Float[Tensor, " n"]) -> None:
        super().__init__()
        self.planned = (activation, plan_of(activation, len(least)))  # a tuple, or the activation would be a child
        self.register_buffer("least", least.float(), persistent=False)
        self.learned: list[Sequence[str]] = []
        mixtures = list(mixtures_of(activation))
        weights = [member_weights(each, torch.float32).detach() for each in mixtures]
        beta = [each.beta.detach().float() for each in mixtures if each.beta is not None]
        for kind, tensors in (("weights", weights), ("beta", beta)):
            self.learned.append([f"{kind}{number}" for number in range(len(tensors))])
            for name, tensor in zip(self.learned[-1], tensors, strict=True):
                self.register_buffer(name, tensor, persistent=False)

    def cut(self, acted: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        return torch.where(acted.abs() <= self.least, 0, acted)

    def forward(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, beta = ([getattr(self, name) for name in names] for names in self.learned)
        return sparse_glu(x, gate, up, down, self.least, weights, beta, self.planned[1])


@functools.cache
def with_sparse_glu(block_class: Any) -> Any:
    """A subclass of an MLP's class (same name) that skips neurons; layers are called if they changed or are watched."""

    def forward(self: Any, x: Tensor) -> Tensor:
        thresholds, layers = self.neuron_thresholds, [getattr(self, name) for name in PROJECTIONS]
        as_it_was = self.act_fn is thresholds.planned[0] and not hooked(self.act_fn) and all(map(plain, layers))
        if as_it_was and x.numel() == x.shape[-1] and not torch.is_grad_enabled():
            return thresholds(x, *(each.weight for each in layers))
        return self.down_proj(thresholds.cut(self.act_fn(self.gate_proj(x))) * self.up_proj(x))

    def reduce(self: Any, _: Any) -> tuple[Any, ...]:  # the class is made here, so pickle cannot find it by its name
        return blank_block, (block_class,), vars(self)

    names: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce}
    names |= {"__module__": block_class.__module__, "__qualname__": block_class.__qualname__}
    return type(block_class.__name__, (block_class,), names)


def blank_block(block_class: Any) -> nn.Module:
    return object.__new__(with_sparse_glu(block_class))
