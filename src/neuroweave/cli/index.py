"""`neuroweave index`: build or refresh the index of a folder of documents."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from neuroweave.cli.console import counted, json_option, note, print_json, progress
from neuroweave.text.plain import without_controls

if TYPE_CHECKING:
    from neuroweave.chat.search.refreshing import Refreshed

_SHOWN = 20  # problems for people; --json has them all


@click.command(
    "index",
    help="Build or refresh the index of the documents in DOCS_DIR: text, Markdown, HTML, PDF.\n\n"
    "A search on local:DOCS_DIR does the same by itself; this tells what could not be read. Only what is new or "
    "changed is read again. The index is one file in the folder, or in the user's cache where that cannot be written. "
    "Exits 1 when no document can be read, 2 when there is none.",
)
@click.argument("docs_dir", type=click.Path())
@json_option
def command(docs_dir: str, as_json: bool) -> None:
    from neuroweave.chat.search import LocalFolder, require_search_extra

    require_search_extra("local")
    start = time.perf_counter()
    with progress("index", unit="file") as follow:
        done = LocalFolder(docs_dir).refresh(progress=follow)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(asdict(done) | {"index": str(done.index), "seconds": round(seconds, 2)})
    else:
        _show(done, seconds)
    if not done.documents:
        raise click.exceptions.Exit(1)


def _show(done: Refreshed, seconds: float) -> None:
    changes = ((done.added, "new file"), (done.changed, "changed file"), (done.removed, "removed file"))
    told = ", ".join(counted(count, what) for count, what in changes if count) or "nothing new"
    click.echo(
        f"{counted(done.documents, 'document')}, {counted(done.passages, 'passage')} ({told}) in {seconds:.1f} s; "
        f"index {done.index}"
    )
    for problem in done.problems[:_SHOWN]:
        path = " ".join(without_controls(problem.path).split())
        note(f"{'read with losses' if problem.read else 'not read'}: {path}: {problem.reason}")
    if len(done.problems) > _SHOWN:
        note(f"and {len(done.problems) - _SHOWN} more of these (--json lists all)")
