"""Which tensors a fuse changes, by which delta and formula: decided and checked from headers alone.

A delta's key is the target's own, or names the same layer and projection under another prefix (`model.`,
`model.language_model.`, `language_model.model.`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from neuroweave.checkpoint.header import DTYPE_NAMES, TensorSpec
from neuroweave.checkpoint.layers import find_projections, find_stacks
from neuroweave.checkpoint.reader import Checkpoint, StoredTensor
from neuroweave.surgery.fusion.arithmetic import STORED

PROJECTIONS = ("gate", "up", "down")
OTHER = "other"
_NUMBERED = re.compile(r"^(?:.+?\.)?(?:layers?|h|blocks?)\.(\d+)\.(.+)$")


@runtime_checkable
class DeltaSource(Protocol):
    """Where deltas come from: a folder, or a bank and a seed."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Key to dtype and shape."""

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows `[begin, end)` of a delta (a vector is one row) in its stored dtype."""


@dataclass(frozen=True)
class FuseOptions:
    """What a fuse does. Raises ValueError for numbers that mean nothing.

    `mode`: `contour` (Shape-Contoured Fusion), `additive` or `append`. `alpha_mode`: the scale of an update is
    `seed`: alpha * std(W) / std(D); `relative`: alpha / std(D), so that the relative change of a contoured tensor has
    standard deviation alpha; `plain`: alpha. `targets`: projections, all of which the deltas must then hold in a
    layer; or `all`, for whatever tensors the deltas hold.
    `gain`: for `append`, what the new down columns are multiplied by; 0 keeps the model's function.
    """

    mode: str = "contour"
    alpha: float | int = 0.02
    alpha_mode: str = "seed"
    gamma_cap: float | int = 0.05
    layers: tuple[int, ...] | None = None
    targets: tuple[str, ...] = ("gate", "down")
    rounding: str = "nearest"
    seed: int = 42
    gain: float | int = 0.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("mode", ("contour", "additive", "append")),
            ("alpha_mode", ("seed", "relative", "plain")),
            ("rounding", ("nearest", "stochastic")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; known: {', '.join(choices)}")
        for name in ("alpha", "gamma_cap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is a number of at least 0, got {value}")
            object.__setattr__(self, name, float(value))  # 64 and 64.0 are the same job
        if not math.isfinite(self.gain):
            raise ValueError(f"gain is a finite number, got {self.gain}")
        known = (*PROJECTIONS, "all")
        for name in self.targets:
            if name not in known:
                raise ValueError(f"targets {name!r} is not known; known: {', '.join(known)}")
        if self.mode == "contour" and set(self.targets) - {"gate", "down"}:
            raise ValueError(f"targets {', '.join(self.targets)}: contour changes gate and down only; use additive")
        if self.mode == "append" and set(self.targets) - set(PROJECTIONS):
            raise ValueError(f"targets {', '.join(self.targets)}: append brings gate, up and down of whole neurons")
        if not self.targets:
            raise ValueError("targets is empty: nothing to change")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The projections that are changed: an append always brings whole neurons."""
        return PROJECTIONS if self.mode == "append" or "all" in self.targets else self.targets

    def scale(self, name: str, formula: str, std_weights: float, std_delta: float) -> float:
        """The factor of an update, from population standard deviations. Raises ValueError for a constant delta."""
        if self.alpha_mode == "plain":
            return self.alpha
        if std_delta == 0:
            raise ValueError(f"{name}: the delta has no variance (all values are equal): it has no direction")
        relative = self.alpha_mode == "relative" and formula == "contour down"
        return self.alpha * (1.0 if relative else std_weights) / std_delta


@dataclass(frozen=True)
class Target:
    """A tensor to change. `formula`: a key of `fusion.FORMULAS`. Only the leading `rows` x `columns` block changes."""

    stored: StoredTensor
    delta: TensorSpec
    layer: int | None
    projection: str
    formula: str

    @property
    def matrix(self) -> tuple[int, int]:
        """The target's shape as rows and columns; a vector is one row, leading axes of a larger one are joined."""
        return as_matrix(self.stored.shape)

    @property
    def covered(self) -> tuple[int, int]:
        return as_matrix(self.delta.shape)

    @property
    def coverage(self) -> float:
        total = self.stored.parameters
        return self.delta.parameters / total if total else 1.0


