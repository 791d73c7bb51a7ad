"""The local search on Python's own documentation: how fast, and does it find the page that has the answer?

    apt-get download python3.11-doc && dpkg -x python3.11-doc*.deb docs
    python benchmarks/search_python_docs.py docs/usr/share/doc/python3.11/html [--misses | --extractors]

The questions (benchmarks/data/python_docs_questions.json) were written from randomly drawn passages, before there was
an engine to ask. Weights were chosen on the half called development; the other half was held out. `fact`: the expected
words stand in the text of the first five sources, as a model would read them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from whole_process import print_rows

from neuroweave.chat.search import LocalFolder, Source
from neuroweave.chat.search.index_file import index_place

QUESTIONS = Path(__file__).parent / "data" / "python_docs_questions.json"
COUNT = 10


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\u2019", "'").replace("\u2018", "'"))


def measured(name: str, questions: list[dict[str, Any]], answers: dict[str, list[Source]]) -> list[str]:
    """A row: how many questions, recall@1 and @5, MRR@10, and in how many the fact is in the first five sources."""
    ranks, facts = [], 0
    for each in questions:
        sources = answers[each["question"]]
        places = [at for at, source in enumerate(sources, start=1) if source.address in each["pages"]]
        ranks.append(places[0] if places else 0)
        facts += any(plain(each["fact"]) in plain(source.text) for source in sources[:5])
    count = len(ranks)
    found = [sum(0 < rank <= most for rank in ranks) / count for most in (1, 5)]
    reciprocal = sum(1 / rank for rank in ranks if rank) / count
    return [name, str(count), *(f"{share:.3f}" for share in found), f"{reciprocal:.3f}", f"{facts / count:.3f}"]


def seconds(action: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def extractors(docs: Path) -> None:
    """How long resiliparse and trafilatura take for a page, both asked to keep headings."""
    import trafilatura
    from resiliparse.extract.html2text import extract_plain_text

    ways = {
        "resiliparse": lambda page: extract_plain_text(page, main_content=True, preserve_formatting="minimal_html"),
        "trafilatura": lambda page: trafilatura.extract(page, output_format="markdown", include_formatting=True) or "",
    }
    pages = [file.read_text(encoding="utf-8") for file in sorted(docs.rglob("*.html")) if "genindex" not in file.name]
    rows = []
    for name, extract in ways.items():
        times = sorted(1000 * seconds(lambda page=page, extract=extract: extract(page))[0] for page in pages[::5])
        mean, median = statistics.mean(times), statistics.median(times)
        rows.append([name, f"{mean:.1f}", f"{median:.1f}", f"{times[-1]:.0f}"])
    print_rows([f"every fifth of {len(pages)} pages", "mean ms", "median ms", "slowest ms"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("docs", type=Path, help="the folder html of the package python3.11-doc")
    parser.add_argument("--misses", action="store_true", help="list questions whose page is not in the first five")
    parser.add_argument("--extractors", action="store_true", help="compare two extractors instead (needs trafilatura)")
    arguments = parser.parse_args()
    if arguments.extractors:
        return extractors(arguments.docs)
    questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "html"
        shutil.copytree(arguments.docs, folder, symlinks=True, ignore=shutil.ignore_patterns(".neuroweave*"))
        search = LocalFolder(folder)
        built, done = seconds(search.refresh)
        size = index_place(folder).stat().st_size / 1e6
        print(f"built in {built:.1f} s: {done.documents} documents, {done.passages} passages, {size:.1f} MB")
        for problem in done.problems:
            print(f"  {problem.path}: {problem.reason}")
        print(f"refreshed with nothing changed in {seconds(search.refresh)[0]:.3f} s")
        changed = folder / "library" / "os.html"
        changed.write_text(changed.read_text(encoding="utf-8").replace("</h1>", " zanzibar</h1>", 1), encoding="utf-8")
        print(f"refreshed after one changed file (os.html, the largest) in {seconds(search.refresh)[0]:.3f} s")
        assert search.search("zanzibar", count=1)[0].address == "library/os.html"
        times, answers = [], {}
        for each in questions:
            took, answers[each["question"]] = seconds(lambda each=each: search.search(each["question"], count=COUNT))
            times.append(1000 * took)
        ordered = sorted(times)
        print(
            f"{len(times)} queries: median {statistics.median(times):.1f} ms, 95 % under "
            f"{ordered[int(0.95 * len(ordered))]:.1f} ms, the slowest {ordered[-1]:.1f} ms"
        )
    halves = {name: [each for each in questions if each["split"] == name] for name in ("development", "held-out")}
    rows = [measured(name, half, answers) for name, half in {**halves, "all": questions}.items()]
    print_rows(["questions", "count", "recall@1", "recall@5", "MRR@10", "fact in 5"], rows)
    if arguments.misses:
        for each in questions:
            if not {source.address for source in answers[each["question"]][:5]} & set(each["pages"]):
                print(f"missed: {each['question']} ({', '.join(each['pages'])})")


if __name__ == "__main__":
    main()
