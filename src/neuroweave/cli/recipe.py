"""`neuroweave recipe`: what was done to a model, in a few kilobytes, and the same bytes again from it."""

from __future__ import annotations

from pathlib import Path

import click

from neuroweave.cli.console import bank_file, counted, note, overwrite_option, print_json, progress, resumable


@click.group(
    "recipe",
    help="Publish the patch, not the model: a recipe holds hashes, seed and parameters, and replays to the same bytes.",
)
def command() -> None:
    pass


@command.command("show", help="Print the recipe of the fused checkpoint FOLDER as JSON, to be saved and shared.")
@click.argument("folder", type=click.Path(path_type=Path))
def show(folder: Path) -> None:
    from neuroweave.surgery.fusion.recipe import fusion_recipe

    print_json(fusion_recipe(folder))


@command.command(
    "replay",
    help="Apply the recipe FILE to MODEL. OUTPUT appears only if every file has the SHA-256 that the recipe records.",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The original checkpoint: a folder or a hub id.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--bank", type=click.Path(path_type=Path), help="The neuron bank, unless it is the shipped one.")
@click.option("--weights", type=click.Path(path_type=Path), help="The folder of deltas, if no bank generated them.")
@click.option("--workers", type=int, help="Threads. Default: one a core, at most 4.")
@overwrite_option
def replay(
    file: Path, model: str, output: Path, bank: Path | None, weights: Path | None, workers: int | None, overwrite: bool
) -> None:
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.surgery.fusion.recipe import load_recipe
    from neuroweave.surgery.fusion.recipe import replay as replay_recipe

    recipe = load_recipe(file)
    with resumable(), progress("fusing") as report:
        result = replay_recipe(
            recipe, local_folder(model), output, file=file, bank=None if bank is None else bank_file(bank),
            weights=weights, workers=workers, overwrite=overwrite, progress=report,
        )  # fmt: skip
    click.echo(
        f"{output}: {counted(len(result.manifest['outputs']), 'file')}, each with the SHA-256 that the recipe records"
    )
    for text in result.plan.notes:
        note(text)
