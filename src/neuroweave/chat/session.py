"""A chat with one model: what was said, how a turn is prepared, and how its text comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from neuroweave.chat.answers import begun, first_stop
from neuroweave.chat.citations import Citer
from neuroweave.chat.grounding import Grounded, Grounding, Passage, shortened
from neuroweave.chat.prompts import PLAIN_STOPS, Message, encode_messages, has_template
from neuroweave.runtime.writing import StopWriting, Writer


@dataclass(frozen=True)
class Turn:
    """What a question got. `text`: with citations. `passages`: what the model read; `cited`: their numbers that the
    answer stands on; `removed`: numbers that the model wrote and that point nowhere. `prompt`: all that it read.
    `stopped`: why the text ended: `end of text`, `length` (of `new_tokens`) or `context` (it is full)."""

    text: str
    passages: list[Passage]
    cited: list[int]
    removed: list[int]
    notices: list[str]
    prompt: str
    stopped: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "answer": self.text,
            "sources": [passage.as_dict() for passage in self.passages],
            "cited": self.cited,
            "removed_citations": self.removed,
            "notices": self.notices,
            "stopped": self.stopped,
        }


@dataclass(eq=False)
class Session:
    """`writer`: the model. `grounding`: where answers come from; None: the model alone. `chosen`: how tokens are
    chosen, as `Writer.settings` takes it."""

    writer: Writer
    grounding: Grounding | None = None
    system: str | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    new_tokens: int = 512
    messages: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        self.messages.clear()

    def prepare(self, question: str) -> tuple[list[int], Grounded]:
        """(token ids, the chat as the model reads it). Raises ValueError where the question alone is too long."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        chat = [*system, *self.messages, {"role": "user", "content": question}]
        room = self.writer.prompt_room(self.new_tokens)

        def length(messages: list[Message]) -> int:
            return len(encode_messages(self.writer.tokenizer, messages))

        if self.grounding is not None:
            grounded = self.grounding.ground(chat, length=length, room=room)
        else:
            shorter = shortened(chat, length, room)
            left = len(chat) - len(shorter)
            notices = [f"{left} older messages were left out: the context is {room} tokens"] if left else []
            grounded = Grounded(shorter, notices=notices)
        return encode_messages(self.writer.tokenizer, grounded.messages), grounded

    def ask(self, question: str, *, seed: int, show: Callable[[str], object]) -> Turn:
        """Answer, and remember both. What comes is shown with its citations, sentence by sentence.

        Raises ValueError for what the model cannot read. KeyboardInterrupt in the middle: nothing is remembered.
        """
        ids, grounded = self.prepare(question)
        templated = has_template(self.writer.tokenizer)
        config = self.writer.settings(self.chosen, self.writer.room(ids, self.new_tokens), chat=templated)
        citer = Citer(grounded.texts)
        output = Output(show, citer, () if templated else PLAIN_STOPS)
        stopped = "end of text"
        with contextlib.suppress(StopWriting):
            stopped = self.writer.write(ids, config, seed=seed, show=output.put).stopped
        if stopped == "length" and config.max_new_tokens < self.new_tokens:
            stopped = "context"
        output.end(cut=stopped != "end of text")
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output.plain.strip()}]
        prompt = str(self.writer.tokenizer.decode(ids))
        return Turn(
            output.text.strip(), grounded.passages, citer.cited, citer.removed, grounded.notices, prompt, stopped
        )


@dataclass(eq=False)
class Output:
    """Pieces of text from the model, shown up to the first stop string, with citations."""

    show: Callable[[str], object]
    citer: Citer
    stops: tuple[str, ...]
    plain: str = ""  # as the model wrote it
    text: str = ""  # as it was shown
    held: str = ""

    def put(self, piece: str) -> None:
        """Raises StopWriting at a stop string."""
        self.held += piece
        place, stop = first_stop(self.held, self.stops)
        length = place if stop is not None else len(self.held) - begun(self.held, self.stops)
        given, self.held = self.held[:length], "" if stop is not None else self.held[length:]
        self._give(given)
        if stop is not None:
            raise StopWriting

    def end(self, *, cut: bool = False) -> None:
        self._give("" if cut else self.held)  # what is held may be the beginning of a stop string
        self.held = ""
        self._show(self.citer.end(cut=cut))

    def _give(self, text: str) -> None:
        self.plain += text
        self._show(self.citer.put(text))

    def _show(self, text: str) -> None:
        text = text if self.text else text.lstrip()
        if text:
            self.text += text
            self.show(text)
