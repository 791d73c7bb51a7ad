"""What the server answers, in the form that OpenAI's clients read."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from neuroweave.chat.answers import TokenText
from neuroweave.chat.citations import Citer, citations_in
from neuroweave.chat.grounding import Grounded


@dataclass(frozen=True)
class Reply:
    """The parts of one reply, whole or in chunks. `prefix`: what an answer repeats of its prompt, by choice."""

    model: str
    prefix: tuple[tuple[str, tuple[TokenText, ...]], ...] = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, *, chunk: bool) -> dict[str, Any]:
        return {"id": f"cmpl-{self.id}", "object": "text_completion", "created": self.created, "model": self.model}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self.head(chunk=True), "choices": choices, **more}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.head(chunk=False), "choices": choices, "usage": usage}

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Choices that are sent before any text is there."""
        return [self.delta(index, text, tokens, None, 0) for index, (text, tokens) in enumerate(self.prefix)]

    def offset(self, index: int) -> int:
        """Characters of a choice before its first new token."""
        return sum(len(each.text) for each in self.prefix[index][1]) if self.prefix else 0

    def delta(
        self, index: int, text: str, tokens: Sequence[TokenText], last: str | None, offset: int
    ) -> dict[str, Any]:
        logprobs = completion_logprobs(tokens, offset) if tokens else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": last}

    def choice(self, index: int, text: str, tokens: Sequence[TokenText], last: str) -> dict[str, Any]:
        before = self.prefix[index] if self.prefix else ("", ())
        return self.delta(index, before[0] + text, [*before[1], *tokens], last, 0)


@dataclass(frozen=True)
class ChatReply(Reply):
    """The same of a chat. `grounded`: what the model was given to read, None: nothing was searched."""

    grounded: Grounded | None = None

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def opening(self, count: int) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if self.grounded is not None:  # whoever stops the answer has seen what it stands on
            delta["neuroweave"] = what_was_read(self.grounded)
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for index in range(count)]

    def delta(
        self, index: int, text: str, tokens: Sequence[TokenText], last: str | None, offset: int
    ) -> dict[str, Any]:
        logprobs = chat_logprobs(tokens) if tokens else None
        return {"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": last}

    def choice(self, index: int, text: str, tokens: Sequence[TokenText], last: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = chat_logprobs(tokens) if tokens else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": last}


def with_sources(message: dict[str, Any], text: str, grounded: Grounded, citer: Citer) -> None:
    """Put into a message where its answer stands on what: OpenAI's annotations, and all that was read."""
    passages = {passage.number: passage for passage in grounded.passages}
    message["annotations"] = [
        {
            "type": "url_citation",
            "url_citation": {
                "start_index": start,
                "end_index": end,
                "title": passages[number].title,
                "url": passages[number].address,
            },
        }
        for start, end, number in citations_in(text, len(passages))
    ]
    message["neuroweave"] = what_was_read(grounded) | {"cited": citer.cited, "removed_citations": citer.removed}


def what_was_read(grounded: Grounded) -> dict[str, Any]:
    return {"sources": [passage.as_dict() for passage in grounded.passages], "notices": grounded.notices}


def usage(prompt_tokens: int, new_tokens: int, known: int) -> dict[str, Any]:
    """`known`: tokens of the prompts that were not read again."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": known},
    }


def chat_logprobs(tokens: Iterable[TokenText]) -> dict[str, Any]:
    def entry(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "surrogatepass"))}

    return {
        "content": [
            {**entry(each.text, each.logprob), "top_logprobs": [entry(*best) for best in each.likeliest]}
            for each in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[TokenText], offset: int) -> dict[str, Any]:
    """`offset`: characters of the text before the first token. Of a token without logprob, the very first, null."""
    offsets = []
    for each in tokens:
        offsets.append(offset)
        offset += len(each.text)
    return {
        "tokens": [each.text for each in tokens],
        "token_logprobs": [each.logprob for each in tokens],  # of the very first token of a text: null
        "top_logprobs": [dict(each.likeliest) if each.likeliest else None for each in tokens],
        "text_offset": offsets,
    }
