"""What a fuse would do to each tensor, estimated from a sample of its weights: nothing is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.surgery.fusion.arithmetic import STORED, Edit, Effect, Moments, Workspace, block_moments, edit_block
from neuroweave.surgery.fusion.fuse import TensorReport
from neuroweave.surgery.fusion.plan import DeltaSource, FuseOptions, FusionPlan, Target

SAMPLED_ROWS = 16
SAMPLED_COLUMNS = 1 << 11
FLOOR = 0.005  # below this relative change most bfloat16 updates round away (measured: docs/fusion.md)


def estimate(plan: FusionPlan, checkpoint: Checkpoint, deltas: DeltaSource, options: FuseOptions) -> list[TensorReport]:
    """One report a target, from at most 16 stretches of 2,048 weights. Raises ValueError where a fuse would."""
    space = Workspace()
    return [_estimate(target, checkpoint, deltas, options, space) for target in plan.targets]


def _estimate(
    target: Target, checkpoint: Checkpoint, deltas: DeltaSource, options: FuseOptions, space: Workspace
) -> TensorReport:
    covered_rows, covered_columns = target.covered
    rows = np.unique(np.linspace(0, covered_rows - 1, SAMPLED_ROWS).astype(int)).tolist()
    columns = min(covered_columns, SAMPLED_COLUMNS)
    weights, delta = [], []
    for number, row in enumerate(rows):
        start = (covered_columns - columns) * number // max(1, len(rows) - 1)
        weights.append(_stretch(checkpoint, target, row, start, columns))
        delta.append(deltas.rows(target.delta.name, row, row + 1)[:, start : start + columns].copy())
    scale = None
    if target.formula != "contour gate":
        of_weights, of_delta = (
            Moments.join(block_moments(part, exact=True) for part in each) for each in (weights, delta)
        )
        scale = _scale(target, options, of_weights, of_delta)
    edit = Edit(
        target.stored.name, target.formula, target.stored.dtype, options.alpha, options.gamma_cap, scale or 0.0,
        options.seed if options.rounding == "stochastic" and target.stored.dtype != "F32" else None,
    )  # fmt: skip
    effect = Effect.join(edit_block(edit, w, d, 0, space) for w, d in zip(weights, delta, strict=True))
    share = effect.changed / effect.count if effect.count else 0.0
    return TensorReport(
        target.stored.name, target.layer, target.projection, target.coverage, scale,
        round(share * target.delta.parameters), target.delta.parameters, effect.relative_change,
    )  # fmt: skip


def _stretch(checkpoint: Checkpoint, target: Target, row: int, start: int, columns: int) -> np.ndarray:
    dtype = STORED[target.stored.dtype]
    begin = (row * target.matrix[1] + start) * dtype.itemsize
    data = checkpoint.read_bytes(target.stored.name, begin, begin + columns * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(1, columns)


def _scale(target: Target, options: FuseOptions, weights: Moments, delta: Moments) -> float:
    for moments, what in ((weights, "the weights hold"), (delta, "the delta holds")):
        if not moments.finite:
            raise ValueError(f"{target.stored.name}: {what} NaN or infinite values")
    return options.scale(target.stored.name, target.formula, weights.std, delta.std)


def rounding_warnings(reports: list[TensorReport], dtypes: dict[str, str]) -> list[str]:
    """What a person should know before writing: tensors whose update mostly rounds away."""
    weak = [
        report
        for report in reports
        if dtypes[report.name] == "BF16" and report.relative_change < FLOOR and report.count
    ]
    if not weak:
        return []
    lowest = f"{min(report.share_changed for report in weak):.1%}"
    highest = f"{max(report.share_changed for report in weak):.1%}"
    share = lowest if lowest == highest else f"{lowest} to {highest}"
    tensors = "1 bfloat16 tensor changes" if len(weak) == 1 else f"{len(weak)} bfloat16 tensors change"
    partial = (
        "of the weights that the deltas cover" if any(report.coverage < 1 for report in weak) else "of the weights"
    )
    return [
        f"{tensors} by less than {FLOOR:.1%} of the size: only {share} {partial} differ after rounding; "
        "use a larger --alpha, or --rounding stochastic"
    ]


def coverage_matrix(plan: FusionPlan) -> list[dict[str, Any]]:
    """A row a layer: the share of each projection that the deltas cover."""
    rows: dict[int | None, dict[str, Any]] = {}
    for target in plan.targets:
        row = rows.setdefault(target.layer, {"layer": target.layer, "gate": 0.0, "up": 0.0, "down": 0.0, "other": 0.0})
        row[target.projection] += target.coverage
    return [rows[layer] for layer in sorted(rows, key=lambda layer: (layer is None, layer or 0))]
