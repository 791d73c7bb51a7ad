"""What every command prints with: JSON for machines, aligned tables for people, notes on stderr."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from neuroweave.progress import follow
from neuroweave.progress import progress as bar_or_lines

json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
# What the commands that repair a model share.
teacher_option: Callable[[Any], Any] = click.option(
    "--teacher", required=True, metavar="BASE", help="The model before the patch."
)
data_option: Callable[[Any], Any] = click.option(
    "--data",
    multiple=True,
    metavar="TEXT",
    type=click.Path(path_type=Path),
    help="A text file or a folder of them; may be repeated. Default: the shipped calibration and training text.",
)
overwrite_option: Callable[[Any], Any] = click.option(
    "--overwrite", is_flag=True, help="Replace the output folder if it holds files."
)


def layers_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--layers 5 11 17`, `--layers 5,11,17` or `--layers 4-9`: the command gets `layers`, a sorted tuple or None.

    For commands without arguments of their own: click options take a fixed number of words, so the words after the
    first arrive as an argument.
    """

    @click.option("--layers", metavar="N ...", help="Only these layers: 5 11 17, or 5,11,17, or 4-9. Default: all.")
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
def progress(what: str, *, unit: str = "B", quiet: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A function to be called with (done, total): a bar on a terminal, elsewhere a line every 30 s. `quiet`: not even
    a line at the start, for jobs that mostly take seconds."""
    with bar_or_lines(what, unit=unit, quiet=quiet, leave=False) as bar:
        yield follow(bar)


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def given(*names: str) -> list[str]:
    """Those of the running command's parameters that were typed, as they are typed: `--gamma-cap`."""
    context = click.get_current_context()
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    return [options[name] for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def as_typed(parameter: str) -> str:
    return f"--{parameter.replace('_', '-')}"


@contextlib.contextmanager
def errors_as_typed(*parameters: str) -> Iterator[None]:
    """A ValueError that begins with one of these names begins with the option: `gamma_cap is ...`, `--gamma-cap is`."""
    try:
        yield
    except ValueError as error:
        word, space, rest = str(error).partition(" ")
        if word not in parameters:
            raise
        raise ValueError(as_typed(word) + space + rest) from error


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C in a fuse carries what `main` then tells: that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("the same command goes on from the shards that are complete") from stop


def bank_file(path: Path) -> Path:
    """The path of a bank that a person names. Raises ValueError for a folder, saying what to do with it."""
    if not path.is_dir():
        return path
    if (path / "config.json").is_file():
        hint = f"it looks like a model: neuroweave neurons extract --model {path} takes neurons out of it"
    else:
        banks = sorted(item.name for item in path.glob("*.safetensors"))
        hint = f"name a file in it, such as {banks[0]}" if banks else "name a file"
    raise ValueError(f"{path}: a folder; a bank is one .safetensors file; {hint}")


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


def require_jax() -> None:
    """Raise ValueError, with what to install, unless JAX and what trains with it are there."""
    missing = [name for name in ("jax", "optax", "orbax.checkpoint") if not found(name)]
    if missing:
        raise ValueError(
            f"--backend jax needs {', '.join(missing)}, which is not installed; pip install 'neuroweave[jax]' (on an "
            f"accelerator also jax[tpu] or jax[cuda13]), or use --backend torch"
        )


def found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that is not there
        return False
