"""`neuroweave compare`: measure what a change did to a model; write comparison.json and report.html."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave import __version__
from neuroweave.checkpoint.manifest import stamp
from neuroweave.cli.console import json_option, note, overwrite_option, print_json, print_table

if TYPE_CHECKING:
    from neuroweave.diagnose import Comparison, Plan, Subject
    from neuroweave.diagnose.ledger import Ledger
    from neuroweave.text import Document

OUTPUTS = ("comparison.json", "report.html", "figures")
MEMORY_SHARE = 0.7  # of the memory that is free, for weights; the rest is for what they compute


@click.command(
    help="""Measure what a change did to a model; write a report.

    BASE and each OTHER are checkpoint folders or hub ids. All models read the same tokens; every difference comes with
    a 95 % interval over passages of text. DIR gets comparison.json, report.html (one file, opens offline) and the
    figures. A run that was stopped is taken up again by the same command."""
)
@click.argument("base")
@click.argument("others", metavar="OTHER [MORE ...]", nargs=-1, required=True)
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where the report goes.")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE|FOLDER",
    type=click.Path(path_type=Path),
    help="A text file or a folder of them; may be repeated. Default: the shipped evaluation text.",
)
@click.option("--tokens", type=int, help="Tokens of text to measure on, at most.  [default: 8192]")
@click.option("--window", type=int, help="Tokens per forward pass.  [default: 512]")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--no-signal", is_flag=True, help="Leave out norms and sparsity by layer.")
@click.option("--no-gradients", is_flag=True, help="Leave out gradients.")
@click.option("--no-sampling", is_flag=True, help="Leave out sampled continuations; greedy ones stay.")
@click.option("--no-weights", is_flag=True, help="Leave out the comparison of weights.")
@click.option("--no-speed", is_flag=True, help="Do not measure tokens per second.")
@click.option(
    "--tasks",
    multiple=True,
    metavar="TASK",
    help="A benchmark: a shipped one (neuroweave_continuation), one of lm-evaluation-harness, or a task file. May be "
    'repeated. Needs pip install "neuroweave[eval]".',
)
@click.option("--limit", type=int, metavar="N", help="Questions per benchmark, at most.")
@click.option(
    "--prompts",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Texts to be continued by every model, one a line. Default: three that are built in.",
)
@click.option("--card", is_flag=True, help="Write a model card for each changed model into DIR.")
@click.option("--one-by-one", is_flag=True, help="Keep one model in memory at a time, also where more would fit.")
@json_option
@overwrite_option
def command(
    base: str, others: Sequence[str], out: Path, data: Sequence[Path], dtype: str, card: bool, one_by_one: bool,
    as_json: bool, overwrite: bool, **measured: Any,
) -> None:  # fmt: skip
    from neuroweave.diagnose import require_report_extra
    from neuroweave.text import documents, read_documents

    require_report_extra()
    plan = make_plan(**measured)
    texts = read_documents(data) if data else documents("evaluation")
    sources = [base, *others]
    names = name_models(sources)
    check_outputs(out, overwrite=overwrite)
    check_beforehand(sources, names, texts, plan)
    together = not one_by_one and fits_in_memory(sources, dtype)
    job = Job(sources, names, dtype, plan, texts, together)
    comparison = job.write(out, card=card, overwrite=overwrite)
    if as_json:
        print_json(json.loads(comparison.model_dump_json()))
    else:
        print_summary(comparison)
        note(f"wrote {out / 'report.html'}, comparison.json and figures")
    if comparison.failures:
        raise SystemExit(1)


@dataclass(frozen=True)
class Job:
    """One comparison of models from folders or a hub."""

    sources: Sequence[str]
    names: Sequence[str]
    dtype: str
    plan: Plan
    texts: Sequence[Document]
    together: bool

    def write(self, out: Path, *, card: bool, overwrite: bool) -> Comparison:
        from neuroweave.checkpoint.staging import staged_folder
        from neuroweave.diagnose.ledger import Ledger

        local = [source for source in self.sources if Path(source).is_dir()]
        with (
            kept_on_failure(),
            staged_folder(out, overwrite=overwrite, sources=local, resume=self.key()) as folder,
            stopped_on_failure(ledger := Ledger(folder)),
        ):
            if ledger.holds_any:
                note("going on with what an interrupted run has measured")
            comparison = self.measure(ledger)
            write_outputs(comparison, folder, card=card)
            ledger.remove()
        return comparison

    def measure(self, ledger: Ledger) -> Comparison:
        from neuroweave.diagnose import compare
        from neuroweave.diagnose.experiment import compare_one_by_one

        loaders = [
            functools.partial(load_subject, source, name, self.dtype)
            for source, name in zip(self.sources, self.names, strict=True)
        ]
        if self.together:
            base, *others = (load() for load in loaders)
            return compare(base, others, self.texts, plan=self.plan, ledger=ledger)
        note("the models are loaded and measured one after the other")
        return compare_one_by_one(loaders, self.texts, plan=self.plan, ledger=ledger)

    def key(self) -> str:
        """Sixteen digits that change with everything that the measurement depends on."""
        files = [
            [str(path), stamp(path)]
            for source in self.sources
            for path in sorted(Path(source).glob("*"))
            if path.is_file()
        ]
        text = hashlib.sha256("\0".join(document.text for document in self.texts).encode()).hexdigest()
        state = [__version__, list(self.sources), self.dtype, self.plan.model_dump(), files, text, self.together]
        state.append(task_state(self.plan))
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


@contextmanager
def stopped_on_failure(ledger: Ledger) -> Iterator[None]:
    """A failure inside (a full disk, say) leaves as SystemExit, for which a resumable folder is kept, if it holds what
    has been measured."""
    try:
        yield
    except Exception as error:
        if not ledger.holds_any:
            raise
        raise SystemExit(2) from error


@contextmanager
def kept_on_failure() -> Iterator[None]:
    """The failure of `stopped_on_failure` as it was, with a word about what is kept."""
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__cause__, Exception):
            raise
        note("what was measured until now is kept; the same command goes on with it")
        raise stop.__cause__ from None


def check_outputs(out: Path, *, overwrite: bool) -> None:
    """Raise ValueError when `out` holds what no comparison wrote, which --overwrite would take away."""
    from neuroweave.diagnose.report.card import is_card

    if not overwrite or not out.is_dir():
        return
    for path in sorted(out.iterdir()):
        own = path.name in OUTPUTS or (path.match("README*.md") and is_card(path))
        if not own:
            raise ValueError(
                f"{path}: not written by a comparison, and --overwrite replaces the whole folder; move it away, or "
                "choose another folder"
            )


def check_beforehand(sources: Sequence[str], names: Sequence[str], texts: Sequence[Document], plan: Plan) -> None:
    """Raise ValueError or ImportError for whatever would stop the comparison after hours of it."""
    from neuroweave.diagnose.preflight import check_models, check_tasks, outline

    check_models([outline(*each) for each in zip(sources, names, strict=True)], texts, plan)
    if plan.tasks is not None:
        check_tasks(plan.tasks, seed=plan.seed)


def task_state(plan: Plan) -> list[Any]:
    """What changes when a task file or its data does."""
    from neuroweave.diagnose.probes.task_files import find_tasks

    if plan.tasks is None:
        return []
    found = find_tasks(plan.tasks.names).files
    data = [Path(word) for file in found for word in texts_in(file.data)]
    return [[str(path), stamp(path)] for path in (*(file.path for file in found), *data) if path.is_file()] + [
        json.dumps(file.config, sort_keys=True, default=str) for file in found
    ]


def texts_in(value: Any) -> Iterator[str]:
    """Every text in lists and mappings, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def write_outputs(comparison: Comparison, folder: Path, *, card: bool) -> None:
    """comparison.json, report.html, figures/ and, if asked for, a card for each changed model."""
    from neuroweave.diagnose import write_report
    from neuroweave.diagnose.report.card import write_card
    from neuroweave.diagnose.report.page import save_figures

    comparison.write(folder / "comparison.json")
    write_report(comparison, folder / "report.html", stored=True)
    (folder / "figures").mkdir(exist_ok=True)
    save_figures(comparison, folder / "figures")
    for number, other in enumerate(comparison.others if card else [], start=1):
        name = "README.md" if len(comparison.others) == 1 else f"README-{number}.md"
        write_card(comparison, other, folder / name)


