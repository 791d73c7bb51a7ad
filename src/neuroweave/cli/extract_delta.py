"""`neuroweave extract-delta`: the delta that turns one checkpoint into another."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neuroweave.cli.console import json_option, note, overwrite_option, print_json, progress

if TYPE_CHECKING:
    from neuroweave.surgery.fusion.delta_extraction import ExtractedDelta


@click.command(
    "extract-delta",
    help="Write the delta B - A of the checkpoints A and B (folders or hub ids), for tensors that differ.\n\n"
    "Names, shapes and types must agree. Each element is checked: whether A plus the delta, rounded to the stored "
    "type, is B to the bit. Prints the fuse command that applies it.",
)
@click.argument("a")
@click.argument("b")
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="How the delta is stored. bfloat16 takes half the space and misses more of B, most of all in float32 models.",
)
@click.option("--max-shard-size", default="2GB", show_default=True, help="Bytes of one output file, such as 500MB.")
@click.option("--no-hash", is_flag=True, help="Record sizes only, no SHA-256, in the manifest.")
@click.option("--threads", type=click.IntRange(1, 64), help="Tensors at a time (default: processors, at most 4).")
@overwrite_option
@json_option
def command(
    a: str, b: str, output: Path, dtype: str, max_shard_size: str, no_hash: bool, threads: int | None,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.surgery.fusion.delta_extraction import extract_delta

    with progress("extract") as report:
        found = extract_delta(
            local_folder(a), local_folder(b), output, dtype=dtype, max_shard_size=max_shard_size,
            overwrite=overwrite, hashed=not no_hash, threads=threads, progress=report,
        )  # fmt: skip
    apply = fuse_command(a, output)
    if as_json:
        print_json(
            {
                "folder": str(output),
                "tensors": found.tensors,
                "elements": found.elements,
                "bytes": found.nbytes,
                "same": found.same,
                "not_reproduced": {name: miss.count for name, miss in found.misses.items()},
                "largest_miss": max((miss.largest for miss in found.misses.values()), default=0.0),
                "apply": apply,
            }
        )
    else:
        _show(found)
        click.echo(f"apply it:  {apply}")


def fuse_command(a: str, output: Path) -> str:
    """The command that applies the delta in `output` to A; its own output is for the user to name."""
    from neuroweave.surgery.fusion.delta_extraction import APPLIED_BY

    options = [
        word for key, value in APPLIED_BY.items() for word in (f"--{key.replace('_', '-')}", f"{value:g}" if
        isinstance(value, float) else str(value))
    ]  # fmt: skip
    return f"{shlex.join(['neuroweave', 'fuse', '--model', a, '--weights', str(output), *options])} --output DIR"


def _show(found: ExtractedDelta) -> None:
    size = f"{found.nbytes / 1e9:.2f} GB" if found.nbytes >= 1e9 else f"{found.nbytes / 1e6:.1f} MB"
    tensors = "1 tensor that differs" if found.tensors == 1 else f"{found.tensors} tensors that differ"
    click.echo(
        f"{found.folder}: {tensors}, {size}; {found.same} {'is' if found.same == 1 else 'are'} equal and left out"
    )
    if not found.missed:
        click.echo(f"A + delta is B to the bit, in all {found.elements} elements")
        return
    largest = max(miss.largest for miss in found.misses.values())
    share = 100 * found.missed / found.elements
    click.echo(
        f"A + delta is not B to the bit in {found.missed} of {found.elements} elements ({share:.2g} %), "
        f"off by at most {largest:.3g}"
    )
    worst = sorted(found.misses.items(), key=lambda item: -item[1].count)[:5]
    note("most of them in " + ", ".join(f"{name} ({miss.count})" for name, miss in worst))
