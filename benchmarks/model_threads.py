"""What it costs that a model has been run on one thread and writes on another, against one thread for all.

    python benchmarks/model_threads.py MODEL [--rounds 5] [--new 96]

Each round starts two processes, in turn: in one the main thread loads the model and runs it once, and the server's
model thread writes; in the other that thread does all. Prints tokens/s of both, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
import threading
import time

import torch

KINDS = ("two threads", "one thread")


def write(model: str, kind: str, new: int) -> float:
    """Tokens per second of one greedy text."""
    from neuroweave.runtime.batching import Batcher, Job
    from neuroweave.runtime.model_thread import ModelThread
    from neuroweave.runtime.writing import Writer

    thread = ModelThread()
    writer = Writer.load(model) if kind == "two threads" else thread.run(lambda: Writer.load(model)).result()
    ids, _ = writer.encode("Tell me a story.")
    if kind == "two threads":
        with torch.inference_mode():
            writer.model(torch.tensor([ids]))
    batcher = Batcher(writer.model, thread=thread)
    times: list[float] = []
    done = threading.Event()

    def tell(token: object) -> None:
        times.append(time.perf_counter())
        if len(times) == 2 * new:
            done.set()

    batcher.submit(Job(list(ids), 2 * new, frozenset(), lambda text, logits: int(logits.argmax()), tell))
    done.wait()
    return new / (times[-1] - times[-1 - new])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(write(options.model, options.kind, options.new))
        return
    from neuroweave.diagnose.environment import describe_environment

    machine = describe_environment()
    print(f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads, {datetime.date.today()}; {options.model}")
    pairs = []
    for number in range(options.rounds):
        found = {}
        for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
            command = [sys.executable, __file__, options.model, "--kind", kind, "--new", str(options.new)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[kind] = float(printed)
        pairs.append(found["one thread"] / found["two threads"])
        print(", ".join(f"{kind} {found[kind]:.1f} tokens/s" for kind in KINDS), flush=True)
    print(f"ratio {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})")


if __name__ == "__main__":
    main()
