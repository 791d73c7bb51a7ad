"""One row for every array of a NeuroBLAST model on pytrees, and its layers as blocks of equal units. No torch, no JAX.

Layers that differ in nothing but their weights and their rotary positions are one block: their tensors are stacked, so
that one piece of code runs over all of them. Names, shapes and order are those of `weight_map.tensor_shapes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuroweave.activations.formulas import swish_member
from neuroweave.neuroblast.layer_plan import STAGES, PlannedLayer, plan_layers
from neuroweave.neuroblast.weight_map import EMBEDDING, HEAD, Shape, tensor_shapes

Edit = dict[str, Any]
Axes = tuple[str | None, ...]
FSDP, TENSOR = "fsdp", "tensor"

# The mesh axis along which each dimension of a tensor is cut, by the end of its name; others lie whole everywhere.
AXES: dict[str, Axes] = {
    "embed_tokens.weight": (TENSOR, FSDP),
    "lm_head.weight": (TENSOR, FSDP),
    **{f"{name}_proj.weight": (TENSOR, FSDP) for name in ("q", "k", "v", "gate", "up")},
    **{f"{name}_proj.bias": (TENSOR,) for name in ("q", "k", "v")},
    **{f"{name}_proj.weight": (FSDP, TENSOR) for name in ("o", "down")},
    "conv.weight": (TENSOR, FSDP, None),
    "proj_back.weight": (FSDP, TENSOR),
}


@dataclass(frozen=True)
class Initial:
    """How a tensor begins: `normal` with a standard deviation, `uniform` between -+ a bound, or `constant`; `zero_row`:
    the row of the padding token, which is zero."""

    kind: str
    size: float
    zero_row: int | None = None


@dataclass(frozen=True)
class TensorRow:
    """One array of the pytree. `key`: its name there, that of its first tensor; `names`: the checkpoint's tensors that
    it is made of, stacked along a new first dimension where `stacked`; `shape`, `axes`: of one of them; `initial`: None
    where a patch put it in, so that it comes from a checkpoint alone."""

    key: str
    names: tuple[str, ...]
    shape: Shape
    axes: Axes
    initial: Initial | None
    stacked: bool

    @property
    def array_shape(self) -> Shape:
        return (len(self.names), *self.shape) if self.stacked else self.shape

    @property
    def array_axes(self) -> Axes:
        return (None, *self.axes) if self.stacked else self.axes


@dataclass(frozen=True)
class Block:
    """`units` that run one after the other with the same code, each a tuple of layers."""

    stage: str
    units: tuple[tuple[PlannedLayer, ...], ...]

    @property
    def unit(self) -> tuple[PlannedLayer, ...]:
        """The first one, whose names are the keys of the block's arrays."""
        return self.units[0]


def edits_by_module(plan: Sequence[Edit]) -> dict[str, list[Edit]]:
    """Module path -> the edits of a patched checkpoint's plan that are made there."""
    found: dict[str, list[Edit]] = {}
    for edit in plan:
        for layer in edit.get("layers", [""]):
            path = edit["path"].replace("{}", str(layer))
            found.setdefault(path, []).append({k: v for k, v in edit.items() if k not in ("layers", "path", "site")})
    return found


def layer_edits(edits: Mapping[str, list[Edit]], layer: PlannedLayer) -> dict[str, list[Edit]]:
    """The edits in one layer, by the rest of the path; "" for the layer itself."""
    path = f"model.{layer.name}"
    return {
        where.removeprefix(path).removeprefix("."): made
        for where, made in edits.items()
        if where == path or where.startswith(f"{path}.")
    }


def blocks_of(config: Any, edits: Mapping[str, list[Edit]] | None = None) -> list[Block]:
    """The layers in their order: as many equal units as follow one another are one block.

    A unit is an attention layer and the convolution behind it, or a layer by itself.
    """

    def signature(unit: tuple[PlannedLayer, ...]) -> str:
        return json.dumps([[each.type, each.dilation, layer_edits(edits or {}, each)] for each in unit], sort_keys=True)

    blocks: list[Block] = []
    planned = plan_layers(config)
    for stage in STAGES:
        layers = [layer for layer in planned if layer.stage == stage]
        while layers:
            size = 2 if len(layers) > 1 and layers[1].is_convolution else 1
            unit, layers = tuple(layers[:size]), layers[size:]
            last = blocks[-1] if blocks else None
            if last is not None and last.stage == stage and signature(last.unit) == signature(unit):
                blocks[-1] = Block(stage, (*last.units, unit))
            else:
                blocks.append(Block(stage, (unit,)))
    return blocks


