"""`neuroweave audit`: list every nonlinearity that a forward pass really runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import json_option, note, print_json, print_table

if TYPE_CHECKING:
    import torch

    from neuroweave.diagnose.audit import AuditResult, Run

TOKENS = 16


@click.command("audit")
@click.argument("model")
@click.option("--forbid", metavar="NAMES", help="Exit 1 if one of these ran, e.g. silu,gelu.")
@click.option("--prompt", metavar="TEXT", help=f"Text to run.  [default: {TOKENS} token ids across the vocabulary]")
@json_option
def command(model: str, forbid: str | None, prompt: str | None, as_json: bool) -> None:
    """List every nonlinearity that a forward pass of MODEL really runs, by module, with counts.

    MODEL is a checkpoint folder or a hub id, patched or not. Operators are traced as they run: an activation that is
    spelled out shows its parts, x * sigmoid(x) shows sigmoid. In --forbid, gelu stands for both flavours, softmax also
    for fused attention; an operator that cannot be seen into breaks every ban. The kind "other" is the arithmetic of
    norms and of rotary positions.
    """
    from neuroweave.checkpoint.loading import load_model
    from neuroweave.diagnose.audit import audit, families

    names = [name.strip() for name in (forbid or "").split(",") if name.strip()]
    if forbid is not None and not names:
        raise ValueError("--forbid names no activation: give some, e.g. silu,gelu, or leave it out")
    families(names)  # a wrong name is told before a model is loaded
    loaded, how = load_model(model)
    if not as_json:
        note(how)
    result = audit(loaded, token_ids(model, loaded, prompt))
    broken = result.forbidden(names)
    if as_json:
        runs = result.to_json()
        wanted = {"forbidden": names, "violations": [asdict(run) for run in broken]} if names else {}
        print_json({"model": model, **runs, **wanted})
    else:
        print_result(result)
        print_verdict(names, broken)
    if broken:
        raise click.exceptions.Exit(1)


def token_ids(source: str, model: Any, prompt: str | None) -> torch.Tensor:
    """One sequence of token ids, `[1, tokens]`: the prompt's, or some from all over the vocabulary."""
    import torch

    from neuroweave.checkpoint.loading import load_tokenizer

    if prompt is None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        return (torch.arange(TOKENS, device=model.device) * vocabulary // TOKENS)[None]
    ids = load_tokenizer(source)(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.numel():
        raise ValueError("--prompt gives no tokens; write some text")
    return ids


def print_result(result: AuditResult) -> None:
    """A line for each operation in modules of the same place; layers that do the same share it."""
    rows = [(kind, operation, modules, count) for modules, operation, kind, count in grouped(result.runs)]
    rows.sort(key=lambda row: ("activation", "opaque", "other").index(row[0]))
    print_table(["kind", "operation", "module", "runs"], rows)
    totals = ", ".join(f"{name} {count}" for name, count in sorted(result.totals().items()))
    click.echo(f"\nactivations: {totals or 'none'}")


def print_verdict(names: list[str], broken: tuple[Run, ...]) -> None:
    if not names:
        return
    for modules, operation, kind, count in grouped(broken):
        hidden = " and cannot be seen into" if kind == "opaque" else ""
        click.echo(f"forbidden: {operation} ran {count} times in {modules}{hidden}")
    if not broken:
        click.echo(f"none of {', '.join(names)} ran")


def grouped(runs: Iterable[Run]) -> list[tuple[str, str, str, int]]:
    """(modules, operation, kind, runs) with the numbers in paths drawn together: `model.layers.0-29.mlp.act_fn`."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((re.sub(r"\d+", "#", run.module), run.operation, run.kind), []).append(run)
    return [
        (together([run.module for run in same]), operation, kind, sum(run.count for run in same))
        for (_, operation, kind), same in groups.items()
    ]


def together(paths: list[str]) -> str:
    """Paths that differ in numbers only, as one; `(model)` for the model itself."""
    columns = zip(*(re.split(r"(\d+)", path) for path in paths), strict=True)
    return "".join(ranges(column) if column[0].isdigit() else column[0] for column in columns) or "(model)"


def ranges(numbers: Iterable[str]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    spans: list[list[int]] = []
    for number in sorted({int(text) for text in numbers}):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
