"""A Hugging Face model card for a changed model: what was changed, from what, and what the numbers allow to be said.

The front matter carries the numbers as `model-index` (the hub's own `.eval_results` take its benchmarks only), the text
carries them with intervals and readings. No path of this machine is shown, only names of folders and files.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from neuroweave.checkpoint.hub import is_hub_id
from neuroweave.checkpoint.manifest import file_entry, read_manifest
from neuroweave.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from neuroweave.diagnose.report.differences import rows
from neuroweave.diagnose.report.verdict import sentences
from neuroweave.diagnose.results.comparison import Comparison, Measured, Other
from neuroweave.diagnose.results.records import Estimate

NAMES_OF_A_BASE = ("base_model", "base", "model", "source", "repository", "repo_id", "_name_or_path")
MOST_DOCUMENTS = 5
TAG = "neuroweave"
_MARKS = re.compile(r"([\\`*_\[\]|#!~$])")
# the folders of an absolute path inside a text; its last part stays
_FOLDERS = re.compile(r"(?<![\w/.~])(?:file://|~|[A-Za-z]:)?[\\/](?:[^\s\\/]+[\\/]+)+")


@dataclass(frozen=True)
class Wording:
    """Text that anyone may read: without paths of this machine, and safe inside Markdown.

    `names`: what to call models whose names are paths.
    """

    names: Mapping[str, str]

    def plain(self, text: str) -> str:
        """On one line, without paths of this machine."""
        for name in sorted(self.names, key=len, reverse=True):  # one may begin with the other
            text = text.replace(name, self.names[name])
        return _FOLDERS.sub("", " ".join(folder_name(text).split()))

    def markdown(self, text: str) -> str:
        """The same, with every character that Markdown or HTML would act on escaped."""
        return html.escape(_MARKS.sub(r"\\\1", self.plain(text)), quote=False)

    def value(self, value: Any) -> Any:
        """A recipe or the like, with all its texts as `plain` has them."""
        if isinstance(value, dict):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return self.plain(value) if isinstance(value, str) else value


def write_card(
    comparison: Comparison, other: Other, path: Path, *, hashed: bool = True, overwrite: bool = False
) -> None:
    """Write `model_card` to `path`; the lineage is the manifest in the model's folder, else the files are hashed now.

    `hashed`: False leaves the SHA-256 of files out, which takes time for large ones. A file that is there is replaced
    if it is a card of ours, or with `overwrite`. Raises ValueError for one that somebody else wrote, and for a manifest
    that cannot be understood.
    """
    if path.exists() and not overwrite and not is_card(path):
        raise ValueError(
            f"{path}: not a card that neuroweave wrote, so it is not replaced; give the card another name, such as "
            f"{path.with_name('MODEL_CARD.md')}, or overwrite=True"
        )
    text = model_card(comparison, other, manifest=find_lineage(comparison.base, other.model, hashed=hashed))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def is_card(path: Path) -> bool:
    """Whether the file is a model card with the tag that `front_matter` gives."""
    try:
        parts = path.read_text(encoding="utf-8").split("---\n", 2)
        data = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except (OSError, ValueError, yaml.YAMLError):
        return False
    tags = data.get("tags") if isinstance(data, dict) else None
    return isinstance(tags, list) and TAG in tags


def model_card(comparison: Comparison, other: Other, *, manifest: dict[str, Any] | None = None) -> str:
    """The text of `README.md` for `other`: YAML front matter and Markdown.

    `manifest`: as in `neuroweave_manifest.json`, of which `operation`, `parameters`, `inputs` and `outputs` are used.
    """
    base = comparison.base
    wording = Wording(public_names(base.name, other.model.name))
    parts = [
        f"# {wording.markdown(other.model.name)}",
        *what_was_changed(comparison, other, manifest, wording),
        *what_was_measured(comparison, other, wording),
        *how_it_was_measured(comparison, other, wording),
        *how_to_load(other, wording),
        *lineage(other, manifest, wording),
        *limits(comparison, wording),
    ]
    return f"---\n{front_matter(comparison, other, manifest, wording)}\n---\n\n" + "\n\n".join(parts) + "\n"


def public_names(base: str, other: str) -> dict[str, str]:
    """For names that are paths: the last part, with a mark where the two would be the same."""
    same = folder_name(base) == folder_name(other)
    marks = {base: " (base)" if same else "", other: " (changed)" if same else ""}
    return {name: folder_name(name) + mark for name, mark in marks.items() if folder_name(name) != name}


def front_matter(comparison: Comparison, other: Other, manifest: dict[str, Any] | None, wording: Wording) -> str:
    from huggingface_hub import ModelCardData

    model = other.model
    changes = {
        "activation-swap": model.recipe is not None,
        "neuron-fusion": (manifest or {}).get("operation") == "fuse",
    }
    return ModelCardData(
        base_model=find_base_model(comparison.base, model, manifest),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[TAG, *(tag for tag, fits in changes.items() if fits)],
        metrics=["perplexity"],
        model_name=wording.plain(model.name),
        eval_results=evaluations(comparison, other, wording),
    ).to_yaml()


def evaluations(comparison: Comparison, other: Other, wording: Wording) -> list[Any]:
    """The numbers as `EvalResult`, those that are finite; the text's SHA-256 is its revision."""
    from huggingface_hub import EvalResult

    text, model, difference = comparison.text, other.model, other.difference
    against = {"base": wording.plain(comparison.base.name)}
    measures: list[tuple[str, str, Estimate, dict[str, Any]]] = [
        ("perplexity", "perplexity", model.perplexity, {}),
        ("accuracy", "accuracy of the top token", model.accuracy, {}),
        ("perplexity_ratio", "perplexity over the base's", difference.perplexity_ratio, against),
        ("kl_divergence", "KL(base || this model), nats per token", difference.kl, against),
    ]
    where: dict[str, Any] = {
        "task_type": "text-generation",
        "task_name": "Prediction of the next token",
        "dataset_type": "local-text",
        "dataset_name": documents(comparison, wording),
        "dataset_revision": text.sha256,
        "dataset_args": {"predictions": text.predictions, "window": comparison.plan.window},
    }
    found = [
        EvalResult(
            **where,
            metric_type=kind,
            metric_name=name,
            metric_value=estimate.value,
            metric_args=interval_of(estimate) | more,
        )
        for kind, name, estimate, more in measures
        if math.isfinite(estimate.value)
    ]
    return found + [
        EvalResult(
            task_type="text-generation",
            dataset_type="local-task",
            dataset_name=wording.plain(score.task),
            metric_type=wording.plain(score.metric),
            metric_value=score.value,
            metric_args={
                "version": score.version,
                "standard_error": score.standard_error,
                "questions": score.questions,
            },
        )
        for score in model.tasks
        if math.isfinite(score.value)
    ]


