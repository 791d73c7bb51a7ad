"""A real server in a thread, of tiny models."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from test_generate_cli import byte_tokenizer
from tiny_llama import tiny_model

from neuroweave.chat import served as served_module
from neuroweave.chat.connections import ImpatientProtocol
from neuroweave.chat.served import Served
from neuroweave.chat.server import application
from neuroweave.cli.serve import ending, listen
from neuroweave.runtime.batching import Batcher
from neuroweave.runtime.writing import Writer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
POSITIONS = 4096
ENDLESS = 3000  # tokens; written by those who dawdle they take a minute, more than a test waits for


def served(name: str = "tiny", *, seed: int = 0, role: str = "model", slots: int = 4, template: bool = True) -> Served:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE if template else None
    model: Any = tiny_model(seed, vocab_size=len(tokenizer), max_position_embeddings=POSITIONS)
    model.generation_config.eos_token_id = None  # random weights end nowhere, and tests want long texts
    writer = Writer(name, model, tokenizer, "cpu, float32", {})
    return Served(name, writer, Batcher(model, slots=slots, source=name, kept_tokens=POSITIONS), role)


@dataclass(frozen=True)
class Running:
    address: str
    served: list[Served]
    server: uvicorn.Server

    def load(self) -> tuple[int, int]:
        loads = [each.batcher.load() for each in self.served]
        return sum(writing for writing, _ in loads), sum(waiting for _, waiting in loads)

    def requests(self) -> int:
        with urllib.request.urlopen(f"{self.address}/health") as answer:
            return int(json.load(answer)["requests"])

    def settled(self, seconds: float = 20) -> bool:
        """Whether nothing is written or waits any more, within that time."""
        return within(seconds, lambda: self.load() == (0, 0))


def within(seconds: float, so: Callable[[], bool]) -> bool:
    """Whether it is so before that time is over."""
    ended = time.monotonic() + seconds
    while time.monotonic() < ended:
        if so():
            return True
        time.sleep(0.02)
    return so()


def dawdle(monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0.02) -> None:
    """Texts that begin from now on take that time or more for each token: on no machine are they over too early."""
    chooser = served_module.chooser

    def dawdling(*given: Any, **settings: Any) -> Callable[..., int]:
        choose = chooser(*given, **settings)

        def late(*found: Any) -> int:
            time.sleep(seconds)
            return choose(*found)

        return late

    monkeypatch.setattr(served_module, "chooser", dawdling)


@contextlib.contextmanager
def running(models: list[Served], **settings: Any) -> Iterator[Running]:
    listening = listen("127.0.0.1", 0)
    app = application(models, **settings)
    server = ending(
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, http=ImpatientProtocol)),
        app,
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", models, server)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
