"""`neuroweave sweep`: measure a grid of changes of one model against it; draw the frontiers."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import json_option, note, print_json, print_table

if TYPE_CHECKING:
    from neuroweave.diagnose import Plan, Subject
    from neuroweave.diagnose.results.sweep import Kind, ModelUsed, Outcome, Point, PointsFile
    from neuroweave.diagnose.variants import Variant
    from neuroweave.surgery.fusion.fuse import DeltaInput
    from neuroweave.surgery.fusion.plan import FuseOptions, Target
    from neuroweave.surgery.recipe import Recipe

FUSE, ACTIVATION = "fuse.", ".activation"
SEED = 42
FUSE_NUMBERS, FUSE_NAMES = ("alpha", "gamma_cap", "gate_scale"), ("alpha_mode", "rounding")

measuring_options: list[Callable[[Any], Any]] = [
    click.option("--out", required=True, metavar="FILE.jsonl|DIR", type=click.Path(path_type=Path),
                 help="Where the points go, with figures beside. Points that are there are not measured again."),
    click.option("--data", multiple=True, metavar="FILE|FOLDER", type=click.Path(path_type=Path),
                 help="A text file or a folder of them; may be repeated. Default: the shipped evaluation text."),
    click.option("--tokens", type=int, default=4096, show_default=True, help="Tokens of text to measure on."),
    click.option("--window", type=int, default=256, show_default=True, help="Tokens per forward pass."),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                 show_default=True),
    click.option("--overwrite", is_flag=True, help="Begin the file of points anew."),
    json_option,
]  # fmt: skip


def with_measuring_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `sweep` and `sensitivity` have in common."""
    for option in reversed(measuring_options):
        function = option(function)
    return function


@click.command(
    help="""Measure a grid of changes of MODEL against the unchanged MODEL; draw the frontiers.

    MODEL is a checkpoint folder or a hub id. Every --vary names one setting and its values; all combinations are
    measured, each in memory and undone before the next. KEY is a site with `.activation` (mlp.activation,
    attention.q.activation, head.activation, everywhere.activation ...) or one of fuse.alpha, fuse.gamma_cap,
    fuse.gate_scale, fuse.alpha_mode, fuse.rounding. `original` is the model's own activation.

    \b
    neuroweave sweep MODEL --vary mlp.activation=relu,gelu,silu_tanh --out sweep
    neuroweave sweep MODEL --vary mlp.activation=original,relu --vary fuse.alpha=0.02,1,4 --out sweep
    """
)
@click.argument("model")
@click.option("--recipe", metavar="FILE|NAME", help="A recipe that every point begins with; --vary replaces its sites.")
@click.option("--vary", multiple=True, metavar="KEY=VALUE,VALUE...", help="A setting and its values; may be repeated.")
@click.option("--layers", default="all", show_default=True, help='Layers of what is varied: "0,3", "4-9", "every 2nd".')
@click.option("--bank", metavar="FILE", help="For fuse.*: the neuron bank.  [default: the shipped one]")
@click.option("--seed", type=int, help="For fuse.*: what the deltas are drawn from.  [default: 42]")
@with_measuring_options
def command(
    model: str, recipe: str | None, vary: Sequence[str], layers: str, bank: str | None, seed: int | None, as_json: bool,
    **measured: Any,
) -> None:  # fmt: skip
    from neuroweave.diagnose import require_report_extra
    from neuroweave.diagnose.report.frontier import save_frontiers
    from neuroweave.diagnose.variants import on_frontier

    require_report_extra()
    grid = parse_vary(vary)
    if (bank is not None or seed is not None) and not any(key.startswith(FUSE) for key in grid):
        raise ValueError("--bank and --seed belong to fuse.*; add --vary fuse.alpha=..., or leave them out")
    job = Job.prepare("sweep", model, **measured)
    fusing = {"bank": bank or "default", "seed": SEED if seed is None else seed}
    changes = list(job.changes(grid, recipe=recipe, layers=layers, fusing=fusing))
    points = job.run(changes)
    fronts = on_frontier(points)
    files = save_frontiers(points, fronts, job.file.path.parent, stem=job.file.path.stem)
    if as_json:
        rows = [point.model_dump(mode="json") | {"frontier": fronts[point.key]} for point in points]
        print_json({"heading": job.file.heading.model_dump(mode="json"), "points": rows})
    else:
        print_points(points, fronts)
        note(f"wrote {job.file.path} and {len(files)} figures beside it")
    asked = {change.key for change in changes}
    if any(point.failure for point in points if point.key in asked):
        raise SystemExit(1)