def interval_of(estimate: Estimate) -> dict[str, Any]:
    return {} if estimate.low is None or estimate.high is None else {"interval_95": [estimate.low, estimate.high]}


def documents(comparison: Comparison, wording: Wording) -> str:
    names = [wording.plain(folder_name(name)) for name in comparison.text.documents]
    rest = len(names) - MOST_DOCUMENTS
    return ", ".join(names[:MOST_DOCUMENTS]) + (f" and {rest} more" if rest > 0 else "")


def find_base_model(base: Measured, model: Measured, manifest: dict[str, Any] | None) -> str | None:
    """The hub id of the base, where the models' sources or records name one."""
    records = {"source": base.source, "recipe": model.recipe, "manifest": manifest}
    return next((name for name in named_values(records) if is_hub_id(name)), None)


def named_values(record: Any) -> Iterator[str]:
    """Texts under a key of `NAMES_OF_A_BASE`, at any depth."""
    if isinstance(record, dict):
        for key, value in record.items():
            if isinstance(value, str) and key in NAMES_OF_A_BASE:
                yield value
            yield from named_values(value)
    elif isinstance(record, list | tuple):
        for value in record:
            yield from named_values(value)


def what_was_changed(
    comparison: Comparison, other: Other, manifest: dict[str, Any] | None, wording: Wording
) -> Iterator[str]:
    model, settings = other.model, other.difference.changed_settings
    names = [wording.markdown(measured.name) for measured in (comparison.base, model)]
    yield "## What was changed"
    first = wording.markdown(sentences(comparison, other)[0])
    yield f"This card describes {names[1]}, compared with {names[0]}. {first}"
    if model.recipe is not None:
        yield fenced("yaml", to_yaml(wording.value(model.recipe.get("recipe", model.recipe))))
    if manifest and "operation" in manifest:
        done = {key: manifest[key] for key in ("operation", "parameters") if key in manifest}
        yield fenced("yaml", to_yaml(wording.value(done)))
    if settings:
        table = [[key, before, after] for key, (before, after) in settings.items()]
        yield markdown_table(["config", "base", "this model"], table, wording)


def what_was_measured(comparison: Comparison, other: Other, wording: Wording) -> Iterator[str]:
    header = ["measure", comparison.base.name, other.model.name, "difference", "95 % interval", "reading"]
    table = [
        [row.metric, row.base, row.other, row.difference, row.interval, row.reading]
        for row in rows(comparison.base, other)
    ]
    yield "## What was measured"
    yield "\n".join(f"- {wording.markdown(sentence)}" for sentence in sentences(comparison, other)[1:])
    yield markdown_table(header, table, wording)


def how_it_was_measured(comparison: Comparison, other: Other, wording: Wording) -> Iterator[str]:
    text, plan, where = comparison.text, comparison.plan, comparison.environment
    versions = ", ".join(f"{package} {version}" for package, version in where.versions.items())
    said = [
        f"Text: {documents(comparison, wording)}; {text.predictions:,} predictions in {text.windows} windows of up to "
        f"{plan.window} tokens, the same for both models.",
        f"SHA-256 of the token ids: {text.sha256}",
        f"Intervals: paired bootstrap over {text.units} units ({text.unit}), {plan.resamples:,} resamples, "
        f"seed {plan.seed}.",
        f"Model: {other.model.architecture}, {other.model.parameters:,} parameters, {other.model.dtype} on "
        f"{other.model.device}.",
        f"Machine: {where.cpu}, {where.cores} cores, {where.threads} threads, accelerator {where.accelerator}, "
        f"{where.platform}.",
        f"Software: {versions}.",
        f"Date: {where.date}.",
    ]
    if plan.speed and other.model.speed:
        said.append(
            f"Speed: {plan.speed.prompt_tokens} prompt tokens, {plan.speed.new_tokens} new tokens, batch "
            f"{plan.speed.batch}, {plan.speed.repeats} runs per model in turns, KV cache on."
        )
    yield "## How it was measured"
    yield "\n".join(f"- {wording.markdown(line)}" for line in said)


