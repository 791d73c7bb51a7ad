"""`neuroweave neurons`: banks of neurons, taken from a model, defined, derived from others, and shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import bank_file, counted, given, json_option, note, print_json, print_table, progress

if TYPE_CHECKING:
    from neuroweave.surgery.neurons.bank import Bank

FILE = click.Path(path_type=Path)
output_option: Callable[[Any], Any] = click.option(
    "--output", required=True, metavar="FILE", type=FILE, help="The bank to write, a .safetensors file."
)
overwrite_option: Callable[[Any], Any] = click.option(
    "--overwrite", is_flag=True, help="Replace the output file if it exists."
)


@click.group(
    help="Make, derive and show banks of neurons: the material for `neuroweave deltas`.\n\n"
    "A neuron is a gate, an up and a down direction; a bank is one file that holds neurons, what is known of each, and "
    "where they came from."
)
def command() -> None:
    pass


@command.command(
    "extract",
    short_help="Take the neurons out of a model that matter most on a text.",
    help="Take the neurons out of a model that matter most on a text.\n\n"
    "The model reads the text twice, in float32 on the CPU: once to measure all its neurons, once to record the "
    "response curve and the strongest moments of the chosen ones. Every layer gives as many neurons as any other, "
    "within one. Models with dense gated MLPs (gate_proj, up_proj, down_proj), such as Llama, Mistral, Qwen and Gemma.",
)
@click.option("--model", required=True, metavar="DIR", help="A checkpoint folder or a hub id.")
@click.option(
    "--data",
    multiple=True,
    metavar="TEXT",
    type=FILE,
    help="A text file or a folder of them; may be repeated. Default: the shipped calibration text.",
)
@click.option("--count", type=int, default=256, show_default=True, help="How many neurons to take.")
@click.option(
    "--select",
    type=click.Choice(["contribution", "selectivity"]),
    default="contribution",
    show_default=True,
    help="contribution: mean length of what a neuron adds to the residual stream. selectivity: kurtosis of its "
    "activation, high when it fires on few tokens, among the half that contributes most.",
)
@click.option("--layers", metavar="LAYERS", help="Only these, such as 4-9, 5,11,17 or 'every 2nd'.  [default: all]")
@click.option("--tokens", type=int, help="Tokens of text to read, at most; 0 for all.  [default: 32768]")
@click.option("--window", type=int, help="Tokens per forward pass.  [default: 512]")
@click.option("--seed", type=int, default=0, show_default=True, help="Which part of a longer text is read.")
@output_option
@overwrite_option
@json_option
def extract(
    model: str,
    data: Sequence[Path],
    count: int,
    select: str,
    layers: str | None,
    tokens: int | None,
    window: int | None,
    seed: int,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    from neuroweave.surgery.neurons.bank import check_bank_output

    check_bank_output(output, overwrite=overwrite, sources=[*data, Path(model)])
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.checkpoint.loading import load_model, load_tokenizer
    from neuroweave.surgery.neurons.extraction import TOKENS, WINDOW, extract_neurons, model_record
    from neuroweave.text import documents, read_documents

    texts = read_documents(data) if data else documents("calibration")
    folder = local_folder(model)
    start = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    loaded, how = load_model(folder, dtype="float32", device="cpu")
    if not as_json:
        note(how)
    with progress(f"reading {Path(model).name} twice", unit="window", quiet=False) as report:
        bank = extract_neurons(
            loaded,
            tokenizer,
            texts,
            count=count,
            layers=chosen_layers(layers, loaded),
            window=WINDOW if window is None else window,
            tokens=TOKENS if tokens is None else tokens or None,
            select=select,
            seed=seed,
            source=model_record(folder, name=Path(model).name),
            progress=report,
        )
    finish(bank, output, overwrite, as_json, sources=[*data, folder], seconds=time.perf_counter() - start)


@command.command(
    "define",
    short_help="Make neurons that behave as piecewise-linear functions.",
    help="Make neurons that behave as piecewise-linear functions, from a YAML file (see examples/behaviours.yaml).",
)
@click.option("--spec", required=True, metavar="FILE", type=FILE, help="The behaviours, in YAML.")
@click.option("--seed", type=int, default=42, show_default=True, help="What random directions are drawn from.")
@output_option
@overwrite_option
@json_option
def define(spec: Path, seed: int, output: Path, overwrite: bool, as_json: bool) -> None:
    from neuroweave.surgery.neurons.bank import check_bank_output

    check_bank_output(output, overwrite=overwrite, sources=[spec])
    from neuroweave.surgery.neurons.behaviours import define_neurons, input_files

    sources = input_files(spec)
    check_bank_output(output, overwrite=overwrite, sources=sources)
    finish(define_neurons(spec, seed=seed), output, overwrite, as_json, sources=sources)


@command.command(
    "derive",
    short_help="Make derivative neurons from those of a bank.",
    help="Make derivative neurons from the neurons of BANK: mirrored, scaled, or moved to other directions.",
)
@click.argument("bank", type=FILE)
@click.option("--seed", type=int, default=42, show_default=True, help="What the directions are drawn from.")
@click.option("--per-source", type=int, help="Derivatives of each source neuron.  [default: 8]")
@click.option("--gain", "gains", type=float, multiple=True, help="A scale; may be repeated.  [default: 0.5, 1 and 2]")
@output_option
@overwrite_option
@json_option
def derive(
    bank: Path,
    seed: int,
    per_source: int | None,
    gains: tuple[float, ...],
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    from neuroweave.surgery.neurons.bank import check_bank_output, load_bank

    check_bank_output(output, overwrite=overwrite, sources=[bank])
    from neuroweave.surgery.neurons.derive import GAINS, PER_SOURCE, derive_bank

    count = PER_SOURCE if per_source is None else per_source
    derived = derive_bank(load_bank(bank_file(bank)), seed=seed, per_source=count, gains=gains or GAINS)
    finish(derived, output, overwrite, as_json, sources=[bank])


@command.command(
    "show",
    short_help="Show the neurons of a bank, or all about one.",
    help="Show the neurons of BANK (default: the bank that comes with the package), or all about one of them.\n\n"
    "gate, up, down: lengths of the three directions. h = act(gate·x)·(up·x) is a neuron's activation on the text that "
    "was read: its mean size; contribution, that times the length of down; kurtosis, 3 if normal and high if it fires "
    "rarely. open: share of tokens with gate·x > 0. curve: h from the lowest gate·x to the highest, measured, or the "
    "function that it was defined by. fires on: the tokens of its strongest moments.",
)
@click.argument("bank", type=FILE, required=False)
@click.option("--neuron", "name", metavar="NAME", help="Everything about this one.")
@click.option("--figure", metavar="FILE", type=FILE, help="Draw the curves on a page, .png or .svg.")
@click.option("--limit", type=int, default=24, show_default=True, help="How many neurons to show; 0 for all.")
@click.option("--overwrite", is_flag=True, help="Replace the figure if it exists.")
@json_option
def show(bank: Path | None, name: str | None, figure: Path | None, limit: int, overwrite: bool, as_json: bool) -> None:
    from neuroweave.cli import neurons_text
    from neuroweave.surgery.neurons.bank import default_bank, load_bank

    if figure is None and overwrite:
        raise click.UsageError("--overwrite belongs to --figure: nothing else is written")
    if name and given("limit"):
        raise click.UsageError("--limit is for the table of all neurons; --neuron shows one")
    if limit < 0:
        raise ValueError(f"--limit {limit}: expected 0 (all) or more")
    opened = default_bank() if bank is None else load_bank(bank_file(bank))
    title = "the bank of the package" if bank is None else bank.name
    shown = [neurons_text.find_neuron(opened, name)] if name else opened.neurons[: limit or None]
    if figure is not None:
        from neuroweave.surgery.neurons.figures import check_figure, draw_bank

        left_out = f", {len(shown)} of {len(opened)} neurons" if len(shown) < len(opened) else f", {len(shown)} neurons"
        check_figure(figure, overwrite=overwrite, sources=[] if bank is None else [bank])
        draw_bank(shown, figure, title=title + left_out)
    if as_json:
        print_json(neurons_text.as_json(opened, shown))
        return
    if name:
        click.echo("\n".join(neurons_text.about_neuron(opened, shown[0])))
    else:
        click.echo("\n".join(neurons_text.about_bank(opened, title)) + "\n")
        print_table(*neurons_text.table(opened, shown))
        if len(shown) < len(opened):
            note(f"{len(opened) - len(shown)} more: --limit 0 shows all, --neuron NAME everything about one")
    if figure is not None:
        note(f"drawn: {figure}")


def chosen_layers(text: str | None, model: Any) -> list[int] | None:
    """The layers that --layers means in this model, None for all. Raises ValueError for what is no choice of layers."""
    if text is None:
        return None
    from neuroweave.surgery.recipe import layer_selection, select_layers
    from neuroweave.surgery.sites import decoder_stacks

    return select_layers(layer_selection(text), len(decoder_stacks(model)[0]))


def finish(
    bank: Bank, output: Path, overwrite: bool, as_json: bool, *, sources: Sequence[Path], seconds: float | None = None
) -> None:
    """Save a bank, over none of what it was made from, and say so."""
    from neuroweave.surgery.neurons.bank import save_bank

    saved = save_bank(bank, output, overwrite=overwrite, sources=sources)
    size = output.stat().st_size
    if as_json:
        summary: dict[str, Any] = {"output": str(output), "neurons": len(saved), "hidden_size": saved.hidden_size}
        print_json(summary | {"bytes": size, "sha256": saved.sha256, "seconds": seconds and round(seconds, 2)})
        return
    took = f", {seconds:.0f} s" if seconds is not None else ""
    click.echo(
        f"{output}: {counted(len(saved), 'neuron')} of hidden size {saved.hidden_size}, {size / 1e6:.2f} MB{took}"
    )
