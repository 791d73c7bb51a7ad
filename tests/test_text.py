"""Text: the shipped splits are what the manifest says and share nothing; a user's files are cut, or refused clearly."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from neuroweave.text import SPLITS, Document, documents, read_documents
from neuroweave.text.passages import BLANK_LINE, PASSAGE, SENTENCE_END, SPACE, cut

ROOT = Path(__file__).parents[1]
PROSE = files("neuroweave.text") / "prose"
MANIFEST = json.loads((PROSE / "sources.json").read_text(encoding="utf-8"))


def ngrams(text: str, length: int = 13) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def group(document: Document) -> str:
    """What must be in one split: a novel, or a president."""
    return document.author if document.title.startswith("State of the Union") else document.title


# --- the shipped corpus ---


def test_sizes() -> None:
    size = {split: sum(len(d.text.encode()) for d in documents(split)) for split in SPLITS}
    assert 230_000 < size["evaluation"] < 270_000
    assert 280_000 < size["calibration"] < 320_000
    assert 950_000 < sum(size.values()) < 1_050_000
    assert all(len(documents(split)) >= 20 for split in SPLITS)


def test_documents_are_chapter_sized_and_know_their_work() -> None:
    for split in SPLITS:
        for document in documents(split):
            assert 800 <= len(document.text.split()) <= 3_000, document.name
            assert document.split == split
            assert all((document.title, document.author, document.source, document.licence))


def test_no_group_is_in_two_splits() -> None:
    groups = {split: {group(document) for document in documents(split)} for split in SPLITS}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 50


def test_the_split_follows_the_recorded_rule() -> None:
    """Groups of a collection, sorted by the SHA-256 of their names, dealt in turn."""
    split_of = {group(document): split for split in SPLITS for document in documents(split)}
    presidents = {d.author for s in SPLITS for d in documents(s) if d.title.startswith("State of the Union")}
    for collection in (presidents, split_of.keys() - presidents):
        dealt = sorted(collection, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        turns = ["evaluation", "calibration", "training", "training"]
        assert [split_of[name] for name in dealt] == [turns[i % 4] for i in range(len(dealt))]
    assert "dealt in turn to evaluation, calibration, training, training" in MANIFEST["rule"]


def test_splits_share_no_more_than_a_formula() -> None:
    grams = {split: [ngrams(d.text) for d in documents(split)] for split in SPLITS}
    for split in SPLITS:
        others = set().union(*(gram for other in SPLITS if other != split for gram in grams[other]))
        for document, gram in zip(documents(split), grams[split], strict=True):
            assert len(gram & others) <= 0.002 * len(gram), f"{document.name} repeats text of another split"
    everything = Counter(gram for split in SPLITS for passage in grams[split] for gram in passage)
    assert sum(count - 1 for count in everything.values()) <= 0.001 * len(everything)


def test_running_text_without_boilerplate() -> None:
    for document in (d for split in SPLITS for d in documents(split)):
        assert not re.search(r"Gutenberg|&[a-z]+;|[_*\x00-\x09\x0b-\x1f]|\(Applause|\[Laughter", document.text)
        assert not re.search(r"^(chapter|volume)\b.{0,12}$|^finis$|^the end$", document.text, re.M | re.I)
        assert document.text == document.text.rstrip() + "\n"


def test_manifest_records_every_file_and_nothing_else() -> None:
    recorded = {f"{entry['split']}/{entry['name']}.txt": entry for entry in MANIFEST["documents"]}
    present = {
        f"{folder.name}/{file.name}" for folder in PROSE.iterdir() if folder.is_dir() for file in folder.iterdir()
    }
    assert recorded.keys() == present
    for name, entry in recorded.items():
        content = (PROSE / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert entry["source"] in MANIFEST["packages"]
        assert isinstance(entry["year"], int)


def test_edited_document_is_refused(tmp_path: Path) -> None:
    entry = next(entry for entry in MANIFEST["documents"] if entry["split"] == "evaluation")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "sources.json").write_text(json.dumps({"documents": [entry]}))
    copy = tmp_path / "evaluation" / f"{entry['name']}.txt"
    with pytest.raises(ValueError, match="in the manifest, but not there"):
        documents("evaluation", folder=tmp_path)
    content = (PROSE / "evaluation" / copy.name).read_bytes()
    copy.write_bytes(content)
    assert [d.name for d in documents("evaluation", folder=tmp_path)] == [entry["name"]]
    copy.write_bytes(content + b"!")
    with pytest.raises(ValueError, match="not the bytes that the manifest records"):
        documents("evaluation", folder=tmp_path)
    with pytest.raises(ValueError, match=r"no sources.json in this folder"):
        documents("evaluation", folder=tmp_path / "evaluation")


def test_unknown_split_names_the_splits() -> None:
    with pytest.raises(ValueError, match="'test' is not known; choose from calibration, training, evaluation"):
        documents("test")


def test_importing_text_is_light() -> None:
    code = "import sys, neuroweave.text; assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "build" / "corpus").is_dir(), reason="run benchmarks/build_corpus.py --check first")
def test_the_shipped_corpus_is_what_the_script_builds() -> None:
    """Needs the packages that the script keeps in build/corpus."""
    subprocess.run([sys.executable, ROOT / "benchmarks" / "build_corpus.py", "--check"], check=True)


# --- cutting ---


@pytest.mark.parametrize("joint", ["\n\n", " ", "\n", ""])
def test_cut_keeps_everything_and_evens_out(joint: str) -> None:
    sentences = [f"Sentence number {i} was said by Mr. Darcy, who did not mind." for i in range(700)]
    passages = cut(joint.join(sentences))
    assert re.sub(r"\s", "", "".join(passages)) == re.sub(r"\s", "", "".join(sentences))
    assert len(passages) == round(len(joint.join(sentences)) / PASSAGE)
    assert all(PASSAGE / 2 < len(passage) < 2 * PASSAGE for passage in passages)
    if joint:
        assert all(passage.startswith("Sentence") and passage.endswith("mind.") for passage in passages)


def test_cut_prefers_a_blank_line_and_keeps_closing_quotes() -> None:
    spoken = '"So be it," he said. "Go on." ' * 60
    assert all(p.endswith(("said.", '"Go on."')) for p in cut(spoken, size=300))
    text = "\n\n".join([spoken.strip()] * 5)
    assert cut(text, size=1_700) == [spoken.strip()] * 5


def test_cut_short_and_empty() -> None:
    assert cut(" \n ") == []
    assert cut("  One line. ") == ["One line."]
    assert cut("x" * 30, size=10) == ["x" * 10] * 3


def test_cuts_are_those_of_a_search_through_the_whole_text() -> None:
    """Places are looked for around each cut only; the reference looks at all places of the whole text."""
    draw, pieces = (
        random.Random(0),
        ["a", "bc ", ".", ". A", "\n", "\n\n", " \t", "Mr. ", '!"', "x" * 9, "\n \n\n", "é", "' "],
    )
    for _ in range(200):
        text = "".join(draw.choices(pieces, weights=[draw.random() ** 4 for _ in pieces], k=100)).strip()
        size = draw.choice([7, 50, 123])
        parts = max(1, round(len(text) / size)) if text else 0
        passages, start = [], 0
        for ideal in (len(text) / parts * part for part in range(1, parts)):
            near = [
                [span for match in kind.finditer(text) if abs((span := match.span(kind.groups))[0] - ideal) <= reach]
                for kind in (BLANK_LINE, SENTENCE_END, SPACE)
                for reach in [len(text) / parts / 4]
            ]
            spans = next((found for found in near if found), [(round(ideal), round(ideal))])
            end, following = min(spans, key=lambda span: abs(span[0] - ideal))
            passages.append(text[start:end])
            start = following
        assert cut(text, size=size) == ([*passages, text[start:]] if parts else [])


def test_spaces_around_a_cut_are_lost_however_many() -> None:
    assert cut("x" * 2_900 + " " * 1_500 + "y" * 1_600, size=3_000) == ["x" * 2_900, "y" * 1_600]


# --- a user's files ---


def test_read_documents(tmp_path: Path) -> None:
    long = "\n\n".join(f"Paragraph {i} says little, but it says it in good order." for i in range(700))
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + long.replace("\n", "\r\n").encode())
    (tmp_path / "deep" / "a.MD").write_text("Grüße, 你好.", encoding="utf-8")
    (tmp_path / "ignored.csv").write_text("1,2")
    (tmp_path / ".hidden.txt").write_text("no")
    found = read_documents([tmp_path, tmp_path / "b.txt"])
    assert [d.name for d in found] == ["b.txt#1", "b.txt#2", "b.txt#3", "b.txt#4", "b.txt#5", "a.MD#1"]
    assert "\n\n".join(d.text for d in found[:5]) == long
    assert found[-1].text == "Grüße, 你好."
    assert {(d.split, d.author, d.licence) for d in found} == {("user", "", "")}


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    assert [d.name for d in read_documents(tmp_path)] == ["x/a.txt#1", "y/a.txt#1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.txt: empty; give a file that has text in it"),
        (b" \n\t\n", r"a\.txt: empty"),
        (b"GGUF\0\0", r"a\.txt: a binary file \(it holds NUL bytes\); give plain text, saved as UTF-8"),
        (b"caf\xe9 au lait", r"a\.txt: not UTF-8 text \(byte 3 is 0xe9\); save it as UTF-8"),
    ],
)
def test_unusable_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents([tmp_path])


def test_missing_path_and_folder_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent: no such file or folder; give a text file, or a folder"):
        read_documents(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no \.txt or \.md file in this folder"):
        read_documents([tmp_path])
    with pytest.raises(ValueError, match="no text was given"):
        read_documents([])
