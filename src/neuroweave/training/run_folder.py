"""The folder of a run: whose it is, and whether the settings are those that it was begun with."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuroweave import __version__
from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.metrics import METRICS_FILE, read_metrics
from neuroweave.training.safe_checkpoints import checkpoint_folders, one_line, was_sealed

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

RUN_FILE, LOCK_FILE = "run.json", ".lock"


def check_run_folder(configuration: TrainConfiguration, *, resume: bool | None, backend: str = "torch") -> None:
    """Refuse a folder that is not a run's, or (unless `resume` is False) a run of another configuration or backend."""
    run = Path(configuration.output.folder)
    check_is_folder(run)
    if resume and not any(was_sealed(folder) for _, folder in checkpoint_folders(run)):
        raise ValueError(f"{run}: there is no complete checkpoint to resume; leave out --resume")
    if not (run / RUN_FILE).is_file():
        strange = sorted(path.name for path in run.iterdir()) if run.is_dir() else []
        strange = [name for name in strange if name not in ("data", "model") and not name.startswith(".")]
        if strange:
            raise ValueError(f"{run}: holds {strange[0]}, but no run; choose another output.folder")
        return
    if resume is not False and checkpoint_folders(run):
        check_same_run(configuration, run, backend)
        check_metrics(run / METRICS_FILE)


def check_is_folder(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run}: output.folder is a file; give a folder")


def check_same_run(configuration: TrainConfiguration, run: Path, backend: str) -> None:
    """Raise ValueError when the run was begun with other settings, naming them."""
    content = read_run_file(run)
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


def read_run_file(run: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, where it is not what `write_run_file` writes."""
    path = run / RUN_FILE
    way_out = "put back the file that the run was begun with, or start anew with --fresh"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)}); {way_out}") from error
    if not isinstance(content, dict) or not isinstance(content.get("configuration"), dict):
        raise ValueError(f"{path}: does not say what the run was begun with; {way_out}")
    return content


def check_metrics(path: Path) -> None:
    """Raise ValueError for metrics that a resumed run could not go on with."""
    if not path.is_file():
        return
    try:
        steps = [entry["step"] for entry in read_metrics(path)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)}); move it away, and the run goes on") from error
    if not all(isinstance(step, int) for step in steps):
        raise ValueError(f"{path}: has a line whose step is no number; move it away, and the run goes on")


@contextlib.contextmanager
def held(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Hold a run's folder for the length of the block against other runs; gives what `RUN/.lock` says meanwhile.

    Raises ValueError, naming the process, when another run holds it. A killed run holds nothing.
    """
    run = Path(folder)
    check_is_folder(run)
    made = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    path = run / LOCK_FILE
    descriptor = lock(path)
    try:
        text = f"{os.getpid()} {socket.gethostname()} {secrets.token_hex(8)}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        os.fsync(descriptor)
        yield text
    finally:
        path.unlink(missing_ok=True)
        if made and not any(run.iterdir()):  # refused before anything was written
            run.rmdir()
        os.close(descriptor)


def lock(path: Path) -> int:
    """A descriptor of the file that is there, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = (path.read_text(encoding="utf-8", errors="replace").split() or ["unknown"])[0]
            os.close(descriptor)
            raise ValueError(
                f"{path.parent} is in use by another run (process {process}); wait for it, stop it, or choose another "
                f"output.folder"
            ) from None
        except OSError:  # some network file systems have no locks
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # of a run that has just ended, and removed it


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
