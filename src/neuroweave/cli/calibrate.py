"""`neuroweave calibrate`: repair a patched model in closed form."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import click

from neuroweave.cli.console import (
    data_option,
    json_option,
    note,
    overwrite_option,
    print_json,
    progress,
    teacher_option,
)

FILE = click.Path(path_type=Path)


@click.command(
    "calibrate",
    help="""Write a PATCHED model whose weights are solved again, so that it comes close to what it was.

    Layer by layer: neurons are matched (and ordered, where segments run different activations), then projections are
    solved by least squares on text. No gradient; minutes on a CPU. --refine goes further: each MLP is then trained on
    its own error, for which more text is worth its while. `neuroweave compare` shows what it did.

    \b
    neuroweave calibrate PATCHED --teacher BASE --output DIR
    neuroweave calibrate PATCHED --teacher BASE --output DIR --data TEXTS --tokens 262144 --refine 4
    """,
)
@click.argument("patched")
@teacher_option
@data_option
@click.option("--output", required=True, metavar="DIR", type=FILE, help="Where to write the result.")
@click.option("--tokens", type=click.IntRange(min=2), default=49_152, show_default=True, help="How much text to use.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of one pass.")
@click.option("--ridge", type=float, help="Pull towards the present weights, relative.  [default: 0.001]")
@click.option("--match/--no-match", default=True, help="Scale neurons and activated projections first.")
@click.option("--order/--no-order", default=True, help="Choose which neurons run which segment of a mixture.")
@click.option("--attention/--no-attention", default=True, help="Solve the attention's output projection as well.")
@click.option(
    "--refine", type=click.IntRange(min=0), default=0, show_default=True, metavar="PASSES",
    help="Train each MLP on its own error, in so many passes over the text.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Which windows of the text are taken.")
@overwrite_option
@json_option
def command(
    patched: str, teacher: str, data: tuple[Path, ...], output: Path, tokens: int, window: int, ridge: float | None,
    match: bool, order: bool, attention: bool, refine: int, seed: int, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.surgery.calibration.calibrate import RIDGE, CalibrationOptions
    from neuroweave.surgery.calibration.on_disk import calibrate_checkpoint
    from neuroweave.text import documents, read_documents

    began = time.perf_counter()
    texts = read_documents(data) if data else [*documents("calibration"), *documents("training")]
    options = CalibrationOptions(
        ridge=RIDGE if ridge is None else ridge, match=match, order=order, attention=attention, refine=refine
    )
    with progress("calibrating", unit="layer") as report:
        done = calibrate_checkpoint(
            local_folder(patched),
            local_folder(teacher),
            output,
            texts,
            options=options,
            tokens=tokens,
            window=window,
            seed=seed,
            overwrite=overwrite,
            progress=None if report is None else lambda at, of, _: report(at, of),
        )
    if as_json:
        print_json({"output": str(output), **done.as_dict()})
        return
    seconds = time.perf_counter() - began
    click.echo(f"{output}: {len(done.layers)} layers on {done.tokens:,} tokens in {seconds:.0f} s")
    before, after = (median(getattr(layer, name) for layer in done.layers) for name in ("error_before", "error_after"))
    click.echo(
        f"  error of a layer, relative to what the teacher's does (median): {before:.2g} before, {after:.2g} after"
    )
    for layer in done.layers:
        if layer.left_out:
            note(f"layer {layer.layer} is as it was: {layer.left_out}")
