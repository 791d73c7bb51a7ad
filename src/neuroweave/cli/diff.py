"""`neuroweave diff`: what differs between two checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import counted, json_option, print_json, print_table, progress

if TYPE_CHECKING:
    from neuroweave.checkpoint.difference import Difference, Family
    from neuroweave.checkpoint.header import TensorSpec
    from neuroweave.checkpoint.tensor_difference import TensorDifference

_ROWS = 50  # of a table for people; --json has them all
_COLUMNS = ("share", "largest", "relative", "cosine", "dtypes")


@click.command(
    "diff",
    help="Compare the checkpoints A and B (folders or hub ids): tensors, config.json, other files.\n\n"
    "For changed tensors: the share of elements that differ, the largest |b - a|, ||B - A|| / ||A||, and the cosine of "
    "A and B; one line for each family of layers, with the worst layer's figures, the worst family first. Exits 0 when "
    "nothing differs, 1 when something does. How tensors are spread over shards does not count.",
)
@click.argument("a")
@click.argument("b")
@click.option("--each", is_flag=True, help="One line for each changed tensor.")
@click.option("--threads", type=click.IntRange(1, 64), help="Tensors at a time (default: processors, at most 4).")
@json_option
def command(a: str, b: str, each: bool, threads: int | None, as_json: bool) -> None:
    from neuroweave.checkpoint.difference import compare_checkpoints
    from neuroweave.checkpoint.hub import local_folder

    folders = local_folder(a), local_folder(b)
    with progress("compare") as report:
        found = compare_checkpoints(*folders, threads=threads, progress=report)
    if as_json:
        print_json(_as_dict(found, folders))
    else:
        _show(found, each=each)
    if not found.identical:
        raise click.exceptions.Exit(1)


def _as_dict(found: Difference, folders: tuple[Path, Path]) -> dict[str, Any]:
    from neuroweave.checkpoint.difference import badness

    changed = sorted(found.changed, key=badness, reverse=True)
    return {
        "a": str(folders[0]),
        "b": str(folders[1]),
        "identical": found.identical,
        "same": found.same,
        "only_a": [asdict(spec) for spec in found.only_a],
        "only_b": [asdict(spec) for spec in found.only_b],
        "shapes": [{"a": asdict(first), "b": asdict(second)} for first, second in found.shapes],
        "changed": [asdict(item) | {"share": item.share} for item in changed],
        "config": found.config,
        "files": found.files,
    }


def _show(found: Difference, *, each: bool) -> None:
    from neuroweave.checkpoint.difference import badness, families

    if found.changed and each:
        rows = [(item.name, *_figures(item, item.share)) for item in sorted(found.changed, key=badness, reverse=True)]
        _table(("tensor", *_COLUMNS), rows)
    elif found.changed:
        groups = families(found.changed)
        lines = [(family.name, *_members(family), *_figures(family.worst, family.share)) for family in groups]
        _table(("changed tensors", "layers", "tensors", "worst", *_COLUMNS), lines)
    for side, specs in (("A", found.only_a), ("B", found.only_b)):
        _list(f"only in {side}", [_spec(spec) for spec in specs])
    _list("other shape", [f"{_spec(first)} -> {second.dtype} {list(second.shape)}" for first, second in found.shapes])
    _list("config.json", [_config_line(key, sides) for key, sides in found.config.items()])
    _list("file", [_file_line(name, sides) for name, sides in found.files.items()])
    click.echo(_summary(found))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = rows[:_ROWS]
    empty = [all(not row[at] for row in shown) for at in range(len(columns))]  # dtypes, when none changed
    keep = [at for at, hide in enumerate(empty) if not hide]
    print_table([columns[at] for at in keep], [[row[at] for at in keep] for row in shown])
    if len(rows) > _ROWS:
        click.echo(f"and {len(rows) - _ROWS} more (--json lists all)")
    click.echo()


def _list(what: str, lines: list[str]) -> None:
    for line in lines[:_ROWS]:
        click.echo(f"{what}: {line}")
    if len(lines) > _ROWS:
        click.echo(f"and {len(lines) - _ROWS} more of these (--json lists all)")


def _members(family: Family) -> tuple[str, str, str]:
    from neuroweave.checkpoint.difference import first_number

    worst = first_number(family.worst.name) if len(family.members) > 1 else None
    return _short_list(ranges(family.layers)), str(len(family.members)), "" if worst is None else f"layer {worst}"


def _figures(item: TensorDifference, share: float | None) -> tuple[str, str, str, str, str]:
    if item.differing is None:
        return ("bytes", "", "", "", _dtypes(item))
    zero = "from zero" if item.relative is None and item.differing else "0"
    return (
        "" if share is None else f"{100 * share:.3g} %",
        "" if item.largest is None else f"{item.largest:.3g}",
        f"{item.relative:.3g}" if item.relative is not None else zero,
        "" if item.cosine is None else f"{item.cosine:.6f}",
        _dtypes(item) + (f" {item.not_finite} not finite" if item.not_finite else ""),
    )


def _dtypes(item: TensorDifference) -> str:
    from neuroweave.checkpoint.header import DTYPE_NAMES

    first, second = (DTYPE_NAMES.get(code, code) for code in item.dtypes)
    return f"{first} -> {second}" if first != second else ""


def _spec(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} {list(spec.shape)}"


def _config_line(key: str, sides: dict[str, Any]) -> str:
    texts = [_short(sides[side]) if side in sides else "(absent)" for side in "ab"]
    return f"{key}: {texts[0]} -> {texts[1]}"


def _file_line(name: str, sides: dict[str, Any]) -> str:
    if len(sides) < 2:
        return f"{name}: only in {next(iter(sides), '?').upper()}"
    return f"{name}: {sides['a']['bytes']} -> {sides['b']['bytes']} bytes, other SHA-256"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _summary(found: Difference) -> str:
    if found.identical:
        return f"identical: {counted(found.same, 'tensor')}, config.json and every other file"
    kinds = (
        (found.changed, f"{counted(len(found.changed), 'tensor')} changed"),
        (found.shapes, f"{len(found.shapes)} of another shape"),
        (found.only_a, f"{len(found.only_a)} only in A"),
        (found.only_b, f"{len(found.only_b)} only in B"),
        (found.config, f"{counted(len(found.config), 'key')} of config.json"),
        (found.files, counted(len(found.files), "other file")),
    )
    differences = ", ".join(text for items, text in kinds if items)
    return f"differ: {differences}; {counted(found.same, 'tensor')} identical to the byte"


def ranges(numbers: list[int]) -> list[str]:
    """Sorted numbers as people write them: `0-3`, `7`."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][1] + 1:
            groups[-1][1] = number
        else:
            groups.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in groups]


def _short_list(parts: list[str]) -> str:
    return ", ".join(parts if len(parts) <= 6 else [*parts[:4], "...", parts[-1]])
