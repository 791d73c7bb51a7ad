"""`neuroweave inspect`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuroweave.cli.console import json_option, note, print_json, print_table


@click.command(
    "inspect",
    help="Show what the checkpoint MODEL (a folder or a hub id) is: layers, MLPs, activations, attention, recipe.\n\n"
    "Reads headers and config.json only; tensor data is not touched, and sizes come from the tensors themselves.",
)
@click.argument("model")
@json_option
def command(model: str, as_json: bool) -> None:
    from neuroweave.checkpoint.describe import activation_text, describe_checkpoint, layer_groups
    from neuroweave.checkpoint.hub import local_folder

    folder = local_folder(model)
    found = describe_checkpoint(folder)
    if found["model_type"] == "neuroblast":
        _show_plan(folder, found["layers"])
    if as_json:
        print_json(found)
        return
    dtypes = ", ".join(found["dtypes"])
    files = len(found["shards"])
    click.echo(
        f"{found['model_type']}  {_count(found['parameters'])} parameters  {dtypes}  {_bytes(found['bytes'])}  "
        f"{found['tensors']} tensors in {files} file{'s' if files != 1 else ''}"
    )
    head = "tied to the embedding" if found["tied_head"] else "its own"
    click.echo(f"hidden {found['hidden']}  vocabulary {found['vocabulary']}  output head {head}")
    if found["recipe"] is not None:
        _show_recipe(found["recipe"], activation_text(found["base_activation"]), activation_text)
    click.echo()
    print_table(("layers", "mlp", "activation", "attention"), layer_groups(found["layers"]))
    for prefix, stack in found["other_stacks"].items():
        note(f"also holds {prefix}: {stack['layers']} layers, {_count(stack['parameters'])} parameters")
    if found["orphans"]:
        note(f"{len(found['orphans'])} tensors are in a shard but not in the index: {', '.join(found['orphans'][:5])}")


def _show_plan(folder: Path, layers: list[dict[str, Any]]) -> None:
    """What the plan of a NeuroBLAST model says of each layer, in place of what tensor names tell."""
    from neuroweave.checkpoint.describe import base_config
    from neuroweave.checkpoint.reader import read_config
    from neuroweave.neuroblast.layer_plan import plan_layers

    planned = {layer.number: layer for layer in plan_layers(base_config(read_config(folder))[0])}
    for layer in layers:
        if plan := planned.get(layer["layer"]):
            layer |= {"stage": plan.stage, "name": plan.name, "attention": f"{plan.stage}: {plan}"}


def _show_recipe(recipe: dict[str, Any], base: str, text: Any) -> None:
    click.echo(f"recipe {recipe.get('name') or '(unnamed)'}, applied to a model with {base}:")
    for site in recipe.get("sites") or ():
        layers = site.get("layers", "all")
        where = layers if isinstance(layers, str) else ", ".join(map(str, layers))
        click.echo(f"  {', '.join(site['site'])}: {text(site.get('activation'))} (layers: {where})")


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
