"""A convolution block of NeuroBLAST, forward and backward: the published two-dimensional form against three methods.

    python benchmarks/neuroblast_convolution.py                        # C 512, K 5, T 1280, dilation 8
    python benchmarks/neuroblast_convolution.py --sweep --forward      # which method for how many tokens
    python benchmarks/neuroblast_convolution.py --device cuda --dtype bfloat16 [--sweep]

A block is norm, convolution, gate or projection, norm, residual. All forms hold the same weights, and their outputs and
gradients are compared before they are timed. They run in turn; a cell is the median in milliseconds with its middle
half. oneDNN chooses other kernels on other processors: ONEDNN_MAX_CPU_ISA=AVX2 makes it choose those of AVX2.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from published_neuroblast import PublishedConvolution
from torch import Tensor, nn
from torch.nn import functional
from whole_process import print_rows

from neuroweave.diagnose.environment import describe_environment
from neuroweave.neuroblast.configuration import NeuroBlastConfig
from neuroweave.neuroblast.convolution import METHODS, CausalConvolution
from neuroweave.neuroblast.layer_plan import PlannedLayer
from neuroweave.neuroblast.modeling import NeuroBlastConvolutionLayer

SECONDS = 4.0  # about so long is spent on each form of a case
LEAST, MOST = 5, 200  # rounds
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, between forms
GOAL = 3.0


class MethodConvolution(nn.Module):
    """A convolution by one method of `METHODS`, whatever the length."""

    def __init__(self, convolution: CausalConvolution, method: str) -> None:
        super().__init__()
        self.weight, self.reach, self.dilation = convolution.weight, convolution.reach, convolution.dilation
        self.method = METHODS[method]

    def forward(self, x_BCS: Tensor, tokens: int, sequences_BT: Tensor | None = None) -> Tensor:
        return self.method(
            functional.pad(x_BCS, (tokens + self.reach - x_BCS.shape[-1], 0)), self.weight, self.dilation
        )


def make_blocks(
    channels: int, taps: int, scale: float, dilation: int, *, published: bool
) -> dict[str, NeuroBlastConvolutionLayer]:
    """The same block in every form."""
    config = NeuroBlastConfig(hidden_size=channels, kernel_size=taps, scale=scale)
    block = NeuroBlastConvolutionLayer(config, PlannedLayer(1, "sensory", 1, "conv", dilation=dilation))
    bound = (channels * taps * taps) ** -0.5
    nn.init.uniform_(block.conv.weight, -bound, bound)
    forms: dict[str, nn.Module] = {}
    if published:
        forms["published"] = PublishedConvolution(block.conv)
        forms["published, rows first"] = PublishedConvolution(block.conv, rows_first=True)
    forms |= {name: MethodConvolution(block.conv, name) for name in METHODS}
    blocks = {}
    for name, form in forms.items():
        blocks[name] = copy.deepcopy(block)
        blocks[name].conv = copy.deepcopy(form)
    return blocks


def make_runs(
    blocks: dict[str, NeuroBlastConvolutionLayer], batch: int, tokens: int, *, forward: bool, like: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """One pass of each block over the same input; returns what must agree: outputs, or gradients by the input."""
    channels = blocks["conv1d"].norm_in.weight.shape[0]
    torch.manual_seed(0)
    x_BTC = torch.randn(batch, tokens, channels).to(like)
    gradient_BTC = torch.randn(batch, tokens, channels).to(like)

    def run(block: NeuroBlastConvolutionLayer) -> Tensor:
        if forward:
            with torch.no_grad():
                return block(x_BTC)
        block.zero_grad(set_to_none=True)
        leaf = x_BTC.detach().requires_grad_()
        block(leaf).backward(gradient_BTC)
        assert leaf.grad is not None
        return leaf.grad

    return {name: functools.partial(run, block.to(like)) for name, block in blocks.items()}


def check_agreement(runs: dict[str, Callable[[], Tensor]], tolerance: float) -> None:
    expected = runs["conv1d"]().float()
    for name, run in runs.items():
        error = (run().float() - expected).norm() / expected.norm()
        assert error < tolerance, f"{name} differs from conv1d by {error:.1e}"


def time_in_turn(runs: dict[str, Callable[[], Tensor]], device: str) -> dict[str, list[float]]:
    """Milliseconds of every run; the forms take turns, in alternating order."""

    def milliseconds(run: Callable[[], Tensor]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    once = sum(milliseconds(run) for run in runs.values()) / len(runs)
    rounds = round(min(max(SECONDS * 1000 / once, LEAST), MOST))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in runs if number % 2 == 0 else reversed(runs):
            found[name].append(milliseconds(runs[name]))
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """theirs / ours, in pairs."""
    return [other / own for own, other in zip(ours, theirs, strict=True)]


def compare_forms(arguments: argparse.Namespace, like: Tensor) -> None:
    """All forms at one size, and how many times the published form takes."""
    rows, names = [], ["published", "published, rows first", *METHODS]
    for batch, threads in itertools.product(arguments.batches, arguments.threads):
        torch.set_num_threads(threads)
        for tokens in arguments.tokens or [1280]:
            blocks = make_blocks(arguments.channels, 5, 1.0, arguments.dilation, published=True)
            runs = make_runs(blocks, batch, tokens, forward=arguments.forward, like=like)
            check_agreement(runs, TOLERANCE[like.dtype])
            found = time_in_turn(runs, arguments.device)
            best = min(METHODS, key=lambda name: statistics.median(found[name]))
            times = [spread(ratio(found[best], found[name]), 2) for name in names[:2]]
            rows.append((str(batch), str(threads), str(tokens), *(spread(found[name]) for name in names), best, *times))
    header = ("batch", "threads", "T", *names, "fastest", "published / fastest", "rows first / fastest")
    print_rows(header, rows)
    print(f"\nGoal: published / fastest at least {GOAL}.")


def sweep(arguments: argparse.Namespace, like: Tensor) -> None:
    """The three methods for every length; the fastest is bold."""
    lengths = arguments.tokens or [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    for threads, batch, scale, taps in itertools.product(
        arguments.threads, arguments.batches, arguments.scales, arguments.kernels
    ):
        torch.set_num_threads(threads)
        what = "forward" if arguments.forward else "forward and backward"
        print(f"\n{what}, K {taps}, scale {scale:g}, batch {batch}, {threads} threads: milliseconds, median\n")
        rows = []
        for tokens in lengths:
            blocks = make_blocks(arguments.channels, taps, scale, arguments.dilation, published=False)
            runs = make_runs(blocks, batch, tokens, forward=arguments.forward, like=like)
            check_agreement(runs, TOLERANCE[like.dtype])
            found = {name: statistics.median(each) for name, each in time_in_turn(runs, arguments.device).items()}
            best = min(found.values())
            cells = (f"**{each:.2f}**" if each == best else f"{each:.2f}" for each in found.values())
            rows.append((str(tokens), *cells))
        print_rows(("T", *METHODS), rows)


def machine_line() -> str:
    environment = describe_environment()
    kernels = os.environ.get("ONEDNN_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability())
    name = environment.accelerator if environment.accelerator != "none" else environment.cpu
    load = os.getloadavg()[0]
    return (
        f"{name}, {environment.cores} cores, kernels for {kernels}, torch {torch.__version__}, load {load:.1f}, "
        f"{environment.date[:10]}"
    )


def main() -> None:
    global SECONDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="the three methods over lengths, kernels and scales")
    parser.add_argument("--forward", action="store_true", help="the forward pass alone, without gradients")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", help="1280; in a sweep 1 to 4096")
    parser.add_argument("--kernels", type=int, nargs="+", default=[5], help="of a sweep")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="of a sweep")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--dilation", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each form of a case, about")
    arguments = parser.parse_args()
    SECONDS = arguments.seconds
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: PyTorch finds no GPU")
        arguments.threads = arguments.threads[:1]
    print(machine_line(), flush=True)
    like = torch.empty(0, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    (sweep if arguments.sweep else compare_forms)(arguments, like)


if __name__ == "__main__":
    main()
