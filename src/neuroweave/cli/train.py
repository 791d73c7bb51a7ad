"""`neuroweave train`: train a model as a YAML file says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from neuroweave.cli.console import json_option, note, print_json, progress, require_jax

PRESETS = ("laptop", "published")


@click.command(
    "train",
    help="""Train NeuroBLAST or any causal language model, fresh or continued, as CONFIG.yaml says.

    \b
    neuroweave train --init laptop > run.yaml        # every field, described
    neuroweave train run.yaml --dry-run
    neuroweave train run.yaml --set training.steps=200
    torchrun --nproc-per-node 8 -m neuroweave train run.yaml

    The same command goes on after Ctrl-C, a kill or a full disk, with the very next sample.""",
)
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--init", type=click.Choice(PRESETS), help="Print a commented configuration and stop.")
@click.option("--set", "settings", metavar="A.B=VALUE", multiple=True, help="A field, over what the file says.")
@click.option("--backend", type=click.Choice(["torch", "jax"]), default="torch", show_default=True)
@click.option("--resume/--fresh", default=None, help="Insist on a checkpoint, or start anew and drop those there are.")
@click.option("--dry-run", is_flag=True, help="Tokenise and check everything, say what would happen, train nothing.")
@json_option
def command(
    config: Path | None, init: str | None, settings: tuple[str, ...], backend: str, resume: bool | None,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    from neuroweave.training.configuration import commented_configuration, read_configuration

    if init is not None:
        click.echo(commented_configuration(init), nl=False)
        return
    if config is None:
        raise click.UsageError("CONFIG is missing; neuroweave train --init laptop prints one to begin with")
    configuration = read_configuration(config, settings)
    from transformers.utils import logging

    from neuroweave.training.outcome import TrainPlan
    from neuroweave.training.run_folder import held

    logging.disable_progress_bar()
    prepare, train, is_first = functions_of(backend)
    main = is_first()

    def say_plan(plan: TrainPlan) -> None:
        click.echo(
            f"{plan.parameters:,} parameters on {plan.processes} x {plan.device}, {plan.precision}: "
            f"{plan.steps:,} steps, {plan.tokens:,} tokens, "
            + ("streamed" if plan.epochs is None else f"{plan.epochs:.2f} epochs of {plan.rows:,} rows")
        )
        click.echo(
            f"  weights, gradients and optimizer take {plan.state_bytes / 1e9:.2f} GB, a checkpoint "
            f"{plan.checkpoint_bytes / 1e9:.2f} GB; {plan.held_out_rows} held-out rows"
        )

    with progress("tokenising") if main else contextlib.nullcontext() as tokenising:
        if dry_run:
            plan = prepare(configuration, note=note, progress=tokenising).plan
            if main:
                print_json(plan.as_dict()) if as_json else say_plan(plan)
            return
        report = note if as_json else click.echo
        with held(configuration.output.folder) if main and backend == "torch" else contextlib.nullcontext():
            result = train(
                configuration,
                resume=resume,
                report=report,
                note=note,
                progress=tokenising,
            )
    if not main:
        return
    if as_json:
        print_json(result.as_dict())
        return
    held_out = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.4f}"
    click.echo(
        f"{result.model}: {result.plan.steps:,} steps in {result.seconds:.0f} s, loss {result.loss:.4f}{held_out}"
    )


def functions_of(backend: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[[], bool]]:
    """(prepare, train, whether this is the first process). Raises ValueError where the backend is not installed."""
    if backend == "torch":
        from neuroweave.training.agreement import is_first
        from neuroweave.training.train import prepare, train

        return prepare, train, is_first
    require_jax()
    from neuroweave.training import jax_processes
    from neuroweave.training.jax_loop import prepare_with_jax, train_with_jax

    jax_processes.join_processes(tell=note)
    return prepare_with_jax, train_with_jax, jax_processes.is_first
