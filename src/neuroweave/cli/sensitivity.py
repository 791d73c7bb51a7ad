"""`neuroweave sensitivity`: change one layer at a time, and rank the layers by what it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import note, print_json, print_table
from neuroweave.cli.sweep import Change, Job, cells, percentage, with_measuring_options

if TYPE_CHECKING:
    from neuroweave.diagnose.results.sweep import Sensitivity

LAYER = "layer"


@click.command(
    help="""Change the activation of one layer of MODEL at a time, and rank the layers by the KL that it makes.

    MODEL is a checkpoint folder or a hub id. ACTIVATION is a name, or several joined by | (each gets an even segment of
    the neurons). Each layer is changed in memory and undone before the next. Ranks come with the ranks that are within
    noise.

    \b
    neuroweave sensitivity MODEL --activation relu --out sensitivity
    neuroweave sensitivity MODEL --activation relu --layers "every 2nd" --out sensitivity
    """
)
@click.argument("model")
@click.option("--activation", required=True, metavar="ACTIVATION", help="What one layer at a time gets.")
@click.option(
    "--site", default="mlp", show_default=True, metavar="SITE", help="Where in the layer, such as attention.q."
)
@click.option("--layers", default="all", show_default=True, help='Which layers: "0,3", "4-9", "every 2nd from 1".')
@with_measuring_options
def command(model: str, activation: str, site: str, layers: str, as_json: bool, **measured: Any) -> None:
    from neuroweave.diagnose import require_report_extra
    from neuroweave.diagnose.report.frontier import save_sensitivity
    from neuroweave.diagnose.results.sweep import BASE, Sensitivity
    from neuroweave.diagnose.variants import rank_layers

    require_report_extra()
    check_words(activation, site, layers)
    job = Job.prepare("sensitivity", model, **measured)
    changes = list(layer_changes(job, activation, site, layers))
    check_result(job.file.path.with_suffix(".json"), overwrite=measured["overwrite"])
    keys = {change.key for change in changes}
    asked = [point for point in job.run(changes) if point.key in keys or point.key == BASE]
    asked.sort(key=lambda point: point.settings.get(LAYER, -1))
    heading, path = job.file.heading, job.file.path
    ranking = rank_layers([point for point in asked if point.key != BASE], heading.predictions, plan=heading.plan)
    result = Sensitivity(heading=heading, points=asked, ranking=ranking)
    write_result(result, path.with_suffix(".json"))
    files = save_sensitivity(ranking, path.parent, stem=path.stem, label=f"{site} {activation}")
    if as_json:
        print_json(json.loads(result.model_dump_json()))
    else:
        print_ranking(result)
        note(f"wrote {path}, {path.with_suffix('.json').name} and {len(files)} figures beside it")
    if any(point.failure for point in asked):
        raise SystemExit(1)


def check_words(activation: str, site: str, layers: str) -> None:
    """Raise ValueError for what is wrong whatever the model."""
    from neuroweave.surgery.recipe import LAYER_SITES, activation_spec, layer_selection, nearest

    if not activation.strip():
        raise ValueError("--activation is empty; give a name, such as relu")
    if activation_spec(activation) == "original":
        raise ValueError("--activation original changes nothing; name another")
    if site not in LAYER_SITES:
        raise ValueError(
            f"--site {site}: no site of a layer{nearest(site, LAYER_SITES)}; known: {', '.join(LAYER_SITES)}"
        )
    layer_selection(layers)


def check_result(path: Path, *, overwrite: bool) -> None:
    """Raise ValueError for a file that is no ranking of ours and would be replaced by one."""
    from neuroweave.diagnose.results.sweep import Sensitivity

    if overwrite or not path.exists():
        return
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fields = None
    if not isinstance(fields, dict) or fields.keys() != Sensitivity.model_fields.keys():
        raise ValueError(
            f"{path}: not a ranking of layers, which would be written there; choose another --out, or add --overwrite"
        )


def write_result(result: Sensitivity, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def layer_changes(job: Job, activation: str, site: str, layers: str) -> Iterator[Change]:
    """One change a layer. Raises ValueError for layers that the model lacks, or that lack the site."""
    from neuroweave.surgery.recipe import Recipe

    def recipe(of: Any) -> Recipe:
        name = f"{site} {activation}"
        return Recipe.parse({"name": name, "sites": [{"site": site, "activation": activation, "layers": of}]})

    for layer in job.layers_of(recipe(layers)):
        yield Change({LAYER: layer, f"{site}.activation": activation}, recipe([layer]))


def print_ranking(result: Sensitivity) -> None:
    """A row a layer, the most sensitive first, and the failures below."""
    outcomes = {point.settings[LAYER]: point.outcome for point in result.points if point.outcome and point.settings}
    rows = []
    for layer in result.ranking:
        outcome = outcomes[layer.layer]
        assert outcome is not None
        within = "" if layer.first is None else ranks(layer.first, layer.last)
        own = [each for each in outcome.activations if each.layer == layer.layer]
        shares = [percentage(share.value) for share in (own[0].zero, own[0].near_zero)] if own else ["", ""]
        rows.append((layer.rank, within, layer.layer, *reversed(cells(outcome)[:2]), *shares))
    header = ("rank", "within noise", "layer", "KL", "perplexity ratio", "zeros in it", "near zeros in it")
    print_table(header, rows)
    for point in result.points:
        if point.failure:
            note(f"{point.name}: could not be measured: {point.failure}")


def ranks(first: int, last: int | None) -> str:
    """`3`, or `3 to 5`."""
    return str(first) if first == last else f"{first} to {last}"
