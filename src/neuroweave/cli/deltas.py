"""`neuroweave deltas`: generate delta weights for a model from a bank of neurons and a seed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import (
    bank_file,
    counted,
    json_option,
    layers_option,
    note,
    overwrite_option,
    print_json,
    print_table,
    progress,
)

if TYPE_CHECKING:
    from neuroweave.surgery.neurons.delta_plan import DeltaLayer, DeltaPlan


@click.command(
    "deltas",
    help="""Generate delta weights for the gated MLPs of a model, in sign-symmetric pairs, from a bank of neurons.

    The second neuron of a pair is the first with the sign turned, so that a pair's output is odd in its input and adds
    no mean. The same bank, model and seed give the same bytes on any machine. `neuroweave fuse` applies them.

    \b
    neuroweave deltas --base-model MODEL --output-dir generated_weights --seed 42
    neuroweave deltas --base-model MODEL --bank bank.safetensors --dry-run
    """,
)
@click.option("--base-model", required=True, metavar="MODEL", help="The model to fit: a folder or a hub id.")
@click.option("--output-dir", type=click.Path(path_type=Path), metavar="DIR", help="The folder to write.")
@click.option(
    "--bank", "bank_path", type=click.Path(path_type=Path), metavar="FILE",
    help="A neuron bank. Default: the one that comes with the package.",
)  # fmt: skip
@click.option("--seed", type=int, default=42, show_default=True, help="What order and directions are drawn from.")
@layers_option
@click.option("--neurons", type=int, metavar="N", help="Deltas for the first N neurons of each layer only.")
@click.option(
    "--gate-scale", type=float, metavar="X",
    help="Root mean square of a gate row (at gain 1), an up row, a down column (at weight 1).  [default: 0.02]",
)  # fmt: skip
@click.option(
    "--symmetry", type=click.Choice(["signs", "one-sided"]), default="signs", show_default=True,
    help="one-sided: the second of a pair equals the first; for comparison.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Instead of the target's own.")
@click.option("--workers", type=int, metavar="N", help="Threads; the bytes do not depend on it. Default: one a core.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, from headers alone.")
@overwrite_option
@json_option
def command(
    base_model: str, output_dir: Path | None, bank_path: Path | None, gate_scale: float | None, workers: int | None,
    dry_run: bool, overwrite: bool, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.checkpoint.staging import check_free_space, check_output
    from neuroweave.surgery.neurons.bank import default_bank, load_bank
    from neuroweave.surgery.neurons.deltas import GATE_SCALE, plan_deltas, write_deltas

    if output_dir is None and not dry_run:
        raise click.UsageError("give --output-dir, the folder to write, or --dry-run")
    folder = local_folder(base_model)
    if output_dir is not None:
        check_output(output_dir, overwrite=overwrite, sources=[folder, *([bank_path] if bank_path else [])])
    bank = default_bank() if bank_path is None else load_bank(bank_file(bank_path))
    settings["gate_scale"] = GATE_SCALE if gate_scale is None else gate_scale
    if dry_run:
        plan = plan_deltas(folder, bank, **settings)
        if output_dir is not None:
            check_free_space(output_dir, plan.nbytes)
        show(plan, None, as_json=as_json)
        return
    assert output_dir is not None
    with progress("deltas") as report:
        plan = write_deltas(
            folder, bank, output_dir, **settings, workers=workers, overwrite=overwrite, progress=report
        )  # fmt: skip
    show(plan, output_dir, as_json=as_json)


def show(plan: DeltaPlan, written: Path | None, *, as_json: bool) -> None:
    """The plan, as a table of layers (equal neighbours together) and one of fits."""
    if as_json:
        print_json({"output": None if written is None else str(written), **plan.to_dict()})
        return
    size = f"{plan.nbytes / 1e9:.2f} GB" if plan.nbytes >= 1e9 else f"{plan.nbytes / 1e6:.2f} MB"
    what = "would be written" if written is None else f"written to {written}"
    click.echo(f"{counted(len(plan.specs), 'tensor')} for {counted(len(plan.layers), 'layer')}, {size}: {what}\n")
    print_table(("layers", "attention", "activation", "neurons", "pairs", "dtype", "MB"), layer_rows(plan))
    if plan.realised:
        click.echo()
        rows = [
            (
                each.name,
                each.neurons,
                each.activation,
                len(each.fit.gains),
                f"{each.fit.error:.4f}",
                f"{each.tolerance:g}",
            )
            for each in plan.realised
        ]
        print_table(("behaviour of", "neurons", "activation", "pairs each", "error", "tolerance"), rows)
    for reason in sorted(set(plan.left_out.values())):
        layers = [str(layer) for layer, why in plan.left_out.items() if why == reason]
        note(f"left out, {reason}: layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}")


def layer_rows(plan: DeltaPlan) -> list[tuple[Any, ...]]:
    """A row for each run of equal layers: the layers, and what one of them has. Slots that nothing fits may differ."""
    groups: list[tuple[list[DeltaLayer], tuple[Any, ...]]] = []
    for layer in plan.layers:
        dtypes = "/".join(dict.fromkeys(spec.dtype for spec in layer.specs.values()))
        row = (layer.kind, layer.activation, layer.neurons, dtypes, f"{layer.nbytes / 1e6:.2f}")
        if groups and groups[-1][1] == row and groups[-1][0][-1].layer == layer.layer - 1:
            groups[-1][0].append(layer)
        else:
            groups.append(([layer], row))
    return [
        (_span(each.layer for each in run), *row[:3], _span(each.pairs for each in run), *row[3:])
        for run, row in groups
    ]


def _span(numbers: Iterable[int]) -> str:
    known = sorted(numbers)
    return str(known[0]) if known[0] == known[-1] else f"{known[0]}-{known[-1]}"
