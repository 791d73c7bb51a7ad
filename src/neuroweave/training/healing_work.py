"""The folder beside a heal's output that survives a stop: which heal it is of, checkpoints, cached predictions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.manifest import stamp
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.training import agreement
from neuroweave.training.safe_checkpoints import last_sealed

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

JOB_FILE = "job.json"


@dataclass
class Work:
    """The folder beside the output that a stopped heal leaves, and what it knows already: JSON in `job.json`."""

    folder: Path
    known: dict[str, Any]

    @property
    def run(self) -> Path:
        """Where the Trainer keeps checkpoints and metrics."""
        return self.folder / "run"

    @property
    def teacher(self) -> Path:
        """Where the teacher's predictions are cached."""
        return self.folder / "teacher"

    @classmethod
    @contextlib.contextmanager
    def open(cls, target: Path, job: str, *, resume: bool) -> Iterator[Work]:
        """The folder of the job for the length of the block, held against other runs of the same output.

        `resume` False: emptied first. Raises ValueError when it is of another heal, or in use.
        """
        folder = target.parent / f".{target.name}.neuroweave-heal"
        with contextlib.ExitStack() as stack:
            known, problem = None, ""
            if agreement.is_first():  # the first process holds and writes it, the others follow
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(held(folder))
                    known = cls.begun(folder, job, resume=resume).known
                except ValueError as error:
                    problem = str(error)
            known, problem = agreement.from_first((known, problem))
            if problem:
                raise ValueError(problem)
            yield cls(folder, known)

    @classmethod
    def begun(cls, folder: Path, job: str, *, resume: bool) -> Work:
        file = folder / JOB_FILE
        if not resume:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            if known.get("job") != job:
                begun = last_sealed(folder / "run")
                raise ValueError(
                    f"{folder} is of a heal of other models, text or options, stopped "
                    f"{f'after {begun.name}' if begun else 'before its first checkpoint'}; "
                    f"repeat that command to go on with it, or add --fresh to drop it"
                )
            return cls(folder, known)
        work = cls(folder, {})
        work.tell(job=job)
        return work

    def tell(self, **facts: Any) -> None:
        """Remember facts for a run that goes on."""
        self.known |= facts
        if not agreement.is_first():
            return
        draft = self.folder / f"{JOB_FILE}.partial"
        draft.write_text(json.dumps(self.known, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / JOB_FILE)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder that one run may use at a time. Raises ValueError when another run has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{folder}: another run is healing into this output; wait for it, or stop it"
                ) from None
            except OSError:  # some network file systems have no locks
                pass
        yield
    finally:
        os.close(descriptor)


def job_of(folders: Sequence[Path], **parts: Any) -> str:
    """SHA-256 of what a heal is: options, text, and the folders' files as they lie on the disk."""
    stamps = {}
    for folder in folders:
        with Checkpoint(folder, allow_orphans=True) as checkpoint:
            names = ["config.json", *checkpoint.shards]
        stamps[str(folder.resolve())] = {name: stamp(folder / name) for name in names}
    content = json.dumps({"files": stamps, **parts}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
