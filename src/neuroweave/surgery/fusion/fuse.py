"""Fuse deltas into a checkpoint of any size: no model class, no whole tensor in memory, nothing dropped.

A shard with targets is rewritten block by block under its own header; any other shard is hard-linked or copied; every
other file comes along to the byte. The output appears by a rename, with a manifest of what went in and came out.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neuroweave import __version__
from neuroweave.checkpoint.copying import copy_file, link_or_copy
from neuroweave.checkpoint.journal import JOURNAL_FILE, Journal
from neuroweave.checkpoint.layers import find_embedding
from neuroweave.checkpoint.manifest import MANIFEST_FILE, file_entry, read_manifest, stamp, write_manifest
from neuroweave.checkpoint.reader import INDEX_FILE, WEIGHT_FORMS, Checkpoint, list_files
from neuroweave.checkpoint.rewriting import Group, Rewriter, ShardRewrite, copy_pieces
from neuroweave.checkpoint.staging import check_free_space, check_output, staged_folder
from neuroweave.surgery.fusion.append import added_bytes, append_shard, check_append, write_grown_files
from neuroweave.surgery.fusion.arithmetic import Effect
from neuroweave.surgery.fusion.compiled import load
from neuroweave.surgery.fusion.delta_source import StoredDeltas
from neuroweave.surgery.fusion.plan import DeltaSource, FuseOptions, FusionPlan, Target, plan_fusion
from neuroweave.surgery.fusion.tensor_edit import TensorEdit

_LINK_ABOVE = 1 << 26  # other files that are larger are hard-linked where possible


@dataclass(frozen=True)
class TensorReport:
    """What a fuse did to one tensor. `scale`: the factor of the update (None for gates). `share_changed`: of the
    covered weights, after rounding. `relative_change`: norm of the update over the norm of the covered weights."""

    name: str
    layer: int | None
    projection: str
    coverage: float
    scale: float | None
    changed: int
    count: int
    relative_change: float

    @property
    def share_changed(self) -> float:
        return self.changed / self.count if self.count else 0.0


@dataclass(frozen=True)
class FusionResult:
    """What `fuse_checkpoint` wrote. Each shard is counted once: `rewritten`, `linked` or `copied` by this run, or
    `resumed`, taken over from an interrupted one."""

    folder: Path
    tensors: list[TensorReport]
    plan: FusionPlan
    rewritten: int
    linked: int
    copied: int
    resumed: int
    manifest: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class DeltaInput:
    """Deltas and what the manifest says of them. `files`: to be hashed; `stamp`: changes when the deltas do; `reads`:
    further files that the job depends on, which no output may replace; `difference`: of two stored checkpoints, so that
    added as it is nothing of it rounds away."""

    source: DeltaSource
    description: dict[str, Any]
    files: dict[str, Path]
    stamp: Any
    reads: tuple[Path, ...] = ()
    difference: bool = False

    def may_round_away(self, options: FuseOptions) -> bool:
        """Whether a fuse of these deltas may lose them to the rounding of the stored type."""
        as_it_is = (options.mode, options.alpha_mode, options.alpha) == ("additive", "plain", 1)
        return options.mode != "append" and not (self.difference and as_it_is)


def stored_deltas(folder: str | os.PathLike[str]) -> DeltaInput:
    """A folder of deltas as the input of a fuse."""
    source = StoredDeltas(folder)
    made_by = read_manifest(folder)
    description: dict[str, Any] = {"kind": "deltas"}
    if made_by is not None and made_by.get("operation") == "deltas":
        description["generation"] = {"parameters": made_by["parameters"], "bank": made_by["inputs"].get("bank", {})}
    names = [*source.checkpoint.shards, *([MANIFEST_FILE] if made_by is not None else [])]
    files = {name: Path(folder) / name for name in names}
    difference = made_by is not None and made_by.get("operation") == "extract-delta"
    stamps = [stamp(path) for path in files.values()]
    return DeltaInput(source, description, files, stamps, difference=difference)


def fuse_checkpoint(
    model: str | os.PathLike[str], out: str | os.PathLike[str], deltas: DeltaInput, options: FuseOptions, *,
    hashed: bool = True, workers: int | None = None, copy: bool = False, overwrite: bool = False,
    scales: Mapping[str, float] | None = None, check: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FusionResult:  # fmt: skip
    """Write `out`: the checkpoint folder `model` with the deltas fused into it.

    A run that was killed or stopped is taken up again by the same call and ends with the same bytes. `workers`: threads
    (default: one a core, at most 4). `scales`: recorded scales by tensor name, instead of measuring standard
    deviations. `check(manifest)`: called before the output appears, and may raise. `progress(done, total)`: bytes
    written, from any thread.
    Raises ValueError for anything that the plan finds wrong, an output that cannot be used, too little disk space,
    and values that are not finite; OSError from the system. Whatever happens, `model` is only read.
    """
    folder = Path(model)
    sources = delta_sources(folder, deltas)
    check_output(out, overwrite=overwrite, sources=sources)
    check_files(folder)
    with Checkpoint(folder) as checkpoint:
        plan = complete_plan(checkpoint, deltas.source, options)
        if plan.problems:
            more = f" (and {len(plan.problems) - 1} more problems: --dry-run lists them)" if plan.problems[1:] else ""
            raise ValueError(plan.problems[0] + more)
        rewritten = bytes_rewritten(checkpoint, plan, options)
        check_free_space(out, rewritten + bytes_copied(checkpoint, plan, out, copy=copy))
        job = _Job(checkpoint, deltas, options, plan, hashed, copy, dict(scales or {}))
        resume = job.key()
        with staged_folder(out, overwrite=overwrite, sources=sources, resume=resume) as stage:
            journal = Journal(stage, resume)
            counter = _Counter(rewritten, progress)
            with Rewriter(workers=workers or default_workers(), hashed=hashed, progress=counter.add) as rewriter:
                job.write(stage, journal, rewriter, counter)
            manifest = job.finish(stage)
            if check:
                check(manifest)
            journal.remove()
    reports = [TensorReport(**report) for reports in job.reports.values() for report in reports]
    return FusionResult(Path(out), reports, plan, job.rewritten, job.linked, job.copied, job.resumed, manifest)


def complete_plan(checkpoint: Checkpoint, deltas: DeltaSource, options: FuseOptions) -> FusionPlan:
    """The plan, with what an append needs checked too. Raises ValueError for a model in the place of deltas."""
    if isinstance(deltas, StoredDeltas) and "all" not in options.targets:
        check_no_model(deltas.checkpoint)
    plan = plan_fusion(checkpoint, deltas, options)
    if options.mode == "append" and plan.targets:
        check_append(checkpoint, plan)
    others = [name for name in checkpoint.other_files if name.endswith(WEIGHT_FORMS)]
    if others:
        plan.notes.append(f"{', '.join(others)}: comes along as it is and still holds the original weights")
    return plan


def check_no_model(deltas: Checkpoint) -> None:
    """Raise ValueError for a folder of deltas that is a model: a configuration and an embedding."""
    if "config.json" in deltas.all_files and find_embedding(deltas.values()) is not None:
        raise ValueError(
            f"{deltas.folder}: a model, not deltas; `neuroweave deltas --base-model` makes deltas for a model, "
            "`neuroweave extract-delta A B` those that turn one model into another"
        )


def delta_sources(model: Path, deltas: DeltaInput) -> list[Path]:
    """Everything that the job reads."""
    return [model, *{path.parent for path in deltas.files.values()}, *deltas.reads]


def bytes_rewritten(checkpoint: Checkpoint, plan: FusionPlan, options: FuseOptions) -> int:
    size = sum((checkpoint.folder / name).stat().st_size for name in plan.by_file())
    return size + (sum(added_bytes(target) for target in plan.targets) if options.mode == "append" else 0)


def bytes_copied(checkpoint: Checkpoint, plan: FusionPlan, out: str | os.PathLike[str], *, copy: bool) -> int:
    """What the other files take on the output's disk: nothing where they can be hard-linked."""
    place = Path(os.path.abspath(out)).parent
    while not place.exists():
        place = place.parent
    total, rewritten = 0, plan.by_file()
    for name in checkpoint.all_files:
        state = (checkpoint.folder / name).stat()
        linked = not copy and state.st_dev == place.stat().st_dev
        small = name not in checkpoint.shards and state.st_size <= _LINK_ABOVE
        total += state.st_size if name not in rewritten and (small or not linked) else 0
    return total


