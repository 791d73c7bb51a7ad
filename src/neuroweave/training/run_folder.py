"""The folder of a run: whose it is, and whether the settings are those that it was begun with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from neuroweave import __version__
from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.metrics import METRICS_FILE
from neuroweave.training.safe_checkpoints import checkpoint_folders, last_sealed

RUN_FILE = "run.json"


def check_run_folder(configuration: TrainConfiguration, *, resume: bool | None, backend: str = "torch") -> None:
    """Refuse a folder that is not a run's, or (unless `resume` is False) a run of another configuration or backend."""
    run = Path(configuration.output.folder)
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run}: output.folder is a file; give a folder")
    if resume and last_sealed(run) is None:
        raise ValueError(f"{run}: there is no complete checkpoint to resume; leave out --resume")
    if not (run / RUN_FILE).is_file():
        strange = sorted(path.name for path in run.iterdir()) if run.is_dir() else []
        strange = [name for name in strange if name not in ("data", "model") and not name.startswith(".")]
        if strange:
            raise ValueError(f"{run}: holds {strange[0]}, but no run; choose another output.folder")
        return
    if resume is not False and checkpoint_folders(run):
        check_same_run(configuration, run, backend)


def check_same_run(configuration: TrainConfiguration, run: Path, backend: str) -> None:
    """Raise ValueError when the run was begun with other settings, naming them."""
    content = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    if (theirs := content.get("backend", "torch")) != backend:
        raise ValueError(
            f"{run}: was begun with --backend {theirs}, whose checkpoints {backend} does not read; go on with that, or "
            f"give the model in it as model.path of a new run"
        )
    began = TrainConfiguration.defaults() | content["configuration"]
    now = configuration.what_shapes_the_run()
    other = [name for name in sorted({*began, *now}) if began.get(name) != now.get(name)]
    if other:
        changes = "; ".join(f"{name} was {began.get(name)!r}, is {now.get(name)!r}" for name in other[:3])
        raise ValueError(
            f"{run}: was begun with other settings ({changes}); --fresh starts anew, or choose another folder"
        )


def clear_run(run: Path) -> None:
    """Remove the checkpoints and metrics of an earlier run. To be called when all of the new one is checked."""
    for _, folder in checkpoint_folders(run):
        (folder / "complete.json").unlink(missing_ok=True)
        shutil.rmtree(folder)
    (run / METRICS_FILE).unlink(missing_ok=True)


def write_run_file(configuration: TrainConfiguration, *, backend: str = "torch") -> None:
    run = Path(configuration.output.folder)
    run.mkdir(parents=True, exist_ok=True)
    content = {"neuroweave": __version__, "backend": backend, "configuration": configuration.what_shapes_the_run()}
    draft = run / f".{RUN_FILE}.partial"
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, run / RUN_FILE)
