"""What every command prints with: JSON for machines, aligned tables for people, notes on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
overwrite_option: Callable[[Any], Any] = click.option(
    "--overwrite", is_flag=True, help="Replace the output folder if it holds files."
)


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