# ---------------------------------------------------------------------------------------------------------- the grid


def parse_vary(words: Sequence[str]) -> dict[str, list[str | float]]:
    """Key -> its values, from `KEY=VALUE,VALUE`. Raises ValueError for what is not known, empty or given twice."""
    from neuroweave.surgery.recipe import EVERYWHERE, SITES, nearest

    known = [*(f"{site}{ACTIVATION}" for site in (*SITES, EVERYWHERE))]
    known += [f"{FUSE}{name}" for name in (*FUSE_NUMBERS, *FUSE_NAMES)]
    if not words:
        raise ValueError(f"nothing to vary: give --vary KEY=VALUE,VALUE; known keys: {', '.join(known)}")
    grid: dict[str, list[str | float]] = {}
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals:
            raise ValueError(f"--vary takes KEY=VALUE,VALUE, got {word!r}")
        if key not in known:
            raise ValueError(f"--vary {key}: not known{nearest(key, known)}; known: {', '.join(known)}")
        if key in grid:
            raise ValueError(f"--vary {key} is given twice; put all values into one list")
        grid[key] = [parse_value(key, part.strip()) for part in text.split(",")]
        for at, value in enumerate(grid[key]):
            if value in grid[key][:at]:
                raise ValueError(f"--vary {key}: {value} is given twice; each point is measured once")
    return grid


def parse_value(key: str, text: str) -> str | float:
    """One value as it will stand in the settings. Raises ValueError for one that the key cannot have."""
    from neuroweave.surgery.fusion.plan import FuseOptions
    from neuroweave.surgery.recipe import activation_spec

    if not text:
        raise ValueError(f"--vary {key}: an empty value; give values joined by commas, such as {key}=A,B")
    name = key.removeprefix(FUSE)
    try:
        if not key.startswith(FUSE):
            activation_spec(text)
            return "|".join(part.strip() for part in text.split("|"))
        value: Any = text if name in FUSE_NAMES else number(text)
        FuseOptions(**({"alpha": value} if name == "gate_scale" else {name: value}))
    except ValueError as error:
        raise ValueError(f"--vary {key}: {error}") from None
    return value


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"takes numbers, got {text!r}") from None


@dataclass(frozen=True, eq=False)
class Change:
    """One point of a grid before there is a model: a recipe, a fusion, both, or neither (the model as it is)."""

    settings: dict[str, Any]
    recipe: Recipe | None = None
    fusion: Fusion | None = None

    @property
    def name(self) -> str:
        return ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.settings.items()
        )

    @property
    def described(self) -> dict[str, Any]:
        """All that the change depends on, as plain JSON values."""
        whole = {
            "recipe": self.recipe.to_dict()["sites"] if self.recipe else None,
            "fusion": self.fusion.described if self.fusion else None,
        }
        return json.loads(json.dumps(whole))

    @property
    def key(self) -> str:
        from neuroweave.diagnose.results.sweep import change_key

        return change_key(self.described)

    def variant(self, base: Subject) -> Variant:
        from neuroweave.diagnose.variants import Variant
        from neuroweave.surgery.patching import patch

        @contextmanager
        def applied() -> Iterator[Subject]:
            model: Any = base.model
            with ExitStack() as stack:
                if self.fusion:
                    stack.enter_context(self.fusion.applied(model))
                if self.recipe:
                    stack.enter_context(patch(model, self.recipe))
                yield replace(base, name=self.name)

        return Variant(self.name, self.settings, applied, self.described)


def merged_recipe(recipe: Recipe | None, activations: Mapping[str, str], layers: str) -> Recipe | None:
    """The recipe with other activations at some sites: in the layers that it names for a site, else in `layers`.

    None when nothing is left but the model's own activations.
    """
    from neuroweave.surgery.recipe import LAYER_SITES, Recipe

    edits: list[dict[str, Any]] = list(recipe.to_dict()["sites"]) if recipe else []
    for site, activation in activations.items():
        if not any(site in edit["site"] for edit in edits):
            selected = {"layers": layers} if site in (*LAYER_SITES, "everywhere") else {}
            edits.append({"site": [site], "activation": activation, **selected})
            continue
        split = []
        for edit in edits:
            others = [name for name in edit["site"] if name != site]
            split += [edit | {"site": others}] if others else []
            split += [edit | {"site": [site], "activation": activation}] if site in edit["site"] else []
        edits = split
    if all(edit["activation"] == "original" for edit in edits):
        return None
    return Recipe.parse({"name": recipe.name if recipe else "sweep", "sites": edits}, source="--vary")


