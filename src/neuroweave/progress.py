"""How far a long job is: a bar on a terminal; anywhere else (a pipe, CI, a log) a line now and then, all on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY_SECONDS = 30.0  # at most one line in that time within a part
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Lines:
    """The part of tqdm's interface that jobs use, as lines of text. `n` of `total` are done, from any thread.

    The first line says what begins; `quiet` leaves it out, for jobs that mostly end before the first 30 s.
    """

    def __init__(
        self, what: str, *, total: int | None = None, unit: str = "B", done: int = 0, quiet: bool = False
    ) -> None:
        self.what, self.total, self.unit, self.n = what, total, unit, done
        self._lock = threading.Lock()
        self._start = self._told = time.monotonic()
        if quiet:
            return
        parts = [] if total is None else [amount(total, unit)]
        parts += [f"{done} of them done before"] if done else []
        _print(f"{what}: {', '.join(parts)}" if parts else what)

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        with self._lock:
            self.n += count
            now = time.monotonic()
            if now - self._told < EVERY_SECONDS:
                return
            self._told = now
            _print(f"{self.what}: {fraction(self.n, self.total, self.unit)}, {now - self._start:.0f} s")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def progress(
    what: str, *, total: int | None = None, unit: str = "B", done: int = 0, quiet: bool = False, leave: bool = True
) -> tqdm | Lines:
    """A bar or lines, to be used in a `with`: `update(n)` counts on; `n` and `total` may be read, `total` set.

    `unit`: the noun of one, or B for bytes. `done`: of an earlier run. `quiet`: see `Lines`. `leave`: keep a full bar.
    """
    if not sys.stderr.isatty():
        return Lines(what, total=total, unit=unit, done=done, quiet=quiet)
    from tqdm import tqdm

    noun = unit if unit == "B" else f" {unit}s"
    return tqdm(desc=what, total=total, initial=done, unit=noun, unit_scale=unit == "B", leave=leave)


def follow(bar: tqdm | Lines) -> Callable[[int, int], None]:
    """For jobs that tell how much of how much is done."""

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(int(done - bar.n))

    return report


def amount(count: int, unit: str) -> str:
    """`1 window`, `8 windows`, `1.2 GB`."""
    if unit != "B":
        return f"{count} {unit}{'' if count == 1 else 's'}"
    factor, name = next(((factor, name) for factor, name in _SIZES if count >= factor), (1, "bytes"))
    return f"{count / factor:.1f} {name}" if factor > 1 else f"{count} {name}"


def fraction(done: int, total: int | None, unit: str) -> str:
    """`8 of 16 windows`; without a total, `8 windows`."""
    if total is None:
        return amount(done, unit)
    return f"{done if unit != 'B' else amount(done, unit)} of {amount(total, unit)}"


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
