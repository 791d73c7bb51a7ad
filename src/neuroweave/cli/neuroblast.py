"""`neuroweave neuroblast`: a fresh NeuroBLAST model, and conversion from and to the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuroweave.cli.console import json_option, note, overwrite_option, print_json

PRESETS = ("default", "small", "tiny")
LAYOUTS = ("neuroweave", "published")


@click.group("neuroblast", help="Make a NeuroBLAST model, or convert a published one.")
def command() -> None:
    pass


@command.command(
    "new",
    help="""Write OUT: a fresh NeuroBLAST model, ready to be trained, as a Hugging Face checkpoint.

    \b
    neuroweave neuroblast new OUT --preset small --tokenizer SMOLLM2
    neuroweave neuroblast new OUT --preset tiny --vocab-size 4096 --set kernel_size=3 --set scale=0.5

    Every field of the configuration can be set; docs/neuroblast.md lists them.""",
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(PRESETS), default="default", show_default=True, help="The size.")
@click.option("--tokenizer", metavar="DIR", help="A folder or hub id; its files come along and its size is taken.")
@click.option("--vocab-size", type=click.IntRange(min=1), help="Without --tokenizer.  [default: 65536]")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="A field of the configuration.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the weights.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@overwrite_option
@json_option
def new(
    out: Path, preset: str, tokenizer: str | None, vocab_size: int | None, settings: tuple[str, ...], seed: int,
    dtype: str, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from neuroweave.checkpoint.staging import check_output
    from neuroweave.neuroblast.fresh import write_fresh_model

    if tokenizer and vocab_size:
        raise ValueError("--tokenizer decides the vocabulary's size; leave out --vocab-size")
    check_output(out, overwrite=overwrite)
    chosen = parse_settings(settings)
    if vocab_size:
        chosen["vocab_size"] = vocab_size
    made = write_fresh_model(
        out, preset=preset, tokenizer=tokenizer, settings=chosen, seed=seed, dtype=dtype, overwrite=overwrite
    )
    if as_json:
        print_json(made.as_dict())
        return
    click.echo(f"{out}: {preset}, {made.parameters:,} parameters ({made.embedding:,} of them the embedding), {dtype}")
    if tokenizer is None:
        note("no tokenizer came along: --tokenizer DIR takes one")
    elif made.added_pad:
        note("the tokenizer had no padding token: <|pad|> was added")


@command.command(
    "convert",
    help="""Write OUT: the published NeuroBLAST checkpoint SOURCE in this layout, or back with --to published.

    Of each published k x k kernel only the middle row meets data: that is kept. Going back, the others are zeros.""",
)
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(LAYOUTS), default="neuroweave", show_default=True, help="The layout of OUT.")
@overwrite_option
@json_option
def convert(source: str, out: Path, to: str, overwrite: bool, as_json: bool) -> None:
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.neuroblast import conversion

    done = conversion.convert(local_folder(source), out, to=to, overwrite=overwrite)
    if as_json:
        print_json(done.as_dict())
        return
    click.echo(f"{out}: {to} layout, {done.tensors} tensors, {done.parameters:,} parameters")
    if done.dead:
        note(f"{done.dead:,} published weights that were not zero, but never met data, are left out")
    if done.left_out:
        note(f"did not come along: {', '.join(done.left_out)}")
    if to == "published":
        note("the published modelling code is not part of neuroweave; put it beside the weights to load them there")


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """`("scale=0.5", "bridges=false")` as a dictionary; values are read as YAML. Raises ValueError."""
    import yaml

    chosen: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set takes KEY=VALUE, got {setting!r}")
        try:
            chosen[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting}: the value is no YAML ({error})") from error
    return chosen
