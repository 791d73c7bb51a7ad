"""What a fuse would do and whether it would succeed, from headers and a small sample of the weights."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.staging import check_free_space, check_output
from neuroweave.surgery.fusion.arithmetic import Effect
from neuroweave.surgery.fusion.estimate import coverage_matrix, estimate, rounding_warnings
from neuroweave.surgery.fusion.fuse import (
    DeltaInput,
    bytes_copied,
    bytes_rewritten,
    check_files,
    complete_plan,
    delta_sources,
    report_of,
)
from neuroweave.surgery.fusion.plan import FuseOptions


def dry_run(
    model: str | os.PathLike[str], out: str | os.PathLike[str] | None, deltas: DeltaInput, options: FuseOptions, *,
    overwrite: bool = False, copy: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A JSON-ready report. `problems` is empty when the fuse would succeed; values are looked at in a sample only.

    Raises ValueError, as a fuse would, for a model whose index and shards disagree.
    """
    folder = Path(model)
    check_files(folder)
    with Checkpoint(folder) as checkpoint:
        plan = complete_plan(checkpoint, deltas.source, options)
        files = plan.by_file()
        size = bytes_rewritten(checkpoint, plan, options)
        problems, reports = list(plan.problems), []
        if options.mode == "append":
            reports = [
                report_of(target, Effect(target.delta.parameters, target.delta.parameters), None)
                for target in plan.targets
            ]
        elif not problems:
            try:
                reports = estimate(plan, checkpoint, deltas.source, options)
            except ValueError as error:
                problems.append(str(error))
        if out is not None:
            try:
                check_output(out, overwrite=overwrite, sources=delta_sources(folder, deltas))
                check_free_space(out, size + bytes_copied(checkpoint, plan, out, copy=copy))
            except ValueError as error:
                problems.append(str(error))
        stated = (checkpoint.index or {}).get("metadata", {}).get("total_size")
        notes = [*plan.notes, *(rounding_warnings(reports, plan.dtypes) if deltas.may_round_away(options) else [])]
        if isinstance(stated, int) and stated != checkpoint.nbytes:
            notes.append(f"the index says total_size {stated}, the shards hold {checkpoint.nbytes} bytes of tensors")
        return {
            "model": {
                "folder": str(folder),
                "tensors": len(checkpoint),
                "parameters": checkpoint.parameters,
                "bytes": checkpoint.nbytes,
                "total_size_stated": stated,
                "shards": {
                    name: {"tensors": len(header.tensors), "bytes": header.data_bytes, "rewritten": name in files}
                    for name, header in checkpoint.shards.items()
                },
            },
            "options": asdict(options),
            "problems": problems,
            "notes": notes,
            "missing": plan.missing,
            "unexpected": plan.unexpected,
            "uncovered_layers": plan.uncovered,
            "deltas_not_used": plan.untouched_deltas,
            "bytes_rewritten": size,
            "coverage": coverage_matrix(plan),
            "tensors": [
                asdict(report)
                | {
                    "share_changed": report.share_changed,
                    "shape": list(target.stored.shape),
                    "covered_shape": list(target.delta.shape),
                    "dtype": target.stored.dtype,
                    "delta_dtype": target.delta.dtype,
                }
                for report, target in zip(reports, plan.targets, strict=bool(reports))
            ],
        }
