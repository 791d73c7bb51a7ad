"""What deltas a bank gives for a checkpoint, from headers and config.json alone: layers, sizes, activations, fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroweave.checkpoint.describe import (
    activation_after,
    activation_name,
    activation_text,
    base_config,
    place_in_list,
    text_config,
)
from neuroweave.checkpoint.header import DTYPE_NAMES, TensorSpec
from neuroweave.checkpoint.layers import GatedProjections, attention_kind, find_projections, find_stacks
from neuroweave.checkpoint.manifest import fingerprints
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.surgery.neurons.bank import Bank
from neuroweave.surgery.neurons.delta_parameters import check_parameters
from neuroweave.surgery.neurons.layer_deltas import DTYPES, SYMMETRIES, Projection
from neuroweave.surgery.neurons.slots import Layout, Realised, Slots, expand, without_twins

__all__ = ["GATE_SCALE", "PROJECTIONS", "DeltaLayer", "DeltaPlan", "check_parameters", "plan_deltas"]

PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
GATE_SCALE = 0.02
# What configurations call the activations that sign-symmetric pairs work with
ACTIVATIONS = {
    "silu": "silu", "swish": "silu",
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}  # fmt: skip
# Float16 loses digits below 2^-14 and ends at 2^-24; the other two lose digits below 2^-126.
_SMALLEST = {"F16": 2.0**-20, "BF16": 2.0**-120, "F32": 2.0**-120}


@dataclass(frozen=True)
class DeltaLayer:
    """One layer's deltas. `kind`: its attention; `neurons`: how many of its neurons get deltas, from the first on;
    `pairs`: how many slots are filled; `specs`: the tensors to write, by projection; `path`: of a further MLP in the
    layer, "" of the first."""

    layer: int
    kind: str
    activation: str
    neurons: int
    pairs: int
    specs: Mapping[Projection, TensorSpec]
    path: str = ""

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


@dataclass(frozen=True)
class DeltaPlan:
    """Everything about a set of deltas except their numbers.

    `parameters`: the keywords of `plan_deltas` that give this plan again; `left_out`: layers without deltas, and why;
    `slots`: a round, by activation; `realised`: how each behaviour is realised; `base_model`, `bank`: what a
    manifest says of the inputs.
    """

    parameters: dict[str, Any]
    hidden: int
    layers: tuple[DeltaLayer, ...]
    left_out: dict[int, str]
    slots: dict[str, Slots]
    realised: tuple[Realised, ...]
    base_model: dict[str, Any]
    bank: dict[str, Any]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor by its key, in the order of the layers."""
        return {spec.name: spec for layer in self.layers for spec in layer.specs.values()}

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For `--json` and the manifest."""
        return {
            "parameters": self.parameters,
            "hidden": self.hidden,
            "bytes": self.nbytes,
            "layers": [
                {
                    "layer": layer.layer,
                    "kind": layer.kind,
                    "activation": layer.activation,
                    "neurons": layer.neurons,
                    "pairs": layer.pairs,
                    "bytes": layer.nbytes,
                    "tensors": {
                        spec.name: {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape)}
                        for spec in layer.specs.values()
                    },
                }
                for layer in self.layers
            ],
            "left_out": {str(layer): reason for layer, reason in self.left_out.items()},
            "realised": [
                {
                    "name": each.name,
                    "neurons": each.neurons,
                    "activation": each.activation,
                    "pairs": len(each.fit.gains),
                    "error": each.fit.error,
                    "tolerance": each.tolerance,
                }
                for each in self.realised
            ],
            "base_model": self.base_model,
            "bank": self.bank,
        }


def plan_deltas(
    base_model: str | Path, bank: Bank, *, seed: int = 42, dtype: str | None = None,
    gate_scale: float | int = GATE_SCALE, neurons: int | None = None, layers: Sequence[int] | None = None,
    symmetry: str = SYMMETRIES[0],
) -> DeltaPlan:  # fmt: skip
    """Plan the deltas of `bank` for the checkpoint folder `base_model`. Reads no tensor data.

    `dtype`: bfloat16, float16 or float32 instead of the target's own; `gate_scale`: root mean square of a gate row at
    gain 1, of an up row, and of a down column at weight 1; `neurons`: deltas for the first so many neurons of each
    layer only; `layers`: these layers only; `symmetry`: `signs`, or `one-sided`, where the second of a pair equals the
    first (for comparison).
    Raises ValueError for a target that has no place for deltas, with the reason, and for a behaviour of the bank that
    an activation of the target does not realise.
    """
    parameters: dict[str, Any] = {"seed": seed, "dtype": dtype, "gate_scale": gate_scale, "neurons": neurons}
    parameters = check_parameters(parameters | {"layers": layers, "symmetry": symmetry})
    parameters["layers"] = None if layers is None else sorted(set(layers))
    if not len(bank):
        raise ValueError("the bank has no neurons; take another")
    folder = Path(base_model)
    with Checkpoint(folder, allow_orphans=True) as checkpoint:
        target = _Target(folder, checkpoint)
        chosen = target.choose(layers)
        code = next((code for code in DTYPES if DTYPE_NAMES[code] == dtype), None)
        counted = [bank.neurons[index] for index in without_twins(bank)]
        slots: dict[str, Slots] = {}
        realised: list[Realised] = []
        planned = []
        for found in chosen:
            activation = target.activation(found.layer)
            if activation not in slots:
                slots[activation], more = expand(counted, activation)
                realised += more
            specs = _specs(found, neurons, code)
            count = specs["gate"].shape[0]
            _check_sizes(slots[activation], [counted[i].name for i in slots[activation].neuron], specs, gate_scale)
            path = target.path(found)
            layout = Layout.draw(slots[activation], count // 2, seed=seed, layer=found.layer, path=path)
            if not layout.pairs:
                raise ValueError(
                    f"layer {found.layer}: {count} neurons have room for {count // 2} pairs, and no neuron of the bank "
                    "is realised by so few; take more neurons, or another bank"
                )
            kind = target.kind(found.layer)
            planned.append(DeltaLayer(found.layer, kind, activation, count, layout.pairs, specs, path))
        left_out = target.left_out if layers is None else {}
        return DeltaPlan(
            parameters, target.hidden, tuple(planned), left_out, slots, tuple(realised),
            {"files": fingerprints(checkpoint)}, _bank_record(bank),
        )  # fmt: skip


class _Target:
    """What headers and config.json say of the model that deltas are for."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.folder = folder
        stored = checkpoint.config()
        config, _, self._plan = base_config(stored)
        self._text = text_config(config)
        quantized = config.get("quantization_config") or self._text.get("quantization_config")
        if quantized:
            method = quantized.get("quant_method", "unnamed method") if isinstance(quantized, dict) else quantized
            raise ValueError(
                f"{folder}: the model is quantized ({method}); deltas are for weights in bfloat16, float16 or float32: "
                "take the original, or dequantize it first"
            )
        self._base = activation_name(self._text) or activation_name(config)
        tensors = list(checkpoint.values())
        stacks = find_stacks(tensors)
        self._layers = stacks[0].layers if stacks else {}
        self.found, self.left_out = find_projections(tensors)
        if not self.found:
            reasons = ", ".join(sorted(set(self.left_out.values()))) or "no layers"
            raise ValueError(f"{folder}: no layer has a gated MLP with gate_proj, up_proj and down_proj ({reasons})")
        self.hidden = self.found[0].hidden
        for each in self.found:
            if each.hidden != self.hidden:
                raise ValueError(
                    f"{folder}: layer {each.layer} has hidden size {each.hidden}, layer {self.found[0].layer} has "
                    f"{self.hidden}; deltas need one hidden size"
                )
        if self.hidden < 3:
            raise ValueError(f"{folder}: hidden size {self.hidden}; deltas need 3 or more")

    def choose(self, layers: Sequence[int] | None) -> list[GatedProjections]:
        """The MLPs of the chosen layers, or of all. Raises ValueError for layers that cannot have deltas."""
        if layers is None:
            chosen = self.found
        else:
            have = {each.layer for each in self.found}
            for layer in sorted(set(layers)):
                if layer not in self._layers:
                    raise ValueError(
                        f"{self.folder}: layer {layer} does not exist; the model has layers {min(self._layers)} to "
                        f"{max(self._layers)}"
                    )
                if layer not in have:
                    raise ValueError(f"{self.folder}: layer {layer} can have no deltas: {self.left_out[layer]}")
            chosen = [each for each in self.found if each.layer in set(layers)]
        for each in chosen:
            if each.intermediate < 2:
                raise ValueError(
                    f"{self.folder}: {each.gate.name} has {each.intermediate} rows; a pair needs 2 neurons: choose "
                    "other layers"
                )
            for spec in (each.gate, each.up, each.down):
                if spec.dtype not in DTYPES:
                    raise ValueError(
                        f"{self.folder}: {spec.name} is stored as {DTYPE_NAMES.get(spec.dtype, spec.dtype)}; deltas "
                        "are for weights in bfloat16, float16 or float32: take the original, or convert it first"
                    )
        return chosen

    def activation(self, layer: int) -> str:
        """The activation of a layer by its name in `formulas`. Raises ValueError where pairs are not odd with it."""
        stated = activation_after(self._plan, place_in_list(self._layers[layer]), self._base)
        if stated is None:
            raise ValueError(f"{self.folder}: config.json states no activation (hidden_act), which the pairs depend on")
        name = ACTIVATIONS.get(stated) if isinstance(stated, str) else None
        if name is None:
            raise ValueError(
                f"{self.folder}: layer {layer} runs {activation_text(stated)}; a pair's output is odd only "
                "for act(s) = s phi(s) with phi(s) + phi(-s) = 1, that is silu, gelu and gelu_tanh"
            )
        return name

    def path(self, mlp: GatedProjections) -> str:
        """What tells an MLP from the first (by name) of its layer: its module's path in the layer; "" for the first.

        The first one's numbers thus depend on nothing but the layer, whatever the model calls it.
        """
        if mlp.gate.name == min(each.gate.name for each in self.found if each.layer == mlp.layer):
            return ""
        name = next(name for name, spec in self._layers[mlp.layer].items() if spec.name == mlp.gate.name)
        return name.removesuffix(".weight").rpartition(".")[0]

    def kind(self, layer: int) -> str:
        return attention_kind(layer, self._layers[layer], self._text)


