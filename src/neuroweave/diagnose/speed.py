"""How fast a model reads and writes, in several ways of running it, in turn: pairs in one run, medians and spread.

Prefill is reading the prompt until the first new token, decode all tokens after it. Every way runs once before the
clock starts. The baseline is transformers' own `generate`, eager, with its cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from neuroweave.runtime.engine import Engine
from neuroweave.runtime.lowering import lower
from neuroweave.runtime.operations import Linear, Place, Program
from neuroweave.runtime.sparsity import Skipping
from neuroweave.runtime.weights import FORMATS, pack

BASELINE = "transformers, eager, cache"
UNCACHED = "transformers, eager, no cache"
COMPILED = "transformers, compiled, static cache"
PROBE_BYTES = 1 << 30  # caches of processors reach 200 MB
NO_TOKEN = -1  # None would mean the model's own end token, and texts are to be equally long


@dataclass(frozen=True)
class Timing:
    """Of one run. `joules`: of the processor's package, None where the system does not tell."""

    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float
    joules: float | None = None


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run a model. `run`: (prompt, new tokens) -> its timing. `bytes_a_token`: of weights that a step reads;
    `weight_bytes`: of weights held."""

    model: str
    name: str
    run: Callable[[list[int], int], Timing]
    bytes_a_token: int
    weight_bytes: int


@dataclass
class Measured:
    """What was found of a way. Ratios are of decoding, to the baseline of the same round."""

    model: str
    name: str
    bytes_a_token: int
    weight_bytes: int
    timings: list[Timing] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def decode_rates(self) -> list[float]:
        return [(len(each.tokens) - 1) / each.decode_seconds for each in self.timings]

    def first_token_seconds(self) -> float:
        return statistics.median(each.prefill_seconds for each in self.timings)

    def joules_a_token(self) -> float | None:
        found = [each.joules / len(each.tokens) for each in self.timings if each.joules is not None]
        return statistics.median(found) if found else None


class Clock(BaseStreamer):
    """Notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_way(label: str, name: str, model: Any) -> Way:
    """transformers' `generate`, greedy: eager with or without a cache, or its compiled step on a static cache."""
    settings: dict[str, Any] = {"do_sample": False, "use_cache": name != UNCACHED}
    if name == COMPILED:
        compile_config = CompileConfig()
        setattr(compile_config, "_compile_all_devices", True)  # noqa: B010  transformers compiles by itself on GPUs alone
        settings |= {"cache_implementation": "static", "compile_config": compile_config}

    def run(prompt: list[int], count: int) -> Timing:
        config = GenerationConfig(max_new_tokens=count, eos_token_id=NO_TOKEN, pad_token_id=0, **settings)
        clock, ids = Clock(), torch.tensor([prompt], device=model.device)
        with energy() as joules:
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
        first = clock.times[1]
        return Timing(output[0, len(prompt) :].tolist(), first - clock.times[0], clock.times[-1] - first, joules())

    size = sum(each.numel() * each.element_size() for each in model.parameters())
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    return Way(label, name, run, size if tied else size - table.numel() * table.element_size(), size)


def runtime_way(label: str, model: Any, positions: int, *, format: str, skipping: Skipping | None = None) -> Way:
    """The fast runtime, with weights in a format; `skipping`: without the neurons that it leaves out."""
    program = lower(model, format=format, thresholds=skipping.worth_it() if skipping else None)
    engine = Engine(program, positions=positions)
    sparse = f", {skipping.mean_share:.0%} skipped" if skipping else ""
    where = "fast runtime" if engine.compiled else "fast runtime, in PyTorch"

    def run(prompt: list[int], count: int) -> Timing:
        engine.reset()
        with energy() as joules:
            began = time.perf_counter()
            tokens = [int(engine.read_prompt(prompt).argmax())]
            first = time.perf_counter()
            while len(tokens) < count:
                tokens.append(int(engine.step(tokens[-1]).argmax()))
            ended = time.perf_counter()
        return Timing(tokens, first - began, ended - first, joules())

    held = program.bytes_a_token
    read = held - (skipping.skipped_bytes(program) if skipping else 0)
    return Way(label, f"{where}, {format}{sparse}", run, read, held)


def measure_ways(
    ways: Sequence[Way], prompt: list[int], count: int, rounds: int, say: Callable[[str], object] = lambda line: None
) -> list[Measured]:
    """Each way once a round, the order turning; without a cache a few tokens only, since each costs a whole text."""
    found = [Measured(way.model, way.name, way.bytes_a_token, way.weight_bytes) for way in ways]

    def run(way: Way) -> Timing:
        return way.run(prompt, max(2, count // 8) if way.name == UNCACHED else count)

    for way in ways:
        say(f"{way.model}: {way.name}")
        run(way)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        order = list(range(len(ways)))
        order = order[number % len(ways) :] + order[: number % len(ways)]
        for place in order:
            found[place].timings.append(run(ways[place]))
        base = found[next(i for i, way in enumerate(ways) if way.name == BASELINE)]
        for each in found:
            each.ratios.append(each.decode_rates()[-1] / base.decode_rates()[-1])
    return found


def memory_bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads at best: the fastest of several products of a vector by a large matrix,
    and of several sums of it."""
    columns = 4096
    matrix = pack(torch.rand(PROBE_BYTES // 4 // columns, columns), "float32")
    source, out = Place("x", 0, columns), Place("y", 0, matrix.rows)
    engine = Engine(
        Program([Linear(source, out, matrix)], {"x": columns, "y": matrix.rows}, out, 1 << 20),
        positions=1 << 20,
        threads=threads,
    )
    best = 0.0
    for _ in range(10):
        for job in (lambda: engine.step(0), matrix.data.sum):
            began = time.perf_counter()
            job()
            best = max(best, PROBE_BYTES / (time.perf_counter() - began))
    return best


class energy:  # noqa: N801  (a context manager, used as a function)
    """Joules that the processor took within, where Linux lets it be read."""

    FILE = Path("/sys/class/powercap/intel-rapl:0/energy_uj")

    def __enter__(self) -> Callable[[], float | None]:
        self.ended: int | None = None
        self.began = self.read()
        return lambda: None if self.began is None or self.ended is None else (self.ended - self.began) / 1e6

    def __exit__(self, *_: object) -> None:
        self.ended = self.read()

    def read(self) -> int | None:
        try:
            return int(self.FILE.read_text())
        except (OSError, ValueError):
            return None


def formats_of(text: str) -> list[str]:
    """The weight formats that a list with commas names. Raises ValueError for one that is not known."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if strange := [each for each in found if each not in FORMATS]:
        raise ValueError(f"weight format {strange[0]!r} is not known; known: {', '.join(FORMATS)}")
    return found
