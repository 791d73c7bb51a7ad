"""Fusing every layer against `cp` of the same files and against mergekit, whole processes, in the same rounds.

    python benchmarks/fusion_throughput.py [--gigabytes 1 6] [--rounds 5] [--mergekit VENV/bin/mergekit-yaml] [--first]

Synthetic bfloat16 Llamas with real random values in one file, and Gaussian deltas for every gate and down. All inputs
are in the page cache. Per round, in alternating order: `cp -r`, `neuroweave fuse --no-hash`, `neuroweave fuse`, each
until the process ends and once more until the files are on the disk (fsync); and what bounds them: the command's
start-up (`fuse --dry-run`), the fuse with its arithmetic taken out (`fuse_without_arithmetic.py`), the fuse with
NumPy's instead of the compiled arithmetic (which the first, untimed run compiles). An untimed copy comes before each:
memory that a virtual machine has not touched for a while costs the first that writes to it.
mergekit's peer is its passthrough with a scale on every gate and down, in the smallest size, not synced.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from synthetic_checkpoints import write_llama
from whole_process import NEUROWEAVE, Run, folder_bytes, machine, print_rows, read_once, run

from neuroweave.surgery.fusion.compiled import SWITCH

LIMITS = {
    ("fuse --no-hash", False): 1.25, ("fuse --no-hash", True): 1.6, ("fuse", False): 1.8,
}  # fmt: skip
MERGEKIT_LIMIT = 10
OUT = "out"
MERGEKIT_CONFIG = """merge_method: passthrough
dtype: bfloat16
models:
  - model: {model}
    parameters:
      scale:
        - filter: down_proj
          value: 1.02
        - filter: gate_proj
          value: 1.01
        - value: 1.0
"""


@dataclass(frozen=True)
class Job:
    """A command that writes the folder `out`; `synced`: timed until its files are on the disk."""

    name: str
    command: tuple[str, ...]
    synced: bool = False

    @property
    def label(self) -> str:
        return self.name + (", synced" if self.synced else "")


def jobs_of(model: Path, deltas: Path, out: Path, mergekit: Path | None, scratch: Path) -> list[Job]:
    fuse = (NEUROWEAVE, "fuse", "--model", str(model), "--weights", str(deltas), "--output", str(out))
    plain = [
        ("cp", ("cp", "-r", str(model), str(out))), ("fuse --no-hash", (*fuse, "--no-hash")), ("fuse", fuse),
    ]  # fmt: skip
    jobs = [Job(name, command, synced) for synced in (False, True) for name, command in plain]
    without = (sys.executable, str(Path(__file__).with_name("fuse_without_arithmetic.py")), *fuse[1:], "--no-hash")
    jobs += [
        Job("start: fuse --dry-run", (*fuse, "--dry-run")), Job("fuse --no-hash, no arithmetic", without),
        Job("fuse --no-hash, NumPy", ("env", f"{SWITCH}=0", *fuse, "--no-hash")),
    ]  # fmt: skip
    if mergekit is not None:
        recipe = scratch / "passthrough.yaml"
        recipe.write_text(MERGEKIT_CONFIG.format(model=model), encoding="utf-8")
        jobs.append(Job("mergekit", (str(mergekit), str(recipe), str(out))))
    return jobs


def timed(job: Job, model: Path, out: Path, bytecode: Path, first: bool) -> Run:
    """Run one job over warm inputs, a calm disk and memory that was just in use; its output is removed."""
    shutil.copytree(model, out)
    shutil.rmtree(out)
    os.sync()
    try:
        return run(job.command, bytecode=bytecode, synced=out if job.synced else None, first=first)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def rounds(jobs: list[Job], count: int, model: Path, deltas: Path, scratch: Path, first: bool) -> dict[Job, list[Run]]:
    """`count` runs of each job, every second round in the other direction; one untimed run of each comes first."""
    found: dict[Job, list[Run]] = {job: [] for job in jobs}
    out, bytecode = scratch / OUT, scratch / "bytecode"
    for job in jobs:
        if not job.synced:
            timed(job, model, out, bytecode, first)
    for number in range(count):
        read_once(model)
        read_once(deltas)
        for job in jobs if number % 2 == 0 else reversed(jobs):
            found[job].append(timed(job, model, out, bytecode, first))
            print(f"  round {number + 1}: {job.label} {found[job][-1].seconds:.2f} s", flush=True)
    return found


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(found: dict[Job, list[Run]]) -> None:
    base = {job.synced: [each.seconds for each in runs] for job, runs in found.items() if job.name == "cp"}
    ours = next(runs for job, runs in found.items() if job.name == "fuse --no-hash" and not job.synced)
    rows = []
    for job, runs in found.items():
        ratios = [each.seconds / cp for each, cp in zip(runs, base[job.synced], strict=True)]
        limit = LIMITS.get((job.name, job.synced))
        against = "" if limit is None else f"at most {limit}: {verdict(statistics.median(ratios) <= limit)}"
        if job.name == "mergekit":
            times = [peer.seconds / each.seconds for peer, each in zip(runs, ours, strict=True)]
            against = (
                f"{spread(times, 1)} times fuse --no-hash, at least {MERGEKIT_LIMIT}: "
                f"{verdict(statistics.median(times) >= MERGEKIT_LIMIT)}"
            )
        rows.append((
            job.label, spread([each.seconds for each in runs]),
            f"{statistics.median(each.processor for each in runs):.2f}",
            "" if job.name == "cp" else spread(ratios), against,
        ))  # fmt: skip
    print_rows(("what", "seconds, median (range)", "processor s", "times cp, paired", "limit"), rows)


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 6], help="sizes of the models, 10^9 bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml of an environment with mergekit 0.1.5")
    parser.add_argument("--first", action="store_true", help="on a busy machine: before its other jobs (needs root)")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure; default: the system's own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        print(machine(scratch) + (", commands before all other jobs" if arguments.first else ""), flush=True)
        for gigabytes in sorted(arguments.gigabytes):
            model, deltas, out = scratch / "model", scratch / "deltas", scratch / OUT
            write_llama(model, deltas, gigabytes)
            os.sync()
            mergekit = arguments.mergekit if gigabytes == min(arguments.gigabytes) else None
            jobs = jobs_of(model, deltas, out, mergekit, scratch)
            print(f"\n{folder_bytes(model) / 1e9:.2f} GB model, {folder_bytes(deltas) / 1e9:.2f} GB deltas", flush=True)
            report(rounds(jobs, arguments.rounds, model, deltas, scratch, arguments.first))
            for folder in (model, deltas):
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
