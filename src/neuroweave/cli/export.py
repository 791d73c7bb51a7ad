"""`neuroweave export`: a checkpoint folder becomes a GGUF file."""

from __future__ import annotations

import time
from pathlib import Path

import click

from neuroweave.cli.console import json_option, note, print_json, progress


@click.command(
    help="Write the checkpoint MODEL (a folder or a hub id) as a file that llama.cpp runs.\n\n"
    "Known families: llama, mistral, qwen2, qwen3, gemma3_text. A patched model is refused unless llama.cpp computes "
    "its activations. FILE appears whole or not at all."
)
@click.argument("model")
@click.option(
    "--gguf", "out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The file to write."
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0"]),
    default="q8_0",
    show_default=True,
    help="How matrices are stored; vectors are float32.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
def command(model: str, out: Path, kind: str, force: bool, as_json: bool) -> None:
    from neuroweave.checkpoint.gguf_export import export_gguf
    from neuroweave.checkpoint.hub import local_folder

    start = time.perf_counter()
    with progress("export") as follow:
        result = export_gguf(local_folder(model), out, type=kind, force=force, progress=follow)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(result.as_dict() | {"seconds": round(seconds, 2)})
        return
    click.echo(
        f"{result.output}: {result.architecture}, {result.parameters / 1e6:.1f} M parameters, {result.type}, "
        f"{result.bytes / 1e6:.0f} MB, {seconds:.1f} s"
    )
    for line in result.notes:
        note(line)
