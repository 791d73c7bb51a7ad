"""A model that answers many at once: what a request asks for as a job of the batcher, and its text as it comes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from neuroweave.chat.answers import Assembly, Piece, TokenText
from neuroweave.chat.citations import Citer
from neuroweave.chat.prompts import PLAIN_STOPS, Message, encode_messages, has_template
from neuroweave.chat.protocol import Shared
from neuroweave.chat.tool_calls import split_calls
from neuroweave.runtime.batching import Batcher, Job, Token
from neuroweave.runtime.token_choice import check_sampling, chooser, refuse_unknown
from neuroweave.runtime.writing import Writer

WAY_OUT = "take it out of the checkpoint's generation_config.json"


@dataclass(frozen=True, eq=False)
class Served:
    """A model under the name that clients call it by. `role`: what it is to the others that are served."""

    name: str
    writer: Writer
    batcher: Batcher
    role: str = "model"

    def encode_chat(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Raises ValueError for a chat that the model's template refuses."""
        return encode_messages(self.writer.tokenizer, messages, tools=tools)

    @property
    def stops(self) -> tuple[str, ...]:
        """Where a chat has to be ended that has no tokens for it."""
        return () if has_template(self.writer.tokenizer) else PLAIN_STOPS

    def settings(self, request: Shared, ids: list[int], new_tokens: int, *, chat: bool) -> GenerationConfig:
        """How tokens are chosen: as the request says, and where it is silent, the checkpoint.

        Raises ValueError where there is no room for a token, and for settings that cannot be followed.
        """
        names = ("temperature", "top_p", "top_k", "min_p")
        given = {name: value for name in names if (value := getattr(request, name)) is not None}
        chosen: dict[str, Any] = {}
        if given.get("temperature") == 0:
            chosen["do_sample"] = False
        elif given:
            chosen = {"do_sample": True, **given}
        if request.repetition_penalty is not None:
            chosen["repetition_penalty"] = request.repetition_penalty
        config = self.writer.settings(chosen, self.writer.room(ids, new_tokens), chat=chat)
        refuse_unknown(config, WAY_OUT)
        check_sampling(config)
        return config

    def answer(
        self, ids: list[int], config: GenerationConfig, request: Shared, *,
        choice: int = 0, stops: tuple[str, ...] = (), told: bool = False, likeliest: int = 0, nothing: bool = False,
        passages: Sequence[str] | None = None, tools: bool = False, owner: object = None,
    ) -> Answering:  # fmt: skip
        """Begin to continue `ids`; the `choice` moves the seed on; `nothing`: no token is to be written;
        `passages`: what is to be cited; `tools`: the text may hold calls of them, and comes whole; `owner`: see `Job`.

        Has to be called where an event loop runs.
        """
        seed = random.getrandbits(63) if request.seed is None else (request.seed + choice) % 2**63
        generator = torch.Generator().manual_seed(seed)
        choose = chooser(config, self.name, generator=generator)
        assembly = Assembly(self.writer.tokenizer, (*request.stop, *stops), told=told, prompt=ids)
        citer = None if passages is None else Citer(passages)
        answering = Answering(assembly, prompt_tokens=len(ids), citer=citer, tools=tools)
        job = Job(
            list(ids),
            config.max_new_tokens,
            frozenset(config.eos_token_id or ()),
            adjusted(choose, request, len(ids)),
            answering.hear,
            likeliest=likeliest,
            owner=owner,
            salt=request.cache_salt,
        )
        answering.job = job
        if nothing:
            answering.over = True
            return answering
        self.batcher.submit(job)
        return answering


@dataclass(eq=False)
class Answering:
    """A text that is being written. Whoever stops listening has to call `cancel`."""

    assembly: Assembly
    prompt_tokens: int
    job: Job | None = None
    heard: asyncio.Queue[Token | Exception] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    over: bool = False
    citer: Citer | None = None
    tools: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""  # all that was given out

    @property
    def new_tokens(self) -> int:
        return len(self.assembly.ids)

    def hear(self, token: Token | Exception) -> None:
        """Called from the batcher's thread."""
        try:
            self.loop.call_soon_threadsafe(self.heard.put_nowait, token)
        except RuntimeError:  # the loop is closed
            self.cancel()

    def cancel(self) -> None:
        if self.job is not None:
            self.job.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises what ended the text early."""
        if self.over:
            yield Piece("", (), "length")
            return
        held: tuple[TokenText, ...] = ()
        async for piece in self._written():
            shown = piece.text
            if self.citer is not None:
                shown = self.citer.put(shown) + (self.citer.end(cut=piece.last == "length") if piece.last else "")
            self.text += shown
            if not self.tools:
                yield Piece(shown, piece.tokens, piece.last)
                continue
            held += piece.tokens
            if piece.last:
                self.text, self.calls = split_calls(self.text)
                yield Piece(self.text, held, "tool_calls" if self.calls else piece.last)

    async def _written(self) -> AsyncIterator[Piece]:
        while True:
            token = await self.heard.get()
            if isinstance(token, Exception):
                raise token
            piece = self.assembly.put(token)
            if piece is None:
                continue
            if piece.last:
                self.cancel()  # a stop string: the batcher does not know of it
            yield piece
            if piece.last:
                return


def adjusted(
    choose: Callable[[list[int], Tensor], int], request: Shared, prompt: int
) -> Callable[[list[int], Tensor], int]:
    """With OpenAI's penalties for tokens that were written already, and biases."""
    biased = torch.tensor([int(token) for token in request.logit_bias], dtype=torch.long)
    biases = torch.tensor(list(request.logit_bias.values()), dtype=torch.float32)
    penalized = bool(request.frequency_penalty or request.presence_penalty)
    if not len(biased) and not penalized:
        return choose

    def choose_adjusted(text: list[int], logits: Tensor) -> int:
        if len(biased) and (largest := int(biased.max())) >= len(logits):
            raise ValueError(f"logit_bias: token {largest} is not one of the model's {len(logits)}")
        scores = logits.index_add(0, biased, biases)
        if penalized:
            tokens, counts = torch.tensor(text[prompt:], dtype=torch.long).unique(return_counts=True)
            scores[tokens] -= request.frequency_penalty * counts + request.presence_penalty
        return choose(text, scores)

    return choose_adjusted
