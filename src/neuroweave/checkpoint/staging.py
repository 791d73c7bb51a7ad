"""An output folder appears whole or not at all: written as a hidden sibling, renamed into place at the end.

A run that is killed leaves a sibling named `.NAME.neuroweave-partial-*` and nothing else; the next run for the same
output removes it. A running job holds a lock on its sibling, so that nobody takes it for a leftover. A resumable job's
sibling is named after the job, survives Ctrl-C as well, and is taken up again by the next run of the same job.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from neuroweave.checkpoint.reader import list_files

try:
    import fcntl
except ImportError:  # no such locks on this system: leftovers stay until a person removes them
    fcntl = None  # type: ignore[assignment]

_PARTIAL, _REPLACED = "neuroweave-partial", "neuroweave-replaced"
_GRACE_SECONDS = 10.0  # between creating and locking a folder


@contextlib.contextmanager
def staged_folder(
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: Sequence[str | os.PathLike[str]] = (),
    resume: str | None = None,
) -> Iterator[Path]:
    """Give a new empty folder to write into; when the block ends well, it becomes `out` by a rename.

    After any exception (Ctrl-C and a full disk included) the new folder is gone and `out` is as it was. With
    `overwrite` an existing folder is moved aside, replaced, and removed last; otherwise it must be empty.
    `sources`: what the job reads, which `out` must not be, contain or lie in. `resume`: a name for the job (letters
    and digits); the folder is then what an interrupted run of the same job left, and Ctrl-C leaves it for the next.
    Raises ValueError, before anything is written, for an output that cannot be used or that another run is writing.
    """
    target = check_output(out, overwrite=overwrite, sources=sources)
    created = _make_parents(target.parent)
    staging: Path | None = None
    descriptor = -1
    try:
        kept = None if resume is None else target.parent / f".{target.name}.{_PARTIAL}-{resume}"
        _clear_leftovers(target, keep=kept)
        folder = _sibling(target, _PARTIAL) if kept is None else kept
        folder.mkdir(exist_ok=kept is not None)
        if folder.is_symlink():
            raise ValueError(f"{folder}: a link where a folder of our own is to be; remove it")
        descriptor = os.open(folder, os.O_RDONLY)
        _lock(descriptor, out, only_one=kept is not None)
        staging = folder
        yield staging
        _move_into_place(staging, target, overwrite=overwrite)
    except BaseException as error:
        interrupted = resume is not None and isinstance(error, KeyboardInterrupt | SystemExit)
        if staging is not None and not interrupted:
            shutil.rmtree(staging, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _lock(descriptor: int, out: str | os.PathLike[str], *, only_one: bool) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if only_one:
            raise ValueError(f"{out}: another run is writing this output; wait for it, or stop it") from None
    except OSError:  # some network file systems have no locks
        pass


def check_output(
    out: str | os.PathLike[str], *, overwrite: bool = False, sources: Sequence[str | os.PathLike[str]] = ()
) -> Path:
    """The absolute path of an output folder that may be written. Raises ValueError when it may not be."""
    path = Path(os.path.abspath(out))
    if path.is_symlink():
        raise ValueError(f"{out}: the output is a symbolic link; give the real path of a folder")
    for source in sources:
        origin, target = Path(source).resolve(), path.resolve()
        if origin == target:
            raise ValueError(f"{out}: the output is the source itself; choose another folder")
        if origin in target.parents:
            raise ValueError(f"{out}: the output lies inside the source {source}; choose another folder")
        if path.exists() and (inside := _file_inside(target, origin)):
            raise ValueError(f"{out}: the output contains the source {inside}; choose another folder")
    if path.exists():
        if not path.is_dir():
            raise ValueError(f"{out}: the output is a file; give a folder")
        if any(path.iterdir()):
            if not overwrite:
                raise ValueError(f"{out}: the output folder is not empty; choose another one, or add --overwrite")
            _check_replaceable(path, out)
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{out}: {parent} is not a folder that can be written")
    return path


def _file_inside(target: Path, origin: Path) -> Path | None:
    """A file of the source (itself a file, or a folder, links followed) whose real place is in the folder `target`."""
    if target in origin.parents:
        return origin
    if not origin.is_dir():
        return None
    links = (origin / name for name in list_files(origin))
    return next((file for file in links if target in Path(os.path.realpath(file)).parents), None)


def _check_replaceable(path: Path, out: str | os.PathLike[str]) -> None:
    here = Path.cwd()
    home = Path(os.path.expanduser("~"))
    reason = ""
    if path == here or path in here.parents:
        reason = "the current folder is, or lies in, it"
    elif path == home or path in home.parents:
        reason = "the home folder is, or lies in, it"
    elif os.path.ismount(path):
        reason = "it is a mount point"
    elif (path / ".git").exists():
        reason = "it is a git repository"
    if reason:
        raise ValueError(f"{out}: will not be replaced, because {reason}; choose another folder")


def check_free_space(folder: str | os.PathLike[str], nbytes: int) -> None:
    """Raise ValueError when the disk of `folder` (which may not exist yet) has less than `nbytes` free."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise ValueError(f"{folder}: {_size(nbytes)} are needed here, {_size(free)} are free; make room")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _move_into_place(staging: Path, target: Path, *, overwrite: bool) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.rename(staging, target)  # over an empty folder this is one step on POSIX
        return
    if not overwrite:
        raise ValueError(f"{target}: files appeared in the output folder meanwhile; nothing was changed")
    aside = _sibling(target, _REPLACED)
    try:
        os.rename(target, aside)
        os.rename(staging, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _clear_leftovers(target: Path, *, keep: Path | None = None) -> None:
    """Remove what killed runs left beside `target`; put back a folder that was moved aside and not replaced."""
    for path in target.parent.glob(f".{_escape(target.name)}.{_REPLACED}-*"):
        if not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in target.parent.glob(f".{_escape(target.name)}.{_PARTIAL}-*"):
        if path != keep and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        state = path.lstat()
        if not stat.S_ISDIR(state.st_mode) or time.time() - state.st_ctime < _GRACE_SECONDS:
            return False
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{secrets.token_hex(4)}"


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _make_parents(folder: Path) -> list[Path]:
    """Create the missing parents; returns them, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
    return missing
