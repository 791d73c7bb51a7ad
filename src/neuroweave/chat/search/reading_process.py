"""Documents are read in a process of its own, which is killed when it takes too long.

Some pages of 2 MB keep an HTML parser busy for minutes (deep nesting, thousands of attributes), some PDFs ask for all
memory, and a parser in C may crash; nothing stops that from inside. Frames on the pipes: two lengths, JSON, bytes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import queue
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from types import TracebackType
from typing import IO, Any

from neuroweave.chat.search.documents import Document, Section, read_document

LENGTHS = struct.Struct(">II")
MEMORY = 4 << 30  # bytes of address space
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # in names of variables that the process does not get


class ReadingProcess:
    """Reads documents one at a time; started when first needed, or by `warm`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._turn = threading.Lock()

    def __enter__(self) -> ReadingProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def read(
        self, content: bytes, *, kind: str, name: str, charset: str | None = None, seconds: float = 60.0
    ) -> Document:
        """As `read_document`. Raises ValueError, with the reason alone, also when it takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        if not self._turn.acquire(timeout=max(0.0, seconds)):
            raise ValueError("no time was left to read it")
        try:
            self._start()
            reply = self._ask({"kind": kind, "name": name, "charset": charset}, content, deadline)
        except queue.Empty:
            self._end()
            raise ValueError(f"reading it took longer than {seconds:.3g} s") from None
        except OSError:
            self._end()
            raise ValueError("the process that reads documents ended") from None
        except BaseException:
            self._end()
            raise
        finally:
            self._turn.release()
        if reply is None:
            raise ValueError("the process that reads documents ended on it")
        if "error" in reply:
            raise ValueError(reply["error"])
        return document_from(reply)

    def warm(self) -> None:
        """Start the process now: it takes a moment, which something else may use."""
        with self._turn:
            self._start()

    def _start(self) -> None:
        if self._process is not None:
            return
        environment = {key: value for key, value in os.environ.items() if not any(w in key.upper() for w in SECRET)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        self._replies = queue.Queue()
        threading.Thread(target=receive, args=(self._process.stdout, self._replies), daemon=True).start()

    def close(self) -> None:
        with self._turn:
            self._end()

    def _ask(self, header: dict[str, Any], content: bytes, deadline: float) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdin is not None
        write_frame(self._process.stdin, header, content)
        reply = self._replies.get(timeout=max(0.01, deadline - time.monotonic()))
        if reply is None:
            self._end()
        return reply

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()


def receive(pipe: IO[bytes], replies: queue.Queue[dict[str, Any] | None]) -> None:
    """Put each reply into the queue, None at the end."""
    with pipe:
        while frame := read_frame(pipe):
            replies.put(frame[0])
    replies.put(None)


def write_frame(pipe: IO[bytes], header: dict[str, Any], content: bytes = b"") -> None:
    data = json.dumps(header).encode()
    pipe.write(LENGTHS.pack(len(data), len(content)) + data)
    pipe.write(content)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    start = pipe.read(LENGTHS.size)
    if len(start) < LENGTHS.size:
        return None
    header, content = LENGTHS.unpack(start)
    data, body = pipe.read(header), pipe.read(content)
    return (json.loads(data), body) if len(data) == header and len(body) == content else None


def document_from(reply: dict[str, Any]) -> Document:
    sections = tuple(
        Section(each["heading"], tuple(each["paragraphs"]), tuple(each["terms"])) for each in reply["sections"]
    )
    date = datetime.date.fromisoformat(reply["date"]) if reply["date"] else None
    return Document(reply["title"], sections, date, reply["warning"])


def reply_to(header: dict[str, Any], content: bytes) -> dict[str, Any]:
    try:
        document = read_document(content, kind=header["kind"], name=header["name"], charset=header["charset"])
    except ValueError as error:
        return {"error": str(error)}
    except (MemoryError, RecursionError) as error:
        return {"error": f"reading it takes too much ({type(error).__name__})"}
    except Exception as error:  # a defect of a parser: the other documents go on
        return {"error": f"cannot be read ({type(error).__name__}: {error})"}
    return asdict(document) | {"date": document.date.isoformat() if document.date else None}


def main() -> None:
    """The process itself: answers frames until its input ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints must not get between the frames
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        while frame := read_frame(incoming):
            write_frame(outgoing, reply_to(*frame))
