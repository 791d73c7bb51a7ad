"""`neuroweave patch`: write a checkpoint whose activations are changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuroweave.cli.console import json_option, note, overwrite_option, print_json

SHORTCUTS = {"mlp": "mlp", "embedding": "embedding", "head": "head", "everywhere": "everywhere"}


@click.command(
    help="""Write OUT: the checkpoint MODEL (a folder or a hub id) with other activations.

    Say which with a recipe (a YAML file, or the name of a shipped one), or with the shortcuts below. ACTIVATION is a
    name, or several joined by | (each gets an even segment of the neurons).

    \b
    neuroweave patch MODEL OUT --recipe phantom-mlp
    neuroweave patch MODEL OUT --mlp "relu|silu" --layers "every 2nd"
    """
)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recipe", metavar="FILE|NAME", help="A recipe file, or one of those shipped (--list).")
@click.option("--mlp", metavar="ACTIVATION", help="The activation inside every MLP.")
@click.option("--embedding", metavar="ACTIVATION", help="On the embeddings, before the first layer.")
@click.option("--head", metavar="ACTIVATION", help="On the final hidden states, before the output projection.")
@click.option("--everywhere", metavar="ACTIVATION", help="At every site that the model has.")
@click.option("--site", "sites", metavar="SITE=ACTIVATION", multiple=True, help="Any site, such as attention.q=tanh.")
@click.option("--layers", default="all", show_default=True, help='For the shortcuts: "0,3", "4-9", "every 2nd from 1".')
@click.option("--copy", is_flag=True, help="Copy the shards instead of hard-linking them.")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _, wanted: show_list(context, wanted),
    help="List the shipped recipes and the activations, and stop.",
)
@overwrite_option
@json_option
def command(
    model: str, out: Path, recipe: str | None, sites: tuple[str, ...], layers: str, copy: bool, overwrite: bool,
    as_json: bool, **shortcuts: str | None,
) -> None:  # fmt: skip
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.surgery.on_disk import patch_checkpoint

    chosen = recipe_from(recipe, shortcuts, sites, layers)
    result = patch_checkpoint(local_folder(model), out, chosen, copy=copy, overwrite=overwrite)
    report: dict[str, Any] = {
        "folder": str(result.folder),
        "recipe": chosen.to_dict(),
        "layers_changed": result.resolution.layers,
        "sites_left_out": result.resolution.left_out,
        "shards_linked": result.linked,
        "shards_copied": result.copied,
        "parameters_added": result.added,
        "files_left_out": result.left_out,
    }
    if as_json:
        print_json(report)
        return
    click.echo(f"{out}: {chosen.name}")
    for site, count in result.resolution.layers.items():
        click.echo(f"  {site}" + (f"  {counted(count, 'layer')}" if count else ""))
    placed = [(result.linked, "hard-linked"), (result.copied, "copied")]
    shards = ", ".join(f"{counted(number, 'shard')} {how}" for number, how in placed if number)
    click.echo(f"  {shards}; {result.added:,} parameters added")
    if result.resolution.left_out:
        note(f"this model has no site {', '.join(result.resolution.left_out)}: left out of `everywhere`")
    if result.left_out:
        note(f"weights in other forms were left behind: {', '.join(result.left_out)}")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def recipe_from(recipe: str | None, shortcuts: dict[str, str | None], sites: tuple[str, ...], layers: str) -> Any:
    """The recipe that the options describe: a file or name, or the shortcuts put together."""
    from neuroweave.surgery.recipe import LAYER_SITES, Recipe

    wanted = [(site, activation) for site, activation in shortcuts.items() if activation is not None]
    for text in sites:
        site, equals, activation = text.partition("=")
        if not equals:
            raise ValueError(f"--site takes SITE=ACTIVATION, got {text!r}")
        wanted.append((site.strip(), activation.strip()))
    if recipe and wanted:
        raise ValueError("give either --recipe or shortcuts such as --mlp, not both")
    if recipe:
        if layers != "all":
            raise ValueError("--layers belongs to the shortcuts; a recipe says its own layers")
        return Recipe.load(recipe)
    if not wanted:
        raise ValueError("nothing to change: give --recipe, or --mlp, --embedding, --head, --everywhere or --site")
    named = [site for site, _ in wanted]
    for site in named:
        if named.count(site) > 1:
            raise ValueError(f"site {site} is given twice; say once what it gets")
    if layers != "all" and (without := [site for site in named if site not in (*LAYER_SITES, "everywhere")]):
        raise ValueError(
            f"--layers cannot mean {', '.join(without)}, which belongs to no layer; patch it without --layers"
        )
    edits = []
    for site, activation in wanted:
        edit: dict[str, Any] = {"site": site, "activation": activation}
        edits.append(edit | {"layers": layers} if site in (*LAYER_SITES, "everywhere") else edit)
    name = ", ".join(f"{site}: {activation}" for site, activation in wanted)
    return Recipe.parse({"name": name, "sites": edits}, source="options")


def show_list(context: click.Context, wanted: bool) -> None:
    if not wanted:
        return
    from neuroweave.activations import FORMULAS
    from neuroweave.surgery.recipe import Recipe, shipped_recipes

    click.echo("recipes:")
    for name in shipped_recipes():
        click.echo(f"  {name:26} {Recipe.load(name).description}")
    click.echo("activations:")
    for name, formula in FORMULAS.items():
        click.echo(f"  {name:26} {(formula.__doc__ or '').strip()}")
    context.exit()
