"""A sparse GLU of the shape of a 7B model's MLP against dense products, batch 1, at several shares of zeros.

    python benchmarks/sparse_glu.py [--hidden 4096] [--neurons 14336] [--rounds 15]

Dense float32: PyTorch's `down(relu(gate x) * (up x))` (MKL), weights as they are. Dense int8: our own dense int8. Each
round runs every variant once, in turn; prints the median of the ratios in a round and their middle half.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from neuroweave.activations.neuron_functions import NeuronSegment
from neuroweave.diagnose.environment import describe_environment
from neuroweave.runtime.engine import Engine
from neuroweave.runtime.operations import Add, Glu, Linear, Place, Program, SparseGlu
from neuroweave.runtime.weights import pack

SHARES = (0.0, 0.5, 0.7, 0.9, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    C, M = options.hidden, options.neurons
    gate, up = torch.randn(M, C) / C**0.5, torch.randn(M, C) / C**0.5
    down = torch.randn(C, M) / M**0.5
    x = torch.randn(C)
    gates = gate @ x
    for format in ("float32", "int8"):
        packed = [pack(each, format) for each in (gate, up, down.T.contiguous(), down)]
        jobs = {"dense": dense_torch(x, gate, up, down) if format == "float32" else dense_runtime(x, packed)}
        for share in SHARES:
            jobs[f"{share:.0%} zeros"] = sparse_runtime(x, packed, share, gates)
        report(format, jobs, options)


def dense_torch(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Callable[[], object]:
    row = x[None]
    return lambda: F.linear(F.relu(F.linear(row, gate)) * F.linear(row, up), down)


def places(C: int, M: int) -> tuple[Place, Place, Place]:
    return Place("x", 0, C), Place("gated", 0, M), Place("y", 0, C)


def started(program: Program, x: torch.Tensor) -> Callable[[], object]:
    engine = Engine(program, positions=1 << 20)
    if engine.runner is None:
        raise SystemExit(f"this benchmark needs a C++ compiler: {engine.why_not}")
    engine.runner.buffers["x"].copy_(x)
    return lambda: engine.step(0)


def dense_runtime(x: torch.Tensor, packed: list) -> Callable[[], object]:
    C, M = packed[0].columns, packed[0].rows
    source, gated, out = places(C, M)
    relu = [NeuronSegment(0, M, (("relu", None),))]
    operations = [Glu(source, gated, packed[0], packed[1], relu), Linear(gated, out, packed[3])]
    return started(Program(operations, {"x": C, "gated": M, "y": C}, out, 1 << 20), x)


def sparse_runtime(x: torch.Tensor, packed: list, share: float, gates: torch.Tensor) -> Callable[[], object]:
    """The neurons with the smallest gates are dead, wherever they lie: |gate| at most their own threshold."""
    C, M = packed[0].columns, packed[0].rows
    source, _, out = places(C, M)
    dead = torch.full((M,), -1.0)
    dead[gates.abs().argsort()[: round(share * M)]] = 1e30
    identity = [NeuronSegment(0, M, (("identity", None),))]
    operations = [Add(out, out, 0.0), SparseGlu(source, out, *packed[:3], identity, dead)]
    return started(Program(operations, {"x": C, "y": C}, out, 1 << 20), x)


def report(format: str, jobs: dict[str, Callable[[], object]], options: argparse.Namespace) -> None:
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - began)
    machine = describe_environment()
    print(
        f"{format}, {options.hidden} x {options.neurons}, {machine.cpu}, {machine.threads} threads, "
        f"{datetime.date.today()}, {options.rounds} rounds; dense {statistics.median(seconds['dense']) * 1e3:.2f} ms"
    )
    for name in names[1:]:
        ratios = [d / s for d, s in zip(seconds["dense"], seconds[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = statistics.median(seconds[name]) * 1e3
        print(f"  {name}: {milliseconds:.2f} ms, {middle:.2f} times as fast as dense ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