def make_plan(
    *, tokens: int | None, window: int | None, prompts: Path | None, tasks: Sequence[str], limit: int | None,
    no_signal: bool, no_gradients: bool, no_sampling: bool, no_weights: bool, no_speed: bool,
) -> Plan:  # fmt: skip
    """The plan with what was given on the command line. Raises ValueError for what it does not allow."""
    from pydantic import ValidationError

    from neuroweave.diagnose import Plan

    given: dict[str, Any] = {
        "tokens": tokens, "window": window, "prompts": None if prompts is None else read_prompts(prompts),
    }  # fmt: skip
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    without = {"gradient": no_gradients, "sampling": no_sampling, "speed": no_speed}
    settings |= {name: None for name, left_out in without.items() if left_out}
    settings |= {name: False for name, left_out in (("signal", no_signal), ("weights", no_weights)) if left_out}
    if tasks:
        settings["tasks"] = {"names": tuple(tasks), "limit": limit}
    elif limit is not None:
        raise ValueError("--limit says how many questions of a benchmark to ask; name one with --tasks")
    try:
        return Plan.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][-1])
        raise ValueError(f"--{option} {first['input']}: {first['msg'].lower()}") from error


def read_prompts(file: Path) -> tuple[str, ...]:
    """One prompt a line; empty lines are refused where they stand between others."""
    try:
        lines = file.read_text(encoding="utf-8-sig").strip("\n").split("\n")
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
    from neuroweave.diagnose.report import verdict

    for sentence in verdict.unmeasured(comparison):
        note(sentence)
    if not comparison.others:
        return

    print_table(*verdict.summary(comparison))
    for other in comparison.others:
        click.echo(f"\n{other.model.name}")
        for sentence in verdict.sentences(comparison, other):
            click.echo(f"  {sentence}")
    for remark in comparison.notes:
        note(f"note: {remark}")
