"""Copy bytes between files, in the kernel where the system can, and place whole files beside their copies."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

_BUFFER_BYTES = 1 << 22
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}


def copy_range(source: int, target: int, begin: int, target_begin: int, nbytes: int) -> None:
    """Copy `nbytes` from `begin` of the descriptor `source` to `target_begin` of `target`, by position.

    Raises ValueError when the source ends early, OSError (disk full) from the system.
    """
    done = _copy_in_kernel(source, target, begin, target_begin, nbytes)
    if done == nbytes:
        return
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, nbytes - done)))
    while done < nbytes:
        view = buffer[: min(len(buffer), nbytes - done)]
        read_into(source, view, begin + done)
        write_from(target, view, target_begin + done)
        done += len(view)


def _copy_in_kernel(source: int, target: int, begin: int, target_begin: int, nbytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < nbytes:
        try:
            count = os.copy_file_range(source, target, min(nbytes - done, 1 << 30), begin + done, target_begin + done)
        except OSError as error:
            if error.errno in _NOT_HERE:
                return done
            raise
        if count == 0:
            return done  # the end of the source, or a file system that pretends: reading tells which
        done += count
    return done


def read_into(descriptor: int, view: memoryview, position: int) -> None:
    """Fill `view` from a position of a file. Raises ValueError when the file ends before."""
    while view:
        count = os.preadv(descriptor, [view[: 1 << 30]], position)
        if count == 0:
            raise ValueError(f"a source file ended at byte {position}: it was cut off while it was being read")
        view, position = view[count:], position + count


def write_from(descriptor: int, view: memoryview, position: int) -> None:
    """Write all of `view` at a position of a file."""
    while view:
        count = os.pwrite(descriptor, view[: 1 << 30], position)
        view, position = view[count:], position + count


def reserve(descriptor: int, nbytes: int) -> None:
    """Give a new file its length, with its room on the disk reserved where the file system can."""
    import ctypes

    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate  # os.posix_fallocate writes zeros where this fails
    except AttributeError:
        fallocate = None
    if fallocate is not None:
        fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if fallocate(descriptor, 0, 0, nbytes) and (code := ctypes.get_errno()) == errno.ENOSPC:
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, nbytes)


def link_or_copy(origin: Path, target: Path, *, copy: bool) -> bool:
    """Hard-link a file, or copy it (bytes and mode) where that is not possible; returns whether it was linked."""
    if not copy:
        try:
            os.link(origin.resolve(), target)
        except OSError:  # another file system, or one without hard links
            pass
        else:
            return True
    copy_file(origin, target)
    return False


def copy_file(origin: Path, target: Path) -> None:
    """Copy a file's bytes and its permissions."""
    shutil.copyfile(origin, target)
    target.chmod(stat.S_IMODE(origin.stat().st_mode))
