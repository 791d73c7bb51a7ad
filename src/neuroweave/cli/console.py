"""What every command prints with: JSON for machines, aligned tables for people, notes on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click

json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
overwrite_option: Callable[[Any], Any] = click.option(
    "--overwrite", is_flag=True, help="Replace the output folder if it holds files."
)


def layers_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--layers 5 11 17`, `--layers 5,11,17` or `--layers 4-9`: the command gets `layers`, a sorted tuple or None.

    For commands without arguments of their own: click options take a fixed number of words, so the words after the
    first arrive as an argument.
    """

    @click.option("--layers", metavar="N ...", help="Only these layers: 5 11 17, or 4-9. Default: all.")
    @click.argument("more_layers", nargs=-1, metavar="")
    @functools.wraps(function)
    def with_layers(*, layers: str | None, more_layers: tuple[str, ...], **options: Any) -> Any:
        if layers is None and more_layers:
            raise click.UsageError(f"unexpected argument {more_layers[0]!r}")
        chosen = None if layers is None else layer_numbers([layers, *more_layers])
        return function(layers=chosen, **options)

    return with_layers


def layer_numbers(words: Sequence[str]) -> tuple[int, ...]:
    """Layer numbers from words such as `5`, `5,11` and `4-9`. Raises ValueError for anything else."""
    chosen: set[int] = set()
    for word in (part for text in words for part in text.split(",") if part.strip()):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", word)
        first = int(match[1]) if match else 1
        last = int(match[2] or match[1]) if match else 0
        if first > last or last - first > 100_000:
            raise ValueError(f"--layers takes numbers or ranges such as 5 11 17 or 4-9, got {word!r}")
        chosen.update(range(first, last + 1))
    if not chosen:
        raise ValueError("--layers takes at least one number")
    return tuple(sorted(chosen))


@contextlib.contextmanager
def progress(what: str, *, unit: str = "B") -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, to be called with (done, total); None where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, unit_scale=True, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows under a header; columns of numbers are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    numeric = [
        all(row[i][:1] in "+-" or row[i][:1].isdigit() for row in cells if row[i]) and any(row[i] for row in cells)
        for i in range(len(columns))
    ]
    for line in [list(columns), *cells]:
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        click.echo("  ".join(aligned).rstrip())


def note(message: str) -> None:
    """One line for the person, kept out of what a program would read."""
    click.echo(message, err=True)
