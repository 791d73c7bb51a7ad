"""What a patched activation costs in time: original and patched model in turn, eager and compiled.

    python benchmarks/patch_overhead.py [--model embedded:smollm2] [--recipes silu-tanh-mlp ...] [--runs 30]

Prints the median of the pairwise ratios patched / original with the middle half of them, for a prompt of 256 tokens and
for one decoding step with a static cache. Both models are in memory; A and B run in turn, so drift hits both alike.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, StaticCache

import neuroweave
from neuroweave.checkpoint import import_checkpoint
from neuroweave.checkpoint.loading import load_model
from neuroweave.diagnose.environment import describe_environment

PROMPT, ROOM = 256, 128  # tokens read; further places in the cache, more than there are timed steps


def prompt_pass(model: PreTrainedModel, compiled: bool) -> Callable[[], None]:
    forward = torch.compile(model, dynamic=False) if compiled else model
    tokens = torch.arange(PROMPT)[None] + 100
    return lambda: forward(input_ids=tokens, use_cache=False)


def decode_step(model: PreTrainedModel, compiled: bool) -> Callable[[], None]:
    forward = torch.compile(model, dynamic=False) if compiled else model
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + ROOM)
    model(input_ids=torch.arange(PROMPT)[None] + 100, past_key_values=cache)
    token = torch.tensor([[100]])
    return lambda: forward(input_ids=token, past_key_values=cache)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(one: Callable[[], None], other: Callable[[], None], runs: int) -> tuple[list[float], float]:
    """Pairwise ratios other / one in alternating order, and the median seconds of `one`."""
    for _ in range(3):
        one()
        other()
    found, base = [], []
    for turn in range(runs):
        pair = [seconds(one), seconds(other)] if turn % 2 == 0 else [seconds(other), seconds(one)][::-1]
        base.append(pair[0])
        found.append(pair[1] / pair[0])
    return found, statistics.median(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2")
    parser.add_argument("--recipes", nargs="+", default=["silu-tanh-mlp", "automixed-relu-silu", "phantom-mlp"])
    parser.add_argument("--runs", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.runs + 3 > ROOM:
        parser.error(f"--runs is at most {ROOM - 3}")
    environment = describe_environment()
    print(f"{environment.cpu}, {environment.threads} threads, torch {torch.__version__}, {datetime.date.today()}")
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(scratch) / "model"
        import_checkpoint(arguments.model, folder)
        print("| recipe | what | mode | original | patched / original, median | middle half |")
        print("|---|---|---|---|---|---|")
        for recipe in arguments.recipes:
            for what, make in (("prompt of 256", prompt_pass), ("decode step", decode_step)):
                for mode in ("eager", "compiled"):
                    torch.compiler.reset()
                    original, patched = load_model(folder)[0], load_model(folder)[0]
                    neuroweave.patch(patched, recipe)
                    one, other = make(original, mode == "compiled"), make(patched, mode == "compiled")
                    found, base = ratios(one, other, arguments.runs)
                    low, middle, high = statistics.quantiles(found, n=4)
                    cells = (recipe, what, mode, f"{1000 * base:.1f} ms", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
