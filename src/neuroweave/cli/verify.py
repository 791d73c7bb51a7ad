"""`neuroweave verify`: is a checkpoint whole and sound."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import counted, json_option, note, print_json, print_table, progress

if TYPE_CHECKING:
    from neuroweave.checkpoint.verification import Finding, Verification

_ROWS = 50  # of a table for people; --json has them all


@click.command(
    "verify",
    help="Check a checkpoint: the folder (or hub id, or one .safetensors file) PATH.\n\n"
    "Headers against files, index against shards, config.json's sizes against the tensors, no NaN or infinite value, "
    "and the size and SHA-256 of every file that the folder's manifest, or its download from the hub, knows. Exits 1 "
    "when there is a problem; warnings and notes are printed but do not count.",
)
@click.argument("path")
@click.option("--no-hash", is_flag=True, help="Compute no SHA-256; sizes are still compared.")
@click.option("--no-values", is_flag=True, help="Do not look for NaN and infinite values.")
@click.option("--threads", type=click.IntRange(1, 64), help="Files read at a time (default: processors, at most 4).")
@json_option
def command(path: str, no_hash: bool, no_values: bool, threads: int | None, as_json: bool) -> None:
    from neuroweave.checkpoint.hub import local_folder
    from neuroweave.checkpoint.verification import verify_checkpoint

    place = Path(path) if Path(path).is_file() else local_folder(path)
    with progress("verify") as report:
        found = verify_checkpoint(
            place, hashed=not no_hash, values=not no_values, threads=threads, progress=report
        )  # fmt: skip
    if as_json:
        print_json(_as_dict(found))
    else:
        _show(found)
    if not found.sound:
        raise click.exceptions.Exit(1)


def _as_dict(found: Verification) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "sound": found.sound,
        "tensors": found.tensors,
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "files": found.files,
        "known_hashes": {"source": found.source or None, "equal": found.matched},
        "values_checked": found.values,
        "findings": [asdict(finding) for finding in found.findings],
    }


def _show(found: Verification) -> None:
    problems = found.at("problem")
    if problems:
        print_table(("problem", "file", "tensor", "what"), [_row(finding) for finding in problems[:_ROWS]])
        if len(problems) > _ROWS:
            click.echo(f"and {len(problems) - _ROWS} more problems (--json lists all)")
        click.echo()
    for level in ("warning", "note"):
        findings = found.at(level)
        for finding in findings[:_ROWS]:
            where = ": ".join(part for part in (finding.file, finding.tensor) if part)
            note(f"{level}: {where}{': ' if where else ''}{finding.text}")
        if len(findings) > _ROWS:
            note(f"and {len(findings) - _ROWS} more {level}s (--json lists all)")
    click.echo(_summary(found, len(problems)))


def _row(finding: Finding) -> tuple[str, str, str, str]:
    return (finding.kind, finding.file, finding.tensor, finding.text)


def _summary(found: Verification, problems: int) -> str:
    verdict = f"not sound: {counted(problems, 'problem')};" if problems else "sound:"
    size = f"{found.nbytes / 1e9:.2f} GB" if found.nbytes >= 1e9 else f"{found.nbytes / 1e6:.1f} MB"
    parts = [f"{counted(found.tensors, 'tensor')} in {counted(len(found.files), 'file')}, {size}"]
    if found.values and not problems:
        parts.append("every value finite")
    if found.matched:
        parts.append(f"SHA-256 of {counted(found.matched, 'file')} as in {found.source}")
    return f"{verdict} {'; '.join(parts)}"
