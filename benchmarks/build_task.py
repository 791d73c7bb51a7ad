"""Build the questions of the shipped task `neuroweave_continuation`, or check that they are what this program builds.

    python benchmarks/build_task.py            # a second; writes src/neuroweave/diagnose/tasks/
    python benchmarks/build_task.py --check

A question is a passage of the shipped evaluation text, broken off inside a sentence, and four ends for it: the real one
and three ends of other sentences of the same work, as many words and nearly as many characters. Every document gives
the same number of questions. There is no random number: whatever is chosen has the smallest SHA-256, so that the bytes
are the same everywhere. Questions are in the order of their hashes, so the first n of them are a fair sample.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from neuroweave.text import Document, documents
from neuroweave.text.passages import BLANK_LINE, SENTENCE_END

TARGET = Path(__file__).resolve().parents[1] / "src" / "neuroweave" / "diagnose" / "tasks" / "continuation.jsonl"
PER_DOCUMENT = 7  # questions; 29 documents
CHOICES = 4
END = 6  # words
SHORTEST, LONGEST = 16, 40  # words of a passage
CLOSE = 3  # characters that the ends of a question may differ in length, where there are enough
LARGEST = 150_000  # bytes
# Quotation marks, brackets, dashes and figures would give an end away, or make nonsense of it in another place.
ODD = re.compile(r'["\u201c\u201d()\d;:]|--')


@dataclass(frozen=True)
class Sentence:
    """One sentence of a paragraph, single spaces between its words."""

    work: str
    document: Document
    paragraph: int
    number: int
    words: tuple[str, ...]

    @property
    def end(self) -> str:
        return " ".join(self.words[-END:])

    @property
    def usable(self) -> bool:
        """Whether its end can be that of a question: part of a longer sentence, and nothing odd in it."""
        return len(self.words) >= END + 4 and not ODD.search(self.end) and self.end.endswith((".", "!", "?"))


@dataclass(frozen=True)
class Question:
    """The passage is the sentences before `last`, and `last` without its end."""

    last: Sentence
    before: tuple[Sentence, ...]

    @property
    def passage(self) -> str:
        words = [word for sentence in self.before for word in sentence.words]
        return " ".join([*words, *self.last.words[:-END]])

    @property
    def numbers(self) -> set[tuple[int, int]]:
        return {(sentence.paragraph, sentence.number) for sentence in (*self.before, self.last)}


def order(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def sentences(document: Document) -> list[list[Sentence]]:
    """The sentences of each paragraph. All addresses of a president are one work."""
    work = document.author if document.title.startswith("State of the Union") else document.title
    paragraphs = []
    for at, paragraph in enumerate(BLANK_LINE.split(document.text)):
        places = [0, *(match.end() for match in SENTENCE_END.finditer(paragraph)), len(paragraph)]
        texts = [paragraph[start:stop].split() for start, stop in pairwise(places)]
        paragraphs.append([Sentence(work, document, at, number, tuple(text)) for number, text in enumerate(texts)])
    return paragraphs


def candidates(paragraph: list[Sentence]) -> Iterator[Question]:
    """A question for every sentence whose passage, from the start of a sentence on, has a fitting length."""
    for at, last in enumerate(paragraph):
        if not last.usable:
            continue
        for first in range(at, -1, -1):
            question = Question(last, tuple(paragraph[first:at]))
            length = len(question.passage.split())
            if length >= SHORTEST:
                if length <= LONGEST:
                    yield question
                break


def choose(paragraphs: list[list[Sentence]]) -> list[Question]:
    """`PER_DOCUMENT` questions of one document that share no sentence."""
    found = [question for paragraph in paragraphs for question in candidates(paragraph)]
    chosen: list[Question] = []
    taken: set[tuple[int, int]] = set()
    for question in sorted(found, key=lambda question: order(question.passage, question.last.end)):
        if len(chosen) < PER_DOCUMENT and not question.numbers & taken:
            chosen.append(question)
            taken |= question.numbers
    return chosen


def wrong_ends(question: Question, others: list[Sentence]) -> list[str]:
    """Ends of other sentences of the work: of nearly the same length, then by their hashes."""
    own = {(question.last.document.name, *number) for number in question.numbers}
    right = question.last.end
    pool = {
        sentence.end
        for sentence in others
        if sentence.usable and (sentence.document.name, sentence.paragraph, sentence.number) not in own
    } - {right}
    passage = question.passage

    def preference(end: str) -> tuple[int, str]:
        return max(abs(len(end) - len(right)) - CLOSE, 0), order(passage, end)

    return sorted(pool, key=preference)[: CHOICES - 1]


def build() -> bytes:
    """The questions as JSON Lines, UTF-8."""
    cut = [sentences(document) for document in documents("evaluation")]
    works: dict[str, list[Sentence]] = defaultdict(list)
    for sentence in (sentence for paragraphs in cut for paragraph in paragraphs for sentence in paragraph):
        works[sentence.work].append(sentence)
    questions = [question for paragraphs in cut for question in choose(paragraphs)]
    lines = []
    for number, question in enumerate(sorted(questions, key=lambda question: order("question", question.passage))):
        label = number % CHOICES  # each place is the right one equally often
        ends = wrong_ends(question, works[question.last.work])
        ends.insert(label, question.last.end)
        record = {
            "document": question.last.document.name,
            "passage": question.passage,
            "ends": ends,
            "label": label,
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the shipped questions and write nothing")
    arguments = parser.parse_args()
    content = build()
    if arguments.check:
        same = TARGET.is_file() and TARGET.read_bytes() == content
        print(f"{TARGET.name}: {'as built here' if same else 'not what is built here'}")
        sys.exit(0 if same else 1)
    if len(content) > LARGEST:
        sys.exit(f"{len(content)} bytes; the package takes {LARGEST} at most")
    TARGET.write_bytes(content)
    print(f"{TARGET.name}: {len(content.splitlines())} questions, {len(content)} bytes")


if __name__ == "__main__":
    main()
