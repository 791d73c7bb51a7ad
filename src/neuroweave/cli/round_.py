"""`neuroweave round`: round a model's weights to few bits, on text."""

from __future__ import annotations

import time
from pathlib import Path

import click

from neuroweave.cli.console import data_option, json_option, note, overwrite_option, print_json, progress


@click.command(
    "round",
    help="""Write MODEL with its matrices rounded to 4 bits so that what it computes changes least (GPTQ).

    Layer by layer on text: the error that rounding one column leaves is taken up by the columns after it. The result is
    an ordinary float32 checkpoint on the fast runtime's grid: generate --fast --weights int4 packs it without a further
    loss, and compare says what the rounding did.

    \b
    neuroweave round MODEL --output ROUNDED
    neuroweave generate ROUNDED --prompt "Hello" --fast --weights int4""",
)
@click.argument("model")
@data_option
@click.option("--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where to write it.")
@click.option("--tokens", type=click.IntRange(min=2), default=16_384, show_default=True, help="How much text to use.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of one pass.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which windows of the text are taken.")
@overwrite_option
@json_option
def command(
    model: str, data: tuple[Path, ...], output: Path, tokens: int, window: int, seed: int, overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.surgery.rounding.on_disk import round_checkpoint
    from neuroweave.text import documents, read_documents

    began = time.perf_counter()
    texts = read_documents(data) if data else [*documents("calibration"), *documents("training")]
    with progress("rounding", unit="layer") as report:
        done = round_checkpoint(
            local_folder(model), output, texts, tokens=tokens, window=window, seed=seed, overwrite=overwrite,
            progress=report,
        )  # fmt: skip
    if as_json:
        print_json({"output": str(output), **asdict(done)})
        return
    kinds = ", ".join(f"{count} matrices in {format}" for format, count in done.matrices.items())
    note(
        f"{output}: {kinds}; outputs changed by {sum(done.errors) / len(done.errors):.1%} a matrix, on {done.tokens:,} "
        f"tokens, in {time.perf_counter() - began:.0f} s"
    )
