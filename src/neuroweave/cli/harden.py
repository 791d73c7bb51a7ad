"""`neuroweave harden`: learned mixtures become segments, a plain recipe."""

from __future__ import annotations

from pathlib import Path

import click

from neuroweave.cli.console import json_option, note, overwrite_option, print_json, print_table


@click.command(
    "harden",
    help="""Write OUT: the MODEL with learned mixtures hardened into segments.

    Each neuron keeps the activation that it chose, neurons of one choice are put side by side, and the gating weights
    are gone: what is left is a plain recipe (OUT/recipe.yaml). `neuroweave compare` shows what that cost.
    """,
)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@overwrite_option
@json_option
def command(model: str, out: Path, overwrite: bool, as_json: bool) -> None:
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.surgery.hardening import harden_checkpoint

    done = harden_checkpoint(local_folder(model), out, overwrite=overwrite)
    if as_json:
        print_json({"output": str(out), **done.as_dict()})
        return
    print_table(
        ("layer", "chosen", "output moved by"),
        [
            (layer.layer, ", ".join(f"{name} {count}" for name, count in layer.chosen.items()), f"{layer.lost:.2g}")
            for layer in done.layers
            if not layer.kept
        ],
    )
    for layer in done.layers:
        if layer.kept:
            note(f"{layer.path} stays a mixture, hard now: {layer.kept}")
    if done.recipe is None:
        note("every neuron chose its original activation: the output is an ordinary model, not a patched one")
