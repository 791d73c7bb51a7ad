"""Rewrite a shard block by block: pieces of known place, written by position from several threads, hashed in order.

A shard's new header is known before any data, so every piece has its place in the new file from the start. Memory is
what the pieces that run at one time take, whatever the size of the shard or of a tensor.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.copying import copy_range, read_into, reserve, write_from

COPY_BYTES = 1 << 24  # one piece of a plain copy
_HASH_BYTES = 1 << 20
_WAITING = 3  # pieces in memory, beyond one a worker, that wait to be written


@dataclass(frozen=True)
class Piece:
    """Bytes `[begin, end)` of the new file: `make(prepared)` computes them, on any thread, and gives the job that
    writes them to a descriptor; one such job runs at a time, because a file system lets one writer at a file."""

    begin: int
    end: int
    make: Callable[[Any], Callable[[int], None]]


@dataclass(frozen=True)
class Group:
    """Pieces that need the same preparation, such as a tensor's moments, done before the first of them.

    `prepare`: jobs for any thread; `combine`: their results, in order, to what the pieces are given.
    """

    pieces: Sequence[Piece]
    prepare: Sequence[Callable[[], Any]] = ()
    combine: Callable[[list[Any]], Any] = lambda results: None


@dataclass(frozen=True)
class ShardRewrite:
    """One new file: its name, the bytes before its data, its size, and groups whose pieces tile the data in order."""

    file: str
    head: bytes
    size: int
    groups: Sequence[Group]

    def __post_init__(self) -> None:
        position = len(self.head)
        for piece in (piece for group in self.groups for piece in group.pieces):
            if piece.begin != position or piece.end < position:
                raise ValueError(f"{self.file}: a piece begins at {piece.begin}, expected {position}")
            position = piece.end
        if position != self.size:
            raise ValueError(f"{self.file}: the pieces end at {position}, the file at {self.size}")


def copy_pieces(source: int, begin: int, target_begin: int, nbytes: int) -> list[Piece]:
    """Pieces that copy a range of the open file `source` as it is."""

    def piece(start: int, count: int) -> Piece:
        def make(prepared: Any) -> Callable[[int], None]:
            return lambda target: copy_range(source, target, begin + start, target_begin + start, count)

        return Piece(target_begin + start, target_begin + start + count, make)

    return [piece(start, min(COPY_BYTES, nbytes - start)) for start in range(0, nbytes, COPY_BYTES)]


@dataclass
class _Preparation:
    """The combined result of a group's preparation: asked for by many threads, computed once."""

    group: Group
    futures: list[Future]
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False
    value: Any = None

    def result(self) -> Any:
        with self.lock:
            if not self.done:
                self.value, self.done = self.group.combine([future.result() for future in self.futures]), True
            return self.value


class _Turn:
    """The writes of one file, one at a time: whoever brings one does all that are waiting, unless another is at it, so
    that no thread waits for the file system's lock on the file."""

    def __init__(self, descriptor: int, progress: Callable[[int], None], room: threading.Semaphore) -> None:
        self._descriptor, self._progress, self._room = descriptor, progress, room
        self._waiting: deque[tuple[Callable[[int], None], int, Future]] = deque()
        self._lock = threading.Lock()

    def write(self, job: Callable[[int], None], nbytes: int, done: Future) -> None:
        self._waiting.append((job, nbytes, done))
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    self._write_one(*self._waiting.popleft())
            finally:
                self._lock.release()

    def _write_one(self, job: Callable[[int], None], nbytes: int, done: Future) -> None:
        try:
            job(self._descriptor)
            self._progress(nbytes)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)
        finally:
            self._room.release()