def how_to_load(other: Other, wording: Wording) -> Iterator[str]:
    name = json.dumps(wording.plain(other.model.name), ensure_ascii=False)
    patched = other.model.recipe is not None
    code = [
        *(["import neuroweave  # lets transformers load patched checkpoints"] if patched else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        f"model = AutoModelForCausalLM.from_pretrained({name})",
    ]
    yield "## How to load it"
    yield fenced("python", "\n".join(code))
    if patched:
        yield (
            "Without the package, `trust_remote_code=True` loads the same model from `modeling_neuroweave.py` in its "
            "folder. Without either it does not load: it never loads as the unchanged model."
        )


def lineage(other: Other, manifest: dict[str, Any] | None, wording: Wording) -> Iterator[str]:
    """Every file whose hash is on record, as input or output."""
    record = manifest or {}
    inputs = record.get("inputs") or {"model": (other.model.recipe or {}).get("source")}
    table = [
        [role, *line]
        for role, files in (("input", inputs), ("output", record.get("outputs")))
        for line in recorded_files(files, ())
    ]
    if table:
        yield "## Lineage"
        yield markdown_table(["", "of", "file", "bytes", "SHA-256"], table, wording)


def recorded_files(record: Any, keys: tuple[str, ...]) -> Iterator[list[str]]:
    """(of what, file, bytes, SHA-256) for each entry with bytes or a hash, at any depth."""
    if not isinstance(record, dict):
        return
    whole, header = record.get("sha256"), record.get("header_sha256")
    if keys and (isinstance(whole, str) or isinstance(header, str) or isinstance(record.get("bytes"), int)):
        size = f"{record['bytes']:,}" if isinstance(record.get("bytes"), int) else ""
        value = whole if isinstance(whole, str) else f"{header} (of its header)" if isinstance(header, str) else ""
        yield [", ".join(key for key in keys[:-1] if key not in ("files", "inputs")), keys[-1], size, value]
        return
    for key, value in record.items():
        yield from recorded_files(value, (*keys, str(key)))


def limits(comparison: Comparison, wording: Wording) -> Iterator[str]:
    said = [
        "Everything above was measured on the named text (and tasks, if any) only. It says nothing about other text, "
        "other languages, other tasks, other machines, or how safe the model is to use.",
        "Intervals tell how far the numbers would move with other text of the same kind. What is read as within noise "
        "may be a difference that more text would show.",
        *comparison.notes,
        *(
            f"Not measured ({f.part}, {f.model}): {f.message}"
            for f in comparison.failures
            if f.model == comparison.base.name
        ),
    ]
    yield "## Limits"
    yield "\n".join(f"- {wording.markdown(line)}" for line in said)


def markdown_table(header: list[str], table: list[list[str]], wording: Wording) -> str:
    lines = [[wording.markdown(cell) for cell in line] for line in (header, *table)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_yaml(value: Any) -> str:
    plain = json.loads(json.dumps(value, default=str))  # tuples and the like have no plain YAML
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).strip()


def find_lineage(base: Measured, model: Measured, *, hashed: bool) -> dict[str, Any] | None:
    """The manifest in the model's folder, else the files of both folders as they are; None for a model of no folder."""
    folder = Path(model.source)
    if not model.source or not folder.is_dir():
        return None
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest
    known: dict[tuple[int, int], dict[str, Any]] = {}
    inputs = {"base": {"files": folder_entries(Path(base.source), known, hashed=hashed)}} if base.source else {}
    return {"inputs": inputs, "outputs": folder_entries(folder, known, hashed=hashed)}


def folder_entries(
    folder: Path, known: dict[tuple[int, int], dict[str, Any]], *, hashed: bool
) -> dict[str, dict[str, Any]]:
    """Config and weight files with size and hash; a file that `known` has (a hard link, say) is not read again."""
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return {}
    with Checkpoint(folder, allow_orphans=True) as checkpoint:
        names = ["config.json", *checkpoint.shards]
    entries = {}
    for path in [folder / name for name in names if (folder / name).is_file()]:
        place = path.stat().st_dev, path.stat().st_ino
        if place not in known:
            known[place] = file_entry(path, hashed=hashed)
        entries[path.name] = known[place]
    return entries


def folder_name(text: str) -> str:
    """The last part of an absolute path; any other text as it is."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        if path.is_absolute() or text.startswith(("~/", "~\\")):
            return path.name or "model"
    return text


def fenced(language: str, code: str) -> str:
    """A code block whose fence is longer than any row of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"
