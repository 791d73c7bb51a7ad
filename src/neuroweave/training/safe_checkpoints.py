"""Checkpoints of a run that count only when they are complete: `checkpoint-N` with `complete.json` written last.

    {"format": 1, "step": 200, "files": {"model.safetensors": {"bytes": 538090408, "sha256": "..."}}, ...}

A folder without that file is what a killed or failed save left; nobody resumes from it, and the next save removes it.
One whose file cannot be understood may be a newer version's: nobody resumes from it, and only --fresh removes it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.manifest import file_entry
from neuroweave.checkpoint.staging import check_free_space

COMPLETE_FILE = "complete.json"
FORMAT_VERSION = 1


def checkpoint_folders(run: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(step, folder) of every `checkpoint-N` in a run's folder, complete or not, the newest last."""
    if not Path(run).is_dir():
        return []
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(run).iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def files_of(folder: Path) -> list[str]:
    """Names of all files of a checkpoint but `complete.json`, relative and sorted; shards lie in folders of it."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in (path.relative_to(folder).as_posix() for path in paths) if name != COMPLETE_FILE)


def seal_checkpoint(folder: Path, *, step: int, files: dict[str, dict[str, Any]], **more: Any) -> None:
    """Write `complete.json`, in one step: from here on the checkpoint counts. `files`: name to `file_entry`."""
    content = {"format": FORMAT_VERSION, "step": step, **more, "files": dict(sorted(files.items()))}
    draft = folder / f".{COMPLETE_FILE}.partial"
    with open(draft, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / COMPLETE_FILE)


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of these files of a checkpoint; each is on the disk before this returns."""
    entries = {}
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        entries[name] = file_entry(folder / name)
    return entries


def was_sealed(folder: Path) -> bool:
    """Whether there is a `complete.json`, understood or not: then nobody removes the folder without being told to."""
    return os.path.lexists(folder / COMPLETE_FILE)


def parse_complete(folder: Path) -> dict[str, Any]:
    """The content of `complete.json`. Raises ValueError where it is not what this version writes."""
    try:
        content = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {COMPLETE_FILE} cannot be read ({one_line(error)})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise ValueError(f"its {COMPLETE_FILE} is of format {found!r}, this version reads format {FORMAT_VERSION}")
    files = content.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"its {COMPLETE_FILE} names no files")
    for name, entry in files.items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise ValueError(f"its {COMPLETE_FILE} has no size and SHA-256 of {name}")
    return content


def read_complete(folder: Path) -> dict[str, Any] | None:
    """The content of `complete.json`, or None where it is missing or cannot be understood."""
    try:
        return parse_complete(folder)
    except ValueError:
        return None


def what_is_wrong(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: every file is read and its SHA-256 compared."""
    if not was_sealed(folder):
        return "it is not complete (the run was killed, or failed, while saving it)"
    try:
        files = parse_complete(folder)["files"]
    except ValueError as error:
        return str(error)
    for name in files_of(folder):
        if name not in files and not Path(name).name.startswith("."):  # file systems put such names in
            return f"{name} is there, but not in its {COMPLETE_FILE}"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written"
        if file_entry(path) != entry:
            return f"{name} is not the bytes that were written (SHA-256 differs)"
    return None


def newest_complete(run: str | os.PathLike[str], *, note: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that is complete and undamaged, or None. `note` hears of those that are passed over."""
    for _, folder in reversed(checkpoint_folders(run)):
        problem = what_is_wrong(folder)
        if problem is None:
            return folder
        if note is not None:
            note(f"{folder.name} is passed over: {problem}")
    return None


def to_resume(run: str | os.PathLike[str], *, note: Callable[[str], None] | None = None) -> Path | None:
    """The checkpoint to go on from, or None where none was ever complete. For the one process of a run that tidies up.

    Damaged ones that are newer no longer count from then on, and those that cannot be understood are moved aside.
    Raises ValueError when all of them are such: to begin anew without a word would throw the run away.
    """
    passed_over: list[tuple[Path, str]] = []
    for _, folder in reversed(checkpoint_folders(run)):
        problem = what_is_wrong(folder)
        if problem is None:
            break
        if note is not None:
            note(f"{folder.name} is passed over: {problem}")
        if was_sealed(folder):
            passed_over.append((folder, problem))
    else:
        if passed_over:
            named = "; ".join(f"{each.name}: {problem}" for each, problem in passed_over[:3])
            raise ValueError(f"{run}: no checkpoint can be resumed ({named}); --fresh starts anew")
        return None
    for each, _ in passed_over:  # or they would be kept in the place of new ones
        if read_complete(each) is not None:
            (each / COMPLETE_FILE).unlink()
            continue
        aside = move_aside(each)
        if note is not None:
            note(f"{each.name} is kept as {aside.name}")
    return folder


def move_aside(folder: Path) -> Path:
    """Rename a folder, so that a save of the same step finds its place free; gives the new path."""
    names = (folder.with_name(f"{folder.name}.aside" + (f"-{n}" if n else "")) for n in itertools.count())
    aside = next(path for path in names if not path.exists())
    return folder.rename(aside)


def last_sealed(run: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that was complete when it was written; its bytes are not looked at again."""
    return next((folder for _, folder in reversed(checkpoint_folders(run)) if read_complete(folder)), None)


def remove_incomplete(run: str | os.PathLike[str]) -> None:
    """Remove what killed saves left behind. Only for the one process of a run that tidies up."""
    for _, folder in checkpoint_folders(run):
        if not was_sealed(folder):
            shutil.rmtree(folder, ignore_errors=True)


def rotate(run: str | os.PathLike[str], *, keep: int, spare: str | os.PathLike[str] | None = None) -> None:
    """Keep the newest `keep` complete checkpoints, and `spare` (the best one of the run)."""
    complete = [folder for _, folder in checkpoint_folders(run) if read_complete(folder)]
    for folder in complete[: -keep or None]:
        if spare is None or folder.resolve() != Path(spare).resolve():
            (folder / COMPLETE_FILE).unlink(missing_ok=True)  # first: half a folder must not count
            shutil.rmtree(folder, ignore_errors=True)


def room_for(run: str | os.PathLike[str], *, keep: int, nbytes: int) -> int:
    """How many more bytes the checkpoints of a run will take, of `nbytes` each: one more than stay, while it is
    written, less those that are there."""
    there = sum(read_complete(folder) is not None for _, folder in checkpoint_folders(run))
    return max(1, keep + 1 - there) * nbytes


@contextlib.contextmanager
def guarded_save(run: Path, folder: Path, *, nbytes: int) -> Iterator[None]:
    """Save into `folder` inside this block; what fails to be written is removed, and the last good one is named.

    `nbytes`: what the checkpoint will take about; checked before. Raises ValueError when the disk is full or writing
    fails. safetensors and torch raise kinds of their own for a full disk, so every error of a save is one of writing.
    """
    from safetensors import SafetensorError

    try:
        check_free_space(run, nbytes)
        yield
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(describe_failed_save(run, folder, one_line(error))) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def describe_failed_save(run: Path, folder: Path, problem: str) -> str:
    good = last_sealed(run)
    state = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
    return f"{folder}: could not be saved ({problem}); {state}; make room and resume"


def one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
