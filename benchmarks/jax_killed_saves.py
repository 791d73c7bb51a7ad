"""Kill a JAX run with SIGKILL at many moments around its saves: no earlier checkpoint may be lost or broken.

    python benchmarks/jax_killed_saves.py WORK [--kills 20]

Trains a small NeuroBLAST that saves every other step, kills it after a delay that grows a little each time, and after
each kill checks the SHA-256 of every checkpoint that counts, restores the newest one, and compares the losses of the
steps it had before with those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from neuroweave.training.metrics import read_metrics
from neuroweave.training.safe_checkpoints import checkpoint_folders, read_complete, what_is_wrong
from neuroweave.training.sources import Source
from neuroweave.training.tokenizer import train_tokenizer

STEPS = 400


def configuration(work: Path, run: Path) -> dict[str, Any]:
    return {
        "model": {"preset": "small", "settings": {"hidden_size": 128}},
        "tokenizer": {"path": str(work / "tokenizer")},
        "data": {"sources": [{"path": "shipped:calibration"}], "sequence_length": 32, "held_out": 0.0,
                 "store": str(work / "store")},
        "training": {"steps": STEPS, "batch_size": 1, "micro_batch_size": 1, "schedule": "constant"},
        "metrics": {"log_every": 1},
        "output": {"folder": str(run), "save_every": 2, "keep": 2},
    }  # fmt: skip


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "neuroweave", "train", str(config), "--backend", "jax"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def steps_in(run: Path) -> dict[int, float]:
    file = run / "metrics.jsonl"
    return {entry["step"]: entry["loss"] for entry in read_metrics(file)} if file.is_file() else {}


def saving(run: Path) -> bool:
    """Whether a checkpoint is there that does not count yet."""
    unfinished = any(read_complete(folder) is None for _, folder in checkpoint_folders(run))
    return unfinished or bool(list(run.glob("checkpoint-*.orbax-checkpoint-tmp*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    work = options.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    train_tokenizer(work / "tokenizer", [Source(path="shipped:calibration")], vocab_size=512)
    run, config = work / "run", work / "run.yaml"
    config.write_text(yaml.safe_dump(configuration(work, run)))
    known: dict[int, float] = {}
    in_a_save, newest = 0, 0
    for kill in range(options.kills):
        process = start(config)
        before = newest
        while process.poll() is None and max([*steps_in(run)], default=0) < before + 8:
            time.sleep(0.01)
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself: {process.stderr.read().decode()[-500:]}")  # type: ignore[union-attr]
        time.sleep(0.013 * kill)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        hit = saving(run)
        in_a_save += hit
        complete = [folder for _, folder in checkpoint_folders(run) if read_complete(folder)]
        for folder in complete:
            if problem := what_is_wrong(folder):
                raise SystemExit(f"{folder}: {problem}")
        now = max((int(folder.name.rpartition("-")[2]) for folder in complete), default=0)
        if now < newest:
            raise SystemExit(f"checkpoint {newest} was lost: the newest is {now}")
        for step, loss in steps_in(run).items():
            if known.setdefault(step, loss) != loss:
                raise SystemExit(f"step {step} came to {loss}, before to {known[step]}")
        newest = now
        print(f"kill {kill + 1}: {'in a save' if hit else 'between saves'}; goes on from step {newest}", flush=True)
    print(f"{options.kills} kills, {in_a_save} in a save: no checkpoint lost or broken, {len(known)} losses the same")


if __name__ == "__main__":
    main()
