"""How long a chat waits for the first token of each turn, with and without what was read being kept.

    python benchmarks/prefix_cache.py MODEL [--turns 6] [--rounds 3] [--new 48] [--fast] [--weights int8]

Each turn asks about a passage of prose and gets a greedy answer; both writers read the same prompt, in turn. Prints the
medians by turn, and whether both wrote the same tokens.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from dataclasses import dataclass, field

from neuroweave.chat.session import Session
from neuroweave.diagnose.environment import describe_environment
from neuroweave.runtime.fast_writing import FastWriter
from neuroweave.runtime.prefix_cache import shared
from neuroweave.runtime.writing import Writer
from neuroweave.text.documents import documents

WORDS = 120  # of the passage that a turn asks about


@dataclass
class Measured:
    """A turn: its prompt, and what each round and kind of writer made of it."""

    prompt: list[int] = field(default_factory=list)
    written: list[list[int]] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"whole": [], "kept": []})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--weights", default="float32")
    options = parser.parse_args()
    if options.fast:
        writer = FastWriter.load(options.model, weights=options.weights)
    else:
        writer = Writer.load(options.model, dtype="float32")
    machine = describe_environment()
    print(f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads, {datetime.date.today()}; {writer.how}")
    words = documents("evaluation")[0].text.split()
    questions = [
        f"Here is a passage: {' '.join(words[at * WORDS : (at + 1) * WORDS])} What is it about?"
        for at in range(options.turns)
    ]
    turns = [Measured() for _ in questions]
    for number in range(options.rounds):
        chat = Session(writer, None, None, {"do_sample": False}, options.new)
        kinds = [("whole", writer), ("kept", writer.remembering())]
        for turn, (question, measured) in enumerate(zip(questions, turns, strict=True)):
            measured.prompt, _ = chat.prepare(question)
            config = writer.settings(chat.chosen, options.new, chat=True)
            for kind, each in kinds if (turn + number) % 2 == 0 else kinds[::-1]:
                written = each.write(measured.prompt, config, seed=0, show=str)
                measured.seconds[kind].append(written.prefill_seconds)
                measured.written.append(written.token_ids)
            chat.messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": written.text.strip()},
            ]
    before: list[int] = []
    for turn, measured in enumerate(turns):
        whole, kept = (statistics.median(measured.seconds[kind]) for kind in ("whole", "kept"))
        same = all(each == measured.written[0] for each in measured.written)
        known = shared(before, measured.prompt)
        print(
            f"turn {turn + 1}: {len(measured.prompt):5} tokens, {known:5} known; first token after {whole:.2f} s, "
            f"{kept:.2f} s with them kept ({whole / kept:.1f} times); same tokens: {same}"
        )
        before = [*measured.prompt, *measured.written[0][:-1]]


if __name__ == "__main__":
    main()