def compiled_bytes(plan: FusionPlan, options: FuseOptions) -> int:
    """Bytes of deltas that compiled arithmetic can work on."""
    return sum(
        target.delta.nbytes
        for target in plan.targets
        if options.mode != "append" and target.stored.dtype == target.delta.dtype == "BF16"
    )


def check_files(folder: Path) -> None:
    """Refuse, before anything is written, what cannot come along: files that are none, and a damaged manifest."""
    if not folder.is_dir():
        return
    for name in list_files(folder):
        path = folder / name
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{folder}: the file name {name!r} is not UTF-8; rename it") from None
        if not path.is_file():
            what = "a link to nothing" if path.is_symlink() else "neither a file nor a folder"
            raise ValueError(f"{path}: {what}; remove it, or restore it")
        if name == JOURNAL_FILE:
            raise ValueError(f"{path}: the journal of an interrupted fuse; this folder is not a finished checkpoint")
    read_manifest(folder)


def default_workers() -> int:
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class _Counter:
    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.total, self.done, self._progress = total, 0, progress

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self._progress:
            self._progress(self.done, self.total)


class _Job:
    """One fuse under way."""

    def __init__(
        self, checkpoint: Checkpoint, deltas: DeltaInput, options: FuseOptions, plan: FusionPlan,
        hashed: bool, copy: bool, scales: dict[str, float],
    ) -> None:  # fmt: skip
        self.checkpoint, self.deltas, self.options, self.plan = checkpoint, deltas, options, plan
        self.targets = plan.by_file()
        self.hashed, self.copy, self.scales = hashed, copy, scales
        self.kernel = load(compiled_bytes(plan, options))
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.inputs: dict[str, dict[str, Any]] = {}
        self.outputs: dict[str, dict[str, Any]] = {}
        self.delta_files: dict[str, dict[str, Any]] = {}
        self.rewritten = self.linked = self.copied = self.resumed = 0

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    def key(self) -> str:
        """Sixteen digits that change with the inputs, the options and the version."""
        files = {*self.checkpoint.shards, *self.checkpoint.all_files}
        state = [__version__, asdict(self.options), self.scales, self.hashed, self.copy, self.deltas.description]
        state += [self.deltas.stamp, [(name, stamp(self.folder / name)) for name in sorted(files)]]
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def write(self, stage: Path, journal: Journal, rewriter: Rewriter, counter: _Counter) -> None:
        waiting: dict[str, tuple[Future | None, Future | None]] = {}
        delta_hashes = {
            name: rewriter.hash_file(path) if self.hashed else None for name, path in self.deltas.files.items()
        }
        for name in self.checkpoint.shards:
            if (known := self._taken_over(name, journal)) is not None:
                self.resumed += 1
                self.reports[name] = known["reports"]
                self.inputs[name], self.outputs[name] = known["input"], known["output"]
                counter.add((stage / name).stat().st_size if name in self.targets else 0)
                continue
            (stage / name).unlink(missing_ok=True)
            source = self.folder / name
            digest_in = rewriter.hash_file(source) if self.hashed else None
            digest_out: Future | None = digest_in
            if name in self.targets:
                rewrite, report = self._append(name) if self.options.mode == "append" else self._rewrite(name)
                digest_out = rewriter.write(rewrite, stage / name, mode=mode_of(source))
                self.reports[name] = [asdict(each) for each in report()]
                self.rewritten += 1
            elif link_or_copy(source, stage / name, copy=self.copy):
                self.linked += 1
            else:
                self.copied += 1
            waiting[name] = (digest_in, digest_out)
            self._settle(stage, journal, waiting, wait=False)
            self.checkpoint.close()  # until the next shard: a process may hold some hundred files open only
            if isinstance(self.deltas.source, StoredDeltas):
                self.deltas.source.close()
        self._settle(stage, journal, waiting, wait=True)
        for name, future in delta_hashes.items():
            self.delta_files[name] = self._entry(self.deltas.files[name], future)

    def _taken_over(self, name: str, journal: Journal) -> dict[str, Any] | None:
        """The journal's entry of a shard that is complete, if its source is still what it was made from."""
        known = journal.completed(name)
        if known is None or (self.hashed and known["input"] != file_entry(self.folder / name)):
            return None
        return known

    def _settle(
        self, stage: Path, journal: Journal, waiting: dict[str, tuple[Future | None, Future | None]], *, wait: bool
    ) -> None:
        """Enter shards whose hashes are there into the journal."""
        for name, futures in list(waiting.items()):
            if not wait and any(future is not None and not future.done() for future in futures):
                continue
            self.inputs[name] = self._entry(self.folder / name, futures[0])
            self.outputs[name] = self._entry(stage / name, futures[1])
            journal.complete(
                name, input=self.inputs[name], output=self.outputs[name], reports=self.reports.setdefault(name, [])
            )
            del waiting[name]

    def _entry(self, path: Path, digest: Future | None) -> dict[str, Any]:
        entry = file_entry(path, hashed=False)
        return entry if digest is None else entry | {"sha256": digest.result()}

    def _append(self, name: str) -> tuple[ShardRewrite, Callable[[], list[TensorReport]]]:
        targets = self.targets[name]
        effects, rewrite = append_shard(self.checkpoint, name, targets, self.deltas.source, self.options.gain)
        return rewrite, lambda: [report_of(target, effects[target.stored.name], None) for target in targets]

    def _rewrite(self, name: str) -> tuple[ShardRewrite, Callable[[], list[TensorReport]]]:
        """The shard under its own header: tensors in the order of their place, untouched stretches as copies."""
        header, descriptor = self.checkpoint.shards[name], self.checkpoint.descriptor(name)
        head = os.pread(descriptor, header.data_start, 0)
        size = header.data_start + header.data_bytes
        edits, groups, position = [], [], header.data_start
        for target in self.targets[name]:
            begin = target.stored.offset
            groups.append(Group(copy_pieces(descriptor, position, position, begin - position)))
            scale = self.scales.get(target.stored.name)
            edit = TensorEdit(target, self.checkpoint, self.deltas.source, self.options, scale, self.kernel)
            edits.append(edit)
            groups.append(edit.group(begin))
            position = begin + target.stored.nbytes
        groups.append(Group(copy_pieces(descriptor, position, position, size - position)))
        reports = lambda: [report_of(edit.target, edit.effect, edit.scale) for edit in edits]  # noqa: E731
        return ShardRewrite(name, head, size, groups), reports

    def finish(self, stage: Path) -> dict[str, Any]:
        """Bring every other file along and write the manifest."""
        parent = read_manifest(self.folder)
        own = {*self.checkpoint.shards}
        if self.options.mode == "append":
            for name in write_grown_files(stage, self.checkpoint, self.plan, INDEX_FILE):
                self.inputs[name] = file_entry(self.folder / name, hashed=self.hashed)
                self.outputs[name] = file_entry(stage / name, hashed=self.hashed)
                own.add(name)
        for name in [name for name in self.checkpoint.all_files if name not in own and name != MANIFEST_FILE]:
            origin, target = self.folder / name, stage / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if origin.stat().st_size > _LINK_ABOVE:
                link_or_copy(origin, target, copy=self.copy)
            else:
                copy_file(origin, target)
            self.inputs[name] = file_entry(origin, hashed=self.hashed)
            self.outputs[name] = file_entry(target, hashed=self.hashed)
        deltas = self.deltas.description | ({"files": self.delta_files} if self.delta_files else {})
        model: dict[str, Any] = {"files": dict(sorted(self.inputs.items()))}
        if parent is not None:
            model["manifest"] = parent
        return write_manifest(
            stage,
            operation="fuse",
            parameters=asdict(self.options),
            inputs={"model": model, "deltas": deltas},
            outputs=self.outputs,
            tensors={
                report["name"]: {key: value for key, value in report.items() if key != "name"}
                for reports in self.reports.values()
                for report in reports
            },
        )


def report_of(target: Target, effect: Effect, scale: float | None) -> TensorReport:
    return TensorReport(
        target.stored.name, target.layer, target.projection, target.coverage,
        None if target.formula == "contour gate" else scale, effect.changed, effect.count, effect.relative_change,
    )  # fmt: skip


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
