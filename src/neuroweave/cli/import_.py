"""`neuroweave import`: a GGUF file, a folder or a hub id becomes a Hugging Face checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from neuroweave.cli.console import json_option, note, overwrite_option, print_json


@click.command(
    "import",
    help="Turn SRC into a Hugging Face checkpoint in the folder OUT.\n\n"
    "SRC is a GGUF file, a checkpoint folder (safetensors or pytorch_model.bin), a hub id (owner/name), or one of the "
    "models that come as Python packages: embedded:smollm2, embedded:gemma3. OUT appears whole or not at all.",
)
@click.argument("source", metavar="SRC")
@click.argument("out", metavar="OUT", type=click.Path())
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Dtype of the stored weights. auto keeps the source's; a quantized GGUF file becomes float32.",
)
@click.option("--max-shard-size", default="2GB", show_default=True, help="Largest file, such as 500MB or 2GB.")
@overwrite_option
@json_option
def command(source: str, out: str, dtype: str, max_shard_size: str, overwrite: bool, as_json: bool) -> None:
    from tqdm import tqdm

    from neuroweave.checkpoint.importing import import_checkpoint

    start = time.perf_counter()
    with tqdm(disable=None, unit="B", unit_scale=True, desc="import", leave=False) as bar:
        result = import_checkpoint(
            source,
            out,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=_follow(bar),
        )
    seconds = time.perf_counter() - start
    if as_json:
        print_json(result.as_dict() | {"seconds": round(seconds, 2)})
        return
    click.echo(
        f"{result.output}: {result.model_type}, {result.parameters / 1e6:.1f} M parameters, {result.dtype}, "
        f"{result.bytes / 1e6:.0f} MB in {result.shards} file{'s' if result.shards > 1 else ''}, {seconds:.1f} s"
    )
    if result.left_out:
        note(f"no place in {result.model_type} for: {', '.join(result.left_out)}")


def _follow(bar: tqdm) -> Callable[[int, int], None]:  # type: ignore[name-defined]  # imported where it is used
    def follow(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return follow