class Rewriter:
    """Runs shard rewrites on `workers` threads; two more threads hash, when asked to.

    Use it as a context manager: leaving it waits for, and after an error cancels, what is under way.
    `progress` is called with bytes written, from any thread.
    """

    def __init__(self, *, workers: int, hashed: bool, progress: Callable[[int], None] | None = None) -> None:
        self.hashed = hashed
        self._progress = progress or (lambda nbytes: None)
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="rewrite")
        self._hashers = ThreadPoolExecutor(2, thread_name_prefix="hash")
        self._room = threading.Semaphore(workers + _WAITING)
        self._stop = threading.Event()

    def __enter__(self) -> Rewriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._stop.set()
        self._workers.shutdown(wait=True, cancel_futures=error is not None)
        self._hashers.shutdown(wait=True, cancel_futures=error is not None)

    def hash_file(self, path: Path) -> Future:
        """The SHA-256 of a file that does not change, computed beside the rewriting."""
        return self._hashers.submit(self._hash, path, None)

    def write(self, job: ShardRewrite, path: Path, *, mode: int) -> Future | None:
        """Write the shard to `path` (which must not exist) and return the future of its SHA-256, if hashing is on.

        `mode`: the file's permissions. On an error the caller discards the folder. Raises what a piece raised.
        """
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        digest: Future | None = None
        futures: list[Future] = []
        try:
            os.fchmod(target, mode)
            reserve(target, job.size)
            write_from(target, memoryview(job.head), 0)
            ends: list[tuple[int, Future | None]] = []
            for piece, future in self._submit(job, target):
                futures.append(future)
                if piece is not None:
                    ends.append((piece.end, future))
            if self.hashed:
                digest = self._hashers.submit(self._hash, path, [*ends, (job.size, None)])
            for future in futures:
                future.result()
        except BaseException:
            self._stop.set()
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()  # running pieces still write to the descriptor
            raise
        finally:
            os.close(target)
        return digest

    def _submit(self, job: ShardRewrite, target: int) -> list[tuple[Piece | None, Future]]:
        """Queue everything; each group's preparation goes in front of the pieces of the group before it, so that a
        worker seldom waits. Pieces wait only for jobs that were queued earlier: there is no deadlock."""
        queued: list[tuple[Piece | None, Future]] = []
        turn = _Turn(target, self._progress, self._room)
        preparations: dict[int, _Preparation] = {}
        needing = [number for number, group in enumerate(job.groups) if group.prepare]

        def prepare(number: int) -> None:
            futures = [self._workers.submit(self._guarded, task) for task in job.groups[number].prepare]
            queued.extend((None, future) for future in futures)
            preparations[number] = _Preparation(job.groups[number], futures)

        for number, group in enumerate(job.groups):
            while needing and (not preparations or max(preparations) <= number):
                prepare(needing.pop(0))
            preparation = preparations.get(number)
            for piece in group.pieces:
                done: Future = Future()
                self._workers.submit(self._write_piece, piece, turn, preparation, done)
                queued.append((piece, done))
        return queued

    def _guarded(self, task: Callable[[], Any]) -> Any:
        if self._stop.is_set():
            raise InterruptedError("stopped")
        return task()

    def _write_piece(self, piece: Piece, turn: _Turn, preparation: _Preparation | None, done: Future) -> None:
        if not done.set_running_or_notify_cancel():
            return
        self._room.acquire()
        try:
            if self._stop.is_set():
                raise InterruptedError("stopped")
            job = piece.make(preparation.result() if preparation else None)
        except BaseException as error:
            self._room.release()
            done.set_exception(error)
        else:
            turn.write(job, piece.end - piece.begin, done)

    def _hash(self, path: Path, ends: list[tuple[int, Future | None]] | None) -> str:
        """SHA-256 of a file; with `ends`, following the pieces that are still being written."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_BYTES))
        descriptor = os.open(path, os.O_RDONLY)
        try:
            position = 0
            whole: list[tuple[int, Future | None]] = [(os.fstat(descriptor).st_size, None)]
            for end, future in ends if ends is not None else whole:
                if future is not None:
                    future.result()
                while position < end:
                    if self._stop.is_set():
                        raise InterruptedError("stopped")
                    view = buffer[: min(_HASH_BYTES, end - position)]
                    read_into(descriptor, view, position)
                    digest.update(view)
                    position += len(view)
            return digest.hexdigest()
        finally:
            os.close(descriptor)