# ---------------------------------------------------------------------------------------------------- the measurement


@dataclass(frozen=True, eq=False)
class Job:
    """A model, a text, a plan and a file of points, all checked; the model is not loaded yet."""

    source: str
    folder: Path
    skeleton: Any
    dtype: str
    texts: Sequence[Any]
    plan: Plan
    file: PointsFile

    @classmethod
    def prepare(
        cls, kind: Kind, model: str, *, out: Path, data: Sequence[Path], tokens: int, window: int, dtype: str,
        overwrite: bool,
    ) -> Job:  # fmt: skip
        """Raises ValueError for whatever is wrong with the model, the text, the numbers or the file."""
        from transformers import AutoConfig

        from neuroweave.checkpoint.hub import local_folder
        from neuroweave.checkpoint.loading import check_source, check_weights, load_tokenizer
        from neuroweave.diagnose import Subject
        from neuroweave.diagnose.results.sweep import PointsFile
        from neuroweave.diagnose.variants import make_heading
        from neuroweave.surgery.on_disk import skeleton
        from neuroweave.text import documents, read_documents

        plan = make_plan(tokens, window)
        texts = read_documents(data) if data else documents("evaluation")
        folder = local_folder(model)
        check_source(folder)
        check_weights(folder)
        config = AutoConfig.from_pretrained(folder)
        path = points_path(out, kind)
        used = model_used(model, folder, config, dtype)
        bare = skeleton(folder, config)
        tokenizer = load_tokenizer(folder)
        longest = Subject(used.name, bare, tokenizer).longest
        if longest is not None and window > longest:
            raise ValueError(f"--window {window} is more than the model can read ({longest}); give that or less")
        file = PointsFile(path, make_heading(kind, used, tokenizer, texts, plan=plan), overwrite=overwrite)
        return cls(model, folder, bare, dtype, texts, plan, file)

    def changes(
        self, grid: Mapping[str, list[Any]], *, recipe: str | None, layers: str, fusing: Mapping[str, Any]
    ) -> Iterator[Change]:
        """Every point of the grid. `fusing`: bank and seed. Raises ValueError for what the model cannot take."""
        from neuroweave.surgery.recipe import Recipe, layer_selection

        start = Recipe.load(recipe) if recipe else None
        layer_selection(layers)
        fusions = Fusions(self.folder, self.skeleton, layers=layers, **fusing)
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            activations = {key.removesuffix(ACTIVATION): settings[key] for key in grid if key.endswith(ACTIVATION)}
            numbers = {key.removeprefix(FUSE): settings[key] for key in grid if key.startswith(FUSE)}
            try:
                merged = merged_recipe(start, activations, layers)
                if merged:
                    self.layers_of(merged)
            except ValueError as error:
                point = ", ".join(f"{key}={value}" for key, value in settings.items())
                raise ValueError(f"{point}: {error}") from error
            given = ({"recipe": recipe} if recipe else {}) | ({"layers": layers} if layers != "all" else {})
            yield Change(given | settings, merged, fusions.get(**numbers) if numbers else None)

    def layers_of(self, recipe: Recipe) -> list[int]:
        """The layers that a recipe changes. Raises ValueError for one that the model cannot take."""
        from neuroweave.surgery.patching import refuse_unpatchable
        from neuroweave.surgery.plan import resolve

        refuse_unpatchable(self.skeleton)
        return sorted({layer for edit in resolve(self.skeleton, recipe).plan for layer in edit.get("layers", ())})

    def run(self, changes: Sequence[Change]) -> list[Point]:
        """Measure what is not in the file yet; every point of the file, the least KL first, failures last."""
        from neuroweave.diagnose.bootstrap import FEWEST_UNITS, LEAST_UNITS
        from neuroweave.diagnose.results.sweep import BASE

        left = [change for change in changes if change.key not in self.file.points]
        if len(left) < len(changes):
            note(f"{len(changes) - len(left)} of {len(changes)} points are in {self.file.path} already")
        units = self.file.heading.text.units
        if units < FEWEST_UNITS:
            few = "too few for intervals" if units < LEAST_UNITS else "the intervals are likely too narrow"
            note(f"units of text: {units}, {few}; give more --tokens, or less --window")
        if left:
            self.measure(left)
        kls = {key: point.outcome.kl.value for key, point in self.file.points.items() if point.outcome}
        order = sorted(self.file.points, key=lambda key: (kls.get(key, math.inf), key != BASE, key))
        return [self.file.points[key] for key in order]

    def measure(self, changes: Sequence[Change]) -> None:
        from neuroweave.checkpoint.loading import load_model, load_tokenizer
        from neuroweave.diagnose import Subject
        from neuroweave.diagnose.report.numbers import bracketed
        from neuroweave.diagnose.results.sweep import BASE
        from neuroweave.diagnose.variants import measure_into

        model, how = load_model(self.folder, dtype=self.dtype)
        name = self.file.heading.model.name
        note(f"{name}: {how}")
        base = Subject(name, model, load_tokenizer(self.folder), self.source)
        variants = [change.variant(base) for change in changes]
        for number, point in enumerate(measure_into(self.file, base, self.texts, variants)):
            if point.key != BASE:
                told = f"KL {bracketed(point.outcome.kl)}" if point.outcome else f"failed: {point.failure}"
                note(f"{number}/{len(variants)}  {point.name}: {told}")


