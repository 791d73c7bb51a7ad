"""One request to the server: what it asks for, checked; its texts, whole or as events."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from torch import Tensor

from neuroweave.chat.answers import Piece, TokenText, shown
from neuroweave.chat.grounding import Grounding
from neuroweave.chat.guard import Limits, ServerError
from neuroweave.chat.prompts import takes_tools
from neuroweave.chat.protocol import ChatRequest, CompletionRequest, Shared
from neuroweave.chat.replies import ChatReply, Reply, usage, with_sources
from neuroweave.chat.served import Answering, Served
from neuroweave.runtime.batching import ClosedError


@dataclass(frozen=True)
class Work:
    """What begins each of the texts, and the reply that they are parts of."""

    reply: Reply
    begin: tuple[Callable[..., Answering], ...]  # of (owner=)


def chat_work(served: Served, asked: ChatRequest, limits: Limits, grounding: Grounding | None) -> Work:
    """Raises ValueError for what cannot be answered."""
    messages = [message.for_template() for message in asked.messages]
    new_tokens, grounded = allowed(asked.new_tokens, limits), None
    if asked.web_search_options is not None:
        if grounding is None:
            raise ValueError("web_search_options: this server was started without --search")
        if messages[-1]["role"] != "user":
            raise ValueError("web_search_options: the last message has to be a user's, to be searched for")
        grounding = replace(grounding, most=asked.web_search_options.passages(grounding.most))
        grounded = grounding.ground(
            messages,
            length=lambda chat: len(served.encode_chat(chat)),
            room=served.writer.prompt_room(new_tokens),
        )
        messages = grounded.messages
    tools = asked.tools if asked.tools and asked.tool_choice != "none" else None
    if tools and not takes_tools(served.writer.tokenizer):
        raise ValueError(f"tools: the chat template of {served.name} has no tools; leave them out")
    ids = served.encode_chat(messages, tools)
    config = served.settings(asked, ids, new_tokens, chat=True)
    begin = functools.partial(
        served.answer, ids, config, asked,
        stops=served.stops, told=bool(asked.logprobs), likeliest=asked.top_logprobs or 0,
        passages=None if grounded is None else grounded.texts, tools=bool(tools),
    )  # fmt: skip
    return Work(
        ChatReply(served.name, grounded=grounded), tuple(functools.partial(begin, choice=k) for k in range(asked.n))
    )


def completion_work(served: Served, asked: CompletionRequest, limits: Limits) -> Work:
    """A text for each prompt and choice, in that order. Raises ValueError for what cannot be answered."""
    begin: list[Callable[..., Answering]] = []
    prefix = []
    prompts = asked.prompts()
    if (texts := len(prompts) * asked.n) > limits.texts:
        raise ValueError(f"{texts:,} texts in one request; this server writes at most {limits.texts}")
    for prompt in prompts:
        ids = served.writer.encode(prompt, chat=False)[0] if isinstance(prompt, str) else prompt
        config = served.settings(asked, ids, allowed(asked.max_tokens, limits), chat=False)
        one = functools.partial(
            served.answer, ids, config, asked,
            told=asked.logprobs is not None, likeliest=asked.logprobs or 0, nothing=asked.max_tokens == 0,
        )  # fmt: skip
        begin += [functools.partial(one, choice=k) for k in range(asked.n)]
        if asked.echo:
            prefix += [echoed(served, ids, prompt, asked.logprobs)] * asked.n
    return Work(Reply(served.name, tuple(prefix)), tuple(begin))


def allowed(new_tokens: int | None, limits: Limits) -> int:
    if new_tokens is not None and new_tokens > limits.new_tokens:
        raise ValueError(f"{new_tokens:,} new tokens; this server gives at most {limits.new_tokens:,}")
    return limits.new_tokens if new_tokens is None else max(1, new_tokens)


def echoed(
    served: Served, ids: list[int], prompt: str | list[int], likeliest: int | None
) -> tuple[str, tuple[TokenText, ...]]:
    """A prompt's text, and, with logprobs, its tokens: one pass over all of it."""
    text = prompt if isinstance(prompt, str) else served.writer.tokenizer.decode(ids)
    if likeliest is None:
        return str(text), ()
    show = functools.partial(shown, served.writer.tokenizer)

    def told(before: int, id: int, row: Tensor) -> TokenText:
        best = row.topk(likeliest) if likeliest else None
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
        return TokenText(show([before], id), float(row[id]), tuple((show([before], other), p) for other, p in pairs))

    found = [TokenText(show([], ids[0]), None)]
    for place, rows in served.batcher.logits(ids):
        found += map(told, ids[place:], ids[place + 1 :], rows.log_softmax(-1))
    return str(text), tuple(found)