@dataclass
class FusionPlan:
    """`problems` make a fuse fail; `notes` do not. `uncovered`: layers with an MLP that no delta touches."""

    targets: list[Target] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    untouched_deltas: int = 0
    uncovered: list[int] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)

    @property
    def dtypes(self) -> dict[str, str]:
        """Target to its stored dtype."""
        return {target.stored.name: target.stored.dtype for target in self.targets}

    def by_file(self) -> dict[str, list[Target]]:
        """File name to its targets in the order of their place."""
        files: dict[str, list[Target]] = {}
        for target in sorted(self.targets, key=lambda target: target.stored.offset):
            files.setdefault(target.stored.file, []).append(target)
        return files


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def plan_fusion(checkpoint: Checkpoint, deltas: DeltaSource, options: FuseOptions) -> FusionPlan:
    """Match deltas to tensors and check everything that headers can tell. Reads no tensor data and raises nothing."""
    plan = FusionPlan()
    projections, plan.left_out = find_projections(checkpoint.values())
    roles = {
        getattr(mlp, role).name: (mlp.layer, role) for mlp in projections for role in PROJECTIONS
    }  # name -> layer, projection
    layers = sorted({mlp.layer for mlp in projections})
    _check_model(checkpoint, plan)
    chosen = _chosen_layers(layers, plan, options)
    stack = next(iter(find_stacks(checkpoint.values())), None)
    for name, spec in deltas.specs.items():
        key = _matching_key(name, checkpoint, stack.prefix if stack else None)
        if key is None:
            plan.unexpected.append(name)
            continue
        layer, projection = roles.get(key, (None, OTHER))
        if projection == OTHER and "all" not in options.targets:
            plan.problems.append(_not_a_projection(key, plan))
        elif projection != OTHER and projection not in options.wanted:
            plan.untouched_deltas += 1
        elif layer in chosen or (layer is None and options.layers is None):
            formula = {"contour": f"contour {projection}", "additive": "add", "append": "append"}[options.mode]
            target = Target(checkpoint[key], spec, layer, projection, formula)
            problem = _misfit(target, options)
            plan.problems.extend([problem] if problem else [])
            plan.targets.append(target)
    order = (*PROJECTIONS, OTHER)
    plan.targets.sort(
        key=lambda target: (target.layer is None, target.layer or 0, order.index(target.projection), target.stored.name)
    )
    _check_keys(plan, roles, chosen, options)
    return plan


def _check_model(checkpoint: Checkpoint, plan: FusionPlan) -> None:
    quantization = checkpoint.config().get("quantization_config") if _has_config(checkpoint) else None
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        plan.problems.append(
            f"{checkpoint.folder}: a quantized model ({method}): its weights are codes with scales apart, "
            "and an edit of the codes is not an edit of the weights; fuse the unquantized model"
        )


def _has_config(checkpoint: Checkpoint) -> bool:
    return (checkpoint.folder / "config.json").is_file()


def _chosen_layers(layers: list[int], plan: FusionPlan, options: FuseOptions) -> set[int]:
    if options.layers is None:
        return set(layers)
    for number in options.layers:
        if number in plan.left_out and number not in layers:
            plan.problems.append(f"layer {number} cannot be fused: {plan.left_out[number]}")
        elif number not in layers:
            span = f"layers {layers[0]} to {layers[-1]}" if layers else "no gated MLP in any layer"
            plan.problems.append(f"layer {number} does not exist: the model has {span}")
    return set(options.layers)


def _matching_key(name: str, checkpoint: Checkpoint, prefix: str | None) -> str | None:
    """The model's key for a delta's: the same, or the same layer and projection under the text decoder's prefix."""
    if name in checkpoint:
        return name
    match = _NUMBERED.match(name)
    stack = next(iter(find_stacks([TensorSpec(name, "F32", (1,))])), None)
    if not match or not prefix or stack is None or re.search(r"vision|audio|visual|image", stack.prefix):
        return None
    key = f"{prefix}.{match[1]}.{match[2]}"
    return key if key in checkpoint else None