def make_plan(tokens: int, window: int) -> Plan:
    from pydantic import ValidationError

    from neuroweave.diagnose.variants import variant_plan

    try:
        return variant_plan(tokens=tokens, window=window)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{first['loc'][-1]} {first['input']}: {first['msg'].lower()}") from None


def points_path(out: Path, kind: str) -> Path:
    """The file of points that `--out` means. Raises ValueError for an output that cannot be it."""
    if out.suffix == ".jsonl":
        if not out.parent.is_dir():
            raise ValueError(f"{out}: not the name of a file in a folder that exists")
        return out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file whose name does not end in .jsonl; name a folder, or a .jsonl file")
    return out / f"{kind}.jsonl"


def model_used(source: str, folder: Path, config: Any, dtype: str) -> ModelUsed:
    """The model as the file of points names it: by the bytes of its weights and config, and how it is computed."""
    import torch

    from neuroweave.checkpoint.loading import choose_dtype
    from neuroweave.checkpoint.manifest import sha256_of
    from neuroweave.diagnose.results.sweep import ModelUsed

    suffixes = (".safetensors", ".bin")
    files = [path for path in sorted(folder.iterdir()) if path.name == "config.json" or path.suffix in suffixes]
    digest = hashlib.sha256(json.dumps([[path.name, sha256_of(path)] for path in files]).encode())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stored = getattr(config.get_text_config(), "dtype", None) or config.dtype or torch.float32
    chosen, _ = choose_dtype(dtype, stored, device)
    name = Path(source).name or source
    return ModelUsed(
        name=name, source=source, sha256=digest.hexdigest(), dtype=str(chosen).removeprefix("torch."), device=device
    )


def print_points(points: Sequence[Point], fronts: Mapping[str, Sequence[str]]) -> None:
    """A row a point, numbered as in the figures, and the failures below."""
    from neuroweave.diagnose.report.frontier import numbered
    from neuroweave.diagnose.results.sweep import BASE

    numbers, rows = numbered(points), []
    for point in points:
        if point.outcome:
            name = f"{point.name} (unchanged)" if point.key == BASE else point.name
            rows.append((numbers.get(point.key, ""), name, *cells(point.outcome), ", ".join(fronts[point.key])))
    print_table(("", "settings", "perplexity ratio", "KL", "zeros", "near zeros", "frontier"), rows)
    for point in points:
        if point.failure:
            note(f"{point.name}: could not be measured: {point.failure}")


def cells(outcome: Outcome) -> tuple[str, ...]:
    """Perplexity ratio and KL with their intervals, shares of zeros and of near zeros."""
    from neuroweave.diagnose.report.numbers import bracketed

    shares = (percentage(share.value) if share else "" for share in (outcome.zero, outcome.near_zero))
    return bracketed(outcome.perplexity_ratio, 1.0), bracketed(outcome.kl), *shares


def percentage(share: float) -> str:
    """`50.8 %`; `0 %` where it is exact, `0.0 %` where it is not."""
    return f"{100 * share:.1f} %" if share else "0 %"


# ---------------------------------------------------------------------------------------------------- fusing in memory


