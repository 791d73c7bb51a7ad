"""`neuroweave compare`: measure what a change did to a model; write comparison.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neuroweave.cli.console import json_option, note, overwrite_option, print_json, print_table

if TYPE_CHECKING:
    from neuroweave.diagnose import Comparison, Plan, Subject

MEMORY_SHARE = 0.7  # of the memory that is free, for weights; the rest is for what they compute


@click.command(
    help="""Measure what a change did to a model; write a report.

    BASE and each OTHER are checkpoint folders or hub ids. All models read the same tokens; every difference comes with
    a 95 % interval over passages of text. DIR gets comparison.json and report.html (one file, opens offline)."""
)
@click.argument("base")
@click.argument("others", metavar="OTHER [MORE ...]", nargs=-1, required=True)
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where the report goes.")
@click.option(
    "--data",
    multiple=True,
    metavar="TEXT",
    type=click.Path(path_type=Path),
    help="A text file or a folder of them; may be repeated. Default: the shipped evaluation text.",
)
@click.option("--tokens", type=int, help="Tokens of text to measure on, at most.  [default: 8192]")
@click.option("--window", type=int, help="Tokens per forward pass.  [default: 512]")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--no-speed", is_flag=True, help="Do not measure tokens per second.")
@click.option(
    "--prompts",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Texts to be continued by every model, one a line. Default: three that are built in.",
)
@json_option
@overwrite_option
def command(
    base: str,
    others: Sequence[str],
    out: Path,
    data: Sequence[Path],
    tokens: int | None,
    window: int | None,
    dtype: str,
    no_speed: bool,
    prompts: Path | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    from neuroweave.checkpoint.staging import staged_folder
    from neuroweave.diagnose import compare, require_report_extra, write_report
    from neuroweave.text import documents, read_documents

    require_report_extra()
    plan = make_plan(tokens, window, no_speed, prompts)
    texts = read_documents(data) if data else documents("evaluation")
    names = name_models([base, *others])
    local = [source for source in (base, *others) if Path(source).is_dir()]
    with staged_folder(out, overwrite=overwrite, sources=local) as folder:
        together = fits_in_memory([base, *others], dtype)
        if not together:
            note("the models do not fit in memory together: they are measured one after the other")
        subject = load_subject(base, names[0], dtype)
        more = load_subjects(others, names[1:], dtype)
        comparison = compare(subject, more, texts, plan=plan, together=together)
        comparison.write(folder / "comparison.json")
        write_report(comparison, folder / "report.html")
    if as_json:
        print_json(json.loads(comparison.model_dump_json()))
    else:
        print_summary(comparison)
        note(f"wrote {out / 'report.html'} and comparison.json")


def make_plan(tokens: int | None, window: int | None, no_speed: bool, prompts: Path | None) -> Plan:
    """The plan with what was given on the command line. Raises ValueError for what it does not allow."""
    from pydantic import ValidationError

    from neuroweave.diagnose import Plan

    given = {"tokens": tokens, "window": window, "prompts": None if prompts is None else read_prompts(prompts)}
    settings: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    if no_speed:
        settings["speed"] = None
    try:
        return Plan.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"]))
        raise ValueError(f"--{option} {first['input']}: {first['msg'].lower()}") from error


def read_prompts(file: Path) -> tuple[str, ...]:
    """One prompt a line; empty lines are refused where they stand between others."""
    try:
        lines = file.read_text(encoding="utf-8").strip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: the prompts cannot be read ({error}); give a UTF-8 text, one prompt a line"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{file}, line {number}: an empty prompt; a model needs something to continue")
    return tuple(lines)


def name_models(sources: Sequence[str]) -> list[str]:
    """Short names that tell the models apart: the last part of each source, or all of it where that is not enough.

    A source that is given twice is numbered.
    """
    short = [Path(source).name or source for source in sources]
    meant = {name: {source for source, other in zip(sources, short, strict=True) if other == name} for name in short}
    names = [name if len(meant[name]) == 1 else source for source, name in zip(sources, short, strict=True)]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:at].count(name) + 1})" for at, name in enumerate(names)
    ]


def load_subject(source: str, name: str, dtype: str) -> Subject:
    from neuroweave.checkpoint.loading import load_model, load_tokenizer
    from neuroweave.diagnose import Subject

    tokenizer = load_tokenizer(source)
    model, how = load_model(source, dtype=dtype)
    note(f"{name}: {how}")
    return Subject(name, model, tokenizer, source)


def load_subjects(sources: Sequence[str], names: Sequence[str], dtype: str) -> Iterator[Subject]:
    for source, name in zip(sources, names, strict=True):
        yield load_subject(source, name, dtype)


def fits_in_memory(sources: Sequence[str], dtype: str) -> bool:
    """Whether the weights of all local folders fit in the free memory at once; unknown sizes count as fitting."""
    import torch

    meminfo = Path("/proc/meminfo")
    if torch.cuda.is_available():
        free = float(torch.cuda.mem_get_info()[0])
    elif meminfo.is_file():
        available = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")]
        free = 1024.0 * int(available[0]) if available else float("inf")
    else:
        return True
    weights = sum(file.stat().st_size for source in sources for file in Path(source).glob("*.safetensors"))
    widened = 2 if dtype in ("auto", "float32") else 1  # bf16 files may be computed in float32
    return weights * widened <= MEMORY_SHARE * free


def print_summary(comparison: Comparison) -> None:
    """The table of all models, then the verdict on each."""
    from neuroweave.diagnose import verdict

    print_table(*verdict.summary(comparison))
    for other in comparison.others:
        click.echo(f"\n{other.model.name}")
        for sentence in verdict.sentences(comparison, other):
            click.echo(f"  {sentence}")
    for remark in comparison.notes:
        note(f"note: {remark}")
