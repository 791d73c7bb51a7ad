"""`neuroweave heal`: train a patched model to predict what it predicted before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from neuroweave.cli.console import (
    data_option,
    errors_as_typed,
    json_option,
    note,
    overwrite_option,
    print_json,
    teacher_option,
)

FILE = click.Path(path_type=Path)
ABOVE_0 = click.FloatRange(min=0, min_open=True)
NOT_BELOW_0 = click.FloatRange(min=0)


@click.command(
    "heal",
    help="""Write a PATCHED model that is trained until it predicts what it predicted before (distillation).

    The usual road: patch, calibrate (closed form, minutes), then heal what calibrate wrote. Training stops early when
    the KL on held-out documents no longer falls, and the best weights are kept. After Ctrl-C or a kill the same command
    goes on. `neuroweave compare` shows what it did.

    \b
    neuroweave heal CALIBRATED --teacher BASE --output DIR
    neuroweave heal PATCHED --teacher BASE --output DIR --train mlp --hidden 0.3
    neuroweave heal PATCHED --teacher BASE --output DIR --blend 200
    """,
)
@click.argument("patched")
@teacher_option
@data_option
@click.option("--output", required=True, metavar="DIR", type=FILE, help="Where to write the result.")
@click.option(
    "--train", type=click.Choice(["mixtures", "mlp", "lora", "all"]), help="What is trained.  [default: lora]"
)
@click.option("--lora-rank", type=click.IntRange(min=1), help="Of the adapters, merged at the end.  [default: 8]")
@click.option(
    "--loss",
    type=click.Choice(["full", "topk"]),
    help="KL over the whole vocabulary, or over the teacher's top tokens, cached on the disk.  [default: full]",
)
@click.option("--top-k", type=click.IntRange(min=1), help="How many with --loss topk.  [default: 64]")
@click.option("--hidden", metavar="WEIGHT", type=NOT_BELOW_0, help="Match hidden states as well.  [default: 0]")
@click.option("--cross-entropy", metavar="WEIGHT", type=NOT_BELOW_0, help="Of the text itself.  [default: 0]")
@click.option("--temperature", type=ABOVE_0, help="Of both models' predictions.  [default: 1]")
@click.option(
    "--blend",
    metavar="STEPS",
    type=click.IntRange(min=0),
    help="Go from the old activations to the new in that many steps; for a model that is not calibrated.  [default: 0]",
)
@click.option("--tokens", type=click.IntRange(min=2), help="To train on; text comes again.  [default: 262144]")
@click.option("--window", type=click.IntRange(min=2), help="Tokens of one pass.  [default: 512]")
@click.option("--batch", type=click.IntRange(min=1), help="Windows of one pass.  [default: 1]")
@click.option("--accumulate", type=click.IntRange(min=1), help="Passes of one step.  [default: 1]")
@click.option(
    "--learning-rate",
    type=ABOVE_0,
    help="Its highest value; it falls to 0.  [default: lora 7e-4, mlp and all 2e-5, mixtures 1e-2]",
)
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), help="Of products.  [default: auto]")
@click.option("--evaluate-every", metavar="N", type=click.IntRange(min=1), help="Steps.  [default: an eighth of all]")
@click.option("--patience", type=click.IntRange(min=1), help="Evaluations without a better one.  [default: 3]")
@click.option("--seed", type=click.IntRange(min=0), help="Order of the text, start of adapters.  [default: 0]")
@click.option("--resume/--fresh", default=True, help="Go on where the same command was stopped, or start anew.")
@overwrite_option
@json_option
def command(
    patched: str, teacher: str, data: tuple[Path, ...], output: Path, resume: bool, overwrite: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.diagnose.probes.head import find_head
    from neuroweave.surgery.blending import Blending
    from neuroweave.text import documents, read_documents
    from neuroweave.training.agreement import is_first
    from neuroweave.training.heal import HealOptions, heal_checkpoint

    logging.disable_progress_bar()
    chosen = {name: value for name, value in options.items() if value is not None}
    with errors_as_typed(*options):
        settings = HealOptions(**chosen)
        settings.steps()
    done = heal_checkpoint(
        local_folder(patched),
        local_folder(teacher),
        output,
        read_documents(data) if data else [*documents("calibration"), *documents("training")],
        options=settings,
        blend=Blending,
        find_head=find_head,
        resume=resume,
        overwrite=overwrite,
        report=note if as_json else click.echo,
        note=note,
    )
    if not is_first():
        return
    if as_json:
        print_json({"output": str(output), **done.as_dict()})
        return
    click.echo(
        f"{output}: {done.trained:,} parameters trained on {done.tokens:,} tokens in {done.steps:,} steps, "
        f"{done.seconds:.0f} s"
    )
    click.echo(
        f"  KL(teacher || student) on {done.held_out_tokens:,} held-out tokens: {done.kl_before:.4f} before, "
        f"{done.kl_after:.4f} after (step {done.best_step})"
    )