def tensor_table(config: Any, edits: Mapping[str, list[Edit]] | None = None) -> list[TensorRow]:
    """The rows of a configuration, with those of learned mixtures that `edits` put in."""
    added = added_tensors(edits or {})
    shapes = tensor_shapes(config) | added
    stacks: dict[str, list[str]] = {name: [name] for name in shapes}
    for block in blocks_of(config, edits):
        for place, first in enumerate(block.unit):
            prefix = f"model.{first.name}."
            for name in [name for name in stacks if name.startswith(prefix)]:
                own = [f"model.{unit[place].name}.{name.removeprefix(prefix)}" for unit in block.units]
                for other in own[1:]:
                    del stacks[other]
                stacks[name] = own
    return [
        TensorRow(
            key=name,
            names=tuple(names),
            shape=shapes[name],
            axes=axes_of(name, shapes[name]),
            initial=None if name in added else initial_of(name, shapes[name], config),
            stacked=len(names) > 1,
        )
        for name, names in stacks.items()
    ]


def axes_of(name: str, shape: Shape) -> Axes:
    known = [axes for end, axes in AXES.items() if f".{name}".endswith(f".{end}")]
    return known[0] if known else (None,) * len(shape)


def initial_of(name: str, shape: Shape, config: Any) -> Initial:
    """As the torch model begins: see its `_init_weights`."""
    if name in (EMBEDDING, HEAD):
        return Initial("normal", config.initializer_range, zero_row=config.pad_token_id if name == EMBEDDING else None)
    if name.endswith(".conv.weight"):
        _, channels, taps = shape
        return Initial("uniform", (channels * taps * taps) ** -0.5)
    if name.endswith(".proj_back.weight"):
        return Initial("uniform", shape[1] ** -0.5)
    if name.endswith(".bias"):
        return Initial("constant", 0.0)
    return Initial("normal", config.initializer_range) if len(shape) == 2 else Initial("constant", 1.0)


# --------------------------------------------------------------------------------------------- of learned mixtures


def added_tensors(edits: Mapping[str, list[Edit]]) -> dict[str, Shape]:
    """Checkpoint name -> shape of every tensor that a patch added."""
    found: dict[str, Shape] = {}
    for path, made in edits.items():
        for edit in made:
            for where, spec, neurons in activations_of(edit):
                prefix = ".".join(part for part in (path, where) if part)
                found |= {f"{prefix}.{name}": shape for name, shape in mixture_shapes(spec, neurons).items()}
    return found


def activations_of(edit: Edit) -> list[tuple[str, Any, int]]:
    """(path below the edited module, the activation, its neurons) of each activation that an edit puts in."""
    neurons = edit.get("neurons", 0)
    if edit["op"] == "activation":
        return [("", edit["activation"], neurons)]
    if edit["op"] == "layer_input":
        return [("input_activation", edit["activation"], neurons)]
    found = [("activation_before", edit["before"], neurons)] if "before" in edit else []
    for k, part in enumerate(edit.get("after", ())):
        if "start" in part:
            raise ValueError(f"{part}: a part of a fused projection, which NeuroBLAST has none of")
        found.append((f"activation_after.{k}", part["activation"], part.get("neurons", 0)))
    return found


def mixture_shapes(spec: Any, neurons: int) -> dict[str, Shape]:
    """The tensors of a learned mixture by name; none of any other activation."""
    if isinstance(spec, str) or "mixture" not in spec:
        return {}
    members = spec["mixture"]["members"]
    shapes: dict[str, Shape] = {"gating_logits": (neurons, len(members))}
    return shapes if swish_member(members) is None else shapes | {"beta": (neurons,)}
