"""`neuroweave serve`: an OpenAI-compatible server of a model, and of its original beside it, with a page to chat at."""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from neuroweave.checkpoint.loading import check_source
from neuroweave.cli.chatting import open_search, search_options
from neuroweave.cli.console import found, note

if TYPE_CHECKING:
    import uvicorn

    from neuroweave.chat.guard import Guard
    from neuroweave.chat.served import Served
    from neuroweave.runtime.model_thread import ModelThread

KEY_VARIABLE = "NEUROWEAVE_API_KEY"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
PACKAGES = ("fastapi", "uvicorn", "sse_starlette")


@click.command(
    "serve",
    help=f"""Serve MODEL, patched or not, to OpenAI's clients, and a page to chat at.

    \b
    neuroweave serve MODEL                     # http://127.0.0.1:8000
    neuroweave serve MODEL --against BASE      # both, side by side
    {KEY_VARIABLE}=... neuroweave serve MODEL --host 0.0.0.0

    Requests are answered together, a token each at a time. /v1/models, /v1/chat/completions and /v1/completions are
    there. Requests with web_search_options are answered from --search. Other addresses than loopback want a key.""",
)
@click.argument("model")
@click.option("--against", metavar="BASE", help="Another model beside it, such as the original.")
@search_options
@click.option("--name", metavar="NAME", help="What clients call MODEL by.  [default: the folder's name]")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key", metavar="KEY", envvar=KEY_VARIABLE, help=f"What clients have to know; better in {KEY_VARIABLE}."
)
@click.option("--slots", type=click.IntRange(1, 256), default=8, show_default=True, help="Texts written together.")
@click.option(
    "--requests", type=click.IntRange(min=1), default=64, show_default=True, help="Answered or waiting at once."
)
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Of one answer, at most."
)
@click.option(
    "--kept-tokens",
    type=click.IntRange(min=0),
    default=8192,
    show_default=True,
    help="Of earlier texts, for each model; texts that begin alike do not read them again. 0: none.",
)
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, ...")
def command(
    model: str, against: str | None, search: str | None, passages: int | None, allow_hosts: tuple[str, ...],
    proxy: str | None, name: str | None, host: str, port: int, api_key: str | None, slots: int, requests: int,
    new_tokens: int, kept_tokens: int, dtype: str, device: str,
) -> None:  # fmt: skip
    require_server()
    loopback = is_loopback(host)
    if not loopback and not api_key:
        raise ValueError(f"--host {host} can be reached by others; set {KEY_VARIABLE}, or listen at 127.0.0.1")
    api_key = None if api_key is None else api_key.strip()  # a file's last line end is in it
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key and " " not in api_key):
        raise ValueError("the API key has to be ASCII characters without spaces, and not empty")
    for source in filter(None, (model, against)):
        check_source(source)
    opened = open_search(search, passages, allow_hosts, proxy)
    listening = listen(host, port)
    from neuroweave.chat.guard import Limits
    from neuroweave.chat.server import application
    from neuroweave.runtime.model_thread import ModelThread

    try:
        load = functools.partial(
            loaded, slots=slots, kept_tokens=kept_tokens, dtype=dtype, device=device, thread=ModelThread()
        )
        served = [load(model, name, "model")]
        if against is not None:
            served.append(load(against, None, "original", taken=served[0].name))
        limits = Limits(requests=requests, new_tokens=new_tokens)
        names = frozenset((*LOOPBACK_NAMES, host)) if loopback else None
        grounding = opened(served[0].writer)
        app = application(served, limits=limits, api_key=api_key, hosts=names, grounding=grounding)
        run(app, listening, host)
    finally:
        listening.close()


def require_server() -> None:
    if missing := [name for name in PACKAGES if not found(name)]:
        raise ValueError(f"serve needs {', '.join(missing)}, which is not installed; pip install 'neuroweave[serve]'")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before a model is loaded for it. Raises ValueError for an address that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"--host {host}: no such address ({error.strerror})") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"{host}:{port} cannot be listened at ({error.strerror}); is another server running? give --port another"
        ) from error
    return listening


def loaded(
    source: str, name: str | None, role: str, *,
    slots: int, kept_tokens: int, dtype: str, device: str, thread: ModelThread, taken: str | None = None,
) -> Served:  # fmt: skip
    from neuroweave.chat.served import Served
    from neuroweave.runtime.batching import Batcher
    from neuroweave.runtime.writing import Writer

    writer = thread.run(functools.partial(Writer.load, source, dtype=dtype, device=device)).result()
    name = name or os.path.basename(os.path.normpath(source)) or source
    name = f"{name}-{role}" if name == taken else name
    batcher = Batcher(writer.model, slots=slots, source=source, thread=thread, kept_tokens=kept_tokens)
    note(f"{name}: {writer.how}, {batcher.slots} texts together")
    if batcher.why_single:
        note(f"{name}: one text at a time ({batcher.why_single})")
    if kept_tokens and batcher.prefixes.why_none:
        note(f"{name}: every prompt is read whole ({batcher.prefixes.why_none})")
    return Served(name, replace(writer, source=name), batcher, role)  # refusals tell no path


def run(app: Guard, listening: socket.socket, host: str) -> None:
    import uvicorn

    from neuroweave.chat.connections import ImpatientProtocol

    port = listening.getsockname()[1]
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_keep_alive=15, timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=1 << 16, http=ImpatientProtocol,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    note(f"http://{shown}:{port} is ready; Ctrl-C ends it")
    ending(uvicorn.Server(config), app).run(sockets=[listening])


def ending(server: uvicorn.Server, app: Guard) -> uvicorn.Server:
    """The server; when it shuts down, what is being answered is ended first, so that nobody waits for it."""
    shutdown = server.shutdown

    async def end(sockets: list[socket.socket] | None = None) -> None:
        await app.end()
        await shutdown(sockets)

    server.shutdown = end  # type: ignore[method-assign]
    return server
