"""An OpenAI-compatible server of one model, or of two side by side: FastAPI, requests batched by `runtime.batching`.

`transformers serve` gives no log-probabilities and cannot load patched classes; both come with FastAPI and uvicorn.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException

from neuroweave.chat.divergence import DivergenceRequest, divergence
from neuroweave.chat.grounding import Grounding
from neuroweave.chat.guard import Guard, Limits, ServerError
from neuroweave.chat.protocol import ChatRequest, CompletionRequest, Shared
from neuroweave.chat.search.discreet import DiscreetProvider
from neuroweave.chat.served import Served
from neuroweave.chat.work import Work, chat_work, completion_work, stream, unless_gone, wants_usage, whole
from neuroweave.runtime.batching import ClosedError

PAGE = Path(__file__).parent / "page"
FAREWELL_SECONDS = 2.0  # in which a stream can say that the server ends
SEND_SECONDS = 60.0  # a client that does not read for so long is dropped


@dataclass(eq=False)
class Server:
    """The models that are served, and how many requests are being answered."""

    served: Sequence[Served]
    limits: Limits
    active: int = 0
    preparing: set[asyncio.Future[Any]] = field(default_factory=set)

    def of(self, name: str | None) -> Served:
        """Raises ServerError for a model that is not served."""
        for each in self.served:
            if name in (None, each.name):
                return each
        known = ", ".join(each.name for each in self.served)
        raise ServerError(
            404, f"model {name!r} is not served here; known: {known}", param="model", code="model_not_found"
        )

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Raises ServerError where too many requests are being answered."""
        if self.active >= self.limits.requests:
            raise ServerError(429, f"this server answers {self.limits.requests} requests at once; try again soon")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    async def prepared(self, prepare: Callable[[], Any]) -> Any:
        """In a thread of its own, which no search can keep from others, nor the server from ending."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Any] = loop.create_future()

        def work() -> None:
            try:
                result = prepare()
                settle = functools.partial(found.set_result, result)
            except Exception as error:
                settle = functools.partial(found.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: None if found.done() else settle())

        self.preparing.add(found)
        try:
            threading.Thread(target=work, name="preparing", daemon=True).start()
            return await found
        finally:
            self.preparing.discard(found)

    async def end(self) -> None:
        """Tell all who are being answered that nothing more comes."""
        for found in self.preparing:
            if not found.done():
                found.set_exception(ClosedError())
        for each in self.served:
            await asyncio.to_thread(each.batcher.close)

    async def reply(self, request: Request, asked: Shared, prepare: Callable[[], Work]) -> Any:
        """Raises ServerError for what `prepare` refuses with a ValueError."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.place())
            try:
                work = await self.prepared(prepare)
                answers = [begin(owner=work) for begin in work.begin]
                for each in answers:
                    stack.callback(each.cancel)
                if not asked.stream:
                    return await unless_gone(request, whole(work.reply, answers))
            except ValueError as error:
                raise ServerError(400, str(error)) from error
            events = stream(work.reply, answers, stack.pop_all(), counted=wants_usage(asked))
            return EventSourceResponse(
                events, send_timeout=SEND_SECONDS, sep="\n", shutdown_grace_period=FAREWELL_SECONDS
            )


def application(
    served: Sequence[Served], *, limits: Limits | None = None, api_key: str | None = None,
    hosts: frozenset[str] | None = None, grounding: Grounding | None = None,
) -> Guard:  # fmt: skip
    """The ASGI application; `await end()` ends what it is doing. `hosts`: see `Guard`. `grounding`: for requests that
    ask for a search."""
    limits = limits or Limits()
    server = Server(served, limits)
    if grounding is not None:
        grounding = replace(grounding, provider=DiscreetProvider(grounding.provider))
    app = FastAPI(title="Neuroweave", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ServerError)
    async def told(_: Request, error: ServerError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers=headers)

    @app.exception_handler(ClosedError)
    async def closed(_: Request, error: ClosedError) -> JSONResponse:
        return JSONResponse(ServerError(503, str(error)).body(), 503)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(of_validation(error).body(), 400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(ServerError(error.status_code, str(error.detail)).body(), error.status_code)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ServerError(500, f"unexpected {type(error).__name__}").body(), 500)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        loads = {each.name: dict(zip(("writing", "waiting"), each.batcher.load(), strict=True)) for each in served}
        return {
            "status": "ok",
            "requests": server.active,
            "models": loads,
            "search": grounding.provider.name if grounding else None,
            "new_tokens": limits.new_tokens,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_entry(each) for each in served]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return model_entry(server.of(name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Any:
        served = server.of(asked.model)
        return await server.reply(request, asked, functools.partial(chat_work, served, asked, limits, grounding))

    @app.post("/v1/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Any:
        served = server.of(asked.model)
        return await server.reply(request, asked, functools.partial(completion_work, served, asked, limits))

    @app.post("/v1/neuroweave/divergence")
    async def diverge(asked: DivergenceRequest) -> dict[str, Any]:
        async with server.place():
            try:
                models = server.of(asked.model), server.of(asked.against)
                return dict(await server.prepared(functools.partial(divergence, *models, asked)))
            except ValueError as error:
                raise ServerError(400, str(error)) from error

    if PAGE.is_dir():
        app.mount("/static", StaticFiles(directory=PAGE), name="static")

        @app.api_route("/", methods=["GET", "HEAD"])
        async def page() -> FileResponse:
            return FileResponse(PAGE / "index.html")

    return Guard(app, limits=limits, api_key=api_key, hosts=hosts, end=server.end)


def model_entry(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "neuroweave", "role": served.role}


def of_validation(error: RequestValidationError) -> ServerError:
    """The first thing that is wrong, by the name of its field."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(place)
    if first["type"] == "json_invalid":
        return ServerError(400, f"the body is not JSON ({first.get('ctx', {}).get('error', 'unreadable')})")
    message = {"extra_forbidden": "is not known here; leave it out", "missing": "is missing"}.get(
        first["type"], first["msg"].removeprefix("Value error, ")
    )
    return ServerError(400, f"{field or 'the body'}: {message}", param=field or None)
