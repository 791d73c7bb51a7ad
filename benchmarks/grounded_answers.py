"""Does a small model answer from Python's documentation what it does not know by itself?

    apt-get download python3.11-doc && dpkg -x python3.11-doc*.deb docs
    python benchmarks/grounded_answers.py MODEL docs/usr/share/doc/python3.11/html [--split held-out] [--new 96]

Each question (benchmarks/data/python_docs_questions.json) is asked twice, greedy, in the fast runtime: with what the
local search finds, and without. An answer has the expected fact if seven in ten of its words are in the answer, in any
order; "word for word" if the fact stands in it. A second count leaves out words that are in the question already.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

from search_python_docs import QUESTIONS, plain

from neuroweave.chat.citations import content_words
from neuroweave.chat.grounding import Grounding, passages_for
from neuroweave.chat.search import LocalFolder
from neuroweave.chat.session import Session
from neuroweave.diagnose.environment import describe_environment
from neuroweave.runtime.fast_writing import FastWriter

SHARE = 0.7


def judged(answer: str, question: str, fact: str) -> dict[str, bool]:
    said, wanted = set(content_words(answer)), set(content_words(fact))
    new = wanted - set(content_words(question))
    return {
        "fact": len(wanted & said) >= SHARE * len(wanted),
        "fact beyond the question": len(new & said) >= SHARE * len(new) if new else False,
        "word for word": plain(fact).casefold() in plain(answer).casefold(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="held-out", choices=["held-out", "development"])
    parser.add_argument("--passages", type=int)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--show", action="store_true", help="print each answer")
    options = parser.parse_args()
    writer: Any = FastWriter.load(options.model, weights=options.weights)
    provider = LocalFolder(options.folder)
    provider.refresh()
    most = options.passages or passages_for(writer.parameters())
    questions = [each for each in json.loads(QUESTIONS.read_text()) if each["split"] == options.split]
    groundings = {"alone": None, "grounded": Grounding(provider, most)}
    counts: dict[str, dict[str, int]] = {name: {} for name in groundings}
    facts = {"page found": 0, "cited": 0, "nothing found": 0}
    began = time.perf_counter()
    for each in questions:
        for name, grounding in groundings.items():
            session = Session(writer, grounding, None, {"do_sample": False}, options.new)
            turn = session.ask(each["question"], seed=0, show=lambda text: None)
            for kind, found in judged(turn.text, each["question"], each["fact"]).items():
                counts[name][kind] = counts[name].get(kind, 0) + found
            if grounding is not None:
                facts["page found"] += any(passage.address in each["pages"] for passage in turn.passages)
                facts["cited"] += bool(turn.cited)
                facts["nothing found"] += not turn.passages
            if options.show:
                print(f"--- {name}: {each['question']}\n{turn.text}\n[{each['fact']}]")
    machine = describe_environment()
    print(
        f"{machine.cpu}, {datetime.date.today()}; {options.model}, {len(questions)} {options.split} questions, {most} "
        f"passage(s), {options.new} new tokens, {time.perf_counter() - began:.0f} s\n"
    )
    print("| answer has | alone | grounded |\n|---|---|---|")
    for kind in counts["alone"]:
        print(f"| {kind} | {counts['alone'][kind]} | {counts['grounded'][kind]} |")
    print("\n" + ", ".join(f"{name} {count}" for name, count in facts.items()))


if __name__ == "__main__":
    main()