# ------------------------------------------------------------------------------------------------------------ replies


async def whole(reply: Reply, answers: Sequence[Answering]) -> dict[str, Any]:
    choices = []
    for index, each in enumerate(answers):
        tokens: list[TokenText] = []
        last = "length"
        async for piece in each.pieces():
            tokens += piece.tokens
            last = piece.last or last
        choice = reply.choice(index, each.text, tokens, last)
        if each.calls:
            choice["message"]["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in each.calls]
        if isinstance(reply, ChatReply) and reply.grounded and each.citer:
            with_sources(choice["message"], each.text, reply.grounded, each.citer)
        choices.append(choice)
    return reply.whole(choices, usage_of(answers))


async def stream(
    reply: Reply, answers: Sequence[Answering], stack: AsyncExitStack, *, counted: bool
) -> AsyncIterator[dict[str, str]]:
    """Events, as the texts come. `stack` is closed with the stream, however it ends. `counted`: with usage."""
    async with stack:
        try:
            for choice in reply.opening(len(answers)):
                yield event(reply.chunk([choice]))
            offsets = [reply.offset(index) for index in range(len(answers))]
            async for index, one in merged([each.pieces() for each in answers]):
                choice = reply.delta(index, one.text, one.tokens, one.last, offsets[index])
                offsets[index] += sum(len(each.text) for each in one.tokens)
                if one.last and answers[index].calls:
                    choice["delta"]["tool_calls"] = answers[index].calls
                citer = answers[index].citer
                if one.last and isinstance(reply, ChatReply) and reply.grounded and citer:
                    with_sources(choice["delta"], answers[index].text, reply.grounded, citer)
                yield event(reply.chunk([choice]))
            if counted:
                yield event(reply.chunk([], usage=usage_of(answers)))
            yield {"data": "[DONE]"}
        except Exception as error:  # the head is out: an error can only be one more event
            status = 400 if isinstance(error, ValueError) else 503 if isinstance(error, ClosedError) else 500
            yield event(ServerError(status, str(error) or type(error).__name__).body())


def usage_of(answers: Sequence[Answering]) -> dict[str, Any]:
    known = sum(each.job.known for each in answers if each.job is not None)
    return usage(sum(each.prompt_tokens for each in answers), sum(each.new_tokens for each in answers), known)


def wants_usage(asked: Shared) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage


def event(content: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(content, ensure_ascii=False, separators=(",", ":"))}


async def merged(sources: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """(which, piece) of several texts as they come; the first error ends all."""
    if len(sources) == 1:
        async for only in sources[0]:
            yield 0, only
        return
    found: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for piece in sources[index]:
                found.put_nowait((index, piece))
            found.put_nowait((index, None))
        except Exception as error:
            found.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index)) for index in range(len(sources))]
    try:
        open_ones = len(sources)
        while open_ones:
            index, piece = await found.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                open_ones -= 1
            else:
                yield index, piece
    finally:
        for task in pumps:
            task.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` gives; it is cancelled when the client goes away. Raises ServerError then, for nobody."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServerError(499, "the client went away")
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
