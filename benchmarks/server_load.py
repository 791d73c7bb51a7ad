"""A served model under load: one client against many, malformed and oversized requests, clients that are killed.

    python benchmarks/server_load.py MODEL [--clients 8] [--new 128] [--rounds 3] [--bad 1000] [--killed 40]

Starts `neuroweave serve MODEL` on a free port. Rates are of all streamed tokens by the clock, one client and many in
turn, each after one run to warm up; "slowest" is the client that got least. Memory is that of the server's process.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import psutil

from neuroweave.diagnose.environment import describe_environment

TOPICS = ("a river", "the sea", "an old house", "a machine", "winter", "a letter", "the night", "a garden")
ENDLESS = {"2": -100, "0": -100}  # SmolLM2's end tokens: texts are to be equally long


async def stream(client: openai.AsyncOpenAI, number: int, new: int) -> tuple[float, float, int]:
    """(seconds to the first text, seconds in all, tokens) of one streamed answer."""
    began = time.perf_counter()
    first = 0.0
    answer = await client.chat.completions.create(
        model=client.served,  # type: ignore[attr-defined]
        messages=[{"role": "user", "content": f"Write a long story about {TOPICS[number % len(TOPICS)]}."}],
        max_tokens=new, temperature=0, logit_bias=ENDLESS, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    tokens = 0
    async for chunk in answer:
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.perf_counter() - began
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return first, time.perf_counter() - began, tokens


async def together(client: openai.AsyncOpenAI, clients: int, new: int) -> dict[str, float]:
    began = time.perf_counter()
    found = await asyncio.gather(*(stream(client, number, new) for number in range(clients)))
    seconds = time.perf_counter() - began
    return {
        "rate": sum(tokens for _, _, tokens in found) / seconds,
        "slowest": min(tokens / whole for _, whole, tokens in found),
        "fastest": max(tokens / whole for _, whole, tokens in found),
        "first": max(first for first, _, _ in found),
    }


def malformed(draw: random.Random) -> bytes:
    """A request that nobody should send."""
    body = draw.choice([
        b"", b"{", b"[]", b"null", bytes(draw.randrange(256) for _ in range(draw.randrange(400))), b"[" * 50_000,
        b'{"messages": [{"role": "user", "content": "' + b"x" * 3_000_000 + b'"}]}',
        json.dumps({"messages": "no", "max_tokens": -1}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 10**9}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "word " * 100_000}], "max_tokens": 5}).encode(),
        json.dumps({"prompt": [[-5]], "max_tokens": 1}).encode(),
    ])  # fmt: skip
    path = draw.choice(
        [b"/v1/chat/completions", b"/v1/completions", b"/v1/nothing", b"/../../etc/passwd", b"*", b"\xff"]
    )
    head = draw.choice([b"POST ", b"GET ", b"BREW ", b"\0\1\2 "]) + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    length = draw.choice([b"%d" % len(body)] * 4 + [b"-1", b"99999999999999", b"x", b"3"])
    kind = draw.choice([b"application/json"] * 4 + [b"text/plain", b""])
    return head + b"Content-Type: " + kind + b"\r\nContent-Length: " + length + b"\r\n\r\n" + body


def throw(port: int, count: int) -> dict[str, int]:
    """How many of `count` bad requests got which status; "none" where the connection was simply closed."""
    draw, found = random.Random(0), {}
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            answer = b""
            try:
                connection.sendall(malformed(draw))
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(64)
            except OSError:
                pass
        match = re.match(rb"HTTP/1.1 (\d+)", answer)
        status = match[1].decode() if match else "none"
        found[status] = found.get(status, 0) + 1
    return dict(sorted(found.items()))


async def killed(client: openai.AsyncOpenAI, count: int) -> None:
    """Clients that go away after the first text, in the middle of theirs."""

    async def one(number: int) -> None:
        answer = await client.chat.completions.create(
            model=client.served,  # type: ignore[attr-defined]
            messages=[{"role": "user", "content": f"Count to {1000 + number}."}],
            max_tokens=2000, temperature=0, logit_bias=ENDLESS, stream=True,
        )  # fmt: skip
        async for _ in answer:
            break
        await answer.close()

    for start in range(0, count, 8):
        await asyncio.gather(*(one(number) for number in range(start, min(start + 8, count))))


def state(port: int) -> dict[str, Any]:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
        return json.loads(answer.read())


def resources(process: psutil.Process) -> str:
    open_sockets = len([each for each in process.net_connections(kind="tcp") if each.status == "ESTABLISHED"])
    return (
        f"{process.memory_info().rss / 1e6:.0f} MB, {process.num_threads()} threads, {process.num_fds()} files, "
        f"{open_sockets} connections"
    )


async def measure(options: argparse.Namespace, port: int, process: psutil.Process) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        client.served = (await client.models.list()).data[0].id  # type: ignore[attr-defined]
        counts = (1, options.clients)
        for count in counts:
            await together(client, count, 16)
        rounds = [
            {count: await together(client, count, options.new) for count in counts} for _ in range(options.rounds)
        ]
        for count in counts:
            mine = [each[count] for each in rounds]
            middle = {name: statistics.median(each[name] for each in mine) for name in mine[0]}
            print(
                f"{count} client(s): {middle['rate']:.1f} tokens/s in all; slowest {middle['slowest']:.1f}, fastest "
                f"{middle['fastest']:.1f}; last first text after {middle['first']:.2f} s"
            )
        ratios = sorted(each[options.clients]["rate"] / each[1]["rate"] for each in rounds)
        print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"before: {resources(process)}")
        print(f"{options.bad} bad requests: {throw(port, options.bad)}")
        await killed(client, options.killed)
        await asyncio.sleep(2)
        print(f"after {options.killed} killed clients: {state(port)}")
        print(f"after: {resources(process)}")
        print(f"still answers: {await together(client, options.clients, 16)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bad", type=int, default=1000)
    parser.add_argument("--killed", type=int, default=40)
    options = parser.parse_args()
    command = [sys.executable, "-m", "neuroweave", "serve", str(options.model), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        ready = next(match for line in server.stderr if (match := re.search(r"127\.0\.0\.1:(\d+) is ready", line)))
        machine = describe_environment()
        print(
            f"{machine.cpu}, {machine.cores} cores, {datetime.date.today()}; {options.model.name}, {options.new} tokens"
        )
        asyncio.run(measure(options, int(ready[1]), psutil.Process(server.pid)))
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
