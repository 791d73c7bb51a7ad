"""Time and memory of act(gate) * up, forward and backward: PyTorch, torch.compile, and fused.

    python benchmarks/fused_glu.py [--rows 512] [--neurons 14336] [--members silu gelu relu tanh] [--rounds 40]

Forms take turns in one process, in another order each round; each runs once before it is timed, so that it finds the
memory in the state in which it leaves it. Wall time and processor time (of all threads) in milliseconds: median, middle
half in brackets; ratios are taken round by round. Bytes kept for the backward pass are those of distinct tensors that
autograd saves, of which gate and up alone are `2 * rows * neurons * 4`: what Liger's SwiGLU keeps.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from neuroweave.activations.fused_glu import fused_glu, plain_glu
from neuroweave.activations.mixtures import build_activation

Form = Callable[[Tensor, Tensor], Tensor]
BASELINE, MIXTURE = "silu, compiled", "mixture, fused"
LIMIT_SECONDS = 600


def forms(members: list[str], neurons: int, compiled_mixture: bool) -> dict[str, tuple[Form, list[Tensor]]]:
    """Name -> (function of gate and up, what it learns)."""
    silu = build_activation("silu")
    mixture = build_activation({"mixture": {"members": members, "neutral": 0, "start_logit": 1.0}}, neurons=neurons)
    nn.init.normal_(mixture.gating_logits)
    learned = list(mixture.parameters())
    found: dict[str, tuple[Form, list[Tensor]]] = {
        "silu, eager": (lambda gate, up: plain_glu(gate, up, silu), []),
        BASELINE: (torch.compile(lambda gate, up: nn.functional.silu(gate) * up), []),
        "silu, fused": (lambda gate, up: fused_glu(gate, up, silu), []),
        "mixture, eager": (lambda gate, up: plain_glu(gate, up, mixture), learned),
        MIXTURE: (lambda gate, up: fused_glu(gate, up, mixture), learned),
    }
    if compiled_mixture:
        found["mixture, compiled"] = (torch.compile(lambda gate, up: mixture(gate) * up), learned)
    return found


def kept_bytes(form: Form, gate: Tensor, up: Tensor) -> int:
    """Of the distinct tensors that autograd keeps."""
    kept: dict[tuple[int, int], Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr(), tensor.numel()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        form(gate, up)
    return sum(each.nbytes for each in kept.values())


def timed(step: Callable[[], object]) -> tuple[float, float, int]:
    """Wall time, processor time in milliseconds, pages that were touched for the first time."""
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, processor = time.perf_counter(), time.process_time()
    made = step()
    found = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)
    del made
    return *found, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages


def cell(values: np.ndarray, digits: int) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--members", nargs="+", default=["silu", "gelu", "relu", "tanh"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, help="PyTorch's own number by default")
    parser.add_argument("--compiled-mixture", action="store_true", help="the mixture under torch.compile as well")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = (arguments.rows, arguments.neurons)
    gate, up, dout = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True), torch.randn(shape)
    candidates = forms(arguments.members, arguments.neurons, arguments.compiled_mixture)

    def step(name: str) -> object:
        form, learned = candidates[name]
        y = form(gate, up)
        return y, torch.autograd.grad(y, (gate, up, *learned), dout)

    for name in candidates:
        step(name)
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in candidates}
    order, started = random.Random(0), time.monotonic()
    for _ in range(arguments.rounds):
        for name in order.sample(list(candidates), len(candidates)):
            step(name)
            found[name].append(timed(lambda name=name: step(name)))
        if time.monotonic() - started > LIMIT_SECONDS:
            break
    table = {name: np.array(rows) for name, rows in found.items()}
    kept = {name: kept_bytes(form, gate, up) for name, (form, _) in candidates.items()}
    print_table(table, kept, 2 * gate.nbytes, f"{list(shape)} float32, {torch.get_num_threads()} threads")


def print_table(table: dict[str, np.ndarray], kept: dict[str, int], liger: int, head: str) -> None:
    rounds = len(table[BASELINE])
    print(f"{head}, {rounds} rounds, torch {torch.__version__}; ratios to `{BASELINE}`\n")
    print("| form | wall ms | ratio | processor ms | ratio | new pages | kept for backward, MB | of gate and up |")
    print("|---|---|---|---|---|---|---|---|")
    base = table[BASELINE]
    for name, rows in table.items():
        wall, processor = rows[:, 0], rows[:, 1]
        cells = [cell(wall, 1), cell(wall / base[:, 0], 2), cell(processor, 1), cell(processor / base[:, 1], 2)]
        cells += [f"{np.median(rows[:, 2]):.0f}", f"{kept[name] / 1e6:.1f}", f"{kept[name] / liger:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    eager, fused = table["mixture, eager"], table[MIXTURE]
    print(f"\nmixture, eager / fused: wall {cell(eager[:, 0] / fused[:, 0], 2)}, kept ", end="")
    print(f"{kept['mixture, eager'] / kept[MIXTURE]:.2f}")


if __name__ == "__main__":
    main()
