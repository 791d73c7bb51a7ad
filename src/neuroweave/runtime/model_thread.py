"""The one thread of a process that runs models.

GNU's OpenMP keeps a team of threads for each thread that has run a large operation. With two such teams there are more
threads than cores, and their barriers go to sleep instead of waiting, also while one of the teams has nothing to do:
benchmarks/model_threads.py.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Busy(Protocol):
    """Work that is done a turn at a time."""

    def has_work(self) -> bool: ...

    def turn(self) -> None: ...


class ModelThread:
    """Takes turns at those that have work. `wake`: to be held while work is given, and notified then."""

    def __init__(self) -> None:
        self.wake = threading.Condition()
        self.workers: list[Busy] = []
        self.errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.ended = False
        self.thread = threading.Thread(target=self._serve, name="models", daemon=True)
        self.thread.start()

    def run(self, function: Callable[[], Any]) -> Future[Any]:
        """Call something on this thread, between two turns."""
        future: Future[Any] = Future()
        with self.wake:
            self.errands.append((function, future))
            self.wake.notify()
        return future

    def add(self, worker: Busy) -> None:
        with self.wake:
            self.workers.append(worker)

    def remove(self, worker: Busy) -> None:
        """After its last turn. The thread ends with its last worker."""
        with self.wake:
            self.workers.remove(worker)
            self.ended = not self.workers
            self.wake.notify()

    def _serve(self) -> None:
        while not self.ended:
            with self.wake:
                self.wake.wait_for(lambda: self.ended or self.errands or any(each.has_work() for each in self.workers))
                errands = list(self.errands)
                self.errands.clear()
                workers = [each for each in self.workers if each.has_work()]
            for function, future in errands:
                fulfil(future, function)
            for worker in workers:
                worker.turn()


def fulfil(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
