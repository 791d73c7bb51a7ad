"""`neuroweave fuse`: fuse deltas into a checkpoint of any size, or say what that would do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import (
    as_typed,
    bank_file,
    counted,
    errors_as_typed,
    given,
    json_option,
    layers_option,
    note,
    overwrite_option,
    print_json,
    print_table,
    progress,
    resumable,
)

if TYPE_CHECKING:
    from neuroweave.surgery.fusion.plan import FuseOptions

OF_THE_DELTAS = ("weights covered", "relative change of these", "of these that change")


@click.command(
    help="""Fuse synthetic neurons into the checkpoint MODEL; OUTPUT is a checkpoint that loads like the original.

    The deltas come from a folder (`neuroweave deltas` makes one) or are generated on the way from a bank and a seed,
    with the same bytes. Tensors that are not targeted, and every other file, come along to the byte.

    \b
    neuroweave fuse --model DIR --weights generated_weights --output OUT
    neuroweave fuse --model DIR --bank derived.safetensors --seed 42 --output OUT --layers 5 11 17
    neuroweave fuse --model DIR --weights generated_weights --dry-run
    """
)
@click.option("--model", required=True, help="The checkpoint: a folder or a hub id.")
@click.option("--weights", type=click.Path(path_type=Path), help="A folder of deltas.")
@click.option(
    "--bank",
    type=click.Path(path_type=Path),
    help="Generate the deltas on the way from this neuron bank (`default`: the shipped one).",
)
@click.option("--output", type=click.Path(path_type=Path), help="The folder to write. Not needed with --dry-run.")
@click.option("--alpha", type=float, default=0.02, show_default=True, help="Strength of the update of down_proj.")
@click.option(
    "--alpha-mode", type=click.Choice(["seed", "relative", "plain"]), default="seed", show_default=True,
    help="What alpha means. seed: alpha * std(W) / std(D); relative: the relative change has standard deviation alpha; "
    "plain: the delta times alpha.",
)  # fmt: skip
@click.option("--gamma-cap", type=float, default=0.05, show_default=True, help="Largest relative change of a gate.")
@click.option(
    "--mode", type=click.Choice(["contour", "additive", "append"]), default="contour", show_default=True,
    help="contour: the update follows the weights' own profile; additive: plain addition; append: new neurons.",
)  # fmt: skip
@click.option(
    "--targets", default="gate,down", show_default=True, metavar="NAMES",
    help="What changes, joined by commas: gate, down; for additive up as well, or all: every tensor of the deltas.",
)  # fmt: skip
@click.option("--gain", type=float, default=0.0, show_default=True, help="For append: factor of the new down columns.")
@layers_option
@click.option(
    "--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", show_default=True,
    help="To bfloat16 or float16; stochastic is unbiased, so that small updates survive on average.",
)  # fmt: skip
@click.option("--seed", type=int, default=42, show_default=True, help="For --bank and --rounding stochastic.")
@click.option("--neurons", type=int, help="With --bank: generate only that many neurons a layer.")
@click.option("--gate-scale", type=float, help="With --bank: root mean square of a gate delta's rows (see deltas).")
@click.option("--workers", type=int, help="Threads. Default: one a core, at most 4. The bytes do not depend on it.")
@click.option("--no-hash", is_flag=True, help="Do not hash what goes in and what comes out (faster; verify has less).")
@click.option("--copy", is_flag=True, help="Copy the shards that do not change instead of hard-linking them.")
@click.option("--dry-run", is_flag=True, help="Write nothing; report what would happen. Exit 1 if the fuse would fail.")
@overwrite_option
@json_option
def command(
    model: str, weights: Path | None, bank: Path | None, output: Path | None, targets: str, dry_run: bool,
    workers: int | None, no_hash: bool, copy: bool, overwrite: bool, as_json: bool, neurons: int | None,
    gate_scale: float | None, **numbers: Any,
) -> None:  # fmt: skip
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: starting threads of no use here takes time
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.surgery.fusion.plan import FuseOptions

    if output is None and not dry_run:
        raise click.UsageError("--output is needed (or --dry-run)")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is at least 1, got {workers}")
    chosen = tuple(part.strip() for part in targets.split(",") if part.strip())
    with errors_as_typed("targets", *numbers):
        options = FuseOptions(targets=chosen, **numbers)
    refuse_without_effect(options, weights is not None)
    folder = local_folder(model)
    deltas = delta_input(weights, bank, folder, options.seed, neurons, gate_scale)
    if dry_run:
        show_plan(folder, output, deltas, options, as_json=as_json, overwrite=overwrite, copy=copy)
        return
    from neuroweave.surgery.fusion.fuse import fuse_checkpoint

    assert output is not None
    with resumable(), progress("fusing") as report:
        result = fuse_checkpoint(
            folder, output, deltas, options, hashed=not no_hash, workers=workers, copy=copy, overwrite=overwrite,
            progress=report,
        )  # fmt: skip
    show_result(result, output, options, deltas.may_round_away(options), as_json=as_json)


def refuse_without_effect(options: FuseOptions, stored: bool) -> None:
    """Raise UsageError for options that were typed and would change nothing. `stored`: the deltas are in a folder."""
    contour, append = options.mode == "contour", options.mode == "append"
    reasons = {
        "gain": "" if append else f"it is for --mode append, this is {options.mode}",
        "gamma_cap": "" if contour and "gate" in options.targets else "it caps gates, in --mode contour",
        "seed": "a folder of deltas has its own" if stored and options.rounding == "nearest" else "",
    }
    if append:
        reasons |= dict.fromkeys(("alpha", "alpha_mode", "rounding"), "--mode append leaves the weights as they are")
        reasons["targets"] = "--mode append brings whole neurons: gate, up and down"
    elif contour and "down" not in options.targets:
        reasons |= dict.fromkeys(
            ("alpha", "alpha_mode"), "in --mode contour it is for down, which --targets leaves out"
        )
    for option in given(*(name for name, reason in reasons.items() if reason)):
        reason = next(reason for name, reason in reasons.items() if as_typed(name) == option)
        raise click.UsageError(f"{option} would have no effect: {reason}; leave it out")


def delta_input(
    weights: Path | None, bank: Path | None, model: Path, seed: int, neurons: int | None, gate_scale: float | None
) -> Any:
    """The deltas that the options mean: a folder, or a bank and a seed."""
    from neuroweave.surgery.fusion.fuse import stored_deltas

    if (weights is None) == (bank is None):
        raise click.UsageError("give either --weights (a folder of deltas) or --bank (and --seed)")
    if weights is not None:
        if neurons is not None or gate_scale is not None:
            raise click.UsageError("--neurons and --gate-scale belong to --bank; a folder of deltas has its own")
        return stored_deltas(weights)
    from neuroweave.surgery.fusion.generated import generated_deltas
    from neuroweave.surgery.neurons.bank import default_bank_path

    assert bank is not None
    bank = default_bank_path() if str(bank) == "default" else bank_file(bank)
    scale = {} if gate_scale is None else {"gate_scale": gate_scale}
    return generated_deltas(model, bank, seed=seed, neurons=neurons, **scale)


def show_plan(
    folder: Path, output: Path | None, deltas: Any, options: Any, *, as_json: bool, overwrite: bool, copy: bool
) -> None:
    from neuroweave.surgery.fusion.dry_run import dry_run

    found = dry_run(folder, output, deltas, options, overwrite=overwrite, copy=copy)
    if as_json:
        print_json(found)
    else:
        changed = sum(row["changed"] > 0 for row in found["tensors"])
        click.echo(
            f"{folder}: {counted(found['model']['tensors'], 'tensor')} in "
            f"{counted(len(found['model']['shards']), 'shard')}, index sound; "
            f"{changed} would change ({found['bytes_rewritten'] / 1e9:.2f} GB to write)"
        )
        if found["tensors"]:
            click.echo()
            print_table(
                ("layer", "projection", *OF_THE_DELTAS, "tensor"),
                (
                    (
                        "" if row["layer"] is None else row["layer"], row["projection"], f"{row['coverage']:.1%}",
                        f"{row['relative_change']:.3g}", f"{row['share_changed']:.1%}", row["name"],
                    )
                    for row in found["tensors"]
                ),
            )  # fmt: skip
            if options.mode != "append":
                click.echo("estimated from up to 16 x 2,048 weights of each tensor")
        for text in found["notes"]:
            note(text)
        for text in found["problems"]:
            note(f"problem: {text}")
    if found["problems"]:
        raise click.exceptions.Exit(1)


def show_result(result: Any, output: Path, options: Any, may_round_away: bool, *, as_json: bool) -> None:
    from neuroweave.surgery.fusion.estimate import rounding_warnings

    rows = [
        {"projection": projection, **summed([each for each in result.tensors if each.projection == projection])}
        for projection in ("gate", "up", "down", "other")
        if any(each.projection == projection for each in result.tensors)
    ]
    appended = options.mode == "append"
    warnings = [*result.plan.notes, *(rounding_warnings(result.tensors, result.plan.dtypes) if may_round_away else [])]
    if as_json:
        shards = {"rewritten": result.rewritten, "linked": result.linked, "copied": result.copied}
        shards["resumed"] = result.resumed
        print_json({"folder": str(output), "shards": shards, "notes": warnings, "tensors": result.manifest["tensors"]})
        return
    if appended:
        gates = [target for target in result.plan.targets if target.projection == "gate"]
        grown = sorted({(each.stored.shape[0], each.stored.shape[0] + each.delta.shape[0]) for each in gates})
        sizes = ", ".join(f"{before} to {after}" for before, after in grown)
        click.echo(f"{output}: neurons appended to {len(gates)} layers: {sizes}, gain {options.gain:g}")
    else:
        changed = sum(each.changed > 0 for each in result.tensors)
        of_all = "" if changed == len(result.tensors) else f" of {len(result.tensors)} that deltas cover"
        click.echo(f"{output}: {options.mode}, {counted(changed, 'tensor')} changed{of_all}")
        print_table(
            ("projection", "tensors", *OF_THE_DELTAS),
            ((row["projection"], row["tensors"], row["covered"], row["change"], row["share"]) for row in rows),
        )
        if any(each.coverage < 1 for each in result.tensors):
            click.echo(partial(result.tensors))
    parts = [(result.rewritten, "rewritten"), (result.linked, "hard-linked"), (result.copied, "copied")]
    parts += [(result.resumed, "taken over from an interrupted run")]
    click.echo("shards: " + ", ".join(f"{number} {how}" for number, how in parts if number))
    for text in warnings:
        note(text)


def summed(reports: list[Any]) -> dict[str, Any]:
    """A row of the table, for the tensors of one projection."""
    share = sum(each.changed for each in reports) / max(1, sum(each.count for each in reports))
    return {
        "tensors": len(reports),
        "covered": span([f"{each.coverage:.1%}" for each in sorted(reports, key=lambda each: each.coverage)]),
        "change": span([f"{each:.3g}" for each in sorted(each.relative_change for each in reports)]),
        "share": f"{share:.1%}",
    }


def span(texts: list[str]) -> str:
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def partial(reports: list[Any]) -> str:
    """What partial deltas mean for whole tensors."""
    weights = sum(each.count / each.coverage for each in reports)
    covered, changed = sum(each.count for each in reports) / weights, sum(each.changed for each in reports) / weights
    return (
        f"the deltas cover {covered:.1%} of the weights of these tensors, the rest is as it was: "
        f"{changed:.1%} of all their weights changed"
    )