def _not_a_projection(key: str, plan: FusionPlan) -> str:
    match = _NUMBERED.match(key)
    reason = plan.left_out.get(int(match[1])) if match and "expert" in key else None
    reason = reason or "not a gate, up or down projection of the text decoder's dense MLPs"
    return f"{key}: {reason}; it cannot be fused by this mode"


def _misfit(target: Target, options: FuseOptions) -> str | None:
    stored, delta = target.stored, target.delta
    for what, dtype in (("the model stores it as", stored.dtype), ("the delta is", delta.dtype)):
        if dtype not in STORED:
            allowed = ", ".join(DTYPE_NAMES[code] for code in STORED)
            reason = "a quantized tensor needs its scales to be edited with it" if dtype.startswith("F8") else ""
            return f"{stored.name}: {what} {DTYPE_NAMES.get(dtype, dtype)}, only {allowed} can be fused" + (
                f" ({reason})" if reason else ""
            )
    if len(delta.shape) != len(stored.shape) or (len(delta.shape) != 2 and delta.shape != stored.shape):
        return f"{stored.name}: the delta has shape {list(delta.shape)}, the tensor {list(stored.shape)}"
    if options.mode != "append" and any(d > s for d, s in zip(delta.shape, stored.shape, strict=True)):
        return (
            f"{stored.name}: the delta of shape {list(delta.shape)} is larger than the tensor of shape "
            f"{list(stored.shape)}; generate deltas for this model"
        )
    if 0 in delta.shape:
        return f"{stored.name}: the delta of shape {list(delta.shape)} is empty"
    return None


def _check_keys(plan: FusionPlan, roles: Mapping[str, tuple[int, str]], chosen: set[int], options: FuseOptions) -> None:
    covered = {target.stored.name for target in plan.targets}
    if len(covered) < len(plan.targets):
        names = [target.stored.name for target in plan.targets]
        twice = next(name for name in names if names.count(name) > 1)
        plan.problems.append(f"{twice}: two deltas mean this tensor")
    if plan.unexpected:
        more = f" (and {len(plan.unexpected) - 1} more)" if len(plan.unexpected) > 1 else ""
        plan.problems.append(f"the model has no tensor for the delta {plan.unexpected[0]!r}{more}")
    wanted = set(options.wanted)
    whole = "all" not in options.targets  # `all` means what the deltas hold of a layer, be it one projection
    touched = {target.layer for target in plan.targets if target.layer is not None}
    for name, (layer, role) in roles.items():
        if layer not in chosen or role not in wanted or name in covered:
            continue
        if layer in touched:
            plan.missing.extend([name] if whole else [])
        elif options.layers is not None:
            plan.missing.append(name)
        elif layer not in plan.uncovered:
            plan.uncovered.append(layer)
    if plan.missing:
        more = f" (and {len(plan.missing) - 1} more)" if len(plan.missing) > 1 else ""
        plan.problems.append(f"no delta for {plan.missing[0]}{more}; name fewer --targets or --layers, or add it")
    if not plan.targets and not plan.problems:
        plan.problems.append("no delta means a tensor of the chosen layers and targets: nothing would change")
    if options.rounding == "stochastic" and plan.targets and set(plan.dtypes.values()) == {"F32"}:
        plan.notes.append("--rounding stochastic changes nothing here: every tensor to be changed is float32")
    if plan.uncovered:
        plan.notes.append(f"no delta for {_layers(plan.uncovered)}: left as it is")
    if plan.left_out:
        reasons: dict[str, list[int]] = {}
        for layer, reason in plan.left_out.items():
            reasons.setdefault(reason, []).append(layer)
        for reason, numbers in reasons.items():
            plan.notes.append(f"{_layers(numbers)}: {reason}, left as it is")


def _layers(numbers: list[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