class Fusions:
    """Fusions into one model by their numbers; deltas are planned once for each size."""

    def __init__(self, folder: Path, skeleton: Any, *, layers: str, bank: str, seed: int) -> None:
        self.folder, self.skeleton, self.layers, self.bank, self.seed = folder, skeleton, layers, bank, seed
        self._deltas: dict[Any, DeltaInput] = {}

    def get(self, *, gate_scale: float | None = None, **numbers: Any) -> Fusion:
        """Raises ValueError for a bank, numbers or layers that do not fit the model."""
        from neuroweave.checkpoint.reader import Checkpoint
        from neuroweave.surgery.fusion.generated import generated_deltas
        from neuroweave.surgery.fusion.plan import FuseOptions, plan_fusion
        from neuroweave.surgery.neurons.bank import default_bank_path
        from neuroweave.surgery.recipe import layer_selection, select_layers
        from neuroweave.surgery.sites import decoder_stacks

        if gate_scale not in self._deltas:
            bank = default_bank_path() if self.bank == "default" else Path(self.bank)
            size = {} if gate_scale is None else {"gate_scale": gate_scale}
            self._deltas[gate_scale] = generated_deltas(self.folder, bank, seed=self.seed, **size)
        deltas = self._deltas[gate_scale]
        count = max(map(len, decoder_stacks(self.skeleton)))
        chosen = None if self.layers == "all" else tuple(select_layers(layer_selection(self.layers), count))
        options = FuseOptions(layers=chosen, seed=self.seed, **numbers)
        with Checkpoint(self.folder) as checkpoint:
            plan = plan_fusion(checkpoint, deltas.source, options)
        if plan.problems:
            raise ValueError(plan.problems[0])
        names = dict(self.skeleton.named_parameters(remove_duplicate=False))
        for target in plan.targets:
            parameter_name(target.stored.name, names)
        return Fusion(self.folder, deltas, options, plan.targets)


@dataclass(frozen=True, eq=False)
class Fusion:
    """A fusion as `neuroweave fuse` would write it, done to a model in memory: the same weights to the bit."""

    folder: Path
    deltas: DeltaInput
    options: FuseOptions
    targets: Sequence[Target]

    @property
    def described(self) -> dict[str, Any]:
        return {"options": asdict(self.options), "deltas": self.deltas.description}

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """The model with other weights; its own come back to the bit. A copy of what is changed is kept meanwhile."""
        import torch

        from neuroweave.checkpoint.reader import Checkpoint

        parameters = dict(model.named_parameters(remove_duplicate=False))
        kept: list[tuple[Any, Any]] = []
        try:
            with Checkpoint(self.folder) as checkpoint, torch.no_grad():
                for target in self.targets:
                    parameter = parameters[parameter_name(target.stored.name, parameters)]
                    weights = checkpoint.read_torch(target.stored.name)
                    if not torch.equal(weights.to(parameter), parameter):
                        raise ValueError(
                            f"{target.stored.name}: the model in memory has other weights than its file; fuse with "
                            "`neuroweave fuse`, and compare the folders"
                        )
                    kept.append((parameter, parameter.detach().clone()))
                    self.fuse(weights, target, checkpoint)
                    parameter.copy_(weights)
            yield
        finally:
            with torch.no_grad():
                for parameter, old in kept:
                    parameter.copy_(old)

    def fuse(self, weights: Any, target: Target, checkpoint: Any) -> None:
        """Change `weights`, a tensor as it is stored, in place."""
        import torch

        from neuroweave.surgery.fusion.arithmetic import STORED
        from neuroweave.surgery.fusion.tensor_edit import TensorEdit, edit_rows

        edit = TensorEdit(target, checkpoint, self.deltas.source, self.options)
        group = edit.group(0)
        group.combine([job() for job in group.prepare])  # the scale, from standard deviations
        stored = weights.view(-1).view(torch.uint8).numpy().view(STORED[target.stored.dtype]).reshape(target.matrix)
        rows, columns = target.covered
        delta = self.deltas.source.rows(target.delta.name, 0, rows)
        edit_rows(edit.edit, stored[:rows, :columns], delta, 0, target.matrix[1])


def parameter_name(stored: str, parameters: Mapping[str, Any]) -> str:
    """The model's name of a stored tensor: the same, or the only one with the same end (another prefix)."""
    if stored in parameters:
        return stored
    found = [name for name in parameters if name.endswith(f".{stored}") or stored.endswith(f".{name}")]
    if len(found) != 1:
        raise ValueError(
            f"{stored}: not found in the loaded model; fuse with `neuroweave fuse`, and compare the folders"
        )
    return found[0]
