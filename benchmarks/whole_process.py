"""Run a command as a whole process and measure it from outside: wall time, processor time, resident memory."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NEUROWEAVE = str(Path(sys.executable).with_name("neuroweave"))
_POLL_SECONDS = 0.002
_SHOWN_OUTPUT = 2000
_SIZES = ("VmHWM", "RssAnon", "RssFile")


@dataclass(frozen=True)
class Run:
    """One finished process. `processor`: user and system seconds of all its threads.

    Sizes in bytes, zero unless watched: `peak` is VmHWM, everything resident; `anonymous` and `mapped` are the largest
    RssAnon and RssFile seen. Polled every 2 ms; VmHWM never falls, so that only the last 2 ms can be missed.
    """

    seconds: float
    processor: float
    peak: int
    anonymous: int
    mapped: int
    output: str


def run(
    command: Sequence[str], *, bytecode: Path, synced: Path | None = None, watched: bool = False, first: bool = False
) -> Run:
    """Run a command to its end. `bytecode`: where Python keeps compiled modules, so that neither the caller's settings
    nor the source tree matter. `synced`: a folder whose files must be on the disk before the clock stops. `watched`:
    poll its memory, which costs a few hundredths of a core. `first`: before every other job of the machine (real-time
    scheduling in turns, which needs the right to), so that what else runs takes no processor from it.

    Raises RuntimeError with the end of what it printed when it fails.
    """
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    process = subprocess.Popen(
        ["chrt", "--rr", "10", *command] if first else command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    watch = _Watch(process.pid) if watched else None
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if synced is not None and process.returncode == 0:
        sync_files(synced)
    seconds = time.perf_counter() - start
    if watch is not None:
        watch.join()
    most = watch.most if watch is not None else dict.fromkeys(_SIZES, 0)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}\n{output[-_SHOWN_OUTPUT:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, *(most[size] for size in _SIZES), output=output)


class _Watch(threading.Thread):
    """Polls the status of a process until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.most = dict.fromkeys(_SIZES, 0)
        self._status = Path(f"/proc/{pid}/status")
        self.start()

    def run(self) -> None:
        while True:
            try:
                found = resident(self._status.read_text())
            except OSError:
                return
            if not found:  # ended: the entry is there without sizes until the parent has waited
                return
            for key, value in found.items():
                self.most[key] = max(self.most[key], value)
            time.sleep(_POLL_SECONDS)


def resident(status: str) -> dict[str, int]:
    """VmHWM, RssAnon and RssFile in bytes from the text of /proc/PID/status; empty for a process that has ended."""
    lines = (line.split() for line in status.splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words and words[0][:-1] in _SIZES}


def sync_files(folder: Path) -> None:
    """Wait until every file under a folder, and the folder, are on the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_once(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def machine(folder: Path) -> str:
    """The processor, cores, memory, the file system of `folder`, the load now, and the date: one line."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = os.getloadavg()[0]
    return (
        f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB, "
        f"{file_system(folder)}, Linux {platform.release().split('-')[0]}, load {load:.1f}, {datetime.date.today()}"
    )


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder."""
    here = os.path.realpath(folder)
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        point, found = line.split()[1:3]
        if os.path.commonpath([here, point]) == point and len(point) >= len(best):
            best, kind = point, found
    return kind


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