def _specs(found: GatedProjections, neurons: int | None, code: str | None) -> dict[Projection, TensorSpec]:
    count = found.intermediate if neurons is None else neurons
    if count > found.intermediate:
        raise ValueError(f"{count} neurons asked for, layer {found.layer} has {found.intermediate}")
    shapes = {"gate": (count, found.hidden), "up": (count, found.hidden), "down": (found.hidden, count)}
    specs: dict[Projection, TensorSpec] = {}
    for name in PROJECTIONS:
        target = getattr(found, name)
        specs[name] = TensorSpec(target.name, code or target.dtype, shapes[name])
    return specs


def _check_sizes(
    slots: Slots, names: Sequence[str], specs: Mapping[Projection, TensorSpec], gate_scale: float | int
) -> None:
    """Raise ValueError for numbers that the stored dtype cannot hold. An entry of a unit direction is 1 at most."""
    longest = gate_scale * math.sqrt(specs["gate"].shape[1])
    for code, factors, what in (
        (specs["gate"].dtype, slots.gain, "gain"),
        (specs["down"].dtype, slots.weight, "weight"),
    ):
        sizes = np.abs(factors.astype("f8"))
        worst = int(sizes.argmax())
        limit = 65504.0 if code == "F16" else 3e38
        if not longest * sizes[worst] <= limit:
            raise ValueError(f"neuron {names[worst]!r}: {what} {sizes[worst]:g} does not fit {DTYPE_NAMES[code]}")
        least = int(sizes.argmin())
        if gate_scale * sizes[least] < _SMALLEST[code]:
            advice = "bfloat16 or float32" if code == "F16" else "a larger gate scale"
            raise ValueError(
                f"neuron {names[least]!r}: {what} {sizes[least]:.3g} at gate scale {gate_scale:g} is too small for "
                f"{DTYPE_NAMES[code]}; take {advice}"
            )


def _bank_record(bank: Bank) -> dict[str, Any]:
    """What a manifest says of a bank: its hash, sizes, and where it came from, without lists of files and texts."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items() if key not in ("files", "text")}
        return [short(item) for item in value] if isinstance(value, list) else value

    about = {"sha256": bank.sha256, "neurons": len(bank), "hidden_size": bank.hidden_size}
    return about | {"provenance": short(bank.provenance)}
